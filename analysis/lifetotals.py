"""Lifetimes in short: how many mappings of each level and class there were, and how long they were.

Adds up chunk by chunk, so that the length of a trace does not matter. May import: numpy, pandas,
`analysis.histogram`.
"""

import dataclasses
from collections import Counter

import numpy as np
import pandas as pd

from analysis.histogram import Histogram

__all__ = ("LIFE_COLUMNS", "LifeGroup", "LifeTotals")


#: The columns of `lives` that are added up.
LIFE_COLUMNS = (
    *("level", "page_class", "birth_ts", "death_ts", "death_cause", "ended_by"),
    *("censored_start", "censored_end", "lost"),
)


@dataclasses.dataclass(slots=True)
class LifeGroup:
    """Lives of one level and class; `times` (ns) are of those seen from birth to death."""

    lives: int = 0
    #: mapped before their first record, and still mapped after their last one.
    before: int = 0
    after: int = 0
    #: touched by a loss: a record of theirs may be missing.
    lost: int = 0
    times: Histogram = dataclasses.field(default_factory=Histogram)


@dataclasses.dataclass(slots=True)
class LifeTotals:
    """The sums of all lives of a trace."""

    #: (level, class) -> lives.
    groups: dict[tuple[int, str], LifeGroup] = dataclasses.field(default_factory=dict)
    #: (what ended it, cause of that) -> lives; the cause of a censored end is "".
    ends: Counter[tuple[str, str]] = dataclasses.field(default_factory=Counter)
    #: What became of SPTE records: life, orphan zap, orphan change; see `analysis.lives`.
    accounted: Counter[str] = dataclasses.field(default_factory=Counter)

    def feed(self, lives: pd.DataFrame) -> None:
        """Add a table `lives`."""
        if not len(lives):
            return
        before = lives["censored_start"].to_numpy(dtype=bool)
        after = lives["censored_end"].to_numpy(dtype=bool)
        lost = lives["lost"].to_numpy(dtype=bool)
        birth = lives["birth_ts"].to_numpy(dtype=np.uint64, na_value=0)
        death = lives["death_ts"].to_numpy(dtype=np.uint64, na_value=0)
        times = np.where(death > birth, death - birth, np.uint64(0))
        keys = lives.groupby(["level", "page_class"], observed=True, sort=False).indices
        for (level, page_class), rows in keys.items():
            group = self.groups.setdefault((int(level), str(page_class)), LifeGroup())
            group.lives += len(rows)
            group.before += int(before[rows].sum())
            group.after += int(after[rows].sum())
            group.lost += int(lost[rows].sum())
            group.times.add(times[rows[~before[rows] & ~after[rows]]])
        causes = lives["death_cause"].astype(object).where(lives["death_cause"].notna(), "")
        ends = pd.DataFrame(
            {"ended_by": lives["ended_by"].astype(str), "cause": causes.astype(str)}
        )
        for (ended_by, cause), count in ends.value_counts().items():
            self.ends[str(ended_by), str(cause)] += int(count)
