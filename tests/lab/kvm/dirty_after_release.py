"""A page is marked dirty after its reference is gone and mmu_lock is released.

In which generation: 6.12 (G0) and 7.3 (G2, which has its function for that inlined: here it gets a
symbol). It stands for v7 of the series, which touched the page outside mmu_lock when its reference
was gone (KVM-FACTS 7, bug 3). A trace must show: the page's release, and only then mark_dirty by
the same fault's task; of the pages that were free by then, marks at count 0. The change counts all
late marks, and logs those of free pages again as ``freed``.
"""

from ..kvmchange import Change, Edit
from ._sites import MAIN, MMU, RELEASE, noted

# Not inlined: with more code in kvm_tdp_mmu_page_fault() gcc inlines kvm_tdp_page_fault() into its
# caller instead, and its probe would see nothing.
LATE = r"""void kvm_set_page_dirty(struct page *page);
static noinline void lab_late_dirty(struct kvm_page_fault *fault, int r)
{
	if (!fault->refcounted_page || r != RET_PF_FIXED || !lab_turn())
		return;
	lab_sleep();
	lab_happened(fault->gfn, page_to_pfn(fault->refcounted_page));
	bool lab_free = !page_count(fault->refcounted_page);
	kvm_set_page_dirty(fault->refcounted_page);
	if (lab_free)
		FREED;
}

""".replace("FREED", noted("freed", "fault->gfn", "page_to_pfn(fault->refcounted_page)"))
SET_DIRTY = "void kvm_set_page_dirty(struct page *page)"
TDP_FAULT = "static int kvm_tdp_mmu_page_fault("

CHANGE = Change(
    name="dirty-after-release",
    title="a page is marked dirty after its release",
    stands_for="series v7, the page used after its reference is gone (KVM-FACTS 7: 3)",
    shows="release, then mark_dirty by the fault's task; of free pages at count 0",
    workload="race-guest --gap 20",
    found_by=("dead-mark",),
    window_ms=1,
    npt="on",
    edits={
        "6.12": (
            Edit(
                MMU,
                "kvm_tdp_mmu_page_fault",
                RELEASE["6.12"],
                r"\g<0> if (kvm_pfn_to_refcounted_page(orig_pfn) && r == RET_PF_FIXED"
                " && lab_turn()) { lab_sleep(); lab_happened(fault->gfn, orig_pfn);"
                " bool lab_free = !page_count(pfn_to_page(orig_pfn));"
                " kvm_set_pfn_dirty(orig_pfn);"
                f" if (lab_free) {noted('freed', 'fault->gfn', 'orig_pfn')}; }}",
            ),
        ),
        "7.3": (
            Edit(MAIN, "", f"static {SET_DIRTY}", f"{SET_DIRTY};\n{SET_DIRTY}"),
            Edit(
                MMU,
                "kvm_tdp_mmu_page_fault",
                f"{RELEASE['7.3']} read_unlock(&vcpu->kvm->mmu_lock);",
                r"\g<0> lab_late_dirty(fault, r);",
            ),
            Edit(MMU, "kvm_tdp_mmu_page_fault", TDP_FAULT, f"{LATE}{TDP_FAULT}"),
        ),
    },
)
