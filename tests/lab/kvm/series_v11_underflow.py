"""Version 11 of the series on Linux 6.12: a put without a get while an invalidation is in
progress.

In which generation: 6.12 becomes G1. It stands for the lockless retry of Linux d02c357e5bfa,
whose put v11 kept although it no longer holds a reference there (KVM-FACTS 7, bug 6). A trace
must show: fault-in ends with RETRY, the page is released, its count is one lower than before and
at last it is freed while mapped.
"""

from ..kvmchange import Change
from ._series import FILES, MARK_ACCESSED, series

PUT = """if (PAGE) {
	lab_happened(fault->gfn, fault->pfn);
	kvm_release_pfn_clean(fault->pfn);
	}"""

CHANGE = Change(
    name="series-v11-underflow",
    title="version 11 of the series: the lockless retry puts what was never got",
    stands_for="series v11 on Linux 6.8 and later (KVM-FACTS 7: 6)",
    shows="RETRY from fault-in with a release, refcount one too low, free while mapped",
    workload="race-guest --pages 211 --rounds 60 --pause 5",
    found_by=("balance", "use-after-free"),
    leads_to=("dead-mark",),
    # The guest may die of the page that it lost.
    status=(0, 1),
    edits={"6.12": series(11, locked=MARK_ACCESSED, unlocked="", retry=PUT)},
    files=FILES,
)
