"""Memslots through time: which guest frames a VM had, and where they lie in its process.

Fed with SLOT records piece by piece. A slot is known from its create record on, or from the first
fault in it if it is older than the recording ("seen"). kvm_arch_commit_memory_region() writes the
record after the slot's table was changed: what a new slot maps may come before its record, but the
fault then writes a "seen" record; what an old slot mapped is gone before its record.
May import: numpy, `analysis.columns`, `analysis.framelog`.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from analysis.columns import Records, code
from analysis.framelog import FRAME_BITS, U64, Spaces

__all__ = ("GUEST_MEMFD", "READ_ONLY", "SLOT_COLUMNS", "Slot", "SlotMap")

SLOT_COLUMNS = ("op", "vm", "as_id", "slot", "gfn", "npages", "hva", "slot_flags")
#: KVM_MEM_READONLY and KVM_MEM_GUEST_MEMFD, include/uapi/linux/kvm.h.
READ_ONLY, GUEST_MEMFD = 1 << 1, 1 << 2

_CREATE, _DELETE, _FLAGS, _SEEN = (
    code("op", name) for name in ("create", "delete", "flags", "seen")
)
#: Records that leave a slot where it is. A new slot whose first fault was quicker than its create
#: record has been seen before it was created.
_STAYING = (_CREATE, _FLAGS, _SEEN)
_ENDLESS = (1 << 64) - 1
#: What is beyond comes from no kernel: 52 bits of guest physical address, KVM_MEM_MAX_NR_PAGES
#: (include/linux/kvm_host.h), 57 bits of user address.
_GFN_MAX, _PAGES_MAX, _HVA_MAX = (1 << 40) - 1, (1 << 31) - 1, 1 << 57
_PAGE = 4096
#: Slots kept after their end, and at most in all: KVM allows 32764 in one address space.
_KEPT_MAX = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class Slot:
    """One memslot in one place: guest frames [gfn, gfn + pages) at [hva, …) from `ts` to `ts_end`.

    `key` names its first SLOT record, `end_key` the one that ended it.
    """

    vm: int
    as_id: int
    number: int
    gfn: int
    pages: int
    hva: int
    flags: int
    ts: int
    key: tuple[str, int, int, int]
    ts_end: int = _ENDLESS
    end_key: tuple[str, int, int, int] | None = None

    def holds(self, gfn: int, ts: int) -> bool:
        """Tell whether a guest frame lies in it at a time."""
        return self.ts <= ts < self.ts_end and self.gfn <= gfn < self.gfn + self.pages

    def hva_of(self, gfn: int) -> int:
        """Return the address of a guest frame in the VM's process (bytes)."""
        return self.hva + (gfn - self.gfn) * _PAGE


class SlotMap:
    """The slots of all VMs."""

    def __init__(self, spaces: Spaces) -> None:
        self._spaces = spaces
        self._alive: dict[tuple[int, int, int], Slot] = {}
        self._ended: list[Slot] = []
        self._table: tuple[U64, U64, npt.NDArray[np.int64]] | None = None

    def feed(self, records: Records) -> list[Slot]:
        """Take SLOT records; return the slots that ended with them: deleted, moved, replaced."""
        ended: list[Slot] = []
        if len(records):
            self._table = None
        columns = [records[name].tolist() for name in SLOT_COLUMNS] if len(records) else []
        for at, (op, vm, as_id, number, gfn, pages, hva, flags) in enumerate(
            zip(*columns, strict=True)
        ):
            key = records.key(at)
            place = (vm, as_id, number)
            gfn, pages, hva = min(gfn, _GFN_MAX), min(pages, _PAGES_MAX), min(hva, _HVA_MAX)
            old = self._alive.pop(place, None)
            if old is not None and op in _STAYING and (old.gfn, old.hva) == (gfn, hva):
                self._alive[place] = dataclasses.replace(old, flags=flags)
                continue
            if op == _DELETE and old is None:
                # It was there all the time, but nobody faulted in it.
                old = Slot(vm, as_id, number, gfn, pages, hva, flags, 0, key)
            if old is not None:
                ended.append(dataclasses.replace(old, ts_end=key[1], end_key=key))
            if op != _DELETE and len(self._alive) < _KEPT_MAX:
                self._alive[place] = Slot(vm, as_id, number, gfn, pages, hva, flags, key[1], key)
        self._ended += ended
        del self._ended[:-_KEPT_MAX]
        return ended

    def at(self, vm: int, as_id: int, gfn: int, ts: int) -> Slot | None:
        """Return the slot that held a guest frame at a time, None if none is known."""
        for slot in (*self._alive.values(), *reversed(self._ended)):
            if (slot.vm, slot.as_id) == (vm, as_id) and slot.holds(gfn, ts):
                return slot
        return None

    def outside(
        self, space: U64, gfn: U64, ts: U64, ended: Iterable[Slot]
    ) -> npt.NDArray[np.int64]:
        """Return the positions of guest frames that lay in no known slot at their times.

        `ended` are the slots that ended in the same span of time, as `feed` returned them.
        """
        starts, ends, since = self._ranges()
        full = space << np.uint64(FRAME_BITS) | gfn
        if len(starts):
            at = np.searchsorted(starts, full, "right") - 1
            inside = (at >= 0) & (full < ends[at]) & (ts >= since[at].astype(np.uint64))
            rest = np.flatnonzero(~inside)
        else:
            rest = np.arange(len(full))
        for slot in ended:
            if not len(rest):
                break
            base = self._spaces.one(slot.vm, slot.as_id) << FRAME_BITS
            mine = full[rest]
            inside = (mine >= np.uint64(base + slot.gfn)) & (ts[rest] <= np.uint64(slot.ts_end))
            inside &= (mine < np.uint64(base + slot.gfn + slot.pages)) & (ts[rest] >= slot.ts)
            rest = rest[~inside]
        return rest

    def covering(self, vm: int, ended: Iterable[Slot] = ()) -> list[Slot]:
        """Return the slots of a VM that are alive, and those of `ended`."""
        return [slot for slot in (*self._alive.values(), *ended) if slot.vm == vm]

    def read_only(self) -> list[Slot]:
        """Return the slots that guests must not write to."""
        return [slot for slot in self._alive.values() if slot.flags & READ_ONLY]

    def _ranges(self) -> tuple[U64, U64, npt.NDArray[np.int64]]:
        """Return first frame, end and begin of all slots that are alive, in order of frame."""
        if self._table is None:
            slots = list(self._alive.values())
            bases = [self._spaces.one(slot.vm, slot.as_id) << FRAME_BITS for slot in slots]
            starts = np.array([b + s.gfn for b, s in zip(bases, slots, strict=True)], np.uint64)
            ends = starts + np.array([slot.pages for slot in slots], np.uint64)
            since = np.array([slot.ts for slot in slots], np.int64)
            order = np.argsort(starts, kind="stable")
            self._table = starts[order], ends[order], since[order]
        return self._table
