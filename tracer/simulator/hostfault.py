"""The host's own page faults: what get_user_pages() finds or makes behind a guest page.

May import: standard library, `tracer.simulator`.
"""

from collections.abc import Generator
from typing import Final

from tracer.simulator.clock import Task
from tracer.simulator.host import Host, Mapping, Page
from tracer.simulator.invalidate import end, start
from tracer.simulator.mmu import Vm, World

__all__ = ("Found", "fresh_page", "host_fault", "populate")

#: KVM_PFN_ERR_RO_FAULT: a write where the mapping is read-only.
_ERR_RO: Final = (0x7FF << 52) + 2

#: The page, its frame, and may it be written? The page is None if the frame is an error.
Found = tuple[Page | None, int, bool]


def host_fault(
    world: World, vm: Vm, task: Task, mapping: Mapping, index: int, *, write: bool
) -> Generator[int, None, Found]:
    """Handle a host fault for one page of a mapping; a copy on write invalidates the old page."""
    entry = mapping.entry(index)
    kind = mapping.kind
    if write and not kind.writable and not kind.pfnmap:
        return None, _ERR_RO, False
    if entry is None:
        return populate(world.host, task, mapping, index, write=write)
    if kind.driver:
        if write and not kind.writable and "writable_over_readonly" not in world.bugs:
            return None, _ERR_RO, False
        return entry
    # wp_page_copy(), mm/memory.c: the zero page or a merged page gives way to an own one.
    if task.now > world.turns.next:
        yield task.now
        if mapping.entry(index) != entry:  # somebody was faster
            found = mapping.entry(index)
            return found or populate(world.host, task, mapping, index, write=write)
    page = fresh_page(world.host, task)
    hva = mapping.hva + (index << 12)
    yield from start(world, vm, task, hva, hva + 4096, "clear")
    found = mapping.entry(index)
    if found != entry:  # somebody was faster: the PTE is another one under its lock
        yield from end(world, vm, task, hva, hva + 4096, "clear")
        page.mapcount -= 1
        world.host.put(task, page)
        return mapping.entry(index) or populate(world.host, task, mapping, index, write=write)
    mapping.pages[index] = page
    yield from end(world, vm, task, hva, hva + 4096, "clear")
    old = entry[0]
    if old is not world.host.zero:
        old.mapcount -= 1
        world.host.put(task, old)
    return page, page.pfn, True


def fresh_page(host: Host, task: Task) -> Page:
    """Hand out an anonymous page: mapped once, and in a per-cpu LRU batch."""
    page = host.alloc(task, 0)
    page.mapcount = 0
    page.flags = host.flags.fresh
    host.add_to_lru(task, page)
    return page


def populate(host: Host, task: Task, mapping: Mapping, index: int, *, write: bool) -> Found:
    """Make the page behind an address that had none."""
    kind = mapping.kind
    if kind.driver:
        return _from_driver(host, mapping, index)
    if kind.zero_on_read and not write:
        mapping.pages[index] = host.zero
        return host.zero, host.zero.pfn, False
    if kind.order > 9:
        return _gigantic(host, task, mapping, index)
    if kind.compound:
        head = host.alloc(task, kind.order)
        head.flags, head.mapcount = host.flags.settled, 0
        head.lru = True
        first = index & -(1 << kind.order)
        for at in range(1 << kind.order):
            mapping.pages[first + at] = head
        return head, head.pfn + index - first, True
    page = fresh_page(host, task)
    mapping.pages[index] = page
    return page, page.pfn, kind.writable


def _gigantic(host: Host, task: Task, mapping: Mapping, index: int) -> Found:
    """A page of 1G: of its quarter million entries only those that somebody looked at are kept."""
    order = mapping.kind.order
    first = index & -(1 << order)
    block = mapping.blocks.get(first)
    if block is None:
        head = host.alloc(task, order)
        head.flags, head.mapcount, head.lru = host.flags.settled, 0, True
        block = mapping.blocks[first] = [head]
        mapping.pages[first] = head
    head = mapping.pages[index] = block[0]
    return head, head.pfn + index - first, True


def _from_driver(host: Host, mapping: Mapping, index: int) -> Found:
    """Map a block that the driver keeps: the whole of it at once, as TTM does."""
    kind = mapping.kind
    order = 9 if kind.zone_device else kind.order
    first = index & -(1 << order)
    block = mapping.blocks.get(first)
    if block is None:
        block = mapping.blocks[first] = host.block(
            order, counted=kind.counted, has_struct=kind.has_struct, zone=kind.zone_device
        )
    for at, page in enumerate(block):
        if first + at < mapping.npages:
            mapping.pages[first + at] = page
    page = block[index - first]
    return page, page.pfn, kind.writable
