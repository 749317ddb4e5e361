"""Memslots, noticed while their process still lives.

SLOT and VMA records wake the recorder at once; this module finds them in the ring, before their
turn to be written, and reads what stands behind the slot, or which device a VMA maps.
May import: numpy, `probes.wire`, `tracer`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from probes.wire import KINDS, OPS
from tracer.ring import Records, Ring
from tracer.vmas import device_path, read_vmas

__all__ = ("SlotWatch",)

_SLOT = KINDS.index("SLOT")
_DELETE = OPS.index("delete")
_VMA = KINDS.index("VMA")
#: A note has a limited size; a slot of more mappings is not a usual one.
_VMAS_MAX = 1000


class SlotWatch:
    """Turns new SLOT records into notes of the VMAs behind them, each slot once."""

    def __init__(self) -> None:
        self._looked_at: dict[int, int] = {}
        self._noted: set[tuple[int, int, int]] = set()
        self._devices: set[int] = set()
        self.vms: set[int] = set()

    def look(self, rings: Sequence[Ring]) -> Iterator[dict[str, Any]]:
        """Yield a note for every slot and device that appeared in the rings since the last look."""
        wanted: dict[int, list[dict[str, int]]] = {}
        for ring in rings:
            if ring.kind == "events":
                fresh = self._fresh(ring)
                for slot in self._new_slots(fresh):
                    wanted.setdefault(slot.pop("tgid"), []).append(slot)
                yield from self._new_devices(fresh)
        for tgid, slots in wanted.items():
            ranges = [(s["hva"], s["hva"] + s["npages"] * 4096) for s in slots]
            vmas, why = read_vmas(tgid, ranges)
            for slot, (low, high) in zip(slots, ranges, strict=True):
                behind = [v for v in vmas if v["start"] < high and low < v["end"]]
                if len(behind) > _VMAS_MAX:
                    why = f"{len(behind) - _VMAS_MAX} more mappings behind this slot are left out"
                    behind = behind[:_VMAS_MAX]
                note: dict[str, Any] = {"slot": slot, "tgid": tgid, "vmas": behind}
                if why or not behind:
                    note["problem"] = why or "the process was ending when its mappings were read"
                yield note

    def _fresh(self, ring: Ring) -> Records:
        """Return the records that came into a ring since the last look, still in place."""
        position = ring.position()
        slots = ring.peek()
        seen = max(self._looked_at.get(id(ring), 0), position)
        fresh = ring.records(slots[(seen - position) // slots.itemsize :])
        self._looked_at[id(ring)] = position + len(slots) * slots.itemsize
        self.vms.update(int(vm) for vm in np.unique(fresh["h"]["vm"]) if vm)
        return fresh

    def _new_devices(self, fresh: Records) -> Iterator[dict[str, Any]]:
        for i in np.flatnonzero(fresh["h"]["kind"] == _VMA):
            rdev = int(fresh[i]["d"])
            if rdev and rdev not in self._devices:
                self._devices.add(rdev)
                yield {"device": {"rdev": rdev, "path": device_path(rdev)}}

    def _new_slots(self, fresh: Records) -> Iterator[dict[str, int]]:
        header = fresh["h"]
        for i in np.flatnonzero((header["kind"] == _SLOT) & (header["op"] != _DELETE)):
            record = fresh[i]
            tgid, hva, npages = int(record["h"]["tgid"]), int(record["b"]), int(record["a"])
            if (tgid, hva, npages) in self._noted:
                continue
            self._noted.add((tgid, hva, npages))
            yield {
                "vm": int(record["h"]["vm"]),
                "slot": int(record["d"]),
                "as_id": int(record["as_id"]),
                "gfn": int(record["gfn"]),
                "npages": npages,
                "hva": hva,
                "tgid": tgid,
            }
