"""Read a trace file, whoever made it; the layout is drawn in `tracer.tracefile`.

A file that was cut or damaged is read as far as it is intact, and says so: `reason` and `info`.
May import: `probes.errors`, `tracer.messages`, `tracer.schema`, `tracer.timeorder`,
`tracer.traceinfo`, `tracer.tracemeta`, `tracer.tracescan`, pyarrow.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa

from probes.errors import TraceFormatError, UsageError
from tracer import schema
from tracer.messages import Malformed
from tracer.timeorder import ORDER, in_time_order, values
from tracer.traceinfo import describe
from tracer.tracemeta import TraceMeta
from tracer.tracescan import Block, Scan, TraceBytes, load, read_schema, scan

__all__ = ("TraceReader", "checked_kinds")

_SCHEMA = schema.arrow_schema()
_EVERY_COLUMN = tuple(column.name for column in schema.COLUMNS)
#: A trace of no more batches, rows and packed bytes is unpacked at once and kept: 13 MB. Readers
#: ask for a batch four times with other columns; opening Arrow's reader costs more than 500 rows.
_KEPT_BLOCKS, _KEPT_ROWS, _KEPT_BYTES = 64, 1 << 15, 4 << 20


def checked_kinds(kinds: Sequence[str] | None) -> tuple[str, ...]:
    """Return the kinds to read, all if None; raises UsageError for a name that is no kind."""
    for kind in kinds or ():
        if kind not in schema.FILE_KINDS:
            raise UsageError(
                f"no records of kind {kind!a:.40}; there are {' '.join(schema.FILE_KINDS)}"
            )
    return schema.FILE_KINDS if kinds is None else tuple(kinds)


def _checked_columns(columns: Sequence[str] | None) -> tuple[str, ...]:
    for name in columns or ():
        if name not in _EVERY_COLUMN:
            raise UsageError(f"no column {name!a:.40}; 'pfntrace columns' names them")
    return _EVERY_COLUMN if columns is None else tuple(columns)


class _Feed:
    """What Arrow's stream reader reads from: only messages that were checked before."""

    closed = False

    def __init__(self) -> None:
        self._data = b""
        self._at = 0

    def put(self, data: bytes) -> None:
        self._data, self._at = self._data[self._at :] + data, 0

    def read(self, count: int = -1) -> bytes:
        end = len(self._data) if count < 0 else self._at + count
        piece = self._data[self._at : end]
        self._at += len(piece)
        return piece

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        pass


class _Decoder:
    """Turns checked messages into batches of the wanted columns."""

    def __init__(self, head: bytes, columns: Sequence[str]) -> None:
        self._feed = _Feed()
        self._feed.put(head)
        self._columns = list(columns)
        fields = [i for i, column in enumerate(schema.COLUMNS) if column.name in self._columns]
        self._named = [c.name for c in schema.COLUMNS if c.names and c.name in self._columns]
        options = pa.ipc.IpcReadOptions(included_fields=fields, use_threads=False)
        self._arrow = pa.ipc.open_stream(pa.PythonFile(self._feed, mode="r"), options=options)

    def decode(self, message: bytes, block: Block) -> pa.RecordBatch:
        """Return a batch; raises Malformed if Arrow cannot make one of it."""
        try:
            self._feed.put(message)
            batch = self._arrow.read_next_batch()
            batch.validate(full=True)
            _check_names(batch, self._named)
            self._named = []  # once is enough: they stand before the first batch, and only there
        except (pa.ArrowException, OSError, StopIteration) as err:
            raise Malformed("Arrow cannot read it") from err
        _check_tags(batch, self._columns, block)
        return batch.select(self._columns)


def _check_names(batch: pa.RecordBatch, columns: Sequence[str]) -> None:
    for name in columns:
        names = batch.column(name).dictionary.to_pylist()
        if len(set(names)) < len(names):
            raise Malformed("a name that stands for two numbers")


def _check_tags(batch: pa.RecordBatch, columns: Sequence[str], block: Block) -> None:
    """Compare a batch with its head, as far as these columns tell."""
    if "kind" in columns and not _is_all(batch.column("kind"), block.kind):
        raise Malformed("other kinds than its head says")
    if "ts" in columns:
        ts = values(batch, "ts")
        if ts.min() != block.ts_min or ts.max() != block.ts_max:
            raise Malformed("other times than its head says")


def _is_all(column: pa.DictionaryArray, name: str) -> bool:
    at = np.frombuffer(column.indices.buffers()[1], "i1", len(column))
    return bool((at == at[0]).all()) and not column.null_count and column[0].as_py() == name


class _Short:
    """All batches of a short trace, with every column; of any other trace none.

    None either if one is not as it should be: which reading that concerns, each has to see.
    """

    def __init__(self, file: TraceBytes, found: Scan) -> None:
        self._file = file
        self.stamp = file.stamp
        self._batches: dict[int, pa.RecordBatch] = {}
        if _is_short(found.blocks):
            try:
                self._batches = _unpacked(file, found)
            except (Malformed, TraceFormatError, pa.ArrowException, OSError, StopIteration):
                pass

    def batch(self, block: Block) -> pa.RecordBatch | None:
        """Return a batch if it is here, and the file still what it was when it was checked."""
        batch = self._batches.get(block.offset)
        return batch if batch is not None and self._file.stamp == self.stamp else None


def _is_short(blocks: Sequence[Block]) -> bool:
    rows, packed = sum(b.rows for b in blocks), sum(b.body_size for b in blocks)
    return len(blocks) <= _KEPT_BLOCKS and rows <= _KEPT_ROWS and packed <= _KEPT_BYTES


def _unpacked(file: TraceBytes, found: Scan) -> dict[int, pa.RecordBatch]:
    """Return the batches of a file by offset, checked as one by one; raises for a bad one."""
    whole = b"".join([found.head, *(load(file, block) for block in found.blocks)])
    options = pa.ipc.IpcReadOptions(use_threads=False)
    # Of memory, not of a file in Python: Arrow would call that 30 times for the names alone.
    arrow = pa.ipc.open_stream(pa.py_buffer(whole), options=options)
    batches: dict[int, pa.RecordBatch] = {}
    for block in found.blocks:
        batch = arrow.read_next_batch()
        batch.validate(full=True)
        if not batches:
            _check_names(batch, [c.name for c in schema.COLUMNS if c.names])
        _check_tags(batch, _EVERY_COLUMN, block)
        batches[block.offset] = batch
    return batches


class TraceReader:
    """One trace file, opened for reading; every iteration starts at its beginning."""

    def __init__(self, path: Path) -> None:
        """Open a file; raises TraceFormatError if it is no trace of a version we know."""
        self._file = TraceBytes(path)
        try:
            self._schema_message, arrow = read_schema(self._file)
            try:
                self.meta = TraceMeta.from_metadata(arrow.metadata)
            except TraceFormatError as err:
                raise TraceFormatError(f"{path}: {err}") from err
            if not arrow.equals(_SCHEMA):
                raise TraceFormatError(
                    f"{path}: its columns are not those of a trace; record again"
                )
        except TraceFormatError:
            self._file.close()
            raise
        self._scanned: Scan | None = None
        self._short: _Short | None = None
        self._problem = ""
        self._damaged: Block | None = None
        self._told: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __enter__(self) -> "TraceReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; further calls do nothing."""
        self._file.close()

    @property
    def path(self) -> Path:
        """The file."""
        return self._file.path

    @property
    def vms(self) -> tuple[int, int]:
        """The first and the last number that a VM in here can have; 0 is an unknown one."""
        return 0, (1 << 32) - 1

    @property
    def reason(self) -> str:
        """Why the records are not all there, as far as is known by now; "" if nothing is wrong.

        Damage within a batch shows only when the batch is read, so ask after reading.
        """
        return self._problem or self._scan.problem

    def batches(
        self, kinds: Sequence[str] | None = None, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Yield the batches as they lie in the file: one kind each, sorted by (ts, cpu, seq).

        `columns` limits what is unpacked, which saves most of the time. Where the file is damaged
        the iteration ends; `reason` says so. Raises UsageError for names that do not exist.
        """
        read = self._loader(_checked_columns(columns))
        for block in self._blocks(kinds):
            batch = read(block)
            if batch is None:
                return
            yield batch

    def records(
        self, kinds: Sequence[str] | None = None, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Yield all records of some kinds in order of (ts, cpu, seq), in batches of any length.

        Batches overlap in time, so those of the same moment are held together: one or two per
        kind, at most about a million rows. Where a batch is damaged the iteration ends with what
        came before it in time; where the file cannot be followed further, with what lies before
        in the file. `reason` says so.
        """
        wanted = _checked_columns(columns)
        read = self._loader(tuple(dict.fromkeys((*wanted, *ORDER))))
        try:
            for batch in in_time_order(self._blocks(kinds), read):
                yield batch.select(wanted)
        except OverflowError as err:
            raise TraceFormatError(
                f"{self.path}: {err}; no recorder of pfntrace wrote this"
            ) from err

    def blocks(self) -> list[Block]:
        """Return all batches by their heads, in file order, for who reads several files at once."""
        return self._blocks(None)

    def loader(
        self, columns: Sequence[str] | None = None
    ) -> Callable[[Block], pa.RecordBatch | None]:
        """Return a function that reads one of `blocks`; it returns None where that is damaged."""
        return self._loader(_checked_columns(columns))

    def info(self, *, verify: bool = False) -> dict[str, Any]:
        """Return what the file holds, as plain JSON; see `tracer.traceinfo.describe`.

        Only the heads of batches are read. `verify` reads and checks everything else too.
        """
        blocks = self._blocks(None)
        if verify:
            for block in blocks:
                if self._load(block) is None:
                    break
        # What is told changes only with the file, or with what is known to be wrong.
        if self._told is None or self._told[0] != (self._file.stamp, self.reason):
            stamp, found = self._file.stamp, self._describe(blocks)
            self._told = (stamp, self.reason), found
        return {**self._told[1]}

    def _describe(self, blocks: list[Block]) -> dict[str, Any]:
        while True:
            damaged = self._damaged
            if damaged is not None:
                blocks = [block for block in blocks if block.offset < damaged.offset]
            found = describe(self.meta, blocks, self.reason, self._file.size, self._rows)
            if self._damaged is damaged:  # else some of the rows read for it were
                return found

    @property
    def _scan(self) -> Scan:
        if self._scanned is None:
            self._scanned = scan(self._file, self._schema_message)
        return self._scanned

    @property
    def _kept(self) -> _Short:
        if self._short is None:
            self._short = _Short(self._file, self._scan)
        return self._short

    def _blocks(self, kinds: Sequence[str] | None) -> list[Block]:
        wanted = checked_kinds(kinds)
        return [block for block in self._scan.blocks if block.kind in wanted]

    def _load(self, block: Block) -> bytes | None:
        """Return a checked batch message, None if it is damaged."""
        try:
            return load(self._file, block)
        except Malformed as err:
            self._damage(block, err)
            return None

    def _damage(self, block: Block, why: Exception) -> None:
        if self._damaged is None or block.offset < self._damaged.offset:
            self._damaged = block
            self._problem = f"damaged at byte {block.offset}: {why}"

    def _loader(self, columns: Sequence[str]) -> Callable[[Block], pa.RecordBatch | None]:
        """Return what reads one block as a batch, or None if it is damaged."""
        wanted, kept = list(columns), self._kept
        decoder: _Decoder | None = None

        def read(block: Block) -> pa.RecordBatch | None:
            nonlocal decoder
            batch = kept.batch(block)
            if batch is not None:
                return batch.select(wanted)
            message = self._load(block)
            if message is None:
                return None
            try:
                decoder = decoder or _Decoder(self._scan.head, wanted)
                return decoder.decode(message, block)
            except Malformed as err:
                self._damage(block, err)
                return None

        return read

    def _rows(self, blocks: Sequence[Block], columns: Sequence[str]) -> list[dict[str, Any]]:
        read = self._loader(columns)
        rows: list[dict[str, Any]] = []
        for block in blocks:
            batch = read(block)
            if batch is None:
                break
            rows += batch.to_pylist()
        return rows
