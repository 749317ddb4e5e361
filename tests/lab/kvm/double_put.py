"""The reference of a fault is put twice.

In which generation: 6.12 (G0) and 7.3 (G2). It stands for a put without a get, as v11 of the
series did it on Linux 6.8 when an invalidation was in progress (KVM-FACTS 7, bug 6), and for the
fate of such a page in CVE-2021-22543: freed while it is mapped. A trace must show: two releases
of one fault, the count one lower than before it, at last a free of a page that the guest still
maps.
"""

from ..kvmchange import Change
from ._sites import at_release

AGAIN = {
    "6.12": "kvm_release_pfn_clean(orig_pfn);",
    "7.3": "kvm_release_page_clean(fault->refcounted_page);",
}
CODE = "RELEASE if ((REFCOUNTED) && lab_planted(fault->gfn, PFN)) "

CHANGE = Change(
    name="double-put",
    title="a fault's reference is put twice",
    stands_for="series v11 on Linux 6.8, CVE-2021-22543 (KVM-FACTS 7: 6, 1)",
    shows="two releases in one fault, refcount one too low, a free while mapped",
    workload="prime-guest",
    found_by=("balance", "use-after-free"),
    leads_to=("dead-mark",),
    every=50,
    edits={kernel: at_release(kernel, CODE + AGAIN[kernel]) for kernel in ("6.12", "7.3")},
)
