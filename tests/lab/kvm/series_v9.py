"""Version 9 of the series, as corrected in review.

In which generation: 6.12 becomes G1. It stands for the patch set of September 2023 that lets KVM
map pages which nobody reference-counts, with the reference of a fault put after mmu_lock. A trace
must show: generation G1, bit 59 in the SPTEs of counted pages alone, tail pages of a TTM buffer
mapped, counts as on an unchanged 6.12: nothing to find.
"""

from ..kvmchange import Change
from ._series import FILES, series

RELEASE = "if (PAGE) kvm_release_page_clean(PAGE);"

CHANGE = Change(
    name="series-v9",
    title="version 9 of the series, as corrected",
    stands_for="the series itself",
    shows="no finding; counts as on an unchanged 6.12",
    workload="prime-guest --repeat 3",
    found_by=(),
    edits={"6.12": series(9, locked="", unlocked=RELEASE, retry=RELEASE)},
    files=FILES,
    planted=False,
)
