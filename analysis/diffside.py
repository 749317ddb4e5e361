"""One side of `pfntrace diff`: what a trace adds up to, in one reading and bounded memory.

Durations are kept by stretches of the trace (or by recordings, if it is merged of enough of
them), so that `analysis.noise` can ask how much stretches differ among themselves. May import:
`analysis`, `tracer.tracefile`, numpy, pandas.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.histogram import BINS, Histogram, bin_of
from analysis.latency import WHERE_COLUMNS, WhereTimes
from analysis.pages import page_class
from analysis.paths import PATH_COLUMNS, path_of, stage_times
from analysis.tables import CHUNK_ROWS, chunks
from tracer.tracefile import TraceReader

__all__ = ("STRETCHES", "Distinct", "Side", "Stretches", "read_side")

#: Parts that a trace is cut into: enough to see drift, few enough to have medians of their own.
STRETCHES = 32
#: A merged trace of so many recordings is cut into them instead.
_RECORDINGS_MIN = 5

_FAULT_COLUMNS = (
    *dict.fromkeys(
        (
            *("vm", "as_id", "gfn", "pfn", "page_bits", "refcount", "mapcount"),
            *PATH_COLUMNS,
            *WHERE_COLUMNS,
        )
    ),
)
_COLUMNS: dict[str, tuple[str, ...]] = {
    "FAULT": _FAULT_COLUMNS,
    "SPTE": ("op", "pfn", "level", "page_bits", "refcount", "mapcount"),
    "VM": ("vm",),
}

Progress = Callable[[int, int], None]


class Distinct:
    """Counts distinct 64-bit keys: 8 bytes for each, sorted now and then."""

    def __init__(self) -> None:
        """Begin with none."""
        self._runs: list[npt.NDArray[np.uint64]] = []

    def add(self, keys: npt.NDArray[np.uint64]) -> None:
        """Add keys; the work for n of them in all is that of sorting n, however they come."""
        run = np.unique(keys)
        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.union1d(self._runs.pop(), run)
        self._runs.append(run)

    def __len__(self) -> int:
        if len(self._runs) > 1:
            self._runs = [np.unique(np.concatenate(self._runs))]
        return len(self._runs[0]) if self._runs else 0


class Stretches:
    """Durations by the stretch that they are of: one row of `counts` each, bins as `Histogram`."""

    def __init__(self, stretches: int) -> None:
        """Begin with no durations."""
        self.counts = np.zeros((stretches, BINS), np.int32)
        self.whole = Histogram()

    def add(self, stretch: npt.NDArray[np.int64], durations: npt.NDArray[np.uint64]) -> None:
        """Add durations (ns), each with the number of its stretch."""
        self.whole.add(durations)
        at, number = np.unique(stretch * BINS + bin_of(durations), return_counts=True)
        self.counts.reshape(-1)[at] += number.astype(np.int32)


@dataclasses.dataclass(slots=True)
class Side:
    """The sums of one trace; `info` is `TraceReader.info`, asked after everything was read."""

    path: Path
    info: dict[str, Any]
    settings: dict[str, Any]
    #: module parameters as the recorder saw them.
    params: dict[str, str]
    #: what stretches are: of "time" or "recordings".
    cut: str
    stretches: int
    #: result -> faults; guest pages that faulted.
    results: Counter[str] = dataclasses.field(default_factory=Counter)
    pages: int = 0
    #: class -> faults at the end of fault-in; (class, level) -> installs; op -> SPTE records.
    classes: Counter[str] = dataclasses.field(default_factory=Counter)
    installs: Counter[tuple[str, int]] = dataclasses.field(default_factory=Counter)
    ops: Counter[str] = dataclasses.field(default_factory=Counter)
    paths: Counter[str] = dataclasses.field(default_factory=Counter)
    #: (path, stage) -> durations, ns.
    times: dict[tuple[str, str], Stretches] = dataclasses.field(default_factory=dict)
    #: whole faults by level, VM and memslot.
    latency: WhereTimes = dataclasses.field(default_factory=WhereTimes)

    @property
    def faults(self) -> int:
        """All faults."""
        return sum(self.results.values())


def read_side(path: Path, progress: Progress | None = None, rows_max: int = CHUNK_ROWS) -> Side:
    """Read a trace, `rows_max` records at a time. Raises TraceFormatError if it is not one."""
    with TraceReader(path) as reader:
        info = reader.info()
        bases = _recordings(info)
        cut, stretches = ("recordings", len(bases)) if bases else ("time", STRETCHES)
        side = Side(path, info, dict(reader.meta.settings), _params(reader), cut, stretches)
        pages = Distinct()
        number = _Numbering(info["kinds"]["FAULT"], bases)
        done, total = 0, sum(info["kinds"][kind] for kind in ("FAULT", "SPTE"))
        for kind, table in chunks(reader, _COLUMNS, rows_max):
            if kind == "FAULT":
                _add_faults(side, table, number(table), pages)
            elif kind == "SPTE":
                _add_sptes(side, table)
            done += len(table)
            if progress is not None:
                progress(min(done, total), total)
        side.pages = len(pages)
        side.info = reader.info()
    return side


def _params(reader: TraceReader) -> dict[str, str]:
    try:
        found = json.loads(reader.meta.facts).get("params")
    except (AttributeError, RecursionError, ValueError):
        found = None
    items = found.items() if isinstance(found, dict) else ()
    return {str(name)[:80]: str(value)[:80] for name, value in items}


def _recordings(info: dict[str, Any]) -> list[int]:
    """Return the first VM number of each recording of a merged trace, [] if there are too few."""
    parts = info["merged"].get("parts")
    parts = parts if isinstance(parts, list) else []
    bases = {p.get("vm_base") for p in parts if isinstance(p, dict)}
    known = sorted(base for base in bases if type(base) is int and 0 <= base < 1 << 32)
    return known if len(known) >= _RECORDINGS_MIN else []


class _Numbering:
    """Says of which stretch each fault is, in the order of the file."""

    def __init__(self, faults: int, bases: list[int]) -> None:
        self._faults = max(1, faults)
        self._bases = np.array(bases, np.int64)
        self._done = 0

    def __call__(self, table: pd.DataFrame) -> npt.NDArray[np.int64]:
        if len(self._bases):
            vm = table["vm"].to_numpy(dtype=np.int64, na_value=0)
            return np.asarray(np.maximum(np.searchsorted(self._bases, vm) - 1, 0), np.int64)
        at = np.arange(self._done, self._done + len(table))
        self._done += len(table)
        return np.asarray(np.minimum(at * STRETCHES // self._faults, STRETCHES - 1), np.int64)


def _add_faults(
    side: Side, table: pd.DataFrame, stretch: npt.NDArray[np.int64], pages: Distinct
) -> None:
    side.results.update(_sizes(table["result"].astype(object).fillna("?")))
    side.classes.update(_sizes(page_class(table)))
    pages.add(_page_keys(table))
    paths = path_of(table)
    side.paths.update(_sizes(paths))
    side.latency.add(table)
    times = stage_times(table)
    for path in paths.cat.categories:
        of_path = (paths == path).to_numpy()
        if not of_path.any():
            continue
        for stage, durations in times.items():
            reached = of_path & (durations >= 0)
            if reached.any():
                key = (str(path), stage)
                found = side.times.get(key) or side.times.setdefault(key, Stretches(side.stretches))
                found.add(stretch[reached], durations[reached].astype(np.uint64))


def _sizes(column: pd.Series) -> dict[str, int]:
    return {str(name): int(size) for name, size in column.value_counts().items() if size}


def _page_keys(table: pd.DataFrame) -> npt.NDArray[np.uint64]:
    """Return a number for each guest page: exact for less than 2^23 VMs and 2^40 frames in each."""
    vm = table["vm"].to_numpy(dtype=np.uint64, na_value=0)
    space = table["as_id"].to_numpy(dtype=np.uint64, na_value=0)
    gfn = table["gfn"].to_numpy(dtype=np.uint64, na_value=0)
    return np.asarray((vm << np.uint64(41)) + (space << np.uint64(40)) + gfn, np.uint64)


def _add_sptes(side: Side, table: pd.DataFrame) -> None:
    side.ops.update(_sizes(table["op"].astype(object).fillna("?")))
    installs = table[(table["op"] == "install").to_numpy(dtype=bool, na_value=False)]
    if len(installs):
        level = installs["level"].to_numpy(dtype=np.int64, na_value=0)
        classes = page_class(installs).astype(str).to_numpy()
        for (name, at), size in Counter(zip(classes.tolist(), level.tolist(), strict=True)).items():
            side.installs[name, at] += size
