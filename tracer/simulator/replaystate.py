"""What a replay remembers: leaves, open faults, slots, pins and the notifier's numbers of each VM.

May import: standard library.
"""

import dataclasses
from bisect import bisect_left
from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ("FaultSoFar", "LeafSeen", "Pending", "Row", "VmSeen")

Row = Mapping[str, Any]


@dataclasses.dataclass(slots=True)
class LeafSeen:
    """One leaf, as the records so far left it."""

    key: tuple[int, ...]
    pfn: int
    pages: int
    spte: int
    as_id: int
    gfn: int
    #: a leaf of the same frame came while this one was there: it must be of a root on its way out
    left_behind: bool = False
    #: born of a split, with no install of its own: the kernel may have made it executable
    split: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Pending:
    """A record that only a later one can explain, its number, and what was expected instead."""

    number: int
    row: Row
    expected: str
    tid: int


@dataclasses.dataclass(slots=True)
class FaultSoFar:
    """A fault whose FAULT record has not come yet."""

    leaves: int = 0
    puts: int = 0
    put_pfns: list[int] = dataclasses.field(default_factory=list)
    #: the count of the page before the last put
    put_count: int = 0
    prefetched: int = -1
    #: the page table that the prefetched SPTE is in
    table: int = 0
    inner: tuple[str, int] = ("", -1)
    #: the install of the fault itself: number, record, and the sequence KVM was seen at by then
    installed: tuple[int, Row, int] | None = None


class VmSeen:
    """One VM: what is mapped, which slots there are, and how far its invalidations are."""

    def __init__(self) -> None:
        self.created = self.gone = False
        #: of one that is older than the recording: is it known what was in progress before?
        self.settled = False
        #: (as_id, slot) -> (first gfn, pages, hva, flags)
        self.slots: dict[tuple[int, int], tuple[int, int, int, int]] = {}
        self.leaves: dict[tuple[int, ...], list[LeafSeen]] = {}
        self._by_gfn: dict[tuple[int, int], list[LeafSeen]] = {}
        self.seq: int | None = None
        #: the highest mmu_invalidate_seq that a record of the notifier has shown
        self.seq_shown = 0
        #: when invalidations ended (ns), in order
        self.ends: list[int] = []
        self.in_progress = 0
        #: when a slot was deleted or moved last (ns)
        self.changed_at = 0
        #: how many were so far, and the last change after which a vCPU (by thread) tried again
        self.changes = 0
        self.reloaded: dict[int, int] = {}
        self.pins: dict[int, list[tuple[int, Row]]] = {}
        #: faults that found their slot or root gone, until a memslot change explains them
        self.unexplained: list[Pending] = []
        #: puts of threads that may be refreshing a pfn cache: hva_to_pfn_retry()
        self.cached: dict[int, Pending] = {}
        self.invalidating: dict[int, int] = {}
        #: numbers of the notifier that only other tasks' records can explain
        self.overtaken: list[Pending] = []
        #: (key, pfn) -> change of a leaf whose install has no record yet
        self.early: dict[tuple[tuple[int, ...], int], Pending] = {}
        #: page tables of the shadow MMU whose prefetches show their puts (True) or do not
        self.tables: dict[int, bool] = {}

    def put(self, leaf: LeafSeen) -> None:
        """Remember a leaf."""
        self.leaves.setdefault(leaf.key, []).append(leaf)
        self._by_gfn.setdefault((leaf.as_id, leaf.gfn), []).append(leaf)

    def take(self, leaf: LeafSeen) -> None:
        """Forget a leaf."""
        for index, at in ((self.leaves, leaf.key), (self._by_gfn, (leaf.as_id, leaf.gfn))):
            there = index[at]  # type: ignore[index]
            there.remove(leaf)
            if not there:
                del index[at]  # type: ignore[arg-type]

    def mapped_in(self, as_id: int, first: int, last: int) -> Iterator[LeafSeen]:
        """Yield leaves that map a guest frame of [first, last)."""
        if last - first > len(self._by_gfn):
            for leaves in list(self._by_gfn.values()):
                for leaf in leaves:
                    if leaf.as_id == as_id and leaf.gfn < last and leaf.gfn + leaf.pages > first:
                        yield leaf
            return
        for gfn in {first & ~0x1FF, first & ~0x3FFFF, *range(first, last)}:
            for leaf in self._by_gfn.get((as_id, gfn), ()):
                if leaf.gfn + leaf.pages > first:
                    yield leaf

    def ended_within(self, ts: int, ns: int | None) -> bool:
        """Did an invalidation end in the `ns` after `ts`? None: nobody knows how long that was."""
        at = bisect_left(self.ends, ts)
        return at < len(self.ends) and (ns is None or self.ends[at] <= ts + ns)

    def covered(self, low: int, high: int) -> Iterator[tuple[int, int, int]]:
        """Yield (as_id, first gfn, gfn behind the last) of each slot that host memory is behind."""
        for (as_id, _), (base, npages, hva, _) in self.slots.items():
            first, last = max(low, hva), min(high, hva + (npages << 12))
            if first < last:
                yield as_id, base + (first - hva >> 12), base + (last - hva + 4095 >> 12)
