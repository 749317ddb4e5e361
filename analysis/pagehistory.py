"""All that a trace tells of one host page: its reference count at each record, and what happened.

The count of a compound page is that of its head, so records of its other pages tell of it too.
May import: numpy, `analysis.columns`, `probes.wire`, `tracer.tracefile`.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.columns import Records, codes
from probes.wire import PAGE_BITS
from tracer.tracefile import TraceReader

__all__ = ("HAPPENINGS", "PageHistory", "page_history")

#: What a record of a page says, in the order of a page's life.
HAPPENINGS = (
    "allocated",
    "fault-in",
    "install",
    "change",
    "fault end",
    "release",
    "mark",
    "pin",
    "zap",
    "freed",
)
_COMPOUND = PAGE_BITS["tail"] | PAGE_BITS["head"]
_PAGE = ("pfn", "refcount", "page_bits", "page_order")
_COLUMNS = {
    "FAULT": (
        *("ts", "fault_ts", "t_faultin_end", "walk_pfn", "gfn", *_PAGE),
        *("refcount_end", "page_bits_end"),
    ),
    "SPTE": ("ts", "op", "gfn", "level", *_PAGE),
    "RELEASE": ("ts", "call", *_PAGE),
    "PAGE_FREE": ("ts", "order", *_PAGE),
    "PAGE_ALLOC": ("ts", "order", *_PAGE),
    "PIN": ("ts", "gfn", *_PAGE),
}
_NEVER = (1 << 32) - 1
#: No order of a block is above this (MAX_PAGE_ORDER is 10, of a 1G page 18).
_ORDER_MAX = 18

Words = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, slots=True)
class PageHistory:
    """The records of one page in the order of time, ns; `what` is an index of HAPPENINGS.

    `count` is the _refcount of the (head) page at that moment, of a release right before it; -1 if
    it was not read. `other` is whether the record is of another page of the same compound page.
    """

    pfn: int
    ts: Words
    what: npt.NDArray[np.int8]
    count: npt.NDArray[np.int64]
    gfn: Words
    other: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.ts)


def page_history(reader: TraceReader, pfn: int) -> PageHistory:
    """Read what a trace tells of a page."""
    parts = [_part([], 0, [], [], [])]
    for kind, columns in _COLUMNS.items():
        for batch in reader.records([kind], columns):
            records = Records(kind, [batch])
            own, head = _of_page(records, np.uint64(pfn))
            rows = np.flatnonzero(own | head)
            if len(rows):
                parts += _parts(records, rows, ~own[rows])
    whole = np.concatenate(parts)
    whole = whole[np.lexsort((whole["what"], whole["ts"]))]
    return PageHistory(pfn, *(whole[name] for name in _NAMES))


#: A row of a history, before it is put in order.
_PART = np.dtype([("ts", "u8"), ("what", "i1"), ("count", "i8"), ("gfn", "u8"), ("other", "?")])
_NAMES = _PART.names or ()


def _part(*columns: Any) -> npt.NDArray[np.void]:
    part = np.empty(len(columns[0]), _PART)
    for name, column in zip(_NAMES, columns, strict=True):
        part[name] = column
    return part


def _of_page(
    records: Records, pfn: np.uint64
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Tell which records are of the page itself, and which of its compound page."""
    first = records["pfn"]
    span = np.zeros(len(records), np.uint64)
    if records.kind == "FAULT":
        # An error pfn: the page is the one that the PFNMAP walk found.
        first = np.where(first >> np.uint64(40), records["walk_pfn"], first)
    elif records.kind == "SPTE":
        span = (np.clip(records["level"], 1, 3).astype(np.uint64) - np.uint64(1)) * np.uint64(9)
    elif records.kind in ("PAGE_FREE", "PAGE_ALLOC"):
        span = np.minimum(records["order"], _ORDER_MAX).astype(np.uint64)
    known = records.known("pfn") | (records.kind == "FAULT")
    own = known & (first <= pfn) & ((pfn - first) >> span == 0)
    order = np.minimum(records["page_order"], _ORDER_MAX).astype(np.uint64)
    compound = (records["page_bits"] & _COMPOUND) != 0
    return own, known & compound & (order > 0) & (first >> order == pfn >> order)


def _parts(
    records: Records, rows: npt.NDArray[np.intp], other: npt.NDArray[np.bool_]
) -> list[npt.NDArray[np.void]]:
    """Return what some rows say, a part for each moment that a record tells of."""
    ts = records["ts"][rows]
    count = np.where(records["page_bits"][rows] != 0, records["refcount"][rows], -1)
    gfn = records["gfn"][rows] if records.kind in ("FAULT", "SPTE", "PIN") else np.zeros(len(rows))
    if records.kind == "FAULT":
        stage = records["t_faultin_end"][rows]
        reached = stage != _NEVER
        at = records["fault_ts"][rows] + stage
        end = np.where(records["page_bits_end"][rows] != 0, records["refcount_end"][rows], -1)
        faultin = _part(at, HAPPENINGS.index("fault-in"), count, gfn, other)[reached]
        return [faultin, _part(ts, HAPPENINGS.index("fault end"), end, gfn, other)]
    if records.kind == "SPTE":
        what = _named(records["op"][rows], "op", ("install", "change", "zap"))
    elif records.kind == "RELEASE":
        marks = np.isin(records["call"][rows], codes("call", "mark_accessed", "mark_dirty"))
        what = np.where(marks, HAPPENINGS.index("mark"), HAPPENINGS.index("release"))
    else:
        name = {"PAGE_FREE": "freed", "PAGE_ALLOC": "allocated", "PIN": "pin"}[records.kind]
        what = np.full(len(rows), HAPPENINGS.index(name))
    return [_part(ts, what, count, gfn, other)]


def _named(
    values: npt.NDArray[np.int8], column: str, names: tuple[str, ...]
) -> npt.NDArray[np.int64]:
    what = np.full(len(values), HAPPENINGS.index("change"))
    for name in names:
        what[values == codes(column, name)[0]] = HAPPENINGS.index(name)
    return what
