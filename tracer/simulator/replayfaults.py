"""The rules of references: what a fault takes and gives back, and how it may end.

Sources: KVM-FACTS 0.1 (where the put is), 2.6 (marks of dead pages), 7 (the bugs).
May import: standard library, `tracer.simulator`.
"""

from bisect import bisect_right

from tracer.simulator.kernels import Kernel
from tracer.simulator.replayleaves import LeafRules, Sight
from tracer.simulator.replaystate import FaultSoFar, Pending, Row, VmSeen

__all__ = ("FaultRules",)

_MARKS = ("mark_accessed", "mark_dirty")
#: RELEASE calls that others than faults make: kvm_vcpu_unmap(), gfn_to_page() users.
_PAGE_PUTS = ("page_clean", "page_dirty", "pfn_clean", "pfn_dirty")
#: page_bits of a page that is counted by itself and belongs to nobody in particular.
_PLAIN = 1
#: include/linux/mm.h
_VM_WRITE = 2
#: Puts and marks of one fault at most: its page's, and those of the pages prefetched beside it.
_IN_A_FAULT = 20
_NO_ROOT = "a memslot change that made the root obsolete"


class FaultRules(LeafRules):
    """The RELEASE and FAULT records."""

    def __init__(self, kernel: Kernel, sight: Sight) -> None:
        super().__init__(kernel, sight)
        self._unpinned: dict[int, int] = {}
        #: counts of drivers' pages as the last fault left them
        self._driver_counts: dict[int, int] = {}
        self._starts = [start for start, _ in sight.anonymous]
        #: thread -> puts and marks of a fault that was under way when the recording began
        self._under_way: dict[int, int] = {}
        #: threads that a fault, a pin or a slot was recorded of, processes that made a VM
        self._begun: set[int] = set()
        self._makers: set[int] = set()
        #: faults of which neither a record nor a count tells whether they gave their page back
        self.unseen = 0
        #: an earlier record that turned out to be wrong
        self.blamed: Pending | None = None

    def _blame(self, number: int, row: Row, expected: str) -> None:
        if self.blamed is None or number < self.blamed.number:
            self.blamed = Pending(number, row, expected, row["tid"])

    # --- giving back -----------------------------------------------------------------------------

    def _release(self, row: Row) -> str:
        call, pfn, tid = row["call"], row["pfn"], row["tid"]
        due = self._due.get(tid)
        if call in _MARKS:
            return self._mark(row, due)
        if due:
            return f"first {due[0][0]} of pfn {due[0][1]:#x}"
        if row["fault_ts"] is None:
            if call in _PAGE_PUTS and self._unpinned.get(tid) == pfn:
                del self._unpinned[tid]
                return ""
            if self._of_fault_under_way(row):
                return ""
            expected = "a put outside of faults only where a pin ends or a pfn cache is refreshed"
            if call != self._kernel.cache_call:
                return expected
            entry = Pending(self._number, row, expected, tid)
            self._state(row).cached.setdefault(tid, entry)
            return ""
        fault = self._open(row)
        if fault.prefetched == pfn and call == self._kernel.prefetch_call:
            fault.prefetched = -1
            self._state(row).tables[fault.table] = True
            return ""
        if fault.inner == (call, pfn):
            # kvm_release_page_*() inside of the put shows by itself if the count changed between
            fault.inner = ("", -1)
            return ""
        if call != self._kernel.put_call:
            return f"the put of this generation, {self._kernel.put_call or 'which cannot be seen'}"
        if fault.puts:
            return f"no second put: the fault gave pfn {fault.put_pfns[0]:#x} back already"
        fault.puts += 1
        fault.put_pfns.append(pfn)
        fault.put_count = row["refcount"] or 0
        fault.inner = ("page_dirty" if call == "finish_fault" else "page_clean", pfn)
        if fault.installed is not None:
            leaf = fault.installed[1]
            if not leaf["pfn"] <= pfn < leaf["pfn"] + (1 << 9 * (leaf["level"] - 1)):
                return f"the put of the page that the fault mapped, pfn {leaf['pfn']:#x}"
        return ""

    def _of_fault_under_way(self, row: Row) -> bool:
        """May it be of a fault, or of a zap's marks, that the recorder saw only the end of?

        So is what a thread of a VM older than the recording does before its first known fault.
        """
        tid = row["tid"]
        if row["fault_ts"] is not None or tid in self._begun or row["tgid"] in self._makers:
            return False
        self._under_way[tid] = self._under_way.get(tid, 0) + 1
        return self._under_way[tid] <= _IN_A_FAULT

    def _mark(self, row: Row, due: list[tuple[str, int]] | None) -> str:
        call, pfn, kernel = row["call"], row["pfn"], self._kernel
        if row["refcount"] is not None and row["refcount"] <= 0:
            return f"no {call} of a page that nobody holds: its count is {row['refcount']}"
        if due:
            if due[0] == (call, pfn):
                due.pop(0)
                return ""
            return f"{due[0][0]} of pfn {due[0][1]:#x}"
        if row["fault_ts"] is not None and call == "mark_accessed":
            if kernel.fault_mark or kernel.shadow_fault_mark:
                return ""
            fault = self._open(row)
            # kvm_release_page_clean() calls kvm_set_page_accessed(): a probe of its own sees it
            if kernel.generation == "G1" and fault.put_pfns[-1:] == [pfn]:
                return ""
        if call == "mark_dirty" and self._unpinned.get(row["tid"]) == pfn:
            # kvm_vcpu_unmap() of a written page: kvm_release_page_dirty() marks, then puts.
            return ""
        if kernel.zap_marks == "none" and row["fault_ts"] is not None:
            # The put marks first, if it does so by a call: then the count is that before the put.
            fault = self._open(row)
            if pfn in fault.put_pfns and (row["refcount"] or 0) < fault.put_count:
                return f"no {call} when the fault has put the page"
        if not self.sight.marks or self._of_fault_under_way(row):
            return ""
        return "no mark: no zap or write protection called for one"

    # --- the end of a fault ----------------------------------------------------------------------

    def _fault(self, row: Row) -> str:
        fault = self._faults.pop((row["tid"], row["fault_ts"]), None) or FaultSoFar()
        vm, kernel = self._state(row), self._kernel
        wrong = self._prefetch_put(vm, fault, again=False)
        if wrong:
            return wrong
        if min(fault.leaves, 255) != row["sptes"]:
            return f"as many SPTE records as it counts, {row['sptes']}, not {fault.leaves}"
        stages = [row[name] for name in ("t_faultin", "t_gup", "t_faultin_end", "t_map")]
        reached = [stage for stage in stages if stage is not None]
        if reached != sorted(reached) or (reached and reached[-1] > row["dur"]):
            return "stages one after another"
        wrong = self._puts(row, fault) or self._counts(row) or self._installed(row, fault)
        if wrong:
            return wrong
        result = row["result"]
        if result == "fixed" and not fault.leaves:
            return "an install or a change in a fault that fixed something"
        if result in ("retry", "error") and fault.leaves:
            return f"no leaf from a fault that ended with {result}"
        if result == "retry":
            self._retry(row, vm)
        if result == "error":
            return self._refusal(row, kernel)
        return ""

    def _puts(self, row: Row, fault: FaultSoFar) -> str:
        kernel, pfn = self._kernel, row["pfn"]
        if not kernel.put_call:
            return ""
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

    def _counts(self, row: Row) -> str:
        """Where no record shows the put, the count after the fault must.

        A page of private anonymous memory is held by each mapping, by an LRU batch while it is new,
        by kvm_vcpu_map(), for a moment by a pfn cache and by whoever prefetches it. A driver's page
        has the count that the last fault left.
        """
        kernel = self._kernel
        put = kernel.shadow_put or kernel.put if row["mmu"] == "shadow" else kernel.put
        end, mapped = row["refcount_end"], row["mapcount_end"]
        if put != "faultin" or end is None or row["pfn"] is None or row["pfn"] >> 52:
            return ""
        if row["page_bits"] != _PLAIN:
            self.unseen += 1
            return ""
        if row["walk_pfn"] is not None:
            before = self._driver_counts.setdefault(row["walk_pfn"], end)
            self._driver_counts[row["walk_pfn"]] = end
            return f"a count of {before}, as the last fault left it" if end > before else ""
        if mapped is None or not self._is_anonymous(row["hva"]):
            self.unseen += 1
            return ""
        most = max(mapped, 0) + 2  # unmapped, it is still in the hands of mmu_gather
        if (row["page_flags_end"] or 0) & self.sight.lru:
            most -= 1
        if end > most:
            most += len(self._state(row).pins.get(row["pfn"], ()))
            most += self.sight.cached.get(row["pfn"], 0)
            most += sum(other.prefetched == row["pfn"] for other in self._faults.values())
        if end > most:
            return (
                f"a count of {most} at most after the fault: mappings, an LRU batch, pins, caches"
            )
        return ""

    def _is_anonymous(self, hva: int | None) -> bool:
        at = bisect_right(self._starts, hva or 0) - 1
        return at >= 0 and (hva or 0) < self.sight.anonymous[at][1]

    def _installed(self, row: Row, fault: FaultSoFar) -> str:
        if row["writable"] and row["vm_flags"] is not None and not row["vm_flags"] & _VM_WRITE:
            # hva_to_pfn_remapped(), virt/kvm/kvm_main.c: *writable is that of the host's PTE.
            return "a page that is not writable: the host's mapping is read-only"
        if fault.installed is None:
            return ""
        number, leaf, seq_shown = fault.installed
        if row["mmu_seq"] is not None and seq_shown > row["mmu_seq"]:
            self._blame(
                number, leaf,
                f"no install: its fault began at mmu_seq {row['mmu_seq']}, and an invalidation "
                f"had made it {seq_shown} by then",
            )  # fmt: skip
        if leaf["new"] & self.sight.host_writable and row["writable"] is False:
            self._blame(number, leaf, "a SPTE that is not host-writable, as fault-in found")
        return ""

    # --- retries and refusals --------------------------------------------------------------------

    def _retry(self, row: Row, vm: VmSeen) -> None:
        """A retry says why itself, or a slot that goes explains it: once for each vCPU and change.

        A vCPU whose root is obsolete loads a new one before it enters the guest again
        (KVM_REQ_MMU_FREE_OBSOLETE_ROOTS), at times only after the slot's own record. While a slot
        goes its faults come back unlooked for.
        """
        if vm.changed_at >= row["fault_ts"]:
            return
        if row["mmu_seq"] != row["invalidate_seq"] or row["in_progress"] > 0:
            return
        if self._kernel.seq_local and vm.ended_within(row["fault_ts"], row["t_faultin"]):
            return  # KVM had looked before that, the recorder only after it
        if row["t_gup"] is not None:
            if vm.reloaded.get(row["tid"], 0) < vm.changes:
                vm.reloaded[row["tid"]] = vm.changes
                return
            for entry in vm.unexplained:
                if entry.tid == row["tid"] and entry.row["t_gup"] is not None:
                    self._blame(entry.number, entry.row, (
                        "no retry: nothing was invalidated since its fault-in, and one root that "
                        "is obsolete makes one retry"
                    ))  # fmt: skip
                    return
        vm.unexplained.append(Pending(self._number, row, _NO_ROOT, row["tid"]))

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
