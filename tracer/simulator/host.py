"""The host's memory: pages with their counts, where they come from, and what maps them.

A `Page` is what `_refcount` is counted on: the head of a compound page, any other page by itself.
A `Mapping` is one VMA behind guest memory, with its host page table.
May import: standard library, `tracer.simulator.clock`.
"""

import dataclasses
from collections.abc import Callable
from typing import Final

from tracer.simulator.clock import Task
from tracer.simulator.kernels import Kernel

__all__ = ("KINDS", "TAIL_BITS", "ZERO_PFN", "Host", "Mapping", "MemoryKind", "Page")

_HAS_STRUCT: Final = 1
_TAIL: Final = 2
_HEAD: Final = 4
_RESERVED: Final = 8
_ZERO: Final = 16
_ZONE: Final = 32
ZERO_PFN: Final = 0xBAB3A
#: Bits of a struct page behind the head of a compound page.
TAIL_BITS: Final = _HAS_STRUCT | _TAIL
#: mm_page_free and mm_page_alloc are recorded for pages that a VM mapped: 0 no, 1 mapped, 2 freed.
_MAPPED: Final = 1
_FREED: Final = 2
#: Free pages that are looked at for one that is free by now.
_LOOKS: Final = 64


class Page:
    """One struct page that has a count of its own; `order` is that of its compound page."""

    __slots__ = ("bits", "block", "count", "flags", "freed_at", "lead", "lru", "mapcount", "order",
                 "pfn", "seen", "shared", "vm")  # fmt: skip

    def __init__(self, pfn: int, count: int, mapcount: int, flags: int, order: int = 0) -> None:
        self.pfn, self.count, self.mapcount, self.flags = pfn, count, mapcount, flags
        self.order = order
        self.bits = _HAS_STRUCT | (_HEAD if order else 0)
        self.lru = False
        #: is it read-only wherever it is mapped, as the zero page and merged pages are?
        self.shared = False
        self.seen = 0
        self.vm = 0
        self.freed_at = 0
        #: order of the block that is freed with it, and the page that stands for this block
        self.block = order
        self.lead = self


@dataclasses.dataclass(frozen=True, slots=True)
class MemoryKind:
    """What stands behind a memslot. `smaps` are the VmFlags of /proc/PID/smaps."""

    name: str
    title: str
    #: order of the blocks it is allocated in, and whether these are compound pages
    order: int = 0
    compound: bool = False
    #: has it struct pages, and has each of them a count?
    has_struct: bool = True
    counted: bool = True
    #: VM_PFNMAP: the host's page table is walked, GUP cannot see it
    pfnmap: bool = False
    writable: bool = True
    #: read faults of pages that were never written get the zero page
    zero_on_read: bool = False
    zone_device: bool = False
    #: largest leaf that KVM may map it with
    level: int = 1
    path: str = ""
    perms: str = "rw-p"
    smaps: tuple[str, ...] = ("rd", "wr", "mr", "mw", "me", "ac", "sd")
    vm_flags: int = 0

    @property
    def driver(self) -> bool:
        """Do its pages belong to a driver, which keeps them when they are unmapped?"""
        return self.pfnmap or self.zone_device


_PF: Final = ("rd", "wr", "sh", "mr", "mw", "me", "ms", "pf", "io", "de", "dd", "sd")
_SHARED: Final = ("rd", "wr", "sh", "mr", "mw", "me", "ms", "sd")
_DRM: Final = "/dev/dri/card0"
#: VM_READ | VM_WRITE | VM_SHARED | VM_MAY* | VM_PFNMAP | VM_IO | VM_DONTEXPAND | VM_DONTDUMP
_VM_PFNMAP: Final = 0xC0444FB

#: All kinds of memory by name.
KINDS: Final[dict[str, MemoryKind]] = {
    kind.name: kind
    for kind in (
        MemoryKind("anon", "anonymous memory in 4K pages", zero_on_read=True),
        MemoryKind("thp", "anonymous memory in transparent huge pages", 9, True, level=2),
        MemoryKind("shared", "shared memory (memfd)", path="/memfd:guest (deleted)",
                   perms="rw-s", smaps=_SHARED),
        MemoryKind("hugetlb", "hugetlb pages of 2M", 9, True, level=2,
                   path="/dev/hugepages/guest", perms="rw-s", smaps=(*_SHARED, "ht")),
        MemoryKind("hugetlb1g", "hugetlb pages of 1G", 18, True, level=3,
                   path="/dev/hugepages1G/guest", perms="rw-s", smaps=(*_SHARED, "ht")),
        MemoryKind("readonly", "a private file mapped read-only", writable=False,
                   path="/usr/share/firmware.bin", perms="r--p", smaps=("rd", "mr", "mw", "me")),
        MemoryKind("ttm", "TTM: non-compound blocks, whose tails have count 0", 3, counted=False,
                   pfnmap=True, path=_DRM, perms="rw-s", smaps=_PF, vm_flags=_VM_PFNMAP),
        MemoryKind("pfnmap", "PFNMAP pages with a count each", pfnmap=True, path=_DRM,
                   perms="rw-s", smaps=_PF, vm_flags=_VM_PFNMAP),
        MemoryKind("pfnmap_ro", "PFNMAP pages with a count each, mapped read-only", pfnmap=True,
                   writable=False, path=_DRM, perms="r--s", smaps=_PF,
                   vm_flags=_VM_PFNMAP & ~2),
        MemoryKind("mmio", "a device's memory without struct pages", has_struct=False,
                   counted=False, pfnmap=True, path="/dev/vfio/7", perms="rw-s", smaps=_PF,
                   vm_flags=_VM_PFNMAP),
        MemoryKind("dax", "ZONE_DEVICE pages of 4K, mapped 2M at a time", zone_device=True,
                   level=2, path="/mnt/pmem/disk.img", perms="rw-s", smaps=_SHARED),
    )
}  # fmt: skip


class Mapping:
    """One VMA: `pages` is its host page table, page index -> page."""

    __slots__ = ("blocks", "hva", "kind", "name", "npages", "pages", "seen")

    def __init__(self, name: str, kind: MemoryKind, hva: int, npages: int) -> None:
        self.name, self.kind, self.hva, self.npages = name, kind, hva, npages
        self.pages: dict[int, Page] = {}
        #: what a driver keeps for it, mapped or not: first index -> pages
        self.blocks: dict[int, list[Page]] = {}
        self.seen = False

    def entry(self, index: int) -> tuple[Page, int, bool] | None:
        """Return what the host's page table has: the page, its frame, and may it be written?"""
        page = self.pages.get(index)
        if page is None:
            return None
        behind = index & (1 << page.order) - 1 if page.order else 0
        return page, page.pfn + behind, self.kind.writable and not page.shared

    @property
    def end(self) -> int:
        """End of the range (bytes), exclusive."""
        return self.hva + (self.npages << 12)

    def note(self) -> dict[str, object]:
        """Return the VMA as the recorder's notes describe one."""
        return {
            "start": self.hva, "end": self.end, "perms": self.kind.perms, "offset": 0,
            "path": self.kind.path, "flags": list(self.kind.smaps),
        }  # fmt: skip


class Host:
    """The buddy allocator and the LRU batches; says what is freed and handed out again."""

    def __init__(self, kernel: Kernel, on_free: "OnPage", on_alloc: "OnPage") -> None:
        self._kernel, self.flags = kernel, kernel.flags
        self._on_free, self._on_alloc = on_free, on_alloc
        self._next = 0x100000
        self._free: dict[int, list[Page]] = {}
        self.zero = Page(ZERO_PFN, 1, -1, 0xFFFFFC0002004)
        self.zero.bits |= _RESERVED | _ZERO
        self.zero.shared = True
        self._unmapped = Page(0, 0, 0, 0)

    def alloc(self, task: Task, order: int, *, count: int = 1) -> Page:
        """Hand out a compound page or a single one, the one freed last first.

        Tasks run ahead of one another by a step: what another one frees later is not there yet.
        """
        free = self._free.setdefault(order, [])
        for at in range(len(free) - 1, max(-1, len(free) - _LOOKS), -1):
            if free[at].freed_at > task.now:
                continue
            page = free.pop(at)
            page.flags, page.mapcount = self.flags.plain, -1
            page.count = self._kernel.alloc_count
            if page.seen == _FREED:
                page.seen = 0
                self._on_alloc(task, page)
            page.count, page.lru, page.shared = count, False, False
            return page
        size = 1 << order
        first = (self._next + size - 1) & -size
        # Real free lists are not in order: neighbours are rarely handed out one after another.
        self._next = first + size
        return Page(first, count, -1, self.flags.plain, order)

    def block(self, order: int, *, counted: bool, has_struct: bool, zone: bool) -> list[Page]:
        """Hand out a non-compound block of a driver: only its first page has a count by itself."""
        size = 1 << order
        first = (self._next + size - 1) & -size
        self._next = first + size
        pages = []
        for at in range(size):
            page = Page(first + at, 1 if counted or at == 0 else 0, -1, self.flags.plain)
            if not has_struct:
                page.bits = page.count = page.flags = 0
            if zone:
                page.bits |= _ZONE
            pages.append(page)
        if not counted and has_struct:
            pages[0].block = order
            for page in pages:
                page.lead = pages[0]
        return pages

    def add_to_lru(self, task: Task, page: Page) -> None:
        """lru_cache_add(): the batch holds a reference until it is full (mm/swap.c)."""
        page.count += 1
        batch = task.lru_batch
        batch.append(page)
        if len(batch) >= self._kernel.lru_batch:
            self.drain(task)

    def activate(self, task: Task, page: Page) -> None:
        """mark_page_accessed() of a page on an LRU list, up to 6.1: one more batch."""
        page.count += 1
        task.activate_batch.append(page)
        if len(task.activate_batch) >= self._kernel.lru_batch:
            self.drain(task)

    def drain(self, task: Task) -> None:
        """lru_add_drain(): the cpu's batches give their references back."""
        for batch in (task.lru_batch, task.activate_batch):
            pages, batch[:] = list(batch), []
            for page in pages:
                assert isinstance(page, Page)
                if page.count > 0 and not page.lru:
                    page.lru = True
                    page.flags = self.flags.settled
                self.put(task, page)

    def put(self, task: Task, page: Page) -> None:
        """put_page(): the last one frees. A count may fall below zero, as in a broken kernel."""
        page.count -= 1
        if page.count == 0 and page is not self.zero:
            self.free(task, page)

    def free(self, task: Task, page: Page) -> None:
        """Give a page to the buddy allocator, whoever may still map it.

        What is freed although the host maps it is not handed out again, so that one planted bug
        stays one bug.
        """
        if page.bits & _ZONE or not page.bits:
            return
        if page.lru:
            page.flags = self.flags.freed
        page.freed_at = task.now
        mapcount, page.mapcount = page.mapcount, -1
        if page.seen == _MAPPED:
            page.seen = _FREED
            self._on_free(task, page)
        page.mapcount = mapcount
        if mapcount < 0 and page.lead is page and page.block == page.order:
            self._free.setdefault(page.order, []).append(page)

    def mapped_by_vm(self, page: Page, vm: int) -> None:
        """Remember that a traced VM maps the page: its free is then an event."""
        page.seen, page.vm = _MAPPED, vm
        if page.lead is not page:
            page.lead.seen, page.lead.vm = _MAPPED, vm


#: Called with the task and the page, when the buddy allocator takes or gives one.
OnPage = Callable[[Task, Page], None]
