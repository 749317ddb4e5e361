"""Which memslot held a guest frame at some time.

SLOT records say it. Of a slot that is older than the trace there is one, "seen", at the first fault
in it; such a slot counts as there from the beginning. May import: numpy, `analysis.columns`,
`tracer.tracefile`.
"""

import itertools
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.columns import Records, code
from tracer.tracefile import TraceReader

__all__ = ("Slots", "slots_of")

_Array = npt.NDArray[Any]
_COLUMNS = ("ts", "op", "vm", "as_id", "slot", "gfn", "npages")
_DELETE = code("op", "delete")
_FLAGS, _SEEN = code("op", "flags"), code("op", "seen")
_NO_SLOT = -1
#: So many address spaces are looked at one after the other; of more the frames are sorted first.
_FEW = 6


class Slots:
    """The memslots of all VMs through time."""

    def __init__(self, changes: dict[str, _Array] | None = None) -> None:
        """Take what SLOT records say, columns of `_COLUMNS` in order of time."""
        empty = {name: np.empty(0, np.uint64) for name in _COLUMNS}
        self._changes = empty if changes is None else changes
        self._applied = 0
        #: address space of a VM -> slot -> (first frame, length).
        self._there: dict[int, dict[int, tuple[int, int]]] = {}
        #: A change of one address space leaves those of all others as they are.
        self._layouts: dict[int, _Layout] = {}

    def find(self, ts: _Array, vm: _Array, as_id: _Array, gfn: _Array) -> _Array:
        """Return the slots of some guest frames, -1 where none is known.

        Times (ns) may be in any order; it is quick if they ascend, also from call to call.
        """
        found = np.full(len(ts), _NO_SLOT, np.int32)
        if not len(self._changes["ts"]) or not len(ts):
            return found
        space = vm.astype(np.int64) << 8 | as_id
        span = [ts.min(), ts.max()]
        begin, end = np.searchsorted(self._changes["ts"], span, "right").tolist()
        if begin == end:
            self._apply(begin)
            return self._now(space, gfn)
        until = np.searchsorted(self._changes["ts"], ts, "right")
        bounds = [0, *(np.flatnonzero(np.diff(until)) + 1).tolist(), len(ts)]
        for first, last in itertools.pairwise(bounds):
            self._apply(int(until[first]))
            found[first:last] = self._now(space[first:last], gfn[first:last])
        return found

    def flags_changed(self, vm: _Array, ts: _Array) -> _Array:
        """Tell whether the last change of a memslot of these VMs, at these times, was of flags."""
        found = np.zeros(len(ts), bool)
        changes = self._changes
        for one in np.unique(vm).tolist():
            mine = (changes["vm"] == one) & (changes["op"] != _SEEN)
            flags = np.append(False, changes["op"][mine] == _FLAGS)
            at = np.flatnonzero(vm == one)
            found[at] = flags[np.searchsorted(changes["ts"][mine], ts[at], "right")]
        return found

    def _apply(self, count: int) -> None:
        """Make the layouts those after so many changes."""
        if count < self._applied:
            self._applied, self._there, self._layouts = 0, {}, {}
        rows = slice(self._applied, count)
        columns = [self._changes[name][rows].tolist() for name in _COLUMNS[1:]]
        for op, vm, as_id, slot, gfn, npages in zip(*columns, strict=True):
            space = vm << 8 | as_id
            there = self._there.setdefault(space, {})
            # Taken out first, so that the latest is always last.
            there.pop(slot, None)
            if op != _DELETE:
                there[slot] = gfn, npages
            self._layouts.pop(space, None)
        self._applied = count

    def _now(self, space: _Array, gfn: _Array) -> _Array:
        first = int(space[0])
        if first in self._layouts and (space == first).all():
            return self._layouts[first].find(gfn)
        found = np.full(len(gfn), _NO_SLOT, np.int32)
        if len(self._there) <= _FEW:
            for one in self._there:
                mine = space == one
                if mine.any():
                    np.copyto(found, self._layout(one).find(gfn), where=mine)
            return found
        order = np.argsort(space, kind="stable")
        bounds = np.flatnonzero(np.diff(space[order])) + 1
        for rows in np.split(order, bounds):
            one = int(space[rows[0]])
            if one in self._there:
                found[rows] = self._layout(one).find(gfn[rows])
        return found

    def _layout(self, space: int) -> "_Layout":
        if space not in self._layouts:
            self._layouts[space] = _Layout(self._there[space])
        return self._layouts[space]


class _Layout:
    """The memslots of one address space at one time."""

    def __init__(self, there: dict[int, tuple[int, int]]) -> None:
        self._slots = [
            (gfn, min(gfn + npages, 1 << 64) - 1, slot)
            for slot, (gfn, npages) in there.items()
            if npages
        ]
        ordered = sorted(self._slots)
        self._first = np.array([row[0] for row in ordered], np.uint64)
        self._last = np.array([row[1] for row in ordered], np.uint64)
        self._slot = np.array([row[2] for row in ordered], np.int32)
        # KVM refuses those that overlap; a damaged trace does not.
        self._apart = bool((self._first[1:] > self._last[:-1]).all())

    def find(self, gfn: _Array) -> _Array:
        found = np.full(len(gfn), _NO_SLOT, np.int32)
        if not self._apart:
            for first, last, slot in self._slots:
                found[(gfn >= np.uint64(first)) & (gfn <= np.uint64(last))] = slot
        elif len(self._slot) == 1:
            known = (gfn >= self._first[0]) & (gfn <= self._last[0])
            np.copyto(found, self._slot[0], where=known)
        elif len(self._slot):
            at = np.searchsorted(self._first, gfn, "right") - 1
            known = (at >= 0) & (gfn <= self._last.take(at))
            np.copyto(found, self._slot.take(at), where=known)
        return found


def slots_of(reader: TraceReader) -> Slots:
    """Return the memslots of a trace."""
    records = Records("SLOT", list(reader.records(["SLOT"], _COLUMNS)))
    changes = {name: records[name] for name in _COLUMNS}
    old = changes["op"] == _SEEN
    if old.any():
        changes["ts"] = np.where(old, np.uint64(0), changes["ts"])
        order = np.argsort(~old, kind="stable")
        changes = {name: column[order] for name, column in changes.items()}
    return Slots(changes)
