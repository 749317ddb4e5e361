"""How every figure looks: colours that colour-blind people can tell apart, sizes, head and foot.

Figures are made with matplotlib's objects, never with pyplot: no state is shared, and drawing
needs no display. May import: matplotlib, `analysis.pages`, `tracer.describe`.
"""

import contextlib
import dataclasses
import io
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, FixedLocator, FuncFormatter, MaxNLocator
from matplotlib.transforms import ScaledTranslation

from analysis.pages import PAGE_CLASSES
from tracer.describe import printable

__all__ = (
    "CLASS_COLORS",
    "INK",
    "KINDS_MAX",
    "LEVEL_HATCHES",
    "LEVEL_NAMES",
    "OTHER_COLOR",
    "MUTED",
    "WIDE",
    "Context",
    "Figure",
    "as_svg",
    "count_axis",
    "empty_figure",
    "foot",
    "hex_axis",
    "kind_name",
    "legend",
    "new_figure",
    "save",
    "seconds_axis",
    "style",
)

#: What is written and what is drawn beside the data; a page replaces them by colours of its own.
INK, MUTED, GRID = "#1a1b1c", "#6a6b6c", "#dadbdc"
#: Okabe and Ito's colours, then three of Paul Tol's: warm ones for what nobody counts.
CLASS_COLORS = dict(
    zip(
        PAGE_CLASSES,
        (
            *("#bbbbbb", "#cc79a7", "#009e73", "#e69f00", "#f0e442", "#56b4e9", "#0072b2"),
            *("#882255", "#999933", "#d55e00"),
        ),
        strict=True,
    )
)
#: Kinds (level and class) that one figure tells apart; the rest has one colour.
KINDS_MAX = 8
OTHER_COLOR = "#999999"
LEVEL_NAMES = {1: "4K", 2: "2M", 3: "1G"}
#: Larger leaves of a class have its colour and a pattern.
LEVEL_HATCHES = {1: "", 2: "///", 3: "xxx"}

_DPI = 150
#: Characters of a line of the foot, and of the line below the title, in an inch.
_FOOT_COLUMNS, _SOURCE_COLUMNS = 17.5, 16.0
#: Inches that a figure needs to be as its module made it; a narrower one has a narrower legend.
WIDE = 8.0
_RC: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": MUTED,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 9.5,
    "figure.dpi": _DPI,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.7,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "path.simplify": False,
    # Words of a trace are words, dollars included.
    "text.parse_math": False,
    "text.color": INK,
    "xtick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.color": MUTED,
    "ytick.labelcolor": INK,
    "svg.fonttype": "none",
    "svg.hashsalt": "pfntrace",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Context:
    """What every figure of a trace says beside its data.

    `start` and `end` are those of the recording, ns; `reservations` what is lost or cut; `source`
    what was recorded, and where; `width` is that of a figure in inches.
    """

    start: int
    end: int
    source: str = ""
    reservations: tuple[str, ...] = ()
    width: float = WIDE

    def seconds(self, ts: int) -> float:
        """Return a time as seconds since the recording began."""
        return (ts - self.start) / 1e9


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Draw and save inside of this."""
    with mpl.rc_context(_RC):
        yield


def kind_name(level: int, page_class: str) -> str:
    """Return for example "2M counted, compound"; a level of 0 is none."""
    size = f"{LEVEL_NAMES.get(level, f'level {level}')} " if level else ""
    return f"{size}{page_class}"


def new_figure(title: str, height: float, context: Context) -> Figure:
    """Return an empty figure of `height` inches with its title and where the data come from."""
    figure = Figure(figsize=(context.width, height), layout="constrained")
    figure.text(0.012, 1 - 0.10 / height, title, va="top", weight="bold", size=11.5)
    room = int(_SOURCE_COLUMNS * context.width)
    source = textwrap.shorten(_plain(context.source), room, placeholder=" ...")
    figure.text(0.012, 1 - 0.34 / height, source, va="top", size=8, color=MUTED)
    return figure


def empty_figure(title: str, why: str, context: Context) -> Figure:
    """Return a figure that says that there is nothing to draw: no axes that would mean nothing."""
    figure = new_figure(title, 2.2, context)
    # Without axes there is nothing to lay out.
    figure.set_layout_engine("none")
    figure.text(0.5, 0.45, f"nothing to draw: {why}", ha="center", va="center", size=10)
    foot(figure, context)
    return figure


def foot(figure: Figure, context: Context, *notes: str) -> None:
    """Write notes below a figure, what is lost before all others; to be called last."""
    lines = [
        line
        for note in (*context.reservations, *notes)
        for line in textwrap.wrap(_plain(note), int(_FOOT_COLUMNS * context.width))
    ]
    height = float(figure.get_size_inches()[1])
    for at, line in enumerate(reversed(lines)):
        figure.text(0.012, (0.07 + 0.15 * at) / height, line, va="bottom", size=7.5, color=MUTED)
    below = (0.10 + 0.15 * len(lines)) / height
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(rect=(0.005, below, 0.985, 1 - below - 0.58 / height))
        engine.execute(figure)
        # The solver's last digits differ from run to run, and ids in an SVG are made of them.
        figure.set_layout_engine("none")
        for axes in figure.axes:
            left, bottom, width, tall = (round(s, 5) for s in axes.get_position().bounds)
            axes.set_position((left, bottom, width, tall))


def legend(axes: Axes, columns: int = 3, handles: Sequence[Artist] = ()) -> None:
    """Put the legend above the title of some axes, where it hides nothing."""
    shown = list(handles) or axes.get_legend_handles_labels()[0]
    figure = axes.get_figure(root=True)
    if not shown or figure is None:
        return
    columns = max(1, int(columns * float(figure.get_size_inches()[0]) / WIDE))
    above = axes.transAxes + ScaledTranslation(0, 22 / 72, figure.dpi_scale_trans)
    axes.legend(
        handles=shown, loc="lower left", bbox_to_anchor=(0, 1), bbox_transform=above,
        borderaxespad=0, borderpad=0, ncols=columns, columnspacing=1.6, handlelength=1.6,
    )  # fmt: skip


def _plain(text: str) -> str:
    # ASCII: the font lacks most of what a hostile string may hold, and would say so.
    shown = printable(text).encode("ascii", "backslashreplace").decode()
    return shown if len(shown) <= 400 else shown[:399] + "~"


def seconds_axis(axes: Axes) -> None:
    """Label the x axis as time."""
    axes.set_xlabel("seconds since the recording began")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))


def count_axis(axes: Axes, label: str) -> None:
    """Label the y axis as a number that begins at 0."""
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))


def hex_axis(axes: Axes, first: int, last: int, ticks: int) -> None:
    """Show guest frames `first` to `last` on the y axis, with at most so many ticks at round ones.

    A step is a power of two, so that the numbers are round in hexadecimal.
    """
    step = 1
    while (last - first) // step >= ticks:
        step *= 2
    low = -(-first // step) * step
    # Beyond both ends half a frame, of many frames as much as shows a line at the end whole, or
    # what a float can tell apart up there.
    room = max(0.5, 0.012 * (last - first), last * 2.0**-48)
    axes.set_ylim(first - room, last + room)
    axes.yaxis.set_major_locator(FixedLocator(list(range(low, last + 1, step))))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{int(value):#x}"))


def save(figure: Figure, path: Path, form: str) -> None:
    """Write a figure as png or svg; the same figure gives the same bytes."""
    metadata = {"Date": None} if form == "svg" else {"Software": None}
    figure.savefig(path, format=form, dpi=_DPI, facecolor="white", metadata=metadata)


def as_svg(figure: Figure, prefix: str) -> str:
    """Return a figure as an <svg> element to stand in a page: no background, colours by CSS.

    `prefix` makes its ids different from those of others in the page.
    """
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{prefix}-", text)
    # Hundredths of a point are enough for curves, and half the size.
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)
    for color, name in ((INK, "--ink"), (MUTED, "--muted"), (GRID, "--grid")):
        text = text.replace(color, f"var({name})")
    return text
