"""A mapping is installed although its page was invalidated since it was looked up.

In which generation: 6.12 (G0) and 7.3 (G2), TDP MMU. It stands for a stale check that is missing
or comes too early (KVM-FACTS 7, bugs 18 and 17). A trace must show: an invalidation of the page
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
    stands_for="a stale check missing or too early (KVM-FACTS 7: 17, 18)",
    shows="an invalidation between fault-in and install, a free while mapped",
    workload="race-guest",
    found_by=("stale-install", "use-after-free"),
    window_ms=1,
    npt="on",
    edits={"6.12": EDITS, "7.3": EDITS},
)
