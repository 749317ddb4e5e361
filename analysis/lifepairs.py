"""Pairing: which events belong to one life. The heart of `analysis.lives`, and nothing but that.

An event is an SPTE record, or a part of one (`analysis.lifeevents`). Events are sorted by key once,
as 64-bit words with the event's number below the key: that is a sort that numpy has vector code
for, and it keeps the order of time. Almost all keys then read install, change, …, zap of the same
page, and are told apart by looking at neighbours. What remains (two roots that map one frame, a zap
out of nowhere) is done key by key in `analysis.lifewalk`. May import: numpy, `analysis.lifestore`,
`analysis.lifewalk`.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from analysis.lifestore import META_FIELDS, NONE, SHADOW_BIT, Array, OpenLives, hashed, places
from analysis.lifewalk import CHANGE, FINAL, INSTALL, UNDECIDED, ZAP, Odd, walk

__all__ = ("Keys", "Lives", "pair")

#: Bits of the words that are sorted.
_WORD = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Keys:
    """What pairing looks at, one of each per event, in order of time.

    `place` and `meta` are the key (`analysis.lifestore`); `frame` is the host frame that the event
    is about: of a change the one before it. `ts`, `fault_ts` (ns), `tid` and whether it is a whole
    record (`plain`, None if all are) matter only where records stand in the wrong order. The first
    ones, as many as `held`, wait for their installs since a block before.
    """

    op: Array
    place: Array
    meta: Array
    frame: Array
    ts: Array
    fault_ts: Array
    tid: Array
    plain: Array | None = None
    held: int = 0


@dataclasses.dataclass(slots=True)
class Lives:
    """The lives that a block of events belongs to. Numbers are of events; NONE where there is none.

    first        the event that began it, or the first one seen; NONE if it was open before
    since        its earliest event, which may be of before `first`: see `analysis.lifewalk`
    entry        the event that gives it a place among all lives
    slot         where it is in `OpenLives`, if it was open before; with `first` its beginning,
                 which had not been seen, is now
    last         its last event
    death        the event that ended it, NONE if it is still open
    superseded   was that an event of another life?
    censored     was its beginning missed?
    orphan       not 0, not a life: an event on what was not mapped; FINAL or UNDECIDED
    life, change the changes in place: life, event; in the order of life, then time
    """

    first: Array
    since: Array
    entry: Array
    slot: Array
    last: Array
    death: Array
    superseded: Array
    censored: Array
    orphan: Array
    life: Array
    change: Array
    keys: "_Table"

    def settle(self, open_lives: OpenLives, slot: Array) -> None:
        """Let the table know which lives are open now; `slot` is where each of them is."""
        keys = self.keys
        stays, found = keys.life != NONE, keys.where != NONE
        open_lives.remove(keys.where.compress(found & ~stays))
        at = places(found & stays)
        open_lives.replace(keys.where.take(at), keys.hash.take(at), slot.take(keys.life.take(at)))
        at = places(stays & ~found)
        open_lives.insert(keys.hash.take(at), slot.take(keys.life.take(at)))
        for chain in keys.chains:
            links = slot[chain]
            open_lives.rows["next"][links[:-1]] = links[1:]
            open_lives.rows["next"][links[-1]] = NONE


@dataclasses.dataclass(slots=True)
class _Table:
    """Of each key: its hash, its place in the table, the oldest life that is open at the end."""

    hash: Array
    where: Array
    life: Array
    chains: list[list[int]]


@dataclasses.dataclass(slots=True)
class _Sorted:
    """Events in order of (key, time): their numbers, what they do, their frames.

    `head` are the positions at which a key begins; of each key there are `hash`, the `slot` of its
    oldest open life with its host frame, `where` that is in the table, and whether it is `chained`
    to a younger one.
    """

    order: Array
    op: Array
    frame: Array
    head: Array
    hash: Array
    slot: Array
    where: Array
    chained: Array
    page: Array

    def only(self, wanted: Array) -> "_Sorted":
        """Return the events of the keys that are wanted."""
        lengths = np.diff(self.head, append=len(self.order))
        events = np.repeat(wanted, lengths)
        head = np.cumsum(lengths[wanted]) - lengths[wanted]
        keys = (self.hash, self.slot, self.where, self.chained, self.page)
        return _Sorted(
            self.order[events], self.op[events], self.frame[events], head,
            *(column[wanted] for column in keys),
        )  # fmt: skip


def pair(keys: Keys, open_lives: OpenLives, missable: Callable[[Array], Array]) -> Lives:
    """Return the lives that some events belong to, those in `open_lives` taken up.

    `missable` tells for some events whether one before them can have gone unseen.
    """
    table = _by_key(keys, open_lives)
    odd, lone, censored = _oddities(table, missable, keys.held)
    if not odd.any():
        return _regular(table, lone, censored, keys.plain)
    lives = _regular(table.only(~odd), lone[~odd], censored[~odd], keys.plain)
    return _joined(lives, table.only(odd), keys, open_lives, missable)


def _by_key(keys: Keys, open_lives: OpenLives) -> _Sorted:
    order, head = _sorted(keys)
    at = order.take(head)
    place, meta = keys.place.take(at), keys.meta.take(at)
    h = hashed(place, meta)
    found = open_lives.find(h, place, meta)
    return _Sorted(order, keys.op.take(order), keys.frame.take(order), head, h, *found)


def _sorted(keys: Keys) -> tuple[Array, Array]:
    """Return the numbers of events in order of (key, time), and where keys begin."""
    count = len(keys.op)
    bits = max(1, (count - 1).bit_length())
    word, exact = _words(keys, _WORD - bits)
    word <<= np.uint64(bits)
    word |= np.arange(count, dtype=np.uint64)
    word.sort()
    order = (word & np.uint64((1 << bits) - 1)).view(np.int64)
    word >>= np.uint64(bits)
    begins = np.empty(count, bool)
    begins[:1] = True
    np.not_equal(word[1:], word[:-1], out=begins[1:])
    if not exact:
        at = places(~begins)
        a, b = order.take(at - 1), order.take(at)
        same = keys.place.take(a) == keys.place.take(b)
        same &= keys.meta.take(a) == keys.meta.take(b)
        if not same.all():  # two keys with the same part of the hash, perhaps mixed
            words = (keys.meta, keys.place)
            order = np.lexsort(words)
            begins[1:] = np.any([w[order[1:]] != w[order[:-1]] for w in words], axis=0)
    return order, places(begins)


def _words(keys: Keys, bits: int) -> tuple[Array, bool]:
    """Return words of so many bits that tell keys apart; False if they may not, being hashes."""
    if len(keys.place):
        meta, meta_bits = _small(keys.meta)
        least, most = keys.place.min(), keys.place.max()
        if int(most - least).bit_length() + meta_bits <= bits:
            word = keys.place - least
            if meta_bits:
                word |= meta << np.uint64(bits - meta_bits)
            return word, True
    return hashed(keys.place, keys.meta) >> np.uint64(_WORD - bits), False


def _small(meta: Array) -> tuple[Array, int]:
    """Return `meta` in as few bits as are in use here, and how many these are."""
    if (meta == meta[0]).all():
        return meta, 0
    used = int(np.bitwise_or.reduce(meta))
    small = np.zeros(len(meta), np.uint64)
    bits = 0
    # Address space and level have a byte each, of which one bit and two are ever used.
    for low, width in META_FIELDS:
        field = (used >> low & (1 << width) - 1).bit_length()
        if field:
            part = meta >> np.uint64(low) if low else meta
            small |= (part & np.uint64((1 << field) - 1)) << np.uint64(bits)
            bits += field
    return small, bits


def _oddities(
    table: _Sorted, missable: Callable[[Array], Array], held: int
) -> tuple[Array, Array, Array]:
    """Return of each key: must it be walked, is its first event on nothing, is that censored?"""
    install, head = table.op == INSTALL, table.head
    mapped = np.empty(len(install), bool)  # before the event
    np.not_equal(table.op[:-1], ZAP, out=mapped[1:])
    other = np.empty(len(install), bool)  # than the page that was mapped
    np.not_equal(table.frame[1:], table.frame[:-1], out=other[1:])
    known = table.slot != NONE
    mapped[head] = known
    other[head] = known & (table.page != table.frame.take(head))
    wrong = (install == mapped) | (other & ~install)
    lone = ~known & ~install.take(head)
    censored = np.zeros(len(head), bool)
    if lone.any():
        at = head[lone]
        censored[lone] = missable(table.order[at])
        # Its install may be written down later: then the key must be walked.
        alone = np.diff(head, append=len(install))[lone] == 1
        wrong[at] = ~alone & ~censored[lone]
    if held:
        wrong |= table.order < held
    odd = table.chained.copy()
    odd[np.searchsorted(head, places(wrong), "right") - 1] = True
    return odd, lone, censored


def _regular(table: _Sorted, lone: Array, censored: Array, plain: Array | None) -> Lives:
    """Pair the events of keys that have at most one life at a time."""
    start = table.op == INSTALL
    start[table.head] = True
    number = np.cumsum(start)  # of the life that an event belongs to, from 1
    first = places(start)
    count = len(first)
    last = np.empty_like(first)
    last[:-1] = first[1:] - 1
    last[-1:] = len(start) - 1
    oldest = number.take(table.head) - 1  # life of each key
    newest = np.empty_like(oldest)
    newest[:-1] = oldest[1:] - 1
    newest[-1:] = count - 1
    carried = places(table.slot != NONE)
    slot = np.full(count, NONE, np.int64)
    slot[oldest.take(carried)] = table.slot.take(carried)
    begun = table.order.take(first)
    begun[oldest.take(carried)] = NONE
    end = table.order.take(last)
    death = end.copy()
    death[table.op.take(last) != ZAP] = NONE
    stays = newest.copy()
    stays[death.take(newest) != NONE] = NONE
    is_censored, is_orphan = np.zeros(count, bool), np.zeros(count, np.uint8)
    is_censored[oldest] = censored
    orphan = lone & ~censored
    if orphan.any():
        waits = np.True_ if plain is None else plain.take(table.order.take(table.head))
        is_orphan[oldest] = np.where(orphan, np.where(waits, UNDECIDED, FINAL), 0)
        stays[orphan & (newest == oldest)] = NONE  # a change that is alone is no life
    changes = places(table.op == CHANGE)
    return Lives(
        first=begun,
        since=begun,
        entry=begun,
        slot=slot,
        last=end,
        death=death,
        superseded=np.zeros(count, bool),
        censored=is_censored,
        orphan=is_orphan,
        life=number.take(changes) - 1,
        change=table.order.take(changes),
        keys=_Table(table.hash, table.where, stays, []),
    )


def _joined(
    lives: Lives,
    odd: _Sorted,
    keys: Keys,
    open_lives: OpenLives,
    missable: Callable[[Array], Array],
) -> Lives:
    """Return `lives` and those of the events of some other keys, found one by one."""
    shadow = (keys.meta.take(odd.order.take(odd.head)) & np.uint64(1 << SHADOW_BIT)) != 0
    at, held = odd.order, odd.order < keys.held
    plain = np.ones(len(at), bool) if keys.plain is None else keys.plain.take(at)
    events = Odd(
        at, odd.op, odd.frame, missable(at), keys.ts.take(at), keys.fault_ts.take(at),
        keys.tid.take(at), plain, held, odd.head, odd.slot, shadow,
    )  # fmt: skip
    walked = walk(events, open_lives, len(lives.first))
    names = ("first", "since", "entry", "slot", "last", "death", "superseded", "censored",
             "orphan", "life", "change")  # fmt: skip
    joined = {n: np.concatenate([getattr(lives, n), getattr(walked, n)]) for n in names}
    table = _Table(
        np.concatenate([lives.keys.hash, odd.hash]),
        np.concatenate([lives.keys.where, odd.where]),
        np.concatenate([lives.keys.life, walked.oldest]),
        walked.chains,
    )
    return Lives(**joined, keys=table)
