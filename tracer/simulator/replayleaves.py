"""The rules of leaves: what may be installed, changed and zapped, and which marks a zap calls for.

Sources: make_spte(), handle_changed_spte(), drop_spte(), arch/x86/kvm/mmu; KVM-FACTS 0.1, 2.3, 5.
May import: standard library, `tracer.simulator`.
"""

import dataclasses
from collections.abc import Mapping

from tracer.simulator.kernels import REFCOUNTED_BIT, Kernel
from tracer.simulator.replaystate import FaultSoFar, LeafSeen, Pending, Row, VmSeen

__all__ = ("LeafRules", "Sight")

MMU_PRESENT, LARGE, WRITABLE, NX = 1 << 11, 1 << 7, 1 << 1, 1 << 63
#: Bits of the column page_bits (`probes.wire`).
ZERO_PAGE = 16
_READ_ONLY_SLOT = 2
#: Longest time by which an install's record may come after that of the change that follows it. ns
_LATE_NS = 10**8
_NO_INSTALL = "an install of this leaf before"


@dataclasses.dataclass(frozen=True, slots=True)
class Sight:
    """How the recording sees the kernel: masks of its SPTEs, and whether marks have a probe."""

    accessed: int = 0
    dirty: int = 0
    host_writable: int = 0
    address: int = 0x000F_FFFF_FFFF_F000
    marks: bool = True
    #: PG_lru in page->flags: a page that has it is in no LRU batch; 0 if the trace does not say
    lru: int = 0
    #: host ranges [start, end) of private anonymous memory
    anonymous: tuple[tuple[int, int], ...] = ()
    #: page -> pfn caches that ever had it: each holds a reference for a moment before its record
    cached: Mapping[int, int] = dataclasses.field(default_factory=dict)


class LeafRules:
    """The SPTE records."""

    def __init__(self, kernel: Kernel, sight: Sight) -> None:
        self._kernel, self.sight = kernel, sight
        self._number = 0
        self._vms: dict[int, VmSeen] = {}
        self._faults: dict[tuple[int, int], FaultSoFar] = {}
        #: marks that a thread's zap or write protection makes next
        self._due: dict[int, list[tuple[str, int]]] = {}
        self._mapped: dict[int, int] = {}
        self._freed: set[int] = set()

    def _state(self, row: Row) -> VmSeen:
        vm = self._vms.get(row["vm"])
        if vm is None:
            vm = self._vms[row["vm"]] = VmSeen()
        return vm

    def _open(self, row: Row) -> FaultSoFar:
        key = (row["tid"], row["fault_ts"])
        fault = self._faults.get(key)
        if fault is None:
            fault = self._faults[key] = FaultSoFar()
        return fault

    def _is_leaf(self, spte: int, level: int) -> bool:
        return bool(spte & MMU_PRESENT) and (level == 1 or bool(spte & LARGE))

    def _spte(self, row: Row) -> str:
        vm, level = self._state(row), row["level"]
        shadow = row["mmu"] == "shadow"
        key = (row["sptep"],) if shadow else (row["as_id"], level, row["gfn"])
        if row["fault_ts"] is not None:
            fault = self._open(row)
            wrong = self._prefetch_put(vm, fault, row["cause"] == "prefetch")
            if wrong:
                return wrong
            if row["op"] != "zap":
                fault.leaves += 1
            if row["cause"] == "prefetch":
                fault.prefetched, fault.table = row["pfn"], (row["sptep"] or 0) & ~0xFFF
            elif row["op"] == "install":
                fault.installed = (self._number, row, vm.seq_shown)
        if row["op"] == "install":
            return self._install(row, vm, key, shadow)
        if row["op"] == "change":
            return self._change(row, vm, key, shadow)
        return self._zap(row, vm, key, shadow)

    def _prefetch_put(self, vm: VmSeen, fault: FaultSoFar, again: bool) -> str:
        """Was the put of the last prefetched page seen, where it can be?

        direct_pte_prefetch_many() puts with an inline put_page() up to 6.12, prefetch_gpte() by a
        call: which one it is, the first put in each page table tells.
        """
        pfn, fault.prefetched = fault.prefetched, -1
        if pfn < 0:
            return ""
        kernel = self._kernel
        if kernel.prefetch_direct_call != kernel.prefetch_call and not vm.tables.get(fault.table):
            return ""
        return f"the put of the prefetched pfn {pfn:#x}" + (" before the next" if again else "")

    def _install(self, row: Row, vm: VmSeen, key: tuple[int, ...], shadow: bool) -> str:
        old, new, pfn = row["old"], row["new"], row["pfn"]
        if self._is_leaf(old, row["level"]) or not self._is_leaf(new, row["level"]):
            return "an install over what is no leaf"
        if (new & self.sight.address) >> 12 != pfn:
            return f"the frame of the SPTE, {(new & self.sight.address) >> 12:#x}"
        bit = self._kernel.bit_shadow if shadow else self._kernel.bit_tdp
        if new & REFCOUNTED_BIT and not bit:
            return "no bit 59 in this generation's SPTEs"
        if row["fault_ts"] is None and row["cause"] in ("fault", "prefetch"):
            return "a fault around an install of cause fault"
        pages = 1 << 9 * (row["level"] - 1)
        flags = self._slot_flags(vm, row["as_id"], row["gfn"], pages)
        if vm.slots and flags is None:
            return "a memslot around this gfn"
        if new & (WRITABLE | self.sight.host_writable):
            if (row["page_bits"] or 0) & ZERO_PAGE:
                return (
                    "neither write access nor the host-writable bit: nobody may write to the zero "
                    "page"
                )
            if (flags or 0) & _READ_ONLY_SLOT and new & WRITABLE:
                return "no write access: the slot is read-only"
        if pfn in self._freed:
            return f"that pfn {pfn:#x} was handed out again since it was freed"
        early = vm.early.pop((key, pfn), None)
        if early is not None:
            return self._late(row, early)
        there = vm.leaves.get(key, ())
        if there and shadow:
            return "a zap of the leaf that this SPTE held"
        for leaf in there:
            leaf.left_behind = True
        self._there(vm, LeafSeen(key, pfn, pages, new, row["as_id"], row["gfn"]))
        return ""

    def _late(self, row: Row, early: Pending) -> str:
        """Take an install whose record comes behind that of a change by another vCPU.

        The probe runs after the SPTE was written: between the two the other vCPU found the leaf.
        """
        began = row["fault_ts"] is not None and row["fault_ts"] <= early.row["ts"]
        soon = row["ts"] - early.row["ts"] <= _LATE_NS
        if early.tid == row["tid"] or not began or not soon:
            return "no install: the leaf was there already when another vCPU changed it"
        if (row["new"] ^ early.row["old"]) & ~(self.sight.accessed | self.sight.dirty):
            return f"the SPTE that another vCPU changed, {early.row['old']:#x}"
        return ""

    def _there(self, vm: VmSeen, leaf: LeafSeen) -> None:
        vm.put(leaf)
        self._count(leaf.pfn, leaf.pages, 1)

    @staticmethod
    def _slot_flags(vm: VmSeen, as_id: int, gfn: int, pages: int) -> int | None:
        for (place, _), (base, npages, _, flags) in vm.slots.items():
            if place == as_id and base <= gfn and gfn + pages <= base + npages:
                return flags
        return None

    def _count(self, pfn: int, pages: int, more: int) -> None:
        mapped = self._mapped
        for frame in range(pfn, pfn + pages):
            left = mapped.get(frame, 0) + more
            if left > 0:
                mapped[frame] = left
            else:
                mapped.pop(frame, None)

    def _leaf(self, row: Row, vm: VmSeen, key: tuple[int, ...]) -> tuple[LeafSeen | None, str]:
        for leaf in vm.leaves.get(key, ()):
            if leaf.pfn == row["pfn"]:
                free = self.sight.accessed | self.sight.dirty | (NX if leaf.split else 0)
                if (leaf.spte ^ row["old"]) & ~free:
                    return leaf, f"the SPTE as it was left, {leaf.spte:#x}"
                return leaf, ""
        if not vm.created:
            return None, ""
        return None, _NO_INSTALL

    def _change(self, row: Row, vm: VmSeen, key: tuple[int, ...], shadow: bool) -> str:
        leaf, why = self._leaf(row, vm, key)
        if why == _NO_INSTALL and row["fault_ts"] is not None and not shadow:
            pfn, pages = row["pfn"], 1 << 9 * (row["level"] - 1)
            self._there(vm, LeafSeen(key, pfn, pages, row["new"], row["as_id"], row["gfn"]))
            vm.early[key, pfn] = Pending(self._number, row, why, row["tid"])
        elif why:
            return why
        old, new, cause, sight = row["old"], row["new"], row["cause"], self.sight
        if (old ^ new) & sight.address:
            return "the same frame: a frame changes by a zap and an install"
        if leaf is not None:
            leaf.spte, leaf.split = new, False
        if new & WRITABLE and not old & WRITABLE and (row["page_bits"] or 0) & ZERO_PAGE:
            return "no write access: nobody may write to the zero page"
        if cause == "aging" and new & sight.accessed and sight.accessed:
            return "aging to clear the accessed bit"
        if cause == "dirty_log":
            if new & WRITABLE and new & sight.dirty:
                return "dirty logging to take write access or the dirty bit away"
            if self._kernel.dirty_log_marks and not shadow and self._passes_on(old, shadow):
                self._owe(row, [("mark_dirty", row["pfn"])], more=True)
        if cause == "fault" and old & sight.dirty and not new & sight.dirty:
            # handle_changed_spte_dirty_log(), mmu_spte_update(): a dirty bit that goes is passed on
            if self._passes_on(old, shadow):
                self._owe(row, [("mark_dirty", row["pfn"])], more=True)
        if cause == "fast" and not new & WRITABLE:
            return "a fast fault to give write access back"
        return ""

    def _owe(self, row: Row, due: list[tuple[str, int]], *, more: bool = False) -> None:
        """Expect these marks of the thread next, if marks have a probe."""
        if self.sight.marks and due:
            there = self._due.get(row["tid"]) if more else None
            self._due[row["tid"]] = [*(there or ()), *due]

    def _zap(self, row: Row, vm: VmSeen, key: tuple[int, ...], shadow: bool) -> str:
        leaf, why = self._leaf(row, vm, key)
        if why:
            return why
        if leaf is not None:
            vm.take(leaf)
            self._count(leaf.pfn, leaf.pages, -1)
            if row["new"] & MMU_PRESENT and row["level"] > 1 and not shadow:
                self._split(row, vm, leaf)
        if self._passes_on(row["old"], shadow):
            marks = [("mark_dirty", self.sight.dirty), ("mark_accessed", self.sight.accessed)]
            due = [
                (call, row["pfn"])
                for call, bit in (reversed(marks) if shadow else marks)
                if row["old"] & bit
            ]
            self._owe(row, due)
        return ""

    def _passes_on(self, spte: int, shadow: bool) -> bool:
        """Does the kernel pass the accessed and dirty bits of this SPTE on to the page?

        The series asks the bit first, is_refcounted_page_spte(): KVM-FACTS 2.3.
        """
        kernel = self._kernel
        has_bit = kernel.bit_shadow if shadow else kernel.bit_tdp
        if kernel.zap_marks == "bit":
            return bool(spte & REFCOUNTED_BIT) or not has_bit
        return kernel.zap_marks == "all"

    def _split(self, row: Row, vm: VmSeen, parent: LeafSeen) -> None:
        """tdp_mmu_split_huge_page(): a table of 512 smaller leaves takes the large one's place."""
        level = row["level"] - 1
        pages = 1 << 9 * (level - 1)
        spte = row["old"] if level > 1 else row["old"] & ~LARGE
        for at in range(0, parent.pages, pages):
            gfn = parent.gfn + at
            self._there(vm, LeafSeen(
                (parent.as_id, level, gfn), parent.pfn + at, pages, spte + (at << 12),
                parent.as_id, gfn, split=True,
            ))  # fmt: skip
