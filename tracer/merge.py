"""`pfntrace merge`: the records of several traces in one, in order of time, in bounded memory.

Every part is read twice: once to learn what is in it (`tracer.mergeplan`), once to move its
records. What a reader of the result must know of its parts is in `settings["merged"]`
(`mergeplan.provenance`); every note says by its key `part` which one it is of. Nothing is made up
for what lies between two parts: the counters of losses go on, and an incomplete part makes the
whole incomplete. May import: `probes.errors`, `tracer`, numpy, pyarrow.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probes.errors import MergeError, OutputError
from tracer import mergeplan, schema
from tracer.describe import printable
from tracer.mergeplan import COUNTS, MERGED, PARTS_MAX, Part, Place
from tracer.timeorder import in_time_spans, merged, values
from tracer.tracefile import TraceMeta, TraceReader, TraceWriter
from tracer.tracemeta import parse_json
from tracer.tracescan import Block
from tracer.tracewriter import NOTE_BYTES_MAX

__all__ = ("Merged", "merge", "merged_lines")

#: Rows held while parts overlap in time, all columns of them: 300 bytes each.
_HELD_ROWS_MAX = 1 << 21
_COUNT_MAX = (1 << 64) - 1

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Merged:
    """What a merge made: `info` of the result is read from it, these come on top."""

    parts: tuple[dict[str, Any], ...]
    records: int
    lost: int
    boots: int
    #: what the result must be read with, a sentence each.
    remarks: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class _PartBlock:
    """A batch of one part; `ts_min` as it will be in the result."""

    source: "_Source"
    block: Block
    ts_min: int


class _Source:
    """One part, open for its second reading."""

    def __init__(self, reader: TraceReader, where: Place, number: int) -> None:
        self.where = where
        self.number = number
        self._read = reader.loader()

    def blocks(self) -> Iterator[_PartBlock]:
        for block in self.where.part.blocks:
            yield _PartBlock(self, block, block.ts_min + self.where.shift_ns)

    def load(self, block: Block) -> pa.RecordBatch:
        """Return a batch with the result's times and numbers."""
        where = self.where
        batch = self._read(block)
        if batch is None:
            raise MergeError(f"{where.part.path} changed while it was read: merge again")
        for name, base in (
            ("ts", where.shift_ns),
            ("fault_ts", where.shift_ns),
            ("cpu", where.cpu_base),
            ("vm", where.vm_base),
            ("stack", where.stack_base),
        ):
            if base:
                batch = _moved(batch, name, base, zero_stays=name == "vm")
        return batch


def _moved(batch: pa.RecordBatch, name: str, base: int, *, zero_stays: bool) -> pa.RecordBatch:
    """Add to a column; what it says where it is null stays as it is."""
    old = values(batch, name)
    moved = old + old.dtype.type(base)
    return _with(batch, name, np.where(old == 0, old, moved) if zero_stays else moved)


def _with(batch: pa.RecordBatch, name: str, column: npt.NDArray[Any]) -> pa.RecordBatch:
    """Return a batch with other values in a column of integers, null where it was null."""
    at = batch.schema.get_field_index(name)
    old = batch.column(at)
    mask = old.buffers()[0]
    if mask is not None and old.offset:
        bits = np.unpackbits(np.frombuffer(mask, "u1"), bitorder="little")
        bits = bits[old.offset : old.offset + len(old)]
        mask = pa.py_buffer(np.packbits(bits, bitorder="little"))
    new = pa.Array.from_buffers(
        old.type, len(old), [mask, pa.py_buffer(np.ascontiguousarray(column))], old.null_count
    )
    arrays = batch.columns
    arrays[at] = new
    return pa.RecordBatch.from_arrays(arrays, schema=batch.schema)


def merge(
    paths: Sequence[Path],
    output: Path,
    *,
    version: str,
    argv: Sequence[str],
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Merged:
    """Merge traces into a new one; `progress` is called with (records done, records to do).

    Raises TraceFormatError if a part is no trace, MergeError if the parts cannot be one trace (see
    `mergeplan.agree`), OutputError if the result cannot be written, which then is not there.
    """
    if len(paths) > PARTS_MAX:
        raise MergeError(f"{len(paths)} parts: at most {PARTS_MAX} can be merged at once")
    if not overwrite and os.path.lexists(output):
        raise OutputError(f"{output} exists already; name another with -o, or add --force")
    if not output.parent.is_dir():
        raise OutputError(f"{output} cannot be created: no folder {output.parent}; name another")
    with contextlib.ExitStack() as stack:
        readers = [stack.enter_context(TraceReader(path)) for path in paths]
        for path in paths:
            if output.exists() and os.path.samefile(output, path):
                raise OutputError(f"{output} is one of the parts; name another with -o")
        step = _steps(readers, progress)
        parts = [mergeplan.look(reader, step) for reader in readers]
        mergeplan.agree(parts)
        places = mergeplan.place(parts)
        of = {id(part): reader for part, reader in zip(parts, readers, strict=True)}
        sources = [_Source(of[id(p.part)], p, n) for n, p in enumerate(places)]
        meta = _meta(places, version, argv)
        # A name of its own until it is whole: what was there before must not be lost to a failure.
        unfinished = output.with_name(f".{output.name}.{os.getpid()}.part")
        try:
            _write(_writer(unfinished, meta), sources, step)
            _give_name(unfinished, output, overwrite=overwrite)
        except OutputError as err:
            # Of the user's file, not of a name that nobody asked for.
            raise OutputError(str(err).replace(str(unfinished), str(output))) from err
        finally:
            unfinished.unlink(missing_ok=True)
    return _told(places)


def merged_lines(told: Merged, output: Path) -> Iterator[str]:
    """Yield what to say of a merge: which parts are incomplete, what to mind, what was written."""
    for part in told.parts:
        if part["reason"]:
            yield f"INCOMPLETE: {printable(part['file'])}: {printable(part['reason'])}"
    yield from map(printable, told.remarks)
    count = f"{len(told.parts)} part{'s' if len(told.parts) != 1 else ''}"
    yield f"merged {count}: {told.records:,} records, lost {told.lost:,}"
    yield f"wrote {output}; see: pfntrace info {output}"


def _steps(readers: Sequence[TraceReader], progress: Progress | None) -> Callable[[int], None]:
    """Return what counts the rows of both readings."""
    total = 2 * sum(block.rows for reader in readers for block in reader.blocks())
    done = 0

    def step(rows: int) -> None:
        nonlocal done
        done += rows
        if progress is not None:
            progress(done, total)

    return step


def _writer(path: Path, meta: TraceMeta) -> TraceWriter:
    try:
        return TraceWriter(path, meta, overwrite=True)
    except ValueError as err:
        raise MergeError(f"the parts make {err}; merge fewer of them") from err


def _give_name(unfinished: Path, output: Path, *, overwrite: bool) -> None:
    try:
        if overwrite:
            if output.exists() and not output.is_file():
                raise OutputError(f"{output} is not an ordinary file; name another with -o")
        else:
            # Only who makes the file may replace it.
            os.close(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
        os.replace(unfinished, output)
    except FileExistsError:
        raise OutputError(
            f"{output} exists already; name another with -o, or add --force"
        ) from None
    except OSError as err:
        raise OutputError(f"{output} cannot be created: {err.strerror}") from err


def _meta(places: Sequence[Place], version: str, argv: Sequence[str]) -> TraceMeta:
    """Return the description of the result: the first part's where all agree."""
    parts = [where.part for where in places]
    first = min(places, key=lambda where: where.part.meta.start_unix_ns)
    metas = [part.meta for part in parts]
    settings = {
        name: value
        for name, value in first.part.meta.settings.items()
        if all(name in meta.settings and meta.settings[name] == value for meta in metas)
    }
    commands = {meta.command for meta in metas}
    kernels = list(dict.fromkeys(part.info["kernel"] for part in parts))
    facts = first.part.meta.facts
    if len(kernels) > 1:
        facts = json.dumps({**first.part.facts, "release": ", ".join(kernels)[:255]})
    return dataclasses.replace(
        first.part.meta,
        pfntrace_version=version,
        command=commands.pop() if len(commands) == 1 else ("pfntrace", *argv),
        start_monotonic_ns=first.part.meta.start_monotonic_ns + first.shift_ns,
        hostname=", ".join(dict.fromkeys(meta.hostname for meta in metas))[:255],
        facts=facts,
        settings={**settings, MERGED: mergeplan.provenance(places)},
    )


def _write(writer: TraceWriter, sources: Sequence[_Source], step: Callable[[int], None]) -> None:
    losses = _Losses()
    blocks = [block for source in sources for block in source.blocks()]

    def load(block: _PartBlock) -> pa.RecordBatch:
        step(block.block.rows)
        return block.source.load(block.block)

    try:
        for span in in_time_spans(blocks, load, _HELD_ROWS_MAX):
            _write_span(writer, span, losses)
        places = [source.where for source in sources]
        last = max(
            (p.part.blocks[-1].ts_max + p.shift_ns for p in places if p.part.blocks), default=0
        )
        writer.close(_summary(places), ts=last)
    except OverflowError as err:
        raise MergeError(f"{err} in these parts; no recorder of pfntrace wrote this") from err
    except ValueError as err:
        raise MergeError(f"a part holds {err}; use the pfntrace that recorded it") from err
    finally:
        writer.abandon()


def _write_span(
    writer: TraceWriter, span: Sequence[tuple[_PartBlock, pa.RecordBatch]], losses: "_Losses"
) -> None:
    """Write the rows of one span of time: first the notes, then a batch or more for each kind."""
    by_kind: dict[str, list[pa.RecordBatch]] = {}
    notes: list[tuple[int, dict[str, Any]]] = []
    for block, rows in span:
        kind = block.block.kind
        if kind == "NOTE":
            notes += _notes(block.source, rows)
            continue
        if kind == "LOSS":
            rows = losses.as_steps(block.source.where.recording, rows)
        by_kind.setdefault(kind, []).append(rows)
    for ts, note in sorted(notes, key=lambda pair: pair[0]):
        writer.write_note(note, ts)
    groups = [(kind, merged(by_kind[kind])) for kind in schema.FILE_KINDS if kind in by_kind]
    writer.write_batches([(k, losses.summed(b) if k == "LOSS" else b) for k, b in groups])


def _notes(source: _Source, rows: pa.RecordBatch) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the notes of a part with the result's numbers, its end mark left out."""
    where = source.where
    for ts, text in zip(values(rows, "ts").tolist(), rows.column("note").to_pylist(), strict=True):
        try:
            note = parse_json(text or "")
        except ValueError:
            continue
        # What is no object no reader takes for a note; what is too long no recorder writes.
        if not isinstance(note, dict) or "end" in note or len(text) > NOTE_BYTES_MAX // 8:
            continue
        vms = note.get("vms")
        for owner in (note.get("slot"), *(vms if isinstance(vms, list) else ())):
            if isinstance(owner, dict) and type(owner.get("vm")) is int and owner["vm"]:
                owner["vm"] += where.vm_base
        if type(note.get("stack")) is int:
            note["stack"] += where.stack_base
        yield ts, {**note, "part": source.number}


class _Losses:
    """Counters of all parts as one: they only grow, each recording's begin at 0.

    LOSS rows give sums since the start of a recording. To add those of several, each row becomes
    what it adds (`as_steps`), and then the sum over all up to there (`summed`).
    """

    def __init__(self) -> None:
        self._last: dict[tuple[int, int, int], list[int]] = {}
        self._sums: dict[tuple[int, int], list[int]] = {}

    def as_steps(self, recording: int, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Return LOSS rows of one recording as differences to its rows before."""
        new = [values(rows, name).tolist() for name in COUNTS]
        for at, (kind, cpu) in enumerate(_keys(rows)):
            last = self._last.setdefault((recording, kind, cpu), [0] * len(COUNTS))
            for which, column in enumerate(new):
                step = max(0, column[at] - last[which])
                last[which] = max(column[at], last[which])
                column[at] = step
        return _with_counts(rows, new)

    def summed(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        """Return differences in order of time as sums."""
        new = [values(rows, name).tolist() for name in COUNTS]
        for at, key in enumerate(_keys(rows)):
            sums = self._sums.setdefault(key, [0] * len(COUNTS))
            for which, column in enumerate(new):
                sums[which] = column[at] = min(sums[which] + column[at], _COUNT_MAX)
        return _with_counts(rows, new)


def _keys(rows: pa.RecordBatch) -> list[tuple[int, int]]:
    """Return (number of the kind's name, cpu) of LOSS rows; what is null counts as 0."""
    kinds = rows.column("loss_kind").indices
    at = np.frombuffer(kinds.buffers()[1], "i1")[kinds.offset : kinds.offset + len(kinds)]
    return list(zip(at.tolist(), values(rows, "cpu").tolist(), strict=True))


def _with_counts(rows: pa.RecordBatch, columns: Sequence[list[int]]) -> pa.RecordBatch:
    for name, column in zip(COUNTS, columns, strict=True):
        rows = _with(rows, name, np.array(column, "<u8"))
    return rows


def _last_files(places: Sequence[Place]) -> list[Part]:
    """Return the file of each recording that has its newest counters."""
    last: dict[int, Part] = {}
    for where in places:
        at = last.get(where.recording)
        if at is None or where.part.span[1] >= at.span[1]:
            last[where.recording] = where.part
    return list(last.values())


def _summary(places: Sequence[Place]) -> dict[str, Any]:
    """Return the end mark of the result: the losses of all recordings together."""
    parts = _last_files(places)
    sums = {name: min(_COUNT_MAX, sum(part.info[name] for part in parts)) for name in COUNTS}
    counts: dict[str, dict[str, int]] = {}
    for part in parts:
        for kind, numbers in part.counts.items():
            into = counts.setdefault(kind, dict.fromkeys(COUNTS, 0))
            for name, number in zip(COUNTS, numbers, strict=True):
                into[name] = min(_COUNT_MAX, into[name] + number)
    problems = [f"{p.path.name}: {p.info['reason']}" for p in _parts(places) if p.info["reason"]]
    return {
        "why": "merged",
        "parts": len(places),
        **sums,
        "counts": counts,
        "incomplete": _listed(problems),
    }


def _parts(places: Sequence[Place]) -> list[Part]:
    return [where.part for where in places]


def _listed(problems: Sequence[str]) -> str:
    more = f" and {len(problems) - 3} more parts" if len(problems) > 3 else ""
    return "; ".join(problem[:300] for problem in problems[:3]) + more


def _told(places: Sequence[Place]) -> Merged:
    told = mergeplan.provenance(places)
    parts = _parts(places)
    remarks = []
    kernels = list(dict.fromkeys(part.info["kernel"] for part in parts))
    if len(kernels) > 1:
        remarks.append(
            f"kernels {', '.join(kernels)[:200]}: alike in all that a reader takes from them"
        )
    if told["boots"] > 1:
        remarks.append(
            "parts of several boots or hosts: VMs and cpus are numbered apart, page frames are "
            "not comparable, clocks are laid over each other by the wall clock"
        )
    elif len({where.recording for where in places}) > 1:
        remarks.append(
            "several recordings of one boot: VMs are numbered apart, since what happened between "
            "the recordings is not known"
        )
    return Merged(
        tuple(told["parts"]),
        sum(part.info["records"] for part in parts),
        sum(part.info["lost"] for part in _last_files(places)),
        told["boots"],
        tuple(remarks),
    )
