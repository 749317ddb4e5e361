"""A trace in time-aligned pieces of bounded length, each kind read with only the columns it needs.

All kinds of a piece cover the same span of time [ts_from, ts_to), so that a detector sees a fault,
what happened in it and what happened meanwhile together. A fault can still be open at the end of a
piece: its FAULT record, written last, is then in a later one.

No recorder writes two records of one kind with the same (ts, cpu, seq): where a file has them, as
when one was copied together by hand, they are one record, which is taken once.
May import: `analysis.columns`, `probes.errors`, `tracer.tracefile`, numpy, pyarrow.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from analysis.columns import Records, numbers
from probes.errors import TraceFormatError
from tracer.tracefile import TraceReader

__all__ = ("PIECE_ROWS", "Piece", "pieces")

#: Records of all kinds in one piece, about.
PIECE_ROWS = 1 << 18
#: More than this at once cannot come from a recorder: all of the same moment, say.
_HELD_MAX = 1 << 23
_LAST = (1 << 64) - 1
_ORDER = ("ts", "cpu", "seq")


class Piece:
    """The records of one span of time, by kind; a kind without any has empty ones.

    `duplicates` is how many were left out of the trace so far since they had come before.
    """

    def __init__(
        self, ts_from: int, ts_to: int, records: dict[str, Records], duplicates: int = 0
    ) -> None:
        """Take the records with ts_from <= ts < ts_to (ns)."""
        self.ts_from = ts_from
        self.ts_to = ts_to
        self.records = records
        self.duplicates = duplicates

    def __getitem__(self, kind: str) -> Records:
        return self.records[kind]

    def __len__(self) -> int:
        return sum(map(len, self.records.values()))


class _Stream:
    """The records of one kind, in order of time, as far as they were read."""

    def __init__(self, reader: TraceReader, kind: str, columns: Sequence[str]) -> None:
        wanted = tuple(dict.fromkeys((*_ORDER, *columns)))
        self.kind = kind
        self.ended = False
        self.rows = 0
        self.last_ts = 0
        self.duplicates = 0
        self._last: tuple[int, ...] = ()
        self._source = reader.records([kind], wanted)
        self._batches: list[pa.RecordBatch] = []

    def pull(self) -> None:
        batch = next(self._source, None)
        if batch is None:
            self.ended = True
        elif len(batch):
            self.last_ts = int(_ts(batch)[-1])
            batch = self._once(batch)
            self.rows += len(batch)
            if len(batch):
                self._batches.append(batch)

    def _once(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Leave out what is there twice: in order, so one is next to the other."""
        ts = _ts(batch)
        again = np.zeros(len(batch), np.bool_)
        again[1:] = ts[1:] == ts[:-1]
        if again.any():
            for name in _ORDER[1:]:
                column = numbers(batch.column(name))
                again[1:] &= column[1:] == column[:-1]
        again[0] = _key(batch, 0) == self._last
        self._last = _key(batch, len(batch) - 1)
        if not again.any():
            return batch
        self.duplicates += int(again.sum())
        return batch.filter(pa.array(~again))

    def times(self) -> Iterator[npt.NDArray[np.uint64]]:
        """Yield the times of what was read and not taken."""
        return map(_ts, self._batches)

    def take(self, before: int) -> Records:
        """Take the rows before a time out."""
        taken = []
        while self._batches:
            first = self._batches[0]
            # Not a plain int: numpy would compare as floats, which round such times.
            count = len(first)
            if before <= _LAST:
                count = int(np.searchsorted(_ts(first), np.uint64(before)))
            if count:
                taken.append(first.slice(0, count))
                self.rows -= count
            if count < len(first):
                self._batches[0] = first.slice(count)
                break
            self._batches.pop(0)
        return Records(self.kind, taken)


def _key(batch: pa.RecordBatch, row: int) -> tuple[int, ...]:
    return tuple(batch.column(name)[row].as_py() for name in _ORDER)


def _ts(batch: pa.RecordBatch) -> npt.NDArray[np.uint64]:
    column = batch.column("ts")
    data = np.frombuffer(column.buffers()[1], "<u8", column.offset + len(column))
    return data[column.offset :]


def pieces(
    reader: TraceReader,
    columns: Mapping[str, Sequence[str]],
    rows_max: int = PIECE_ROWS,
    until: int | None = None,
) -> Iterator[Piece]:
    """Yield the records of the kinds named, in pieces of about `rows_max` records.

    ts, cpu and seq are always read. Where a batch is damaged the pieces end before it in time;
    `reader.reason` says so. Records from `until` on (ns) are left out. Raises TraceFormatError for
    more records of one moment than a recorder can write.
    """
    streams = [_Stream(reader, kind, names) for kind, names in columns.items()]
    sound = reader.reason
    start = 0
    while True:
        cut = _fill(reader, streams, rows_max, sound)
        last = cut is None or (until is not None and cut >= until) or reader.reason != sound
        if until is not None and (cut is None or cut > until):
            cut = until
        end = _end(streams) if cut is None else cut
        for part in _parts(streams, end, rows_max):
            taken = {stream.kind: stream.take(part) for stream in streams}
            piece = Piece(start, part, taken, sum(stream.duplicates for stream in streams))
            if len(piece):
                yield piece
                start = part
        if last:
            return


def _parts(streams: Sequence[_Stream], end: int, rows_max: int) -> Iterator[int]:
    """Yield the ends of the pieces that what was read up to `end` is cut into; `end` is the last.

    Batches of a file can be longer than a piece should be.
    """
    while True:
        times = [ts for stream in streams for ts in stream.times()]
        if sum(map(len, times)) <= 2 * rows_max:
            break
        every = np.concatenate(times)
        # All of one moment go together, so that each piece gets further.
        at = int(np.partition(every, rows_max)[rows_max]) + 1
        if at >= end:
            break
        yield at
    yield end


def _fill(reader: TraceReader, streams: Sequence[_Stream], rows_max: int, sound: str) -> int | None:
    """Read until a piece is complete; return the time before which all is there, None at the end.

    What bounds that time is the stream that was read least far, so that one is read on.
    """
    while True:
        alive = [stream for stream in streams if not stream.ended]
        if not alive:
            return None
        behind = min(alive, key=lambda stream: (bool(stream.rows), stream.last_ts))
        held = sum(stream.rows for stream in streams)
        if behind.rows and held >= rows_max and _ready(streams, behind.last_ts):
            return behind.last_ts
        if held > _HELD_MAX:
            raise TraceFormatError(
                f"{reader.path}: {held:,} records of one moment; no recorder of pfntrace wrote this"
            )
        behind.pull()
        if behind.ended and reader.reason != sound:
            # Of this kind nothing is known from here on.
            return behind.last_ts


def _ready(streams: Sequence[_Stream], cut: int) -> bool:
    return any(s.rows and int(_ts(s._batches[0])[0]) < cut for s in streams)


def _end(streams: Sequence[_Stream]) -> int:
    return max((stream.last_ts for stream in streams), default=0) + 1
