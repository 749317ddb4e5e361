"""`pfntrace check`: one pass over a trace with every detector, in pieces of bounded length.

What a detector is and sees, `analysis.detector` says. Found first, proven later: a second pass
fetches the records of the chains that findings ask for.
May import: `analysis`, `probes.errors`, `tracer.schema`, `tracer.tracefile`.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from analysis import detectors
from analysis.chains import fetch
from analysis.columns import Records, code, codes, numbers
from analysis.detector import Chunk, Detector
from analysis.detectors.freed import settled
from analysis.detectors.installs import NO_FAULTS
from analysis.faultjoin import JOIN_COLUMNS, FaultJoiner
from analysis.findingpage import with_page
from analysis.findings import Finding, Unanswerable
from analysis.lifearrays import LIFE_COLUMNS, LifeArrays
from analysis.lives import SPTE_COLUMNS, LifeBuilder, LifeContext
from analysis.recording import Recording, open_recording, recording_name
from analysis.stream import PIECE_ROWS, Piece, pieces
from analysis.text import plural
from probes.errors import UsageError
from tracer.schema import RECORD_KINDS
from tracer.tracefile import TraceReader, opened, recordings

__all__ = ("CheckResult", "check_trace", "chosen")

#: Recordings that a reason names.
_NAMED_MAX = 3
#: Why a leaf is installed in a guest page fault, or when nobody knows.
_OF_FAULTS = ("fault", "prefetch", "other")
#: Told how much of the trace is done: (records so far, of all).
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class CheckResult:
    """The answer of `check_trace`: findings, worst first, and what could not be asked."""

    findings: tuple[Finding, ...]
    unanswerable: tuple[Unanswerable, ...]
    #: names of the detectors that were asked.
    detectors: tuple[str, ...]
    #: `TraceReader.info`, asked after everything was read.
    info: dict[str, Any]
    path: Path
    #: when the recording began (ns, CLOCK_MONOTONIC): times are told from here on.
    start_ns: int
    #: records that the trace holds twice; each was taken once.
    duplicates: int = 0

    @property
    def anomalies(self) -> int:
        """How many findings are definite or probable: `pfntrace check` exits with 4 for any."""
        return sum(finding.is_anomaly for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON, what `pfntrace check --json` prints."""
        return {
            "trace": str(self.path),
            "kernel": self.info["kernel"],
            "generation": self.info["generation"],
            "records": self.info["records"],
            "lost": self.info["lost"],
            "filtered": self.info["filtered"],
            "duplicates": self.duplicates,
            "complete": self.info["complete"],
            "reason": self.info["reason"],
            "missing": [hook["hook"] for hook in self.info["missing"] if hook["without"]],
            "anomalies": self.anomalies,
            "findings": [finding.to_json() for finding in self.findings],
            "unanswerable": [item.to_json() for item in self.unanswerable],
            "detectors": list(self.detectors),
        }


def chosen(names: Sequence[str] | None) -> tuple[type[Detector], ...]:
    """Return the detectors of some names, all if None; raises UsageError for an unknown name."""
    known = {detector.name: detector for detector in detectors.DETECTORS}
    for name in names or ():
        if name not in known:
            raise UsageError(f"no detector {name!a:.40}; there are {' '.join(known)}")
    return tuple(known[name] for name in dict.fromkeys(names or known))


def check_trace(
    trace: Path | TraceReader,
    names: Sequence[str] | None = None,
    progress: Progress | None = None,
    *,
    rows_max: int = PIECE_ROWS,
) -> CheckResult:
    """Ask detectors (all if `names` is None) about a trace, `rows_max` records at a time.

    `trace` is a file, or one that is open and stays so. Each recording of a merged trace is checked
    alone. Raises UsageError for an unknown name, TraceFormatError if the file is not a trace; one
    that is cut or damaged is checked as far as it is intact.
    """
    asked = chosen(names)
    with opened(trace) as reader:
        parts = list(recordings(reader))
        steps = _Steps(progress, len(parts))
        answers = [_check(part, asked, steps, rows_max) for part in parts]
        info, path, start_ns = reader.info(), reader.path, reader.meta.start_monotonic_ns
    unable = list(_unable(answers))
    if len(answers) > 1:
        answers = [answer.named() for answer in answers]
    findings = [finding for answer in answers for finding in answer.findings]
    return CheckResult(
        findings=tuple(sorted(findings, key=lambda finding: finding.rank)),
        unanswerable=tuple(unable),
        detectors=tuple(detector.name for detector in asked),
        info=info,
        path=path,
        start_ns=start_ns,
        duplicates=steps.duplicates,
    )


class _Steps:
    """Progress over all recordings of a trace, which may be of unequal length."""

    def __init__(self, progress: Progress | None, parts: int) -> None:
        self._progress = progress
        self._parts = parts
        self._before = 0
        self.duplicates = 0

    def tell(self, done: int, total: int) -> None:
        if self._progress:
            self._progress(self._before + done, self._before + total * self._parts)

    def next(self, total: int) -> None:
        self._before += total
        self._parts -= 1


@dataclasses.dataclass(frozen=True, slots=True)
class _Answer:
    """What was found in one recording."""

    name: str
    findings: tuple[Finding, ...]
    unanswerable: tuple[Unanswerable, ...]

    def named(self) -> "_Answer":
        """Return the same with the name of the recording in all findings."""
        found = (dataclasses.replace(one, recording=self.name) for one in self.findings)
        return _Answer(self.name, tuple(found), self.unanswerable)


def _unable(answers: Sequence[_Answer]) -> Iterator[Unanswerable]:
    """Yield who could not answer and why, each reason once; of which recordings, if not of all."""
    where: dict[Unanswerable, list[str]] = {}
    for answer in answers:
        for one in answer.unanswerable:
            where.setdefault(one, []).append(answer.name)
    for one, names in where.items():
        if len(names) == len(answers):
            yield one
            continue
        rest = len(names) - _NAMED_MAX
        told = ", ".join(names[:_NAMED_MAX]) + (f" and {rest:,} more" if rest > 0 else "")
        yield dataclasses.replace(one, reason=f"{told}: {one.reason}")


def _check(
    reader: TraceReader, asked: Sequence[type[Detector]], steps: _Steps, rows_max: int
) -> _Answer:
    recording = open_recording(reader)
    able: list[Detector] = []
    unable: list[Unanswerable] = []
    silence = _silence(recording)
    for kind in asked:
        detector = kind()
        reason = silence or detector.start(recording)
        if reason:
            unable.append(Unanswerable(detector.name, reason))
        else:
            able.append(detector)
    found = _run(reader, able, recording.sound_until, steps, rows_max)
    blind = _unseen_faults(reader, recording)
    if blind:
        told = {finding.detector for finding in found}
        silent = (one for one in able if one.name not in told and _needs_faults(one))
        unable = [one for one in unable if one.reason != NO_FAULTS] + [
            Unanswerable(name, blind)
            for name in (
                *(one.detector for one in unable if one.reason == NO_FAULTS),
                *(one.name for one in silent),
            )
        ]
    # What a detector was given may turn out not to tell.
    late = ((one.name, getattr(one, "unanswered", "")) for one in able)
    unable += [Unanswerable(name, reason) for name, reason in late if reason]
    answered = {one.name for one in able} - {one.detector for one in unable}
    # Of a range of guest frames the puts of pages of others are missing.
    lossless = not recording.lost(*RECORD_KINDS) and recording.gfns is None
    found = settled(found, answered, lossless)
    name = recording_name(reader)
    return _Answer(name, tuple(map(with_page, fetch(reader, found))), tuple(unable))


def _silence(recording: Recording) -> str:
    """Return why a recording without a record to judge says nothing; "" if it has some."""
    if not any(recording.info["kinds"].get(kind) for kind in RECORD_KINDS):
        return "the trace holds no record"
    if recording.sound_until == 0:
        return "the recorder was cut short within its first flush: kinds of records may be missing"
    return ""


def _unseen_faults(reader: TraceReader, recording: Recording) -> str:
    """Return why questions about faults have no answer though FAULT was recorded; "" if they do.

    A kernel that was changed may have the functions that are hooked and call others.
    """
    kinds = reader.info()["kinds"]
    missed = recording.lost("FAULT") + recording.filtered("FAULT")
    if kinds.get("FAULT") or missed or not kinds.get("SPTE"):
        return ""
    # Where the hook of the handler does not fire, installs have no better cause than "other".
    install, causes, installs = code("op", "install"), codes("cause", *_OF_FAULTS), 0
    for batch in reader.batches(["SPTE"], ["op", "cause"]):
        op, cause = (numbers(batch.column(name)) for name in ("op", "cause"))
        installs += int(((op == install) & np.isin(cause, causes)).sum())
    if not installs:
        return ""
    return (
        f"no fault was seen, though {plural(installs, 'leaf was', 'leaves were')} installed: the "
        "hooks of the fault handler never fired (pfntrace info names them); does this kernel call "
        "other functions?"
    )


def _needs_faults(detector: Detector) -> bool:
    return detector.joins_faults or "FAULT" in detector.columns


def _columns(able: Sequence[Detector]) -> dict[str, tuple[str, ...]]:
    """Join what the detectors need: kind -> columns."""
    wanted: dict[str, list[str]] = {}
    needs: list[Mapping[str, Sequence[str]]] = [detector.columns for detector in able]
    if any(detector.joins_faults for detector in able):
        needs.append(JOIN_COLUMNS)
    if any(detector.wants_lives for detector in able):
        needs.append({"SPTE": SPTE_COLUMNS})
    for need in needs:
        for kind, names in need.items():
            wanted.setdefault(kind, []).extend(names)
    return {kind: tuple(dict.fromkeys(names)) for kind, names in wanted.items()}


def _run(
    reader: TraceReader,
    able: Sequence[Detector],
    until: int | None,
    steps: _Steps,
    rows_max: int,
) -> list[Finding]:
    columns = _columns(able)
    joiner = FaultJoiner() if any(detector.joins_faults for detector in able) else None
    builder = None
    if any(detector.wants_lives for detector in able):
        builder = LifeBuilder(LifeContext.of(reader), LIFE_COLUMNS)
    kinds = reader.info()["kinds"]
    done, duplicates, total = 0, 0, sum(kinds.get(kind, 0) for kind in columns)
    empty = LifeArrays()
    for piece in pieces(reader, columns, rows_max, until) if columns else ():
        closed = empty
        if builder is not None:
            closed = LifeArrays(builder.feed_table(piece["SPTE"]))
        chunk = Chunk(piece, joiner.join(piece) if joiner else None, closed, builder)
        for detector in able:
            detector.feed(chunk)
        done += len(piece)
        duplicates = piece.duplicates
        steps.tell(done, total)
    steps.next(total)
    steps.duplicates += duplicates
    rest = LifeArrays(builder.finish_table()) if builder is not None else empty
    if builder is not None and len(builder.orphan_records):
        # Those that waited for an install up to the end.
        last = Piece(0, 0, {kind: Records(kind) for kind in columns})
        chunk = Chunk(last, joiner.join(last) if joiner else None, empty, builder)
        for detector in able:
            detector.feed(chunk)
    return [finding for detector in able for finding in detector.finish(rest)]
