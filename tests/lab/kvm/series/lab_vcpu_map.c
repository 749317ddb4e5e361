// SPDX-License-Identifier: GPL-2.0
/* kvm_vcpu_map() on the series' call, included by kvm_main.c in its place. See lab_series.h. */
int kvm_vcpu_map(struct kvm_vcpu *vcpu, gfn_t gfn, struct kvm_host_map *map)
{
	struct kvm_follow_pfn kfp = {
		.slot = gfn_to_memslot(vcpu->kvm, gfn),
		.gfn = gfn,
		.flags = FOLL_WRITE | FOLL_GET,
		LAB_ALLOW_NON_REFCOUNTED(true)
	};
	struct page *page = KVM_UNMAPPED_PAGE;
	kvm_pfn_t pfn = __kvm_follow_pfn(&kfp);
	void *hva;

	if (is_error_noslot_pfn(pfn))
		return -EINVAL;
	if (pfn_valid(pfn)) {
		page = pfn_to_page(pfn);
		hva = kmap(page);
	} else {
		hva = memremap(pfn_to_hpa(pfn), PAGE_SIZE, MEMREMAP_WB);
	}
	if (!hva)
		return -EFAULT;
	*map = (struct kvm_host_map){ .page = page, .hva = hva, .pfn = pfn, .gfn = gfn };
	map->is_refcounted_page = lab_page(&kfp, pfn);
	return 0;
}
