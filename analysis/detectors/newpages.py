"""New anonymous pages that a fault leaves with one reference more than anybody holds.

Where a version of the series puts the page before fault-in returns, no record shows the put, and a
count proves little: get_user_pages() of others, swap, mlock() hold references too. Of a page that
was handed out a moment ago all holders are known: it is in a per-cpu LRU batch yet (PG_lru is
clear), which holds one (lru_cache_add(), mm/swap.c), each mapping of the host holds one
(_mapcount), and nobody has met it before. What mlock() (PG_mlocked: mlock_new_folio() has a batch
of its own, mm/mlock.c) or swap (PG_swapcache) may hold is not judged. In the lab's recordings of
all versions such a page has exactly these references after a fault, if no reference is kept.
May import: `analysis`, numpy.
"""

import dataclasses
from typing import Any

import numpy as np

from analysis.columns import Records, code
from analysis.detectors.common import Occurrences
from analysis.detectors.pagegroups import ANONYMOUS, KNOWN, Anonymous
from analysis.detectors.puts import judged_faults
from analysis.findings import Finding, Innocent
from analysis.recording import Recording
from analysis.text import plural
from probes.wire import PAGE_BITS

__all__ = ("NewPages", "Share", "kept_by_new_pages", "pg_lru")

_PLAIN = PAGE_BITS["has_struct"]
_MMU = {"tdp": "TDP", "shadow": "shadow"}
_RULE = (
    "KVM holds no reference to a page when no fault is at work on it: this version of the series "
    "gives it back before fault-in returns (kvm_follow_refcounted_pfn(), hva_to_pfn_*(), "
    "virt/kvm/kvm_main.c)."
)
#: Bits of page->flags.
_FLAGS = 64
#: New pages that must have one reference more, and the part of them, for "probable" …
_SOME, _MOST = 16, 0.9
#: … and for "definite".
_MANY, _ALL = 64, 0.99


@dataclasses.dataclass(slots=True)
class Share:
    """Faults of new pages of one MMU: `kept` of `judged` left a reference that nobody holds.

    `alike` are these and those of older pages, on an LRU list, that were left with one more, too.
    """

    judged: int
    kept: Occurrences
    alike: Occurrences

    @property
    def verdict(self) -> str:
        """Return what this proves: "definite", "probable", "inconclusive" or "" for nothing."""
        count, pages = self.kept.count, self.kept.pages
        if pages >= _MANY and count >= _ALL * self.judged:
            return "definite"
        if pages < _SOME:
            return ""
        return "probable" if count >= _MOST * self.judged else "inconclusive"


def pg_lru(recording: Recording) -> np.uint64:
    """Return the bit of page->flags of a page on an LRU list; 0 if the trace does not say."""
    bit = recording.facts.enums.get("PG_lru", -1)
    return np.uint64(1 << bit if 0 <= bit < _FLAGS else 0)


class NewPages:
    """Looks at new pages after faults; `shares` are of the two MMUs, by their names."""

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._anonymous = Anonymous(recording)
        bits = {k: v for k, v in recording.facts.enums.items() if 0 <= v < _FLAGS}
        self._lru = pg_lru(recording)
        unclear = (1 << bits[name] for name in ("PG_mlocked", "PG_swapcache") if name in bits)
        self._unclear = np.uint64(sum(unclear))
        self.shares = {name: Share(0, Occurrences(), Occurrences()) for name in ("tdp", "shadow")}
        self._faults = 0

    @property
    def unanswered(self) -> str:
        """Return why nothing is known of what faults keep, "" if something is."""
        if not self._faults or any(share.judged for share in self.shares.values()):
            return ""
        if not self._lru:
            return (
                "no record shows the put of this version of the series, and the trace does not say "
                "which bit PG_lru is: record again with this pfntrace"
            )
        return (
            "no record shows the put of this version of the series, and none of "
            f"{plural(self._faults, 'fault')} was of a new page of anonymous memory, which tells "
            "(or what memory it is could not be read)"
        )

    def feed(self, faults: Records) -> None:
        """Take the faults of the next span of time."""
        new = judged_faults(faults, self._recording)
        self._faults += int(new.sum())
        if not self._lru:
            return
        flags = faults["page_flags_end"]
        plain = new & (faults["page_bits"] == _PLAIN) & (faults["page_bits_end"] == _PLAIN)
        plain &= ((flags & self._unclear) == 0) & (faults["mapcount_end"] >= 0)
        if not plain.any():
            return
        # Each mapping, which _mapcount counts from -1, and the LRU batch.
        new = plain & ((flags & self._lru) == 0)
        more = faults["refcount_end"] > faults["mapcount_end"] + np.where(new, 2, 1)
        # Where the recorder came too late to read what memory it is, it may be a file's, which its
        # page cache holds too: nobody is accused, but a page that nobody holds is a sound one.
        memory = self._anonymous.state(faults["vm"], faults["hva"])
        plain &= ((memory & ANONYMOUS) != 0) | (((memory & KNOWN) == 0) & ~more)
        new &= plain
        for name, share in self.shares.items():
            mine = faults["mmu"] == code("mmu", name)
            share.judged += int((new & mine).sum())
            share.kept.add(faults, np.flatnonzero(new & more & mine), faults=True)
            share.alike.add(faults, np.flatnonzero(plain & more & mine), faults=True)


def kept_by_new_pages(detector: Any, recording: Recording, new: NewPages) -> list[Finding]:
    """Return what new pages tell of the references that faults of each MMU keep."""
    return [
        _finding(detector, recording, f"faults of the {_MMU[name]} MMU", share)
        for name, share in new.shares.items()
        if share.verdict
    ]


def _finding(detector: Any, recording: Recording, whose: str, share: Share) -> Finding:
    count, judged = share.kept.count, share.judged
    who = f"all {whose} leave" if count == judged else f"most {whose} leave"
    others = f"no: {count:,} of {judged:,} faults left them so"
    if share.verdict == "inconclusive":
        who = f"{count:,} of {judged:,} {whose} left"
        others = "not ruled out: only some faults left them so"
    seen = share.kept if share.verdict == "inconclusive" else share.alike
    older = seen.pages - share.kept.pages
    return seen.finding(
        detector,
        recording,
        share.verdict,
        f"{who} new pages with one reference more than anybody holds: "
        f"{plural(share.kept.pages, 'page')}" + (f", and {older:,} older ones" if older else ""),
        rule=_RULE,
        functions=("kvm_faultin_pfn",),
        innocent=(
            Innocent("get_user_pages() of others held them at that moment", others),
            Innocent(
                "somebody holds them for long",
                "no: they were handed out a moment ago (PG_lru is clear), what maps them and the "
                "LRU batch that they are in are taken off, mlock() and swap have not met them",
            ),
        ),
        detail={"shape": "new pages", "judged": judged, "kept": count},
    )
