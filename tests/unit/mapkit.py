"""Real recordings of mappings for tests of detectors, cut down to a few guest frames.

    map-reclaim-tdp-*     23 pages are mapped, age, and are reclaimed: notifier, zap, free
    map-reclaim-shadow-*  the same without two-dimensional paging
    map-slots-tdp-*       a vCPU faults while memslots come and go: fast zap-all, two roots at once
    map-zap-skipped-*     a KVM that forgets one zap in a hundred (tests/lab/kvm/zap_skipped.py)

Records were left out of the recordings, never changed. `Page` holds what one page of a reclaim
recording went through, so that a test can say in one line what a buggy kernel does otherwise.
"""

import copy as copying
import dataclasses
import functools
from pathlib import Path

import numpy as np
from unit.tracekit import SHIPPED, Copy

from analysis.check import CheckResult, check_trace
from analysis.findings import Finding

__all__ = ("GENERATIONS", "MAPS", "SANE", "Page", "ask", "only", "page", "reclaim")

GENERATIONS = ("6.1", "6.12", "7.3")
#: What a reclaim recording is of: (kernel, MMU).
MAPS = tuple((kernel, mmu) for kernel in GENERATIONS for mmu in ("tdp", "shadow"))
#: Recordings of unchanged kernels: nothing is wrong in them.
SANE = sorted(
    path
    for path in (*SHIPPED.glob("map-*.pfnt"), *SHIPPED.glob("ttm-*.pfnt"))
    if "zap-skipped" not in path.name
)


def reclaim(kernel: str, mmu: str = "tdp") -> Copy:
    """Return a copy of the recording of reclaim on a kernel."""
    return copying.deepcopy(_recorded(f"map-reclaim-{mmu}-{kernel}"))


@functools.cache
def _recorded(name: str) -> Copy:
    return Copy.of(SHIPPED / f"{name}.pfnt")


@dataclasses.dataclass(frozen=True)
class Page:
    """One page of a reclaim recording; rows are positions in the records of their kind."""

    gfn: int
    pfn: int
    install: int
    zap: int
    free: int
    fault: int
    start: int
    end: int
    #: times of install, invalidation start, end, zap and free, ns.
    born: int
    starts: int
    ends: int
    died: int
    freed: int


def page(copy: Copy, number: int = 7) -> Page:
    """Return what the page of a guest frame, counted from the first, went through."""
    sptes, frees, faults, ranges = (copy[k] for k in ("SPTE", "PAGE_FREE", "FAULT", "INVALIDATE"))
    gfn = int(np.unique(sptes["gfn"])[number])
    mine = sptes["gfn"] == gfn
    install, zap = (_one(mine & copy.ops("SPTE", op)) for op in ("install", "zap"))
    pfn = int(sptes["pfn"][install])
    free, fault = _one(frees["pfn"] == pfn), _one(faults["gfn"] == gfn)
    inside = (ranges["a"] <= faults["hva"][fault]) & (ranges["b"] > faults["hva"][fault])
    start, end = (_one(inside & copy.ops("INVALIDATE", op)) for op in ("start", "end"))
    rows = {"install": (sptes, install), "start": (ranges, start), "end": (ranges, end)}
    rows |= {"zap": (sptes, zap), "free": (frees, free)}
    times = [int(records["h"]["ts"][row]) for records, row in rows.values()]
    born, starts, ends, died, freed = times
    return Page(
        gfn, pfn, install, zap, free, fault, start, end, born, starts, ends, died, freed
    )  # fmt: skip


def _one(which: np.ndarray) -> int:
    (row,) = np.flatnonzero(which)
    return int(row)


def ask(copy: Copy, tmp_path: Path, *names: str, rows_max: int = 1 << 18) -> CheckResult:
    """Write the copy and ask some detectors about it, all if none are named."""
    path = copy.write(tmp_path / f"{len(list(tmp_path.iterdir()))}.pfnt")
    return check_trace(path, names or None, rows_max=rows_max)


def only(result: CheckResult) -> Finding:
    """Return the only finding."""
    (finding,) = result.findings
    return finding
