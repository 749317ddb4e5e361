"""From the model's events to wire records, and from those to the trace file.

A record is packed at once into preallocated memory, exactly as the kernel would lay it out, and
leaves sorted by (ts, cpu, seq) when no story can write anything older any more.
May import: `probes.wire`, `tracer`, numpy.
"""

import struct
from collections.abc import Callable, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from probes import wire
from tracer.batch import Group, order, split_kinds
from tracer.simulator.clock import FOREVER, Task
from tracer.simulator.host import TAIL_BITS, Page
from tracer.tracewriter import TraceWriter

__all__ = (
    "CALL", "CAUSE", "EVENT_LAYOUT", "FAULT_LAYOUT", "KIND", "OP", "PAGE_LAYOUT", "RELEASE_LAYOUT",
    "SPTE_LAYOUT", "Recorder", "head_of",
)  # fmt: skip

KIND: Final = {name: number for number, name in enumerate(wire.KINDS)}
OP: Final = {name: number for number, name in enumerate(wire.OPS)}
CAUSE: Final = {name: number for number, name in enumerate(wire.CAUSES)}
CALL: Final = {name: number for number, name in enumerate(wire.CALLS)}

_HEAD: Final = struct.Struct("<HBBIIIiiI")
_PAGE: Final = "QiiIB3x"
#: The layouts of `wire.EVENT` and `wire.FAULT`: ts, fault_ts, seq, the rest of the header as one
#: piece (it is the same for all of a task's records of one kind), the body. Tests compare them.
EVENT_LAYOUT: Final = struct.Struct("<QQI28sQQQQQIBBBB" + _PAGE)
SPTE_LAYOUT: Final = struct.Struct("<QQI28sQQQQQ4xBBBB" + _PAGE)
RELEASE_LAYOUT: Final = struct.Struct("<QQI28sQQ30xBx" + _PAGE)
PAGE_LAYOUT: Final = struct.Struct("<QQI28s8xQ24xI4x" + _PAGE)
INVALIDATE_LAYOUT: Final = struct.Struct("<QQI28s16xQQQI2xB25x")
FAULT_LAYOUT: Final = struct.Struct("<QQI28sQQQQQQQQQIIIIIIiiiBBBBBBB5x" + _PAGE + _PAGE)
_pack_spte: Final = SPTE_LAYOUT.pack_into
_pack_release: Final = RELEASE_LAYOUT.pack_into
_pack_page: Final = PAGE_LAYOUT.pack_into
_pack_invalidate: Final = INVALIDATE_LAYOUT.pack_into

#: Records held before the old ones are written.
_HELD: Final = 1 << 15
#: Records of one size that there is room for at first.
_FIRST: Final = 1 << 11
_NO_PAGE: Final = (0, 0, 0, 0, 0)
_FAULT: Final = KIND["FAULT"]
_RELEASE: Final = KIND["RELEASE"]
_SPTE: Final = KIND["SPTE"]
_INVALIDATE: Final = KIND["INVALIDATE"]

#: What is only recorded of a fault whose entry was.
_OF_FAULTS: Final = ("FAULT", "SLOT", "VMA")
_CAUSES_OF_FAULTS: Final = np.array([CAUSE["fault"], CAUSE["prefetch"]], "u1")

#: What may happen to the records on their way to the file (hostile mode): what of them is not
#: lost, and that as it is written.
Tamper = Callable[[Group], tuple[Group, Group]]


class _Store:
    # Packed records of one size, in a bytearray that grows by doubling.
    __slots__ = ("count", "data", "dtype", "room")

    def __init__(self, dtype: np.dtype[np.void]) -> None:
        self.dtype = dtype
        self.room = _FIRST
        self.data = bytearray(self.room * dtype.itemsize)
        self.count = 0

    def grow(self) -> None:
        self.data += bytes(self.room * self.dtype.itemsize)
        self.room *= 2

    def take_before(self, ts: int) -> npt.NDArray[np.void]:
        """Take out what is older than `ts`, in order; the rest stays, in order too."""
        size = self.dtype.itemsize
        held: npt.NDArray[np.void] = order(
            np.frombuffer(bytes(memoryview(self.data)[: self.count * size]), self.dtype)
        )
        old = int(np.searchsorted(held["h"]["ts"], np.uint64(ts)))
        rest = held[old:].tobytes()
        self.data[: len(rest)] = rest
        self.count = len(rest) // size
        return held[:old]


def _outside(kind: str, records: npt.NDArray[np.void], which: npt.NDArray[np.bool_]) -> None:
    # Make records of faults those of no fault, as finish_event() of probes/bpf writes them.
    records["h"]["fault_ts"][which], records["h"]["vcpu"][which] = 0, -1
    if kind == "RELEASE":  # of a page, of which only the fault would tell whose it is
        records["h"]["vm"][which], records["gfn"][which] = 0, 0
    if kind == "SPTE":
        named = which & np.isin(records["cause"], _CAUSES_OF_FAULTS)
        records["cause"][named] = CAUSE["other"]


def head_of(task: Task, kind: int, op: int) -> bytes:
    """Return the constant part of a task's headers: inside of a fault, the vCPU is known."""
    inside = task.fault_ts > 0
    head = _HEAD.pack(task.cpu, kind, op, task.tid, task.tgid, task.vm,
                      task.vcpu if inside else -1, -1, 0)  # fmt: skip
    (task.heads_inside if inside else task.heads)[op if kind == _SPTE else kind << 8] = head
    return head


class Recorder:
    """Packs the records of one simulation and writes them; counts like the kernel's programs."""

    def __init__(self, writer: TraceWriter, cpus: int) -> None:
        self._writer = writer
        self._tamper: Tamper | None = None
        self._span = (0, FOREVER)
        self._skipped = np.zeros(cpus, "u4")
        self._faults, self._sptes = _Store(wire.FAULT), _Store(wire.EVENT)
        self._releases, self._events = _Store(wire.EVENT), _Store(wire.EVENT)
        self._notes: list[tuple[int, Mapping[str, Any]]] = []
        self._produced = np.zeros((len(wire.KINDS), cpus), "i8")
        self._lost = np.zeros((len(wire.KINDS), cpus), "i8")

    def suffer(self, tamper: Tamper | None, span: tuple[int, int]) -> None:
        """Record only what happens within `span` (ns); `tamper` may change what is left."""
        self._tamper, self._span = tamper, span

    @property
    def full(self) -> bool:
        """Is it time to write?"""
        held = self._faults.count + self._sptes.count + self._releases.count + self._events.count
        return held >= _HELD

    def spte(
        self, task: Task, ts: int, op: int, gfn: int, pfn: int, old: int, new: int, sptep: int,
        level: int, as_id: int, cause: int, mmu: int, page: Page,
    ) -> int:  # fmt: skip
        """Write a leaf change; returns its number on the cpu."""
        store = self._sptes
        at = store.count
        if at == store.room:
            store.grow()
        store.count = at + 1
        seq = task.seq
        task.seq = seq + 1
        fault_ts = task.fault_ts
        heads = task.heads_inside if fault_ts else task.heads
        head = heads.get(op) or head_of(task, _SPTE, op)
        _pack_spte(
            store.data, at * 120, ts, fault_ts, seq, head, gfn, pfn, old, new, sptep,
            level, as_id, cause, mmu, page.flags, page.count, page.mapcount,
            page.bits if pfn == page.pfn else TAIL_BITS, page.order,
        )  # fmt: skip
        return seq

    def release(self, task: Task, ts: int, call: int, gfn: int, pfn: int, page: Page) -> None:
        """Write a put or a mark; the page is as it was before."""
        store = self._releases
        at = store.count
        if at == store.room:
            store.grow()
        store.count = at + 1
        seq = task.seq
        task.seq = seq + 1
        fault_ts = task.fault_ts
        heads = task.heads_inside if fault_ts else task.heads
        head = heads.get(_RELEASE << 8) or head_of(task, _RELEASE, 0)
        _pack_release(
            store.data, at * 120, ts, fault_ts, seq, head, gfn, pfn, call,
            page.flags, page.count, page.mapcount,
            page.bits if pfn == page.pfn else TAIL_BITS, page.order,
        )  # fmt: skip

    def page_event(self, task: Task, ts: int, kind: int, page: Page) -> None:
        """Write that a page was freed or handed out; its VM is the one that mapped it."""
        store = self._events
        at = store.count
        if at == store.room:
            store.grow()
        store.count = at + 1
        seq = task.seq
        task.seq = seq + 1
        key = (kind << 8) | (page.vm << 16)
        head = task.heads.get(key)
        if head is None:
            head = task.heads[key] = _HEAD.pack(
                task.cpu, kind, 0, task.tid, task.tgid, page.vm, -1, -1, 0
            )
        _pack_page(
            store.data, at * 120, ts, 0, seq, head, page.pfn, page.block, page.flags, page.count,
            page.mapcount, page.bits, page.order,
        )  # fmt: skip

    def invalidation(
        self, task: Task, ts: int, op: int, low: int, high: int, seq: int, in_progress: int,
        cause: int, vm: int,
    ) -> None:  # fmt: skip
        """Write the start or the end of an invalidation of host memory."""
        store = self._events
        at = store.count
        if at == store.room:
            store.grow()
        store.count = at + 1
        number = task.seq
        task.seq = number + 1
        inside = task.fault_ts > 0
        heads = task.heads_inside if inside else task.heads
        key = _INVALIDATE << 8 | op << 16 | vm << 32
        head = heads.get(key)
        if head is None:
            vcpu = task.vcpu if inside else -1
            head = heads[key] = _HEAD.pack(
                task.cpu, _INVALIDATE, op, task.tid, task.tgid, vm, vcpu, -1, 0
            )
        _pack_invalidate(
            store.data, at * 120, ts, task.fault_ts, number, head, low, high, seq, in_progress,
            cause,
        )  # fmt: skip

    def event(
        self, task: Task, ts: int, kind: str, op: str = "none", *, gfn: int = 0, pfn: int = 0,
        a: int = 0, b: int = 0, c: int = 0, d: int = 0, as_id: int = 0, cause: int = 0,
        page: Page | None = None, vm: int | None = None, vcpu: int = -1,
    ) -> None:  # fmt: skip
        """Write any other event."""
        store = self._events
        if store.count == store.room:
            store.grow()
        state = _NO_PAGE
        if page is not None:
            bits = page.bits if pfn == page.pfn else TAIL_BITS
            state = (page.flags, page.count, page.mapcount, bits, page.order)
        head = _HEAD.pack(
            task.cpu, KIND[kind], OP[op], task.tid, task.tgid, task.vm if vm is None else vm,
            task.vcpu if task.fault_ts else vcpu, -1, 0,
        )  # fmt: skip
        EVENT_LAYOUT.pack_into(
            store.data, store.count * 120, ts, task.fault_ts, task.seq, head, gfn, pfn, a, b, c, d,
            0, as_id, cause, 0, *state,
        )  # fmt: skip
        store.count += 1
        task.seq += 1

    def fault_place(self, task: Task) -> tuple[bytearray, int, int, bytes]:
        """Make room for a FAULT, to be packed with FAULT_LAYOUT: memory, offset, seq, header."""
        store = self._faults
        at = store.count
        if at == store.room:
            store.grow()
        store.count = at + 1
        seq = task.seq
        task.seq = seq + 1
        head = task.heads_inside.get(_FAULT << 8) or head_of(task, _FAULT, 0)
        return store.data, at * 216, seq, head

    def note(self, ts: int, note: Mapping[str, Any]) -> None:
        """Keep a note for the next group that is written."""
        self._notes.append((ts, note))

    def flush(self, before: int) -> None:
        """Write everything older than `before` (ns)."""
        group: Group = [
            (kind, store.take_before(before))
            for kind, store in (
                ("FAULT", self._faults), ("SPTE", self._sptes), ("RELEASE", self._releases)
            )
        ]  # fmt: skip
        group = [part for part in group if len(part[1])]
        group += split_kinds(self._events.take_before(before))
        if self._span != (0, FOREVER):
            group = self._within(group)
        for kind, records in group:
            cpus = np.bincount(records["h"]["cpu"], minlength=self._produced.shape[1])
            self._produced[KIND[kind]] += cpus
        if self._tamper is not None:
            group = self._tampered(group)
        if before > self._span[0]:
            for ts, note in self._notes:
                self._writer.write_note(note, max(ts, self._span[0]))
            self._notes.clear()
        self._writer.write_group(group)
        self._writer.write_losses(self._counts(), min(before, self._span[1]))

    def _within(self, group: Group) -> Group:
        """Leave out what happened before the recorder was armed and after it was killed.

        Numbers of records begin with 0 when it is armed. A fault that was under way then is not
        seen, since its entry had no probe: what happens in it seems to happen in none.
        """
        first, last = self._span
        left = []
        for kind, records in group:
            ts, cpu = records["h"]["ts"], records["h"]["cpu"]
            under_way = (records["h"]["fault_ts"] != 0) & (records["h"]["fault_ts"] < first)
            early = (ts < first) | (under_way & (kind in _OF_FAULTS))
            self._skipped += np.bincount(cpu[early], minlength=len(self._skipped)).astype("u4")
            kept = records[~early & (ts < last)].copy()
            kept["h"]["seq"] -= self._skipped[kept["h"]["cpu"]]
            _outside(kind, kept, under_way[~early & (ts < last)])
            if len(kept):
                left.append((kind, kept))
        return left

    def _tampered(self, group: Group) -> Group:
        assert self._tamper is not None
        left, written = self._tamper(group)
        for sign, records in ((1, group), (-1, left)):
            for kind, part in records:
                cpus = np.bincount(part["h"]["cpu"], minlength=self._lost.shape[1])
                self._lost[KIND[kind]] += sign * cpus[: self._lost.shape[1]]
        return written

    def _counts(self) -> dict[str, list[tuple[int, int, int, int]]]:
        return {
            kind: [
                (int(made), int(lost), 0, 0)
                for made, lost in zip(self._produced[number], self._lost[number], strict=True)
            ]
            for kind, number in KIND.items()
            if kind != "NONE"
        }

    def totals(self) -> dict[str, dict[str, int]]:
        """Return the counts by kind, as the end mark of a recording has them."""
        return {
            kind: {
                "produced": int(self._produced[number].sum()),
                "lost": int(self._lost[number].sum()),
                "filtered": 0,
                "torn": 0,
            }
            for kind, number in KIND.items()
            if kind != "NONE"
        }
