"""The reference of a fault is never put.

In which generation: 6.12 (G0) and 7.3 (G2). It stands for series v9 as it was mailed, where every
fault kept its reference, and for v8 with the shadow MMU (KVM-FACTS 7, bugs 4 and 5). A trace must
show: the count of a page is one higher at the fault's end than an equal fault's used to be, no
release, no free after the page's unmapping.
"""

from ..kvmchange import Change
from ._sites import at_release

CODE = "if (!(REFCOUNTED) || !lab_planted(fault->gfn, PFN)) RELEASE"

CHANGE = Change(
    name="leak-per-fault",
    title="a fault's reference is never put",
    stands_for="series v9 as mailed, v8 with the shadow MMU (KVM-FACTS 7: 4, 5)",
    shows="refcount one too high after each fault; no release; pages never freed",
    workload="prime-guest --repeat 3",
    found_by=("balance", "growth"),
    edits={kernel: at_release(kernel, CODE) for kernel in ("6.12", "7.3")},
)
