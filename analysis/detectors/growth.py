"""Reference counts that only grow: seen over a page's whole time, since one sample proves nothing.

A count sampled at one moment may hold references of others: per-cpu LRU batches, GUP, compaction,
reclaim. What no such noise does is follow KVM's faults: rise by one with every fault of the page
for as long as it lives, or stay above what maps the page by exactly the number of its faults, when
KVM has let go of it and its VM is gone, until the recording ends, without ever being freed.

Of PFNMAP memory four faults are enough, if the count rises by exactly one with each and by nothing
between: get_user_pages() refuses such memory (VM_PFNMAP, VM_IO: check_vma_flags(), mm/gup.c) and it
is on no LRU list, so that nobody is left but KVM and the driver.

The noise that comes nearest: mark_page_accessed() at the end of a fault queues the page for
activation when it is seen a second time, and the queue holds a reference, so that many pages rise
by one with their second fault. Compound pages are left out, since their count rises with every part
that the host maps, and so is memory of a file that may outlive the VM.
May import: `analysis`, `probes.wire`, numpy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.columns import Records, code
from analysis.detector import Chunk
from analysis.detectors.common import missing_hooks, refcountable, where_of_gfn
from analysis.detectors.neverfreed import LRU_PAGES, KeptPages
from analysis.detectors.newpages import NewPages, kept_by_new_pages, pg_lru
from analysis.detectors.pagegroups import ANONYMOUS, KNOWN, Anonymous, Groups
from analysis.detectors.puts import judged_faults
from analysis.detectors.since import Since, those
from analysis.faultjoin import FaultJoin
from analysis.findings import Chain, Finding, Innocent, ranges_of
from analysis.lifearrays import LifeArrays
from analysis.pagemap import PAGES_MAX, PageMap
from analysis.recording import Recording
from analysis.text import plural
from probes.wire import PAGE_BITS

__all__ = ("Growth",)

_COMPOUND = PAGE_BITS["head"] | PAGE_BITS["tail"]
#: Faults of one page from which on a rise is more than two queues of the LRU can make.
_FAULTS_SOME = 5
#: Faults of one page from which on its growth is told …
_FAULTS_MANY = 16
#: … and from which on nobody else can have kept step by chance.
_FAULTS_SURE = 64
#: Faults of a PFNMAP page, each of which raises its count by exactly one, that accuse KVM.
_FAULTS_PFNMAP = 4
#: The part of the faults, or of the pages, that must fit.
_MOST = 0.9
#: References that a page in an LRU batch has more: a page is in one at a time.
_BATCHED = 1
#: Pages that are too old for LRU batches, from which on they are told though they are few.
_OLD_SOME = 8
#: Ends of a recording after which the VM's process is gone, and with it its memory.
_PROCESS_ENDED = ("command", "vm")
#: `state` of a page, with ANONYMOUS and KNOWN: it was zapped; `first` and `last` are of it; its
#: count once moved otherwise than with a fault; KVM had to walk a PFNMAP mapping to find it; it was
#: on no LRU list when it was zapped, so that one reference is of the batch, or of who took it off;
#: its count once fell between two faults.
_ZAPPED, _SEEN, _STRAYED, _PFNMAP, _QUEUED, _FELL = 4, 8, 16, 32, 64, 128
_HISTORY = np.uint8(_SEEN | _STRAYED | _PFNMAP | _FELL)
_GFN_MAX = (1 << 32) - 1
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
        "FAULT": ("page_flags_end",),
        "PAGE_FREE": ("pfn", "order"),
        "VM": ("vm", "op"),
        "INVALIDATE": ("op",),
        "SPTE": ("op", "pfn", "level", "refcount", "mapcount", "page_flags", "page_bits"),
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
                "gfn": np.uint32,
                "cpu": np.uint16,
            }
        )
        self._groups = Groups()
        self._gone: set[int] = set()
        self.unanswered = ""
        self._span = [1 << 63, 0]
        #: starts of invalidations since the first fault that is judged
        self._invalidated = 0

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; return "" or why no answer is possible."""
        self._recording = recording
        if recording.semantics.put == "unknown":
            return f"what generation {recording.generation or '(none)'} promises is not known"
        self._anonymous = Anonymous(recording)
        self._lru = pg_lru(recording)
        # Where a record shows each put, a missing one needs no count.
        self._new = NewPages(recording) if recording.semantics.put != "in fault" else None
        return missing_hooks(recording, "page_free")

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        self._take(chunk, None)
        vms, invalidated = chunk["VM"], chunk["INVALIDATE"]
        self._gone |= set(vms["vm"][vms["op"] == code("op", "delete")].tolist())
        starts = invalidated["ts"][invalidated["op"] == code("op", "start")]
        self._invalidated += int((starts >= self._span[0]).sum())
        again = self._feed_frees(chunk["PAGE_FREE"])
        if again is not None:
            # Pages that were freed and handed out again in this chunk begin anew.
            self._take(chunk, again)

    def _take(self, chunk: Chunk, since: Since | None) -> None:
        """Take what happened to pages; only since they were freed if `since` is given."""
        if len(chunk.faults):
            if self._new is not None and since is None:
                self._new.feed(chunk.faults.records)
            self._feed_faults(chunk.faults.records, since)
            self._feed_prefetches(chunk.faults, since)
        self._feed_zaps(chunk["SPTE"], since)

    def _feed_faults(self, faults: Records, since: Since | None) -> None:
        judged = judged_faults(faults, self._recording)
        judged &= (faults["page_bits"] & _COMPOUND) == 0
        rows = np.flatnonzero(judged & (faults["page_bits_end"] > 0))
        if not len(rows):
            return
        ts = faults["ts"]
        self._span = [min(self._span[0], int(ts[rows[0]])), max(self._span[1], int(ts[rows[-1]]))]
        at = self._pages.at(faults["pfn"][rows], add=True)
        rows, at = those(rows, at, ts, since)
        above = faults["refcount_end"][rows] - faults["mapcount_end"][rows]
        pages = self._pages
        strayed, fell = self._strayed(faults, rows, at, above)
        # Of several faults of a page numpy keeps what is assigned last, so the first comes last.
        new = np.flatnonzero((pages["state"][at] & _SEEN) == 0)[::-1]
        pages["first"][at[new]] = above[new]
        pages["last"][at] = above
        pages["ts"][at] = ts[rows]
        np.add.at(pages["gets"], at, np.uint32(1))
        known = self._anonymous.state(faults["vm"][rows], faults["hva"][rows])
        walked = faults["walk_pfn"][rows] == faults["pfn"][rows]
        known |= np.where(walked, np.uint8(_SEEN | _PFNMAP), np.uint8(_SEEN))
        pages["state"][at] = (pages["state"][at] & _HISTORY) | known
        pages["state"][strayed] |= np.uint8(_STRAYED)
        pages["state"][fell] |= np.uint8(_FELL)
        pages["group"][at] = self._groups.of(faults["vm"][rows], faults["slot"][rows])
        pages["gfn"][at] = np.minimum(faults["gfn"][rows], np.uint64(_GFN_MAX))
        pages["cpu"][at] = faults["cpu"][rows]

    def _strayed(
        self,
        faults: Records,
        rows: npt.NDArray[np.int64],
        at: npt.NDArray[np.int64],
        above: npt.NDArray[Any],
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return pages whose count did anything but rise by one since the fault before, or fell."""
        pages = self._pages
        order = np.argsort(at, kind="stable")
        page, count = at[order], above[order]
        follows = np.zeros(len(page), np.bool_)
        follows[1:] = page[1:] == page[:-1]
        before = np.where(follows, np.roll(count, 1), pages["last"][page])
        has_before = follows | ((pages["state"][page] & _SEEN) != 0)
        # KVM's own reference shows at fault-in's return already; it must still be there at the end.
        taken = (faults["refcount"] - faults["mapcount"])[rows][order]
        stray = has_before & ((count != before + 1) | (taken != count))
        return page[stray], page[has_before & (count < before)]

    def _feed_prefetches(self, join: FaultJoin, since: Since | None) -> None:
        """Count the references of prefetched pages too: KVM takes and puts one for each."""
        sptes, faults = join.sptes, join.records
        rows = sptes["cause"] == code("cause", "prefetch")
        rows = rows & (sptes["op"] == code("op", "install"))
        if not rows.any():
            return
        bits = sptes["page_bits"]
        rows = np.flatnonzero(rows & refcountable(bits) & ((bits & _COMPOUND) == 0))
        at = self._pages.at(sptes["pfn"][rows], add=True)
        rows, at = those(rows, at, sptes["ts"], since)
        pages = self._pages
        np.add.at(pages["gets"], at, np.uint32(1))
        pages["ts"][at] = sptes["ts"][rows]
        # Prefetched is what lies around the page of the fault, in the same slot.
        fault = sptes.fault[rows]
        away = (sptes["gfn"][rows] - faults["gfn"][fault]) << np.uint64(12)
        known = self._anonymous.state(faults["vm"][fault], faults["hva"][fault] + away)
        # No sample is taken of their count: from here on it may be one higher.
        pages["state"][at] = (pages["state"][at] & _HISTORY) | known | np.uint8(_STRAYED)
        pages["group"][at] = self._groups.of(faults["vm"][fault], faults["slot"][fault])
        pages["gfn"][at] = np.minimum(sptes["gfn"][rows], np.uint64(_GFN_MAX))
        pages["cpu"][at] = sptes["cpu"][rows]

    def _feed_zaps(self, sptes: Records, since: Since | None) -> None:
        zaps = (sptes["op"] == code("op", "zap")) & (sptes["level"] == 1)
        # A type in place of the map count (buddy, slab) is far below -1.
        zaps &= (sptes["page_bits"] > 0) & (sptes["mapcount"] >= -1)
        zaps &= (sptes["page_bits"] & _COMPOUND) == 0
        rows = np.flatnonzero(zaps)
        if not len(rows):
            return
        rows, at = those(rows, self._pages.at(sptes["pfn"][rows]), sptes["ts"], since)
        excess = sptes["refcount"][rows] - (sptes["mapcount"][rows] + 1)
        # Of several zaps of a page the last one stays: rows are in order of time.
        self._pages["excess"][at] = np.clip(excess, -1000, 1000)
        queued = (sptes["page_flags"][rows] & self._lru) == 0 if self._lru else False
        zapped = np.where(queued, np.uint8(_ZAPPED | _QUEUED), np.uint8(_ZAPPED))
        self._pages["state"][at] = (self._pages["state"][at] & ~np.uint8(_QUEUED)) | zapped

    def _feed_frees(self, frees: Records) -> Since | None:
        """Forget freed pages; return those that a fault got again in this chunk, if any."""
        if not len(frees) or not len(self._pages):
            return None
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
        ts, at = ts[at >= 0], at[at >= 0]
        pages = self._pages
        # What lies between two frees of a page is over, as what lies before the first.
        newest = len(at) - 1 - np.unique(at[::-1], return_index=True)[1]
        again = np.zeros(len(at), np.bool_)
        again[newest] = pages["ts"][at[newest]] > ts[newest]
        sane = (pages["gets"][at] > 0) & ((pages["state"][at] & _ZAPPED) != 0)
        self._groups.freed(pages["group"][at[sane & (pages["excess"][at] == 0)]])
        pages["gets"][at] = 0
        pages["state"][at] &= np.uint8(ANONYMOUS | KNOWN)
        return Since(at[again], ts[again]) if again.any() else None

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found."""
        pages = self._pages
        faults = pages["gets"][: len(pages)].astype(np.int64)
        rise = (pages["last"].astype(np.int64) - pages["first"])[: len(pages)]
        grown = np.where((pages["state"][: len(pages)] & _SEEN) != 0, rise, 0)
        told = (self._risen(faults, grown), self._kept(faults))
        found = [finding for finding in told if finding is not None]
        found = found or self._risen_slowly(faults, grown)
        if self._new is not None:
            new = kept_by_new_pages(self, self._recording, self._new)
            found += [one for one in new if one.is_anomaly or not found]
            self.unanswered = "" if found else self._new.unanswered
        return found

    def _risen(self, faults: npt.NDArray[np.int64], grown: npt.NDArray[np.int64]) -> Finding | None:
        """Look for counts that rise with each fault."""
        steady = (faults >= _FAULTS_SOME) & (grown >= _MOST * (faults - 1))
        many = np.flatnonzero(steady & (faults > _FAULTS_MANY))
        if len(many):
            return self._growing(many, faults, grown)
        again = np.flatnonzero(faults >= _FAULTS_SOME)
        steps, rise = int((faults[again] - 1).sum()), int(grown[again].sum())
        enough = steady.sum() > LRU_PAGES * self._recording.facts.cpus
        if enough and rise >= _MOST * steps:
            return self._growing(np.flatnonzero(steady), faults, grown)
        state = self._pages["state"][: len(self._pages)]
        often = (faults >= _FAULTS_PFNMAP) & ((state & _SEEN) != 0)
        exact = often & ((state & _STRAYED) == 0)
        pfnmap = (state & _PFNMAP) != 0
        accused = int((exact & pfnmap).sum())
        if not accused or accused < _MOST * int((often & pfnmap).sum()):
            return None
        # Other pages whose count went the same way are told with them, though LRU batches could.
        return self._growing(np.flatnonzero(exact), faults, grown, pfnmap)

    def _risen_slowly(
        self, faults: npt.NDArray[np.int64], grown: npt.NDArray[np.int64]
    ) -> list[Finding]:
        """Look for counts that rise with some of the faults and never fall: that proves nothing."""
        state = self._pages["state"][: len(self._pages)]
        slow = (faults >= _FAULTS_SURE) & (grown >= _FAULTS_MANY) & ((state & _FELL) == 0)
        return [self._growing(np.flatnonzero(slow), faults, grown)] if slow.any() else []

    def _growing(
        self,
        at: npt.NDArray[np.int64],
        faults: npt.NDArray[np.int64],
        grown: npt.NDArray[np.int64],
        pfnmap: npt.NDArray[np.bool_] | None = None,
    ) -> Finding:
        shown = at if pfnmap is None else at[pfnmap[at]]
        worst = int(shown[np.argmax(grown[shown])])
        times, rise = int(faults[worst]), int(grown[worst])
        sure = times >= _FAULTS_SURE or len(at) >= _FAULTS_SURE * self._recording.facts.cpus
        slow = pfnmap is None and rise < _MOST * (times - 1)
        more = "" if len(at) == 1 else f"; {plural(len(at) - 1, 'more page')} alike"
        frame = int(self._pages.frames(np.array([worst]))[0])
        others = f"the count rose by {rise / max(1, times - 1):.2f} with each fault"
        others = f"not ruled out: {others}, seldomer than by one" if slow else f"no: {others}"
        if pfnmap is not None:
            others = (
                "no: get_user_pages() refuses PFNMAP memory, and it is on no LRU list: only its "
                "driver is left"
            )
        told = [Innocent("somebody else took references meanwhile", others)]
        if pfnmap is not None:
            told.append(
                Innocent(
                    "the driver takes one whenever it maps the page for the host, and keeps it",
                    "unlikely: it is asked anew only after an invalidation, of which there "
                    f"{'was' if self._invalidated == 1 else 'were'} {self._invalidated:,} since "
                    "the first fault",
                )
            )
        told.append(
            Innocent("more processes mapped the page", "no: what maps it (_mapcount) is taken off")
        )
        return self._finding(
            at,
            "inconclusive" if slow else "definite" if sure else "probable",
            f"the count of pfn {frame:#x} rose by {rise:,} in {times:,} faults, one with each, and "
            f"never fell{more}"
            if rise == times - 1
            else f"the count of pfn {frame:#x} rose by {rise:,} in {times:,} faults and never "
            f"fell{more}",
            _RULE_GROWS,
            worst,
            # The first fault kept one too.
            int(np.minimum(grown[at] + 1, faults[at]).sum()),
            told,
            {"shape": "rises", "faults": times, "rise": rise},
            self._recording.semantics.put_function,
        )

    def _kept(self, faults: npt.NDArray[np.int64]) -> Finding | None:
        """Look for pages let go but never freed, held by as many as there were faults."""
        state = self._pages["state"][: len(self._pages)]
        group = self._pages["group"][: len(self._pages)]
        excess = self._pages["excess"][: len(self._pages)].astype(np.int64)
        queued = (state & _QUEUED) != 0
        held = excess - queued
        left = (faults > 0) & ((state & _ZAPPED) != 0) & ~(queued & (held == 0))
        # Memory of a file is held by its page cache; where nothing is known it may be a file's.
        left &= (state & (ANONYMOUS | KNOWN)) != KNOWN
        left &= self._groups.of_vms(self._gone)[group]
        fits = left & (held == faults)
        bound = LRU_PAGES * self._recording.facts.cpus
        old = 0
        batched = self._batched(left & ~queued, faults)
        if fits.sum() <= bound or (fits | batched).sum() < _MOST * left.sum():
            old = self._old(fits)
            if old < _OLD_SOME:
                return None
        at = np.flatnonzero(fits | batched)
        several = (faults[at] > 1).sum() > bound
        kept = KeptPages(
            pages=len(at),
            cpus=self._recording.facts.cpus,
            batched=int((batched | (fits & queued)).sum()),
            old=old,
            anonymous=((state[at] & ANONYMOUS) != 0).mean() >= _MOST,
            several=bool(several),
            ended=self._recording.ended_by in _PROCESS_ENDED,
            alike=self._groups.with_freed(group[at]).mean() >= _MOST,
            lost=self._recording.lost("PAGE_FREE", "SPTE"),
        )
        # Of these KVM took no other reference than that of the prefetch.
        prefetched = ((state[at] & _SEEN) == 0).mean() >= _MOST
        semantics = self._recording.semantics
        return self._finding(
            at,
            kept.verdict,
            f"{len(at):,} {'prefetched ' if prefetched else ''}pages were let go but never freed, "
            "each held by as many references as KVM took to it",
            _RULE_KEPT,
            # The evidence is of a page of which nothing is left to explain.
            int(at[np.argmax(np.where(fits[at], faults[at], 0))]),
            int(faults[at].sum()),
            kept.innocent,
            {
                "shape": "never freed",
                "let go": int(left.sum()),
                "one more": kept.batched,
                "old": old,
            },
            semantics.prefetch_function if prefetched else semantics.put_function,
        )

    def _batched(
        self, left: npt.NDArray[np.bool_], faults: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Tell which pages have one reference more: some are in LRU batches too."""
        excess = self._pages["excess"][: len(self._pages)].astype(np.int64)
        batched = left & (excess == faults + _BATCHED)
        # There is not room for more; and they alone would prove nothing.
        room = LRU_PAGES * self._recording.facts.cpus
        return batched if batched.sum() <= room else np.zeros(len(batched), np.bool_)

    def _old(self, fits: npt.NDArray[np.bool_]) -> int:
        """Count the pages that no LRU batch can hold any more, of those whose put has no record.

        A cpu's batch is drained when it is full, so a page that was followed on its cpu by more
        new pages than the batches have room for, all of them freed since, is in none.
        """
        pages = self._pages
        if self._recording.semantics.put == "in fault":
            fits = fits & ((pages["state"][: len(pages)] & _SEEN) == 0)
        if fits.sum() < _OLD_SOME:
            return 0
        ts, cpu = pages["ts"][: len(pages)], pages["cpu"][: len(pages)]
        freed = (pages["gets"][: len(pages)] == 0) & (ts > 0)
        at = np.flatnonzero(fits | freed)
        at = at[np.lexsort([ts[at], cpu[at]])]
        after = np.cumsum(freed[at][::-1])[::-1]
        # Off with those of the cpus that follow.
        last = np.searchsorted(cpu[at], cpu[at], "right")
        after = after - np.append(after, 0)[last]
        return int((fits[at] & (after >= LRU_PAGES)).sum())

    def _finding(
        self,
        at: npt.NDArray[np.int64],
        verdict: str,
        title: str,
        rule: str,
        shown: int,
        count: int,
        innocent: Sequence[Innocent],
        detail: Mapping[str, Any],
        function: str,
    ) -> Finding:
        pages = self._pages
        pfns, more = ranges_of(pages.frames(at))
        guest = pages["gfn"][at]
        gfns, more_gfns = ranges_of(guest[guest < _GFN_MAX])
        vm = self._groups.vms(pages["group"][[shown]])
        frame = int(pages.frames(np.array([shown]))[0])
        told = list(innocent)
        if pages.refused:
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
            vms=self._groups.vms(pages["group"][at]),
            slots=self._groups.slots(pages["group"][at]),
            gfns=gfns,
            pfns=pfns,
            more=more or more_gfns,
            first_ts=self._span[0],
            last_ts=self._span[1],
            where=where_of_gfn(self._recording, vm[0] if vm else 0, int(pages["gfn"][shown])),
            functions=(function,),
            innocent=tuple(told),
            chain=Chain(records=(), pfns=(frame,), ts_from=self._span[0]),
            detail=dict(detail),
        )
