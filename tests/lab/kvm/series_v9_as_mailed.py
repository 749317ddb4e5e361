"""Version 9 of the series as it was mailed: the reference of a fault is never put.

In which generation: 6.12 becomes G1. It stands for the leak that reviewers found by reading
(KVM-FACTS 7, bug 5): the page is marked accessed and its reference is kept. A trace must show: a
count one higher after each fault, no release, pages that are never freed.
"""

from ..kvmchange import Change
from ._series import FILES, series

KEPT = "if (PAGE) { kvm_set_page_accessed(PAGE); lab_happened(fault->gfn, page_to_pfn(PAGE)); }"
RELEASE = "if (PAGE) kvm_release_page_clean(PAGE);"

CHANGE = Change(
    name="series-v9-as-mailed",
    title="version 9 of the series, every fault keeps its reference",
    stands_for="series v9 as mailed (KVM-FACTS 7: 5)",
    shows="refcount one too high after each fault; no release; pages never freed",
    workload="prime-guest --repeat 3",
    found_by=("balance", "growth"),
    edits={"6.12": series(9, locked=KEPT, unlocked="", retry=RELEASE)},
    files=FILES,
)
