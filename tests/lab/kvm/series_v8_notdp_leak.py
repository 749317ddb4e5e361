"""Version 8 of the series: with the shadow MMU the reference of a fault is never put.

In which generation: 6.12 becomes G1. It stands for the FOLL_GET that was passed without TDP while
its put was gone (KVM-FACTS 7, bug 4). A trace must show: with npt off a count one higher after
each fault; with npt on nothing. Guests without paging die on it: the bit is reserved in the PAE
tables that they get.
"""

from ..kvmchange import Change
from ._series import FILES, MARK_ACCESSED, series

KEPT = "if (PAGE && !tdp_enabled) lab_happened(fault->gfn, page_to_pfn(PAGE));"

CHANGE = Change(
    name="series-v8-notdp-leak",
    title="version 8 of the series: without TDP every fault keeps its reference",
    stands_for="series v8 with the shadow MMU (KVM-FACTS 7: 4)",
    shows="refcount one too high after each fault with npt off",
    workload="demand_paging_test -v 1 -b 4M",
    found_by=("balance", "growth"),
    npt="off",
    edits={"6.12": series(8, locked=f"{MARK_ACCESSED} {KEPT}", unlocked="", retry="")},
    files=FILES,
)
