"""Invalidations that KVM counts as in progress though the records say that each of them has ended.

The count is taken down under mmu_lock before the record of an end is written. So where nothing is
in progress by the records and was nothing by the count either, an end that still counts something
can be the fault of two that cross; several in a row are not.
May import: `analysis`, numpy.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.columns import Records, code

__all__ = ("INVALIDATE_COLUMNS", "Miscounted")

INVALIDATE_COLUMNS = ("op", "vm", "in_progress")
_START = code("op", "start")


class Miscounted:
    """Follows the invalidations of a trace, a piece at a time."""

    def __init__(self) -> None:
        self._open: dict[int, int] = {}
        self._rested: set[int] = set()
        #: VM -> ends in a row, the newest ones, that left a higher count than the records do
        self.ends: dict[int, int] = {}

    def feed(self, records: Records) -> None:
        """Take the next INVALIDATE records."""
        for vm in np.unique(records["vm"]).tolist():
            mine = records["vm"] == vm
            self._feed(vm, records["op"][mine] == _START, records["in_progress"][mine])

    def _feed(self, vm: int, start: npt.NDArray[np.bool_], counted: npt.NDArray[Any]) -> None:
        before = self._open.get(vm, 0)
        opened = before + np.cumsum(np.where(start, 1, -1))
        # One that was begun before the recording ends here too.
        opened -= np.minimum(np.minimum.accumulate(opened), 0)
        self._open[vm] = int(opened[-1])
        rested = np.maximum.accumulate(counted == 0) | (vm in self._rested)
        if rested[-1]:
            self._rested.add(vm)
        wrong = (rested & (counted.astype(np.int64) > opened))[~start]
        right = np.flatnonzero(~wrong)
        if len(right):
            self.ends[vm] = len(wrong) - 1 - int(right[-1])
        else:
            self.ends[vm] = self.ends.get(vm, 0) + len(wrong)
