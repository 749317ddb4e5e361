"""Reference counts that only grow: seen over a page's whole time, since one sample proves nothing.

A count sampled at one moment may hold references of others: per-cpu LRU batches, GUP, compaction,
reclaim. What no such noise does is follow KVM's faults: rise by one with every fault of the page
for as long as it lives, or stay above what maps the page by exactly the number of its faults, when
KVM has let go of it and its VM is gone, until the recording ends, without ever being freed.

The noise that comes nearest: mark_page_accessed() at the end of a fault queues the page for
activation when it is seen a second time, and the queue holds a reference, so that many pages rise
by one with their second fault. Compound pages are left out, since their count rises with every part
that the host maps, and so is memory of a file that may outlive the VM.
May import: `analysis`, `probes.wire`, numpy, pandas.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.columns import Records, code
from analysis.detector import Chunk
from analysis.detectors.common import missing_hooks, refcountable
from analysis.detectors.puts import judged_faults
from analysis.faultjoin import FaultJoin
from analysis.findings import Chain, Finding, Innocent, ranges_of
from analysis.pagemap import PAGES_MAX, PageMap
from analysis.recording import Recording
from probes.wire import PAGE_BITS

__all__ = ("Growth",)

_COMPOUND = PAGE_BITS["head"] | PAGE_BITS["tail"]
#: Pages that the LRU batches of a cpu can hold: 31 in each of add, activate, mlock (mm/swap.c).
_LRU_PAGES = 93
#: Faults of one page from which on a rise is more than two queues of the LRU can make.
_FAULTS_SOME = 5
#: Faults of one page from which on its growth is told …
_FAULTS_MANY = 16
#: … and from which on nobody else can have kept step by chance.
_FAULTS_SURE = 64
#: The part of the faults, or of the pages, that must fit.
_MOST = 0.9
#: Pages of a slot that must have been freed, for its memory to be taken for anonymous.
_FREED_SOME = 8
#: Ends of a recording after which the VM's process is gone, and with it its memory.
_PROCESS_ENDED = ("command", "vm")
#: `state` of a page.
_ANONYMOUS, _KNOWN, _ZAPPED = 1, 2, 4
#: Largest order of a block that is freed at once: a 1G page.
_ORDER_MAX = 18
_MANY_FREED = 1 << 22

_RULE_GROWS = (
    "Every reference that a fault takes is given back with the fault: over many faults the count "
    'of a page does not change. Linux 7df003c85218 ("KVM: fix overflow of zero page refcount with '
    'ksm running") (v5.6) mended such a leak.'
)
_RULE_KEPT = (
    "KVM holds no reference to a page when no fault is at work on it; a page of anonymous memory "
    "that nobody maps and nobody holds is freed (mm/swap.c, __folio_put())."
)


class Growth:
    """Detector 14, and 4 by counts: a count that rises with each fault, a page never freed."""

    name = "growth"
    title = "pages whose reference count rises with every fault, or that are never freed"
    rule = _RULE_GROWS
    columns: Mapping[str, Sequence[str]] = {
        "PAGE_FREE": ("pfn", "order"),
        "VM": ("vm", "op"),
        "SPTE": ("op", "pfn", "level", "refcount", "mapcount", "page_bits"),
    }
    wants_lives = False
    joins_faults = True

    def __init__(self) -> None:
        self._pages = PageMap(
            {
                "gets": np.uint32,
                "first": np.int32,
                "last": np.int32,
                "excess": np.int16,
                "state": np.uint8,
                "ts": np.uint64,
                "group": np.uint16,
            }
        )
        self._groups = _Groups()
        self._gone: set[int] = set()
        self._span = [1 << 63, 0]

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; return "" or why no answer is possible."""
        self._recording = recording
        if recording.semantics.put == "unknown":
            return f"what generation {recording.generation or '(none)'} promises is not known"
        self._anonymous = _Anonymous(recording)
        return missing_hooks(recording, "page_free")

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        # Within a chunk the order of kinds does not matter much: a page that is freed and handed
        # out again in it is taken for one that is new, as it should be.
        faults = chunk.faults.records
        if len(faults):
            self._feed_faults(faults)
            self._feed_prefetches(chunk.faults)
        vms = chunk["VM"]
        self._gone |= set(vms["vm"][vms["op"] == code("op", "delete")].tolist())
        self._feed_zaps(chunk["SPTE"])
        self._feed_frees(chunk["PAGE_FREE"])

    def _feed_faults(self, faults: Records) -> None:
        judged = judged_faults(faults, self._recording)
        judged &= (faults["page_bits"] & _COMPOUND) == 0
        rows = np.flatnonzero(judged & (faults["page_bits_end"] > 0))
        if not len(rows):
            return
        ts = faults["ts"]
        self._span = [min(self._span[0], int(ts[rows[0]])), max(self._span[1], int(ts[rows[-1]]))]
        at = self._pages.at(faults["pfn"][rows], add=True)
        rows, at = rows[at >= 0], at[at >= 0]
        above = faults["refcount_end"][rows] - faults["mapcount_end"][rows]
        pages = self._pages
        # Of several faults of a page numpy keeps what is assigned last, so the first comes last.
        new = np.flatnonzero(pages["gets"][at] == 0)[::-1]
        pages["first"][at[new]] = above[new]
        pages["last"][at] = above
        pages["ts"][at] = ts[rows]
        np.add.at(pages["gets"], at, np.uint32(1))
        pages["state"][at] = self._anonymous.state(faults["vm"][rows], faults["hva"][rows])
        pages["group"][at] = self._groups.of(faults["vm"][rows], faults["slot"][rows])

    def _feed_prefetches(self, join: FaultJoin) -> None:
        """Count the references of prefetched pages too: KVM takes and puts one for each."""
        sptes, faults = join.sptes, join.records
        rows = sptes["cause"] == code("cause", "prefetch")
        rows = rows & (sptes["op"] == code("op", "install"))
        if not rows.any():
            return
        bits = sptes["page_bits"]
        rows = np.flatnonzero(rows & refcountable(bits) & ((bits & _COMPOUND) == 0))
        at = self._pages.at(sptes["pfn"][rows], add=True)
        rows, at = rows[at >= 0], at[at >= 0]
        np.add.at(self._pages["gets"], at, np.uint32(1))
        self._pages["ts"][at] = sptes["ts"][rows]
        # Prefetched is what lies around the page of the fault, in the same slot.
        fault = sptes.fault[rows]
        away = (sptes["gfn"][rows] - faults["gfn"][fault]) << np.uint64(12)
        hva = faults["hva"][fault] + away
        self._pages["state"][at] = self._anonymous.state(faults["vm"][fault], hva)
        self._pages["group"][at] = self._groups.of(faults["vm"][fault], faults["slot"][fault])

    def _feed_zaps(self, sptes: Records) -> None:
        zaps = (sptes["op"] == code("op", "zap")) & (sptes["level"] == 1)
        # A type in place of the map count (buddy, slab) is far below -1.
        zaps &= (sptes["page_bits"] > 0) & (sptes["mapcount"] >= -1)
        zaps &= (sptes["page_bits"] & _COMPOUND) == 0
        rows = np.flatnonzero(zaps)
        if not len(rows):
            return
        at = self._pages.at(sptes["pfn"][rows])
        rows, at = rows[at >= 0], at[at >= 0]
        excess = sptes["refcount"][rows] - (sptes["mapcount"][rows] + 1)
        # Of several zaps of a page the last one stays: rows are in order of time.
        self._pages["excess"][at] = np.clip(excess, -1000, 1000)
        self._pages["state"][at] |= _ZAPPED

    def _feed_frees(self, frees: Records) -> None:
        if not len(frees) or not len(self._pages):
            return
        order = np.minimum(frees["order"], _ORDER_MAX).astype(np.int64)
        pfn, ts = frees["pfn"], frees["ts"]
        if order.any():
            sizes = np.int64(1) << order
            if sizes.sum() > _MANY_FREED:
                sizes = np.where(np.cumsum(sizes) > _MANY_FREED, 1, sizes)
            within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
            pfn = np.repeat(pfn, sizes) + within.astype(np.uint64)
            ts = np.repeat(ts, sizes)
        at = self._pages.at(pfn)
        kept = at >= 0
        pages = self._pages
        one = at[kept]
        sane = (pages["gets"][one] > 0) & ((pages["state"][one] & _ZAPPED) != 0)
        self._groups.freed(pages["group"][one[sane & (pages["excess"][one] == 0)]])
        # One that was freed and faulted in again within this chunk starts anew.
        pages["gets"][one] = pages["ts"][one] > ts[kept]
        pages["state"][one] &= np.uint8(_ANONYMOUS | _KNOWN)
        pages["first"][one] = pages["last"][one]

    def finish(self, open_lives: pd.DataFrame) -> list[Finding]:
        """Return what was found."""
        pages = self._pages
        found = []
        faults = pages["gets"][: len(pages)].astype(np.int64)
        grown = (pages["last"].astype(np.int64) - pages["first"])[: len(pages)]
        steady = (faults >= _FAULTS_SOME) & (grown >= _MOST * (faults - 1))
        many = np.flatnonzero(steady & (faults > _FAULTS_MANY))
        if len(many):
            found.append(self._growing(many, faults, grown))
        else:
            again = np.flatnonzero(faults >= _FAULTS_SOME)
            steps, rise = int((faults[again] - 1).sum()), int(grown[again].sum())
            enough = steady.sum() > _LRU_PAGES * self._recording.facts.cpus
            if enough and rise >= _MOST * steps:
                found.append(self._growing(np.flatnonzero(steady), faults, grown))
        kept = self._kept(faults)
        if kept is not None:
            found.append(kept)
        return found

    def _growing(
        self,
        at: npt.NDArray[np.int64],
        faults: npt.NDArray[np.int64],
        grown: npt.NDArray[np.int64],
    ) -> Finding:
        worst = int(at[np.argmax(grown[at])])
        times, rise = int(faults[worst]), int(grown[worst])
        sure = times >= _FAULTS_SURE or len(at) >= _FAULTS_SURE * self._recording.facts.cpus
        more = "" if len(at) == 1 else f", and {len(at) - 1:,} more pages alike"
        frame = int(self._pages.frames(np.array([worst]))[0])
        return self._finding(
            at,
            "definite" if sure else "probable",
            f"the count of pfn {frame:#x} rose by {rise:,} in {times:,} faults and never "
            f"fell{more}",
            _RULE_GROWS,
            frame,
            int(faults[at].sum()),
            (
                Innocent(
                    "somebody else took references meanwhile",
                    f"no: the count rose by {rise / max(1, times - 1):.2f} with each fault",
                ),
                Innocent(
                    "more processes mapped the page",
                    "no: what maps it (_mapcount) is taken off",
                ),
            ),
            {"faults": times, "rise": rise},
        )

    def _kept(self, faults: npt.NDArray[np.int64]) -> Finding | None:
        """Look for pages let go but never freed, held by as many as there were faults."""
        state = self._pages["state"][: len(self._pages)]
        excess = self._pages["excess"][: len(self._pages)]
        left = (faults > 0) & ((state & _ZAPPED) != 0)
        # Memory of a file is held by its page cache; where nothing is known it may be a file's.
        left &= (state & (_ANONYMOUS | _KNOWN)) != _KNOWN
        left &= self._groups.of_vms(self._gone)[self._pages["group"][: len(self._pages)]]
        fits = left & (excess == faults)
        bound = _LRU_PAGES * self._recording.facts.cpus
        if fits.sum() <= bound or fits.sum() < _MOST * left.sum():
            return None
        at = np.flatnonzero(fits)
        anonymous = (state[at] & _ANONYMOUS) != 0
        several = (faults[at] > 1).sum() > bound
        ended = self._recording.ended_by in _PROCESS_ENDED
        sure = several or (ended and anonymous.mean() >= _MOST)
        alike = self._groups.with_freed(self._pages["group"][at]).mean() >= _MOST
        lost = self._recording.lost("PAGE_FREE", "SPTE")
        verdict = "definite" if sure else "probable" if alike and ended else "inconclusive"
        if lost >= len(at):
            verdict = "inconclusive"
        sample = at[np.argmax(faults[at])]
        return self._finding(
            at,
            verdict,
            f"{len(at):,} pages were let go but never freed, each held by as many references as "
            "KVM took to it",
            _RULE_KEPT,
            int(self._pages.frames(np.array([sample]))[0]),
            int(faults[at].sum()),
            (
                Innocent(
                    "per-cpu LRU batches hold the pages",
                    f"no: they hold {bound:,} pages at most on {self._recording.facts.cpus} cpus",
                ),
                Innocent(
                    "a file's page cache holds them",
                    "no: the memory is anonymous"
                    if anonymous.mean() >= _MOST
                    else "no: pages with more faults are held more often"
                    if sure
                    else "unlikely: other pages of the same slots were held by nobody, and freed"
                    if alike
                    else "not ruled out: what stands behind the memory is not known",
                ),
                Innocent(
                    "the process lives on with its memory, which is in the swap cache too",
                    "no: it has ended"
                    if ended
                    else "no: pages with more faults are held more often"
                    if several
                    else "not ruled out: the recording ended first",
                ),
                Innocent(
                    "their frees were lost",
                    f"no: {lost:,} records of frees and zaps were lost"
                    if lost < len(at)
                    else f"not ruled out: {lost:,} records were lost",
                ),
            ),
            {"let go": int(left.sum()), "anonymous": int(anonymous.sum())},
        )

    def _finding(
        self,
        at: npt.NDArray[np.int64],
        verdict: str,
        title: str,
        rule: str,
        frame: int,
        count: int,
        innocent: Sequence[Innocent],
        detail: Mapping[str, Any],
    ) -> Finding:
        pfns, more = ranges_of(self._pages.frames(at))
        told = list(innocent)
        if self._pages.refused:
            told.append(
                Innocent(f"only the first {PAGES_MAX:,} pages were watched", "so there may be more")
            )
        return Finding(
            detector=self.name,
            verdict=verdict,
            title=title,
            rule=rule,
            count=count,
            pages=len(at),
            vms=self._groups.vms(self._pages["group"][at]),
            pfns=pfns,
            more=more,
            first_ts=self._span[0],
            last_ts=self._span[1],
            functions=(self._recording.semantics.put_function,),
            innocent=tuple(told),
            chain=Chain(records=(), pfns=(frame,), ts_from=self._span[0]),
            detail=dict(detail),
        )


class _Anonymous:
    """Which addresses of a VM's process are anonymous memory, and of which anything is known."""

    def __init__(self, recording: Recording) -> None:
        self._known: dict[int, list[tuple[int, int, bool]]] = {}
        for mapping in recording.mappings:
            if mapping.path is not None:
                ranges = self._known.setdefault(mapping.vm, [])
                ranges.append((mapping.start, mapping.end, not mapping.path))

    def state(self, vm: npt.NDArray[Any], hva: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Return _KNOWN and _ANONYMOUS for some addresses of VMs' processes."""
        answer = np.zeros(len(vm), np.uint8)
        for number, ranges in self._known.items():
            mine = vm == number
            # Later notes are newer; a VM has a handful of slots.
            for start, end, anonymous in ranges[-256:]:
                hit = mine & (hva >= start) & (hva < end)
                answer[hit] = _KNOWN | (_ANONYMOUS if anonymous else 0)
        return answer


class _Groups:
    """Slots of VMs by a small number, and how many pages of each were freed when let go."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._keys: list[int] = [0]
        self._freed = np.zeros(1 << 16, np.int64)

    def of(self, vm: npt.NDArray[Any], slot: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
        """Return the number of the slot of each row; 0 if there are too many slots."""
        every = vm.astype(np.int64) << 17 | (slot.astype(np.int64) + 1)
        if len(every) and (every == every[0]).all():
            keys, which = every[:1], np.zeros(len(every), np.int64)
        else:
            keys, which = np.unique(every, return_inverse=True)
        numbers = []
        for key in keys.tolist():
            if key not in self._numbers and len(self._keys) < 1 << 16:
                self._numbers[key] = len(self._keys)
                self._keys.append(key)
            numbers.append(self._numbers.get(key, 0))
        return np.array(numbers, np.uint16)[which]

    def freed(self, numbers: npt.NDArray[np.uint16]) -> None:
        """Take pages that nobody held when KVM let them go, and that were freed."""
        self._freed += np.bincount(numbers, minlength=len(self._freed))

    def with_freed(self, numbers: npt.NDArray[np.uint16]) -> npt.NDArray[np.bool_]:
        """Tell which slots had several such pages: they are no file's memory."""
        return np.asarray((self._freed[numbers] >= _FREED_SOME) & (numbers > 0), np.bool_)

    def of_vms(self, vms: Collection[int]) -> npt.NDArray[np.bool_]:
        """Tell for each number whether its slot is of one of some VMs."""
        answer = np.zeros(1 << 16, np.bool_)
        answer[: len(self._keys)] = [key >> 17 in vms for key in self._keys]
        return answer

    def vms(self, numbers: npt.NDArray[np.uint16]) -> tuple[int, ...]:
        """Return the VMs that some slots are of."""
        return tuple(sorted({self._keys[n] >> 17 for n in np.unique(numbers).tolist() if n}))
