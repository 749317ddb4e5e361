"""One guest page fault, from the exit to the re-entry, as each generation does it.

The order of things is the kernel's: snapshot of the sequence, fault-in, mmu_lock, stale check, map,
put. Where a generation differs, a field of `kernels.Kernel` says so; where a planted bug differs,
`World.strikes` does. May import: standard library, `tracer.simulator`.
"""

from collections.abc import Generator
from typing import Any, Final

from tracer.simulator.clock import Story, Task
from tracer.simulator.faultrecord import (
    EFAULT,
    ERR_FAULT,
    NEVER,
    NOSLOT,
    Fault,
    write_fault,
)
from tracer.simulator.host import TAIL_BITS, Page
from tracer.simulator.hostfault import Found, host_fault, populate
from tracer.simulator.ledger import REFERENCES, TAKERS
from tracer.simulator.mmu import ALIAS, ZAP_NS, Leaf, Slot, Vm, World
from tracer.simulator.putting import Putting
from tracer.simulator.recorder import CALL, CAUSE

__all__ = ("Vcpu",)

_MARK_ACCESSED: Final = CALL["mark_accessed"]
_FAULT: Final = CAUSE["fault"]
_PREFETCH: Final = CAUSE["prefetch"]
_FAST: Final = CAUSE["fast"]
_PREFETCHER: Final = TAKERS.index("prefetch")
#: How long a fault holds mmu_lock at least (ns).
_HOLD_NS: Final = 5000
#: From mmu_lock to the leaf.
_MAP_NS: Final = 3000
#: 4K pages in one of 1G.
_GIGANTIC: Final = 1 << 18
#: Faults of one access before the guest is given up as stuck.
_TRIES: Final = 128
#: What keeps a vCPU from getting on for ever. One that got nowhere so often is scheduled away.
_ENDLESS: Final = frozenset({"endless_storm", "obsolete_root", "invalid_slot"})
_PATIENCE: Final = 64
_AWAY_NS: Final = 20_000_000

Result = Generator[int, None, str]


class Vcpu(Putting):
    """A vCPU: touches guest memory, and faults where that has no leaf."""

    def __init__(self, world: World, vm: Vm, task: Task) -> None:
        super().__init__(world, vm, task)
        self.faults = 0
        kernel = world.kernel
        self._ret_fixed, self._ret_retry = kernel.result("fixed"), kernel.result("retry")
        #: where its faults put, and how they mark, with the MMU of its VM
        self._puts = kernel.shadow_put or kernel.put if vm.shadow else kernel.put
        self._marks = kernel.shadow_fault_mark if vm.shadow else kernel.fault_mark
        #: bug obsolete_root: is this vCPU's root one that it should have given up?
        self._obsolete = False

    def touch(self, gfn: int, *, write: bool, fetch: bool = False, alias: int = 0) -> Result:
        """Access a guest frame once; returns how its last fault ended ("" without one).

        "stuck" is a vCPU whose faults never end.
        """
        vm, result = self.vm, ""
        key = gfn + (alias << ALIAS)
        for tries in range(_TRIES):
            leaf = vm.root.leaves.get(key)
            if leaf is None and vm.level > 1:
                leaf = self._large(key)
            if leaf is not None and (leaf.spte & 2 or not write):
                # What the processor does by itself: accessed and dirty in the SPTE (no record).
                leaf.spte |= 0x60 if write else 0x20
                return result
            result = yield from self.fault(gfn, write=write, fetch=fetch, alias=alias)
            if result in ("error", "emulate"):
                return result
            if result == "retry":
                away = tries >= _PATIENCE and not _ENDLESS.isdisjoint(self.world.bugs)
                self.task.now += _AWAY_NS if away else 20_000
        return "stuck"

    def _large(self, key: int) -> Leaf | None:
        """Return the large leaf that maps a guest frame, if there is one."""
        for pages in (512, _GIGANTIC):
            leaf = self.vm.root.leaves.get(key & -pages)
            if leaf is not None and leaf.key + leaf.pages > key:
                return leaf
        return None

    def fault(self, gfn: int, *, write: bool, fetch: bool, alias: int) -> Result:
        """Run one fault; returns the name of its RET_PF_* value, or "error"."""
        world, vm, task, kernel = self.world, self.vm, self.task, self.world.kernel
        turns = world.turns
        if task.now > turns.next:
            yield task.now
        self.faults += 1
        task.fault_ts = task.now
        key, root = gfn + (alias << ALIAS), vm.root
        leaf = root.leaves.get(key)
        fault = Fault(gfn, vm.slot_at(gfn), vm.seq, write=write, fetch=fetch, alias=alias,
                      jitters=world.dice.jitters(), was_present=leaf is not None)  # fmt: skip
        if leaf is not None and not vm.shadow:
            task.now += 3000 + (fault.jitters[0] >> 2)
            if task.now > turns.next:
                yield task.now
            if root.leaves.get(key) is leaf and self._fast(fault, leaf):
                return write_fault(world, vm, task, fault)
        slot = fault.slot
        if slot is None or self._early(fault, slot):
            return write_fault(world, vm, task, fault) if slot is not None else self._no_slot(fault)
        if not slot.told and task.fault_ts >= world.armed_at:
            self._tell(slot)
        found = self._look(fault, slot)
        if found is None:  # a copy on write: the host's own fault invalidates the old page
            index = fault.gfn - slot.base + slot.first
            found = yield from host_fault(world, vm, task, slot.mapping, index, write=write)
        if not self._get(fault, slot, *found):
            return write_fault(world, vm, task, fault)
        # Without lock it may see the sequence of a moment ago, unless somebody is about to move it.
        if vm.active_invalidations or vm.seq != fault.mmu_seq or world.bugs:
            if task.now > turns.next:
                yield task.now
            if self._lockless_retry(fault):
                return write_fault(world, vm, task, fault)
        if world.bugs:
            yield from self._plant_race(fault, slot)
        task.now += 1200 + (fault.jitters[3] << 1)
        if vm.shadow:
            if not vm.lock_at_once(task, _HOLD_NS):
                yield from vm.write_lock(task, _HOLD_NS)
        elif task.now > turns.next or task.now < vm.write_until:
            yield from vm.read_lock(task, _HOLD_NS)
        if (root is not vm.root and not fault.outlived) or self._stale(fault):
            fault.ret = self._ret_retry
        else:
            self._map(fault, slot, key)
            if fault.stale and fault.sptes:  # else another vCPU has mapped it by now, rightly
                self._plant(fault.stale, fault, fault.pfn)
        put = self._puts
        if put == "locked":
            self._put(fault)
        task.now += 200  # unlock, later than all that was done under the lock
        if not vm.shadow:
            if vm.read_until < task.now:
                vm.read_until = task.now
        elif vm.write_until < task.now:
            vm.write_until = task.now
        task.now += 1500 + fault.jitters[4]
        if task.now > turns.next:
            yield task.now
        if put == "after_unlock":
            self._put(fault)
        elif put == "never" and fault.held:
            self._plant("missing_put_shadow" if kernel.shadow_put else "missing_put", fault,
                        fault.pfn)  # fmt: skip
        if self._marks == "unlocked" and fault.counted and fault.sptes:
            yield from self._late_mark(fault)
        return write_fault(world, vm, task, fault)

    def _tell(self, slot: Slot) -> None:
        # A recorder that came later learns of a slot from the first fault in it.
        slot.told = True
        self.world.out.event(
            self.task, self.task.now + 500, "SLOT", "seen", gfn=slot.base, a=slot.npages,
            b=slot.hva, c=slot.flags, d=slot.id,
        )  # fmt: skip

    # --- the fast path ---------------------------------------------------------------------------

    def _fast(self, fault: Fault, leaf: Leaf) -> bool:
        """fast_page_fault(): give write access back, or find that nothing is to be done."""
        task, kernel = self.task, self.world.kernel
        if not fault.write or leaf.spte & 2:
            fault.ret = kernel.result("spurious")
            return True
        if not leaf.spte & 0x400:
            return False
        sptep = 0xFF11000300000000 + (leaf.gfn & 0xFFFFFFF) * 8
        self.vm.change(task, task.now, leaf, leaf.spte | 2, _FAST, sptep=sptep)
        fault.sptes, fault.ret = 1, kernel.result("fixed")
        fault.level = leaf.level
        return True

    # --- fault-in --------------------------------------------------------------------------------

    def _early(self, fault: Fault, slot: Slot) -> bool:
        """Retry before the page is even looked for? Then the fault is over."""
        task, kernel = self.task, self.world.kernel
        if slot.valid and not (kernel.lockless_retry and self._invalidating(fault.gfn)):
            return False
        t_faultin = 2900 + fault.jitters[0] // 8
        if slot.stuck:
            self._plant("invalid_slot", fault, 0)
        if kernel.lockless_retry and slot.valid:
            fault.pfn = ERR_FAULT
        fault.stages = (t_faultin, NEVER, NEVER, t_faultin + 900, NEVER)
        task.now += t_faultin + 1500
        fault.faultin_ret = fault.ret = kernel.result("retry")
        return True

    def _no_slot(self, fault: Fault) -> str:
        # kvm_handle_noslot_fault(): nobody's memory, the access is emulated (MMIO).
        kernel = self.world.kernel
        fault.pfn = NOSLOT
        fault.stages = (2900, NEVER, NEVER, 3600, NEVER)
        self.task.now += 12_000
        fault.faultin_ret = 0
        fault.ret = kernel.result("emulate")
        return write_fault(self.world, self.vm, self.task, fault)

    def _look(self, fault: Fault, slot: Slot) -> Found | None:
        """hva_to_pfn(): find or make the host page; None if an own copy of it must be made."""
        task, jitters = self.task, fault.jitters
        t_faultin = 2900 + (jitters[0] >> 3)
        t_gup = t_faultin + 1600 + (jitters[1] >> 2)
        index = fault.gfn - slot.base + slot.first
        entry: Found | None = slot.mapping.entry(index)
        took = 3000 + jitters[2]
        if entry is None:  # before the clock moves: nobody may see the page earlier than it is
            took += 20_000 + (jitters[2] << 2)
            entry = populate(self.world.host, task, slot.mapping, index, write=fault.write)
        task.now += t_gup
        if fault.write and not entry[2]:
            took += 30_000
            entry = None
        t_end = t_gup + took + 900
        fault.stages = (t_faultin, t_gup, t_gup + took, t_end, NEVER)
        task.now = task.fault_ts + t_end
        return entry

    def _get(self, fault: Fault, slot: Slot, page: Page | None, pfn: int, writable: bool) -> bool:
        """Take the reference that this generation takes; False if the page is refused."""
        world, kernel, kind = self.world, self.world.kernel, slot.mapping.kind
        if page is None:  # a write through a read-only mapping: KVM_PFN_ERR_RO_FAULT
            return self._refuse(fault, kernel, pfn)
        fault.page = page
        if kind.pfnmap:
            fault.walk_pfn = pfn
            self._walk(slot)
        counts = kind.has_struct and page.count > 0
        if kind.pfnmap and kind.has_struct and not counts and world.strikes("resurrect"):
            counts = True
            self._plant("resurrect", fault, pfn)
        if kind.pfnmap and kernel.pfnmap == "none":
            counts = False
        elif not counts and kind.has_struct and kernel.pfnmap == "unless_zero":
            return self._refuse(fault, kernel, ERR_FAULT)
        if not counts and self.vm.shadow and kernel.shadow_refuses:
            return self._refuse(fault, kernel, ERR_FAULT)
        fault.counted = counts
        fault.tracked = counts
        fault.pfn, fault.faultin_ret = pfn, 0
        if world.bugs and world.strikes("wrong_flag"):
            fault.tracked = not counts
            self._plant("wrong_flag", fault, pfn)
        if not writable and world.bugs:
            writable = self._too_writable(fault, pfn)
        fault.writable = writable and not slot.flags & 2
        put = self._puts
        if counts:
            page.count += 1
            fault.held = True
            if put == "faultin" and not self._forgets(fault):
                self._give_back(fault, page)
                if world.strikes("double_put"):
                    self._plant("double_put", fault, fault.pfn)
                    world.host.put(self.task, page)
        self._sample(fault, page)
        return True

    def _too_writable(self, fault: Fault, pfn: int) -> bool:
        if self.world.strikes("writable_over_readonly"):
            self._plant("writable_over_readonly", fault, pfn)
            return True
        return False

    def _refuse(self, fault: Fault, kernel: Any, pfn: int) -> bool:
        fault.pfn, fault.writable = pfn, True
        fault.faultin_ret = EFAULT if kernel.error_in_faultin else 0
        fault.ret = EFAULT
        if fault.page is not None:
            self._sample(fault, fault.page)
        self.task.now += 25_000
        return False

    @staticmethod
    def _sample(fault: Fault, page: Page) -> None:
        found = fault.walk_pfn if fault.pfn >> 52 else fault.pfn
        bits = page.bits if found == page.pfn else TAIL_BITS
        fault.state = (page.flags, page.count, page.mapcount, bits, page.order)

    def _walk(self, slot: Slot) -> None:
        # The VMA is told once, where the walk's function has it as an argument.
        mapping, kernel = slot.mapping, self.world.kernel
        if mapping.seen or not kernel.walk_tells:
            return
        mapping.seen = True
        rdev = 226 << 20
        self.world.out.event(
            self.task, self.task.now - 900, "VMA", "seen", a=mapping.hva, b=mapping.end,
            c=mapping.kind.vm_flags, d=rdev,
        )  # fmt: skip
        self.world.out.note(self.task.now, {"device": {"rdev": rdev, "path": mapping.kind.path}})

    def _invalidating(self, gfn: int) -> bool:
        vm = self.vm
        return vm.in_progress > 0 and vm.range[0] <= gfn < vm.range[1]

    def _lockless_retry(self, fault: Fault) -> bool:
        """mmu_invalidate_retry_gfn_unsafe() after fault-in; it gives the page back by itself."""
        world, vm, task, kernel = self.world, self.vm, self.task, self.world.kernel
        without_get = "lockless_put" in world.bugs and kernel.put == "faultin"
        if not (kernel.lockless_retry or without_get):
            return False
        if without_get and fault.slot is not None and world.strikes("lockless_put"):
            self._plant("lockless_put", fault, fault.pfn)
        elif vm.seq == fault.mmu_seq and not self._invalidating(fault.gfn):
            return False
        elif without_get and not kernel.lockless_retry:
            return False
        fault.faultin_ret = fault.ret = kernel.result("retry")
        task.now += 800
        if without_get and fault.page is not None:
            world.out.release(task, task.now, CALL["pfn_clean"], fault.gfn, fault.pfn, fault.page)
            world.host.put(task, fault.page)
        elif fault.held and fault.page is not None:
            if kernel.retry_call:
                world.out.release(task, task.now, CALL[kernel.retry_call], fault.gfn, fault.pfn,
                                  fault.page)  # fmt: skip
            self._give_back(fault, fault.page)
            self._sample(fault, fault.page)  # fault-in returns after this put
        return True

    # --- under mmu_lock --------------------------------------------------------------------------

    def _plant_race(self, fault: Fault, slot: Slot) -> Story:
        """Let somebody come between fault-in and the stale check, for the bugs that need it."""
        world, vm, task = self.world, self.vm, self.task
        if fault.page is None or slot.mapping.kind.driver:
            return
        if world.strikes("endless_storm"):
            self._plant("endless_storm", fault, fault.pfn)
            self.race(vm, slot, fault.gfn, task.now, False)
            task.now += 30_000
        elif world.strikes("stale_sequence"):
            self.race(vm, slot, fault.gfn, task.now, True)
            fault.marked = True
            task.now += 150_000
        elif world.strikes("stale_slot"):
            yield from self._outlive_slot(fault, slot)

    def _outlive_slot(self, fault: Fault, slot: Slot) -> Story:
        for _ in range(100):
            if vm_gone := self.vm.slots.get(slot.id) is not slot:
                fault.marked = fault.outlived = vm_gone
                return
            self.task.now += 50_000
            yield self.task.now

    def _stale(self, fault: Fault) -> bool:
        """is_page_fault_stale(): did an invalidation begin or end since the snapshot?"""
        vm, world = self.vm, self.world
        if not world.bugs:
            return vm.seq != fault.mmu_seq or (vm.in_progress > 0 and self._invalidating(fault.gfn))
        if fault.marked:
            gone = vm.slots.get(fault.slot.id) is not fault.slot if fault.slot else False
            if gone or vm.seq != fault.mmu_seq:
                fault.stale = "stale_slot" if gone else "stale_sequence"
                return False
        if "sign_extension" in world.bugs and fault.mmu_seq >> 31 & 1:
            # int mmu_seq is compared with the unsigned long of struct kvm: never equal again.
            self._plant("sign_extension", fault, fault.pfn)
            return True
        if world.bugs and (self._obsolete or world.strikes("obsolete_root")):
            self._obsolete = True  # kvm_check_request(KVM_REQ_MMU_FREE_OBSOLETE_ROOTS) is lost
            self._plant("obsolete_root", fault, fault.pfn)
            return True
        return vm.seq != fault.mmu_seq or (vm.in_progress > 0 and self._invalidating(fault.gfn))

    def _map(self, fault: Fault, slot: Slot, key: int) -> None:
        """kvm_tdp_mmu_map(), or the shadow MMU's: install, change, or find it done already."""
        world, vm, task, page = self.world, self.vm, self.task, fault.page
        assert page is not None
        t_faultin, t_gup, t_gup_end, t_end, _ = fault.stages
        fault.stages = (t_faultin, t_gup, t_gup_end, t_end, task.now - task.fault_ts)
        # A constant: under one lock, what is mapped first is also written down first.
        task.now += _MAP_NS
        pfn, level = fault.pfn, 1
        if slot.mapping.kind.level > 1:
            level = fault.level = self._level(fault, slot, key)
            pages = 1 << 9 * (level - 1)
            key, pfn = key & -pages, pfn & -pages
        leaf = vm.root.leaves.get(key)
        spte = vm.spte_for(
            pfn, writable=fault.writable and (fault.write or not slot.dirty_log),
            host_writable=fault.writable, level=level, counted=fault.tracked, accessed=True,
        )  # fmt: skip
        kernel = world.kernel
        if leaf is None:
            vm.install(task, task.now, key, level, pfn, page, spte, slot, _FAULT)
            if world.bugs:
                self._planted_install(fault, slot, key, level, spte)
        elif leaf.pfn == pfn and (leaf.spte & 2 or not spte & 2):
            if kernel.spurious_early or not leaf.spte & spte & 2 or leaf.level > 1:
                fault.ret = kernel.result("spurious")
                return
            vm.rewrite(task, task.now, leaf, spte & ~0x40, _FAULT, fault.gfn)
        elif leaf.pfn == pfn and leaf.level == level:
            vm.change(task, task.now, leaf, spte, _FAULT)
        else:  # another page behind the same frame: the old leaf goes first
            vm.zap(task, task.now, leaf, _FAULT)
            task.now += ZAP_NS
            # Both are written down at once: who maps next must not seem to come between.
            vm.write_until = max(vm.write_until, task.now - _MAP_NS + 1)
            vm.install(task, task.now, key, level, pfn, page, spte, slot, _FAULT)
        fault.sptes += 1
        fault.ret = self._ret_fixed
        if vm.shadow:
            self._prefetch(fault, slot, key)
        if self._marks == "locked" and fault.counted:
            task.now += 300
            world.out.release(task, task.now, _MARK_ACCESSED, fault.gfn, fault.pfn, page)

    def _level(self, fault: Fault, slot: Slot, key: int) -> int:
        # kvm_mmu_hugepage_adjust(): as large as host page table, slot and alignment allow.
        for pages in (_GIGANTIC, 512):
            large = self.vm.root.leaves.get(key & -pages)
            if large is not None and large.pages >= pages:
                return large.level
        if self.vm.shadow or slot.dirty_log:
            return 1
        for level in range(slot.mapping.kind.level, 1, -1):
            pages = 1 << 9 * (level - 1)
            first = fault.gfn & -pages
            fits = first >= slot.base and first + pages <= slot.end
            fits = fits and not (slot.base - slot.first | fault.gfn - fault.pfn) & pages - 1
            if fits and not self.vm.root.maps_some(first, pages):
                return level
        return 1

    def _planted_install(self, fault: Fault, slot: Slot, key: int, level: int, spte: int) -> None:
        world, vm, task = self.world, self.vm, self.task
        if level > 1 or fault.page is None:
            return
        if world.strikes("double_install"):
            old = vm.root.leaves.pop(key)
            task.now += 700
            vm.install(task, task.now, key, level, fault.pfn, fault.page, spte, slot, _FAULT)
            vm.enter(old, task.now, _FAULT, task, task.seq - 1, "superseded")
            self._plant("double_install", fault, fault.pfn)
        elif world.strikes("wrong_gfn"):
            other = key + 512 * 1024
            # Not over a leaf that it made before: that would be another bug.
            if other not in vm.root.leaves and vm.slot_at(other & ((1 << ALIAS) - 1)) is None:
                task.now += 700
                vm.install(task, task.now, other, level, fault.pfn, fault.page, spte, slot, _FAULT)
                self._plant("wrong_gfn", fault, fault.pfn)

    def _prefetch(self, fault: Fault, slot: Slot, key: int) -> None:
        """direct_pte_prefetch(): the aligned eight SPTEs around, where the host has pages."""
        world, vm, task, kernel = self.world, self.vm, self.task, self.world.kernel
        if slot.dirty_log or slot.mapping.kind.driver or vm.in_progress:
            return  # "If addresses are being invalidated, skip prefetching", direct_pte_prefetch()
        if vm.slots.get(slot.id) is not slot:
            return  # it looks for the slot itself, gfn_to_memslot_dirty_bitmap(), and it is gone
        leaves, mapping = vm.root.leaves, slot.mapping
        for near in range(key & ~7, (key & ~7) + 8):
            gfn = near & ((1 << ALIAS) - 1)
            if near in leaves or not slot.base <= gfn < slot.end:
                continue
            entry = mapping.entry(gfn - slot.base + slot.first)
            if entry is None or not entry[2]:
                continue
            page, pfn, _ = entry
            task.now += 4000
            page.count += 1
            spte = vm.spte_for(pfn, writable=True, host_writable=True, level=1, counted=True,
                               accessed=False)  # fmt: skip
            vm.install(task, task.now, near, 1, pfn, page, spte, slot, _PREFETCH)
            task.now += 1500
            world.out.release(task, task.now, CALL[kernel.prefetch_call], 0, pfn, page)
            world.host.put(task, page)
            world.ledger.references.append(REFERENCES.pack(
                vm.id, task.vcpu, _PREFETCHER, gfn, pfn, task.fault_ts, task.now - 1500, task.now,
                pfn,
            ))  # fmt: skip
            fault.sptes += 1
