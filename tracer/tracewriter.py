"""Write a trace file; the layout is drawn in `tracer.tracefile`.

Whatever was written is readable at once and after SIGKILL: a batch is made in memory and goes to
the file as one piece. May import: `probes.errors`, `tracer.columns`, `tracer.messages`,
`tracer.schema`, `tracer.tracemeta`, numpy, pyarrow.
"""

import json
import os
import stat
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probes.errors import OutputError
from tracer import messages, schema
from tracer.columns import ROWS_MAX, ColumnMaker
from tracer.tracemeta import HEAD_BYTES_MAX, TraceMeta

__all__ = ("NOTE_BYTES_MAX", "TraceWriter")

#: Longest JSON text of one note. A batch has three times that at most: a reader relies on it.
NOTE_BYTES_MAX = 1 << 20
#: Notes held back until the next group; so many that starting with hundreds of VMAs is one batch.
_NOTES_HELD_MAX = 256

#: What Arrow writes of one batch is collected up to so many bytes.
_PIECES_BYTES = 1 << 16

_COUNTS = ("produced", "lost", "filtered", "torn")


class _Sink:
    """Collects in memory what Arrow's writer writes, piece by piece."""

    closed = False

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._position = 0

    def write(self, piece: Any) -> int:
        data = bytes(piece)
        self._pieces.append(data)
        self._position += len(data)
        return len(data)

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        pass

    def close(self) -> None:
        """What Arrow calls at last; whatever was not taken by then nobody wants."""

    def take(self) -> bytearray:
        data = bytearray().join(self._pieces)
        self._pieces.clear()
        return data


class TraceWriter:
    """One trace file being written.

    All methods raise OutputError if the file cannot be written. It stays valid then, up to the
    last whole batch, and `close` may still be called to add the end mark.
    """

    def __init__(self, path: Path, meta: TraceMeta, *, overwrite: bool = False) -> None:
        """Create the file, for its owner only; refuses an existing one unless `overwrite`."""
        self._path = path
        self._maker = ColumnMaker(meta.results)
        self._sink = _Sink()
        # Arrow writes each column by itself: two hundred calls into Python for one batch.
        self._pieces = pa.BufferedOutputStream(pa.PythonFile(self._sink, mode="w"), _PIECES_BYTES)
        self._arrow = pa.ipc.new_stream(
            self._pieces,
            self._maker.schema.with_metadata(meta.to_metadata()),
            options=pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False),
        )
        self._group = 0
        self._crc_from = 0  # offset behind the last batch: where the next one's checksum begins
        self._crc_head = 0  # checksum of what was written since then: the head, before any batch
        self._kinds = dict.fromkeys(schema.FILE_KINDS, 0)
        self._notes: list[tuple[int, str]] = []
        self._losses: dict[tuple[str, int], tuple[int, int, int, int]] = {}
        self._size = 0
        head = self._head()
        if len(head) > HEAD_BYTES_MAX:
            raise ValueError(f"a description of {len(head)} bytes, {HEAD_BYTES_MAX} at most")
        self._fd = _create(path, overwrite)
        try:
            self._write(head)
        except OutputError:
            self.abandon()
            path.unlink(missing_ok=True)
            raise
        self._crc_head = zlib.crc32(head)

    @property
    def bytes_written(self) -> int:
        """Size of the file."""
        return self._size

    @property
    def records(self) -> int:
        """Records written so far, LOSS and NOTE rows not counted."""
        return sum(self._kinds[kind] for kind in schema.RECORD_KINDS)

    @property
    def written(self) -> dict[str, int]:
        """Rows written so far by kind, LOSS and NOTE rows not counted."""
        return {kind: self._kinds[kind] for kind in schema.RECORD_KINDS}

    def fileno(self) -> int:
        """Return the descriptor of the file; -1 once closed."""
        return self._fd

    def write_group(self, groups: Sequence[tuple[str, npt.NDArray[np.void]]]) -> int:
        """Write the records that became final, per kind; return the bytes that took.

        Arrays are of `wire.FAULT` or `wire.EVENT`, sorted by (ts, cpu, seq), and are copied.
        Notes held back are written first.
        """
        before = self._size
        self.flush()
        for kind, records in groups:
            for first in range(0, len(records), ROWS_MAX):
                part = records[first : first + ROWS_MAX]
                self._write_batch(kind, self._maker.records(kind, part))
        self._group += 1
        return self._size - before

    def write_batches(self, groups: Sequence[tuple[str, pa.RecordBatch]]) -> None:
        """Write rows of another trace, one kind each: what `write_group` does with new records.

        They have all columns and are sorted by (ts, cpu, seq). Raises ValueError for a name that
        pfntrace does not write.
        """
        self.flush()
        for kind, batch in groups:
            for first in range(0, len(batch), ROWS_MAX):
                self._write_batch(kind, self._maker.adopt(batch.slice(first, ROWS_MAX)))
        self._group += 1

    def write_losses(
        self,
        counts: Mapping[str, Sequence[tuple[int, int, int, int]]],
        ts: int | None = None,
    ) -> None:
        """Write the loss counters: kind -> for each cpu (produced, lost, filtered, torn).

        Counts are cumulative; only those that changed since the last call are written. `ts` is
        CLOCK_MONOTONIC in ns, now if None.
        """
        changed: dict[tuple[str, int], tuple[int, int, int, int]] = {}
        for kind, cpus in counts.items():
            for cpu, values in enumerate(cpus):
                if values != self._losses.get((kind, cpu), (0, 0, 0, 0)):
                    changed[kind, cpu] = values
        if not changed:
            return
        keys = list(changed)
        columns: dict[str, Sequence[Any]] = {
            "ts": [time.monotonic_ns() if ts is None else ts] * len(keys),
            "cpu": [cpu for _, cpu in keys],
            "loss_kind": [kind for kind, _ in keys],
        }
        for at, name in enumerate(_COUNTS):
            columns[name] = [changed[key][at] for key in keys]
        for first in range(0, len(keys), ROWS_MAX):
            part = {name: v[first : first + ROWS_MAX] for name, v in columns.items()}
            self._write_batch("LOSS", self._maker.rows("LOSS", part))
        self._losses.update(changed)

    def write_note(self, note: Mapping[str, Any], ts: int | None = None) -> None:
        """Add a note; it reaches the file with the next group or flush.

        `ts` is CLOCK_MONOTONIC in ns, now if None. Raises ValueError for a note of more than
        1 MiB, or with the key "end", which is the end mark's.
        """
        if "end" in note:
            raise ValueError("a note with the key 'end' would look like the end mark")
        self._hold(note, ts)
        held = sum(len(text) for _, text in self._notes)
        if len(self._notes) >= _NOTES_HELD_MAX or held > NOTE_BYTES_MAX:
            self.flush()

    def flush(self) -> None:
        """Write the notes held back; everything else is in the file already."""
        if self._notes:
            self._write_batch("NOTE", self._note_rows())
            self._notes.clear()

    def close(self, summary: Mapping[str, Any], ts: int | None = None) -> None:
        """Write the end mark with `summary` (plain JSON) and close; further calls do nothing."""
        if self._fd < 0:
            return
        try:
            losses = {n: sum(v[i] for v in self._losses.values()) for i, n in enumerate(_COUNTS)}
            kinds = {kind: self._kinds[kind] for kind in schema.RECORD_KINDS}
            self._hold({"end": dict(summary), "kinds": kinds, "losses": losses}, ts)
            self._write_end()
        finally:
            self.abandon()

    def abandon(self) -> None:
        """Close the file as it is, without the end mark: what a killed recorder leaves."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # On a full disk the notes held back give way to the end mark.
    def _write_end(self) -> None:
        try:
            self._write_batch("NOTE", self._note_rows(), messages.END_OF_STREAM)
        except OutputError:
            if len(self._notes) == 1 or self._fd < 0:
                raise
            del self._notes[:-1]
            self._write_batch("NOTE", self._note_rows(), messages.END_OF_STREAM)

    def _hold(self, note: Mapping[str, Any], ts: int | None) -> None:
        text = json.dumps(note, sort_keys=True, allow_nan=False)
        if len(text) > NOTE_BYTES_MAX:
            raise ValueError(f"note of {len(text)} bytes, {NOTE_BYTES_MAX} at most")
        self._notes.append((time.monotonic_ns() if ts is None else ts, text))

    def _note_rows(self) -> pa.RecordBatch:
        ts, notes = zip(*self._notes, strict=True)
        return self._maker.rows("NOTE", {"ts": ts, "note": notes})

    # Schema and dictionaries, with which every Arrow reader can begin. Arrow writes the
    # dictionaries with the first batch only, so an empty one is made and cut off.
    def _head(self) -> bytearray:
        self._arrow.write_batch(self._maker.rows("NOTE", {"ts": []}))
        data = self._take()
        return data[: messages.first_batch(data)]

    def _take(self) -> bytearray:
        self._pieces.flush()
        return self._sink.take()

    def _write_batch(self, kind: str, batch: pa.RecordBatch, tail: bytes = b"") -> None:
        column = batch.column(0)
        ts = np.frombuffer(column.buffers()[1], "<u8")[column.offset : column.offset + len(batch)]
        tags = messages.Tags(
            kind=kind,
            group=self._group,
            ts_min=int(ts.min()),
            ts_max=int(ts.max()),
            crc_from=self._crc_from,
        )
        self._arrow.write_batch(batch, custom_metadata=tags.to_metadata())
        data = self._take()
        messages.sign(data, self._crc_head)
        end = self._size + len(data)
        self._write(data + tail)
        self._crc_from, self._crc_head = end, 0
        self._kinds[kind] += len(batch)

    def _write(self, data: bytes | bytearray) -> None:
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self._fd, view) :]
        except OSError as err:
            raise OutputError(self._undo(err)) from err
        self._size += len(data)

    # Takes a piece that was written in part out of the file again; returns what to tell.
    def _undo(self, err: OSError) -> str:
        why = err.strerror or str(err)
        try:
            os.ftruncate(self._fd, self._size)
            os.lseek(self._fd, self._size, os.SEEK_SET)
        except OSError:
            self.abandon()  # what came now would follow a broken piece
            return f"{self._path}: {why}, and the last piece cannot be removed; use another disk"
        return (
            f"{self._path}: {why}; the {self.records} records before are readable; free space or "
            "name another place with -o"
        )


def _create(path: Path, overwrite: bool) -> int:
    """Create the file with mode 0600 and return its descriptor; links are not followed."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        if overwrite:
            _remove(path)
        fd = os.open(path, flags, 0o600)
    except FileExistsError:
        raise OutputError(f"{path} exists already; name another with -o, or add --force") from None
    except OSError as err:
        raise OutputError(
            f"{path} cannot be created: {err.strerror}; name another place with -o"
        ) from err
    os.fchmod(fd, 0o600)  # whatever the umask took away
    return fd


def _remove(path: Path) -> None:
    """Remove a file that may be overwritten: never a device, a directory or a link."""
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISREG(mode):
        raise OutputError(f"{path} is not an ordinary file; name another with -o")
    os.unlink(path)
