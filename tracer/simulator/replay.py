"""`pfntrace replay`: hold a recording against the model of its kernel, record by record.

And say what the same accesses would have met under another one. May import: `probes`, standard
library, `tracer`.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from probes.errors import TraceFormatError, UsageError
from probes.facts import KernelFacts
from tracer.schema import RECORD_KINDS, columns_of_kind
from tracer.simulator.kernels import KERNELS, Kernel
from tracer.simulator.replaymodel import Model
from tracer.simulator.whatif import Difference, WhatIf
from tracer.tracefile import TraceReader, recordings

__all__ = ("Conformance", "conform", "kernel_of", "replay_lines")

#: The recorder writes every half second, and a batch of each kind by itself.
_RAGGED_NS = 600_000_000
_ADDRESS = 0x000F_FFFF_FFFF_F000
#: Told (records so far, of all).
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Conformance:
    """The answer: all records explained, or the first that was not and what was expected."""

    trace: Path
    kernel: str
    records: int
    explained: int
    #: records at the ragged end of an incomplete trace
    unjudged: int = 0
    divergence: dict[str, Any] | None = None
    expected: str = ""
    what_if: Difference | None = None
    other: str = ""

    @property
    def conforms(self) -> bool:
        """Was every record explained?"""
        return self.divergence is None and self.explained + self.unjudged == self.records

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON, what `pfntrace replay --json` prints."""
        found: dict[str, Any] = {
            "trace": str(self.trace),
            "kernel": self.kernel,
            "records": self.records,
            "explained": self.explained,
            "unjudged": self.unjudged,
            "conforms": self.conforms,
            "first_divergence": None,
        }
        if self.divergence is not None:
            found["first_divergence"] = {"record": self.divergence, "expected": self.expected}
        if self.what_if is not None:
            found["what_if"] = {"kernel": self.other, **self.what_if.to_json()}
        return found


def kernel_of(generation: str, facts: KernelFacts) -> Kernel:
    """Return the model of a trace's kernel, from what was observed of it."""
    if generation in ("G0a", "G0b", "G2"):
        return KERNELS[{"G0a": "6.1", "G0b": "6.12", "G2": "6.13"}[generation]]
    if generation != "G1":
        raise UsageError(
            f"the trace is of a kernel of generation {generation or 'unknown'}, which has no "
            f"model; say --as with one of {', '.join(KERNELS)}"
        )
    if "shadow_refcounted_mask" in facts.values:
        return KERNELS["v11"]
    if facts.has_field("kvm_page_fault", "accessed_page"):
        return KERNELS["v10"]
    if facts.has_field("kvm_follow_pfn", "allow_write_mapping"):
        return KERNELS["v7"]
    if facts.has_field("kvm_follow_pfn", "allow_non_refcounted_struct_page"):
        return KERNELS["v9"]
    return KERNELS["v8"]


def conform(path: Path, *, other: str = "", progress: Progress | None = None) -> Conformance:
    """Replay a trace through the model of its kernel; `other` asks what another would have done.

    Raises UsageError if there is no model, TraceFormatError if the trace cannot be read or has
    lost records, without which nothing can be said.
    """
    if other and other not in KERNELS:
        raise UsageError(f"--as {other}: no such kernel; there are {', '.join(KERNELS)}")
    with TraceReader(path) as reader:
        info = reader.info()
        if len(list(recordings(reader))) > 1:
            raise TraceFormatError(
                f"{path} is merged of several recordings: replay its parts, each alone"
            )
        if info["lost"] or info["filtered"]:
            raise TraceFormatError(
                f"{path}: {info['lost'] + info['filtered']:,} records were lost or left out; a "
                "replay needs every record: record again with a larger --buffer-size"
            )
        facts = KernelFacts.from_json(reader.meta.facts)
        kernel = kernel_of(info["generation"], facts)
        if kernel.name == "v9" and not _puts(reader, kernel.put_call):
            kernel = KERNELS["v9-mailed"]  # facts cannot tell them apart
        values = facts.values
        model = Model(
            kernel,
            values.get("shadow_accessed_mask", 0),
            values.get("shadow_dirty_mask", 0),
            _ADDRESS & ~values.get("shadow_me_mask", 0),
        )
        what_if = WhatIf(kernel, KERNELS[other]) if other else None
        return _run(reader, path, info["records"], kernel, model, what_if, other, progress)


def _run(
    reader: TraceReader, path: Path, records: int, kernel: Kernel, model: Model,
    what_if: WhatIf | None, other: str, progress: Progress | None,
) -> Conformance:  # fmt: skip
    explained, divergence, expected = 0, None, ""
    last = _last_judged(reader)
    for row in _rows(reader):
        if row["ts"] > last:
            break
        if divergence is None:
            expected = model.expects(row)
            if expected:
                divergence = _shown(row)
                if what_if is None:
                    break
            else:
                explained += 1
        if what_if is not None:
            what_if.take(row)
        if progress is not None and not explained & 0xFFFF:
            progress(explained, records)
    unjudged = 0 if divergence is not None else records - explained
    left = model.leftovers() if divergence is None and not unjudged else None
    if left is not None:
        divergence, expected, explained = _shown(left[0]), left[1], explained - 1
    return Conformance(
        trace=path, kernel=kernel.name, records=records, explained=explained, unjudged=unjudged,
        divergence=divergence, expected=expected, other=other,
        what_if=what_if.difference() if what_if is not None else None,
    )  # fmt: skip


def _puts(reader: TraceReader, call: str) -> bool:
    """Does any record show this put?"""
    return any(
        row["call"] == call
        for batch in reader.records(["RELEASE"], ["call"])
        for row in batch.to_pylist()
    )


def _last_judged(reader: TraceReader) -> int:
    """Return until when (ns) all records are there: a killed recorder leaves a ragged end."""
    info = reader.info()
    end = reader.meta.start_monotonic_ns + int(info["duration_s"] * 1e9)
    return end + 1 if info["complete"] else end - _RAGGED_NS


def _rows(reader: TraceReader) -> Iterator[dict[str, Any]]:
    for batch in reader.records(list(RECORD_KINDS)):
        yield from batch.to_pylist()


def _shown(row: Any) -> dict[str, Any]:
    return {name: row[name] for name in columns_of_kind(row["kind"]) if row[name] is not None}


def replay_lines(answer: Conformance) -> Iterator[str]:
    """Yield the answer for a terminal."""
    model = KERNELS[answer.kernel]
    if answer.conforms:
        yield f"conforms: {answer.explained:,} of {answer.records:,} records explained"
        if answer.unjudged:
            yield f"  {answer.unjudged:,} at the end are not judged: the recorder was killed"
    else:
        yield (
            f"diverges at record {answer.explained + 1:,} of {answer.records:,}: "
            f"{answer.explained:,} explained"
        )
        yield f"  recorded  {json.dumps(answer.divergence)}"
        yield f"  expected  {answer.expected}"
    yield f"model     {answer.kernel}: {model.title}"
    if answer.what_if is not None:
        yield f"what if   {answer.other}: {KERNELS[answer.other].title}"
        yield from (f"  {line}" for line in answer.what_if.lines())
