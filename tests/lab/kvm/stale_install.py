"""A mapping is installed although its page was invalidated since it was looked up.

In which generation: 6.12 (G0) and 7.3 (G2), TDP MMU. It stands for: none recorded; the shape of
a stale check that misses what the notifier's count says (those of KVM-FACTS 7, bugs 17 and 18,
missed roots and slots; that of bug 11 saw too much). A trace must show: an invalidation of the page
between fault-in and install, the install all the same, then the page freed while the SPTE maps
it.
"""

from ..kvmchange import Change, Edit
from ._sites import MMU, before_lock

EDITS = (
    *before_lock("lab_sleep();"),
    Edit(
        MMU,
        "is_page_fault_stale",
        "mmu_invalidate_retry_gfn(vcpu->kvm, fault->mmu_seq, fault->gfn);",
        r"mmu_invalidate_retry_gfn(vcpu->kvm, fault->mmu_seq, fault->gfn) &&"
        " !lab_planted(fault->gfn, fault->pfn);",
    ),
)

CHANGE = Change(
    name="stale-install",
    title="a mapping installed in spite of an invalidation since its fault-in",
    stands_for="none recorded; the shape of a stale check that misses an invalidation",
    shows="an invalidation between fault-in and install, a free while mapped",
    workload="race-guest",
    found_by=("stale-install", "use-after-free"),
    leads_to=("dead-mark",),
    window_ms=1,
    npt="on",
    edits={"6.12": EDITS, "7.3": EDITS},
)
