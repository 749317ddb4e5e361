"""`pfntrace dump`: records in the order of time, one a line, for people or as JSON.

A line has at most 120 columns, or as many as the terminal if that is wider, and nothing in it but
printable characters, whatever the file holds.
May import: `tracer.describe`, `tracer.schema`, `tracer.timeorder`, `tracer.tracefile`,
`tracer.tracemeta`, numpy, pyarrow.
"""

import errno
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tracer import schema
from tracer.describe import printable
from tracer.timeorder import rows_at, values
from tracer.tracefile import TraceReader
from tracer.tracemeta import parse_json

__all__ = ("LINE_MAX", "RECORD_MAX", "dump_json", "dump_lines", "record_line")

#: Columns that a line may take; what is longer is cut before a word and ends in "…".
LINE_MAX = 120
#: The same where there is room, or where lines are wrapped: no record of pfntrace is longer.
RECORD_MAX = 400

#: Rows turned into Python objects at a time: `| head` must not wait for a whole batch.
_ROWS_AT_ONCE = 256
_LEVELS = {1: "4K", 2: "2M", 3: "1G"}
#: Pages of a leaf of these levels, less one.
_LEVEL_PAGES = {2: (1 << 9) - 1, 3: (1 << 18) - 1}
#: PFERR_WRITE_MASK and PFERR_FETCH_MASK, arch/x86/include/asm/kvm_host.h.
_WRITE, _FETCH = 1 << 1, 1 << 4

Row = dict[str, Any]


def dump_lines(
    reader: TraceReader,
    kinds: Sequence[str] | None,
    gfns: tuple[int, int] | None,
    limit: int | None,
) -> Iterator[str]:
    """Yield a line for each record: seconds since the start, cpu, VM/vCPU, what happened.

    Only those of `kinds` (all if None), and of guest frames first to last if `gfns` is given, at
    most `limit` of them. A line has LINE_MAX columns at most, or those of the terminal. Raises
    UsageError for a name that is no kind.
    """
    start = reader.meta.start_monotonic_ns
    width = min(max(shutil.get_terminal_size().columns, LINE_MAX), RECORD_MAX)
    for row in _rows(reader, kinds, gfns, limit):
        yield record_line(row, start, width)


def record_line(row: Row, start: int, width: int = LINE_MAX) -> str:
    """Return the line of one record: a dict of the columns that its kind fills.

    `start` is when the recording began, ns; `width` how many columns the line may have. What is
    longer ends with a whole word, so that no number is cut, and "…".
    """
    line = f"{_prefix(row, start)} {_text(row)}"
    if not line.isprintable():
        line = printable(line)
    if len(line) <= width:
        return line
    # A word as long as half of a line is no number.
    end = line.rfind(" ", width // 2, width - 1)
    return line[: width - 1] + "…" if end < 0 else line[: end + 1] + "…"


def dump_json(
    reader: TraceReader,
    kinds: Sequence[str] | None,
    gfns: tuple[int, int] | None,
    limit: int | None,
) -> Iterator[str]:
    """Yield a JSON object for each record, with the columns that its kind fills; a note's own
    object is nested. Selection and errors are those of `dump_lines`.
    """
    for row in _rows(reader, kinds, gfns, limit):
        shown = {name: row[name] for name in schema.columns_of_kind(row["kind"])}
        if row["kind"] == "NOTE":
            shown["note"] = _nested(row["note"])
        # json leaves DEL as it is.
        yield json.dumps(shown).replace("\x7f", "\\u007f")


def _nested(note: str | None) -> Any:
    try:
        return parse_json(note or "")
    except ValueError:
        return note


def _rows(
    reader: TraceReader,
    kinds: Sequence[str] | None,
    gfns: tuple[int, int] | None,
    limit: int | None,
) -> Iterator[Row]:
    wanted = [c.name for c in schema.COLUMNS if kinds is None or set(kinds) & set(c.kinds)]
    # Without a kind that exists there is no column; the reader says what is wrong.
    left = limit
    for batch in reader.records(kinds, wanted or None):
        if gfns is not None:
            batch = rows_at(batch, np.flatnonzero(_meets(batch, *gfns)))
        for first in range(0, len(batch), _ROWS_AT_ONCE):
            if left is not None and left <= 0:
                return
            rows = batch.slice(first, _ROWS_AT_ONCE).to_pylist()[:left]
            left = None if left is None else left - len(rows)
            yield from rows


def _valid(column: pa.Array) -> npt.NDArray[np.bool_]:
    """Tell where a column is not null (Arrow's own conversion to numpy imports pandas)."""
    bitmap = column.buffers()[0]
    if bitmap is None:
        return np.ones(len(column), bool)
    bits = np.unpackbits(np.frombuffer(bitmap, "u1"), bitorder="little")
    return bits[column.offset : column.offset + len(column)].astype(bool)


def _column(batch: pa.RecordBatch, name: str) -> npt.NDArray[np.uint64]:
    """Return a column as numbers, 0 where it is null or not there."""
    if name not in batch.schema.names:
        return np.zeros(len(batch), "u8")
    return np.where(_valid(batch.column(name)), values(batch, name), 0).astype("u8")


def _meets(batch: pa.RecordBatch, first: int, last: int) -> npt.NDArray[np.bool_]:
    """Tell which records are about a guest frame of the range, large leaves and slots included."""
    if "gfn" not in batch.schema.names:
        return np.zeros(len(batch), bool)
    low = _column(batch, "gfn")
    more = _column(batch, "npages")
    more -= more > 0
    level, leaf = _column(batch, "level"), _column(batch, "old") | _column(batch, "new")
    for size, pages in _LEVEL_PAGES.items():
        # Only a leaf covers what its level says; the gfn of a fault is the one touched.
        more[(level == size) & (leaf > 0)] = pages
    hit: npt.NDArray[np.bool_] = (low <= last) & (low + more >= first)
    return hit & _valid(batch.column("gfn"))


def _prefix(row: Row, start: int) -> str:
    us = ((row["ts"] or 0) - start) // 1000
    time = f"{'-' if us < 0 else ''}{abs(us) // 10**6}.{abs(us) % 10**6:06}"
    cpu = "---" if row.get("cpu") is None else f"{row['cpu']:03}"
    vcpu = "-" if row.get("vcpu") is None else row["vcpu"]
    vm = f"vm{row['vm']}/{vcpu}" if row.get("vm") else "-"
    return f"{time:>12} [{cpu}] {vm:<6}"


def _text(row: Row) -> str:
    parts = [row["kind"], *_FORMS[row["kind"]](row)]
    return " ".join(part for part in parts if part)


# What follows makes the parts of one kind's line; an empty part is left out. Any value may be
# null, since a file may come from anyone.


def _hex(name: str, value: int | None) -> str:
    return f"{name}={'-' if value is None else hex(value)}"


def _pfn(value: int | None) -> str:
    if value is None:
        return "pfn=-"
    # KVM_PFN_NOSLOT and KVM_PFN_ERR_*, include/linux/kvm_host.h.
    if value >> 63:
        return "pfn=noslot"
    return f"pfn=error{value & (1 << 52) - 1}" if value >> 52 else _hex("pfn", value)


def _span(ns: int | None) -> str:
    if ns is None or ns < 0:
        return "-"
    for unit, size in (("s", 10**9), ("ms", 10**6), ("µs", 10**3)):
        if ns >= size:
            return f"{ns / size:.3g}{unit}" if ns < 100 * size else f"{ns / size:.0f}{unit}"
    return f"{ns}ns"


def _level(row: Row) -> str:
    return _LEVELS.get(row["level"], "")


def _ref(row: Row) -> str:
    before, after = row["refcount"], row.get("refcount_end")
    if before is None:
        return "no-page"
    return f"ref {before}" if after is None else f"ref {before}→{after}"


def _error(ret: int | None) -> str:
    return f"-{errno.errorcode.get(-ret, -ret)}" if ret is not None and ret < 0 else ""


def _fault(row: Row) -> Iterator[str]:
    code = row["error_code"] or 0
    yield _hex("gfn", row["gfn"])
    yield "w" if code & _WRITE else "x" if code & _FETCH else "r"
    yield "prefetch" if row["prefetch"] else ""
    yield _error(row["ret"]) or str(row["result"])
    yield _level(row)
    yield _pfn(row["pfn"])
    yield _hex("walk", row["walk_pfn"]) if row["walk_pfn"] is not None else ""
    yield {True: "counted", False: "uncounted"}.get(row["refcounted"], "")
    yield _ref(row)
    begin, end = row["t_faultin"], row["t_faultin_end"]
    if begin is not None and end is not None:
        yield f"faultin {_span(end - begin)}"
    yield f"total {_span(row['dur'])}"


def _spte(row: Row) -> Iterator[str]:
    yield str(row["op"])
    yield _hex("gfn", row["gfn"])
    yield _level(row)
    if row["op"] != "change":
        yield _pfn(row["pfn"])
    yield f"cause={row['cause']}"
    yield "shadow" if row["mmu"] == "shadow" else ""
    yield f"as={row['as_id']}" if row["as_id"] else ""
    if row["op"] == "change":
        yield f"{row['old'] or 0:#x}→{row['new'] or 0:#x}"
    else:
        yield _ref(row)


def _release(row: Row) -> Iterator[str]:
    yield str(row["call"])
    yield _pfn(row["pfn"])
    yield _hex("gfn", row["gfn"]) if row["gfn"] is not None else ""
    yield _ref(row)


def _range(row: Row) -> str:
    return f"{row['hva'] or 0:#x}-{row['hva_end'] or 0:#x}"


def _invalidate(row: Row) -> Iterator[str]:
    yield str(row["op"])
    yield str(row["event"])
    yield _range(row)
    yield f"seq={row['invalidate_seq']}"
    yield f"in_progress={row['in_progress']}"


def _page(row: Row) -> Iterator[str]:
    yield _pfn(row["pfn"])
    yield f"order={row['order']}"
    yield _ref(row)


def _pin(row: Row) -> Iterator[str]:
    yield str(row["op"])
    yield _hex("gfn", row["gfn"])
    yield _pfn(row["pfn"])
    yield _hex("hva", row["hva"])
    yield _error(row["ret"])
    yield _ref(row)


def _slot(row: Row) -> Iterator[str]:
    first, pages = row["gfn"] or 0, row["npages"] or 0
    yield str(row["op"])
    yield f"id={row['slot']}"
    yield f"as={row['as_id']}" if row["as_id"] else ""
    yield f"gfn={first:#x}-{first + max(pages, 1) - 1:#x}" if pages else _hex("gfn", first)
    yield _hex("hva", row["hva"])
    yield _hex("flags", row["slot_flags"])


def _vm(row: Row) -> Iterator[str]:
    yield str(row["op"])
    yield f"owner={row['vm_tgid']}"


def _vma(row: Row) -> Iterator[str]:
    yield str(row["op"])
    yield _range(row)
    yield _hex("flags", row["vm_flags"])
    if row["rdev"] is not None:
        yield f"dev={row['rdev'] >> 20}:{row['rdev'] & 0xFFFFF}"


def _loss(row: Row) -> Iterator[str]:
    yield str(row["loss_kind"])
    for name in ("produced", "lost", "filtered", "torn"):
        yield f"{name} {row[name]}"


def _note(row: Row) -> Iterator[str]:
    yield (row["note"] or "")[:RECORD_MAX]


_FORMS: dict[str, Callable[[Row], Iterator[str]]] = {
    "FAULT": _fault,
    "SPTE": _spte,
    "RELEASE": _release,
    "INVALIDATE": _invalidate,
    "PAGE_FREE": _page,
    "PAGE_ALLOC": _page,
    "PIN": _pin,
    "SLOT": _slot,
    "VM": _vm,
    "VMA": _vma,
    "LOSS": _loss,
    "NOTE": _note,
}
