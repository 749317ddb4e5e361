"""How long whole faults took, by VM, by memslot and by the level that they mapped.

A FAULT record names its VM always, its memslot if it came to fault-in, and the level that KVM was
after, which says something where a mapping was the result. May import: numpy, pandas,
`analysis.histogram`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.histogram import Histogram

__all__ = ("BY", "LEVELS", "WHERE_COLUMNS", "WHERE_MAX", "Where", "WhereTimes", "where_of")

#: Columns of a FAULT table that `where_of` takes.
WHERE_COLUMNS = ("vm", "as_id", "slot", "level", "result", "dur")
#: Results after which the level is that of a mapping.
_MAPPED = ("fixed", "spurious")
#: What faults are told apart by.
BY = ("level", "VM", "memslot")
LEVELS = {1: "4K", 2: "2M", 3: "1G"}
#: Places told apart, 60 KiB each; a trace from strangers may name any number of VMs.
WHERE_MAX = 1 << 9
_SLOT_BITS, _SPACE_BITS = 32, 8


class Where(NamedTuple):
    """Some faults: of a level, of a VM, or of a memslot of a VM.

    `by` is one of BY; the numbers that do not belong to it are 0.
    """

    by: str
    vm: int = 0
    as_id: int = 0
    slot: int = 0
    level: int = 0

    @property
    def name(self) -> str:
        """What it is called in a table."""
        if self.by == "level":
            return LEVELS.get(self.level, f"level {self.level}")
        vm = f"VM {self.vm or '?'}"
        if self.by == "VM":
            return vm
        return f"{vm} slot {self.slot}" + (f" (space {self.as_id})" if self.as_id else "")


def where_of(table: pd.DataFrame) -> Iterator[tuple[Where, npt.NDArray[np.int64]]]:
    """Yield the places of a FAULT table, each with the rows of its faults."""
    known = table["dur"].notna().to_numpy()
    vm = table["vm"].to_numpy(dtype=np.int64, na_value=0)
    for number, rows in _groups(vm, known):
        yield Where("VM", vm=number), rows
    slot = table["slot"].to_numpy(dtype=np.int64, na_value=-1)
    space = table["as_id"].to_numpy(dtype=np.int64, na_value=0)
    # Of VMs whose numbers differ by 2^24, which no recorder gives out, slots count together.
    places = (vm << _SPACE_BITS | space) << _SLOT_BITS | slot
    for _, rows in _groups(places, known & (slot >= 0)):
        first = rows[0]
        yield Where("memslot", int(vm[first]), int(space[first]), int(slot[first])), rows
    level = table["level"].to_numpy(dtype=np.int64, na_value=0)
    mapped = table["result"].isin(_MAPPED).to_numpy(dtype=bool, na_value=False)
    for number, rows in _groups(level, known & mapped & (level > 0)):
        yield Where("level", level=number), rows


def _groups(
    keys: npt.NDArray[np.int64], wanted: npt.NDArray[np.bool_]
) -> Iterator[tuple[int, npt.NDArray[np.int64]]]:
    at = np.flatnonzero(wanted)
    if not len(at):
        return
    mine = keys[at]
    if mine.min() == mine.max():  # mostly
        yield int(mine[0]), at
        return
    order = np.argsort(mine, kind="stable")
    numbers, first = np.unique(mine[order], return_index=True)
    yield from zip(numbers.tolist(), np.split(at[order], first[1:]), strict=True)


class WhereTimes:
    """Durations of faults (ns) by place; of more than WHERE_MAX places those that came first."""

    def __init__(self) -> None:
        """Begin with none."""
        self.times: dict[Where, Histogram] = {}

    def add(self, table: pd.DataFrame) -> None:
        """Add the faults of a FAULT table."""
        durations = table["dur"].to_numpy(dtype=np.uint64, na_value=0)
        for where, rows in where_of(table):
            if where not in self.times and len(self.times) >= WHERE_MAX:
                continue
            self.times.setdefault(where, Histogram()).add(durations[rows])
