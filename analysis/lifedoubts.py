"""Lives that may be no lives of their own: of VMs that are older than the trace.

A zap of what nobody saw mapped ends a life that began before the trace or in a loss. Yet its
install may only be written late (`analysis.lifewalk`), and then comes after it. Which of the two
it was, nothing tells; so a life that such an install begins is not sure to be one of its own, and
that it never ends is no proof of anything. Nor is one sure that begins in the same place while such
a life is open (which of the two a zap ends, nothing tells either), or whose install may be the one
of such a life that is over. May import: numpy, `analysis.lifeevents`, `analysis.lifepairs`,
`analysis.lifestore`, `analysis.lifewalk`.
"""

import itertools
from collections import Counter, defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.lifeevents import Events
from analysis.lifepairs import Lives
from analysis.lifestore import CENSORED, DOUBTED, NONE, Array, OpenLives, hashed, places
from analysis.lifewalk import INSTALL, LATE_NS, ZAP

__all__ = ("Doubts",)

#: Zaps that are remembered for LATE_NS, the newest; of each its leaf, time and thread.
_ZAPS_MAX = 1 << 20
_NAMES = ("leaf", "ts", "tid")
_ODD = np.uint64(0x9E3779B97F4A7C15)


class Doubts:
    """Tells which lives began with an install that may be the one of a life that is over."""

    def __init__(self) -> None:
        self._unseen = False
        self._zaps = {name: np.zeros(0, np.uint64) for name in _NAMES}
        #: Leaf -> lives in doubt that are open.
        self._open: Counter[int] = Counter()

    def of(self, events: Events, lives: Lives, open_lives: OpenLives) -> npt.NDArray[np.bool_]:
        """Tell it of each life of the next block of events."""
        doubted = np.zeros(len(lives.first), bool)
        self._unseen |= bool(lives.censored.any())
        if not self._unseen or not len(events):
            return doubted
        late = self._late(events, lives, open_lives)
        if len(late) or self._open:
            doubted[late] = True
            self._spread(events, lives, open_lives, doubted)
        self._forget(events.columns["ts"].max())
        return doubted

    def _late(self, events: Events, lives: Lives, open_lives: OpenLives) -> Array:
        """Return the lives whose installs may be those of lives that nobody saw begin."""
        carried = len(self._zaps["ts"])
        new = _unseen_zaps(events, lives, open_lives)
        self._remember(events, new)
        zaps, at = self._zaps, np.append(np.full(carried, NONE), new)
        if not len(at):
            return at
        begun = places((lives.first != NONE) & (lives.orphan == 0))
        begun = begun[_can_be_late(events, lives.first.take(begun))]
        first = lives.first.take(begun)
        fault_ts = events.columns["fault_ts"].take(first)
        said = _said(events, first)
        order = np.lexsort((zaps["ts"], zaps["leaf"]))
        leaf = zaps["leaf"][order]
        low, high = (np.searchsorted(leaf, said["leaf"], side) for side in ("left", "right"))
        # The last zap of the same leaf, or another leaf's, which low < high leaves out.
        latest = zaps["ts"][order].take(np.maximum(high, 1) - 1)
        found = []
        for one in places((low < high) & (fault_ts <= latest)).tolist():
            rows = order[low[one] : high[one]]
            ts = zaps["ts"][rows]
            near = (ts >= fault_ts[one]) & (ts + np.uint64(LATE_NS) >= said["ts"][one])
            near &= (at[rows] < first[one]) & (zaps["tid"][rows] != said["tid"][one])
            if near.any():
                found.append(begun[one])
        return np.array(found, np.int64)

    def _remember(self, events: Events, at: Array) -> None:
        said = _said(events, at)
        self._zaps = {name: np.append(self._zaps[name], said[name]) for name in _NAMES}

    def _forget(self, now: np.uint64) -> None:
        young = places(self._zaps["ts"] + np.uint64(LATE_NS) >= now)[-_ZAPS_MAX:]
        self._zaps = {name: column[young] for name, column in self._zaps.items()}

    def _spread(self, events: Events, lives: Lives, open_lives: OpenLives, doubted: Array) -> None:
        """Doubt lives that begin after others of the same leaf that are in doubt."""
        real = places(lives.orphan == 0)
        leaf = _leaves_of(events, lives, open_lives, real)
        known = np.fromiter(self._open, np.uint64, len(self._open))
        mine = np.isin(leaf, np.append(known, leaf[doubted.take(real)]))
        numbers = real[mine]
        old = numbers[lives.slot.take(numbers) != NONE]
        flags = open_lives.rows["flags"].take(lives.slot.take(old))
        doubted[old] |= (flags & np.uint8(DOUBTED)) != 0
        steps = []
        for number, which in zip(numbers.tolist(), leaf[mine].tolist(), strict=True):
            begin, death = int(lives.first[number]), int(lives.death[number])
            steps += [(begin, False, number, which)] if begin != NONE else []
            steps += [(death, True, number, which)] if death > begin else []
        ended: defaultdict[int, list[int]] = defaultdict(list)
        for at, ends, number, which in sorted(steps):
            if ends and doubted[number]:
                self._open[which] -= 1
                if not lives.superseded[number] and _is_zap(events, at):
                    ended[which].append(at)
            elif not ends:
                doubted[number] |= self._open[which] > 0
                doubted[number] |= _may_be_before(events, at, ended[which])
                stays = lives.death[number] == NONE or lives.death[number] > at
                self._open[which] += int(doubted[number] and stays)
        self._open = +self._open
        self._remember(events, np.array([*itertools.chain(*ended.values())], np.int64))


def _unseen_zaps(events: Events, lives: Lives, open_lives: OpenLives) -> Array:
    """Return the zaps by which lives ended that nobody saw begin, in order of time."""
    unseen = lives.censored.copy()
    old = places((lives.slot != NONE) & (lives.first == NONE) & (lives.death != NONE))
    flags = open_lives.rows["flags"].take(lives.slot.take(old))
    unseen[old] = (flags & np.uint8(CENSORED)) != 0
    unseen &= (lives.death != NONE) & (lives.orphan == 0) & ~lives.superseded
    at = lives.death.compress(unseen)
    return np.sort(at.compress(_is_zap(events, at)))


def _is_zap(events: Events, at: Array | int) -> Any:
    keys = events.keys
    return (keys.op[at] == ZAP) & (True if keys.plain is None else keys.plain[at])


def _can_be_late(events: Events, at: Array | int) -> Any:
    keys = events.keys
    install = (keys.op[at] == INSTALL) & (events.columns["fault_ts"][at] > 0)
    return install & (True if keys.plain is None else keys.plain[at])


def _may_be_before(events: Events, install: int, zaps: list[int]) -> bool:
    """Tell whether an install may have been done before one of some zaps that were written first.

    These are in order of time.
    """
    ts, tid = events.columns["ts"], events.columns["tid"]
    if not zaps or not _can_be_late(events, install):
        return False
    since = max(int(events.columns["fault_ts"][install]), int(ts[install]) - LATE_NS)
    near = itertools.takewhile(lambda zap: ts[zap] >= since, reversed(zaps))
    return any(tid[zap] != tid[install] for zap in near)


def _said(events: Events, at: Array) -> dict[str, Any]:
    """Return _NAMES of some events; a leaf is told from others by a hash of its key and page."""
    keys = events.keys
    leaf = _leaf(keys.place.take(at), keys.meta.take(at), keys.frame.take(at))
    columns = {name: events.columns[name].take(at).astype(np.uint64) for name in ("ts", "tid")}
    return {"leaf": leaf, **columns}


def _leaves_of(events: Events, lives: Lives, open_lives: OpenLives, numbers: Array) -> Array:
    """Return the leaves of some lives."""
    slot, keys = lives.slot.take(numbers), events.keys
    at = np.where(slot == NONE, lives.first.take(numbers), 0)
    leaf = _leaf(keys.place.take(at), keys.meta.take(at), keys.frame.take(at))
    old = places(slot != NONE)
    rows = open_lives.rows.take(slot.take(old))
    leaf[old] = _leaf(rows["place"], rows["meta"], rows["pfn"])
    return leaf


def _leaf(place: Array, meta: Array, frame: Array) -> Array:
    return np.asarray(hashed(place, meta) ^ frame * _ODD)
