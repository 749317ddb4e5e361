"""Invalidations that KVM counts as in progress though the records say that each of them has ended.

The count is taken down under mmu_lock before the record of an end is written. So where nothing is
in progress by the records and was nothing by the count either (as in a new VM), an end that still
counts something can be the fault of two that cross: the start of the other was counted, and its
record comes when it returns, after milliseconds where many want mmu_lock. Several such ends in a
row are none, nor is one that no start follows, once the VM is gone: mmu_notifier_unregister() waits
for all that are at work (mm/mmu_notifier.c).
May import: `analysis`, numpy.
"""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.columns import Records, code

__all__ = ("INVALIDATE_COLUMNS", "Miscounted")

INVALIDATE_COLUMNS = ("op", "vm", "in_progress")
_START = code("op", "start")
#: (kind, ts, cpu, seq): what names a record.
_Key = tuple[str, int, int, int]


class Miscounted:
    """Follows the invalidations of a trace, a piece at a time."""

    def __init__(self) -> None:
        self._open: dict[int, int] = {}
        self._rested: set[int] = set()
        #: VM -> ends in a row, the newest ones, that left a higher count than the records do
        self.ends: dict[int, int] = {}
        #: VM -> its newest record, if that is such an end, and its newest start
        self.newest: dict[int, _Key] = {}
        self.begun: dict[int, _Key] = {}

    def created(self, vms: Iterable[int]) -> None:
        """Take new VMs, in which nothing can be in progress."""
        self._rested.update(vms)

    def feed(self, records: Records) -> None:
        """Take the next INVALIDATE records."""
        for vm in np.unique(records["vm"]).tolist():
            mine = np.flatnonzero(records["vm"] == vm)
            start = records["op"][mine] == _START
            wrong = self._feed(vm, start, records["in_progress"][mine])
            if start.any():
                self.begun[vm] = records.key(int(mine[start][-1]))
            self.newest.pop(vm, None)
            if wrong:
                self.newest[vm] = records.key(int(mine[-1]))

    def _feed(self, vm: int, start: npt.NDArray[np.bool_], counted: npt.NDArray[Any]) -> bool:
        """Take the next ones of a VM; tell whether the last is an end that counts too many."""
        before = self._open.get(vm, 0)
        opened = before + np.cumsum(np.where(start, 1, -1))
        # One that was begun before the recording ends here too.
        opened -= np.minimum(np.minimum.accumulate(opened), 0)
        self._open[vm] = int(opened[-1])
        rested = np.maximum.accumulate(counted == 0) | (vm in self._rested)
        if rested[-1]:
            self._rested.add(vm)
        every = rested & (counted.astype(np.int64) > opened) & ~start
        wrong = every[~start]
        right = np.flatnonzero(~wrong)
        if len(right):
            self.ends[vm] = len(wrong) - 1 - int(right[-1])
        else:
            self.ends[vm] = self.ends.get(vm, 0) + len(wrong)
        return bool(every[-1])
