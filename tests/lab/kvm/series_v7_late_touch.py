"""Version 7 of the series: the page is marked accessed when its reference and mmu_lock are gone.

In which generation: 6.12 becomes G1. It stands for the use of a page that may be another's by
then (KVM-FACTS 7, bug 3). A trace must show: mark_accessed by the fault's task after its
mmu_lock; in a race with an invalidation, after the page was freed.
"""

from ..kvmchange import Change, Edit
from ._series import FILES, series
from ._sites import MMU

TOUCH = "if (PAGE) lab_late_touch(fault, PAGE, r);"
STALE = "static bool is_page_fault_stale("
INCLUDE = Edit(MMU, "is_page_fault_stale", STALE, f'#include "lab_late.c"\n{STALE}')

CHANGE = Change(
    name="series-v7-late-touch",
    title="version 7 of the series: a page marked accessed without reference or lock",
    stands_for="series v7 (KVM-FACTS 7: 3)",
    shows="mark_accessed after mmu_lock, in a race after the page's free",
    workload="race-guest --gap 20",
    found_by=("dead-mark",),
    window_ms=1,
    npt="on",
    edits={"6.12": (*series(7, locked="", unlocked=TOUCH, retry=""), INCLUDE)},
    files={**FILES, "arch/x86/kvm/mmu/lab_late.c": "series/lab_late.c"},
)
