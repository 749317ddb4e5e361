"""What a generation explains: recorded events run through the model's rules, one at a time.

Each rule says what the kernel's code makes happen next, from the fields of `kernels.Kernel` and
from what was recorded before; a record that no rule expects is a divergence. Values that the
processor sets by itself (accessed, dirty) and counts that others may hold are left open.
May import: standard library, `tracer.simulator.kernels`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from tracer.simulator.kernels import REFCOUNTED_BIT, Kernel

__all__ = ("Model",)

Row = Mapping[str, Any]

_MMU_PRESENT, _LARGE, _WRITABLE = 1 << 11, 1 << 7, 1 << 1
_LOG_DIRTY = 1
#: Tasks that invalidate memory of one VM at the same moment.
_TASKS_MAX = 64
_MARKS = ("mark_accessed", "mark_dirty")
#: RELEASE calls that others than faults make: kvm_vcpu_unmap(), gfn_to_page() users.
_PAGE_PUTS = ("page_clean", "page_dirty", "pfn_clean", "pfn_dirty")


@dataclasses.dataclass(slots=True)
class _Leaf:
    key: tuple[int, ...]
    pfn: int
    pages: int
    spte: int
    #: a leaf of the same frame came while this one was there: it must be of a root on its way out
    left_behind: bool = False


@dataclasses.dataclass(slots=True)
class _Fault:
    leaves: int = 0
    puts: int = 0
    put_pfns: list[int] = dataclasses.field(default_factory=list)
    prefetched: int = -1
    inner: tuple[str, int] = ("", -1)
    pfns: list[int] = dataclasses.field(default_factory=list)


class _Vm:
    def __init__(self) -> None:
        self.created = False
        self.slots: dict[tuple[int, int], tuple[int, int, int]] = {}
        self.leaves: dict[tuple[int, ...], list[_Leaf]] = {}
        self.seq: int | None = None
        self.in_progress = 0
        #: when a slot was deleted or moved last (ns)
        self.changed_at = 0
        self.pins: dict[int, int] = {}
        #: faults that found their root or slot gone, until a memslot change explains them
        self.unexplained: list[tuple[int, Row]] = []
        self.invalidating: dict[int, int] = {}
        #: numbers of the notifier that only another task's next record can explain
        self.overtaken: list[tuple[int, Row, str]] = []


class Model:
    """One kernel's rules and the state that the records so far have led to."""

    def __init__(self, kernel: Kernel, accessed: int, dirty: int, address: int) -> None:
        self._kernel = kernel
        self._accessed, self._dirty, self._address = accessed, dirty, address
        self._vms: dict[int, _Vm] = {}
        self._faults: dict[tuple[int, int], _Fault] = {}
        #: marks that a thread's zap or write protection makes next, and its last pin
        self._due: dict[int, list[tuple[str, int]]] = {}
        self._unpinned: dict[int, int] = {}
        self._mapped: dict[int, int] = {}
        self._freed: set[int] = set()
        self._rules = {
            "FAULT": self._fault, "SPTE": self._spte, "RELEASE": self._release,
            "INVALIDATE": self._invalidate, "PAGE_FREE": self._free, "PAGE_ALLOC": self._alloc,
            "PIN": self._pin, "SLOT": self._slot, "VM": self._vm, "VMA": self._vma,
        }  # fmt: skip

    def expects(self, row: Row) -> str:
        """Take the next record; return "" if the model explains it, else what it expected."""
        if row["kind"] not in ("RELEASE", "PAGE_FREE", "PAGE_ALLOC"):
            due = self._due.get(row["tid"])
            if due:
                call, pfn = due[0]
                return f"first {call} of pfn {pfn:#x}, which its SPTE had accessed or dirty"
        return self._rules[row["kind"]](row)

    def leftovers(self) -> tuple[Row, str] | None:
        """Return a record that only the future could have explained, and did not."""
        for vm in self._vms.values():
            if vm.unexplained:
                return vm.unexplained[0][1], "a memslot change that made the root obsolete"
            if vm.overtaken:
                return vm.overtaken[0][1], vm.overtaken[0][2]
        return None

    def _state(self, row: Row) -> _Vm:
        vm = self._vms.get(row["vm"])
        if vm is None:
            vm = self._vms[row["vm"]] = _Vm()
        return vm

    # --- leaves ----------------------------------------------------------------------------------

    def _is_leaf(self, spte: int, level: int) -> bool:
        return bool(spte & _MMU_PRESENT) and (level == 1 or bool(spte & _LARGE))

    def _spte(self, row: Row) -> str:
        vm, level = self._state(row), row["level"]
        shadow = row["mmu"] == "shadow"
        key = (row["sptep"],) if shadow else (row["as_id"], level, row["gfn"])
        if row["fault_ts"] is not None:
            fault = self._open(row)
            if fault.prefetched >= 0:
                return f"the put of the prefetched pfn {fault.prefetched:#x}"
            if row["op"] != "zap":
                fault.leaves += 1
                fault.pfns.append(row["pfn"])
            fault.prefetched = row["pfn"] if row["cause"] == "prefetch" else -1
        return getattr(self, f"_{row['op']}")(row, vm, key, shadow)  # type: ignore[no-any-return]

    def _install(self, row: Row, vm: _Vm, key: tuple[int, ...], shadow: bool) -> str:
        old, new, pfn = row["old"], row["new"], row["pfn"]
        if self._is_leaf(old, row["level"]) or not self._is_leaf(new, row["level"]):
            return "an install over what is no leaf"
        if (new & self._address) >> 12 != pfn:
            return f"the frame of the SPTE, {(new & self._address) >> 12:#x}"
        bit = self._kernel.bit_shadow if shadow else self._kernel.bit_tdp
        if new & REFCOUNTED_BIT and not bit:
            return "no bit 59 in this generation's SPTEs"
        if row["fault_ts"] is None and row["cause"] in ("fault", "prefetch"):
            return "a fault around an install of cause fault"
        pages = 1 << 9 * (row["level"] - 1)
        if vm.slots and not self._in_slot(vm, row["as_id"], row["gfn"], pages):
            return "a memslot around this gfn"
        if pfn in self._freed:
            return f"that pfn {pfn:#x} was handed out again since it was freed"
        there = vm.leaves.setdefault(key, [])
        if there and shadow:
            return "a zap of the leaf that this SPTE held"
        for leaf in there:
            leaf.left_behind = True
        there.append(_Leaf(key, pfn, pages, new))
        self._count(pfn, pages, 1)
        return ""

    @staticmethod
    def _in_slot(vm: _Vm, as_id: int, gfn: int, pages: int) -> bool:
        return any(
            place == as_id and base <= gfn and gfn + pages <= base + npages
            for (place, _), (base, npages, _) in vm.slots.items()
        )

    def _count(self, pfn: int, pages: int, more: int) -> None:
        mapped = self._mapped
        for frame in range(pfn, pfn + pages):
            left = mapped.get(frame, 0) + more
            if left > 0:
                mapped[frame] = left
            else:
                mapped.pop(frame, None)

    def _leaf(self, row: Row, vm: _Vm, key: tuple[int, ...]) -> tuple[_Leaf | None, str]:
        for leaf in vm.leaves.get(key, ()):
            if leaf.pfn == row["pfn"]:
                hardware = self._accessed | self._dirty
                if (leaf.spte ^ row["old"]) & ~hardware:
                    return leaf, f"the SPTE as it was left, {leaf.spte:#x}"
                return leaf, ""
        if not vm.created:
            return None, ""
        return None, "an install of this leaf before"

    def _change(self, row: Row, vm: _Vm, key: tuple[int, ...], shadow: bool) -> str:
        leaf, why = self._leaf(row, vm, key)
        if why:
            return why
        old, new, cause = row["old"], row["new"], row["cause"]
        if (old ^ new) & self._address:
            return "the same frame: a frame changes by a zap and an install"
        if leaf is not None:
            leaf.spte = new
        if cause == "aging" and new & self._accessed and self._accessed:
            return "aging to clear the accessed bit"
        if cause == "dirty_log":
            if new & _WRITABLE and new & self._dirty:
                return "dirty logging to take write access or the dirty bit away"
            if self._kernel.dirty_log_marks and not shadow:
                self._due.setdefault(row["tid"], []).append(("mark_dirty", row["pfn"]))
        if cause == "fault" and old & self._dirty and not new & self._dirty:
            # handle_changed_spte_dirty_log(), mmu_spte_update(): a dirty bit that goes is passed on
            if self._kernel.zap_marks != "none":
                self._due.setdefault(row["tid"], []).append(("mark_dirty", row["pfn"]))
        if cause == "fast" and not new & _WRITABLE:
            return "a fast fault to give write access back"
        return ""

    def _zap(self, row: Row, vm: _Vm, key: tuple[int, ...], shadow: bool) -> str:
        leaf, why = self._leaf(row, vm, key)
        if why:
            return why
        if leaf is not None:
            vm.leaves[key].remove(leaf)
            self._count(leaf.pfn, leaf.pages, -1)
        kernel = self._kernel
        has_bit = kernel.bit_shadow if shadow else kernel.bit_tdp
        if kernel.zap_marks == "all" or row["old"] & REFCOUNTED_BIT or not has_bit:
            marks = [("mark_dirty", self._dirty), ("mark_accessed", self._accessed)]
            due = [
                (call, row["pfn"])
                for call, bit in (reversed(marks) if shadow else marks)
                if row["old"] & bit
            ]
            if due and self._kernel.zap_marks != "none":
                self._due[row["tid"]] = due
        return ""

    # --- references ------------------------------------------------------------------------------

    def _open(self, row: Row) -> _Fault:
        key = (row["tid"], row["fault_ts"])
        fault = self._faults.get(key)
        if fault is None:
            fault = self._faults[key] = _Fault()
        return fault

    def _release(self, row: Row) -> str:
        call, pfn, tid = row["call"], row["pfn"], row["tid"]
        due = self._due.get(tid)
        if call in _MARKS:
            if due and due[0] == (call, pfn):
                due.pop(0)
                return ""
            kernel = self._kernel
            marks = kernel.fault_mark or kernel.shadow_fault_mark
            if row["fault_ts"] is not None and marks and call == "mark_accessed":
                return ""
            if due:
                return f"{due[0][0]} of pfn {due[0][1]:#x}"
            return "no mark: no zap or write protection called for one"
        if due:
            return f"first {due[0][0]} of pfn {due[0][1]:#x}"
        if row["fault_ts"] is None:
            if call in _PAGE_PUTS and self._unpinned.get(tid) == pfn:
                del self._unpinned[tid]
                return ""
            return "a put outside of faults only where a pin ends"
        fault = self._open(row)
        if fault.prefetched == pfn and call == self._kernel.prefetch_call:
            fault.prefetched = -1
            return ""
        if fault.inner == (call, pfn):
            # kvm_release_page_*() inside of the put shows by itself if the count changed between
            fault.inner = ("", -1)
            return ""
        if call != self._kernel.put_call:
            return f"the put of this generation, {self._kernel.put_call or 'which cannot be seen'}"
        fault.puts += 1
        fault.put_pfns.append(pfn)
        fault.inner = ("page_dirty" if call == "finish_fault" else "page_clean", pfn)
        return ""

    def _fault(self, row: Row) -> str:
        fault = self._faults.pop((row["tid"], row["fault_ts"]), None) or _Fault()
        vm, kernel = self._state(row), self._kernel
        if fault.prefetched >= 0:
            return f"the put of the prefetched pfn {fault.prefetched:#x}"
        if min(fault.leaves, 255) != row["sptes"]:
            return f"as many SPTE records as it counts, {row['sptes']}, not {fault.leaves}"
        stages = [row[name] for name in ("t_faultin", "t_gup", "t_faultin_end", "t_map")]
        reached = [stage for stage in stages if stage is not None]
        if reached != sorted(reached) or (reached and reached[-1] > row["dur"]):
            return "stages one after another"
        wrong = self._puts(row, fault)
        if wrong:
            return wrong
        result = row["result"]
        if result == "fixed" and not fault.leaves:
            return "an install or a change in a fault that fixed something"
        if result in ("retry", "error") and fault.leaves:
            return f"no leaf from a fault that ended with {result}"
        changed = vm.changed_at >= row["fault_ts"]
        if result == "retry" and not changed and not self._retries(row):
            vm.unexplained.append((row["ts"], row))
        if result == "error":
            return self._refusal(row, kernel)
        return ""

    def _puts(self, row: Row, fault: _Fault) -> str:
        kernel, pfn = self._kernel, row["pfn"]
        if kernel.put_call:
            good = row["faultin_ret"] != -1 and pfn is not None and not pfn >> 52
            held = bool(row["refcounted"]) if kernel.says_refcounted else True
            expected = int(good and held)
            if row["result"] == "retry" and row["faultin_ret"] == row["ret"]:
                expected = int(good and held and bool(kernel.retry_call))
            if fault.puts != expected:
                return f"{expected} {kernel.put_call}, not {fault.puts}"
            if expected and fault.put_pfns[0] != pfn:
                return f"the put of the page that fault-in found, pfn {pfn:#x}"
        return ""

    @staticmethod
    def _retries(row: Row) -> bool:
        """Does the record itself say why the fault was tried again?"""
        return bool(row["mmu_seq"] != row["invalidate_seq"] or row["in_progress"] > 0)

    @staticmethod
    def _refusal(row: Row, kernel: Kernel) -> str:
        if row["slot"] is None or row["pfn"] is None or not row["pfn"] >> 52:
            return ""
        if kernel.pfnmap == "unless_zero" and row["walk_pfn"] is not None:
            counted = row["refcount"] is not None and row["refcount"] > 0
            return "a mapping: the page has a count" if counted else ""
        if row["walk_pfn"] is not None and row["refcount"] == 0 and not kernel.shadow_refuses:
            return "a mapping: this generation maps pages without a count"
        return ""

    # --- the notifier ----------------------------------------------------------------------------

    def _invalidate(self, row: Row) -> str:
        vm = self._state(row)
        low, high = row["hva"], row["hva_end"]
        covers = any(
            hva < high and low < hva + (npages << 12) for _, npages, hva in vm.slots.values()
        )
        if vm.seq is None:
            vm.seq = row["invalidate_seq"] - (1 if covers and row["op"] == "end" else 0)
        if row["op"] == "start":
            vm.invalidating[row["tid"]] = int(covers)
            vm.in_progress += covers
        else:
            covers = bool(vm.invalidating.pop(row["tid"], covers))
            vm.seq += covers
            vm.in_progress -= covers
        vm.overtaken = [entry for entry in vm.overtaken if entry[0] == row["tid"]]
        if row["invalidate_seq"] != vm.seq:
            return self._overtaken(vm, row, f"mmu_invalidate_seq {vm.seq}")
        if row["in_progress"] != vm.in_progress:
            return self._overtaken(vm, row, f"mmu_invalidate_in_progress {vm.in_progress}")
        return ""

    @staticmethod
    def _overtaken(vm: _Vm, row: Row, expected: str) -> str:
        """Another task may have changed the number already: then its record comes next."""
        if abs(row["invalidate_seq"] - (vm.seq or 0)) > _TASKS_MAX:
            return expected
        vm.overtaken.append((row["tid"], row, expected))
        return ""

    # --- pages, pins, slots, VMs -----------------------------------------------------------------

    def _free(self, row: Row) -> str:
        first = row["pfn"]
        if first is None:
            return ""
        for pfn in range(first, first + (1 << (row["order"] or 0))):
            if pfn in self._mapped:
                return f"a zap of every leaf that maps pfn {pfn:#x}"
        self._freed.add(first)
        return ""

    def _alloc(self, row: Row) -> str:
        first = row["pfn"] or 0
        self._freed.difference_update(range(first, first + (1 << (row["order"] or 0))))
        return ""

    def _pin(self, row: Row) -> str:
        vm = self._state(row)
        if row["op"] == "map" and row["ret"] == 0:
            vm.pins[row["pfn"]] = vm.pins.get(row["pfn"], 0) + 1
        elif row["op"] == "unmap":
            self._unpinned[row["tid"]] = row["pfn"]
            if vm.pins.get(row["pfn"], 0) < 1 and vm.created:
                return "a map before the unmap"
            vm.pins[row["pfn"]] = vm.pins.get(row["pfn"], 1) - 1
        return ""

    def _slot(self, row: Row) -> str:
        vm = self._state(row)
        key, place = (row["as_id"], row["slot"]), (row["gfn"], row["npages"], row["hva"])
        known = vm.slots.get(key)
        op = row["op"]
        if op in ("delete", "move"):
            if vm.created and known is None:
                return f"a slot {key[1]} before it is {op}d"
            vm.unexplained.clear()
            vm.changed_at = row["ts"]
            for leaves in vm.leaves.values():
                if any(leaf.left_behind for leaf in leaves):
                    return "every leaf of the old roots to be zapped by now"
        if op == "create" and known is not None:
            return f"the slot {key[1]} to be deleted before it is created again"
        if op == "flags" and known is not None and known != place:
            return "only the flags to change"
        if op == "delete":
            vm.slots.pop(key, None)
        else:
            vm.slots[key] = place
        return ""

    def _vm(self, row: Row) -> str:
        vm = self._state(row)
        if row["op"] == "create":
            vm.created = True
        elif row["op"] == "delete":
            left = sum(len(leaves) for leaves in vm.leaves.values())
            if left:
                return f"a zap of the {left} leaves that are left"
            vm.unexplained.clear()
        return ""

    @staticmethod
    def _vma(row: Row) -> str:
        return ""
