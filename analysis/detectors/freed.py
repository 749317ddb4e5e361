"""A page that is freed, or handed out anew, while a guest still maps it: use after free.

KVM holds no reference to what SPTEs map, so the only thing between a guest and freed memory is the
order: notifier start < zaps < its return < change of the host's page table < free of the page <
notifier end. On 6.1, 6.12 and 7.3, with the TDP and the shadow MMU, through demand paging,
memslots that come and go, reclaim, dirty logging and nested guests, no free was ever seen inside a
life, nor any reuse; teardown and slot removal zap before they return, too. Frees come in blocks of
any order and leaves in three sizes, so ranges are compared.

Leaves of roots that a fast zap-all made invalid are out of reach of vCPUs: a free in the middle of
such a zap-all proves nothing. Not seen are frees of hugetlb pages to their pool and of device
memory, since mm_page_free does not see them. May import: `analysis`, numpy.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.columns import Records
from analysis.detector import Chunk
from analysis.detectors.common import FRAMES, missing_hooks
from analysis.detectors.mapped import Flushes, Key, WrongLives, forgotten, lost_or_seen, unsure
from analysis.findings import Finding, Innocent
from analysis.framelog import Events, FrameLog, Hits, Spaces
from analysis.lifearrays import FOREVER, LifeArrays
from analysis.recording import Recording
from analysis.slotmap import SLOT_COLUMNS, SlotMap

__all__ = ("FreedWhileMapped",)

#: Clocks of two CPUs may differ by so much: ktime_get_mono_fast_ns(), kernel/time/timekeeping.c,
#: says of itself that it can step back a little.
_SKEW_NS = 1000
#: Where the parts of an event lie in its two tags.
_IN_FAULT, _CPU = np.uint64(1 << 63), np.uint64(32)
_LOW = np.uint64((1 << 32) - 1)
#: Largest order that is believed: 1G, above MAX_PAGE_ORDER.
_ORDER_MAX = 18
_PAGE_COLUMNS = ("pfn", "order", "tid", "stack")
_NO_STACK = (1 << 32) - 1
_ORDER, _TID = np.uint64(58), (1 << 22) - 1
#: The tracer's own frames, which are innermost.
_TRACING = ("bpf_prog_", "bpf_trace_run", "__traceiter_", "__bpf_trace_")
#: What happened to the page.
_BY_KVM = "freed inside a guest page fault, by KVM's own put,"
_FREED, _REUSED = "freed", "handed out anew"


class FreedWhileMapped:
    """Detector 5: pages freed or reused while an SPTE that guests can reach maps them."""

    name = "use-after-free"
    title = "pages freed or reused while a guest still maps them"
    rule = (
        "No SPTE that a vCPU can reach maps a page at the moment it is freed. KVM holds no "
        "reference for a mapping; kvm_mmu_notifier_invalidate_range_start() (virt/kvm/kvm_main.c) "
        "zaps it before the host's page table changes, and only then may the page go."
    )
    columns: Mapping[str, Sequence[str]] = {
        "PAGE_FREE": _PAGE_COLUMNS,
        "PAGE_ALLOC": _PAGE_COLUMNS,
        "FAULT": ("fault_ts", "tid"),
        "SLOT": SLOT_COLUMNS,
    }
    wants_lives = True
    joins_faults = False

    def __init__(self) -> None:
        self._freed = FrameLog(tags=2)
        self._reused = FrameLog(tags=2)
        self._slots = SlotMap(Spaces())
        self._flushes = Flushes()
        self._groups: dict[tuple[int, str, str], tuple[WrongLives, dict[str, Any]]] = {}

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; return "" or why no answer is possible."""
        self._recording = recording
        self._frames = {
            note["stack"]: note.get("frames")
            for note in recording.notes
            if isinstance(note.get("stack"), int)
        }
        return missing_hooks(recording, "page_free")

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        ended = self._slots.feed(chunk["SLOT"])
        self._flushes.feed(chunk["SPTE"], ended)
        host = chunk.lives.host()
        freed = self._freed.step(host, _events(chunk["PAGE_FREE"], chunk["FAULT"]))
        reused = self._reused.step(host, _events(chunk["PAGE_ALLOC"], chunk["FAULT"]))
        self._take(chunk.lives, freed, reused)

    def finish(self, open_lives: pd.DataFrame) -> list[Finding]:
        """Return what was found."""
        rest = LifeArrays(open_lives)
        host = rest.host()
        self._take(rest, self._freed.rest(host), self._reused.rest(host))
        found = [self._finding(*key, *group) for key, group in self._groups.items()]
        return found + forgotten(self, self._freed, self._reused)

    def _take(self, lives: LifeArrays, freed: Hits, reused: Hits) -> None:
        self._sort(lives, freed, "")
        if len(reused):
            # What was freed before is known; else the record of the free is missing.
            self._sort(lives, reused.at(~np.isin(reused.life, freed.life)), _REUSED)

    def _sort(self, lives: LifeArrays, hits: Hits, who: str) -> None:
        if not len(hits):
            return
        shaky = unsure(lives, hits.life)
        inside = (hits.tags[0] & _IN_FAULT) != 0
        keys = [
            (
                int(lives["vm"][hits.life[at]]),
                who or (_BY_KVM if inside[at] else _FREED),
                "lost" if shaky[at] else self._weakness(lives, hits, at),
            )
            for at in range(len(hits))
        ]
        for key in dict.fromkeys(keys):
            self._add(key, lives, hits.at(np.array([one == key for one in keys])))

    def _add(self, key: tuple[int, str, str], lives: LifeArrays, hits: Hits) -> None:
        found, detail = self._groups.setdefault(key, (WrongLives(), {}))
        if not found:
            detail |= self._words(lives, hits, int(np.argmin(hits.ts)))
        order = hits.tags[1] >> _ORDER
        first, base = hits.frame >> order << order, lives["pfn"][hits.life]
        last = np.minimum(
            base + lives["pages"][hits.life].astype(np.uint64), first + (np.uint64(1) << order)
        )
        first = np.maximum(first, base)
        found.add(
            lives,
            hits.life,
            hits.ts,
            part=(first - base, last - first),
            more=functools.partial(_key, key[1], hits),
        )

    def _words(self, lives: LifeArrays, hits: Hits, at: int) -> dict[str, Any]:
        """Return what the finding says about its first page."""
        life, stack = int(hits.life[at]), int(hits.tags[1][at] & _LOW)
        birth, death = int(lives["birth_ts"][life]), int(lives["death_ts"][life])
        words: dict[str, Any] = {
            "freed_by_tid": int(hits.tags[1][at] >> np.uint64(32)) & _TID,
            "mapped_before_ns": int(hits.ts[at]) - birth if birth else None,
            "mapped_after_ns": death - int(hits.ts[at]) if death != FOREVER else None,
        }
        if stack != _NO_STACK and stack in self._frames:
            words["freed_by_stack"] = self._frames[stack]
        return words

    @staticmethod
    def _stack(detail: Mapping[str, Any]) -> str:
        """Return the kernel stack of the first free for people, innermost first."""
        frames = [str(frame) for frame in detail.get("freed_by_stack") or ()]
        while frames and frames[0].startswith(_TRACING):
            del frames[0]
        return " < ".join(frame.removesuffix(" [kernel]") for frame in frames)

    def _weakness(self, lives: LifeArrays, hits: Hits, at: int) -> str:
        """Return what keeps a hit from being proof, "" if nothing."""
        life = int(hits.life[at])
        ts = int(hits.ts[at])
        cpu = int(hits.tags[0][at] >> _CPU) & 0xFFFF
        for end in ("birth", "death"):
            near = abs(int(lives[f"{end}_ts"][life]) - ts) <= _SKEW_NS
            if near and int(lives[f"{end}_cpu"][life]) != cpu:
                return "clock"
        return "root" if ts >= self._flushes.begin(lives, life) else ""

    def _finding(
        self, vm: int, who: str, why: str, found: WrongLives, detail: dict[str, Any]
    ) -> Finding:
        functions = ["kvm_mmu_notifier_invalidate_range_start", "mm_page_free"]
        if who == _BY_KVM:
            functions[0] = self._recording.semantics.put_function or "kvm_release_pfn_clean"
        stack = self._stack(detail)
        return found.finding(
            self,
            self._recording,
            "inconclusive" if why else "definite",
            f"VM {vm}: pages were {who} while the guest still mapped them, first gfn "
            f"{found.first['gfn']:#x} by SPTE {found.first['spte']:#x}",
            slots=self._slots,
            functions=(*functions, *((f"called by {stack}",) if stack else ())),
            innocent=_innocent(self._recording, why, who),
            detail=detail,
        )


def _innocent(recording: Recording, why: str, who: str) -> list[Innocent]:
    """Return the innocent explanations, and what becomes of each."""
    verdicts = {
        "root": (
            "the leaves belong to a root that a fast zap-all made invalid, out of reach of vCPUs",
            "no: no memslot was on its way out when the pages were freed",
            "not ruled out: a zap-all was under way and zapped them later",
        ),
        "clock": (
            "the clocks of two CPUs differ",
            f"no: the free and the ends of the mapping are more than {_SKEW_NS} ns apart, or of "
            "one CPU",
            f"not ruled out: they are less than {_SKEW_NS} ns apart",
        ),
    }
    found = [lost_or_seen(recording, why == "lost")]
    for name, (explanation, no, yes) in verdicts.items():
        found.append(Innocent(explanation, yes if name == why else no))
    if who != _BY_KVM:
        found.append(
            Innocent(
                "nobody told KVM: the owner freed the pages without an invalidation, and is wrong "
                "itself",
                "not ruled out here: detector invalidation names the pages of which KVM was told",
            )
        )
    return found


def _events(records: Records, faults: Records) -> Events:
    """Return frees or uses of pages, with two tags: whose record, by whom and how large."""
    # Frame 0 is the BIOS's; some recorders wrote zeros for a page that they could not name.
    at = np.flatnonzero((records["pfn"] > 0) & (records["pfn"] < FRAMES))
    ts, tid = records["ts"][at], records["tid"][at]
    flags = np.where(_in_fault(faults, tid, ts), _IN_FAULT, np.uint64(0))
    flags |= records["cpu"][at].astype(np.uint64) << _CPU | records["seq"][at]
    stack = records["stack"][at].astype(np.int64).astype(np.uint64) & _LOW
    order = np.minimum(records["order"][at], _ORDER_MAX).astype(np.uint64)
    who = order << _ORDER | (tid.astype(np.uint64) & np.uint64(_TID)) << np.uint64(32)
    return Events(
        space=np.zeros(len(at), np.uint64),
        first=records["pfn"][at],
        count=np.uint64(1) << order,
        since=ts,
        ts=ts,
        tags=(flags, who | stack),
    )


def _in_fault(
    faults: Records, tid: npt.NDArray[Any], ts: npt.NDArray[np.uint64]
) -> npt.NDArray[np.bool_]:
    """Tell which events happened in a thread that was in a guest page fault."""
    found = np.zeros(len(tid), np.bool_)
    if not len(faults) or not len(tid):
        return found
    threads = np.unique(faults["tid"])
    at = np.searchsorted(threads, tid)
    at[at == len(threads)] = 0
    for which in np.flatnonzero(np.bincount(at[threads[at] == tid], minlength=len(threads))):
        thread = threads[which]
        mine = faults["tid"] == thread
        begin, end = faults["fault_ts"][mine], faults["ts"][mine]
        events = np.flatnonzero(tid == thread)
        # Faults of one thread follow one another.
        place = np.searchsorted(end, ts[events])
        place[place == len(end)] = len(end) - 1
        found[events] = (begin[place] <= ts[events]) & (ts[events] <= end[place])
    return found


def _key(what: str, hits: Hits, at: int) -> tuple[Key]:
    tag = int(hits.tags[0][at])
    kind = "PAGE_ALLOC" if what == _REUSED else "PAGE_FREE"
    return ((kind, int(hits.ts[at]), tag >> 32 & 0xFFFF, tag & 0xFFFFFFFF),)
