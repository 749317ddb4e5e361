"""Figure: how long mappings live, on a logarithmic axis.

May import: numpy, matplotlib, `analysis`.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from analysis.figures import style
from analysis.histogram import Histogram
from analysis.lifecolumns import LifeColumns
from analysis.pages import PAGE_CLASSES
from analysis.text import duration

__all__ = ("Group", "LifetimesData", "draw", "lifetimes_data")

#: Bins of a factor of ten.
BINS = 10


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Lives of one level and class that were seen from birth to death, in each bin."""

    level: int
    page_class: str
    lives: npt.NDArray[np.int64]
    median_ns: int | None

    @property
    def label(self) -> str:
        """Return for example "4K counted"."""
        return style.kind_name(self.level, self.page_class)

    @property
    def count(self) -> int:
        """How many there are."""
        return int(self.lives.sum())


@dataclasses.dataclass(frozen=True, slots=True)
class LifetimesData:
    """Lives by length: bounds of the bins (ns), the largest group first.

    `open_ended` are lives of which only a part was seen, in the bin of that part.
    """

    edges: npt.NDArray[np.float64]
    groups: tuple[Group, ...]
    open_ended: npt.NDArray[np.int64]


def lifetimes_data(lives: LifeColumns, context: style.Context) -> LifetimesData:
    """Put every life into the bin of its length."""
    start, end = np.uint64(max(0, context.start)), np.uint64(max(0, context.end))
    birth = np.clip(lives.birth, start, end)
    death = np.clip(lives.death, birth, np.maximum(birth, end))
    # A length of 0 (a clock that stood still) has no logarithm.
    length = np.maximum((death - birth).astype(np.float64), 1)
    partial = lives.censored_start | lives.censored_end
    edges = _edges(length)
    key = lives.level.astype("i8") * len(PAGE_CLASSES) + lives.page_class
    groups = []
    for one in np.unique(key[~partial]):
        level, page_class = divmod(int(one), len(PAGE_CLASSES))
        mine = length[(key == one) & ~partial]
        counts = np.histogram(mine, edges)[0].astype(np.int64)
        # The same bins as the report's table, so that both name the same median.
        times = Histogram()
        times.add(mine.astype(np.uint64))
        groups.append(Group(level, PAGE_CLASSES[page_class], counts, times.percentile(0.5)))
    groups.sort(key=lambda group: (-group.count, group.label))
    shown, rest = groups[: style.KINDS_MAX], groups[style.KINDS_MAX :]
    if rest:
        # No kernel maps so many kinds, but a file may.
        counts = np.sum([group.lives for group in rest], axis=0)
        shown.append(Group(0, f"{len(rest):,} other kinds", counts, None))
    open_ended = np.histogram(length[partial], edges)[0].astype(np.int64)
    return LifetimesData(edges, tuple(shown), open_ended)


def _edges(length: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    low = int(np.floor(np.log10(length.min()) * BINS)) if len(length) else 3 * BINS
    high = int(np.floor(np.log10(length.max()) * BINS)) + 1 if len(length) else 9 * BINS
    low, high = min(low, high - BINS), high
    return np.asarray(10 ** (np.arange(low, high + 1) / BINS))


def _label(group: Group) -> str:
    median = "" if group.median_ns is None else f", median {duration(group.median_ns)}"
    return f"{group.label}: {group.count:,}{median}"


def _ticks(edges: npt.NDArray[np.float64]) -> list[float]:
    """Return 1, 10, 100, …, and 2 and 5 times that if there is room."""
    decades = np.arange(np.floor(np.log10(edges[0])), np.ceil(np.log10(edges[-1])) + 1)
    parts = (1, 2, 5) if len(decades) < 5 else (1,)
    ticks = [part * 10.0**decade for decade in decades for part in parts]
    return [tick for tick in ticks if edges[0] * 0.999 <= tick <= edges[-1] * 1.001]


def draw(data: LifetimesData, context: style.Context) -> Figure:
    """Draw bars, stacked by level and class; what was seen in part stands hatched on top."""
    partial = int(data.open_ended.sum())
    title = "How long mappings live"
    if not data.groups and not partial:
        return style.empty_figure(title, "nothing was mapped", context)
    figure = style.new_figure(title, 4.2, context)
    axes = figure.subplots()
    width = np.diff(data.edges)
    floor = np.zeros(len(width), np.int64)
    for group in data.groups:
        axes.bar(
            data.edges[:-1], group.lives, width, floor, align="edge",
            color=style.CLASS_COLORS.get(group.page_class, style.OTHER_COLOR), edgecolor="white",
            linewidth=0.4, hatch=style.LEVEL_HATCHES.get(group.level, ""), label=_label(group),
        )  # fmt: skip
        floor = floor + group.lives
    if partial:
        axes.bar(
            data.edges[:-1], data.open_ended, width, floor, align="edge", hatch="\\\\\\",
            facecolor="none", edgecolor=style.MUTED, linewidth=0.6,
            label=f"seen in part: {partial:,}, at least so long",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlim(data.edges[0], data.edges[-1])
    axes.xaxis.set_major_locator(FixedLocator(_ticks(data.edges)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ns, _: duration(round(ns), 1)))
    axes.set_xlabel("from install to zap, logarithmic")
    style.count_axis(axes, "mappings, ten bars a decade")
    axes.set_ylim(0, 1.06 * max(1, int((floor + data.open_ended).max())))
    style.legend(axes, 2)
    notes = []
    if partial:
        notes.append(
            "Seen in part: mapped before the recording, or still mapped at its end; what is shown "
            "is the part that was seen."
        )
    style.foot(figure, context, *notes)
    return figure
