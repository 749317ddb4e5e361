"""Memslots, noticed while their process still lives.

A SLOT record wakes the recorder at once; this module finds it in the ring, before its turn to be
written, and reads what stands behind the slot. May import: numpy, `probes.wire`, `tracer`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from probes.wire import KINDS, OPS
from tracer.ring import Ring
from tracer.vmas import read_vmas

__all__ = ("SlotWatch",)

_SLOT = KINDS.index("SLOT")
_DELETE = OPS.index("delete")


class SlotWatch:
    """Turns new SLOT records into notes of the VMAs behind them, each slot once."""

    def __init__(self) -> None:
        self._looked_at: dict[int, int] = {}
        self._noted: set[tuple[int, int, int]] = set()
        self.vms: set[int] = set()

    def look(self, rings: Sequence[Ring]) -> Iterator[dict[str, Any]]:
        """Yield a note for every slot that appeared in the rings since the last look."""
        wanted: dict[int, list[dict[str, int]]] = {}
        for ring in rings:
            if ring.kind == "events":
                for slot in self._new_slots(ring):
                    wanted.setdefault(slot.pop("tgid"), []).append(slot)
        for tgid, slots in wanted.items():
            ranges = [(s["hva"], s["hva"] + s["npages"] * 4096) for s in slots]
            vmas, why = read_vmas(tgid, ranges)
            for slot, (low, high) in zip(slots, ranges, strict=True):
                behind = [v for v in vmas if v["start"] < high and low < v["end"]]
                note: dict[str, Any] = {"slot": slot, "tgid": tgid, "vmas": behind}
                if why:
                    note["problem"] = why
                yield note

    def _new_slots(self, ring: Ring) -> Iterator[dict[str, int]]:
        position = ring.position()
        slots = ring.peek()
        seen = max(self._looked_at.get(id(ring), 0), position)
        fresh = ring.records(slots[(seen - position) // slots.itemsize :])
        self._looked_at[id(ring)] = position + len(slots) * slots.itemsize
        header = fresh["h"]
        self.vms.update(int(vm) for vm in np.unique(header["vm"]) if vm)
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
