"""Lives as plain numpy arrays, converted when asked for: what detectors compute with.

Nulls are numbers: 0, but all ones for `death_ts`, so that a life is mapped at t if birth_ts <= t <
death_ts. Categories are their codes, -1 if null; those of causes are the numbers on the wire.
No pandas: a DataFrame of 20 columns costs more than pairing some hundred lives.
May import: numpy, `analysis.framelog`, `analysis.lifetable`.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.framelog import Spans
from analysis.lifetable import LifeTable

__all__ = ("FOREVER", "LIFE_COLUMNS", "LifeArrays")

#: The death of a life that did not end, ns.
FOREVER = (1 << 64) - 1

#: The columns of `lives` that detectors look at; making the others would cost time.
LIFE_COLUMNS = (
    *("vm", "as_id", "level", "pages", "gfn", "pfn", "slot", "spte_last", "fault_ts"),
    *("birth_ts", "birth_tid", "birth_cpu", "birth_seq"),
    *("death_ts", "death_cpu", "death_seq", "death_cause"),
    *("censored_start", "lost", "ended_by"),
)

_NULLS = {"death_ts": FOREVER}
_TYPES: dict[str, Any] = {
    **dict.fromkeys(("gfn", "pfn", "sptep", "birth_ts", "death_ts", "fault_ts"), np.uint64),
    **dict.fromkeys(("birth_tid", "birth_seq", "death_tid", "death_seq", "vm"), np.uint32),
    **dict.fromkeys(("birth_cpu", "death_cpu"), np.uint16),
    **dict.fromkeys(("slot", "vcpu"), np.int32),
}
_SLOT_UNKNOWN = -1


class LifeArrays:
    """`lives["gfn"]` is a column of the table `lives`, as an array; in a check of LIFE_COLUMNS."""

    def __init__(self, table: LifeTable | None = None) -> None:
        """Take a table that is full; None is an empty one."""
        self._table = table
        self._cache: dict[str, npt.NDArray[Any]] = {}

    def __len__(self) -> int:
        return len(self._table) if self._table is not None else 0

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        found = self._cache.get(name)
        if found is None:
            found = self._cache[name] = self._column(name)
        return found

    def _column(self, name: str) -> npt.NDArray[Any]:
        dtype = _TYPES.get(name, np.int64)
        if self._table is None or not len(self._table):
            return np.zeros(0, dtype)
        null = _SLOT_UNKNOWN if name in ("slot", "vcpu") else _NULLS.get(name, 0)
        return self._table.array(name, null, dtype)

    def host(self) -> Spans:
        """Return the lives as ranges of host frames."""
        return self._spans(np.zeros(len(self), np.uint64), "pfn")

    def guest(self, space: npt.NDArray[np.uint64]) -> Spans:
        """Return them as ranges of guest frames in the spaces given."""
        return self._spans(space, "gfn")

    def _spans(self, space: npt.NDArray[np.uint64], frame: str) -> Spans:
        level = np.clip(self["level"], 1, 3).astype(np.uint8)
        return Spans(space, self[frame], level, self["birth_ts"], self["death_ts"])

    def birth(self, at: int) -> tuple[str, int, int, int] | None:
        """Return (kind, ts, cpu, seq) of the record of a birth, None if it was not seen."""
        return self._key(at, "birth", bool(self["birth_ts"][at]))

    def death(self, at: int) -> tuple[str, int, int, int] | None:
        """Return (kind, ts, cpu, seq) of the record of an end, None if it was not seen."""
        return self._key(at, "death", int(self["death_ts"][at]) != FOREVER)

    def _key(self, at: int, end: str, seen: bool) -> tuple[str, int, int, int] | None:
        if not seen:
            return None
        ts, cpu, seq = (int(self[f"{end}_{name}"][at]) for name in ("ts", "cpu", "seq"))
        return "SPTE", ts, cpu, seq
