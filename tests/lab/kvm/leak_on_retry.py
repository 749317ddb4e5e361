"""The reference of a fault is not put when the fault must be retried.

In which generation: 6.12 (G0) and 7.3 (G2). It stands for error paths that forget the put, as the
lockless retry of Linux d02c357e5bfa was one that did not fit v11 of the series (KVM-FACTS 7, bug
6, from the other side). A trace must show: a leaked reference after faults that ended with RETRY,
none after others.
"""

from ..kvmchange import Change
from ._sites import at_release, before_lock

CODE = "if (r != RET_PF_RETRY || !(REFCOUNTED) || !lab_planted(fault->gfn, PFN)) RELEASE"

CHANGE = Change(
    name="leak-on-retry",
    title="a fault that is retried keeps its reference",
    stands_for="a put forgotten on an error path (KVM-FACTS 7: 6, from the other side)",
    shows="refcount one too high after faults with verdict RETRY only",
    workload="race-guest",
    found_by=("balance",),
    window_ms=1,
    npt="on",
    edits={
        kernel: before_lock("lab_sleep();") + at_release(kernel, CODE) for kernel in ("6.12", "7.3")
    },
)
