"""Figure: how many SPTEs are live, and how much memory they map, through time.

May import: numpy, matplotlib, `analysis`.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure

from analysis.figures import style
from analysis.lifecolumns import LifeColumns
from analysis.pages import PAGE_CLASSES
from analysis.text import duration, size

__all__ = ("MappedData", "Series", "draw", "mapped_data")

#: Moments at which curves are drawn at most: what happens between two of them is in the peak.
MOMENTS_MAX = 800


Words = npt.NDArray[np.uint64]


@dataclasses.dataclass(frozen=True, slots=True)
class Series:
    """Live leaves of one level and class, and the 4K pages that they map, at each moment."""

    level: int
    page_class: str
    lives: npt.NDArray[np.int64]
    pages: npt.NDArray[np.int64]

    @property
    def label(self) -> str:
        """Return for example "2M counted, compound"."""
        return style.kind_name(self.level, self.page_class)


@dataclasses.dataclass(frozen=True, slots=True)
class MappedData:
    """What is mapped at some moments (ns), the greatest series first.

    `sampled` is whether there were more changes than moments; the peaks are exact all the same.
    """

    moments: npt.NDArray[np.uint64]
    series: tuple[Series, ...]
    peak_lives: int
    peak_pages: int
    sampled: bool
    censored: int


def mapped_data(lives: LifeColumns, context: style.Context) -> MappedData:
    """Count what is live at each change, or at evenly spaced moments if there are too many."""
    start, end = np.uint64(max(0, context.start)), np.uint64(max(0, context.end))
    birth = np.clip(lives.birth, start, end)
    death = np.clip(lives.death, start, end)
    dies = ~lives.censored_end
    moments, sampled = _moments(birth, death, context)
    series = []
    group = lives.level.astype("i8") * len(PAGE_CLASSES) + lives.page_class
    for key in np.unique(group):
        mine = group == key
        level, page_class = divmod(int(key), len(PAGE_CLASSES))
        counts = [
            _at(moments, birth[mine], weight[mine])
            - _at(moments, death[mine & dies], weight[mine & dies])
            for weight in (np.ones(len(lives), "u4"), lives.pages)
        ]
        series.append(Series(level, PAGE_CLASSES[page_class], *counts))
    series.sort(key=lambda one: (-int(one.pages.max()), one.label))
    peak_lives, peak_pages = _peaks(birth, death[dies], lives.pages, lives.pages[dies])
    return MappedData(
        moments=moments,
        series=(*series[: style.KINDS_MAX], *_rest(series[style.KINDS_MAX :])),
        peak_lives=peak_lives,
        peak_pages=peak_pages,
        sampled=sampled,
        censored=int(lives.censored_start.sum()),
    )


def _rest(series: list[Series]) -> list[Series]:
    """Add up what there is no colour for; no kernel maps so many kinds, but a file may."""
    if not series:
        return []
    lives, pages = sum(one.lives for one in series), sum(one.pages for one in series)
    return [Series(0, f"{len(series):,} other kinds", np.asarray(lives), np.asarray(pages))]


def _moments(birth: Words, death: Words, context: style.Context) -> tuple[Words, bool]:
    """Return when to look, and whether that is less often than something changes."""
    first = int(birth.min()) if len(birth) else context.start
    last = int(death.max()) if len(birth) else first
    if len(birth) + len(death) < 50 * MOMENTS_MAX:
        every = np.unique(np.concatenate([birth, death, np.array([first, last], np.uint64)]))
        if len(every) <= MOMENTS_MAX:
            return every, False
    return np.linspace(first, last, MOMENTS_MAX).astype(np.uint64), True


def _at(moments: Words, ts: Words, weight: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
    """Return the sum of the weights of all times up to and with each moment."""
    at = np.searchsorted(moments, ts)
    sums = np.bincount(at, weight, minlength=len(moments) + 1)[: len(moments)]
    return np.asarray(np.rint(np.cumsum(sums)), np.int64)


def _peaks(
    birth: Words, death: Words, pages: npt.NDArray[np.uint32], died: npt.NDArray[np.uint32]
) -> tuple[int, int]:
    """Return the most lives and the most pages at any moment: that is always one of a birth."""
    if not len(birth):
        return 0, 0
    order, ends = np.argsort(birth), np.argsort(death)
    birth, death = birth[order], death[ends]
    # Of several births at one moment only the last one's sum is a state.
    last = np.append(birth[1:] != birth[:-1], True)
    gone = np.searchsorted(death, birth[last], side="right")
    born = np.flatnonzero(last) + 1
    mapped = np.cumsum(pages[order], dtype=np.int64)[last]
    unmapped = np.concatenate([[0], np.cumsum(died[ends], dtype=np.int64)])[gone]
    return int((born - gone).max()), int((mapped - unmapped).max())


def _unit(pages: int) -> tuple[str, float]:
    """Return the unit for so many 4K pages, and what one page is in it."""
    for unit, scale in (("GiB", 1 << 18), ("MiB", 1 << 8)):
        if pages >= scale:
            return unit, 1 / scale
    return "KiB", 4.0


def draw(data: MappedData, context: style.Context) -> Figure:
    """Draw live leaves above, mapped memory below, stacked by level and class."""
    title = "What is mapped, through time"
    if not data.series:
        return style.empty_figure(title, "nothing was mapped", context)
    figure = style.new_figure(title, 5.6, context)
    unit, pages_scale = _unit(data.peak_pages)
    above, below = figure.subplots(2, 1, sharex=True)
    x = [context.seconds(int(ts)) for ts in data.moments]
    for axes, name in ((above, "lives"), (below, "pages")):
        scale = pages_scale if name == "pages" else 1.0
        floor = np.zeros(len(x))
        for one in data.series:
            top = floor + getattr(one, name) * scale
            axes.fill_between(
                x, floor, top, step="post", label=one.label, linewidth=0,
                facecolor=style.CLASS_COLORS.get(one.page_class, style.OTHER_COLOR),
                hatch=style.LEVEL_HATCHES.get(one.level, ""), edgecolor=style.MUTED,
            )  # fmt: skip
            floor = top
        axes.step(x, floor, where="post", color=style.INK, linewidth=0.8)
    above.set_title(f"Live leaf SPTEs (at most {data.peak_lives:,} at once)")
    below.set_title(f"Memory that they map (at most {size(data.peak_pages)} at once)")
    style.count_axis(above, "SPTEs")
    below.set_ylabel(unit)
    below.set_ylim(bottom=0)
    style.seconds_axis(below)
    style.legend(above, 4)
    notes = []
    if data.sampled:
        apart = duration(int(data.moments[1]) - int(data.moments[0]))
        notes.append(
            f"The curves show {len(data.moments):,} moments, {apart} apart; the greatest values "
            "above are of all moments."
        )
    if data.censored:
        notes.append(
            f"{data.censored:,} were mapped before their first record and are shown from the "
            "beginning of the recording."
        )
    style.foot(figure, context, *notes)
    return figure
