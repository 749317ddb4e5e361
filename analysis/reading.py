"""One look at a trace for everything that a report or a figure is made of.

`read` adds up (`analysis.totals`, `analysis.lifetotals`), and asks the detectors if they are
wanted; a `Reading` is what the renderers' data are taken from. May import: `analysis`,
`tracer.tracefile`.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from analysis.check import CheckResult, check_trace
from analysis.lifecolumns import LifeCollector, LifeColumns
from analysis.lifetotals import LIFE_COLUMNS, LifeTotals
from analysis.lives import SPTE_COLUMNS, LifeBuilder, LifeContext
from analysis.totals import Totals, add_up
from tracer.tracefile import TraceReader, recordings

__all__ = ("Progress", "Reading", "read")

#: Told how much is done: (so far, of all).
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Reading:
    """What a trace adds up to. `start` is when the recording began, ns, CLOCK_MONOTONIC.

    `lives` is None unless it was asked for, `checked` is None if the detectors were not asked.
    """

    path: Path
    start: int
    totals: Totals
    lifetimes: LifeTotals
    lives: LifeColumns | None
    checked: CheckResult | None


def read(
    path: Path, *, lives: bool = False, check: bool = True, progress: Progress | None = None
) -> Reading:
    """Read a trace; `lives` keeps them all (45 bytes each), `check` asks every detector.

    Raises TraceFormatError if the file is not a trace.
    """
    stages = _Stages(progress, 3 if check else 2)
    totals = add_up(path, progress=stages.next())
    collector = LifeCollector() if lives else None
    lifetimes = LifeTotals()
    with TraceReader(path) as reader:
        start = reader.meta.start_monotonic_ns
        done, sptes, show = 0, reader.info()["kinds"]["SPTE"], stages.next()
        for part in recordings(reader):
            builder = LifeBuilder(LifeContext.of(part), None if lives else LIFE_COLUMNS)
            for batch in part.records(["SPTE"], SPTE_COLUMNS):
                _take(builder.feed(batch), lifetimes, collector)
                done += len(batch)
                show(done, sptes)
            _take(builder.finish(), lifetimes, collector)
            lifetimes.accounted.update(builder.accounted)
    return Reading(
        path=path,
        start=start,
        totals=totals,
        lifetimes=lifetimes,
        lives=collector.columns() if collector else None,
        checked=check_trace(path, progress=stages.next()) if check else None,
    )


class _Stages:
    """Makes one progress of several readings, each of which counts for the same."""

    def __init__(self, progress: Progress | None, count: int) -> None:
        self._progress = progress
        self._count = count
        self._begun = 0

    def next(self) -> Progress:
        """Return what to tell the progress of the next reading."""
        begun = self._begun
        self._begun += 1

        def show(done: int, total: int) -> None:
            if self._progress and total:
                self._progress(begun * total + min(done, total), self._count * total)

        return show


def _take(lives: pd.DataFrame, lifetimes: LifeTotals, collector: LifeCollector | None) -> None:
    lifetimes.feed(lives)
    if collector:
        collector.feed(lives)
