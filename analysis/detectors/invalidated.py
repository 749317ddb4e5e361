"""An SPTE that is still there when the invalidation that covered it has ended.

x86 zaps for every kind of invalidation (unmap, clear, protection, soft-dirty, migration):
kvm_mmu_notifier_invalidate_range_start() does not look at the event. When it returns, nothing in
the range is mapped, and until kvm_mmu_notifier_invalidate_range_end() no fault may map there. In
all recordings of 6.1, 6.12 and 7.3 that holds without exception; invalidations that touch no
memslot leave `in_progress` alone. After the end a fault may map again, and during the end's own
return, so only leaves count that were there before the start had returned and still are after the
end. Aging changes bits and is no invalidation. Which guest frames an address range stands for is
taken from the memslots at the time; memory behind guest_memfd is not subject to it.
May import: `analysis`, numpy.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.columns import Records, code
from analysis.detector import Chunk
from analysis.detectors.common import CLOCKS_NS, missing_hooks, surely_before
from analysis.detectors.mapped import Flushes, Key, WrongLives, forgotten, lost_or_seen, sorted_out
from analysis.findings import Finding, Innocent
from analysis.framelog import U64, Events, FrameLog, Hits, Spaces
from analysis.lifearrays import FOREVER, LifeArrays
from analysis.recording import Recording
from analysis.slotmap import GUEST_MEMFD, SLOT_COLUMNS, Slot, SlotMap

__all__ = ("AliveAfterInvalidation",)

_START, _END = code("op", "start"), code("op", "end")
_COLUMNS = ("op", "vm", "tid", "hva", "hva_end")
#: Starts that wait for their end; a thread is in one or two at a time.
_WAITING_MAX = 1 << 16
_CPU, _LOW = np.uint64(32), (1 << 32) - 1
_PAGE_BITS = np.uint64(12)
#: Odd numbers that mix the words of a key.
_MIX = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93)


@dataclasses.dataclass(slots=True)
class _Ranges:
    """Some INVALIDATE records as arrays; `number` of the record among those of its piece."""

    columns: dict[str, npt.NDArray[Any]]

    def __len__(self) -> int:
        return len(self.columns["ts"])

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self.columns[name]

    def at(self, which: npt.NDArray[Any]) -> "_Ranges":
        return _Ranges({name: column[which] for name, column in self.columns.items()})

    def key(self) -> U64:
        """Return a number for thread, VM and range."""
        words = [self[name].astype(np.uint64) for name in ("vm", "tid", "hva", "hva_end")]
        mixed = np.zeros(len(self), np.uint64)
        for word, factor in zip(words, _MIX, strict=True):
            mixed = (mixed ^ word) * np.uint64(factor)
            mixed ^= mixed >> np.uint64(29)
        return mixed

    @classmethod
    def joined(cls, *parts: "_Ranges") -> "_Ranges":
        names = parts[0].columns
        return cls({name: np.concatenate([part[name] for part in parts]) for name in names})


class AliveAfterInvalidation:
    """Detector 10: an SPTE alive after the invalidation that covered it ended."""

    name = "invalidation"
    title = "SPTEs alive after the invalidation that covered them had ended"
    rule = (
        "When kvm_mmu_notifier_invalidate_range_start() (virt/kvm/kvm_main.c) returns, no SPTE of "
        "the VM maps anything in the range, and none may be installed until "
        "kvm_mmu_notifier_invalidate_range_end()."
    )
    columns: Mapping[str, Sequence[str]] = {"INVALIDATE": _COLUMNS, "SLOT": SLOT_COLUMNS}
    wants_lives = True
    joins_faults = False

    def __init__(self) -> None:
        self._spaces = Spaces()
        self._slots = SlotMap(self._spaces)
        self._log = FrameLog(tags=2)
        self._flushes = Flushes()
        self._waiting: _Ranges | None = None
        self._found = {why: WrongLives() for why in ("", "lost", "root", "clocks")}

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; return "" or why no answer is possible."""
        self._recording = recording
        return missing_hooks(recording, "invalidate_start", "invalidate_end")

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        ended = self._slots.feed(chunk["SLOT"])
        self._flushes.feed(chunk["SPTE"], ended)
        events = self._events(chunk["INVALIDATE"], ended)
        lives = chunk.lives
        space = self._spaces.of(lives["vm"], lives["as_id"])
        self._take(lives, self._log.step(lives.guest(space), events))

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found."""
        rest = open_lives
        space = self._spaces.of(rest["vm"], rest["as_id"])
        self._take(rest, self._log.rest(rest.guest(space)))
        findings = [self._finding(why, found) for why, found in self._found.items() if found]
        return findings + forgotten(self, self._log)

    def _take(self, lives: LifeArrays, hits: Hits) -> None:
        for why, mine in sorted_out(lives, hits, self._flushes):
            sure = _around(lives, mine) if not why else np.ones(len(mine), np.bool_)
            for name, some in ((why, mine.at(sure)), ("clocks", mine.at(~sure))):
                found = self._found[name]
                found.add(lives, some.life, some.ts, more=functools.partial(_keys, some))

    def _finding(self, why: str, found: WrongLives) -> Finding:
        return found.finding(
            self,
            self._recording,
            "inconclusive" if why else "definite",
            "leaves outlived an invalidation of their range: no zap between its start and its end",
            slots=self._slots,
            functions=("kvm_mmu_notifier_invalidate_range_start", "kvm_unmap_gfn_range"),
            innocent=(
                lost_or_seen(self._recording, why == "lost"),
                Innocent(
                    "a fault mapped the page again after the invalidation",
                    "no: the leaf was installed before the invalidation began to return",
                ),
                Innocent(
                    "the clocks of two cpus differ, and the leaf was not there at both ends",
                    f"not ruled out: less than {CLOCKS_NS // 1000} us are between them"
                    if why == "clocks"
                    else f"no: one cpu wrote them, or more than {CLOCKS_NS // 1000} us are between",
                ),
                Innocent(
                    "the leaves belong to a root that a fast zap-all made invalid",
                    "not ruled out: a zap-all was under way"
                    if why == "root"
                    else "no: none was under way",
                ),
            ),
        )

    # --- which guest frames an invalidation covers ----------------------------------------------

    def _events(self, records: Records, ended: Sequence[Slot]) -> Events:
        """Return the invalidations of guest frames that ended in this piece."""
        if not len(records):
            return Events.none(2)
        names = ("ts", "cpu", "seq", *_COLUMNS)
        ranges = _Ranges({name: records[name] for name in names})
        starts = self._covered(ranges.at(ranges["op"] == _START), ended)
        if self._waiting is not None:
            starts = _Ranges.joined(self._waiting, starts)
        if not len(starts):
            self._waiting = None
            return Events.none(2)
        ends = ranges.at(ranges["op"] == _END)
        start, end, rest = _pairs(starts, ends)
        self._waiting = starts.at(rest[-_WAITING_MAX:]) if len(rest) else None
        order = np.argsort(ends["ts"][end], kind="stable")
        begun, over = starts.at(start[order]), ends.at(end[order])
        return Events(
            space=begun["space"],
            first=begun["gfn"],
            count=begun["pages"],
            since=begun["ts"],
            ts=over["ts"],
            tags=(_packed(begun), _packed(over)),
        )

    def _covered(self, starts: _Ranges, ended: Sequence[Slot]) -> _Ranges:
        """Return a row for each memslot that each start meets: space, gfn and pages."""
        parts = [_with_frames(starts.at(np.zeros(0, np.int64)), 0, 0)]
        for vm in np.unique(starts["vm"]).tolist():
            mine = starts.at(starts["vm"] == vm)
            for slot in self._slots.covering(vm, ended):
                end = slot.hva + (slot.pages << 12)
                met = (mine["hva"] < np.uint64(end)) & (mine["hva_end"] > np.uint64(slot.hva))
                met &= (mine["ts"] >= np.uint64(slot.ts)) & (mine["ts"] < np.uint64(slot.ts_end))
                if not slot.flags & GUEST_MEMFD and met.any():
                    space = self._spaces.one(slot.vm, slot.as_id)
                    parts.append(_with_frames(mine.at(met), space, slot))
        whole = _Ranges.joined(*parts)
        return whole.at(np.argsort(whole["ts"], kind="stable"))


def _around(lives: LifeArrays, hits: Hits) -> npt.NDArray[np.bool_]:
    """Tell which lives surely began before the start of what hit them, and ended after its end."""
    at = hits.life
    birth, death = (
        [lives[f"{end}_{name}"][at] for name in ("ts", "cpu", "seq")] for end in ("birth", "death")
    )
    start, end = (
        [ts, tag >> _CPU, tag & np.uint64(_LOW)]
        for ts, tag in zip((hits.since, hits.ts), hits.tags, strict=True)
    )
    lives_on = death[0] == np.uint64(FOREVER)
    return np.asarray(surely_before(birth, start) & (lives_on | surely_before(end, death)))


def _with_frames(ranges: _Ranges, space: int, slot: Any) -> _Ranges:
    count = len(ranges)
    columns = dict(ranges.columns)
    columns["space"] = np.full(count, space, np.uint64)
    if isinstance(slot, Slot):
        low = np.maximum(ranges["hva"], np.uint64(slot.hva)) - np.uint64(slot.hva)
        high = np.minimum(ranges["hva_end"], np.uint64(slot.hva + (slot.pages << 12)))
        high = high - np.uint64(slot.hva + 1) >> _PAGE_BITS
        low = low >> _PAGE_BITS
        columns["gfn"] = low + np.uint64(slot.gfn)
        columns["pages"] = high - low + np.uint64(1)
    else:
        columns["gfn"] = columns["pages"] = np.zeros(count, np.uint64)
    return _Ranges(columns)


def _pairs(
    starts: _Ranges, ends: _Ranges
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return (positions of starts, of their ends), and of the starts that have none yet.

    A start's end is the next one of the same thread, VM and range. A start that met several
    memslots stands there once for each.
    """
    keys = starts.key()
    end_keys = ends.key()
    # In order of time within a key, so the first end that is not before a start is its own.
    order = np.lexsort((ends["ts"], end_keys))
    sorted_keys, sorted_ts = end_keys[order], ends["ts"][order]
    low = np.searchsorted(sorted_keys, keys)
    high = np.searchsorted(sorted_keys, keys, "right")
    while True:
        middle = (low + high) >> 1
        active = low < high
        if not active.any():
            break
        before = active & (sorted_ts[np.minimum(middle, len(sorted_ts) - 1)] < starts["ts"])
        low, high = np.where(before, middle + 1, low), np.where(active & ~before, middle, high)
    last = np.searchsorted(sorted_keys, keys, "right")
    some = low < last
    return np.flatnonzero(some), order[low[some]], np.flatnonzero(~some)


def _packed(ranges: _Ranges) -> U64:
    packed = ranges["cpu"].astype(np.uint64) << _CPU | ranges["seq"].astype(np.uint64)
    return np.asarray(packed, np.uint64)


def _keys(hits: Hits, at: int) -> tuple[Key, Key]:
    start, end = (int(tag[at]) for tag in hits.tags)
    return (
        ("INVALIDATE", int(hits.since[at]), start >> 32, start & _LOW),
        ("INVALIDATE", int(hits.ts[at]), end >> 32, end & _LOW),
    )
