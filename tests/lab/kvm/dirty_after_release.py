"""A page is marked dirty after its reference is gone and mmu_lock is released.

In which generation: 6.12 (G0). It stands for v7 of the series, which touched the page outside
mmu_lock when its reference was gone (KVM-FACTS 7, bug 3). A trace must show: the page's release,
its free, and only then mark_dirty by the same fault's task.
"""

from ..kvmchange import Change, Edit
from ._sites import MMU, RELEASE

CHANGE = Change(
    name="dirty-after-release",
    title="a page is marked dirty after its release",
    stands_for="series v7, the page used after its reference is gone (KVM-FACTS 7: 3)",
    shows="release, free, then mark_dirty by the fault's task",
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
                " && lab_turn()) { lab_sleep(); if (!page_count(pfn_to_page(orig_pfn)))"
                " lab_happened(fault->gfn, orig_pfn); kvm_set_pfn_dirty(orig_pfn); }",
            ),
        ),
    },
)
