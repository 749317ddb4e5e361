"""gfn_to_pfn_cache: a guest page that KVM maps for itself and lets the mmu notifier take away.

Unlike kvm_vcpu_map() it keeps no reference between refreshes: hva_to_pfn_retry(), virt/kvm/
pfncache.c, gives back what it got as soon as nothing was invalidated meanwhile. The cache has an
invalidation of its own, gfn_to_pfn_cache_invalidate_start(), before the MMU's.
May import: standard library, `tracer.simulator`.
"""

from typing import Any, Final

from tracer.simulator.clock import Story, Task
from tracer.simulator.hostfault import host_fault
from tracer.simulator.ledger import REFERENCES, TAKERS
from tracer.simulator.mmu import PfnCache, Slot, Vm, World
from tracer.simulator.recorder import CALL

__all__ = ("pfncache",)

_TAKER: Final = TAKERS.index("pfncache")


def pfncache(world: World, vm: Vm, task: Task, slot: Slot, args: dict[str, Any]) -> Story:
    """pfncache: use some caches again and again, and refresh those that were invalidated."""
    places = [3 * at % slot.npages for at in range(4)]
    caches = [PfnCache(slot.base + at, slot.hva + (at << 12)) for at in places]
    vm.caches += caches
    times, number = args["times"], 0
    while world.touching > 0 if times == "busy" else number < times:
        cache = caches[number % len(caches)]
        number += 1
        if task.now > world.turns.next:
            yield task.now
        if vm.slots.get(slot.id) is not slot:
            break
        if not cache.valid:
            yield from _refresh(world, vm, task, slot, cache)
        task.now += args["every_us"] * 1000
    for cache in caches:
        vm.caches.remove(cache)


def _refresh(world: World, vm: Vm, task: Task, slot: Slot, cache: PfnCache) -> Story:
    """__kvm_gpc_refresh(): look the page up until no invalidation came between."""
    kernel, index = world.kernel, cache.gfn - slot.base + slot.first
    while True:
        seq = vm.seq
        page, pfn, writable = slot.mapping.entry(index) or (None, 0, False)
        if page is None or not writable:
            page, pfn, writable = yield from host_fault(
                world, vm, task, slot.mapping, index, write=True
            )
        if page is None:
            return
        page.count += 1
        got = task.now
        task.now += 4000
        if task.now > world.turns.next:
            yield task.now
        # mmu_notifier_retry_cache(): mn_active_invalidate_count, not the count of faults.
        again = vm.seq != seq or vm.active_invalidations > 0
        put = task.now
        # Before 3dddf65b4f4c (5.19) hva_to_pfn_retry() kept what it got of a page that it had.
        if not again and pfn == cache.pfn and world.strikes("cache_leak"):
            world.ledger.bug("cache_leak", vm.id, got, cache.gfn, pfn)
            put = 0
        else:
            world.out.release(task, put, CALL[kernel.cache_call], 0, pfn, page)
            world.host.put(task, page)
        world.ledger.references.append(
            REFERENCES.pack(vm.id, -1, _TAKER, cache.gfn, pfn, 0, got, put, pfn if put else 0)
        )
        task.now += 600
        if not again:
            break
        task.now += 2000
    cache.valid, cache.pfn = True, pfn
    world.out.event(task, task.now, "PIN", "refresh", gfn=cache.gfn, pfn=pfn, b=cache.hva,
                    page=page, vm=vm.id)  # fmt: skip
