"""The lives that are open: one record of 128 bytes each, found by key through a hash table.

numpy has no hash table that is filled and emptied in bulk, so here is one: open addressing with
linear probing, in which every operation takes arrays. A key is two words: the place (guest frame,
or the address of a shadow SPTE) and what is around it (`meta_of`). Several open lives may have one
key: they form a chain, oldest first. May import: numpy, `probes.errors`.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from probes.errors import PfntraceError

__all__ = (
    "ACCESSED",
    "CENSORED",
    "DOUBTED",
    "COUNT_KNOWN",
    "DIRTY",
    "LIFE",
    "META_FIELDS",
    "NONE",
    "OPEN_MAX",
    "SHADOW_BIT",
    "VM_SHIFT",
    "WRITABLE_EVER",
    "Array",
    "OpenLives",
    "hashed",
    "meta_of",
    "places",
)

Array = npt.NDArray[Any]

#: One open life; a row fills two cache lines, since it is written and read as a whole.
LIFE = np.dtype(
    [
        ("place", "<u8"),
        ("meta", "<u8"),
        ("life_id", "<i8"),
        ("gfn", "<u8"),
        ("pfn", "<u8"),
        ("birth_ts", "<u8"),
        ("fault_ts", "<u8"),
        ("spte_birth", "<u8"),
        ("spte_last", "<u8"),
        ("birth_tid", "<u4"),
        ("birth_tgid", "<u4"),
        ("birth_seq", "<u4"),
        ("changes", "<u4"),
        ("vcpu", "<i4"),
        ("slot", "<i4"),
        ("refcount_birth", "<i4"),
        ("mapcount_birth", "<i4"),
        ("refcount_min", "<i4"),
        ("refcount_max", "<i4"),
        ("next", "<i4"),
        ("level", "u1"),
        ("as_id", "u1"),
        ("birth_cpu", "<u2"),
        ("birth_cause", "u1"),
        ("page_class", "i1"),
        ("flags", "u1"),
        ("spare", "u1", (5,)),
    ]
)
_OPAQUE = np.dtype((np.void, LIFE.itemsize))
#: Flags of a life.
WRITABLE_EVER, ACCESSED, DIRTY, CENSORED, COUNT_KNOWN, DOUBTED = 1, 2, 4, 8, 16, 32
#: No slot: the end of a chain, a key that is not there.
NONE = -1
#: Open lives that are kept, 8 GiB of them: a quarter of a tebibyte in 4K pages.
OPEN_MAX = 1 << 26

#: The bit of `meta_of` that says shadow MMU, and all fields: lowest bit, width.
SHADOW_BIT = 16
META_FIELDS = ((0, 8), (8, 8), (SHADOW_BIT, 1), (17, 32))
VM_SHIFT = 17
_FREE, _GONE = 0, 1
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
#: Drawn anew, so that nobody can make a trace whose keys all fall together.
_ODD = np.random.default_rng().integers(0, 1 << 63, 3, np.uint64) * np.uint64(2) + np.uint64(1)
_SLOTS_MIN = 1 << 12


def places(wanted: Array) -> Array:
    """Return where something holds: np.flatnonzero() without its detours."""
    return np.asarray(wanted.nonzero()[0])


def meta_of(vm: Array, as_id: Array, level: Array, shadow: Array) -> Array:
    """Return the second word of a key: level, address space, shadow MMU, VM.

    In the shadow MMU an address tells the first two.
    """
    low = as_id.astype(np.uint16)
    low <<= np.uint16(8)
    low |= level
    if shadow.any():
        low[shadow] = 0
    meta = vm.astype(np.uint64)
    meta <<= np.uint64(1)
    meta |= shadow
    meta <<= np.uint64(SHADOW_BIT)
    meta |= low
    return meta


def hashed(place: Array, meta: Array) -> Array:
    """Return 64 well mixed bits for each key; other ones in each process."""
    h: Array = place * _ODD[0]
    h += meta * _ODD[1]
    h ^= h >> _HALF
    h *= _ODD[2]
    h ^= h >> _HALF
    return h


class OpenLives:
    """Rows of `LIFE` that come and go; `rows[slot]` is one of them."""

    def __init__(self) -> None:
        self.rows = np.empty(_SLOTS_MIN, LIFE)
        self._top = 0  # slots below were used at some time
        self._free = np.empty(0, np.int64)
        self._free_count = 0
        self._entries = 0  # of the table that are not free, gone ones included
        self._table = np.zeros(4 * _SLOTS_MIN, np.uint64)

    def __len__(self) -> int:
        return self._top - self._free_count

    def slots(self) -> Array:
        """Return the slots in use, in no order."""
        used = np.ones(self._top, bool)
        used[self._free[: self._free_count]] = False
        return places(used)

    def put(self, rows: Array) -> Array:
        """Keep rows; return their slots. The table does not know them yet."""
        count = len(rows)
        if len(self) + count > OPEN_MAX:
            raise PfntraceError(
                f"more than {OPEN_MAX:,} mappings open at once; record fewer VMs or a range (--gfn)"
            )
        reused = min(count, self._free_count)
        self._free_count -= reused
        slots = np.empty(count, np.int64)
        slots[:reused] = self._free[self._free_count : self._free_count + reused]
        fresh = count - reused
        slots[reused:] = np.arange(self._top, self._top + fresh)
        self._top += fresh
        if self._top > len(self.rows):
            # realloc() moves page tables, not gigabytes; untouched memory costs nothing.
            self.rows.resize(max(self._top, 2 * len(self.rows)), refcheck=False)
        # As opaque rows: numpy copies fields one by one otherwise, ten times as slow.
        self.rows.view(_OPAQUE)[slots] = rows.view(_OPAQUE)
        return slots

    def drop(self, slots: Array) -> None:
        """Forget rows; the table must not know them any more."""
        need = self._free_count + len(slots)
        if need > len(self._free):
            self._free = np.concatenate(
                [self._free[: self._free_count], np.empty(max(need, 4096), np.int64)]
            )
        self._free[self._free_count : need] = slots
        self._free_count = need

    def find(self, h: Array, place: Array, meta: Array) -> tuple[Array, ...]:
        """Return for each key the slot of its first life and where in the table it stands
        (`replace`, `remove`), NONE if it is not there; whether a chain follows; its host frame.
        """
        slot = np.full(len(h), NONE, np.int64)
        where = np.full(len(h), NONE, np.int64)
        chained = np.zeros(len(h), bool)
        page = np.zeros(len(h), np.uint64)
        if not len(self):
            return slot, where, chained, page
        at = self._place(h)
        left = np.arange(len(h))
        while True:
            entry = self._table.take(at)
            taken = places(entry)
            if not len(taken):
                return slot, where, chained, page
            at, left, entry = at.take(taken), left.take(taken), entry.take(taken)
            tagged = (entry >> _HALF) == (h.take(left) & _LOW)
            tagged &= entry > _GONE
            hit = places(tagged)
            if len(hit):
                found = (entry.take(hit) & _LOW).view(np.int64) - 2
                key = left.take(hit)
                rows = self.rows.take(found)
                same = rows["place"] == place.take(key)
                same &= rows["meta"] == meta.take(key)
                page[key] = rows["pfn"]
                slot[key] = np.where(same, found, NONE)
                where[key] = np.where(same, at.take(hit), NONE)
                chained[key] = same & (rows["next"] != NONE)
                tagged[hit] = same
            on = places(~tagged)
            left = left.take(on)
            at = (at.take(on) + 1) & (len(self._table) - 1)

    def insert(self, h: Array, slots: Array) -> None:
        """Enter keys that the table does not have, each once, with the slots of their lives."""
        assert not len(slots) or slots.min() >= 0
        self._make_room(len(slots))
        self._enter(h, slots)

    def replace(self, where: Array, h: Array, slots: Array) -> None:
        """Let entries found before lead to other slots."""
        self._table[where] = _entry(h, slots)

    def remove(self, where: Array) -> None:
        """Take out entries found before."""
        self._table[where] = _GONE

    def _enter(self, h: Array, slots: Array) -> None:
        entry = _entry(h, slots)
        at = self._place(h)
        while len(at):
            before = self._table.take(at)
            free = places(before <= _GONE)
            # Of several for one place the last is in; those see that they are not.
            self._table[at.take(free)] = entry.take(free)
            out = self._table.take(at) != entry
            self._entries += int(np.count_nonzero((before == _FREE) & ~out))
            out = places(out)
            entry = entry.take(out)
            at = (at.take(out) + 1) & (len(self._table) - 1)

    # By the upper bits: keys in the order of their hash then walk through the table once.
    def _place(self, h: Array) -> Array:
        return (h >> np.uint64(64 - (len(self._table) - 1).bit_length())).astype(np.int64)

    # A table half full is slow, and entries that are gone fill it too.
    def _make_room(self, more: int) -> None:
        if 2 * (self._entries + more) <= len(self._table):
            return
        size = len(self._table)
        while size < 3 * (len(self) + more):
            size *= 2
        old = self._table[self._table > _GONE]
        self._table = np.zeros(size, np.uint64)
        self._entries = 0
        step = 1 << 13
        for first in range(0, len(old), step):
            slots = (old[first : first + step] & _LOW).view(np.int64) - 2
            rows = self.rows.take(slots)
            self._enter(hashed(rows["place"], rows["meta"]), slots)


def _entry(h: Array, slots: Array) -> Array:
    """Return table entries: the lower half of the hash, and slot + 2."""
    return h << _HALF | (slots + 2).astype(np.uint64)
