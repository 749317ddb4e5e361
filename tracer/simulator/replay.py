"""`pfntrace replay`: hold a recording against the model of its kernel, record by record.

And say what the same accesses would have met under another one. May import: `probes`, standard
library, `tracer`.
"""

import dataclasses
import json
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from probes.errors import TraceFormatError, UsageError
from probes.facts import KernelFacts, series_version
from tracer.schema import RECORD_KINDS, columns_of_kind
from tracer.simulator.kernels import KERNELS, Kernel
from tracer.simulator.replayleaves import Sight
from tracer.simulator.replaymodel import Model
from tracer.simulator.replaystate import Pending
from tracer.simulator.whatif import Difference, WhatIf
from tracer.tracefile import TraceReader, recordings

__all__ = ("Conformance", "conform", "kernel_of", "replay_lines")

#: The recorder writes every half second, and a batch of each kind by itself.
_RAGGED_NS = 600_000_000
_NOT_ITS_RULES = (
    "the recording broke the rules of {0}, as said above: this is what {0} would have done"
)
_UNSEEN = (
    "Of {0:,} faults on compound pages, or on memory that is not known to be anonymous, nothing "
    "recorded tells whether they gave their page back: no record shows the put of this kernel, "
    "and others may hold such a page. pfntrace check looks at how the counts grow."
)
_NO_END = (
    "The recording has no end: its recorder was killed, or the file was cut. There some kinds of "
    "records are missing, and nothing can be said of the rest. Replay one that is complete."
)
_ADDRESS = 0x000F_FFFF_FFFF_F000
#: Told (records so far, of all).
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Conformance:
    """The answer: all records explained, or the first that was not and what was expected.

    `divergence` is the first wrong record, with its columns, and `explained` how many came before
    it in the order of time: it is record number `explained + 1`. Some are only known to be wrong by
    a later record (an install, by its fault's sequence): `known_at` is the number of that one.
    """

    trace: Path
    #: the kernel that was recorded, as it names itself; the model that it is held against
    recorded: str
    kernel: str
    #: does the recording say where it ends?
    complete: bool
    records: int
    explained: int
    #: faults of which nothing recorded tells whether they gave their page back
    unseen: int = 0
    #: records at the ragged end of an incomplete trace, where the replay stops
    unjudged: int = 0
    divergence: dict[str, Any] | None = None
    expected: str = ""
    known_at: int = 0
    what_if: Difference | None = None
    other: str = ""

    @property
    def conforms(self) -> bool:
        """Was every record explained, and is there one?"""
        return self.divergence is None and self.explained == self.records > 0

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON, what `pfntrace replay --json` prints."""
        found: dict[str, Any] = {
            "trace": str(self.trace),
            "recorded": self.recorded,
            "kernel": self.kernel,
            "records": self.records,
            "explained": self.explained,
            "unjudged": self.unjudged,
            "puts_unseen": self.unseen,
            "conforms": self.conforms,
            "first_divergence": None,
        }
        if self.divergence is not None:
            found["first_divergence"] = {
                "number": self.explained + 1,
                "record": self.divergence,
                "expected": self.expected,
                "known_at": self.known_at,
            }
        if self.what_if is not None:
            found["what_if"] = {"kernel": self.other, **self.what_if.to_json()}
        return found


def kernel_of(generation: str, facts: KernelFacts, *, puts_pages: bool = True) -> Kernel:
    """Return the model of a trace's kernel, from what was observed of it.

    Of the out-of-tree series BTF tells which version it is, unless a recording lacks the members in
    which versions 7 to 9 differ (made by an earlier pfntrace): then `puts_pages` decides, whether
    its faults show kvm_release_page_clean() as version 9 does.
    A version that was mailed with a wrong put is held against the same one with the right put.
    """
    if generation in ("G0a", "G0b", "G2"):
        return KERNELS[{"G0a": "6.1", "G0b": "6.12", "G2": "6.13"}[generation]]
    if generation != "G1":
        raise UsageError(
            f"the trace is of a kernel of generation {generation or 'unknown'}, which has no "
            f"model; say --as with one of {', '.join(KERNELS)}"
        )
    version = series_version(facts) or ("v9" if puts_pages else "v8")
    kernel = KERNELS[version]
    return dataclasses.replace(kernel, shadow_put="", bugs=()) if version == "v8" else kernel


def conform(
    path: Path, *, model: str = "", other: str = "", progress: Progress | None = None
) -> Conformance:
    """Replay a trace through the model of its kernel; `other` asks what another would have done.

    `model` names the kernel of `kernels.KERNELS` whose rules the recording is held against; ""
    takes the one that the trace's facts show. That is how one asks "does this kernel do what v9
    of the series says?". A kernel that was mailed with a bug ("v9-mailed", or "v8" without TDP)
    explains its own bug when it is named.

    The answer's `conforms` is true if every record is explained. It is false, without a
    `divergence`, of an incomplete trace, whose end cannot be judged. Otherwise `divergence` is the
    first wrong record (a dict of its columns: kind, gfn, pfn, ...), `explained + 1` its number in
    the order of time, and `expected` what the model expected in its place, in words.

    Raises UsageError if there is no model, TraceFormatError if the trace cannot be read or has
    lost records, without which nothing can be said.
    """
    for option, name in (("--as", other), ("--model", model)):
        if name and name not in KERNELS:
            raise UsageError(f"{option} {name}: no such kernel; there are {', '.join(KERNELS)}")
    with TraceReader(path) as reader:
        info = reader.info()
        _whole(reader, path, info)
        facts = KernelFacts.from_json(reader.meta.facts)
        kernel = KERNELS[model] if model else kernel_of(
            info["generation"], facts, puts_pages=_puts(reader, "page_clean"))  # fmt: skip
        rules = Model(kernel, _sight(reader, facts, kernel))
        what_if = WhatIf(kernel, KERNELS[other], rules.sight) if other else None
        return _run(reader, path, info["records"], kernel, rules, what_if, other, progress)


def _whole(reader: TraceReader, path: Path, info: dict[str, Any]) -> None:
    """Refuse what lacks records."""
    if len(list(recordings(reader))) > 1:
        raise TraceFormatError(
            f"{path} is merged of several recordings: replay its parts, each alone"
        )
    if info["lost"]:
        raise TraceFormatError(
            f"{path}: {info['lost']:,} records were lost, and a replay needs every record: record "
            "again, with a larger --buffer-size if the recorder asked for one"
        )
    if info["filtered"]:
        raise TraceFormatError(
            f"{path}: {info['filtered']:,} records were left out by filters or limits, and a "
            "replay needs every record: record again without them"
        )


def _sight(reader: TraceReader, facts: KernelFacts, kernel: Kernel) -> Sight:
    """Return what this recording can see: masks, hooks, and which host memory is anonymous."""
    values = facts.values
    marks = "kvm_set_page_" if kernel.generation == "G1" else "kvm_set_pfn_"
    symbols = [
        symbol for hook in reader.meta.profile.get("hooks", ()) for symbol in hook["symbols"]
    ]
    return Sight(
        accessed=values.get("shadow_accessed_mask", 0),
        dirty=values.get("shadow_dirty_mask", 0),
        host_writable=values.get("shadow_host_writable_mask", 0),
        address=_ADDRESS & ~values.get("shadow_me_mask", 0),
        marks=any(symbol.startswith(marks) for symbol in symbols),
        lru=1 << facts.enums["PG_lru"] if "PG_lru" in facts.enums else 0,
        anonymous=_anonymous(reader),
        cached=_cached(reader),
    )


def _cached(reader: TraceReader) -> dict[int, int]:
    """Return of how many pfn caches each page ever was."""
    seen = set()
    for batch in reader.records(["PIN"], ["op", "vm", "gfn", "pfn"]):
        rows = batch.to_pylist()
        seen |= {(row["vm"], row["gfn"], row["pfn"]) for row in rows if row["op"] == "refresh"}
    return Counter(pfn for _, _, pfn in seen)


def _anonymous(reader: TraceReader) -> tuple[tuple[int, int], ...]:
    """Return the private anonymous host memory behind memslots, from the recorder's notes."""
    found = set()
    for batch in reader.records(["NOTE"], ["note"]):
        for row in batch.to_pylist():
            try:
                note = json.loads(row["note"])
            except (RecursionError, TypeError, ValueError):
                continue
            vmas = note.get("vmas") if isinstance(note, dict) else None
            for vma in vmas if isinstance(vmas, list) else ():
                if not isinstance(vma, dict):
                    continue
                start, end = vma.get("start"), vma.get("end")
                private = vma.get("path") == "" and str(vma.get("perms", ""))[3:4] == "p"
                if private and type(start) is int and type(end) is int:
                    found.add((start, end))
    return tuple(sorted(found))


def _run(
    reader: TraceReader, path: Path, records: int, kernel: Kernel, model: Model,
    what_if: WhatIf | None, other: str, progress: Progress | None,
) -> Conformance:  # fmt: skip
    seen, first, known_at = 0, None, 0
    last = _last_judged(reader)
    for row in _rows(reader):
        if row["ts"] > last:
            break
        seen += 1
        expected = model.expects(row)
        wrong = model.blamed
        if wrong is None and expected:
            wrong = Pending(seen, row, expected, row["tid"])
        # What comes later can show that a record before the first divergence was wrong already.
        if wrong is not None and (first is None or wrong.number < first.number):
            first, known_at = wrong, seen
        if what_if is not None:
            what_if.take(row)
        if progress is not None and not seen & 0xFFFF:
            progress(seen, records)
    if seen == records:
        model.leftovers()
        wrong = model.blamed
        if wrong is not None and (first is None or wrong.number < first.number):
            first, known_at = wrong, seen
    return Conformance(
        trace=path,
        recorded=str(reader.info()["kernel"]),
        kernel=kernel.name,
        complete=bool(reader.info()["complete"]),
        records=records,
        explained=seen if first is None else first.number - 1,
        unjudged=records - seen if first is None else 0,
        divergence=None if first is None else _shown(first.row),
        expected="" if first is None else first.expected,
        known_at=known_at,
        unseen=model.unseen,
        other=other,
        what_if=what_if.difference() if what_if is not None else None,
    )


def _puts(reader: TraceReader, call: str) -> bool:
    """Does any record of a fault show this put?"""
    return any(
        row["call"] == call and row["fault_ts"] is not None
        for batch in reader.records(["RELEASE"], ["call", "fault_ts"])
        for row in batch.to_pylist()
    )


def _last_judged(reader: TraceReader) -> int:
    """Return until when (ns) all records are there: a killed recorder leaves a ragged end.

    Of its last batch some kinds are written and others are not: what is later than the last record
    of any of the kinds that every fault makes is not judged.
    """
    info = reader.info()
    end = reader.meta.start_monotonic_ns + int(info["duration_s"] * 1e9)
    if info["complete"]:
        return end + 1
    last = {}
    for batch in reader.records(["FAULT", "SPTE", "RELEASE"], ["ts", "kind"]):
        for row in batch.to_pylist():
            last[row["kind"]] = row["ts"]
    return min(end - _RAGGED_NS, *last.values()) if last else end - _RAGGED_NS


def _rows(reader: TraceReader) -> Iterator[dict[str, Any]]:
    for batch in reader.records(list(RECORD_KINDS)):
        yield from batch.to_pylist()


def _shown(row: Any) -> dict[str, Any]:
    return {name: row[name] for name in columns_of_kind(row["kind"]) if row[name] is not None}


def replay_lines(answer: Conformance, width: int = 80) -> Iterator[str]:
    """Yield the answer for a terminal of so many columns."""
    model = KERNELS[answer.kernel]
    if answer.complete and not answer.records:
        yield "nothing to replay: the recording is complete and holds no record"
    elif answer.conforms:
        yield f"conforms: {answer.explained:,} of {answer.records:,} records explained"
        if answer.unseen:
            yield from _wrapped("  ", _UNSEEN.format(answer.unseen), width)
    elif answer.divergence is None:
        number, records = answer.explained, answer.records
        yield f"stops early: {number:,} of {records:,} records explained, none wrong"
        yield from _wrapped("  ", _NO_END, width)
    else:
        number = answer.explained + 1
        yield (
            f"diverges at record {number:,} of {answer.records:,}: {answer.explained:,} explained"
        )
        if answer.known_at > number:
            yield f"  (known from record {answer.known_at:,} on)"
        yield from _wrapped("  recorded  ", _told(answer.divergence or {}), width)
        yield from _wrapped("  expected  ", answer.expected, width)
    yield from _wrapped("model     ", f"{answer.kernel}: {model.title}", width)
    if answer.what_if is not None:
        there = f"{answer.other}: {KERNELS[answer.other].title}"
        yield from _wrapped("what if   ", there, width)
        yield from (f"  {line}" for line in answer.what_if.lines(answer.kernel, answer.other))
        if answer.divergence is not None:
            yield from _wrapped("  ", _NOT_ITS_RULES.format(answer.kernel), width)


def _wrapped(label: str, text: str, width: int) -> list[str]:
    return textwrap.wrap(
        text, max(40, width), initial_indent=label, subsequent_indent=" " * len(label),
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _told(record: dict[str, Any]) -> str:
    """Return a record in words: what it is, then its columns, addresses in hexadecimal."""
    words = [str(record.get(name, "")) for name in ("kind", "op", "call")]
    words += [
        f"{name}={value:#x}" if name in _IN_HEX else f"{name}={json.dumps(value)}"
        for name, value in record.items()
        if name not in ("kind", "op", "call")
    ]
    return " ".join(word for word in words if word)


_IN_HEX = frozenset(
    ("gfn", "pfn", "hva", "hva_end", "addr", "walk_pfn", "old", "new", "sptep", "error_code",
     "vm_flags", "page_flags", "page_flags_end")
)  # fmt: skip
