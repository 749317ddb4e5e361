"""Figure: where the time of a fault goes, by path and stage.

May import: numpy, matplotlib, `analysis`.
"""

import dataclasses
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from analysis.figures import style
from analysis.reportrows import StageRow
from analysis.text import duration

__all__ = ("LatencyData", "draw", "latency_data")

_COLORS = {"all": style.INK, "hva_to_pfn": "#e69f00", "map": "#009e73", "lock": "#d55e00"}
#: Of the other stages.
_OTHER = "#56b4e9"


@dataclasses.dataclass(frozen=True, slots=True)
class LatencyData:
    """Rows in the order of paths, then of stages."""

    rows: tuple[StageRow, ...]


def latency_data(stages: Sequence[StageRow]) -> LatencyData:
    """Take the stages that have a time."""
    return LatencyData(tuple(row for row in stages if row.times.n))


def draw(data: LatencyData, context: style.Context) -> Figure:
    """Draw a line for each stage: from the median to 90 %, thin to 99 %, a mark at the longest."""
    rows = data.rows
    title = "How long faults take, by path and stage"
    if not rows:
        return style.empty_figure(title, "there were no faults", context)
    height = 1.7 + 0.23 * len(rows) + 0.12 * len({row.path for row in rows})
    figure = style.new_figure(title, max(2.6, height), context)
    axes = figure.subplots()
    at, y, last = [], 0.0, ""
    for row in rows:
        y += 1.0 if row.path == last else 1.6
        last = row.path
        at.append(y)
        _draw_row(axes, y, row)
    axes.set_yticks(at, [_label(row) for row in rows])
    axes.set_ylim(y + 0.8, 0.6)
    axes.grid(axis="y", visible=False)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("time, logarithmic")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, numticks=20))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda ns, _: duration(round(ns), 1)))
    axes.set_xlim(left=max(1, min(max(row.times.p50 or 1, 1) for row in rows)) / 6)
    axes.plot([], [], "o", color=_OTHER, markersize=5, label="median")
    axes.plot([], [], color=_OTHER, linewidth=5, label="to 90 %")
    axes.plot([], [], color=_OTHER, linewidth=1.6, label="to 99 %")
    axes.plot([], [], "|", color=_OTHER, markersize=7, label="longest")
    style.legend(axes, 4)
    style.foot(
        figure,
        context,
        "By the host's clock, with what the probes cost. No 90 % of fewer than 10 faults, no 99 % "
        "of fewer than 100.",
    )
    return figure


def _label(row: StageRow) -> str:
    if row.stage == "all":
        return f"{row.path}, whole fault ({row.times.n:,})"
    return f"{row.stage} ({row.times.n:,})"


def _draw_row(axes: Axes, y: float, row: StageRow) -> None:
    color = _COLORS.get(row.stage, _OTHER)
    times = row.times
    # The axis has no 0.
    p50, p90, p99, longest = (
        None if ns is None else max(ns, 1) for ns in (times.p50, times.p90, times.p99, times.max)
    )
    if p50 is None or longest is None:
        return
    if p99 is not None:
        axes.plot([p50, p99], [y, y], color=color, linewidth=1.6, solid_capstyle="butt")
    if p90 is not None:
        axes.plot([p50, p90], [y, y], color=color, linewidth=5, solid_capstyle="butt")
    axes.plot(p50, y, "o", color=color, markersize=5)
    axes.plot(longest, y, "|", color=color, markersize=7)
    axes.annotate(
        duration(p50), (p50, y), (-5, 0), textcoords="offset points", ha="right", va="center",
        fontsize=7.5, color=style.MUTED,
    )  # fmt: skip
