"""Version 10 of the series: the bit only where the page tables have room for it.

In which generation: 6.12 becomes G1. It stands for the version that gave the reference back at
once and took the bit out of shadow page tables, where it is reserved. A trace must show: nothing
to find; with npt off no bit 59, and pages that nobody counts refused.
"""

from ..kvmchange import Change
from ._series import FILES, MARK_ACCESSED, series

CHANGE = Change(
    name="series-v10-bit",
    title="version 10 of the series",
    stands_for="the series itself",
    shows="no finding; no bit 59 with npt off",
    workload="prime-guest --repeat 3",
    found_by=(),
    edits={"6.12": series(10, locked=MARK_ACCESSED, unlocked="", retry="")},
    files=FILES,
    planted=False,
)
