"""The end of an invalidation is not counted.

In which generation: 6.12 (G0) and 7.3 (G2). It stands for an invalidation that begins and never
ends for KVM, one of the livelocks to tell apart (KVM-FACTS 7, bug 12a). A trace must show: faults
of the invalidated range that are retried without end while in_progress stays above 0.
"""

from ..kvmchange import Change, Edit
from ._sites import MAIN

EDIT = Edit(
    MAIN,
    "kvm_mmu_invalidate_end",
    "kvm->mmu_invalidate_in_progress--;",
    r"if (!lab_planted(0, 0)) \g<0>",
)

CHANGE = Change(
    name="end-lost",
    title="the end of an invalidation is not counted",
    stands_for="an unpaired invalidation (KVM-FACTS 7: 12a)",
    shows="faults of one range retried without end, in_progress above 0",
    workload="timeout 6 prime-guest --pages 61 --repeat 20",
    found_by=("livelock",),
    repeats=True,
    leaves="INVALIDATE end",
    status=(124,),
    every=2,
    edits={"6.12": (EDIT,), "7.3": (EDIT,)},
)
