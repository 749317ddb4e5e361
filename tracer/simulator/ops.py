"""What the VMM and the rest of the host do to a VM while its vCPUs run: one function a verb.

The verbs are those of scenario files; `args` has all that `grammar.VERBS` names for one. Each is
a story: it yields when somebody else may come in.
May import: standard library, `tracer.simulator`.
"""

from collections.abc import Callable, Iterator
from typing import Any, Final

from tracer.simulator.clock import Story, Task
from tracer.simulator.grammar import MOVE_GAP
from tracer.simulator.host import Host, Mapping, Page
from tracer.simulator.hostfault import populate
from tracer.simulator.invalidate import end, start
from tracer.simulator.ledger import REFERENCES, TAKERS
from tracer.simulator.mmu import Root, Slot, Vm, World
from tracer.simulator.pfncache import pfncache
from tracer.simulator.recorder import CALL, CAUSE
from tracer.simulator.split import recover, split

__all__ = ("VERBS", "create_slot", "create_vm", "destroy_vm", "discard_range")

_SLOT: Final = CAUSE["slot"]
_DIRTY_LOG: Final = CAUSE["dirty_log"]
_AGING: Final = CAUSE["aging"]
_TEARDOWN: Final = CAUSE["teardown"]
_PIN: Final = TAKERS.index("pin")
_MARK_DIRTY: Final = CALL["mark_dirty"]
#: KVM_MEM_LOG_DIRTY_PAGES, include/uapi/linux/kvm.h.
_LOG_DIRTY: Final = 1
#: How long a look at a page takes that leads to nothing.
_LOOK_NS: Final = 2000
#: 4K pages in a mapping of 2M. Who takes a piece of one back splits it first, and the notifier
#: hears of all of it (__split_huge_pmd(), mm/huge_memory.c), before a fault may map it again.
_LARGE: Final = 512
#: Pages of one madvise() of many.
_PIECE: Final = 512


def create_vm(world: World, vm: Vm, task: Task) -> None:
    """KVM_CREATE_VM."""
    world.out.event(task, task.now, "VM", "create", a=vm.kvm, d=vm.tgid, vm=vm.id)
    task.now += 4_000_000


def create_slot(world: World, vm: Vm, task: Task, slot: Slot) -> None:
    """KVM_SET_USER_MEMORY_REGION with a new slot; the recorder reads the VMAs behind it."""
    vm.add_slot(slot)
    slot.told = task.now >= world.armed_at
    _slot(world, vm, task, slot, "create")
    world.out.note(task.now, {
        "slot": {"vm": vm.id, "slot": slot.id, "as_id": slot.as_id, "gfn": slot.base,
                 "npages": slot.npages, "hva": slot.hva},
        "tgid": vm.tgid, "vmas": [slot.mapping.note()],
    })  # fmt: skip
    task.now += 300_000


def _slot(world: World, vm: Vm, task: Task, slot: Slot, op: str) -> None:
    """Write that something happened to a slot."""
    world.out.event(
        task, task.now, "SLOT", op, gfn=slot.base, a=slot.npages, b=slot.hva, c=slot.flags,
        d=slot.id, as_id=slot.as_id, vm=vm.id,
    )  # fmt: skip


def _rounds(world: World, args: dict[str, Any]) -> Iterator[int]:
    """Count `times`, or as long as vCPUs are busy if that is "busy"."""
    times = args["times"]
    number = 0
    while world.touching > 0 if times == "busy" else number < times:
        yield number
        number += 1


def _count(args: dict[str, Any], npages: int) -> int:
    """Return how many `pages` of memory that has so many."""
    return npages if args["pages"] == "all" else min(npages, args["pages"])


# --- memory that goes away ------------------------------------------------------------------------


def discard_range(
    world: World, vm: Vm, task: Task, mapping: Mapping, first: int, count: int,
    event: str = "clear",
) -> Story:  # fmt: skip
    """madvise(MADV_DONTNEED) or a hole in a file: the pages go back to the host."""
    low = mapping.hva + (first << 12)
    high = low + (count << 12)
    yield from start(world, vm, task, low, high, event)
    gone: list[Page] = []
    indices = range(first, first + count)
    if count > len(mapping.pages):
        there = sorted(index for index in mapping.pages if index in indices)
    else:
        there = [index for index in indices if index in mapping.pages]
    for index in there:
        page = mapping.pages.get(index)
        if page is None:  # a piece of a large one that has gone
            continue
        if page.order and (index & ((1 << page.order) - 1)) == 0:
            for at in range(1 << page.order):
                mapping.pages.pop(index + at, None)
            page.mapcount = -1
            gone.append(page)
        elif not page.order:
            del mapping.pages[index]
            if page is not world.host.zero and not mapping.kind.driver:
                page.mapcount -= 1
                gone.append(page)
    yield from end(world, vm, task, low, high, event)
    task.now += 2000
    if task.now > world.turns.next:
        yield task.now
    world.host.drain(task)
    for page in gone:  # tlb_finish_mmu(): freed only when the range is over
        task.now += 700
        if task.now > world.turns.next or world.out.full:
            yield task.now
        world.host.put(task, page)


def discard(world: World, vm: Vm, task: Task, slot: Slot, args: dict[str, Any]) -> Story:
    """discard: free ranges of guest memory at random places (ballooning, page reporting)."""
    mapping = slot.mapping
    if args["pages"] == "all":
        # By pieces: a whole slot at once is more than one madvise() frees under one lock.
        for first in range(0, mapping.npages, _PIECE):
            count = min(_PIECE, mapping.npages - first)
            yield from discard_range(world, vm, task, mapping, first, count)
        return
    count = _count(args, mapping.npages)
    for _ in _rounds(world, args):
        if slot.id not in vm.slots:
            return
        first = world.dice.below(max(1, mapping.npages - count))
        if mapping.kind.level > 1:  # whole ones: the host does not split them here
            block = max(1 << mapping.kind.order, _LARGE)
            first, count = first & -block, max(block, count & -block)
        yield from discard_range(world, vm, task, mapping, first, count, args["event"])
        task.now += args["every_us"] * 1000


def merge(world: World, vm: Vm, task: Task, slot: Slot, args: dict[str, Any]) -> Story:
    """merge: KSM replaces pages by one shared, read-only page; writes copy it again."""
    mapping, host = slot.mapping, world.host
    shared: Page | None = None
    since = 0  #: when that was shared first: afterwards it must not have been freed
    for _ in _rounds(world, args):
        index = world.dice.below(mapping.npages)
        entry = mapping.entry(index)
        if entry is None or not entry[2] or entry[0].order or slot.id not in vm.slots:
            task.now += _LOOK_NS  # nothing to merge here: the next page
            if task.now > world.turns.next:
                yield task.now
            continue
        hva = mapping.hva + (index << 12)
        yield from start(world, vm, task, hva, hva + 4096, "clear")
        if mapping.entry(index) != entry:  # somebody was quicker: write_protect_page() fails
            yield from end(world, vm, task, hva, hva + 4096, "clear")
            continue
        page = entry[0]
        if shared is None or shared.count <= 0 or shared.freed_at >= since:
            shared, since = page, task.now
            page.shared = True
        else:
            shared.count += 1
            shared.mapcount += 1
            mapping.pages[index] = shared
        yield from end(world, vm, task, hva, hva + 4096, "clear")
        if page is not shared:
            if task.now > world.turns.next:
                yield task.now
            page.mapcount -= 1
            host.put(task, page)
        task.now += args["every_us"] * 1000


def storm(world: World, vm: Vm, task: Task, slot: Slot, args: dict[str, Any]) -> Story:
    """storm: invalidations of the same range, one after another (NUMA balancing, KSM)."""
    mapping = slot.mapping
    for _ in _rounds(world, args):
        low, high = mapping.hva, mapping.hva + (mapping.npages << 12)
        yield from start(world, vm, task, low, high, "protection_page")
        yield from end(world, vm, task, low, high, "protection_page")
        task.now += args["every_us"] * 1000


# --- looking at memory ----------------------------------------------------------------------------


def age(world: World, vm: Vm, task: Task, slot: Slot, args: dict[str, Any]) -> Story:
    """age: clear the accessed bits of part of a slot (clear_young of the mmu notifier)."""
    for _ in _rounds(world, args):
        count = _count(args, slot.npages)
        first = slot.base + world.dice.below(slot.npages - count + 1)
        yield from vm.write_lock(task, 1000)
        for leaf in vm.leaves_in(vm.root, first, first + count):
            if leaf.spte & 0x20 and leaf.root.leaves.get(leaf.key) is leaf:
                if task.now > world.turns.next:
                    yield task.now
                if vm.shadow:  # cleared in place, with nothing to hook (ARCHITECTURE.md)
                    leaf.spte &= ~0x20
                else:
                    vm.change(task, task.now, leaf, leaf.spte & ~0x20, _AGING)
                task.now += 500
        task.now += args["every_us"] * 1000


def dirty_log(world: World, vm: Vm, task: Task, slot: Slot, args: dict[str, Any]) -> Story:
    """dirty_log: log dirty pages for some rounds, as a live migration does."""
    slot.flags |= _LOG_DIRTY
    slot.dirty_log = True
    _slot(world, vm, task, slot, "flags")
    task.now += 500_000
    for _ in range(1 + args["rounds"]):
        if task.now > world.turns.next:
            yield task.now
        yield from _write_protect(world, vm, task, slot)
        task.now += args["every_us"] * 1000
    slot.flags &= ~_LOG_DIRTY
    slot.dirty_log = False
    if task.now > world.turns.next:
        yield task.now
    _slot(world, vm, task, slot, "flags")
    yield from recover(world, vm, task, slot)


def _write_protect(world: World, vm: Vm, task: Task, slot: Slot) -> Story:
    leaves = vm.leaves_in(vm.root, slot.base, slot.end)
    large = [leaf for leaf in leaves if leaf.level > 1]
    for leaf in large:
        yield from vm.write_lock(task, 8000)
        if leaf.root.leaves.get(leaf.key) is leaf:
            split(vm, task, task.now, leaf, _DIRTY_LOG)
            task.now += 6000
    if large:
        leaves = vm.leaves_in(vm.root, slot.base, slot.end)
    for at in range(0, len(leaves), 256):
        yield from vm.write_lock(task, 256 * 700)
        for leaf in leaves[at : at + 256]:
            if task.now > world.turns.next:
                yield task.now
            if leaf.level == 1 and leaf.spte & 2 and leaf.root.leaves.get(leaf.key) is leaf:
                vm.change(task, task.now, leaf, leaf.spte & ~2, _DIRTY_LOG)
                if world.kernel.dirty_log_marks and not vm.shadow and vm.passes_on(leaf.spte):
                    world.out.release(task, task.now + 200, _MARK_DIRTY, 0, leaf.pfn, leaf.page)
                    leaf.page.flags = world.kernel.flags.marked
                task.now += 700


def pin(world: World, vm: Vm, task: Task, slot: Slot, args: dict[str, Any]) -> Story:
    """pin: kvm_vcpu_map() and kvm_vcpu_unmap() of guest pages, as nested virtualisation does."""
    host, kernel, out = world.host, world.kernel, world.out
    for number in _rounds(world, args):
        if task.now > world.turns.next:
            yield task.now
        index = (number * 7) % min(slot.npages, 64) + slot.first
        entry = slot.mapping.entry(index)
        if entry is None:
            entry_made = populate(host, task, slot.mapping, index, write=True)
            if entry_made[0] is None:
                return
            entry = (entry_made[0], entry_made[1], entry_made[2])
        page, pfn, writable = entry
        if not writable or page.count <= 0:
            task.now += _LOOK_NS
            continue
        gfn, hva = slot.base + index - slot.first, 0xFF11000000000000 + (pfn << 12)
        page.count += kernel.pin_bias
        got = task.now
        out.event(task, got, "PIN", "map", gfn=gfn, pfn=pfn, b=hva, page=page, vm=vm.id, vcpu=0)
        task.now += 400_000
        if world.strikes("vcpu_map_leak"):
            world.ledger.bug("vcpu_map_leak", vm.id, got, gfn, pfn)
            world.ledger.references.append(REFERENCES.pack(vm.id, 0, _PIN, gfn, pfn, 0, got, 0, 0))
            continue
        if task.now > world.turns.next:
            yield task.now
        out.event(
            task, task.now, "PIN", "unmap", gfn=gfn, pfn=pfn, b=hva, page=page, vm=vm.id, vcpu=0
        )
        if kernel.pin_call:
            task.now += 500
            out.release(task, task.now, CALL[kernel.pin_call], 0, pfn, page)
        page.count -= kernel.pin_bias - 1
        host.put(task, page)
        world.ledger.references.append(
            REFERENCES.pack(vm.id, 0, _PIN, gfn, pfn, 0, got, task.now, pfn)
        )
        task.now += args["every_us"] * 1000


# --- memslots -------------------------------------------------------------------------------------


def _settled(world: World, vm: Vm, task: Task) -> Story:
    """kvm_swap_active_memslots() waits until no invalidation is under way."""
    if task.now > world.turns.next:
        yield task.now
    while vm.active_invalidations:
        task.now += 2000
        yield task.now


def delete_slot(world: World, vm: Vm, task: Task, slot: Slot, moved: Slot | None = None) -> Story:
    """Delete a slot, or move it: kvm_mmu_zap_all_fast(), so that every leaf of the VM goes."""
    yield from _settled(world, vm, task)
    slot.valid = False
    task.now += 200_000  # synchronize_srcu()
    if world.strikes("invalid_slot"):  # a reader that does not come out of its section
        slot.stuck = True
        task.now += 2_000_000_000
        yield task.now
    yield from vm.write_lock(task, 800)
    root, vm.root = vm.root, Root()
    root.valid = False
    vm.old_roots.append(root)
    leaves = sorted(root.leaves.values(), key=lambda leaf: leaf.key)
    frozen = world.kernel.frozen if world.kernel.teardown_frozen and not vm.shadow else -1
    yield from vm.zap_range(task, leaves, _SLOT, new=frozen, write=False)
    vm.old_roots.remove(root)
    task.now += 1_500_000
    yield from _settled(world, vm, task)
    vm.drop_slot(slot)
    if moved is None:
        _slot(world, vm, task, slot, "delete")
    else:
        vm.add_slot(moved)
        _slot(world, vm, task, moved, "move")
    task.now += 400_000
    if task.now > world.turns.next:
        yield task.now


def churn(world: World, vm: Vm, task: Task, slot: Slot, args: dict[str, Any]) -> Story:
    """churn: delete a slot and create it again, some times (a device's BAR that moves)."""
    for _ in _rounds(world, args):
        yield from delete_slot(world, vm, task, slot)
        task.now += args["every_us"] * 1000
        yield from _settled(world, vm, task)
        again = Slot(slot.id, slot.base, slot.npages, slot.mapping, slot.first, slot.flags)
        create_slot(world, vm, task, again)
        slot = again
        task.now += args["every_us"] * 1000


def move(world: World, vm: Vm, task: Task, slot: Slot, args: dict[str, Any]) -> Story:
    """move: move a slot to another guest address and back."""
    for number in range(2 * args["times"]):
        shift = (slot.npages + MOVE_GAP) * (1 if number % 2 == 0 else -1)
        moved = Slot(slot.id, slot.base + shift, slot.npages, slot.mapping, slot.first, slot.flags)
        yield from delete_slot(world, vm, task, slot, moved)
        slot = moved
        task.now += args["every_us"] * 1000


def sleep(world: World, vm: Vm, task: Task, slot: Slot, args: dict[str, Any]) -> Story:
    """sleep: let time pass."""
    task.now += args["us"] * 1000
    if task.now > world.turns.next:
        yield task.now


#: Verb of a scenario file -> story; the first line of its docstring is its help.
VERBS: Final[dict[str, Callable[[World, Vm, Task, Slot, dict[str, Any]], Story]]] = {
    verb.__name__: verb
    for verb in (discard, merge, storm, age, dirty_log, pin, pfncache, churn, move, sleep)
}


# --- the end --------------------------------------------------------------------------------------


def destroy_vm(world: World, vm: Vm, task: Task, mappings: list[Mapping]) -> Story:
    """The VM's process exits: KVM lets go of everything, then its memory is freed."""
    if task.now > world.turns.next:
        yield task.now
    frozen = world.kernel.frozen if world.kernel.teardown_frozen and not vm.shadow else -1
    leaves = sorted(vm.all_leaves(), key=lambda leaf: leaf.key)
    yield from vm.zap_range(task, leaves, _TEARDOWN, new=frozen, write=False)
    task.now += 2_000_000
    world.out.event(task, task.now, "VM", "delete", a=vm.kvm, d=vm.tgid, vm=vm.id)
    host = world.host
    for one in (*vm.tasks, task):
        one.now = task.now
        host.drain(one)
    for mapping in mappings:
        for page in _pages_of(host, mapping):
            task.now += 700
            if page.bits and not mapping.kind.zone_device:
                page.mapcount = -1
                host.put(task, page)
            if world.out.full:
                yield task.now
        if world.turns.next > task.now:
            world.turns.now = task.now


def _pages_of(host: Host, mapping: Mapping) -> list[Page]:
    """Return each page of a mapping once for each time that it is mapped."""
    kind = mapping.kind
    if kind.driver:  # its driver gives blocks back as it got them
        blocks = mapping.blocks.values()
        return [page for block in blocks for page in (block[:1] if kind.order else block)]
    found = []
    for index in sorted(mapping.pages):
        page = mapping.pages[index]
        first = not page.order or index & (1 << page.order) - 1 == 0
        if page is not host.zero and first and page.bits and page.count > 0:
            found.append(page)
    mapping.pages.clear()
    return found
