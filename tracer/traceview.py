"""The recordings of a merged trace, each as if it were a trace of its own.

A trace of several recordings must not be judged as one: a page frame is another page on another
host, and what happened between two recordings nobody saw. So whoever concludes something from one
record about another goes through `recordings` and looks at each alone:

    with TraceReader(path) as reader:
        for part in recordings(reader): ...            # the reader itself, if nothing was merged

VM numbers and times stay those of the merged trace; cpu numbers are the host's own again. Counters
of losses begin at 0; of two recordings of one boot at one time each has the losses of both, since
nobody can tell them apart. May import: `tracer`, numpy, pyarrow.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tracer import schema
from tracer.timeorder import rows_at, values
from tracer.tracemeta import TraceMeta, parse_json
from tracer.tracereader import TraceReader
from tracer.tracescan import Block

__all__ = ("RecordingView", "recordings")

_COUNTS = ("produced", "lost", "filtered", "torn")
#: Columns that tell of which recording a row is.
_TELLING = ("ts", "cpu", "vm", "note", "loss_kind", *_COUNTS)
_NUMBERS = ("recording", "start_ts", "end_ts", "records", *_COUNTS)
#: More than merge makes.
_PARTS_MAX = 500


def recordings(reader: TraceReader) -> Iterator[TraceReader]:
    """Yield a reader for each recording in a trace; the reader itself if there is only one.

    They are valid as long as `reader` is open. What a stranger wrote instead of a description of
    parts is no description: then the trace is one recording.
    """
    found = _parts(reader.meta)
    if len(found) < 2:
        yield reader
        return
    for parts in found:
        yield RecordingView(reader, parts)


def _parts(meta: TraceMeta) -> list[list[dict[str, Any]]]:
    """Return the parts of each recording, [] if they are not described as merge does it."""
    told = meta.settings.get("merged")
    parts = told.get("parts") if isinstance(told, dict) else None
    by_recording: dict[int, list[dict[str, Any]]] = {}
    if not isinstance(parts, list) or len(parts) > _PARTS_MAX:
        return []
    for number, part in enumerate(parts):
        if not isinstance(part, dict) or not _sound(part):
            return []
        by_recording.setdefault(part["recording"], []).append({**part, "number": number})
    return list(by_recording.values())


def _sound(part: dict[str, Any]) -> bool:
    def whole(values: Any, end: int) -> bool:
        return isinstance(values, list) and all(type(n) is int and 0 <= n < end for n in values)

    vms, cpus, kinds = part.get("vms"), part.get("cpus"), part.get("kinds")
    return (
        whole([part.get(name) for name in _NUMBERS], 1 << 64)
        and whole(vms, 1 << 33)
        and whole(cpus, 1 << 16)
        and isinstance(kinds, dict)
        and whole(list(kinds.values()), 1 << 64)
        and all(isinstance(part.get(name), dict) for name in ("counts", "settings"))
        and len(part["cpus"]) == 2
        and len(part["vms"]) in (0, 2)
    )


class RecordingView(TraceReader):
    """One recording of a merged trace; everything that reads a trace reads this."""

    def __init__(self, whole: TraceReader, parts: Sequence[dict[str, Any]]) -> None:
        """Take one recording of an open trace, given by what the trace says of its parts."""
        # Not opened anew: it is the same file, found intact to the same place.
        self._file, self._schema_message = whole._file, whole._schema_message
        self._scanned, self._short = whole._scan, whole._kept
        self._problem, self._damaged, self._told = "", None, None
        self._parts = list(parts)
        first, last = parts[0], max(parts, key=lambda part: part["end_ts"])
        self._numbers = {part["number"] for part in parts}
        self._span = min(part["start_ts"] for part in parts), last["end_ts"]
        self._cpus = first["cpus"]
        ranges = [part["vms"] for part in parts if part["vms"]]
        self._vms = min((r[0] for r in ranges), default=1), max((r[1] for r in ranges), default=0)
        self._before: dict[tuple[str, int], list[int]] | None = None
        self.meta = dataclasses.replace(
            whole.meta,
            command=(str(first.get("command", "")),),
            hostname=str(first.get("hostname", "")),
            start_monotonic_ns=first["start_ts"],
            settings=first["settings"],
        )

    @property
    def vms(self) -> tuple[int, int]:
        """The first and the last number of its VMs in the merged trace; (1, 0) if it has none."""
        return self._vms

    def close(self) -> None:
        """Do nothing: the file is closed with the reader of the whole trace."""

    def info(self, *, verify: bool = False) -> dict[str, Any]:
        """Return the description of this recording, as `TraceReader.info` of its own file was."""
        info = super().info(verify=verify)
        last = max(self._parts, key=lambda part: part["end_ts"])
        reasons = [str(part.get("reason") or "") for part in self._parts]
        # What is wrong with the merged file is wrong with all that is in it.
        problem = self.reason or next(filter(None, reasons), "")
        kinds = dict.fromkeys(schema.RECORD_KINDS, 0)
        for part in self._parts:
            for kind in kinds:
                kinds[kind] += part["kinds"].get(kind, 0)
        summary = {"why": str(last.get("why", "")), "counts": last["counts"]}
        low, high = self._span
        return {
            **info,
            **{name: last[name] for name in _COUNTS},
            "records": sum(part["records"] for part in self._parts),
            "kinds": kinds,
            "complete": not problem,
            "reason": problem,
            "summary": summary if not problem else {},
            "hostname": self.meta.hostname,
            "command": list(self.meta.command),
            "start": str(self._parts[0].get("start", "")),
            "duration_s": max(0, high - low) / 1e9,
            "vms": [vm for vm in info["vms"] if self._vms[0] <= vm["vm"] <= self._vms[1]],
            "merged": {},
        }

    def batches(
        self, kinds: Sequence[str] | None = None, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """Yield what the batches of the file hold of this recording."""
        yield from (batch for batch in super().batches(kinds, columns) if len(batch))

    def _blocks(self, kinds: Sequence[str] | None) -> list[Block]:
        low, high = self._span
        blocks = super()._blocks(kinds)
        return [block for block in blocks if block.ts_min <= high and low <= block.ts_max]

    def _loader(self, columns: Sequence[str]) -> Callable[[Block], pa.RecordBatch | None]:
        load = super()._loader(tuple(dict.fromkeys((*columns, *_TELLING))))

        def read(block: Block) -> pa.RecordBatch | None:
            batch = load(block)
            if batch is None:
                return None
            mine = np.flatnonzero(self._mine(block.kind, batch))
            if len(mine) < len(batch):
                batch = rows_at(batch, mine)
            if block.kind == "LOSS":
                batch = self._own_losses(batch)
            elif block.kind != "NOTE" and self._cpus[0]:
                cpus = values(batch, "cpu") - np.uint16(self._cpus[0])
                batch = _with(batch, "cpu", cpus)
            return batch.select(list(columns))

        return read

    def _mine(self, kind: str, batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
        """Tell which rows are of this recording."""
        if kind == "NOTE":
            texts = batch.column("note").to_pylist()
            return np.array([_part_of(text) in self._numbers for text in texts], bool)
        ts, cpu, vm = (values(batch, name) for name in ("ts", "cpu", "vm"))
        low, high = self._span
        here = (cpu >= self._cpus[0]) & (cpu <= self._cpus[1])
        meanwhile = (ts >= np.uint64(low)) & (ts <= np.uint64(high))
        # Records of no known VM are of every recording that ran on that host then.
        ours = (vm >= self._vms[0]) & (vm <= self._vms[1]) | (vm == 0) & here
        return np.asarray(ours & meanwhile & (here | (kind != "LOSS")), bool)

    def _own_losses(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Subtract what the counters showed before this recording began."""
        if self._before is None:
            self._before = self._losses_before()
        keys = _loss_keys(batch)
        for at, name in enumerate(_COUNTS):
            before = [self._before.get(key, [0] * len(_COUNTS))[at] for key in keys]
            counts = values(batch, name).tolist()
            own = [max(0, now - then) for now, then in zip(counts, before, strict=True)]
            batch = _with(batch, name, np.array(own, "<u8"))
        return _with(batch, "cpu", values(batch, "cpu") - np.uint16(self._cpus[0]))

    def _losses_before(self) -> dict[tuple[str, int], list[int]]:
        found: dict[tuple[str, int], list[int]] = {}
        load = super()._loader(("ts", "cpu", "loss_kind", *_COUNTS))
        for block in super()._blocks(["LOSS"]):
            batch = load(block) if block.ts_min < self._span[0] else None
            if batch is None:
                continue
            rows = list(zip(*(values(batch, name).tolist() for name in _COUNTS), strict=True))
            times = values(batch, "ts").tolist()
            for key, ts, row in zip(_loss_keys(batch), times, rows, strict=True):
                if ts < self._span[0]:
                    found[key] = [max(a, b) for a, b in zip(found.get(key, row), row, strict=True)]
        return found


def _part_of(note: str | None) -> int:
    """Return the number of the part that a note is of, -1 if it says none."""
    try:
        part = parse_json(note or "")["part"]
    except (KeyError, TypeError, ValueError):
        return -1
    return part if type(part) is int else -1


def _loss_keys(batch: pa.RecordBatch) -> list[tuple[str, int]]:
    kinds = batch.column("loss_kind").to_pylist()
    return [
        (str(kind), cpu) for kind, cpu in zip(kinds, values(batch, "cpu").tolist(), strict=True)
    ]


def _with(batch: pa.RecordBatch, name: str, column: npt.NDArray[Any]) -> pa.RecordBatch:
    """Return a batch with another column of numbers, of which none is null."""
    at = batch.schema.get_field_index(name)
    arrays = batch.columns
    data = pa.py_buffer(np.ascontiguousarray(column))
    arrays[at] = pa.Array.from_buffers(arrays[at].type, len(batch), [None, data])
    return pa.RecordBatch.from_arrays(arrays, schema=batch.schema)
