"""What the kernel says about a page's counting, against what the page and the other record say.

May import: `analysis`, `probes.wire`, numpy.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from analysis.columns import Records, code
from analysis.detector import Chunk
from analysis.detectors.common import FRAMES, NEVER, Occurrences, refcountable
from analysis.faultjoin import FaultJoin
from analysis.findings import Finding, Innocent
from analysis.lifearrays import LifeArrays
from analysis.recording import Recording
from analysis.text import plural

__all__ = ("RefcountedFlag",)

_PRESENT = 1 << 11  # SPTE_MMU_PRESENT_MASK, arch/x86/kvm/mmu/spte.h
_TITLES = {
    "uncounted": "KVM says that it holds a reference to pages whose count is 0",
    "walked": "KVM says that it holds a reference to PFNMAP pages, to which it takes none",
    "counted": "KVM says that it holds no reference to pages that get_user_pages() gave it",
    "bit set": "SPTEs say that KVM counts pages whose count is 0 or that have no struct page",
    "bit clear": "SPTEs do not say that KVM counts their pages, but the fault that made them did",
    "bit wrong": "SPTEs say that KVM counts their pages, but the fault that made them said no",
}
_RULES = {
    "uncounted": "kvm_page_fault.refcounted_page is what get_user_pages() returned with a "
    "reference (virt/kvm/kvm_main.c, kvm_resolve_pfn()).",
    "walked": 'hva_to_pfn_remapped() takes no reference: Linux 8dd861cc07e2 ("KVM: x86/mmu: Put '
    'refcounted pages instead of blindly releasing pfns").',
    "counted": "What get_user_pages() returned is in kvm_page_fault.refcounted_page until it is "
    "put; without that it is never put (virt/kvm/kvm_main.c, kvm_resolve_pfn()).",
    "bit set": "SPTE_MMU_PAGE_REFCOUNTED may only be set for pages that KVM got with a reference, "
    "else zapping the SPTE touches a struct page that others own (series v7 to v11, make_spte()).",
    "bit clear": "SPTE_MMU_PAGE_REFCOUNTED must be set for every page that KVM got with a "
    "reference, of all levels, else accessed and dirty are lost (series v7 to v11, make_spte()).",
    "bit wrong": "SPTE_MMU_PAGE_REFCOUNTED is what the fault found out (make_spte()).",
}
#: The same of the series "KVM: allow mapping non-refcounted pages", where it differs.
_SERIES_RULES = {
    "uncounted": "kvm_page_fault.is_refcounted_page says that hva_to_pfn() got the page with a "
    "reference (series v7 to v9, virt/kvm/kvm_main.c).",
}


class RefcountedFlag:
    """Detector 8: the refcounted flag of a fault, or bit 59 of its SPTE, contradicts the page."""

    name = "refcounted-flag"
    title = "pages whose refcounted flag, or SPTE bit 59, contradicts the page"
    rule = _RULES["uncounted"]
    columns: Mapping[str, Sequence[str]] = {
        "SPTE": ("vm", "gfn", "pfn", "op", "new", "level", "refcount", "page_bits", "fault_ts")
    }
    wants_lives = False
    joins_faults = True

    def __init__(self) -> None:
        self._seen = {name: Occurrences() for name in _TITLES}
        self._bits = 0

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; return "" or why no answer is possible."""
        self._recording = recording
        semantics = recording.semantics
        self._bit = np.uint64(semantics.spte_bit)
        # Where the walk cannot be seen, a page without a reference may come from it.
        self._walks = "walk" in recording.hooks
        if not semantics.says_refcounted and not semantics.spte_bit:
            return f"this kernel ({recording.generation or 'unknown'}) has no such flag"
        return ""

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        if len(chunk.faults):
            self._feed_faults(chunk.faults.records)
        if self._bit:
            self._feed_bits(chunk["SPTE"])
            if self._recording.semantics.says_refcounted:
                self._compare(chunk.faults)

    def _feed_faults(self, faults: Records) -> None:
        frame = (faults["pfn"] < FRAMES) & (faults["t_faultin_end"] != NEVER)
        known = frame & (faults["page_bits"] > 0)
        said = faults["refcounted"]
        # Of a fault that fault-in itself retried the page was put before it was looked at.
        held = known & (said == 1) & (faults["faultin_ret"] == 0)
        self._add("uncounted", faults, held & (faults["refcount"] <= 0))
        walked = faults["walk_pfn"] == faults["pfn"]
        if not self._recording.semantics.counts_pfnmap:
            self._add("walked", faults, held & walked)
        if self._walks and self._recording.semantics.generation == "G2":
            plain = known & (said == 0) & ~walked & refcountable(faults["page_bits"])
            self._add("counted", faults, plain & (faults["refcount"] > 0))

    def _feed_bits(self, sptes: Records) -> None:
        new = sptes["new"]
        present = (new & np.uint64(_PRESENT)) != 0
        marked = present & ((new & self._bit) != 0)
        self._bits += int(marked.sum())
        installs = marked & (sptes["op"] == code("op", "install"))
        known = sptes["page_bits"] > 0
        countless = known & ((sptes["refcount"] <= 0) | ~refcountable(sptes["page_bits"]))
        self._add("bit set", sptes, installs & (countless | ~known))

    def _compare(self, join: FaultJoin) -> None:
        sptes, faults = join.sptes, join.records
        if not len(sptes):
            return
        mine = (sptes["op"] == code("op", "install")) & (sptes["cause"] == code("cause", "fault"))
        said = faults["refcounted"][sptes.fault]
        bit = (sptes["new"] & self._bit) != 0
        self._at_faults("bit clear", join, mine & (said == 1) & ~bit)
        self._at_faults("bit wrong", join, mine & (said == 0) & bit)

    def _at_faults(self, name: str, join: FaultJoin, bad: npt.NDArray[np.bool_]) -> None:
        rows = np.flatnonzero(bad)
        if len(rows):
            more = [join.sptes.key(int(rows[0]))]
            self._seen[name].add(join.records, join.sptes.fault[rows], faults=True, more=more)

    def _add(self, name: str, records: Records, bad: npt.NDArray[np.bool_]) -> None:
        if bad.any():
            self._seen[name].add(records, np.flatnonzero(bad), faults=True)

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found."""
        found = []
        series = self._recording.semantics.generation == "G1"
        rules = _RULES | (_SERIES_RULES if series else {})
        finds = "hva_to_pfn" if series else "kvm_resolve_pfn"
        for name, seen in self._seen.items():
            # v10 has the bit only with TDP on x86-64: where no SPTE has it, none can lack it.
            if not seen or (name == "bit clear" and not self._bits):
                continue
            found.append(
                seen.finding(
                    self,
                    self._recording,
                    "probable" if name == "counted" else "definite",
                    f"{_TITLES[name]}: {plural(seen.pages, 'page')}",
                    functions=("make_spte",) if name.startswith("bit") else (finds,),
                    rule=rules[name],
                    innocent=(_innocent(name),),
                    detail={"shape": name},
                )
            )
        return found


def _innocent(name: str) -> Innocent | None:
    if name == "counted":
        return Innocent(
            "a PFNMAP walk found the page, and its record was missed",
            "unlikely: the hook is attached, and it saw no walk",
        )
    if name == "bit clear":
        return Innocent("the kernel has no such bit", "no: other SPTEs of this trace have it")
    return None
