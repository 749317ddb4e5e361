"""The mmu notifier: a range of host memory is about to change, and KVM lets go of it first.

Order that holds (KVM-FACTS 4): zaps, return of range_start, host page table, range_end.
May import: `probes.wire`, standard library, `tracer.simulator`.
"""

from typing import Final

from probes.wire import INVALIDATE_EVENTS
from tracer.simulator.clock import Story, Task
from tracer.simulator.mmu import Slot, Vm, World
from tracer.simulator.recorder import CAUSE, OP

__all__ = ("covered", "end", "invalidate", "start")

_NOTIFIER: Final = CAUSE["notifier"]
_EVENT: Final = {name: number for number, name in enumerate(INVALIDATE_EVENTS)}


def covered(vm: Vm, low: int, high: int) -> list[tuple[Slot, int, int]]:
    """Return (slot, first gfn, gfn behind the last) for each slot that host memory is behind."""
    found = []
    for slot in vm.slots.values():
        if slot.hva < high and low < slot.hva_end:
            first, last = max(low, slot.hva), min(high, slot.hva_end)
            shift = slot.base - (slot.hva >> 12)
            found.append((slot, (first >> 12) + shift, (last + 4095 >> 12) + shift))
    return found


def start(world: World, vm: Vm, task: Task, low: int, high: int, event: str) -> Story:
    """kvm_mmu_notifier_invalidate_range_start(): announce, zap, and only then return."""
    if task.now > world.turns.next:
        yield task.now
    vm.active_invalidations += 1
    for cache in vm.caches:
        if low <= cache.hva < high:  # gfn_to_pfn_cache_invalidate_start()
            cache.valid = False
    ranges = covered(vm, low, high)
    if ranges:
        if not vm.lock_at_once(task, 500):
            yield from vm.write_lock(task, 500)
        vm.in_progress += 1
        first, last = min(r[1] for r in ranges), max(r[2] for r in ranges)
        if vm.in_progress == 1:
            vm.range = (first, last)
        else:
            vm.range = (min(first, vm.range[0]), max(last, vm.range[1]))
        for _, first, last in ranges:
            leaves = vm.leaves_in(vm.root, first, last)
            for root in vm.old_roots:
                leaves += vm.leaves_in(root, first, last)
            if world.bugs:
                leaves = [leaf for leaf in leaves if not _overlooked(world, vm, task, leaf)]
            if leaves:
                yield from vm.zap_range(task, leaves, _NOTIFIER)
    task.now += 900
    if task.now > world.turns.next:
        yield task.now
    _event(world, vm, task, "start", low, high, event)


def end(world: World, vm: Vm, task: Task, low: int, high: int, event: str) -> Story:
    """kvm_mmu_notifier_invalidate_range_end(): the sequence moves on."""
    task.now += 1500
    if task.now > world.turns.next:
        yield task.now
    if any(slot.hva < high and low < slot.hva_end for slot in vm.slots.values()):
        if not vm.lock_at_once(task, 300):
            yield from vm.write_lock(task, 300)
        vm.seq += 1
        if world.strikes("unpaired_start"):
            del world.bugs["unpaired_start"]  # one is enough for ever
            world.ledger.bug("unpaired_start", vm.id, task.now, vm.range[0], 0)
        else:
            vm.in_progress -= 1
    vm.active_invalidations -= 1
    _event(world, vm, task, "end", low, high, event)


def invalidate(world: World, vm: Vm, task: Task, low: int, high: int, event: str) -> Story:
    """Run one whole invalidation; the host's page table may change when this is over."""
    yield from start(world, vm, task, low, high, event)
    yield from end(world, vm, task, low, high, event)


def _overlooked(world: World, vm: Vm, task: Task, leaf: object) -> bool:
    # 3a0f64de479c: an iterator that lost its place leaves one SPTE behind.
    if not world.strikes("stale_spte"):
        return False
    gfn, pfn = getattr(leaf, "gfn", 0), getattr(leaf, "pfn", 0)
    world.ledger.bug("stale_spte", vm.id, task.now, gfn, pfn)
    return True


def _event(world: World, vm: Vm, task: Task, op: str, low: int, high: int, event: str) -> None:
    world.out.invalidation(
        task, task.now, OP[op], low, high, vm.seq, vm.in_progress, _EVENT[event], vm.id
    )
