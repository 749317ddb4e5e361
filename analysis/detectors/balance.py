"""References that a fault takes and gives back, against what the generation promises.

Judged by RELEASE records, not by counts: a count sampled once is noisy (per-cpu LRU batches hold a
reference of their own, get_user_pages() of others too), but a call that did not happen leaves no
record. Faults are judged whose page was seen and is one that KVM counts.

A put that shows as two records, the outer function and the one it calls, is one put: the recorder
takes the inner one out by its unchanged count, and misses that if somebody else dropped a reference
between the two. So a second record is a second put only if it cannot be that inner call.
May import: `analysis`, `probes.wire`, numpy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.columns import Records, code
from analysis.detector import Chunk
from analysis.detectors.common import (
    Occurrences,
    function_of,
    is_put,
    loss_verdict,
    missing_hooks,
    refcountable,
)
from analysis.detectors.puts import (
    called_twice,
    fell,
    fewer_than_mapped,
    judged_faults,
    only_strangers,
    own_puts,
    page_of_fault,
    prefetched_own,
    untold,
)
from analysis.faultjoin import FaultJoin
from analysis.findings import Finding, Innocent
from analysis.lifearrays import LifeArrays
from analysis.recording import Recording
from analysis.text import plural
from probes.wire import CALLS

__all__ = ("Balance",)

_RULE = (
    "KVM holds a reference to a page only while the fault lasts that took it: {put}() gives it "
    "back once ({where})."
)
_WHERE = {
    "in fault": "arch/x86/kvm/mmu/mmu.c, at the end of each fault that got a page",
    "at fault-in": "virt/kvm/kvm_main.c, before fault-in returns in this version of the series",
    "either": "where depends on the version of the series",
}
#: More than this part of a group is "every".
_EVERY = 0.99
#: Kinds of faults that a leak can be confined to, most particular first.
_GROUPS = {
    "retry": "every fault that was retried",
    "huge": "every fault of a large page",
    "pfnmap": "every fault in PFNMAP memory",
    "prefetch": "every prefetch",
    "shadow": "every fault of the shadow MMU",
    "tdp": "every fault of the TDP MMU",
    "write": "every fault that could map its page writable",
}
_OTHERS = Innocent(
    "somebody else holds or drops references to the pages",
    "no: not a count decides but the record of KVM's own call",
)


class Balance:
    """Detector 4: what a fault gives back differs from what it took."""

    name = "balance"
    title = "references that a fault takes and does not give back, or gives back twice"
    rule = ""
    columns: Mapping[str, Sequence[str]] = {
        "RELEASE": ("vm", "gfn", "pfn", "call", "refcount", "mapcount", "page_bits", "fault_ts")
    }
    wants_lives = False
    joins_faults = True

    def __init__(self) -> None:
        self._kept = Occurrences()
        self._given = Occurrences()
        self._twice = Occurrences()
        #: the same of faults whose installs were lost: what they put may have been prefetched
        self._given_untold = Occurrences()
        self._twice_untold = Occurrences()
        self._below = Occurrences()
        self._alone = Occurrences()
        self._short = Occurrences()
        self._prefetched = Occurrences()
        self._prefetches = 0
        #: the call by which a fault first gave something back that it did not hold
        self._put = ""
        self._judged = dict.fromkeys(("all", *_GROUPS), 0)
        self._absent = dict.fromkeys(("all", *_GROUPS), 0)
        self._fell = 0

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; return "" or why no answer is possible."""
        self._recording = recording
        semantics = recording.semantics
        if semantics.put == "unknown":
            return f"what generation {recording.generation or '(none)'} promises is not known"
        where = _WHERE[semantics.put]
        self.rule = _RULE.format(put=semantics.put_function, where=where)
        self._groups = {
            "retry": recording.ret("retry"),
            "shadow": code("mmu", "shadow"),
            "tdp": code("mmu", "tdp"),
        }
        return missing_hooks(recording, *semantics.put_hooks)

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        join = chunk.faults
        faults, count = join.records, len(join)
        self._puts_below(chunk["RELEASE"])
        if not count:
            return
        judged = judged_faults(faults, self._recording)
        own, other = own_puts(join)
        puts = join.releases.per_fault(own, count)
        # Those that put another page instead are `wrong-folio`'s.
        astray = (puts == 0) & (join.releases.per_fault(other, count) > 0)
        astray &= only_strangers(join, other)
        absent = judged & (puts == 0) & ~astray
        given = judged & (puts > 0)
        if given.any():
            given &= puts > prefetched_own(join)
        self._count(faults, judged & ~astray, absent)
        semantics = self._recording.semantics
        if semantics.put != "at fault-in":
            self._kept.add(faults, np.flatnonzero(absent), faults=True)
            self._fell += int((absent & fell(faults)).sum())
            if (puts[judged] > 1).any():
                twice, dark = judged & called_twice(join, own), untold(join)
                self._twice.add(faults, np.flatnonzero(twice & ~dark), faults=True)
                self._twice_untold.add(faults, np.flatnonzero(twice & dark), faults=True)
        if semantics.put != "in fault" and given.any():
            if not self._put:
                at = np.flatnonzero(own & given[join.releases.fault])[0]
                self._put = CALLS[join.releases["call"][at]]
            dark = untold(join)
            self._given.add(faults, np.flatnonzero(given & ~dark), faults=True)
            self._given_untold.add(faults, np.flatnonzero(given & dark), faults=True)
        if semantics.prefetch_puts:
            self._feed_prefetches(join, other)
        short = judged & (puts > 0) & fewer_than_mapped(faults)
        self._short.add(faults, np.flatnonzero(short), faults=True)
        alone = given & (faults["refcount"] == 1)
        if alone.any():
            alone &= (faults["mmu_seq"] == faults["invalidate_seq"]) & (faults["in_progress"] == 0)
            self._alone.add(faults, np.flatnonzero(alone), faults=True)

    def _puts_below(self, releases: Records) -> None:
        bad = (releases["refcount"] <= 0) & is_put(releases["call"])
        if bad.any():
            bad &= refcountable(releases["page_bits"])
            self._below.add(releases, np.flatnonzero(bad), faults=True)

    def _feed_prefetches(self, join: FaultJoin, other: npt.NDArray[np.bool_]) -> None:
        """Find pages that were prefetched around a fault and not put in it."""
        sptes, releases = join.sptes, join.releases
        rows = sptes["cause"] == code("cause", "prefetch")
        rows = np.flatnonzero(rows & (sptes["op"] == code("op", "install")))
        if not len(rows):
            return
        rows = rows[refcountable(sptes["page_bits"][rows])]
        self._prefetches += len(rows)
        put = page_of_fault(releases.fault[other], releases["pfn"][other])
        absent = rows[~np.isin(page_of_fault(sptes.fault[rows], sptes["pfn"][rows]), put)]
        if len(absent):
            self._prefetched.add(
                join.records,
                sptes.fault[absent],
                pfns=sptes["pfn"][absent],
                faults=True,
                more=[sptes.key(int(absent[0]))],
            )

    def _count(
        self, faults: Records, judged: npt.NDArray[np.bool_], absent: npt.NDArray[np.bool_]
    ) -> None:
        """Add up by group which faults gave nothing back."""
        self._judged["all"] += int(judged.sum())
        self._absent["all"] += int(absent.sum())
        for name in _GROUPS:
            group = judged & self._is(name, faults)
            self._judged[name] += int(group.sum())
            self._absent[name] += int((group & absent).sum())

    def _is(self, name: str, faults: Records) -> Any:
        if name == "retry":
            return faults["ret"] == self._groups["retry"]
        if name == "huge":
            return faults["level"] > 1
        if name == "pfnmap":
            return faults["walk_pfn"] == faults["pfn"]
        if name == "prefetch":
            return faults["prefetch"]
        if name == "write":
            return faults["writable"]
        return faults["mmu"] == self._groups[name]

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found."""
        found = []
        semantics = self._recording.semantics
        # Of a version that cannot be told beforehand the majority of pages tells: not of faults,
        # which may be of a single page, the zero page.
        given = [one for one in (self._given, self._given_untold) if one]
        most = sum(one.pages for one in given) > self._kept.pages
        puts_in_fault = semantics.put == "in fault" or (semantics.put == "either" and most)
        if self._kept and puts_in_fault:
            found.append(self._leak())
        if self._kept and semantics.put == "either" and not given:
            found.append(self._undecided())
        if not puts_in_fault:
            found += [self._extra(one) for one in given]
        else:
            found += [self._double(one) for one in (self._twice, self._twice_untold) if one]
        if self._prefetched:
            found.append(self._prefetch_leak())
        if self._below:
            found.append(self._underflow())
        if self._short and puts_in_fault:
            found.append(self._too_few())
        if self._alone and puts_in_fault:
            found.append(self._resurrected())
        return found

    def _leak(self) -> Finding:
        count = self._kept.count
        verdict, loss = loss_verdict("definite", self._recording, count, "RELEASE")
        unseen = Innocent(
            "the compiler put the function inline, where no hook sees it",
            f"no: the page's count did not fall in {count - self._fell:,} of {count:,} faults",
        )
        if 2 * self._fell > count:
            verdict = "inconclusive"
            unseen = Innocent(
                unseen.explanation,
                f"not ruled out: the page's count fell in {self._fell:,} of {count:,} faults",
            )
        pages = self._kept.pages
        return self._kept.finding(
            self,
            self._recording,
            verdict,
            f"{self._who()} keeps one reference: {plural(pages, 'page')}",
            functions=("kvm_faultin_pfn", self._recording.semantics.put_function),
            innocent=(loss, unseen, _OTHERS),
            detail={
                "shape": "leak",
                "judged": dict(self._judged),
                "kept": dict(self._absent),
                "fell": self._fell,
            },
        )

    def _undecided(self) -> Finding:
        faults = plural(self._kept.count, "fault")
        return self._kept.finding(
            self,
            self._recording,
            "inconclusive",
            f"no fault put its page: {plural(self._kept.pages, 'page')}",
            functions=("kvm_faultin_pfn", self._recording.semantics.put_function),
            innocent=(
                Innocent(
                    "this version of the series puts the page before fault-in returns",
                    f"not ruled out: its structures do not say, and none of {faults} shows a put",
                ),
            ),
            detail={
                "shape": "undecided",
                "judged": dict(self._judged),
                "kept": dict(self._absent),
            },
        )

    def _who(self) -> str:
        absent, judged = self._absent, self._judged
        if absent["all"] >= _EVERY * judged["all"] and judged["all"] > 1:
            alike = ", all of large pages," if judged["huge"] == judged["all"] else ""
            return f"every fault on this kernel{alike}"
        for name, words in _GROUPS.items():
            inside = absent[name] >= _EVERY * absent["all"] and absent[name] > 0
            if inside and absent[name] >= _EVERY * judged[name]:
                return words
        return (
            f"1 of {judged['all']:,} faults"
            if absent["all"] == 1
            else (f"each of {absent['all']:,} faults (of {judged['all']:,})")
        )

    def _told(self, seen: Occurrences) -> tuple[str, Innocent]:
        """Return the verdict on puts of prefetched pages, and what it makes of that innocent."""
        explanation = (
            "a page that was prefetched around the fault was put, a tail of the same folio"
        )
        if seen is self._twice_untold or seen is self._given_untold:
            return "inconclusive", Innocent(
                explanation,
                "not ruled out: the faults count more leaves than SPTE records show of them",
            )
        return "definite", Innocent(
            explanation, "no: all leaves that the faults count are in the trace"
        )

    def _extra(self, seen: Occurrences) -> Finding:
        # In a kernel whose faults hold nothing any more when fault-in has returned.
        dropped = "KVM put a page in a fault that held no reference to it"
        known = self._recording.semantics.put == "at fault-in"
        # Else the faults that put nothing must tell, and their records may be lost.
        verdict, prefetched = self._told(seen)
        loss = None
        if not known and verdict == "definite":
            absent = self._absent["all"]
            verdict, loss = loss_verdict("probable", self._recording, absent, "RELEASE")
        return seen.finding(
            self,
            self._recording,
            verdict,
            f"{dropped}, but others do: {plural(seen.pages, 'page')}",
            functions=("kvm_faultin_pfn", *({function_of(self._recording, self._put)} - {""})),
            innocent=(
                Innocent(
                    "this version of the series puts the page at the end of the fault",
                    "no: the kernel's own structures are of one that puts it before"
                    if known
                    else f"no: {self._absent['all']:,} other faults put nothing",
                ),
                loss,
                prefetched,
            ),
            detail={
                "shape": "put without a get",
                "judged": self._judged["all"],
                "put": seen.count,
            },
        )

    def _double(self, seen: Occurrences) -> Finding:
        verdict, prefetched = self._told(seen)
        return seen.finding(
            self,
            self._recording,
            verdict,
            "KVM put the same page twice in one fault, a reference that others own: "
            f"{plural(seen.pages, 'page')}",
            functions=(self._recording.semantics.put_function,),
            detail={"shape": "double put"},
            innocent=(
                Innocent(
                    "one call shows twice, as the function and one that it calls",
                    "no: calls made inside another are left out, and one put too many remains",
                ),
                prefetched,
            ),
        )

    def _underflow(self) -> Finding:
        below = str(self._below.first.get("call") or "")
        return self._below.finding(
            self,
            self._recording,
            "definite",
            f"KVM put {plural(self._below.pages, 'page')} whose reference count was 0 already",
            functions=tuple({function_of(self._recording, below)} - {""}),
            detail={"shape": "put at count 0"},
            rule="put_page() on a page with count 0 frees it a second time (include/linux/mm.h: "
            "put_page_testzero() has VM_BUG_ON_PAGE(page_ref_count(page) == 0)).",
            innocent=(
                Innocent(
                    "the page is reserved or has no struct page, where a put does nothing",
                    "no: the record says what the page was",
                ),
            ),
        )

    def _prefetch_leak(self) -> Finding:
        count = self._prefetched.count
        verdict, loss = loss_verdict("definite", self._recording, count, "RELEASE")
        who = f"each of {count:,} prefetched pages (of {self._prefetches:,})"
        if count >= _EVERY * self._prefetches:
            who = "every prefetched page on this kernel"
        return self._prefetched.finding(
            self,
            self._recording,
            verdict,
            f"{who} keeps one reference: {plural(self._prefetched.pages, 'page')}",
            functions=("kvm_mmu_prefetch_sptes", "kvm_release_page_dirty"),
            innocent=(loss, _OTHERS),
            detail={"shape": "prefetch leak", "judged": self._prefetches, "kept": count},
        )

    def _too_few(self) -> Finding:
        return self._short.finding(
            self,
            self._recording,
            "definite" if self._short.count > 1 else "probable",
            "KVM's put left fewer references than there are mappings on "
            f"{plural(self._short.pages, 'page')}",
            functions=(self._recording.semantics.put_function,),
            detail={"shape": "fewer than mapped"},
            rule="Each mapping of a page by the host holds a reference: the count is above "
            "_mapcount at every moment (mm/rmap.c; folio_remove_rmap_ptes() comes before the put).",
            innocent=(
                Innocent(
                    "a mapping was made just between the two looks at the page",
                    "no: seen more than once" if self._short.count > 1 else "not ruled out",
                ),
            ),
        )

    def _resurrected(self) -> Finding:
        walked = self._alone.first.get("walk_pfn") is not None
        return self._alone.finding(
            self,
            self._recording,
            "definite" if walked else "probable",
            "KVM raised the count of pages that nobody holds from 0 to 1, and its put frees them: "
            f"{plural(self._alone.pages, 'page')}",
            functions=("hva_to_pfn", self._recording.semantics.put_function),
            detail={"shape": "resurrected"},
            rule="A page whose count is 0 must not be given a reference, putting it would free "
            'memory of its owner: Linux f8be156be163 ("KVM: do not allow mapping valid but '
            'non-reference-counted pages") (v5.13), CVE-2021-22543.',
            innocent=(
                Innocent(
                    "the host unmapped the page meanwhile, so KVM's reference is the last one",
                    "no: mmu_invalidate_seq is the same before and after, and no invalidation is "
                    "in progress",
                ),
            ),
        )
