"""What pairing of lives must know beside the SPTE records: losses, masks, VMs, slots.

May import: numpy, `analysis.lifeslots`, `tracer.tracefile`.
"""

import dataclasses
import json
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.lifeslots import Slots, slots_of
from tracer.tracefile import TraceReader

__all__ = ("LifeContext",)

#: Bits 51 to 12 of an SPTE: the address, where memory encryption takes none of them.
_ADDRESS = 0x000F_FFFF_FFFF_F000


@dataclasses.dataclass(frozen=True, slots=True)
class LifeContext:
    """What is known of a trace before its SPTE records.

    `created` are the VMs whose creation is in the trace. `losses` are the spans (from, to], ns, in
    which SPTE records were lost, both ends ascending. The masks are those of the recorded host, 0
    where it has no such bit. `gfns` is what --gfn let through (first, last), None for everything.
    """

    created: frozenset[int] = frozenset()
    losses: tuple[tuple[int, int], ...] = ()
    address_mask: int = _ADDRESS
    accessed_mask: int = 0
    dirty_mask: int = 0
    gfns: tuple[int, int] | None = None
    slots: Slots = dataclasses.field(default_factory=Slots)

    @classmethod
    def of(cls, reader: TraceReader) -> "LifeContext":
        """Return that of a trace; reads its VM, SLOT and LOSS records."""
        masks = _values(reader)
        gfns = reader.meta.settings.get("gfns")
        created: set[int] = set()
        for batch in reader.records(["VM"], ["op", "vm"]):
            created |= {r["vm"] or 0 for r in batch.to_pylist() if r["op"] == "create"}
        return cls(
            created=frozenset(created),
            losses=_losses(reader),
            address_mask=_ADDRESS & ~masks.get("shadow_me_mask", 0),
            accessed_mask=masks.get("shadow_accessed_mask", 0),
            dirty_mask=masks.get("shadow_dirty_mask", 0),
            gfns=_range(gfns),
            slots=slots_of(reader),
        )

    def missable(self, vm: npt.NDArray[Any], ts: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Tell whether an earlier SPTE record of these VMs, before these times, can be missing."""
        old = ~np.isin(vm, np.array(sorted(self.created), np.uint64))
        if self.losses:
            old |= ts > self.losses[0][0]
        return np.asarray(old)

    def lost(self, birth: npt.NDArray[Any], death: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Tell whether SPTE records were lost between two times (ns)."""
        if not self.losses:
            return np.zeros(len(birth), bool)
        begin, end = np.array(self.losses, np.uint64).T
        begun = np.searchsorted(begin, death, "left")
        over = np.searchsorted(end, birth, "left")
        return np.asarray(begun > over)


def _values(reader: TraceReader) -> dict[str, int]:
    """Return the host's data symbols: numbers of 64 bits, whatever the file holds."""
    try:
        values = json.loads(reader.meta.facts)["values"]
        return {k: v for k, v in values.items() if type(v) is int and 0 <= v < 1 << 64}
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        return {}


def _range(gfns: Any) -> tuple[int, int] | None:
    if not isinstance(gfns, list) or [type(end) for end in gfns] != [int, int]:
        return None
    return gfns[0], gfns[1]


def _losses(reader: TraceReader) -> tuple[tuple[int, int], ...]:
    """Return the spans in which SPTE records were lost.

    The counters are cumulative, per kind and cpu, and written together where they changed: what is
    new was lost since they were last written.
    """
    spans: list[tuple[int, int]] = []
    lost: dict[int, int] = {}
    before = written = reader.meta.start_monotonic_ns
    for batch in reader.records(["LOSS"], ["ts", "cpu", "loss_kind", "lost"]):
        for row in batch.to_pylist():
            ts, cpu, count = row["ts"] or 0, row["cpu"] or 0, row["lost"] or 0
            if ts != written:
                before, written = written, ts
            if row["loss_kind"] == "SPTE" and count > lost.get(cpu, 0):
                lost[cpu] = count
                spans.append((before, ts))
    counted = reader.info()["summary"].get("counts")
    total = counted.get("SPTE") if isinstance(counted, dict) else None
    if isinstance(total, dict) and isinstance(total.get("lost"), int):
        if total["lost"] > sum(lost.values()):
            # Known only at the end: left in the rings, or not written.
            spans.append((written, (1 << 64) - 1))
    begins, ends = sorted(b for b, _ in spans), sorted(e for _, e in spans)
    return tuple(dict.fromkeys(zip(begins, ends, strict=True)))
