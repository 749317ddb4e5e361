"""`pfntrace diff`: two traces beside each other, say of a kernel before and after a patch.

`compare` collects plain facts, `diff_lines` words them, `diff_json` gives them to programs. Every
row has the figure of A and that of B; nothing is judged but medians, and those by
`analysis.noise`, which also says what it cannot know. May import: `analysis`, `tracer.describe`,
`tracer.tracefile`.
"""

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from analysis.check import CheckResult, check_trace
from analysis.diffside import Side, read_side
from analysis.histogram import Histogram, Percentiles
from analysis.lifetotals import LifeTotals
from analysis.lives import iter_lives
from analysis.noise import Shift, median_shift
from analysis.pages import PAGE_CLASSES
from analysis.paths import PATHS, STAGES
from tracer.describe import verdict_line
from tracer.tracefile import TraceReader

__all__ = ("CountRow", "Diff", "FindingRow", "TimeRow", "compare", "diff_json", "unlike")

Progress = Callable[[int, int], None]
#: Readings of both traces: figures, lives, anomalies.
_STAGES = 6
_Key = TypeVar("_Key")


@dataclasses.dataclass(frozen=True, slots=True)
class CountRow:
    """One figure of both traces; `of` is what it is a part of, 0 if it is no part."""

    name: str
    a: int
    b: int
    a_of: int = 0
    b_of: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class TimeRow:
    """Durations of both, ns; `shift` is B's median by A's, None where none was asked for."""

    group: str
    name: str
    a: Percentiles
    b: Percentiles
    shift: Shift | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class FindingRow:
    """What one detector found, one row for each verdict: occurrences, and pages where it counts.

    A count of None: the detector cannot answer for that trace; `why` then says the reason.
    """

    detector: str
    verdict: str
    a: int | None
    b: int | None
    a_pages: int = 0
    b_pages: int = 0
    why: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Diff:
    """All that two traces are compared in. `sides` are A and B."""

    sides: tuple[Side, Side]
    #: How they were recorded differently: (what, in A, in B).
    unlike: tuple[tuple[str, str, str], ...]
    totals: tuple[CountRow, ...]
    results: tuple[CountRow, ...]
    paths: tuple[CountRow, ...]
    classes: tuple[CountRow, ...]
    installs: tuple[CountRow, ...]
    lives: tuple[CountRow, ...]
    ends: tuple[CountRow, ...]
    lifetimes: tuple[TimeRow, ...]
    findings: tuple[FindingRow, ...]
    latency: tuple[TimeRow, ...]
    #: Whole faults by level, VM and memslot (`group`).
    places: tuple[TimeRow, ...]


def compare(a: Path, b: Path, progress: Progress | None = None) -> Diff:
    """Read both traces and compare them; `progress` is called with (done, to do) of all readings.

    Raises TraceFormatError if one is no trace; one that is cut is compared as far as it goes.
    """
    step = [_stage(progress, number) for number in range(_STAGES)]
    sides = read_side(a, step[0]), read_side(b, step[1])
    lives = _lives(a, step[2]), _lives(b, step[3])
    checks = check_trace(a, progress=step[4]), check_trace(b, progress=step[5])
    results = _pair(side.results for side in sides)
    return Diff(
        sides=sides,
        unlike=tuple(unlike(*sides)),
        totals=tuple(_totals(*sides)),
        results=tuple(_rows(results, sorted(_all(results), key=_rank(results)))),
        paths=tuple(_rows(_pair(side.paths for side in sides), PATHS)),
        classes=tuple(_rows(_pair(side.classes for side in sides), PAGE_CLASSES)),
        installs=tuple(_installs(*sides)),
        lives=tuple(_life_rows(*lives)),
        ends=tuple(_ends(*lives)),
        lifetimes=tuple(_lifetimes(*lives)),
        findings=tuple(_findings(*checks)),
        latency=tuple(_latency(*sides)),
        places=tuple(_places(*sides)),
    )


def _stage(progress: Progress | None, number: int) -> Progress | None:
    """Return the progress of one reading as a part of that of all, which count for the same."""
    if progress is None:
        return None
    return lambda done, total: progress(
        number * max(1, total) + min(done, total), _STAGES * max(1, total)
    )


def _pair(counters: Iterable[Counter[_Key]]) -> tuple[Counter[_Key], Counter[_Key]]:
    a, b = counters
    return a, b


def _all(pair: tuple[Counter[_Key], Counter[_Key]]) -> set[_Key]:
    return {key for counter in pair for key, count in counter.items() if count}


def _rank(pair: tuple[Counter[str], Counter[str]]) -> Callable[[str], tuple[int, str]]:
    return lambda name: (-pair[0][name] - pair[1][name], name)


def _rows(pair: tuple[Counter[str], Counter[str]], order: Iterable[str]) -> Iterator[CountRow]:
    a, b = pair
    for name in order:
        if a[name] or b[name]:
            yield CountRow(name, a[name], b[name], a.total(), b.total())


# --- how they were recorded -----------------------------------------------------------------------


def unlike(a: Side, b: Side) -> Iterator[tuple[str, str, str]]:
    """Yield in what the recordings differ that has a meaning for the comparison."""
    for name, key in (("kernel", "kernel"), ("generation", "generation"), ("host", "hostname")):
        values = str(a.info[key]), str(b.info[key])
        if values[0] != values[1]:
            yield name, *values
    for name in sorted({*a.params, *b.params}):
        values = a.params.get(name, "-"), b.params.get(name, "-")
        if values[0] != values[1]:
            yield f"parameter {name}", *values
    hooks = [{h["hook"]: h["how"] for h in side.info["hooks"]} for side in (a, b)]
    for hook in sorted({*hooks[0], *hooks[1]}):
        how = [side.get(hook, "not attached") for side in hooks]
        if how[0] != how[1]:
            yield f"hook {hook}", how[0], how[1]
    for name in ("gfns", "stacks", "pids"):
        found = [json.dumps(side.settings.get(name))[:40] for side in (a, b)]
        if found[0] != found[1]:
            yield f"--{_FLAGS[name]}", found[0], found[1]
    commands = [" ".join(map(str, side.info["command"]))[:200] for side in (a, b)]
    if commands[0] != commands[1]:
        yield "command", commands[0], commands[1]


_FLAGS = {"gfns": "gfn", "stacks": "stacks", "pids": "vm"}


# --- counts ---------------------------------------------------------------------------------------


def _totals(a: Side, b: Side) -> Iterator[CountRow]:
    yield CountRow("faults", a.faults, b.faults)
    yield CountRow("guest pages that faulted", a.pages, b.pages)
    for op in ("install", "change", "zap"):
        yield CountRow(f"SPTE {op}s", a.ops[op], b.ops[op])
    for name in ("lost", "filtered"):
        yield CountRow(f"records {name}", a.info[name], b.info[name])


def _installs(a: Side, b: Side) -> Iterator[CountRow]:
    order = [(name, level) for level in sorted({lv for _, lv in (*a.installs, *b.installs)})
             for name in PAGE_CLASSES]  # fmt: skip
    of = a.installs.total(), b.installs.total()
    for key in order:
        if a.installs[key] or b.installs[key]:
            yield CountRow(f"{_level(key[1])} {key[0]}", a.installs[key], b.installs[key], *of)


def _level(level: int) -> str:
    return {1: "4K", 2: "2M", 3: "1G"}.get(level, f"level {level}")


# --- lifetimes ------------------------------------------------------------------------------------


def _lives(path: Path, progress: Progress | None) -> LifeTotals:
    totals = LifeTotals()
    with TraceReader(path) as reader:
        sptes = reader.info()["kinds"]["SPTE"]
        for lives in iter_lives(reader, progress and (lambda done: progress(done, sptes))):
            totals.feed(lives)
    return totals


def _life_rows(a: LifeTotals, b: LifeTotals) -> Iterator[CountRow]:
    sums = [[sum(getattr(g, f) for g in t.groups.values()) for f in _LIVES] for t in (a, b)]
    for at, name in enumerate(_LIVES.values()):
        if at == 0 or sums[0][at] or sums[1][at]:
            yield CountRow(name, sums[0][at], sums[1][at])


#: Field of `LifeGroup` -> what it is called.
_LIVES = {
    "lives": "mappings",
    "before": "mapped before the trace",
    "after": "still mapped at its end",
    "lost": "touched by a loss",
}


def _ends(a: LifeTotals, b: LifeTotals) -> Iterator[CountRow]:
    pair: list[Counter[str]] = [Counter(), Counter()]
    for counter, totals in zip(pair, (a, b), strict=True):
        for (ended_by, cause), count in totals.ends.items():
            counter[f"{ended_by} ({cause})" if cause else ended_by] += count
    both = pair[0], pair[1]
    yield from _rows(both, sorted(_all(both), key=_rank(both)))


def _lifetimes(a: LifeTotals, b: LifeTotals) -> Iterator[TimeRow]:
    for level, kind in sorted({*a.groups, *b.groups}):
        times = [t.groups[level, kind].times if (level, kind) in t.groups else Histogram()
                 for t in (a, b)]  # fmt: skip
        if times[0].n or times[1].n:
            found = times[0].percentiles(), times[1].percentiles()
            yield TimeRow(_level(level), kind, *found)


# --- anomalies ------------------------------------------------------------------------------------


def _findings(a: CheckResult, b: CheckResult) -> Iterator[FindingRow]:
    """Yield a row for each detector and verdict that one has, and for what is not answered."""
    sums: list[Counter[tuple[str, str]]] = [Counter(), Counter()]
    pages: list[Counter[tuple[str, str]]] = [Counter(), Counter()]
    for at, check in enumerate((a, b)):
        for finding in check.findings:
            sums[at][finding.detector, finding.verdict] += finding.count
            pages[at][finding.detector, finding.verdict] += finding.pages
    silent = [{item.detector: item.reason for item in check.unanswerable} for check in (a, b)]
    order = {name: at for at, name in enumerate((*a.detectors, *b.detectors))}
    verdicts = {f.verdict: f.rank[0] for f in (*a.findings, *b.findings)}
    keys = sorted({*sums[0], *sums[1]}, key=lambda k: (verdicts[k[1]], order.get(k[0], 0), k))
    for key in keys:
        name = key[0]
        ours, theirs = (None if name in silent[at] else sums[at][key] for at in (0, 1))
        why = silent[0].get(name) or silent[1].get(name) or ""
        yield FindingRow(*key, ours, theirs, pages[0][key], pages[1][key], why)
    found = {key[0] for key in keys}
    for name in sorted({*silent[0], *silent[1]} - found, key=lambda n: order.get(n, 0)):
        ours, theirs = (None if name in silent[at] else 0 for at in (0, 1))
        why = silent[0].get(name) or silent[1].get(name) or ""
        yield FindingRow(name, "", ours, theirs, why=why)


# --- latency --------------------------------------------------------------------------------------


def _latency(a: Side, b: Side) -> Iterator[TimeRow]:
    nothing = Histogram()
    recordings = a.cut == b.cut == "recordings"
    for path in PATHS:
        for stage in STAGES:
            ours, theirs = a.times.get((path, stage)), b.times.get((path, stage))
            if ours is None and theirs is None:
                continue
            shift = None
            if ours is not None and theirs is not None:
                shift = median_shift(ours.counts, theirs.counts, recordings=recordings)
            found = [s.whole if s is not None else nothing for s in (ours, theirs)]
            yield TimeRow(path, stage, found[0].percentiles(), found[1].percentiles(), shift)


def _places(a: Side, b: Side) -> Iterator[TimeRow]:
    ours, theirs = a.latency.times, b.latency.times
    for where in sorted({*ours, *theirs}):
        times = [side.get(where, Histogram()).percentiles() for side in (ours, theirs)]
        yield TimeRow(where.by, where.name, times[0], times[1])


# --- for programs ---------------------------------------------------------------------------------


def diff_json(diff: Diff) -> dict[str, Any]:
    """Return a comparison as plain JSON: for each row `a` and `b`; durations are ns.

    `latency` rows have `ratio` (B's median by A's), its interval `low`, `high` and `p`, which are
    null where there were too few faults, or recordings; `verdict` is empty then. `anomalies` have
    null where a detector cannot answer.
    """
    rows = {
        name: [dataclasses.asdict(row) for row in getattr(diff, name)]
        for name in ("totals", "results", "paths", "classes", "installs", "lives", "ends")
    }
    return {
        "traces": [_side_json(side) for side in diff.sides],
        "unlike": [{"what": what, "a": a, "b": b} for what, a, b in diff.unlike],
        **rows,
        "lifetimes": [_time_json(row) for row in diff.lifetimes],
        "anomalies": [dataclasses.asdict(row) for row in diff.findings],
        "latency": [_time_json(row) for row in diff.latency],
        "places": [_time_json(row) for row in diff.places],
    }


def _side_json(side: Side) -> dict[str, Any]:
    info = side.info
    said = ("records", "produced", "lost", "filtered", "complete", "reason", "kernel")
    return {
        "trace": str(side.path),
        "verdict": verdict_line(info),
        **{name: info[name] for name in (*said, "generation", "hostname", "start", "duration_s")},
        "command": info["command"],
        "faults": side.faults,
        "pages": side.pages,
        "stretches": {"of": side.cut, "n": side.stretches},
    }


def _time_json(row: TimeRow) -> dict[str, Any]:
    data: dict[str, Any] = {
        "group": row.group,
        "name": row.name,
        "a": dataclasses.asdict(row.a),
        "b": dataclasses.asdict(row.b),
    }
    if row.shift is not None:
        data |= {**dataclasses.asdict(row.shift), "verdict": row.shift.verdict}
    return data
