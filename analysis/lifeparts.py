"""How lives begin, change and end: columns gathered from the events that say so.

May import: numpy, `analysis`.
"""

import dataclasses

import numpy as np

from analysis.columns import code
from analysis.lifecontext import LifeContext
from analysis.lifeevents import CHILD, MOVED_FROM, PRESENT, WRITABLE, Events, pages_of
from analysis.lifepairs import Lives
from analysis.lifestore import (
    ACCESSED,
    CENSORED,
    COUNT_KNOWN,
    DIRTY,
    NONE,
    VM_SHIFT,
    Array,
    places,
)
from analysis.lifewalk import INSTALL
from analysis.pagecodes import page_codes
from analysis.schema import BIRTH_CAUSES, ENDED_BY

__all__ = ("Changes", "Collapses", "Deaths", "Ends", "adopted", "births", "changes_of")

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
_CAUSE[len(BIRTH_CAUSES) :] = code("cause", "other")

Columns = dict[str, Array]


def births(
    events: Events, at: Array, since: Array, censored: Array, life_id: Array, context: LifeContext
) -> Columns:
    """Return the fields of `LIFE` of lives that began with some events, `since` the time of others.

    Where the beginning is `censored` an event is the first one that was seen.
    """
    keys, get = events.keys, events.columns
    ts, gfn, as_id = get["ts"].take(at), get["gfn"].take(at), get["as_id"].take(at)
    meta, pfn = keys.meta.take(at), keys.frame.take(at)
    spte = get["new"].take(at)
    if censored.any():
        spte = np.where(censored, get["old"].take(at), spte)
    bits, count, mapcount = (get[n].take(at) for n in ("page_bits", "refcount", "mapcount"))
    known = (bits != 0) & ~censored
    classes = page_codes(bits, count, mapcount, pfn)
    if events.part is not None:
        part = events.part.take(at)
        known &= part != CHILD
        classes[part == MOVED_FROM] = -1
    flags = _flags(spte, context)
    flags |= censored * np.uint8(CENSORED)
    flags |= known * np.uint8(COUNT_KNOWN)
    return {
        "life_id": life_id,
        "place": keys.place.take(at),
        "meta": meta,
        "gfn": gfn,
        "pfn": pfn,
        "birth_ts": ts if since is at else get["ts"].take(since),
        "fault_ts": get["fault_ts"].take(at),
        "spte_birth": spte,
        "spte_last": spte.copy(),  # changes are written into it
        **{f"birth_{name}": get[name].take(at) for name in ("tid", "tgid", "seq", "cpu")},
        "changes": np.zeros(len(at), np.uint32),
        "vcpu": get["vcpu"].take(at),
        "slot": context.slots.find(ts, meta >> np.uint64(VM_SHIFT), as_id, gfn),
        "refcount_birth": count,
        "mapcount_birth": mapcount,
        "refcount_min": np.where(known, count, _MOST),
        "refcount_max": np.where(known, count, _LEAST),
        "next": np.full(len(at), NONE, np.int32),
        "level": get["level"].take(at),
        "as_id": as_id,
        "birth_cause": _CAUSE.take(get["cause"].view(np.uint8).take(at)),
        "page_class": classes,
        "flags": flags,
    }


def adopted(old: Array, rows: Columns) -> Array:
    """Return rows of `LIFE` whose beginning had not been seen, and now is, as in `rows`."""
    new = old.copy()
    for name, column in rows.items():
        if name not in ("life_id", "birth_ts", "spte_last", "changes", "next"):
            new[name] = column
    seen = old["flags"] & np.uint8(~(CENSORED | COUNT_KNOWN) & 0xFF)
    new["flags"] |= seen
    new["refcount_min"] = np.minimum(old["refcount_min"], rows["refcount_min"])
    new["refcount_max"] = np.maximum(old["refcount_max"], rows["refcount_max"])
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

    def apply(self, rows: Columns, lives: Array) -> None:
        """Add them to rows of some lives, in place."""
        at = places(self.some.take(lives))
        if not len(at):
            return
        of = lives.take(at)
        rows["changes"][at] += self.count.take(of)
        rows["flags"][at] |= self.flags.take(of)
        rows["refcount_min"][at] = np.minimum(rows["refcount_min"][at], self.least.take(of))
        rows["refcount_max"][at] = np.maximum(rows["refcount_max"][at], self.most.take(of))
        last = self.last.take(of)
        rows["spte_last"][at] = np.where(last == 0, rows["spte_last"][at], last)


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


@dataclasses.dataclass(frozen=True, slots=True)
class Deaths:
    """What ended some lives: columns of the records that did, and `ended_by` as a number.

    `old` is the last value of the SPTE; where the record is another life's `own` is False, None
    if it is nowhere. `counted` tells where `refcount` is of the life's page.
    """

    ts: Array
    cause: Array
    tid: Array
    tgid: Array
    cpu: Array
    seq: Array
    refcount: Array
    counted: Array
    old: Array
    own: Array | None
    ended_by: Array


class Ends:
    """How the lives of a block end. `collapsed` is what `Collapses.cover` says of its events."""

    def __init__(
        self, events: Events, lives: Lives, collapsed: Array, context: LifeContext
    ) -> None:
        self._events, self._lives = events, lives
        self._collapsed, self._context = collapsed, context

    def of(self, lives: Array) -> Deaths:
        """Return how some lives ended."""
        events, get, at = self._events, self._events.columns, self._lives.death.take(lives)
        cause = _CAUSE.take(get["cause"].view(np.uint8).take(at))
        ended_by = self._ended_by(at, cause)
        counted = get["page_bits"].take(at) != 0
        if events.part is not None:
            moved = events.part.take(at) == MOVED_FROM
            ended_by[moved] = _MOVED
            counted &= ~moved
        superseded, own = self._lives.superseded.take(lives), None
        if superseded.any():
            own = ~superseded
            ended_by[superseded] = _SUPERSEDED
            counted &= own
        tid, tgid, cpu, seq = (get[name].take(at) for name in ("tid", "tgid", "cpu", "seq"))
        ts, count, old = get["ts"].take(at), get["refcount"].take(at), get["old"].take(at)
        return Deaths(ts, cause, tid, tgid, cpu, seq, count, counted, old, own, ended_by)

    def _ended_by(self, at: Array, cause: Array) -> Array:
        """Return what records end lives by, their own lives'."""
        get, shadow = self._events.columns, self._events.shadow
        ended_by: Array = _ENDED_BY.take(cause)
        if len(self._collapsed):
            ended_by[self._collapsed.take(at) & (ended_by == _ZAPPED)] = _COLLAPSED
        by_slot = places(cause == _BY_SLOT)
        if len(by_slot):
            # Dirty logging ends: tables that large leaves could replace go, with their leaves. On
            # 6.1, where empty is 0, a deleted slot's go in the same way: there nothing tells.
            of = at.take(by_slot)
            new = get["new"].take(of)
            table = _is_frozen(new) & (new >> np.uint64(63) != 0) & ~shadow.take(of)
            table &= self._context.slots.flags_changed(get["vm"].take(of), get["ts"].take(of))
            ended_by[by_slot.compress(table)] = _COLLAPSED
        large = places(get["level"].take(at) > 1)
        if len(large):
            of = at.take(large)
            table = (get["new"].take(of) & PRESENT) != 0
            ended_by[large.compress(table & ~shadow.take(of))] = _SPLIT_UP
        return ended_by


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
