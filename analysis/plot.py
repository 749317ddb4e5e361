"""`pfntrace plot`: figures of a trace as files, and the same figures for a page.

Composes: `analysis.reading` reads, the modules of `analysis.figures` choose what to show and draw
it. May import: numpy, matplotlib, `analysis`, `probes.errors`, `tracer.tracefile`.
"""

import dataclasses
import errno
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.figures import latency, lifetimes, mapped, refcount, style, timeline
from analysis.lifecolumns import LifeColumns
from analysis.outfile import check_new, new_file
from analysis.pagehistory import page_history
from analysis.reading import Reading, read
from analysis.recording import recording_name
from analysis.reportdata import report_of
from analysis.reportrows import Report
from probes.errors import OutputError, UsageError
from tracer.tracefile import TraceReader, recordings

__all__ = ("FORMATS", "KINDS", "chosen_page", "context_of", "figures", "plot_trace")

#: Kind -> what the figure shows.
KINDS: dict[str, str] = {
    "mapped": "live mappings and mapped memory through time, by level and class",
    "timeline": "which guest frames were mapped when, by class",
    "lifetimes": "how long mappings lived, by level and class",
    "refcount": "reference count of one page through time, with what happened to it",
    "latency": "how long faults took, by path and stage",
}
FORMATS = ("png", "svg")
#: Told how much is done: (so far, of all).
Progress = Callable[[int, int], None]

_WORD = 1 << 64
#: A merged trace of which less was recorded says so.
_MOSTLY = 0.9


def plot_trace(
    path: Path,
    directory: Path,
    kinds: Sequence[str] = (),
    *,
    gfns: tuple[int, int] | None = None,
    pfn: int | None = None,
    form: str = "png",
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[Path]:
    """Draw figures (all if `kinds` is empty) into KIND.png of a folder; return their paths.

    `gfns` limits the timeline, `pfn` is the page of refcount; without it the detectors are asked
    for one (see `chosen_page`). Raises UsageError for what does not exist or has no use,
    OutputError for a file that does or cannot be written, TraceFormatError for a file that is no
    trace.
    """
    wanted = list(dict.fromkeys(kinds or KINDS))
    for kind in wanted:
        if kind not in KINDS:
            raise UsageError(f"no figure {kind!a:.40}; there are {' '.join(KINDS)}")
    for flag, value, kind in (("--gfn", gfns, "timeline"), ("--pfn", pfn, "refcount")):
        if value is not None and kind not in wanted:
            raise UsageError(f"{flag} is for the figure {kind}; add --kind {kind}")
    if form not in FORMATS:
        raise UsageError(f"--format {form!a:.40}: say {' or '.join(FORMATS)}")
    if pfn is not None and not 0 <= pfn < 1 << 52:
        raise UsageError(f"--pfn {pfn:#x}: a host frame is below 2^52")
    files = {kind: directory / f"{kind}.{form}" for kind in wanted}
    for file in files.values():
        if directory.exists():
            check_new(file, path, overwrite=overwrite)
    asked = pfn is None and "refcount" in wanted
    reading = read(path, lives=True, check=asked, progress=progress)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        why = "it is a file" if err.errno == errno.EEXIST else err.strerror
        raise OutputError(f"{directory} cannot be a folder: {why}; name another with -o") from err
    report = report_of(reading)
    with style.style():
        for kind, figure in figures(reading, report, wanted, gfns=gfns, pfn=pfn):
            with new_file(files[kind], path, overwrite=overwrite) as unfinished:
                style.save(figure, unfinished, form)
    return list(files.values())


def figures(
    reading: Reading,
    report: Report,
    kinds: Sequence[str],
    *,
    gfns: tuple[int, int] | None = None,
    pfn: int | None = None,
    width: float = style.WIDE,
) -> Iterator[tuple[str, style.Figure]]:
    """Yield figures one by one, `width` inches wide.

    To be called, and what it yields to be used, inside of `style.style()`.
    """
    lives, context = reading.lives, context_of(reading, report, width)
    assert lives is not None, "figures want lives: read(path, lives=True)"
    for kind in kinds:
        if kind == "timeline":
            yield kind, timeline.draw(timeline.timeline_data(lives, context, gfns), context)
        elif kind == "mapped":
            yield kind, mapped.draw(mapped.mapped_data(lives, context), context)
        elif kind == "lifetimes":
            yield kind, lifetimes.draw(lifetimes.lifetimes_data(lives, context), context)
        elif kind == "latency":
            yield kind, latency.draw(latency.latency_data(report.stages), context)
        else:
            yield kind, _refcount(reading, report, lives, context, pfn)


def _refcount(
    reading: Reading, report: Report, lives: LifeColumns, context: style.Context, pfn: int | None
) -> style.Figure:
    with TraceReader(reading.path) as reader:
        parts = list(recordings(reader))
        chosen = (pfn, "", parts) if pfn is not None else chosen_page(report, lives, parts)
        if chosen is None:
            return refcount.draw_nothing(context)
        page, why, among = chosen
        # A frame is another page in another recording: what is shown is of one.
        histories = [page_history(part, page) for part in among]
        at = max(range(len(among)), key=lambda at: len(histories[at]))
        part, others = among[at], sum(1 for one in histories if len(one)) - 1
        name = recording_name(part) if len(parts) > 1 else ""
    mine = lives.where(_within(lives.vm, part))
    data = refcount.refcount_data(histories[at], mine, context, why)
    return refcount.draw(dataclasses.replace(data, recording=name, others=max(0, others)), context)


def chosen_page(
    report: Report, lives: LifeColumns, parts: Sequence[TraceReader]
) -> tuple[int, str, list[TraceReader]] | None:
    """Choose the page to show if nobody did, say why, and of which recordings of a trace.

    The first page of the worst finding; else a page that made faults fail; else see
    `refcount.interesting_page`, of the recording with most lives, those that nobody counts first.
    None if no page was mapped.
    """
    for finding in report.findings:
        if finding.pfns:
            among = [one for one in parts if recording_name(one) == finding.recording]
            why = "chosen because the first finding of the check is of it"
            return finding.pfns[0][0], why, among or list(parts)
    for row in report.failures:
        if row.failure.frame is not None:
            among = [one for one in parts if one.vms[0] <= row.failure.vm <= one.vms[1]]
            return row.failure.frame, "chosen because faults failed on it", among or list(parts)
    mine = [(lives.where(_within(lives.vm, part)), part) for part in parts]
    best, part = max(mine, key=lambda one: (refcount.uncounted(one[0]).sum(), len(one[0])))
    found = refcount.interesting_page(best)
    return (*found, [part]) if found else None


def _within(vm: npt.NDArray[np.uint32], part: TraceReader) -> npt.NDArray[np.bool_]:
    return np.asarray((vm >= part.vms[0]) & (vm <= part.vms[1]))


def _recorded_s(merged: dict[str, Any]) -> float:
    """Return for how long any part of a merged trace was recorded, s; 0 if it does not say."""
    parts = merged.get("parts")
    spans: list[tuple[int, int]] = []
    for part in parts if isinstance(parts, list) else ():
        begin, end = (
            part.get(n) if isinstance(part, dict) else None for n in ("start_ts", "end_ts")
        )
        if not (isinstance(begin, int) and isinstance(end, int) and 0 <= begin <= end < _WORD):
            return 0.0
        spans.append((begin, end))
    seen = until = 0
    for begin, end in sorted(spans):
        seen += max(0, end - max(begin, until))
        until = max(until, end)
    return seen / 1e9


def context_of(reading: Reading, report: Report, width: float = style.WIDE) -> style.Context:
    """Return what every figure of a trace says."""
    start = min(max(reading.start, 0), _WORD - 1)
    reservations = [] if report.complete and not report.lost else [report.verdict]
    info = reading.totals.info
    seen = _recorded_s(info["merged"])
    if 0 < seen < _MOSTLY * info["duration_s"]:
        reservations.append(
            f"Of {info['duration_s']:,.1f} s only {seen:,.1f} s were recorded: the rest lies "
            "between the parts of this merged trace."
        )
    if report.filtered:
        reservations.append(f"Without {report.filtered:,} records that --vm or --gfn kept out.")
    return style.Context(
        start=start,
        end=min(start + int(info["duration_s"] * 1e9), _WORD - 1),
        source=f"Linux {report.kernel}: {report.command}",
        reservations=tuple(reservations),
        width=width,
    )
