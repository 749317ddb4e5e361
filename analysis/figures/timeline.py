"""Figure: which guest frames are mapped when, coloured by the class of the page behind them.

May import: numpy, matplotlib, `analysis`.
"""

import dataclasses

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgba_array
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from analysis.figures import style
from analysis.figures.grid import COLUMNS_MAX, EMPTY, commonest_first, paint
from analysis.lifecolumns import LifeColumns
from analysis.pages import PAGE_CLASSES
from analysis.text import duration, plural, size

__all__ = ("Panel", "TimelineData", "draw", "timeline_data")

#: Panels of one figure, one for each part of guest memory without large gaps.
PANELS_MAX = 3
#: A gap of so many guest frames ends a part.
GAP_PAGES = 4096
#: Above this many lives a panel is a grid of cells, of so many rows at most.
BARS_MAX, ROWS_MAX = 1500, 256
#: Vertices of a bar.
_CORNERS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class Panel:
    """Guest frames `first` to `last` of one VM and address space.

    `lives` are those in it; `cells` is None, or for each row (of `row_pages` frames) and column
    the index of a class in PAGE_CLASSES, EMPTY where nothing was mapped at any time; `share` is
    how much of a cell was mapped, 0 to 1.
    """

    vm: int
    as_id: int
    first: int
    last: int
    lives: LifeColumns
    cells: npt.NDArray[np.uint8] | None
    share: npt.NDArray[np.float64] | None
    row_pages: int


@dataclasses.dataclass(frozen=True, slots=True)
class TimelineData:
    """The panels, in the order of VM and guest frame; times are ns.

    `left_out` is how many lives are in none of them, `chosen` whether guest frames were.
    """

    panels: tuple[Panel, ...]
    begin: int
    end: int
    left_out: int
    parts: int
    chosen: bool = False


def timeline_data(
    lives: LifeColumns, context: style.Context, gfns: tuple[int, int] | None = None
) -> TimelineData:
    """Choose what to show: `gfns` (both included), else the parts that have most to tell.

    Those are parts of guest memory without gaps of GAP_PAGES: first the ones that hold pages
    which nobody counts, then those with most lives.
    """
    if gfns is not None:
        first, last = (np.uint64(gfn) for gfn in gfns)
        reach = lives.gfn + lives.pages.astype(np.uint64)
        lives = lives.where((lives.gfn <= last) & (reach > first))
    start, stop = np.uint64(max(0, context.start)), np.uint64(max(0, context.end))
    birth, death = np.clip(lives.birth, start, stop), np.clip(lives.death, start, stop)
    begin = int(birth.min()) if len(lives) else context.start
    end = max(int(death.max()) if len(lives) else context.end, begin + 1)
    part = _parts(lives)
    count = int(part.max()) + 1 if len(part) else 0
    sizes = np.bincount(part, minlength=count)
    telling = np.bincount(part, _uncounted(lives), minlength=count) > 0
    chosen = np.lexsort((-sizes, ~telling))[:PANELS_MAX] if count else np.zeros(0, np.int64)
    panels = [_panel(lives.where(part == number), gfns, begin, end) for number in np.sort(chosen)]
    left_out = len(lives) - sum(len(panel.lives) for panel in panels)
    return TimelineData(tuple(panels), begin, end, left_out, count, gfns is not None)


def _uncounted(lives: LifeColumns) -> npt.NDArray[np.float64]:
    kinds = [PAGE_CLASSES.index(name) for name in ("uncounted", "no struct page")]
    return np.isin(lives.page_class, kinds).astype(np.float64)


def _parts(lives: LifeColumns) -> npt.NDArray[np.int64]:
    """Number the parts of guest memory, in the order of VM, address space and guest frame."""
    if not len(lives):
        return np.zeros(0, np.int64)
    order = np.lexsort((lives.gfn, lives.as_id, lives.vm))
    gfn, pages = lives.gfn[order], lives.pages[order].astype(np.uint64)
    vm, as_id = lives.vm[order], lives.as_id[order]
    other = (vm[1:] != vm[:-1]) | (as_id[1:] != as_id[:-1])
    gap = gfn[1:] - gfn[:-1] > pages[:-1] + np.uint64(GAP_PAGES)
    number = np.concatenate([[0], np.cumsum(other | gap)])
    part = np.empty(len(lives), np.int64)
    part[order] = number
    return part


def _panel(lives: LifeColumns, gfns: tuple[int, int] | None, begin: int, end: int) -> Panel:
    first = int(lives.gfn.min())
    last = int((lives.gfn + (lives.pages - 1).astype(np.uint64)).max())
    if gfns is not None:
        first, last = max(first, gfns[0]), min(last, gfns[1])
    rows = last - first + 1
    cells, share, row_pages = None, None, 1
    if len(lives) > BARS_MAX:
        row_pages = -(-rows // ROWS_MAX)
        cells, share = paint(lives, (first, last), row_pages, (begin, end))
    vm, as_id = int(lives.vm[0]), int(lives.as_id[0])
    return Panel(vm, as_id, first, last, lives, cells, share, row_pages)


def draw(data: TimelineData, context: style.Context) -> Figure:
    """Draw a panel for each part of guest memory, guest frames upwards, time to the right."""
    title = "Guest frames mapped, by class of the page"
    if not data.panels:
        where = " in these guest frames" if data.chosen else ""
        return style.empty_figure(title, f"nothing was mapped{where}", context)
    tall = [_height(panel) for panel in data.panels]
    height = 1.2 + sum(tall) + 0.3 * len(tall)
    figure = style.new_figure(title, height, context)
    every = figure.subplots(len(tall), 1, sharex=True, squeeze=False, height_ratios=tall)[:, 0]
    for axes, panel in zip(every, data.panels, strict=True):
        _draw_panel(axes, panel, data, context)
    left, right = context.seconds(data.begin), context.seconds(data.end)
    every[0].set_xlim(left - 0.015 * (right - left), right + 0.015 * (right - left))
    style.seconds_axis(every[-1])
    shown = {int(c) for panel in data.panels for c in np.unique(panel.lives.page_class)}
    _legend(every[0], sorted(shown))
    style.foot(figure, context, *_notes(data))
    return figure


def _height(panel: Panel) -> float:
    """Return inches: few guest frames need little."""
    return 0.3 + min(2.4, (panel.last - panel.first + 1) * 0.06)


def _legend(axes: Axes, classes: list[int]) -> None:
    names = [PAGE_CLASSES[page_class] for page_class in classes]
    patches = [Patch(color=style.CLASS_COLORS[name], label=name) for name in names]
    style.legend(axes, 5, patches)


def _draw_panel(axes: Axes, panel: Panel, data: TimelineData, context: style.Context) -> None:
    space = f", address space {panel.as_id}" if panel.as_id else ""
    pages = panel.last - panel.first + 1
    axes.set_title(
        f"VM {panel.vm or '?'}{space}, gfn {panel.first:#x} to {panel.last:#x} ({size(pages)}): "
        f"{plural(len(panel.lives), 'mapping')}"
    )
    style.hex_axis(axes, panel.first, panel.last, max(2, round(3.5 * _height(panel))))
    if _height(panel) > 1:
        axes.set_ylabel("guest frame")
    if panel.cells is None or panel.share is None:
        # Points of a row: where it is less than that of an edge, the edge keeps it in sight.
        row = 72 * _height(panel) / pages
        _draw_bars(axes, panel.lives, data, context, edge=min(max(1.5 - row, 0.5), 1.5))
        return
    colors = to_rgba_array([style.CLASS_COLORS[name] for name in PAGE_CLASSES])
    image = np.zeros((*panel.cells.shape, 4), np.uint8)
    painted = panel.cells != EMPTY
    image[painted] = np.rint(colors * 255).astype(np.uint8)[panel.cells[painted]]
    # What is mapped for a moment only must stay in sight.
    image[painted, 3] = np.rint(255 * (0.45 + 0.55 * panel.share[painted])).astype(np.uint8)
    top = panel.first + panel.cells.shape[0] * panel.row_pages
    axes.imshow(
        image, origin="lower", aspect="auto", interpolation="nearest", zorder=2,
        extent=(context.seconds(data.begin), context.seconds(data.end), panel.first, top),
    )  # fmt: skip


def _draw_bars(
    axes: Axes, lives: LifeColumns, data: TimelineData, context: style.Context, *, edge: float
) -> None:
    for page_class in commonest_first(lives.page_class):
        mine = lives.where(lives.page_class == page_class)
        left = (np.maximum(mine.birth, data.begin).astype(np.float64) - context.start) / 1e9
        right = (np.minimum(mine.death, data.end).astype(np.float64) - context.start) / 1e9
        low = mine.gfn.astype(np.float64) - 0.42
        high = low + mine.pages - 0.16
        corners = np.empty((len(mine), _CORNERS, 2))
        corners[:, :, 0] = np.stack([left, right, right, left], axis=1)
        corners[:, :, 1] = np.stack([low, low, high, high], axis=1)
        color = style.CLASS_COLORS[PAGE_CLASSES[page_class]]
        axes.add_collection(
            PolyCollection(list(corners), facecolor=color, edgecolor=color, linewidth=edge)
        )


def _notes(data: TimelineData) -> list[str]:
    notes = []
    grids = [panel for panel in data.panels if panel.cells is not None]
    if grids:
        wide = duration(round((data.end - data.begin) / COLUMNS_MAX))
        rows = sorted({panel.row_pages for panel in grids})
        notes.append(
            f"Grids: a cell is {' or '.join(f'{pages:,}' for pages in rows)} guest frames high and "
            f"{wide} wide; the paler, the less of it was mapped. It shows the class mapped most in "
            f"it, but a class with less than a tenth of the mappings before all others, so that "
            "no exception is hidden."
        )
    if data.left_out:
        notes.append(
            f"{data.left_out:,} mappings in {data.parts - len(data.panels):,} other parts of guest "
            "memory are not shown; --gfn chooses what is."
        )
    return notes
