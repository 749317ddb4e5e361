"""What last happened to each frame, and which lives it happened in: joins of ranges with lifetimes.

A detector that asks "was this page freed while it was mapped" would have to look at all open lives
at every free. Instead it asks when a life ends: what happened to its frames between its birth and
its death? Of the events of earlier pieces the last one of each frame answers that, since a later
event only hides one that it shares a life with. So memory is bounded by the frames that events
touched, and no step costs as much as there are open lives.

Frames live in spaces: host frames in one, guest frames in one for each VM and address space.
Three tiers (`analysis.frametier`) hold them: single frames, aligned blocks of 512 (2M), and of
512 x 512 (1G); a large range touches few large blocks. May import: numpy, `analysis.frametier`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from analysis.frametier import I64, ROW_BITS, U64, Tier

__all__ = ("FRAME_BITS", "I64", "U64", "Events", "FrameLog", "Hits", "Spaces", "Spans")

#: Frame numbers are smaller than 2^40: 52 bits of physical address.
FRAME_BITS = 40
#: 4K, 2M, 1G as the CPU has them.
_TIERS = 3
#: Ranges are cut at this many frames, KVM_MEM_MAX_NR_PAGES (include/linux/kvm_host.h).
_COUNT_MAX = (1 << 31) - 1
#: Cells of ranges laid out at a time.
_CELLS_AT_ONCE = 1 << 22
_FRAMES = np.uint64((1 << FRAME_BITS) - 1)
#: Numbers of (VM, address space) that a table is made for.
_PAIRS_FEW = 1 << 16
#: Spaces that fit above the frame number.
_SPACES_MAX = 1 << 22


class Spaces:
    """Numbers guest frame spaces (VM, address space) from 1; 0 is the host's frames."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}

    def of(self, vm: npt.NDArray[np.generic], as_id: npt.NDArray[np.generic]) -> U64:
        """Return the number of each row's space."""
        pairs = vm.astype(np.uint64) << np.uint64(8) | as_id.astype(np.uint64)
        if len(pairs) and pairs.min() == pairs.max():  # mostly
            return np.full(len(pairs), self._number(int(pairs[0])), np.uint64)
        if len(pairs) and pairs.max() < _PAIRS_FEW:  # no need to sort
            known = np.flatnonzero(np.bincount(pairs.view(np.int64)))
            table = np.zeros(int(known[-1]) + 1, np.uint64)
            table[known] = [self._number(int(pair)) for pair in known]
            return np.asarray(table.take(pairs.view(np.int64)))
        known, which = np.unique(pairs, return_inverse=True)
        numbers = [self._number(int(pair)) for pair in known]
        return np.asarray(np.array(numbers, np.uint64)[which], np.uint64)

    def one(self, vm: int, as_id: int) -> int:
        """Return the number of one space."""
        return self._number(vm << 8 | as_id)

    def _number(self, pair: int) -> int:
        # A trace from strangers may name any number of VMs; the last number is then shared.
        return self._numbers.setdefault(pair, min(len(self._numbers) + 1, _SPACES_MAX - 1))


@dataclasses.dataclass(frozen=True, slots=True)
class Spans:
    """Lives: frames [first, first + 512^(level - 1)) of a space from `birth` to `death` (ns)."""

    space: U64
    first: U64
    level: npt.NDArray[np.uint8]
    birth: U64
    death: U64

    def __len__(self) -> int:
        return len(self.first)

    def at(self, which: npt.NDArray[np.generic]) -> "Spans":
        """Return some of them."""
        return Spans(*(getattr(self, f.name)[which] for f in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True, slots=True)
class Events:
    """Events in order of `ts`: each touched `count` frames from `first` on.

    An event concerns lives born before `since` that are alive after `ts` (ns); for most events
    the two are the same. `tags` are numbers that come back with a hit.
    """

    space: U64
    first: U64
    count: U64
    since: U64
    ts: U64
    tags: tuple[U64, ...] = ()

    def __len__(self) -> int:
        return len(self.first)

    def at(self, which: npt.NDArray[np.generic]) -> "Events":
        """Return some of them."""
        tags = tuple(tag[which] for tag in self.tags)
        return Events(
            self.space[which],
            self.first[which],
            self.count[which],
            self.since[which],
            self.ts[which],
            tags,
        )

    @classmethod
    def none(cls, tags: int) -> "Events":
        """Return no events, with so many tags."""
        nothing = np.zeros(0, np.uint64)
        return cls(nothing, nothing, nothing, nothing, nothing, (nothing,) * tags)


@dataclasses.dataclass(frozen=True, slots=True)
class Hits:
    """Lives with an event inside: position of each life, and that event; a life appears once.

    `frame` is the first frame that was touched, of those that one cell of the log stands for.
    """

    life: I64
    frame: U64
    since: U64
    ts: U64
    tags: tuple[U64, ...]

    def __len__(self) -> int:
        return len(self.life)

    def at(self, which: npt.NDArray[np.generic]) -> "Hits":
        """Return some of them."""
        tags = tuple(tag[which] for tag in self.tags)
        return Hits(self.life[which], self.frame[which], self.since[which], self.ts[which], tags)

    @classmethod
    def none(cls, tags: int) -> "Hits":
        """Return no hits, with so many tags."""
        nothing = np.zeros(0, np.uint64)
        return cls(np.zeros(0, np.int64), nothing, nothing, nothing, (nothing,) * tags)


class FrameLog:
    """The last event of each frame."""

    def __init__(self, tags: int = 0) -> None:
        """Events have `tags` numbers each."""
        self._tags = tags
        self._tiers = tuple(Tier(2 + tags) for _ in range(_TIERS))

    @property
    def forgotten(self) -> int:
        """How many events it could not remember, since they touched too much memory."""
        return sum(tier.forgotten for tier in self._tiers)

    def step(self, lives: Spans, events: Events) -> Hits:
        """Return the lives with events inside: all `events` so far, and these.

        `lives` are those that ended in the span of time that `events` are of.
        """
        cells = _cells(events)
        found = _join(self._before(lives), self._within(lives, events, cells))
        for tier, (units, which) in zip(self._tiers, cells, strict=True):
            if len(units):
                values = [events.since[which], events.ts[which], *(t[which] for t in events.tags)]
                tier.put(units, values)
        return found

    def rest(self, lives: Spans) -> Hits:
        """Return the same for lives that never ended."""
        return self._before(lives)

    def _before(self, lives: Spans) -> Hits:
        found = [Hits.none(self._tags)]
        if not any(len(tier) for tier in self._tiers):
            return found[0]
        full = _full(lives.space, lives.first)
        for level in np.unique(lives.level).tolist():
            mine = np.flatnonzero(lives.level == level)
            for number, tier in enumerate(self._tiers):
                if len(tier):
                    at, units, values = tier.last(
                        full[mine], number, max(0, level - 1), lives.birth[mine]
                    )
                    frame = units << np.uint64(ROW_BITS * number) & _FRAMES
                    found.append(Hits(mine[at], frame, values[0], values[1], tuple(values[2:])))
        hits = _join(*found)
        inside = (hits.since > lives.birth[hits.life]) & (hits.ts < lives.death[hits.life])
        return hits.at(inside)

    def _within(self, lives: Spans, events: Events, cells: Sequence[tuple[U64, I64]]) -> Hits:
        found = [Hits.none(self._tags)]
        if not len(lives):
            return found[0]
        full = _full(lives.space, lives.first)
        levels = np.unique(lives.level).tolist()
        for tier, (units, which) in enumerate(cells):
            if not len(units):
                continue
            for level in levels:
                mine = slice(None) if len(levels) == 1 else np.flatnonzero(lives.level == level)
                shift = np.uint64(ROW_BITS * max(tier, level - 1))
                keys = units >> (shift - np.uint64(ROW_BITS * tier))
                at, event = _first_inside(
                    full[mine] >> shift, lives.birth[mine], lives.death[mine],
                    keys, which, events,
                )  # fmt: skip
                life = at if isinstance(mine, slice) else mine[at]
                tags = tuple(tag[event] for tag in events.tags)
                frame = events.first[event]
                found.append(Hits(life, frame, events.since[event], events.ts[event], tags))
        return _join(*found)


def _full(space: U64, frame: U64) -> U64:
    return np.asarray(space << np.uint64(FRAME_BITS) | (frame & _FRAMES), np.uint64)


def _join(*parts: Hits) -> Hits:
    """Put hits together; of a life hit twice the earlier event stays."""
    filled = [part for part in parts if len(part)]
    if not filled:
        return parts[0]
    if len(filled) == 1 and len(filled[0]) == 1:
        return filled[0]
    life = np.concatenate([part.life for part in filled])
    ts = np.concatenate([part.ts for part in filled])
    order = np.lexsort((ts, life))
    life = life[order]
    first = order[np.r_[True, life[1:] != life[:-1]]]
    whole = Hits(
        np.concatenate([part.life for part in filled]),
        np.concatenate([part.frame for part in filled]),
        np.concatenate([part.since for part in filled]),
        ts,
        tuple(np.concatenate(tags) for tags in zip(*(p.tags for p in filled), strict=True)),
    )
    return whole.at(first)


# --- events of one piece --------------------------------------------------------------------------


def _first_inside(
    lives: U64, birth: U64, death: U64, keys: U64, which: I64, events: Events
) -> tuple[I64, I64]:
    """Return (positions of lives, events): the first event inside each life that has any.

    `keys` are the cells that events touched, `which` names the event of each.
    """
    order = _in_order(keys)  # and so by time within a cell
    cells, which = keys.take(order), which.take(order)
    # In order too: a search then finds its way in what the one before it has read.
    by_cell = _in_order(lives)
    lives = lives.take(by_cell)
    low = np.searchsorted(cells, lives)
    low[low == len(cells)] = 0
    some = np.flatnonzero(cells.take(low) == lives)
    low, end = low[some], np.searchsorted(cells, lives[some], "right")
    at = by_cell[some]
    ts, since = events.ts[which], events.since[which]
    high = end
    while True:
        active = low < high
        if not active.any():
            break
        middle = (low + high) >> 1
        before = active & (ts[np.minimum(middle, len(ts) - 1)] <= birth[at])
        low, high = np.where(before, middle + 1, low), np.where(active & ~before, middle, high)
    while True:
        # Began before the birth, ended after it.
        across = np.flatnonzero(low < end)
        across = across[since[low[across]] <= birth[at[across]]]
        if not len(across):
            break
        low[across] += 1
    some = np.flatnonzero(low < end)
    some = some[ts[low[some]] < death[at[some]]]
    return at[some], which[low[some]]


def _in_order(words: U64) -> I64:
    """Return what puts words in order; equal ones stay as they are."""
    count = len(words)
    least = words.min() if count else np.uint64(0)
    bits = count.bit_length()
    if count < 2 or int(words.max() - least).bit_length() + bits > 64:
        return np.asarray(np.argsort(words, kind="stable"))
    # With the position below: numpy has no quicker sort than that of plain words.
    packed = (words - least) << np.uint64(bits) | np.arange(count, dtype=np.uint64)
    packed.sort()
    packed &= np.uint64((1 << bits) - 1)
    return packed.view(np.int64)


def _cells(events: Events) -> tuple[tuple[U64, I64], ...]:
    """Return for each tier the units that events touch and which event each is of, in order."""
    full = _full(events.space, events.first)
    single = events.count <= 1
    everything = np.arange(len(events), dtype=np.int64)
    if single.all():
        nothing = (np.zeros(0, np.uint64), np.zeros(0, np.int64))
        return (full, everything), nothing, nothing
    count = np.clip(events.count, 1, _COUNT_MAX).astype(np.int64)
    low, high = full.astype(np.int64), full.astype(np.int64) + count
    tiers = []
    parts: list[tuple[I64, I64, I64]] = [(everything, low, high)]
    for tier in range(_TIERS):
        mine: list[tuple[I64, I64, I64]] = []
        inner: list[tuple[I64, I64, I64]] = []
        for which, begin, end in parts:
            first, last = -(-begin >> ROW_BITS), end >> ROW_BITS
            whole = (first < last) & (tier < _TIERS - 1)
            mine.append((which[~whole], begin[~whole], end[~whole]))
            which, begin, end = which[whole], begin[whole], end[whole]
            first, last = first[whole], last[whole]
            mine.append((which, begin, first << ROW_BITS))
            mine.append((which, last << ROW_BITS, end))
            inner.append((which, first, last))
        tiers.append(_laid_out(mine))
        parts = inner
    return tuple(tiers)


def _laid_out(ranges: Sequence[tuple[I64, I64, I64]]) -> tuple[U64, I64]:
    """Return all units of some ranges [begin, end), in the order of their events."""
    which, begin, end = (np.concatenate(column) for column in zip(*ranges, strict=True))
    some = end > begin
    which, begin, count = which[some], begin[some], (end - begin)[some]
    order = np.argsort(which, kind="stable")
    which, begin, count = which[order], begin[order], count[order]
    # Never more than a trace of a recorder needs: the latest events matter.
    kept = np.cumsum(count[::-1])[::-1] <= _CELLS_AT_ONCE
    which, begin, count = which[kept], begin[kept], count[kept]
    if not len(count):
        return np.zeros(0, np.uint64), np.zeros(0, np.int64)
    starts = np.cumsum(count) - count
    units = np.repeat(begin - starts, count) + np.arange(int(count.sum()), dtype=np.int64)
    return units.astype(np.uint64), np.repeat(which, count)
