"""Struct pages that KVM touches though nobody, or not KVM any more, holds them.

May import: `analysis`, `probes.wire`, numpy.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from analysis.columns import code
from analysis.detector import Chunk
from analysis.detectors.common import (
    Occurrences,
    function_of,
    is_mark,
    missing_hooks,
    refcountable,
    surely_before,
)
from analysis.detectors.puts import own_puts, prefetched_own, untold
from analysis.faultjoin import FaultJoin
from analysis.findings import Finding, Innocent
from analysis.lifearrays import LifeArrays
from analysis.recording import Recording
from analysis.semantics import MARK_CALLS
from analysis.text import plural
from probes.wire import CALLS

__all__ = ("DeadMark",)

_PRESENT = 1 << 11  # SPTE_MMU_PRESENT_MASK, arch/x86/kvm/mmu/spte.h
_NEVER_COUNTED = Innocent(
    "the page was never counted by anybody, as memory of a driver",
    "no: KVM asks struct page itself, and touches it either way",
)


class DeadMark:
    """Detector 7: a page is marked accessed or dirty while its reference count is 0.

    This is the assertion that the series "KVM: allow mapping non-refcounted pages" adds to
    kvm_is_ad_tracked_page(), asked from outside and of kernels that do not have it.
    """

    name = "dead-mark"
    title = "pages marked accessed or dirty while their reference count is 0"
    rule = (
        "KVM marks a page accessed or dirty only while somebody holds it: "
        "WARN_ON_ONCE(!page_count(page)) in kvm_is_ad_tracked_page(), first patch of the series "
        "'KVM: allow mapping non-refcounted pages'. With count 0 the page was freed under KVM's "
        "SPTE, or never was counted."
    )
    columns: Mapping[str, Sequence[str]] = {
        "RELEASE": ("vm", "gfn", "pfn", "call", "refcount", "page_bits", "fault_ts", "tid"),
        "SPTE": ("vm", "gfn", "pfn", "op", "old", "refcount", "page_bits", "fault_ts", "tid"),
    }
    wants_lives = False
    joins_faults = True

    def __init__(self) -> None:
        self._marked = Occurrences()
        self._late = Occurrences()
        #: the same of faults whose installs were lost: what they put may have been prefetched
        self._late_untold = Occurrences()
        self._zapped = Occurrences()
        #: numbers of the calls that marked.
        self._calls: dict[str, set[int]] = {"marked": set(), "late": set()}

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; return "" or why no answer is possible."""
        self._recording = recording
        semantics = recording.semantics
        if semantics.generation in ("G0a", "G0b"):
            return missing_hooks(recording, "mark_pfn_accessed", "mark_pfn_dirty")
        if semantics.generation == "G1":
            self._bit = np.uint64(semantics.spte_bit)
            return "" if semantics.spte_bit else "no SPTE of this kernel says whom it counts"
        if semantics.generation == "G2":
            return ""
        return f"what generation {recording.generation or '(none)'} marks when is not known"

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        releases = chunk["RELEASE"]
        dead = (releases["refcount"] <= 0) & is_mark(releases["call"])
        if dead.any():
            dead &= refcountable(releases["page_bits"])
            self._marked.add(releases, np.flatnonzero(dead), faults=True)
            self._calls["marked"] |= set(releases["call"][dead].tolist())
        self._feed_faults(chunk.faults)
        if self._recording.semantics.generation != "G1":
            return
        # The series marks at the zap, where nothing shows it: the SPTE says that it will.
        sptes = chunk["SPTE"]
        wanted = self._bit | np.uint64(_PRESENT)
        dead = (sptes["refcount"] <= 0) & (sptes["op"] == code("op", "zap"))
        dead &= (sptes["old"] & wanted) == wanted
        if dead.any():
            dead &= refcountable(sptes["page_bits"])
            self._zapped.add(sptes, np.flatnonzero(dead), faults=True)

    def _feed_faults(self, join: FaultJoin) -> None:
        """Find marks of a page after the fault that makes them has put it."""
        releases, faults = join.releases, join.records
        marks = is_mark(releases["call"])
        if not marks.any():
            return
        own, _ = own_puts(join)
        put = np.flatnonzero(own)
        if not len(put):
            return
        # The first put of each fault: rows are in order of time.
        which, first = np.unique(releases.fault[put], return_index=True)
        put_of = np.full(len(faults), -1)
        put_of[which] = put[first]
        late = marks & (releases["pfn"] == faults["pfn"][releases.fault])
        rows = np.flatnonzero(late & (put_of[releases.fault] >= 0))
        names = ("ts", "cpu", "seq")
        before = put_of[releases.fault[rows]]
        rows = rows[surely_before([releases[name][before] for name in names],
                                  [releases[name][rows] for name in names])]  # fmt: skip
        if len(rows):
            rows = rows[(prefetched_own(join) == 0)[releases.fault[rows]]]
        if not len(rows):
            return
        self._calls["late"] |= set(releases["call"][rows].tolist())
        dark = untold(join)[releases.fault[rows]]
        for found, mine in ((self._late, rows[~dark]), (self._late_untold, rows[dark])):
            if len(mine):
                more = [releases.key(int(mine[0]))]
                found.add(faults, np.unique(releases.fault[mine]), faults=True, more=more)

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found."""
        found = []
        if self._marked:
            found.append(self._at_zero())
        found += [self._after_put(one) for one in (self._late, self._late_untold) if one]
        if self._zapped:
            found.append(self._at_zap())
        return found

    def _at_zero(self) -> Finding:
        return self._marked.finding(
            self,
            self._recording,
            "definite",
            f"KVM marked {plural(self._marked.pages, 'page')} accessed or dirty at count 0",
            functions=self._functions(self._calls["marked"]),
            innocent=(_NEVER_COUNTED,),
            detail={"shape": "marked at count 0"},
        )

    def _after_put(self, seen: Occurrences) -> Finding:
        dark = seen is self._late_untold
        return seen.finding(
            self,
            self._recording,
            "inconclusive" if dark else "definite",
            f"{plural(seen.count, 'fault')} marked a page accessed or dirty after putting "
            "it, when it may be another's",
            functions=self._functions(self._calls["late"]),
            rule="A fault touches struct page only while it holds a reference to it, or under "
            "mmu_lock while its SPTE maps it; both are over when it has put the page "
            "(arch/x86/kvm/mmu/mmu.c, the ends of the page fault handlers).",
            innocent=(
                Innocent(
                    "an SPTE was zapped meanwhile, which marks its page too",
                    "no: the fault's own thread did it, in the fault",
                ),
                Innocent(
                    "what was put is a page that was prefetched around the fault",
                    "not ruled out: the faults count more leaves than SPTE records show of them"
                    if dark
                    else "no: all leaves that the faults count are in the trace",
                ),
            ),
            detail={"shape": "marked after put"},
        )

    def _at_zap(self) -> Finding:
        return self._zapped.finding(
            self,
            self._recording,
            "definite",
            f"SPTEs of {plural(self._zapped.pages, 'page')} that KVM takes for refcounted were "
            "zapped at count 0",
            functions=self._functions({CALLS.index(call) for call in MARK_CALLS}),
            innocent=(_NEVER_COUNTED,),
            detail={"shape": "zapped at count 0"},
        )

    def _functions(self, calls: Collection[int]) -> list[str]:
        """Return the functions of this kernel that some RELEASE calls are."""
        names = (function_of(self._recording, CALLS[call]) for call in sorted(calls))
        return [name for name in names if name]
