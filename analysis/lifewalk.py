"""Pairing of the odd keys, an event at a time: several lives at once, or records that do not fit.

Records of one SPTE may stand in the wrong order: a thread writes its record after it has changed
the SPTE, and what is done under no lock or under a shared one (another vCPU's fault, the fast path,
ageing) may be written down first. So an event on nothing waits for an install by another thread
whose fault had begun by then. Seen on Linux 6.12 with two vCPUs. May import: numpy,
`analysis.lifestore`.
"""

import dataclasses
from typing import Any

import numpy as np

from analysis.lifestore import CENSORED, NONE, Array, OpenLives

__all__ = ("CHANGE", "FINAL", "INSTALL", "LATE_NS", "PLACE_MAX", "UNDECIDED", "WAITING_MAX", "ZAP",
           "Odd", "Walked", "walk")  # fmt: skip

#: What an event does.
INSTALL, CHANGE, ZAP = 1, 2, 3
#: What is known of an event on nothing: it stays so, or an install may still come.
FINAL, UNDECIDED = 1, 2
#: An install's record comes so much later at most than that of an event after it. Some 10 ms were
#: seen where one host thread emulates two vCPUs.
LATE_NS = 100_000_000
#: So many events wait at a place at most, and so many lives are open there (no VM has so many
#: roots; one in the shadow MMU): the oldest goes.
WAITING_MAX, PLACE_MAX = 8, 64


@dataclasses.dataclass(frozen=True, slots=True)
class Odd:
    """Events in order of (key, time), `order` being their numbers; keys begin at `head`.

    Of each event what it does, its `frame`, whether one before it can have gone unseen, time (ns),
    entry of its fault, thread, whether it is a whole record (`plain`), and whether it has waited
    since a block before (`held`). Of each key the `slot` of its oldest open life, and whether it is
    in the shadow MMU.
    """

    order: Array
    op: Array
    frame: Array
    missable: Array
    ts: Array
    fault_ts: Array
    tid: Array
    plain: Array
    held: Array
    head: Array
    slot: Array
    shadow: Array


@dataclasses.dataclass(slots=True)
class Walked:
    """Lives, as in `analysis.lifepairs.Lives`; of each key the oldest that is open, and chains."""

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
    oldest: Array
    chains: list[list[int]]


@dataclasses.dataclass(slots=True)
class _Life:
    """One life; numbers are of events. `ts` and `tid` are those of its first record."""

    frame: int
    first: int = NONE
    since: int = NONE
    entry: int = NONE
    slot: int = NONE
    last: int = NONE
    death: int = NONE
    superseded: bool = False
    censored: bool = False
    orphan: int = 0
    ts: int = 0
    tid: int = 0


def walk(odd: Odd, open_lives: OpenLives, before: int) -> Walked:
    """Return the lives of some events; the first one gets the number `before`."""
    walker = _Walker(odd, open_lives, before)
    bounds = [*odd.head.tolist(), len(odd.order)]
    oldest = []
    for key, chain in enumerate(walker.carried(odd.slot)):
        walker.take(chain, range(bounds[key], bounds[key + 1]), shadow=bool(odd.shadow[key]))
        oldest.append(chain[0] if chain else NONE)
        if chain:
            walker.chains.append(chain)
    columns: dict[str, Any] = {
        name: np.array([getattr(life, name) for life in walker.lives], dtype)
        for name, dtype in _COLUMNS.items()
    }
    changes = np.array(walker.changes, np.int64).reshape(-1, 2)
    life, change = changes[np.argsort(changes[:, 0], kind="stable")].T
    return Walked(
        **columns, life=life, change=change, oldest=np.array(oldest, np.int64),
        chains=walker.chains,
    )  # fmt: skip


_COLUMNS: dict[str, type] = {
    **dict.fromkeys(("first", "since", "entry", "slot", "last", "death"), np.int64),
    **dict.fromkeys(("superseded", "censored"), np.bool_),
    "orphan": np.uint8,
}


class _Walker:
    """Takes the events of one key after the other; events go by their index in `Odd`."""

    def __init__(self, odd: Odd, open_lives: OpenLives, before: int) -> None:
        self._open = open_lives
        self._before = before
        self._number, self._op, self._frame, self._missable = (
            column.tolist() for column in (odd.order, odd.op, odd.frame, odd.missable)
        )
        self._ts, self._fault_ts, self._tid, self._plain, self._held = (
            column.tolist() for column in (odd.ts, odd.fault_ts, odd.tid, odd.plain, odd.held)
        )
        self.lives: list[_Life] = []
        self.changes: list[tuple[int, int]] = []
        self.chains: list[list[int]] = []

    def carried(self, slot: Array) -> list[list[int]]:
        """Return for each key the lives that were open before, oldest first."""
        chains: list[list[int]] = [[] for _ in slot]
        keys = np.flatnonzero(slot != NONE)
        slot = slot[keys]
        while len(keys):
            rows = self._open.rows.take(slot)
            names = ("pfn", "birth_ts", "birth_tid", "flags")
            columns: list[list[int]] = [keys.tolist(), slot.tolist()]
            columns += [rows[name].tolist() for name in names]
            for key, at, pfn, ts, tid, flags in zip(*columns, strict=True):
                life = _Life(pfn, slot=at, censored=bool(flags & CENSORED), ts=ts, tid=tid)
                chains[key].append(self._add(life))
            more = np.flatnonzero(rows["next"] != NONE)
            keys, slot = keys[more], rows["next"][more].astype(np.int64)
        return chains

    def take(self, chain: list[int], events: range, *, shadow: bool) -> None:
        """Take the events of a key whose open lives are in `chain`."""
        waiting: list[int] = []
        most = 1 if shadow else PLACE_MAX
        for at in events:
            if self._held[at]:
                waiting.append(at)
            elif self._op[at] == INSTALL:
                self._install(chain, waiting, at, most)
            else:
                if shadow and chain and self._of(chain[0]).frame != self._frame[at]:
                    self._supersede(chain, at)
                life = self._find(chain, self._frame[at])
                if life != NONE:
                    self._hit(chain, life, at)
                elif self._missable[at]:
                    self._begin_unseen(chain, at, most)
                elif self._plain[at]:
                    self._wait(waiting, at)
                else:
                    self._of(self._begin(at)).orphan = FINAL
        for at in waiting:
            self._of(self._begin(at)).orphan = UNDECIDED

    def _install(self, chain: list[int], waiting: list[int], at: int, most: int) -> None:
        """Begin a life, or let one that was seen a moment before have begun with this."""
        number = self._find(chain, self._frame[at], censored=True)
        if number != NONE and self._plain[at]:
            life = self._of(number)
            if self._is_late(at, life.ts, life.tid):
                life.first, life.censored = self._number[at], False
                return
        early = self._overtaken(waiting, at) if waiting and self._plain[at] else []
        over = bool(early) and self._op[early[-1]] == ZAP
        if not over and len(chain) >= most:
            self._supersede(chain, at)
        number = self._begin(at)
        chain.append(number)
        for event in early:
            self._hit(chain, number, event)
        if early:
            self._of(number).since = self._number[early[0]]

    def _overtaken(self, waiting: list[int], install: int) -> list[int]:
        """Return, and take out, the waiting events that were done after an install."""
        early = []
        for at in waiting:
            if self._frame[at] == self._frame[install]:
                if self._is_late(install, self._ts[at], self._tid[at]):
                    early.append(at)
                    if self._op[at] == ZAP:
                        break
        for at in early:
            waiting.remove(at)
        return early

    def _wait(self, waiting: list[int], at: int) -> None:
        """Keep a change or a zap of what is not mapped: its install may come yet."""
        waiting.append(at)
        if len(waiting) > WAITING_MAX:
            self._of(self._begin(waiting.pop(0))).orphan = FINAL

    def _supersede(self, chain: list[int], at: int) -> None:
        """There is no more room at a place: the oldest has gone, though no record says so."""
        life = self._of(chain.pop(0))
        life.death, life.superseded = self._number[at], True

    def _begin_unseen(self, chain: list[int], at: int, most: int) -> None:
        """Take a change or a zap of what was mapped before anybody looked."""
        if len(chain) >= most:
            self._supersede(chain, at)
        number = self._begin(at)
        self._of(number).censored = True
        chain.append(number)
        self._hit(chain, number, at)

    def _hit(self, chain: list[int], number: int, at: int) -> None:
        """Take a change or a zap of what is mapped."""
        life = self._of(number)
        life.last = self._number[at]
        if self._op[at] == ZAP:
            life.death = self._number[at]
            chain.remove(number)
        else:
            self.changes.append((number, self._number[at]))

    def _is_late(self, install: int, ts: int, tid: int) -> bool:
        """Tell whether an install was done before `ts`, when another thread saw its SPTE."""
        return bool(
            0 < self._fault_ts[install] <= ts
            and self._ts[install] - ts <= LATE_NS
            and self._tid[install] != tid
        )

    def _begin(self, at: int) -> int:
        number = self._number[at]
        life = _Life(self._frame[at], first=number, since=number, entry=number, last=number)
        life.ts, life.tid = self._ts[at], self._tid[at]
        return self._add(life)

    def _add(self, life: _Life) -> int:
        self.lives.append(life)
        return self._before + len(self.lives) - 1

    def _of(self, number: int) -> _Life:
        return self.lives[number - self._before]

    def _find(self, chain: list[int], frame: int, *, censored: bool = False) -> int:
        """Return the oldest open life of a page, or of those whose beginning was not seen."""
        for number in chain:
            life = self._of(number)
            if life.frame == frame and (life.censored or not censored):
                return number
        return NONE
