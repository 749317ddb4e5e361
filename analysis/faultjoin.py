"""Faults with what happened in them: the FAULT record comes last, its RELEASE and SPTE before it.

Records carry the entry time of their fault and their thread, which name the fault together. Those
whose fault has not ended yet wait for a later piece of the trace; those whose fault was torn or
filtered are dropped when their thread has faulted again. May import: `analysis.columns`,
`analysis.stream`, numpy.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.columns import Records
from analysis.stream import Piece

__all__ = ("JOIN_COLUMNS", "FaultJoin", "FaultJoiner", "Rows")

_NAMES = ("ts", "cpu", "seq", "fault_ts", "tid")
_RELEASE = ("pfn", "call", "refcount", "page_bits", "page_order")
_SPTE = ("vm", "op", "cause", "gfn", "pfn", "level", "new", "refcount", "page_bits", "mmu")
#: What joining reads, so that every detector finds it.
JOIN_COLUMNS: dict[str, tuple[str, ...]] = {
    "FAULT": (
        *(
            "fault_ts",
            "tid",
            "vm",
            "vcpu",
            "gfn",
            "hva",
            "slot",
            "level",
            "pfn",
            "walk_pfn",
            "writable",
        ),
        *("faultin_ret", "ret", "refcounted", "prefetch", "t_faultin", "t_faultin_end", "sptes"),
        *("refcount", "mapcount", "page_bits", "page_order", "refcount_end", "mapcount_end"),
        *("page_bits_end", "mmu_seq", "invalidate_seq", "in_progress", "mmu"),
    ),
    "RELEASE": ("fault_ts", "tid", *_RELEASE),
    "SPTE": ("fault_ts", "tid", *_SPTE),
}
#: Rows that wait for their fault: from here on the thread's later faults are looked for …
_WAITING_MANY = 1 << 12
#: … and more than this many are never kept, which bounds memory in a hostile trace.
_WAITING_MAX = 1 << 18


class Rows:
    """Some records of one kind, as columns; `fault` is the position of each one's FAULT record."""

    def __init__(
        self, kind: str, columns: dict[str, npt.NDArray[Any]], fault: npt.NDArray[np.int64]
    ) -> None:
        self.kind = kind
        self.fault = fault
        self._columns = columns

    def __len__(self) -> int:
        return len(self.fault)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self._columns[name]

    def key(self, at: int) -> tuple[str, int, int, int]:
        """Return (kind, ts, cpu, seq) of a row, which names it in the file."""
        ts, cpu, seq = (int(self[name][at]) for name in ("ts", "cpu", "seq"))
        return (self.kind, ts, cpu, seq)

    def per_fault(self, which: npt.NDArray[np.bool_], faults: int) -> npt.NDArray[np.int64]:
        """Count for each of `faults` faults the rows where `which` is true."""
        return np.bincount(self.fault[which], minlength=faults)


class FaultJoin:
    """The faults that ended in one piece of the trace.

    `records` are the FAULT records; `releases` and `sptes` what happened in them, in order of
    time.
    """

    def __init__(self, records: Records, releases: Rows, sptes: Rows) -> None:
        self.records = records
        self.releases = releases
        self.sptes = sptes

    def __len__(self) -> int:
        return len(self.records)


class _Waiting:
    """Rows of one kind whose fault has not ended yet."""

    def __init__(self, kind: str, columns: Sequence[str]) -> None:
        self.kind = kind
        self.names = (*_NAMES, *columns)
        self.columns: dict[str, npt.NDArray[Any]] = {}

    def join(self, fresh: Records, faults: "_Faults") -> Rows:
        inside = np.flatnonzero(fresh["fault_ts"])
        columns: dict[str, npt.NDArray[Any]] = {}
        for name in self.names:
            column = fresh[name][inside]
            old = self.columns.get(name)
            columns[name] = column if old is None or not len(old) else np.concatenate([old, column])
        at = faults.find(columns["fault_ts"], columns["tid"])
        found = at >= 0
        if found.all():
            self.columns = {}
            return Rows(self.kind, columns, at)
        self._keep({name: column[~found] for name, column in columns.items()}, faults)
        return Rows(self.kind, {n: c[found] for n, c in columns.items()}, at[found])

    def _keep(self, rest: dict[str, npt.NDArray[Any]], faults: "_Faults") -> None:
        if len(rest["ts"]) > _WAITING_MANY:
            kept = ~faults.overtook(rest["fault_ts"], rest["tid"])
            rest = {name: column[kept][-_WAITING_MAX:] for name, column in rest.items()}
        self.columns = rest


class _Faults:
    """The faults of a piece, found by (fault_ts, tid)."""

    def __init__(self, records: Records) -> None:
        self._records = records
        starts = records["fault_ts"]
        self._base = starts.min() if len(starts) else np.uint64(0)
        keys = self._keys(starts, records["tid"])
        # They end nearly in the order in which they began.
        self._order = np.argsort(keys, kind="stable")
        self._sorted = keys[self._order]

    # Two threads may fault in the same nanosecond: low bits of the thread tell them apart.
    def _keys(self, fault_ts: npt.NDArray[Any], tid: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
        since = fault_ts.astype(np.uint64, copy=False) - self._base
        return (since << np.uint64(12)) | (tid.astype(np.uint64) & np.uint64(0xFFF))

    def find(self, fault_ts: npt.NDArray[Any], tid: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        """Return the position of each one's fault, -1 where there is none."""
        if not len(self._sorted) or not len(fault_ts):
            return np.full(len(fault_ts), -1, np.int64)
        keys = self._keys(fault_ts, tid)
        at = np.searchsorted(self._sorted, keys)
        at[at == len(self._sorted)] = 0
        return np.where(self._sorted[at] == keys, self._order[at], -1)

    def overtook(self, fault_ts: npt.NDArray[Any], tid: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Tell which of some faults can no longer end: their thread has ended a later one."""
        threads, which = np.unique(tid, return_inverse=True)
        at = np.searchsorted(threads, self._records["tid"])
        at[at == len(threads)] = 0
        mine = threads[at] == self._records["tid"]
        latest = np.zeros(len(threads), np.uint64)
        np.maximum.at(latest, at[mine], self._records["fault_ts"][mine])
        return np.asarray(fault_ts < latest[which], np.bool_)


class FaultJoiner:
    """Joins piece after piece; keeps only what waits for a fault to end."""

    def __init__(self) -> None:
        self._releases = _Waiting("RELEASE", _RELEASE)
        self._sptes = _Waiting("SPTE", _SPTE)

    def join(self, piece: Piece) -> FaultJoin:
        """Return the faults that ended in a piece."""
        faults = _Faults(piece["FAULT"])
        return FaultJoin(
            piece["FAULT"],
            self._releases.join(piece["RELEASE"], faults),
            self._sptes.join(piece["SPTE"], faults),
        )
