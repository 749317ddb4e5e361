"""The rows of `make lab-bugs`: what is booted, what runs in it, who must find what.

Imports ``lab.kvmchange`` only.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lab.kvmchange import change_names, load_change

__all__ = ("FREES", "Row", "rows")

LEAK = ("balance", "growth")
HUGE = "prime-guest --huge --base 0x200000 --pages 8192 --repeat 3"
FREES = "pages-guest --free"
#: For a workload in which KVM does as it should and a driver does not.
DRIVER = "the driver breaks the rule, not KVM"
#: Where only counts tell, and the guest goes on.
COUNTS = "9 pages in 10 have to be named: of others the count alone may be a batch's on its way"
#: (kernel, change) -> why no record of it is wrong, so that only all of them together tell of it.
UNRECORDED = {
    ("6.12", "leak-prefetch"): "the put is an inlined put_page(), which leaves no record",
}
#: Versions of the series whose faults put their page inside fault-in.
PUT_UNSEEN = ("series-v7", "series-v8", "series-v10", "series-v11")


@dataclass(frozen=True, slots=True)
class Row:
    """One recording: what is booted, what runs, and who must find something."""

    kernel: str
    kvm: str
    workload: str
    found_by: tuple[str, ...]
    """Detectors of which one must find it: exactly its pages, as often as it happened."""
    leads_to: tuple[str, ...] = ()
    """Detectors that may find what it leads to, on its pages and those that it hurts too."""
    npt: str | None = None
    every: int = 1
    window_ms: int = 0
    module: str | None = None
    device: str | None = None
    append: str = ""
    counted: bool = True
    """Whether the change counts how often it happens."""
    told: bool = False
    """Whether the workload says which pages something is wrong with."""
    repeats: bool = False
    """Whether one time makes many faults go wrong, so that a finding counts others."""
    leaves: str = ""
    """The record without a page at which the model leaves the recording."""
    explained_by: str = ""
    """The detector that must explain what the kernel rightly refused, or was told to allow."""
    status: tuple[int, ...] = (0,)
    """What the workload may end with: others than 0 if it is meant to fail or to be stopped."""
    share: float = 1.0
    """The part of the pages that must be named: less than all says why in the note."""
    early: bool = False
    """Whether the recording ends before the guest does."""
    note: str = ""
    """What a reader must know of the row."""

    @property
    def name(self) -> str:
        """A name for files, of its own among all rows."""
        words = [self.kernel, self.kvm, self.workload, f"npt-{self.npt or 'on'}", str(self.every)]
        words += [self.append, "early" if self.early else ""]
        return re.sub(r"[^\w.]+", "-", " ".join(words).strip())

    @property
    def replays(self) -> bool | None:
        """Must the model follow this recording to its end? None: no record of KVM's is wrong."""
        if not self.found_by:
            return True
        planted = self.counted or self.told
        return False if planted and (self.kernel, self.kvm) not in UNRECORDED else None

    @property
    def may_explain(self) -> str:
        """The detector that may explain what comes of the lab: a race's host may have to wait."""
        return "livelock" if self.workload.startswith("race-guest") else ""

    @property
    def silent(self) -> dict[str, str]:
        """Detectors that cannot answer for this kernel -> why, as they say it."""
        if not self.kvm.startswith("series-"):
            return {"refcounted-flag": "no such flag"} if self.kernel == "6.12" else {}
        if self.kvm.startswith(PUT_UNSEEN):
            return {"wrong-folio": "put their page where no record shows it"}
        return {}


def rows(kernels: Iterable[str] = (), names: Iterable[str] = ()) -> list[Row]:
    """Return the table's rows, all or those of some kernels and changes."""
    wanted_kernels, wanted = tuple(kernels), tuple(names)
    return [
        row
        for row in (*_each_change(), *_more(), *_series(), *_early())
        if (not wanted_kernels or row.kernel in wanted_kernels)
        and (not wanted or row.kvm in wanted)
    ]


def _each_change() -> Iterable[Row]:
    for name in change_names():
        for kernel in load_change(name).edits:
            yield _row(kernel, name)


def _row(kernel: str, name: str, workload: str = "", **different: Any) -> Row:
    """Return the row of a change as it says it is, or with something different."""
    change = load_change(name)
    # The read-only mapping's second page is one that nobody counts.
    refused = kernel == "6.12" and name == "pfnmap-ro-writable"
    said = {
        "found_by": tuple(change.found_by),
        "leads_to": tuple(change.leads_to),
        "npt": change.npt,
        "every": change.every,
        "window_ms": change.window_ms,
        "module": change.module,
        "counted": change.planted,
        "repeats": change.repeats,
        "leaves": change.leaves,
        "explained_by": "refused" if refused else "",
        "status": (0,) if workload else tuple(change.status),
        "note": UNRECORDED.get((kernel, name), ""),
    }
    return Row(kernel, name, workload or change.workload, **{**said, **different})


# The same changes elsewhere: rare, on the other MMU, with drivers' pages.
def _more() -> Iterable[Row]:
    skip = "prime-guest --read --prefault --repeat 3"
    for kernel in ("6.12", "7.3"):
        rare = "prime-guest --pages 4001 --repeat 2"
        yield _row(kernel, "leak-per-fault", rare, every=1000)
        yield _row(kernel, "leak-per-fault", "prime-guest --repeat 3", npt="off")
        yield _row(kernel, "zap-skipped", skip, npt="off", every=100)
        # Where the bugs' own workloads have nothing to show.
        for calm in ("race-guest", "race-guest --gap 20", "svm_vmcall_test", HUGE):
            yield _row(kernel, "unchanged", calm)
        yield _row(kernel, "unchanged", "prime-guest --prefault --repeat 3", npt="off")
        yield _row(kernel, "unchanged", "pages-guest --hold --pages 101", module="lab_pages")
        # Up to 6.12 the guest dies of such memory, as that kernel promises.
        refused = "refused" if kernel == "6.12" else ""
        yield _row(kernel, "unchanged", "pages-guest", module="lab_pages", explained_by=refused)
        yield _row(kernel, "unchanged", "ttm-guest", device="qxl", explained_by=refused)
        yield _frees(kernel, "unchanged", refused)


def _frees(kernel: str, name: str, refused: str = "") -> Row:
    return _row(
        kernel, name, FREES, found_by=("use-after-free",), module="lab_pages", told=True,
        leads_to=("dead-mark",) if kernel == "6.12" else (), explained_by=refused, note=DRIVER,
    )  # fmt: skip


# Versions of the series: what they do to counts, and the seed's own case.
def _series() -> Iterable[Row]:
    prime, demand = "prime-guest --repeat 3", "demand_paging_test -v 1 -b 4M"
    right: dict[str, Any] = {"found_by": (), "leads_to": (), "counted": False, "window_ms": 0}
    for version in ("v7-late-touch", "v8-notdp-leak", "v11-underflow"):
        yield _row("6.12", f"series-{version}", prime, **right, npt=None)
    for version in ("v9", "v10-bit"):
        yield _row("6.12", f"series-{version}", demand, npt="off")
    yield _row("6.12", "series-v10-bit", prime, npt="off")
    # Without the bit no such page can be told from others: refused, as ever.
    yield _row(
        "6.12", "series-v10-bit", "ttm-guest", npt="off", device="qxl", explained_by="refused"
    )
    yield _row("6.12", "series-v9", "svm_vmcall_test")
    yield _row("6.12", "series-v9", "ttm-guest", device="qxl")
    yield _row("6.12", "series-v9-as-mailed", "ttm-guest --rounds 5", device="qxl")
    # A page that nobody counts, for a caller that no notifier tells of its end: kvm_vcpu_map().
    # By default it is refused, as a PIN record says; allowed, its use is explained.
    unsafe = "kvm.allow_unsafe_mappings=1"
    vmcb = (("refused", "", ""), ("runs", unsafe, "pins"))
    for outcome, append, explained in vmcb:
        yield _row(
            "6.12", "series-v9", f"pages-guest --vmcb {outcome}", module="lab_pages",
            append=append, explained_by=explained,
        )  # fmt: skip
    yield _frees("6.12", "series-v9")


# The recording ends and the guest goes on: what happened by then is known within bounds.
def _early() -> Iterable[Row]:
    long, demand = "prime-guest --repeat 100", "demand_paging_test -v 1 -b 128M"
    for kernel in ("6.12", "7.3"):
        yield _row(kernel, "unchanged", long, early=True)
        yield _row(kernel, "leak-per-fault", long, early=True)
    yield _row("6.12", "series-v9", long, early=True)
    yield _row("6.12", "series-v9-as-mailed", long, early=True)
    yield _row(
        "6.12", "series-v8-notdp-leak", demand, npt="off", early=True, share=0.9, note=COUNTS
    )
