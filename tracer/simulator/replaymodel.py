"""What a generation explains: recorded events run through the model's rules, one at a time.

Each rule says what the kernel's code makes happen next, from the fields of `kernels.Kernel` and
from what was recorded before; a record that no rule expects is a divergence. Values that the
processor sets by itself (accessed, dirty) and counts that others may hold are left open.
May import: standard library, `tracer.simulator`.
"""

from tracer.simulator.kernels import Kernel
from tracer.simulator.replayfaults import FaultRules
from tracer.simulator.replayleaves import Sight
from tracer.simulator.replaystate import Pending, Row, VmSeen

__all__ = ("Model",)

#: Tasks that invalidate memory of one VM at the same moment.
_TASKS_MAX = 64
#: How long a memslot change or an invalidation may take at the recording's end.
_OPEN_NS = 1_000_000_000


class Model(FaultRules):
    """One kernel's rules and the state that the records so far have led to."""

    def __init__(self, kernel: Kernel, sight: Sight) -> None:
        super().__init__(kernel, sight)
        self._now = 0
        self._rules = {
            "FAULT": self._fault, "SPTE": self._spte, "RELEASE": self._release,
            "INVALIDATE": self._invalidate, "PAGE_FREE": self._free, "PAGE_ALLOC": self._alloc,
            "PIN": self._pin, "SLOT": self._slot, "VM": self._vm, "VMA": self._vma,
        }  # fmt: skip

    def expects(self, row: Row) -> str:
        """Take the next record; return "" if the model explains it, else what it expected.

        `blamed` is then a record before it that turned out to be wrong, if there is one.
        """
        self._number += 1
        self._now = row["ts"]
        if row["kind"] not in ("RELEASE", "PAGE_FREE", "PAGE_ALLOC"):
            due = self._due.get(row["tid"])
            if due:
                call, pfn = due[0]
                return f"first {call} of pfn {pfn:#x}, which its SPTE had accessed or dirty"
        if row["fault_ts"] is not None or row["kind"] in ("PIN", "SLOT", "VM"):
            self._begun.add(row["tid"])
        return self._rules[row["kind"]](row)

    def leftovers(self) -> None:
        """The recording is over: blame the first record that only the future could explain.

        Where the VM lives on, what its last second left open may still be explained by then.
        """
        # What has no VM is over when all of them are.
        known = [vm for number, vm in self._vms.items() if number]
        none_left = bool(known) and all(vm.gone for vm in known)
        for number, vm in self._vms.items():
            over = vm.gone or (not number and none_left)
            for entry in (*vm.unexplained, *vm.overtaken, *vm.cached.values(), *vm.early.values()):
                if over or entry.row["ts"] < self._now - _OPEN_NS:
                    self._blame(entry.number, entry.row, entry.expected)

    # --- the notifier ----------------------------------------------------------------------------

    def _invalidate(self, row: Row) -> str:
        vm = self._state(row)
        low, high = row["hva"], row["hva_end"]
        ranges = list(vm.covered(low, high))
        covers = bool(ranges)
        if vm.seq is None:
            vm.seq = row["invalidate_seq"] - (1 if covers and row["op"] == "end" else 0)
        if row["op"] == "start":
            vm.invalidating[row["tid"]] = int(covers)
            vm.in_progress += covers
            for as_id, first, last in ranges:
                for leaf in vm.mapped_in(as_id, first, last):
                    return (
                        f"a zap of the leaf of gfn {leaf.gfn:#x} (pfn {leaf.pfn:#x}), which the "
                        "range covers, before range_start returns"
                    )
        else:
            covers = bool(vm.invalidating.pop(row["tid"], covers and not vm.settled))
            vm.seq += covers
            vm.in_progress -= covers
            if covers:
                vm.ends.append(row["ts"])
        vm.seq_shown = max(vm.seq_shown, row["invalidate_seq"])
        wanted = (row["invalidate_seq"], row["in_progress"])
        if not vm.created and not self._settled(vm, row, covers):
            return ""
        if wanted == (vm.seq, vm.in_progress):
            # Who was overtaken shows what another task had done by then, whose record came later.
            vm.overtaken = [entry for entry in vm.overtaken if entry.tid == row["tid"]]
            return ""
        expected = (
            f"mmu_invalidate_seq {vm.seq}"
            if wanted[0] != vm.seq
            else f"mmu_invalidate_in_progress {vm.in_progress}"
        )
        if abs(wanted[0] - vm.seq) > _TASKS_MAX:
            return expected
        vm.overtaken.append(Pending(self._number, row, expected, row["tid"]))
        return ""

    @staticmethod
    def _settled(vm: VmSeen, row: Row, covers: bool) -> bool:
        """Is it known what is in progress in a VM that is older than the recording?

        From the first end on that leaves nothing in progress. An invalidation of a slot that no
        fault has shown yet is counted by KVM and not here: then it is so again.
        """
        wanted = (row["invalidate_seq"], row["in_progress"])
        if not covers and wanted != (vm.seq, vm.in_progress):
            vm.settled = False
        if vm.settled:
            return True
        vm.seq, vm.in_progress = wanted
        if row["op"] == "end" and not row["in_progress"]:
            vm.settled = True
            vm.invalidating.clear()
            vm.overtaken.clear()
        return False

    # --- pages, pins, slots, VMs -----------------------------------------------------------------

    def _free(self, row: Row) -> str:
        first = row["pfn"]
        if first is None:
            return ""
        for pfn in range(first, first + (1 << (row["order"] or 0))):
            self._driver_counts.pop(pfn, None)
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
        if row["op"] == "refresh":
            vm.cached.pop(row["tid"], None)
        elif row["op"] == "map" and row["ret"] == 0:
            vm.pins.setdefault(row["pfn"], []).append((self._number, row))
        elif row["op"] == "unmap":
            self._unpinned[row["tid"]] = row["pfn"]
            there = vm.pins.get(row["pfn"])
            if there:
                there.pop()
            elif vm.created:
                return "a map before the unmap"
        return ""

    def _slot(self, row: Row) -> str:
        vm = self._state(row)
        key = (row["as_id"], row["slot"])
        place = (row["gfn"], row["npages"], row["hva"], row["slot_flags"] or 0)
        known = vm.slots.get(key)
        op = row["op"]
        if op in ("delete", "move"):
            if vm.created and known is None:
                return f"a slot {key[1]} before it is {op}d"
            vm.unexplained.clear()
            vm.changed_at = row["ts"]
            vm.changes += 1
            for leaves in vm.leaves.values():
                if any(leaf.left_behind for leaf in leaves):
                    return "every leaf of the old roots to be zapped by now"
        if op == "create" and known is not None:
            return f"the slot {key[1]} to be deleted before it is created again"
        if op == "flags" and known is not None and known[:3] != place[:3]:
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
            self._makers.add(row["tgid"])
        elif row["op"] == "delete":
            left = sum(len(leaves) for leaves in vm.leaves.values())
            if left:
                return f"a zap of the {left} leaves that are left"
            self._still_pinned(vm)
            vm.gone = True
        return ""

    def _still_pinned(self, vm: VmSeen) -> None:
        # kvm_vcpu_unmap() comes with the nested exit, at the latest with the vCPU's end.
        for pins in vm.pins.values():
            for number, row in pins[:1]:
                self._blame(number, row, "a kvm_vcpu_unmap() of it, before the VM ends at latest")

    @staticmethod
    def _vma(row: Row) -> str:
        return ""
