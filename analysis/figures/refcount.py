"""Figure: the reference count of one host page through time, with what happened to it.

May import: numpy, matplotlib, `analysis`.
"""

import dataclasses
import itertools
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator

from analysis.figures import style
from analysis.lifecolumns import LifeColumns
from analysis.pagehistory import HAPPENINGS, PageHistory
from analysis.pages import PAGE_CLASSES

__all__ = (
    "RefcountData",
    "draw",
    "draw_nothing",
    "interesting_page",
    "refcount_data",
    "uncounted",
)

#: With more records than this there is no second panel, that gives each one its place.
STEPS_MAX = 60
#: With more records than this the line is drawn as the least and the greatest of each moment.
LINE_MAX, MOMENTS = 20_000, 1200
#: Times when the page was mapped that are shaded, and guest frames that are named.
SHADES_MAX, GFNS_MAX = 400, 4
#: Happening -> marker, colour.
_MARKS = {
    "allocated": ("P", "#009e73"),
    "fault-in": ("o", "#0072b2"),
    "install": ("^", "#009e73"),
    "change": ("d", "#6a6b6c"),
    "fault end": ("o", "#56b4e9"),
    "release": ("s", "#e69f00"),
    "mark": (".", "#e69f00"),
    "pin": ("*", "#cc79a7"),
    "zap": ("v", "#d55e00"),
    "freed": ("X", "#882255"),
}
_NAMES = {
    "fault-in": "fault-in returns",
    "fault end": "fault ends",
    "install": "installed",
    "change": "changed",
    "zap": "zapped",
    "release": "release, count before it",
    "mark": "marked accessed or dirty",
}


@dataclasses.dataclass(frozen=True, slots=True)
class RefcountData:
    """What is known of one page: `mappings` of it, at `gfns` (the first few of `frames`).

    `spans` are when it was mapped at all, ns. `recording` is which one of a merged trace this is,
    and `others` how many more have records of a page of that number.
    """

    history: PageHistory
    spans: tuple[tuple[int, int], ...]
    gfns: tuple[int, ...]
    frames: int
    mappings: int
    why: str
    recording: str = ""
    others: int = 0


def uncounted(lives: LifeColumns) -> npt.NDArray[np.bool_]:
    """Tell which lives map pages that nobody counts."""
    classes = [PAGE_CLASSES.index(name) for name in ("uncounted", "no struct page")]
    return np.isin(lives.page_class, classes)


def interesting_page(lives: LifeColumns) -> tuple[int, str] | None:
    """Choose the page to show if nobody did, and say why; None if nothing was mapped.

    First a page that nobody counts, if any was mapped; of those, the one that was mapped most
    often; of those, the lowest.
    """
    if not len(lives):
        return None
    nobodys = uncounted(lives)
    chosen = lives.pfn[nobodys] if nobodys.any() else lives.pfn
    pages, counts = np.unique(chosen, return_counts=True)
    at = int(np.argmax(counts))
    often = "once" if counts[at] == 1 else f"{int(counts[at]):,} times"
    what = "nobody counts it" if nobodys.any() else "no page was mapped more often"
    return int(pages[at]), f"chosen because {what} (mapped {often})"


def refcount_data(
    history: PageHistory, lives: LifeColumns, context: style.Context, why: str = ""
) -> RefcountData:
    """Put the history of a page and its mappings together."""
    reach = lives.pfn + lives.pages.astype(np.uint64)
    mine = lives.where((lives.pfn <= np.uint64(history.pfn)) & (reach > np.uint64(history.pfn)))
    gfns = np.unique(mine.gfn + (np.uint64(history.pfn) - mine.pfn))
    shown = tuple(int(gfn) for gfn in gfns[:GFNS_MAX])
    return RefcountData(history, tuple(_spans(mine, context)), shown, len(gfns), len(mine), why)


def _spans(lives: LifeColumns, context: style.Context) -> Iterator[tuple[int, int]]:
    """Yield the times when any of some lives was."""
    start, end = np.uint64(max(0, context.start)), np.uint64(max(0, context.end))
    order = np.argsort(lives.birth, kind="stable")
    birth = np.clip(lives.birth[order], start, end)
    death = np.maximum.accumulate(np.clip(lives.death[order], start, end))
    firsts = np.flatnonzero(birth[1:] > death[:-1]) + 1
    bounds = [0, *firsts.tolist(), len(birth)] if len(birth) else []
    for at, after in itertools.pairwise(bounds):
        yield int(birth[at]), int(death[after - 1])


def draw_nothing(context: style.Context) -> Figure:
    """Draw that there is no page to show."""
    return style.empty_figure("Reference count of a page", "nothing was mapped", context)


def draw(data: RefcountData, context: style.Context) -> Figure:
    """Draw the count through time; below, if they are few, one record after the other."""
    history = data.history
    if not len(history):
        title = f"Reference count of pfn {history.pfn:#x}"
        return style.empty_figure(title, "no record tells of this page", context)
    steps = len(history) <= STEPS_MAX
    title = f"Reference count of pfn {history.pfn:#x}"
    figure = style.new_figure(title, 6.4 if steps else 4.2, context)
    axes = figure.subplots(2 if steps else 1, 1, squeeze=False)[:, 0]
    seconds = (history.ts.astype(np.float64) - context.start) / 1e9
    _draw_through_time(axes[0], data, seconds, context)
    if steps:
        _draw_steps(axes[1], data, seconds)
    style.foot(figure, context, *_notes(data))
    return figure


def _draw_through_time(
    axes: Axes, data: RefcountData, x: npt.NDArray[np.float64], context: style.Context
) -> None:
    history = data.history
    for at, (begin, end) in enumerate(data.spans[:SHADES_MAX]):
        axes.axvspan(
            context.seconds(begin), context.seconds(end), color="#56b4e9", alpha=0.2, linewidth=0,
            label="" if at else "mapped into a guest",
        )  # fmt: skip
    _draw_line(axes, history, x)
    _draw_marks(axes, history, x)
    axes.set_title(_where(data))
    style.seconds_axis(axes)
    _count_axis(axes, history)
    margin = 0.03 * (x[-1] - x[0]) or 1e-6
    axes.set_xlim(x[0] - margin, x[-1] + margin)
    style.legend(axes, 4)


def _where(data: RefcountData) -> str:
    if not data.mappings:
        return "never mapped into a guest"
    shown = ", ".join(f"{gfn:#x}" for gfn in data.gfns)
    more = f" and {data.frames - len(data.gfns):,} more" if data.frames > len(data.gfns) else ""
    often = "once" if data.mappings == 1 else f"{data.mappings:,} times"
    return f"mapped {often}, at gfn {shown}{more}"


def _draw_line(axes: Axes, history: PageHistory, x: npt.NDArray[np.float64]) -> None:
    """Draw the count from sample to sample, not across a time when the page was free."""
    known = np.flatnonzero(history.count >= 0)
    if not len(known):
        return
    if len(known) > LINE_MAX:
        left, low, high = _envelope(x[known], history.count[known])
        axes.fill_between(left, low, high, step="post", color=style.MUTED, alpha=0.6, linewidth=0)
        return
    freed = HAPPENINGS.index("freed")
    bounds = np.flatnonzero(history.what[known] == freed) + 1
    for piece in np.split(known, bounds):
        axes.step(x[piece], history.count[piece], where="post", color=style.MUTED, linewidth=1)


def _envelope(
    x: npt.NDArray[np.float64], count: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return where each moment begins that has samples, and their least and greatest."""
    moment = ((x - x[0]) / max(x[-1] - x[0], 1e-9) * (MOMENTS - 1)).astype(np.int64)
    starts = np.flatnonzero(np.diff(moment, prepend=-1))
    low = np.minimum.reduceat(count, starts)
    return x[starts], low, np.maximum.reduceat(count, starts)


def _draw_marks(axes: Axes, history: PageHistory, x: npt.NDArray[np.float64]) -> None:
    for number, name in enumerate(HAPPENINGS):
        mine = (history.what == number) & (history.count >= 0)
        if mine.any():
            marker, color = _MARKS[name]
            axes.plot(
                x[mine], history.count[mine], marker, color=color, markersize=5.5,
                markerfacecolor="none" if name in ("fault end", "release") else color,
                label=_NAMES.get(name, name), rasterized=int(mine.sum()) > 2000,
            )  # fmt: skip


def _count_axis(axes: Axes, history: PageHistory) -> None:
    axes.set_ylabel("_refcount")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    known = history.count[history.count >= 0]
    top = int(known.max()) if len(known) else 1
    low = int(known.min()) if len(known) else 0
    # A zero page has millions: there the axis begins where the counts do.
    room = max(0.5, 0.12 * (top - low))
    axes.set_ylim((low if low > 8 * max(1, top - low) else 0) - room, top + room)


def _draw_steps(axes: Axes, data: RefcountData, seconds: npt.NDArray[np.float64]) -> None:
    history = data.history
    x = np.arange(len(history), dtype=np.float64)
    _draw_line(axes, history, x)
    _draw_marks(axes, history, x)
    axes.set_title("the same, one record after the other")
    axes.set_xlim(-0.7, len(history) - 0.3)
    axes.grid(axis="x", visible=False)
    _count_axis(axes, history)
    labels = [
        f"{second:.6f} {HAPPENINGS[what]}"
        for second, what in zip(seconds, history.what, strict=True)
    ]
    axes.xaxis.set_major_locator(FixedLocator(list(x)))
    axes.set_xticklabels(labels, rotation=90, fontsize=6.5 if len(labels) > 30 else 7.5)


def _notes(data: RefcountData) -> list[str]:
    history = data.history
    notes = [
        "The count is read at each record and not in between; others than KVM take references too."
    ]
    if data.why:
        notes.insert(0, f"This page was {data.why}; --pfn chooses another.")
    if data.recording:
        rest = ""
        if data.others:
            have = "recording has" if data.others == 1 else "recordings have"
            rest = (
                f"; {data.others:,} other {have} records of that frame too, which on another host "
                "or after another boot is another page"
            )
        notes.insert(0, f"This is the {data.recording}{rest}.")
    if bool(history.other.any()):
        notes.append(
            f"{int(history.other.sum()):,} records are of other pages of the same compound page, "
            "which has one count."
        )
    if int((history.count >= 0).sum()) > LINE_MAX:
        notes.append(
            f"The band is the least and the greatest count in each of {MOMENTS:,} moments."
        )
    if len(data.spans) > SHADES_MAX:
        notes.append(f"The first {SHADES_MAX:,} times when it was mapped are shaded.")
    return notes
