"""How lives begin, change and end: columns gathered from the events that say so.

May import: numpy, `analysis`.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np

from analysis.columns import code
from analysis.lifecontext import LifeContext
from analysis.lifeevents import CHILD, MOVED_FROM, PRESENT, SPLIT, WRITABLE, Events, pages_of
from analysis.lifepairs import Lives
from analysis.lifestore import (
    ACCESSED,
    CENSORED,
    COUNT_KNOWN,
    DIRTY,
    DOUBTED,
    LIFE,
    NONE,
    Array,
    places,
)
from analysis.lifewalk import INSTALL
from analysis.pagecodes import page_codes
from analysis.schema import ENDED_BY

__all__ = ("AMENDED", "FIELDS", "Births", "Changes", "Collapses", "Deaths", "Fields", "adopted",
           "changes_of")  # fmt: skip

#: refcount_min and refcount_max of a life of which no count is known.
_MOST, _LEAST = np.int32((1 << 31) - 1), np.int32(-(1 << 31))

_ZAPPED, _COLLAPSED = ENDED_BY.index("zap"), ENDED_BY.index("collapse")
_SPLIT_UP, _SUPERSEDED = ENDED_BY.index("split"), ENDED_BY.index("superseded")
_MOVED = ENDED_BY.index("pfn_change")
#: What ends a life by the cause of its zap.
_ENDED_BY = np.full(256, _ZAPPED, np.int8)
_ENDED_BY[code("cause", "teardown")] = ENDED_BY.index("teardown")
_ENDED_BY[code("cause", "root")] = ENDED_BY.index("invalid_root")
_ENDED_BY[code("cause", "recovery")] = _COLLAPSED
_BY_SLOT = code("cause", "slot")
#: Causes as they are known here; another writer's dictionary may have more.
_CAUSE = np.arange(256, dtype=np.uint8)
_CAUSE[SPLIT:] = code("cause", "other")

#: Fields of `LIFE` that mean something; those that are columns of records; those that change.
FIELDS = tuple(name for name in LIFE.names or () if name != "spare")
_GATHERED = {
    **{f"birth_{name}": name for name in ("tid", "tgid", "seq", "cpu")},
    **{name: name for name in ("gfn", "fault_ts", "vcpu", "level", "as_id")},
    **{f"{name}_birth": name for name in ("refcount", "mapcount")},
}
AMENDED = ("changes", "flags", "refcount_min", "refcount_max", "spte_last")


class Fields(dict[str, Array]):
    """Columns of `LIFE` of some lives, each made when it is first asked for.

    What a block of events changed in place is added: `changes`, of the lives with these numbers.
    """

    def __init__(self, make: Callable[[str], Array], changes: "Changes", lives: Array) -> None:
        super().__init__()
        self._make, self._changes = make, changes
        self._at = places(changes.some.take(lives))
        self._changed = lives.take(self._at)

    def __missing__(self, name: str) -> Array:
        values = self._make(name)
        if name in AMENDED and len(self._at):
            values = values.copy()
            values[self._at] = self._changes.amend(name, values.take(self._at), self._changed)
        self[name] = values
        return values


class Births:
    """How lives began: at some events, `since` the time of others (mostly the same).

    Where the beginning is `censored` an event is the first one that was seen; where it is `doubted`
    it may be that of another life. Called with the name of a field of `LIFE` it makes that column.
    """

    def __init__(
        self, events: Events, at: Array, since: Array, censored: Array, doubted: Array,
        context: LifeContext,
    ) -> None:  # fmt: skip
        self._events, self._at, self._since = events, at, since
        self._censored, self._doubted, self._context = censored, doubted, context

    def __call__(self, name: str) -> Array:
        get, keys, at = self._events.columns, self._events.keys, self._at
        if name in _GATHERED:
            return get[_GATHERED[name]].take(at)
        if name in ("place", "meta"):
            return np.asarray(getattr(keys, name).take(at))
        if name == "pfn":
            return keys.frame.take(at)
        if name == "birth_ts":
            return get["ts"].take(self._since)
        if name == "birth_cause":
            causes = _CAUSE.take(get["cause"].view(np.uint8).take(at))
            if self._events.part is not None:
                causes[self._events.part.take(at) == CHILD] = SPLIT
            return causes
        if name in ("spte_birth", "spte_last"):
            return self._spte
        if name == "flags":
            flags = _flags(self._spte, self._context)
            flags |= self._censored * np.uint8(CENSORED) | self._doubted * np.uint8(DOUBTED)
            flags |= self._known * np.uint8(COUNT_KNOWN)
            return flags
        if name == "refcount_min":
            return np.where(self._known, get["refcount"].take(at), _MOST)
        if name == "refcount_max":
            return np.where(self._known, get["refcount"].take(at), _LEAST)
        if name == "page_class":
            return self._page_class()
        if name == "slot":
            vm, as_id, ts = (get[column].take(at) for column in ("vm", "as_id", "ts"))
            return self._context.slots.find(ts, vm, as_id, get["gfn"].take(at))
        return np.full(len(at), {"changes": 0, "next": NONE}[name], np.int32)

    @functools.cached_property
    def _spte(self) -> Array:
        """The first value that was seen."""
        spte: Array = self._events.columns["new"].take(self._at)
        if self._censored.any():
            spte = np.where(self._censored, self._events.columns["old"].take(self._at), spte)
        return spte

    @functools.cached_property
    def _known(self) -> Array:
        """Is the page's count at the beginning known? Not that of a leaf that a split bore."""
        known = (self._events.columns["page_bits"].take(self._at) != 0) & ~self._censored
        if self._events.part is not None:
            known &= self._events.part.take(self._at) != CHILD
        return np.asarray(known)

    def _page_class(self) -> Array:
        get, at = self._events.columns, self._at
        bits, count, kind = (get[name].take(at) for name in ("page_bits", "refcount", "mapcount"))
        classes = page_codes(bits, count, kind, self._events.keys.frame.take(at))
        if self._events.part is not None:
            # The record speaks of the page that came after it.
            classes[self._events.part.take(at) == MOVED_FROM] = -1
        return classes


def adopted(old: Array, rows: Births) -> Array:
    """Return rows of `LIFE` whose beginning had not been seen, and now is, as in `rows`."""
    new = old.copy()
    for name in FIELDS:
        if name not in ("life_id", "birth_ts", "spte_last", "changes", "next"):
            new[name] = rows(name)
    seen = old["flags"] & np.uint8(~(CENSORED | COUNT_KNOWN) & 0xFF)
    new["flags"] |= seen
    new["refcount_min"] = np.minimum(old["refcount_min"], rows("refcount_min"))
    new["refcount_max"] = np.maximum(old["refcount_max"], rows("refcount_max"))
    return np.asarray(new)


def _flags(sptes: Array, context: LifeContext) -> Array:
    """Return which flags the values of SPTEs give a life."""
    flags: Array = ((sptes & WRITABLE) != 0).view(np.uint8)  # WRITABLE_EVER is 1
    for flag, mask in ((ACCESSED, context.accessed_mask), (DIRTY, context.dirty_mask)):
        if mask:
            flags |= ((sptes & np.uint64(mask)) != 0).view(np.uint8) * np.uint8(flag)
    return flags


@dataclasses.dataclass(slots=True)
class Changes:
    """What a block of events changed in place, for each life of the block.

    `some` tells where there is anything; `last` is the newest value of the SPTE, 0 if none is.
    """

    some: Array
    count: Array
    flags: Array
    least: Array
    most: Array
    last: Array

    def amend(self, name: str, values: Array, lives: Array) -> Array:
        """Return a column of rows of some lives with what was changed."""
        if name == "changes":
            return values + self.count.take(lives)
        if name == "flags":
            return values | self.flags.take(lives)
        if name == "refcount_min":
            return np.minimum(values, self.least.take(lives))
        if name == "refcount_max":
            return np.maximum(values, self.most.take(lives))
        last = self.last.take(lives)
        return np.where(last == 0, values, last)


def changes_of(events: Events, lives: Lives, context: LifeContext) -> Changes:
    """Return what the events changed."""
    get, count = events.columns, len(lives.first)
    # Of lives that go on, or ended without a record of their own. An install's value, and that of
    # a zap, are elsewhere.
    moved = (lives.death == NONE) | lives.superseded
    moved &= (lives.last != NONE) & ((lives.last != lives.first) | lives.censored)
    last = np.zeros(count, np.uint64)
    at = places(moved)
    last[at] = get["new"].take(lives.last.take(at))
    changes, flags = np.zeros(count, np.uint32), np.zeros(count, np.uint8)
    least, most = np.full(count, _MOST), np.full(count, _LEAST)
    if len(lives.change):
        runs = places(np.diff(lives.life, prepend=NONE))
        of, event = lives.life.take(runs), lives.change
        known, counts = get["page_bits"].take(event) != 0, get["refcount"].take(event)
        seen = np.bitwise_or.reduceat(get["old"].take(event) | get["new"].take(event), runs)
        changes[of] = np.diff(runs, append=len(event))
        flags[of] = _flags(seen, context)
        least[of] = np.minimum.reduceat(np.where(known, counts, _MOST), runs)
        most[of] = np.maximum.reduceat(np.where(known, counts, _LEAST), runs)
        moved[of] = True
    return Changes(moved, changes, flags, least, most, last)


class Deaths:
    """What ended some lives of a block; each column is made when it is first asked for.

    `ts`, `tid`, `tgid`, `cpu`, `seq` and `refcount` are those of the record that did, `cause` and
    `ended_by` numbers. `own` tells where that record is the life's own, so that `old` is its last
    SPTE (None if it is everywhere), and `counted` where `refcount` is of the life's page.
    """

    def __init__(
        self, events: Events, lives: Lives, of: Array, collapsed: Array, context: LifeContext
    ) -> None:
        """Take which lives; `collapsed` is what `Collapses.cover` says of all events."""
        self._events, self._collapsed, self._context = events, collapsed, context
        self._at = lives.death.take(of)
        superseded = lives.superseded.take(of)
        self.own: Array | None = ~superseded if superseded.any() else None

    def column(self, name: str) -> Array:
        """Return a column of the records."""
        return self._events.columns[name].take(self._at)

    @functools.cached_property
    def refcount(self) -> Array:
        """The count of the record's page."""
        return self.column("refcount")

    @functools.cached_property
    def old(self) -> Array:
        """The SPTE before."""
        return self.column("old")

    @functools.cached_property
    def cause(self) -> Array:
        """Why it happened."""
        return _CAUSE.take(self.column("cause").view(np.uint8))

    @functools.cached_property
    def counted(self) -> Array:
        """Where the count is that of the life's page."""
        counted = self.column("page_bits") != 0
        if self._events.part is not None:
            counted &= self._events.part.take(self._at) != MOVED_FROM
        if self.own is not None:
            counted &= self.own
        return np.asarray(counted)

    @functools.cached_property
    def ended_by(self) -> Array:
        """The number in ENDED_BY of each."""
        ended_by: Array = _ENDED_BY.take(self.cause)
        shadow, at = self._events.shadow, self._at
        if len(self._collapsed):
            ended_by[self._collapsed.take(at) & (ended_by == _ZAPPED)] = _COLLAPSED
        by_slot = places(self.cause == _BY_SLOT)
        if len(by_slot):
            ended_by[by_slot.compress(self._tables_gone(at.take(by_slot)))] = _COLLAPSED
        large = places(self.column("level") > 1)
        if len(large):
            of = at.take(large)
            table = (self._events.columns["new"].take(of) & PRESENT) != 0
            ended_by[large.compress(table & ~shadow.take(of))] = _SPLIT_UP
        if self._events.part is not None:
            ended_by[self._events.part.take(at) == MOVED_FROM] = _MOVED
        if self.own is not None:
            ended_by[~self.own] = _SUPERSEDED
        return ended_by

    def _tables_gone(self, at: Array) -> Array:
        """Tell which zaps for a memslot took out a table that a large leaf could replace.

        So dirty logging ends. On 6.1, where empty is 0, a deleted slot's tables go in the same
        way: there nothing tells.
        """
        get = self._events.columns
        new = get["new"].take(at)
        gone = _is_frozen(new) & (new >> np.uint64(63) != 0) & ~self._events.shadow.take(at)
        gone &= self._context.slots.flags_changed(get["vm"].take(at), get["ts"].take(at))
        return np.asarray(gone)


def _is_frozen(spte: Array) -> Array:
    """Tell which values are REMOVED_SPTE or FROZEN_SPTE: neither present nor plainly empty.

    handle_removed_pt() leaves them in a table that is taken out; what is empty is 0, or bit 63
    where there is SHADOW_NONPRESENT_VALUE (6.12).
    """
    return np.asarray(((spte & PRESENT) == 0) & ((spte << np.uint64(1)) != 0))


class Collapses:
    """Large leaves installed over a page table: that thread then removes the table's leaves.

    handle_changed_spte() of the parent runs first, then handle_removed_pt() for what it held.
    """

    def __init__(self) -> None:
        # Thread, VM, address space, first and last gfn, level.
        self._carried = np.zeros((6, 0), np.uint64)

    def cover(self, events: Events) -> Array:
        """Tell of each event whether it is of a table that its thread's last such leaf replaced.

        Empty if none is.
        """
        get = events.columns
        fresh = np.flatnonzero((get["level"] > 1) & (events.keys.op == INSTALL) & ~events.shadow)
        fresh = fresh[(get["old"][fresh] & PRESENT) != 0]
        if events.part is not None:
            fresh = fresh[events.part[fresh] == 0]
        old = self._carried.shape[1]
        if not len(fresh) and not old:
            return np.zeros(0, bool)
        last = get["gfn"][fresh] + pages_of(get["level"][fresh]) - np.uint64(1)
        rows = [get[name][fresh] for name in ("tid", "vm", "as_id", "gfn")]
        rows += [last, get["level"][fresh]]
        known = np.concatenate([self._carried, np.array(rows, np.uint64)], axis=1)
        # By thread and time; those of before come first.
        when = np.concatenate([np.zeros(old, np.uint64), fresh.astype(np.uint64) + np.uint64(1)])
        key = known[0] << np.uint64(32) | when
        order = np.argsort(key, kind="stable")
        known, key = known[:, order], key[order]
        tid = get["tid"].astype(np.uint64)
        now = np.arange(1, len(tid) + 1, dtype=np.uint64)
        before = np.searchsorted(key, tid << np.uint64(32) | now, "right") - 1
        place = known[:, before]
        found = (before >= 0) & (place[0] == tid)
        found &= (place[1] == get["vm"]) & (place[2] == get["as_id"])
        found &= (place[3] <= get["gfn"]) & (get["gfn"] <= place[4]) & (get["level"] < place[5])
        found &= _is_frozen(get["new"]) & ~events.shadow
        self._carried = known[:, np.append(known[0][1:] != known[0][:-1], True)]
        return np.asarray(found)
