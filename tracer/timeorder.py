"""Merge batches of several kinds into one stream in time order, holding only those that overlap.

May import: numpy, pyarrow.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

__all__ = ("ORDER", "PENDING_ROWS_MAX", "Spanned", "in_time_order", "rows_at", "values")

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

    `load` reads one block; it returns None if the block is unreadable, and what precedes that
    block in time is all that comes then. Blocks are read in order of `ts_min`, each once. Raises
    OverflowError if more than PENDING_ROWS_MAX rows overlap in time.
    """
    ordered = sorted(blocks, key=lambda block: block.ts_min)
    pending: list[_Pending] = []
    for index, block in enumerate(ordered):
        batch = load(block)
        if batch is None:
            yield from _merge(pending, block.ts_min)
            return
        pending.append(_Pending(batch))
        held = sum(len(p.ts) - p.at for p in pending)
        if held > PENDING_ROWS_MAX:
            raise OverflowError(f"more than {PENDING_ROWS_MAX} records of the same time")
        if held >= _ROWS_WANTED and index + 1 < len(ordered):
            yield from _merge(pending, ordered[index + 1].ts_min)
            pending = [p for p in pending if p.at < len(p.ts)]
    yield from _merge(pending, None)


def _merge(pending: list[_Pending], before: int | None) -> Iterator[pa.RecordBatch]:
    """Yield the pending rows before a time as one batch, none if there are none."""
    parts = [part for part in (p.take(before) for p in pending) if len(part)]
    if parts:
        yield parts[0] if len(parts) == 1 else _sorted(_joined(parts))


# pa.concat_batches() is younger than the oldest pyarrow that we support.
def _joined(parts: list[pa.RecordBatch]) -> pa.RecordBatch:
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
    later, equal = ts[1:] > ts[:-1], ts[1:] == ts[:-1]
    if later.all():
        return batch
    if equal.any():
        order = np.lexsort([values(batch, name) for name in reversed(ORDER)])
        if (order[1:] > order[:-1]).all():
            return batch
    else:
        order = np.argsort(ts, kind="stable")
    return rows_at(batch, order)
