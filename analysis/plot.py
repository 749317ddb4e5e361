"""`pfntrace plot`: figures of a trace as files, and the same figures for a page.

Composes: `analysis.reading` reads, the modules of `analysis.figures` choose what to show and draw
it. May import: matplotlib, `analysis`, `probes.errors`, `tracer.tracefile`.
"""

import errno
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from analysis.figures import latency, lifetimes, mapped, refcount, style, timeline
from analysis.lifecolumns import LifeColumns
from analysis.outfile import check_new, new_file
from analysis.pagehistory import page_history
from analysis.reading import Reading, read
from analysis.reportdata import report_of
from analysis.reportrows import Report
from probes.errors import OutputError, UsageError
from tracer.tracefile import TraceReader

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

    `gfns` limits the timeline, `pfn` is the page of refcount. Raises UsageError for what does not
    exist, OutputError for a file that does or cannot be written, TraceFormatError for a file that
    is no trace.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"no figure {kind!a:.40}; there are {' '.join(KINDS)}")
    if form not in FORMATS:
        raise UsageError(f"--format {form!a:.40}: say {' or '.join(FORMATS)}")
    if pfn is not None and not 0 <= pfn < 1 << 52:
        raise UsageError(f"--pfn {pfn:#x}: a host frame is below 2^52")
    wanted = list(dict.fromkeys(kinds or KINDS))
    files = {kind: directory / f"{kind}.{form}" for kind in wanted}
    for file in files.values():
        if directory.exists():
            check_new(file, overwrite=overwrite)
    reading = read(path, lives=True, check=False, progress=progress)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        why = "it is a file" if err.errno == errno.EEXIST else err.strerror
        raise OutputError(f"{directory} cannot be a folder: {why}; name another with -o") from err
    report = report_of(reading)
    with style.style():
        for kind, figure in figures(reading, report, wanted, gfns=gfns, pfn=pfn):
            with new_file(files[kind], overwrite=overwrite) as unfinished:
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
) -> Iterator[tuple[str, Figure]]:
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
) -> Figure:
    page, why = (pfn, "") if pfn is not None else chosen_page(report, lives)
    with TraceReader(reading.path) as reader:
        history = page_history(reader, page)
    return refcount.draw(refcount.refcount_data(history, lives, context, why), context)


def chosen_page(report: Report, lives: LifeColumns) -> tuple[int, str]:
    """Choose the page to show if nobody did, and say why.

    The first page of the worst finding; else a page that made faults fail; else see
    `refcount.interesting_page`.
    """
    for finding in report.findings:
        if finding.pfns:
            return finding.pfns[0][0], "chosen because the first finding of the check is of it"
    for row in report.failures:
        if row.failure.frame is not None:
            return row.failure.frame, "chosen because faults failed on it"
    return refcount.interesting_page(lives) or (0, "")


def context_of(reading: Reading, report: Report, width: float = style.WIDE) -> style.Context:
    """Return what every figure of a trace says."""
    start = min(max(reading.start, 0), _WORD - 1)
    reservations = [] if report.complete and not report.lost else [report.verdict]
    if report.filtered:
        reservations.append(f"Without {report.filtered:,} records that --vm or --gfn kept out.")
    return style.Context(
        start=start,
        end=min(start + int(reading.totals.info["duration_s"] * 1e9), _WORD - 1),
        source=f"Linux {report.kernel}: {report.command}",
        reservations=tuple(reservations),
        width=width,
    )
