"""Merge batches of several kinds into one stream in time order, holding only those that overlap.

May import: numpy, pyarrow.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = (
    "ORDER",
    "PENDING_ROWS_MAX",
    "Spanned",
    "in_time_order",
    "in_time_spans",
    "merged",
    "rows_at",
    "values",
)

#: The columns that order records; nulls count as 0.
ORDER = ("ts", "cpu", "seq")
#: Rows held at one time. pfntrace's own files need a batch or two per kind.
PENDING_ROWS_MAX = 1 << 20

#: Rows that are worth handing out as one batch.
_ROWS_WANTED = 1 << 14


class Spanned(Protocol):
    """A batch not yet read, of which the time it covers is known."""

    @property
    def ts_min(self) -> int: ...


_Block = TypeVar("_Block", bound=Spanned)


class _Pending:
    """A batch of which some rows have been handed out."""

    def __init__(self, batch: pa.RecordBatch) -> None:
        self.batch = _sorted(batch)
        self.ts = values(self.batch, "ts")
        self.at = 0

    @property
    def next_ts(self) -> int:
        """Time of the first row not yet handed out; there is one."""
        return int(self.ts[self.at])

    def take(self, before: int | None) -> pa.RecordBatch:
        """Return the rows not yet handed out with ts < before; all if None."""
        end = len(self.ts) if before is None else int(np.searchsorted(self.ts, np.uint64(before)))
        part = self.batch.slice(self.at, end - self.at)
        self.at = end
        return part


def in_time_order(
    blocks: Sequence[_Block], load: Callable[[_Block], pa.RecordBatch | None]
) -> Iterator[pa.RecordBatch]:
    """Yield all rows of the blocks ordered by (ts, cpu, seq), in batches.

    `load` and errors are those of `in_time_spans`.
    """
    for span in in_time_spans(blocks, load):
        yield merged([rows for _, rows in span])


def in_time_spans(
    blocks: Sequence[_Block],
    load: Callable[[_Block], pa.RecordBatch | None],
    rows_max: int | None = None,
) -> Iterator[list[tuple[_Block, pa.RecordBatch]]]:
    """Yield spans of time, each earlier than the next: the rows in it of every block that has any.

    The rows of one block are ordered by (ts, cpu, seq). `load` reads one block; it returns None if
    the block is unreadable, and what precedes that block in time is all that comes then. Blocks
    are read in order of `ts_min`, each once. Raises OverflowError if more than `rows_max` rows
    (PENDING_ROWS_MAX) overlap in time.
    """
    ordered = sorted(blocks, key=lambda block: block.ts_min)
    # Those whose rows come next are first, so that a span costs what it holds however many wait.
    waiting: list[tuple[int, int, _Pending]] = []
    held, most = 0, PENDING_ROWS_MAX if rows_max is None else rows_max
    for index, block in enumerate(ordered):
        batch = load(block)
        if batch is None:
            if span := _take(waiting, ordered, block.ts_min):
                yield span
            return
        if len(batch):
            pending = _Pending(batch)
            heapq.heappush(waiting, (pending.next_ts, index, pending))
            held += len(batch)
        if held > most:
            raise OverflowError(f"more than {most} records of the same time")
        if held >= _ROWS_WANTED and index + 1 < len(ordered):
            if span := _take(waiting, ordered, ordered[index + 1].ts_min):
                held -= sum(len(rows) for _, rows in span)
                yield span
    if span := _take(waiting, ordered, None):
        yield span


def _take(
    waiting: list[tuple[int, int, _Pending]], ordered: Sequence[_Block], before: int | None
) -> list[tuple[_Block, pa.RecordBatch]]:
    """Return the rows before a time, all if None, in order of the blocks."""
    taken: list[tuple[int, pa.RecordBatch]] = []
    while waiting and (before is None or waiting[0][0] < before):
        _, index, pending = waiting[0]
        taken.append((index, pending.take(before)))
        if pending.at < len(pending.ts):
            heapq.heapreplace(waiting, (pending.next_ts, index, pending))
        else:
            heapq.heappop(waiting)
    taken.sort(key=lambda part: part[0])
    return [(ordered[index], rows) for index, rows in taken]


def merged(parts: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    """Return the rows of some batches as one, ordered by (ts, cpu, seq)."""
    return parts[0] if len(parts) == 1 else _sorted(_joined(parts))


# pa.concat_batches() is younger than the oldest pyarrow that we support.
def _joined(parts: Sequence[pa.RecordBatch]) -> pa.RecordBatch:
    return pa.Table.from_batches(parts).combine_chunks().to_batches()[0]


def rows_at(batch: pa.RecordBatch, at: npt.NDArray[np.int64]) -> pa.RecordBatch:
    """Return the rows at some positions, in that order."""
    # Not pa.array(): it imports pandas to ask whether it was given one.
    buffers = [None, pa.py_buffer(np.ascontiguousarray(at, "<i8"))]
    return batch.take(pa.Array.from_buffers(pa.int64(), len(at), buffers))


def values(batch: pa.RecordBatch, name: str) -> npt.NDArray[Any]:
    """Return a column of integers as it lies in memory; nulls look like any value, mostly 0."""
    column = batch.column(name)
    dtype = np.dtype(str(column.type))
    return np.frombuffer(column.buffers()[1], dtype, column.offset + len(column))[column.offset :]


def _sorted(batch: pa.RecordBatch) -> pa.RecordBatch:
    ts = values(batch, "ts")
    if len(ts) < 2:
        return batch
    if (ts[1:] > ts[:-1]).all():
        return batch
    order = np.argsort(ts, kind="stable")
    in_order = ts[order]
    # Equal times need not stand side by side before they are sorted.
    if (in_order[1:] == in_order[:-1]).any():
        order = np.lexsort([values(batch, name) for name in reversed(ORDER)])
    return batch if (order[1:] > order[:-1]).all() else rows_at(batch, order)
