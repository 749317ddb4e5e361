"""KVM's side of a VM: memslots, roots, leaves, mmu_lock and the mmu notifier's sequence.

What happens here is what a record tells: a leaf is installed, changed or zapped. Who does it, and
when, is in `fault` and `ops`. May import: standard library, `tracer.simulator`.
"""

from collections.abc import Iterator
from typing import Final

from tracer.simulator.clock import Dice, Story, Task, Turns
from tracer.simulator.host import Host, Mapping, Page
from tracer.simulator.kernels import REFCOUNTED_BIT, Kernel
from tracer.simulator.ledger import ALIVE, BIRTH, BIRTH_CAUSES, DEATH, ENDINGS, NO_COUNT, Ledger
from tracer.simulator.recorder import CALL, CAUSE, OP, Recorder

__all__ = ("ALIAS", "SPLIT", "ZAP_NS", "Leaf", "PfnCache", "Root", "Slot", "Vm", "World")

#: Leaves of the shadow MMU are found by guest virtual page: gfn plus a number of the alias.
ALIAS: Final = 44
_GFN: Final = (1 << ALIAS) - 1
_TEARDOWN: Final = CAUSE["teardown"]
_INSTALL: Final = OP["install"]
_CHANGE: Final = OP["change"]
_ZAP: Final = OP["zap"]
_MARK_ACCESSED: Final = CALL["mark_accessed"]
_MARK_DIRTY: Final = CALL["mark_dirty"]
#: How a leaf came that has no install of its own: a large one was split.
SPLIT: Final = BIRTH_CAUSES.index("split")
_ENDING: Final = {name: number for number, name in enumerate(ENDINGS)}
_ACCESSED: Final = 0x20
_DIRTY: Final = 0x40
_WRITABLE: Final = 0x2
_LARGE: Final = 0x80
_pack_birth: Final = BIRTH.pack
_pack_death: Final = DEATH.pack
#: A leaf costs so much time to zap (ns), and mmu_lock is offered to others after so many.
ZAP_NS: Final = 1500
_ZAPS_AT_ONCE: Final = 256


class World:
    """What all parts of one simulation share."""

    __slots__ = ("armed_at", "bugs", "dice", "host", "kernel", "ledger", "out", "touching", "turns")

    def __init__(
        self, kernel: Kernel, dice: Dice, turns: Turns, out: Recorder, ledger: Ledger, host: Host
    ) -> None:
        self.kernel, self.dice, self.turns = kernel, dice, turns
        self.out, self.ledger, self.host = out, ledger, host
        #: bug -> probability, at each chance it gets
        self.bugs: dict[str, float] = {}
        #: when the recording began (ns), if that was after the VM
        self.armed_at = 0
        #: vCPUs that have still something to do in this phase
        self.touching = 0

    def strikes(self, bug: str) -> bool:
        """Tell whether a planted bug shows at this chance."""
        rate = self.bugs.get(bug)
        return rate is not None and (rate >= 1 or self.dice.random() < rate)


class Slot:
    """One memslot; `valid` is false while it is being deleted (KVM_MEMSLOT_INVALID)."""

    __slots__ = ("as_id", "base", "dirty_log", "end", "first", "flags", "hva", "hva_end", "id",
                 "mapping", "npages", "stuck", "told", "valid")  # fmt: skip

    def __init__(
        self, slot_id: int, base: int, npages: int, mapping: Mapping, first: int, flags: int
    ) -> None:
        self.id, self.base, self.npages, self.mapping = slot_id, base, npages, mapping
        self.first, self.flags, self.as_id = first, flags, 0
        self.end = base + npages
        self.hva = mapping.hva + (first << 12)
        self.hva_end = self.hva + (npages << 12)
        self.valid = True
        #: bug invalid_slot: does its deletion take seconds?
        self.stuck = False
        self.dirty_log = False
        #: does the recording know it?
        self.told = True

    @property
    def read_only(self) -> bool:
        """Is it a KVM_MEM_READONLY slot?"""
        return bool(self.flags & 2)


class Leaf:
    """One SPTE that maps guest memory."""

    __slots__ = ("as_id", "birth_cause", "birth_count", "birth_mapcount", "birth_seq", "birth_spte",
                 "birth_ts", "born_by", "changes", "fault_ts", "key", "level", "page", "pfn",
                 "root", "slot_id", "spte", "sptep")  # fmt: skip

    def __init__(self, root: "Root", key: int, level: int, spte: int, pfn: int, page: Page) -> None:
        self.root, self.key, self.level, self.spte = root, key, level, spte
        self.pfn, self.page = pfn, page
        self.sptep = self.changes = self.as_id = 0
        #: its memslot, -1 if there is none
        self.slot_id = 0
        #: what the ledger will have of its beginning, set by `Vm.born`
        self.born_by: Task | None = None
        self.birth_ts = self.birth_seq = self.birth_cause = self.fault_ts = self.birth_spte = 0
        self.birth_count = self.birth_mapcount = 0

    @property
    def gfn(self) -> int:
        """The first guest frame that it maps."""
        return self.key & _GFN

    @property
    def pages(self) -> int:
        """How many 4K pages it maps."""
        return 1 << 9 * (self.level - 1)


class Root:
    """One tree of SPTEs; after a fast zap-all it is invalid, and reached by nobody new."""

    __slots__ = ("leaves", "split", "tables", "valid")

    def __init__(self) -> None:
        self.leaves: dict[int, Leaf] = {}
        #: 2M leaves by gfn >> 9 stand in `leaves` under their first gfn
        self.tables: dict[int, int] = {}
        #: tables in place of large leaves that were split: first key -> the entry that leads there
        self.split: dict[int, int] = {}
        self.valid = True

    def maps_some(self, first: int, pages: int) -> bool:
        """Is there a leaf at one of these keys?"""
        if pages > len(self.leaves):
            return any(first <= key < first + pages for key in self.leaves)
        return any(key in self.leaves for key in range(first, first + pages))


class PfnCache:
    """A gfn_to_pfn_cache of page `pfn`; `valid` until the mmu notifier takes that."""

    __slots__ = ("gfn", "hva", "pfn", "valid")

    def __init__(self, gfn: int, hva: int) -> None:
        self.gfn, self.hva, self.pfn, self.valid = gfn, hva, -1, False


class Vm:
    """One VM: the lock, the sequence, the slots and the tree that its vCPUs use."""

    def __init__(self, world: World, number: int, mmu: str, tgid: int, aliases: int = 1) -> None:
        self.world, self.id, self.tgid = world, number, tgid
        self.shadow = mmu == "shadow"
        self.mmu = 2 if self.shadow else 1
        self.aliases = aliases if self.shadow else 1
        self.kvm = 0xFF11000107DFA000 + (number << 20)
        self.seq = self.in_progress = 0
        #: notifier calls between start and end: slots are not swapped meanwhile
        self.active_invalidations = 0
        self.range: tuple[int, int] = (0, 0)
        self.write_until = self.read_until = 0
        self.slots: dict[int, Slot] = {}
        self._at: list[Slot] = []
        self.root = Root()
        self.old_roots: list[Root] = []
        self.tasks: list[Task] = []
        self.caches: list[PfnCache] = []
        #: level of the largest leaf that a slot of it may have
        self.level = 1
        #: the bits of an SPTE beside its frame, as `_bits_of` found them
        self._bits: dict[tuple[bool, bool, int, bool, bool], int] = {}
        self._next_table = 0xFF11000200000000 + (number << 32)

    # --- slots -----------------------------------------------------------------------------------

    def add_slot(self, slot: Slot) -> None:
        """Let vCPUs find the slot."""
        self.slots[slot.id] = slot
        self.level = max(self.level, slot.mapping.kind.level)
        self._at = sorted(self.slots.values(), key=lambda s: s.base)

    def drop_slot(self, slot: Slot) -> None:
        """Take the slot away."""
        del self.slots[slot.id]
        self._at.remove(slot)

    def slot_at(self, gfn: int) -> Slot | None:
        """Return the slot of a guest frame, as search_memslots() does."""
        for slot in self._at:
            if slot.base <= gfn < slot.end:
                return slot
        return None

    # --- mmu_lock --------------------------------------------------------------------------------

    def lock_at_once(self, task: Task, hold: int) -> bool:
        """Take mmu_lock for `hold` ns like `write_lock`, if nobody's turn comes before."""
        free = max(self.write_until, self.read_until, task.now)
        if free > self.world.turns.next:
            return False
        task.now = free
        self.write_until = free + hold
        return True

    def write_lock(self, task: Task, hold: int) -> Story:
        """Wait for mmu_lock and take it for `hold` ns; the task's clock moves with it."""
        turns = self.world.turns
        while True:
            free = max(self.write_until, self.read_until)
            if task.now < free:
                task.now = free
            if task.now > turns.next:
                yield task.now
                if task.now < max(self.write_until, self.read_until):
                    continue
            self.write_until = task.now + hold
            return

    def read_lock(self, task: Task, hold: int) -> Story:
        """Wait for mmu_lock and take it for `hold` ns together with other readers (TDP faults)."""
        turns = self.world.turns
        while True:
            if task.now < self.write_until:
                task.now = self.write_until
            if task.now <= turns.next:
                break
            yield task.now
            if task.now >= self.write_until:
                break
        self.read_until = max(self.read_until, task.now + hold)

    # --- leaves ----------------------------------------------------------------------------------

    def new_table(self) -> int:
        """Return the address of a new page table."""
        table = self._next_table
        self._next_table += 4096
        return table

    def _sptep(self, root: Root, key: int, level: int) -> int:
        shift = 9 * level
        table = root.tables.get(key >> shift)
        if table is None:
            table = root.tables[key >> shift] = self.new_table()
        return table + (key >> (shift - 9) & 511) * 8

    def spte_for(self, pfn: int, *, writable: bool, host_writable: bool, level: int,
                 counted: bool, accessed: bool) -> int:  # fmt: skip
        """make_spte() without write tracking: the bits of NPT and of the shadow MMU."""
        bits = self._bits.get((writable, host_writable, level, counted, accessed))
        if bits is None:
            bits = self._bits_of(writable, host_writable, level, counted, accessed)
            self._bits[writable, host_writable, level, counted, accessed] = bits
        return pfn << 12 | bits

    def _bits_of(
        self, writable: bool, host_writable: bool, level: int, counted: bool, accessed: bool
    ) -> int:
        kernel = self.world.kernel
        spte = 0x801 | (0 if self.shadow else 0x4)
        if accessed:
            spte |= _ACCESSED
        if host_writable:
            spte |= 0x200
        if writable:
            spte |= _WRITABLE | _DIRTY | 0x400
        if level > 1:
            spte |= _LARGE
        if counted and (kernel.bit_shadow if self.shadow else kernel.bit_tdp):
            spte |= REFCOUNTED_BIT
        return spte

    def install(
        self, task: Task, ts: int, key: int, level: int, pfn: int, page: Page, spte: int,
        slot: Slot, cause: int, root: Root | None = None, *, old: int | None = None,
    ) -> Leaf:  # fmt: skip
        """Write a leaf where there was none, or (`old`) a table of leaves."""
        root = root or self.root
        leaf = Leaf(root, key, level, spte, pfn, page)
        leaf.sptep = self._sptep(root, key, level) if self.shadow else 0
        leaf.slot_id, leaf.as_id = slot.id, slot.as_id
        if self.world.bugs and (self.slots.get(slot.id) is not slot or leaf.gfn >= slot.end):
            there = self.slot_at(leaf.gfn)
            leaf.slot_id = there.id if there is not None else -1
        seq = self.world.out.spte(
            task, ts, _INSTALL, leaf.gfn, pfn,
            self.world.kernel.nonpresent if old is None else old, spte, leaf.sptep,
            level, slot.as_id, cause, self.mmu, page,
        )  # fmt: skip
        if page.bits:
            self.born(task, ts, leaf, cause, seq, page.count, page.mapcount)
            self.world.host.mapped_by_vm(page, self.id)
        else:
            self.born(task, ts, leaf, cause, seq, NO_COUNT, NO_COUNT)
        root.leaves[key] = leaf
        return leaf

    def born(
        self, task: Task, ts: int, leaf: Leaf, cause: int, seq: int, count: int, mapcount: int
    ) -> None:
        """Remember how a leaf came, as the ledger will have it."""
        leaf.born_by, leaf.birth_ts, leaf.birth_seq, leaf.birth_cause = task, ts, seq, cause
        leaf.fault_ts, leaf.birth_spte = task.fault_ts, leaf.spte
        leaf.birth_count, leaf.birth_mapcount = count, mapcount

    def birth_of(self, leaf: Leaf) -> bytes:
        """Return the part of a leaf's row in the ledger that is known from the beginning."""
        by, level = leaf.born_by, leaf.level
        assert by is not None
        return _pack_birth(
            self.id, leaf.as_id, self.mmu, level, leaf.gfn, 1 << 9 * (level - 1), leaf.pfn,
            leaf.sptep, leaf.slot_id, leaf.birth_ts, leaf.birth_cause, by.tid, by.tgid, by.cpu,
            leaf.birth_seq, leaf.fault_ts, by.vcpu if leaf.fault_ts else -1, leaf.birth_spte,
            leaf.birth_count, leaf.birth_mapcount,
        )  # fmt: skip

    def change(
        self, task: Task, ts: int, leaf: Leaf, new: int, cause: int, *, sptep: int = 0
    ) -> None:
        """Change bits of a leaf in place, same page."""
        self.world.out.spte(
            task, ts, _CHANGE, leaf.gfn, leaf.pfn, leaf.spte, new, leaf.sptep or sptep, leaf.level,
            leaf.as_id, cause, self.mmu, leaf.page,
        )  # fmt: skip
        leaf.spte = new
        leaf.changes += 1

    def rewrite(self, task: Task, ts: int, leaf: Leaf, new: int, cause: int, gfn: int) -> None:
        """Write a leaf anew that had the dirty bit and loses it: then its page is marked."""
        dirty = leaf.spte & _DIRTY and self.passes_on(leaf.spte)
        self.change(task, ts, leaf, new, cause)
        if dirty:
            task.now = ts + 400
            self.world.out.release(task, task.now, _MARK_DIRTY, gfn, leaf.pfn, leaf.page)

    def zap(
        self, task: Task, ts: int, leaf: Leaf, cause: int, *, new: int = -1, ended_by: str = ""
    ) -> None:
        """Take a leaf away, and mark its page as the kernel does."""
        world, kernel, page = self.world, self.world.kernel, leaf.page
        if new < 0:
            new = 0 if self.shadow else kernel.nonpresent
        seq = world.out.spte(
            task, ts, _ZAP, leaf.gfn, leaf.pfn, leaf.spte, new, leaf.sptep, leaf.level, leaf.as_id,
            cause, self.mmu, page,
        )  # fmt: skip
        ended_by = ended_by or ("teardown" if cause == _TEARDOWN else "zap")
        self.close(leaf, ts, cause, task, seq, ended_by)
        if self.passes_on(leaf.spte):
            self._mark(task, ts, leaf)

    def passes_on(self, spte: int) -> bool:
        """Does the kernel pass the accessed and dirty bits of this SPTE on to the page?"""
        kernel = self.world.kernel
        has_bit = kernel.bit_shadow if self.shadow else kernel.bit_tdp
        counted = bool(spte & REFCOUNTED_BIT) or not has_bit
        return kernel.zap_marks == "all" or (kernel.zap_marks == "bit" and counted)

    def _mark(self, task: Task, ts: int, leaf: Leaf) -> None:
        # handle_changed_spte() comes to the dirty bit first, the rmap code of the shadow MMU last.
        if self.shadow:
            ts = self._mark_accessed(task, ts, leaf)
            self._mark_dirty(task, ts, leaf)
        else:
            ts = self._mark_dirty(task, ts, leaf)
            self._mark_accessed(task, ts, leaf)

    def _mark_accessed(self, task: Task, ts: int, leaf: Leaf) -> int:
        if not leaf.spte & _ACCESSED:
            return ts
        self.world.out.release(task, ts + 400, _MARK_ACCESSED, 0, leaf.pfn, leaf.page)
        return ts + 400

    def _mark_dirty(self, task: Task, ts: int, leaf: Leaf) -> int:
        if not leaf.spte & _DIRTY:
            return ts
        page = leaf.page
        self.world.out.release(task, ts + 400, _MARK_DIRTY, 0, leaf.pfn, page)
        if page.lru and page.count > 0:
            page.flags = self.world.kernel.flags.marked
        return ts + 400

    def close(self, leaf: Leaf, ts: int, cause: int, task: Task | None, seq: int,
              ended_by: str) -> None:  # fmt: skip
        """Enter a life into the ledger and forget the leaf."""
        leaf.root.leaves.pop(leaf.key, None)
        self.enter(leaf, ts, cause, task, seq, ended_by)

    def enter(self, leaf: Leaf, ts: int, cause: int, task: Task | None, seq: int,
              ended_by: str) -> None:  # fmt: skip
        """Enter a life into the ledger; `task` is None if the recording ended first."""
        if task is None:
            death = _pack_death(*ALIVE, leaf.spte, leaf.changes, NO_COUNT, _ENDING[ended_by])
        else:
            # No record shows the page at the end of a life that another one took the place of.
            shown = leaf.page.bits and ended_by != "superseded"
            death = _pack_death(
                ts, cause, task.tid, task.tgid, task.cpu, seq, leaf.spte, leaf.changes,
                leaf.page.count if shown else NO_COUNT, _ENDING[ended_by],
            )  # fmt: skip
        self.world.ledger.lives.append(self.birth_of(leaf) + death)

    def leaves_in(self, root: Root, first: int, last: int) -> list[Leaf]:
        """Return the leaves that map a guest frame of [first, last), large ones included."""
        leaves = root.leaves
        if last - first > len(leaves):
            found = [
                leaf for leaf in leaves.values()
                if leaf.gfn < last and leaf.gfn + (1 << 9 * (leaf.level - 1)) > first
            ]  # fmt: skip
            return sorted(found, key=lambda leaf: leaf.key)
        found = []
        for alias in range(self.aliases):
            high = alias << ALIAS
            for pages in (512, 1 << 18):
                large = leaves.get((first & -pages) + high)
                if large is not None and first & pages - 1 and large.gfn + large.pages > first:
                    found.append(large)
            here = map(leaves.get, range(first + high, last + high))
            found += [leaf for leaf in here if leaf is not None]
        return found

    def zap_range(
        self, task: Task, leaves: list[Leaf], cause: int, *, new: int = -1, write: bool = True
    ) -> Story:
        """Zap leaves one after another, offering mmu_lock in between as the kernel does."""
        turns, out = self.world.turns, self.world.out
        for at in range(0, len(leaves), _ZAPS_AT_ONCE):
            part = leaves[at : at + _ZAPS_AT_ONCE]
            if out.full:  # nobody else may be there to end this turn, and much is still to come
                yield task.now
            if write or self.shadow:
                yield from self.write_lock(task, len(part) * ZAP_NS)
            elif task.now > turns.next:
                yield task.now
            for leaf in part:
                if task.now > turns.next:
                    yield task.now
                if leaf.root.leaves.get(leaf.key) is leaf:
                    self.zap(task, task.now, leaf, cause, new=new)
                    task.now += ZAP_NS

    def all_leaves(self) -> Iterator[Leaf]:
        """Yield every leaf, those of old roots first."""
        for root in (*self.old_roots, self.root):
            yield from list(root.leaves.values())
