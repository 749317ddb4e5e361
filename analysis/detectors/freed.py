"""A page that is freed, or handed out anew, while a guest still maps it: use after free.

KVM holds no reference to what SPTEs map, so the only thing between a guest and freed memory is the
order: notifier start < zaps < its return < change of the host's page table < free of the page <
notifier end. On 6.1, 6.12 and 7.3, with the TDP and the shadow MMU, through demand paging,
memslots that come and go, reclaim, dirty logging and nested guests, no free was ever seen inside a
life, nor any reuse; teardown and slot removal zap before they return, too. Frees come in blocks of
any order and leaves in three sizes, so ranges are compared.

That a mapped page was freed is proven; by whose fault is another question, and the free itself
seldom answers it: see `analysis.detectors.freedby`. What other detectors found of the same pages
does, in `settled`.

Leaves of roots that a fast zap-all made invalid are out of reach of vCPUs: a free in the middle of
such a zap-all proves nothing. Not seen are frees of hugetlb pages to their pool and of device
memory, since mm_page_free does not see them. May import: `analysis`, numpy.
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from analysis.columns import Records
from analysis.detector import Chunk
from analysis.detectors.common import CLOCKS_NS, FRAMES, function_of, missing_hooks
from analysis.detectors.freedby import (
    DRAIN,
    OTHER,
    PUT,
    LastPuts,
    Stacks,
    drain_function,
    kvm_function,
)
from analysis.detectors.mapped import Flushes, Key, WrongLives, forgotten, lost_or_seen, unsure
from analysis.findings import Finding, Innocent
from analysis.framelog import Events, FrameLog, Hits, Spaces
from analysis.lifearrays import FOREVER, LifeArrays
from analysis.recording import Recording
from analysis.slotmap import SLOT_COLUMNS, SlotMap
from probes.wire import CALLS

__all__ = ("FreedWhileMapped", "settled")

#: Where the parts of an event lie in its two tags.
_WAY, _CALL, _CPU = np.uint64(56), np.uint64(48), np.uint64(32)
_LOW = np.uint64((1 << 32) - 1)
#: Largest order that is believed: 1G, above MAX_PAGE_ORDER.
_ORDER_MAX = 18
_PAGE_COLUMNS = ("pfn", "order", "tid", "stack")
_NO_STACK = (1 << 32) - 1
_ORDER, _TID = np.uint64(58), (1 << 22) - 1
#: What happened to the page, and a short name of it.
_FREED, _BY_KVM, _BY_DRAIN, _REUSED = (
    "freed",
    "freed by KVM's own put",
    "freed by a drain of LRU batches",
    "handed out anew",
)
_WAYS = {OTHER: _FREED, PUT: _BY_KVM, DRAIN: _BY_DRAIN}
_SHAPES = {_FREED: "freed", _BY_KVM: "freed by put", _BY_DRAIN: "freed by drain", _REUSED: "reused"}
#: Who else than KVM may be wrong.
_OWNER = "nobody told KVM: the owner freed the pages without an invalidation, and is wrong itself"
_OWNER_IN_FAULT = (
    "the owner gave its own reference back while a fault of KVM held one, without an invalidation, "
    "and is wrong itself"
)
_OPEN = (
    "not ruled out here: detector invalidation names the pages of which KVM was told, balance and "
    "wrong-folio those that KVM put once too often"
)
#: Detectors that find KVM itself wrong about a mapping or a reference, and those of them without
#: whose answer it may be KVM.
_OF_KVM = (
    *("invalidation", "stale-install", "stale-slot", "install", "balance", "wrong-folio"),
    *("gfn-outside", "two-leaves", "leaf-replaced"),
)
_ASKED = _OF_KVM[:6]


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
        "RELEASE": ("pfn", "call", "refcount", "fault_ts", "tid"),
        "FAULT": ("tid",),
        "SLOT": SLOT_COLUMNS,
    }
    wants_lives = True
    joins_faults = False

    def __init__(self) -> None:
        self._freed = FrameLog(tags=2)
        self._reused = FrameLog(tags=2)
        self._slots = SlotMap(Spaces())
        self._flushes = Flushes()
        self._puts = LastPuts()
        self._groups: dict[tuple[int, str, str], tuple[WrongLives, dict[str, Any]]] = {}

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; return "" or why no answer is possible."""
        self._recording = recording
        self._stacks = Stacks(recording.notes)
        return missing_hooks(recording, "page_free")

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        ended = self._slots.feed(chunk["SLOT"])
        self._flushes.feed(chunk["SPTE"], ended)
        host = chunk.lives.host()
        freed = self._freed.step(host, self._events(chunk["PAGE_FREE"], chunk))
        reused = self._reused.step(host, self._events(chunk["PAGE_ALLOC"]))
        self._take(chunk.lives, freed, reused)

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found."""
        rest = open_lives
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
        ways = (hits.tags[0] >> _WAY).tolist()
        keys = [
            (
                int(lives["vm"][hits.life[at]]),
                who or _WAYS[ways[at]],
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
        if stack != _NO_STACK and stack in self._stacks.frames:
            words["freed_by_stack"] = list(self._stacks.frames[stack])
        call = int(hits.tags[0][at] >> _CALL) & 0xFF
        if call:
            words["freed_by_call"] = CALLS[call]
        return words

    def _weakness(self, lives: LifeArrays, hits: Hits, at: int) -> str:
        """Return what keeps a hit from being proof, "" if nothing."""
        life = int(hits.life[at])
        ts = int(hits.ts[at])
        cpu = int(hits.tags[0][at] >> _CPU) & 0xFFFF
        for end in ("birth", "death"):
            near = abs(int(lives[f"{end}_ts"][life]) - ts) <= CLOCKS_NS
            if near and int(lives[f"{end}_cpu"][life]) != cpu:
                return "clock"
        return "root" if ts >= self._flushes.begin(lives, life) else ""

    def _finding(
        self, vm: int, who: str, why: str, found: WrongLives, detail: dict[str, Any]
    ) -> Finding:
        frames = detail.get("freed_by_stack", [])
        functions = ["kvm_mmu_notifier_invalidate_range_start"]
        if who == _BY_KVM:
            put = function_of(self._recording, detail.get("freed_by_call", ""))
            functions = [name for name in dict.fromkeys((put, kvm_function(frames))) if name]
        if who == _BY_DRAIN:
            functions = [drain_function(frames)]
        if frames:
            stack = " < ".join(frame.removesuffix(" [kernel]") for frame in frames)
            functions += ["mm_page_free", f"called by {stack}"]
        else:
            functions += ["mm_page_free"]
        return found.finding(
            self,
            self._recording,
            "inconclusive" if why else "definite",
            f"VM {vm}: pages were {who} while the guest still mapped them, first gfn "
            f"{found.first['gfn']:#x} by SPTE {found.first['spte']:#x}",
            slots=self._slots,
            functions=functions,
            innocent=_innocent(self._recording, why, who),
            detail=detail | {"shape": _SHAPES[who]},
        )

    def _events(self, records: Records, chunk: Chunk | None = None) -> Events:
        """Return frees (those of a chunk) or uses of pages, with two tags: by whom, how large."""
        # Frame 0 is the BIOS's; some recorders wrote zeros for a page that they could not name.
        at = np.flatnonzero((records["pfn"] > 0) & (records["pfn"] < FRAMES))
        ts, tid = records["ts"][at], records["tid"][at]
        flags = records["cpu"][at].astype(np.uint64) << _CPU | records["seq"][at]
        if chunk is not None:
            calls = self._puts.calls(records, at, chunk["RELEASE"], chunk["FAULT"])
            ways = self._stacks.ways(records["stack"][at])
            calls[ways == DRAIN] = 0
            flags |= calls << _CALL | np.where(calls > 0, np.uint64(PUT), ways) << _WAY
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
            f"no: the free and the ends of the mapping are {CLOCKS_NS // 1000} us apart, or more, "
            "or of one CPU",
            f"not ruled out: they are less than {CLOCKS_NS // 1000} us apart",
        ),
    }
    found = [lost_or_seen(recording, why == "lost")]
    for name, (explanation, no, yes) in verdicts.items():
        found.append(Innocent(explanation, yes if name == why else no))
    if who == _BY_DRAIN:
        found.append(
            Innocent(
                "the drain itself is wrong, or the fault in which it ran",
                "no: it gives back the reference of its own batch; all others were gone before",
            )
        )
    found.append(Innocent(_OWNER_IN_FAULT if who == _BY_KVM else _OWNER, _OPEN))
    return found


def settled(
    findings: Sequence[Finding], answered: Collection[str], lossless: bool
) -> list[Finding]:
    """Say in findings of `FreedWhileMapped` what the other ones answer: who was wrong.

    `answered` are the detectors that could answer, `lossless` whether all records are there.
    """
    found = []
    for one in findings:
        verdict = ""
        if one.detector == FreedWhileMapped.name:
            others = [f for f in findings if _accuses(f) and set(f.vms) & set(one.vms)]
            verdict = _who(one, others, lossless and set(_ASKED) <= set(answered))
        innocent = tuple(
            dataclasses.replace(why, ruled_out=verdict)
            if verdict and why.ruled_out == _OPEN
            else why
            for why in one.innocent
        )
        found.append(dataclasses.replace(one, innocent=innocent))
    return found


def _accuses(finding: Finding) -> bool:
    """Tell whether a finding says how KVM may have freed a page, or kept it mapped."""
    # A reference that KVM keeps frees nothing.
    return finding.detector in _OF_KVM and "kept" not in finding.detail


def _who(one: Finding, others: Sequence[Finding], asked: bool) -> str:
    """Return what becomes of "the owner is wrong itself", "" if nobody can say.

    `others` are what was found of KVM in the VM; `asked`: is there nothing that was not asked?
    """
    proven = [other for other in others if other.is_anomaly]
    same = [other.detector for other in proven if _share(one.pfns, other.pfns)]
    if same:
        return f"no: KVM itself is wrong about these pages, see {same[0]}"
    if others:
        names = " and ".join(dict.fromkeys(other.detector for other in others))
        return f"not ruled out: KVM itself may be wrong, see what {names} found in this VM"
    if not asked or one.verdict != "definite":
        return ""
    return (
        "yes, by this trace: no detector finds that KVM was told of an invalidation before or "
        "after it mapped the pages (invalidation, stale-install), or that it put them too often "
        "(balance, wrong-folio)"
    )


def _share(some: Sequence[tuple[int, int]], others: Sequence[tuple[int, int]]) -> bool:
    """Tell whether ranges [first, last] of two findings have a frame in common."""
    return any(a <= last and first <= b for a, b in some for first, last in others)


def _key(what: str, hits: Hits, at: int) -> tuple[Key]:
    tag = int(hits.tags[0][at])
    kind = "PAGE_ALLOC" if what == _REUSED else "PAGE_FREE"
    return ((kind, int(hits.ts[at]), tag >> 32 & 0xFFFF, tag & 0xFFFFFFFF),)
