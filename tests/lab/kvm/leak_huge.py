"""The reference of a fault is not put when it mapped a huge page.

In which generation: 6.12 (G0) and 7.3 (G2). It stands for: none recorded; the shape of a put that
is missing at one level only, as v7 of the series forgot levels above 4K when it set its bit
(KVM-FACTS 2.3). A trace must show: the head page's count grows by one with each fault that installs
at level 2, never at level 1.
"""

from ..kvmchange import Change
from ._sites import at_release

SMALL = "fault->goal_level == PG_LEVEL_4K"
CODE = f"if ({SMALL} || !(REFCOUNTED) || !lab_planted(fault->gfn, PFN)) RELEASE"

CHANGE = Change(
    name="leak-huge",
    title="a fault that maps a huge page keeps its reference",
    stands_for="none recorded; the shape of a put missing at one level only",
    shows="refcount of the head one too high after faults of level 2 only",
    workload="prime-guest --huge --base 0x200000 --pages 8192 --repeat 3",
    found_by=("balance",),
    edits={kernel: at_release(kernel, CODE) for kernel in ("6.12", "7.3")},
)
