// SPDX-License-Identifier: GPL-2.0
/*
 * v7's end of a fault, included by mmu.c. Not inlined: with more code in kvm_tdp_mmu_page_fault() gcc
 * inlines kvm_tdp_page_fault() into its only caller instead, and its probe would see nothing.
 */
static noinline void lab_late_touch(struct kvm_page_fault *fault, struct page *page, int r)
{
	if (r == RET_PF_FIXED && lab_turn())
		lab_sleep();
	if (!page_count(page))
		lab_happened(fault->gfn, page_to_pfn(page));
	kvm_set_page_accessed(page);
}
