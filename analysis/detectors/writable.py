"""Writable SPTEs over memory that the host maps read-only.

KVM may map a page writable only if the host's mapping is: fault->map_writable after fault-in
becomes the host-writable bit of the SPTE, and only with that may the other two be set. In all
recordings of 6.1, 6.12 and 7.3 every leaf of a fault has the host-writable bit exactly if
FAULT.writable, zero pages are mapped read-only, and check_spte_writable_invariants() holds for
every SPTE. The fast path of page faults has no fault-in, so FAULT.writable says nothing there; the
bit is only ever set again where host-writable stayed. A fault whose return of fault-in was missed
(t_faultin_end is null) says nothing either. May import: `analysis`, `probes.wire`, numpy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.columns import Records, code
from analysis.detector import Chunk
from analysis.detectors.common import NEVER, Occurrences, where_of
from analysis.faultjoin import FaultJoin
from analysis.findings import Finding, Innocent
from analysis.framelog import Spaces
from analysis.lifearrays import LifeArrays
from analysis.recording import Recording
from analysis.slotmap import GUEST_MEMFD, SLOT_COLUMNS, SlotMap
from probes.wire import PAGE_BITS

__all__ = ("WritableOverReadOnly",)

_ZAP, _INSTALL, _CHANGE = (code("op", name) for name in ("zap", "install", "change"))
_FAULT = code("cause", "fault")
#: PT_WRITABLE_MASK and SPTE_MMU_PRESENT_MASK, arch/x86/kvm/mmu/spte.h.
_WRITABLE, _PRESENT = np.uint64(1 << 1), np.uint64(1 << 11)
#: VM_WRITE, include/linux/mm.h.
_VM_WRITE = np.uint64(1 << 1)
_ZERO = PAGE_BITS["zero"]

_TITLES = {
    "fault": "leaves are writable though fault-in said that the host's mapping is read-only",
    "vma": "leaves are writable though the PFNMAP mapping behind them is read-only",
    "note": "leaves are writable though the host's mapping behind them is read-only",
    "slot": "leaves are writable in a read-only memslot",
    "zero": "the host's zero page is mapped writable: the guest can write to what all processes "
    "share",
    "bits": "writable leaves without the bits that allow it (host-writable, MMU-writable)",
    "gained": "leaves became host-writable without a fault",
}
#: One record alone proves these, whatever else was lost.
_ALONE = ("zero", "bits", "gained")
_FUNCTIONS = {
    "fault": ("hva_to_pfn", "make_spte"),
    "vma": ("hva_to_pfn_remapped", "make_spte"),
    "note": ("hva_to_pfn", "make_spte"),
    "slot": ("__gfn_to_hva_memslot", "make_spte"),
    "zero": ("hva_to_pfn", "make_spte"),
    "bits": ("make_spte", "fast_page_fault"),
    "gained": ("mmu_spte_update", "fast_page_fault"),
}


class WritableOverReadOnly:
    """Detector 9: a writable SPTE over a read-only host mapping."""

    name = "writable"
    title = "writable leaves over memory that the host maps read-only"
    rule = (
        "An SPTE is writable only if the host's mapping is: make_spte() (arch/x86/kvm/mmu/spte.c) "
        "takes host-writable from fault->map_writable, and check_spte_writable_invariants() warns "
        'of writable SPTEs without it. PFNMAP: Linux bd2fae8da794 ("KVM: do not assume PTE is '
        'writable after follow_pfn"), CVE-2021-22543.'
    )
    columns: Mapping[str, Sequence[str]] = {
        "SPTE": ("op", "cause", "vm", "as_id", "gfn", "pfn", "old", "new", "page_bits", "fault_ts",
                 "tid"),
        "FAULT": ("writable", "vm_flags", "as_id"),
        "SLOT": SLOT_COLUMNS,
    }  # fmt: skip
    wants_lives = False
    joins_faults = True

    def __init__(self) -> None:
        self._slots = SlotMap(Spaces())
        self._found = {what: Occurrences() for what in _TITLES}
        self._where = ""
        #: what -> (gfn, SPTE) of the first leaf
        self._leaf: dict[str, tuple[int, int]] = {}

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; return "" or why no answer is possible."""
        self._recording = recording
        # Without that hook nobody knows how long a note is good.
        self._noted = recording.read_only if "invalidate_start" in recording.hooks else ()
        self._host = np.uint64(recording.mask("shadow_host_writable_mask"))
        self._mmu = np.uint64(recording.mask("shadow_mmu_writable_mask"))
        return "" if self._host else "shadow_host_writable_mask of this kernel is not known"

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        self._slots.feed(chunk["SLOT"])
        self._alone(chunk["SPTE"])
        self._joined(chunk.faults)
        if self._slots.read_only():
            self._read_only(chunk["SPTE"])

    def _alone(self, sptes: Records) -> None:
        """Look at what each SPTE record says by itself."""
        present = sptes["op"] != _ZAP
        new = sptes["new"]
        writable = (new & _WRITABLE) != 0
        let = (new & (self._host | _WRITABLE)) != 0
        host, mmu = (new & self._host) != 0, (new & self._mmu) != 0
        wrong = (mmu & ~host) | (writable & ~mmu) if self._mmu else writable & ~host
        zero = let & ((sptes["page_bits"] & _ZERO) != 0)
        gained = host & (sptes["op"] == _CHANGE) & (sptes["cause"] != _FAULT)
        gained &= (sptes["old"] & self._host) == 0
        for what, which in (("bits", wrong), ("zero", zero), ("gained", gained)):
            at = np.flatnonzero(which & present)
            self._found[what].add(sptes, at, faults=True)
            self._remember(what, sptes, at)

    def _remember(self, what: str, sptes: Any, at: npt.NDArray[np.int64]) -> None:
        if len(at):
            self._leaf.setdefault(what, (int(sptes["gfn"][at[0]]), int(sptes["new"][at[0]])))

    def _joined(self, join: FaultJoin) -> None:
        """Compare leaves with what the fault said of the host's mapping."""
        sptes, faults = join.sptes, join.records
        own = (sptes["cause"] == _FAULT) & np.isin(sptes["op"], (_INSTALL, _CHANGE))
        at = np.flatnonzero(own)
        fault = sptes.fault[at]
        new = np.asarray(sptes["new"][at], np.uint64)
        known = faults["t_faultin_end"][fault] != NEVER
        allowed = faults["writable"][fault]
        flags = faults["vm_flags"][fault]
        # Dirty logging takes write access away, and leaves the bit that lets it be given back.
        let = (new & (self._host | _WRITABLE)) != 0
        wrong = known & ~allowed & let
        mapped = (flags != 0) & ((flags & _VM_WRITE) == 0) & let
        self._add("fault", join, at[wrong])
        self._add("vma", join, at[mapped & ~wrong])
        if self._noted:
            rest = at[~mapped & ~wrong & known & let]
            self._add("note", join, rest[self._read_only_by_note(faults, sptes.fault[rest])])

    def _read_only_by_note(
        self, faults: Records, at: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Tell which faults are of memory that a note calls read-only."""
        answer = np.zeros(len(at), np.bool_)
        vm, hva, gfn, ts = (faults[name][at] for name in ("vm", "hva", "gfn", "ts"))
        for one in self._noted:
            inside = (vm == one.vm) & (hva >= np.uint64(one.start)) & (hva < np.uint64(one.end))
            answer |= inside & (ts > np.uint64(one.since)) & (ts < np.uint64(one.until))
        for number in {one.vm for one in self._noted}:
            for slot in self._slots.covering(number):
                if slot.flags & GUEST_MEMFD:
                    # What the process maps there is not what the guest gets.
                    private = (gfn >= np.uint64(slot.gfn)) & (gfn < slot.gfn + slot.pages)
                    answer &= ~(private & (vm == number))
        return answer

    def _add(self, what: str, join: FaultJoin, at: npt.NDArray[np.int64]) -> None:
        if len(at):
            self._found[what].add(
                join.records, join.sptes.fault[at], pfns=join.sptes["pfn"][at], faults=True,
                more=(join.sptes.key(int(at[0])),),
            )  # fmt: skip
            self._remember(what, join.sptes, at)

    def _read_only(self, sptes: Records) -> None:
        writable = (sptes["op"] != _ZAP) & ((sptes["new"] & _WRITABLE) != 0)
        for slot in self._slots.read_only():
            inside = writable & (sptes["vm"] == slot.vm) & (sptes["as_id"] == slot.as_id)
            inside &= (sptes["gfn"] >= np.uint64(slot.gfn)) & (sptes["ts"] > np.uint64(slot.ts))
            inside &= sptes["gfn"] < np.uint64(slot.gfn + slot.pages)
            at = np.flatnonzero(inside)
            if len(at):
                self._where = where_of(self._recording, slot.vm, slot.hva)
                self._found["slot"].add(sptes, at, faults=True, more=(slot.key,))
                self._remember("slot", sptes, at)

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found."""
        return [self._finding(what, found) for what, found in self._found.items() if found]

    def _finding(self, what: str, found: Occurrences) -> Finding:
        lost = 0 if what in _ALONE else self._recording.lost("FAULT", "SPTE", "SLOT")
        explanations: list[Innocent] = [
            Innocent(
                "the record of the fault or of its slot was lost, or torn and mixed up with "
                "another's",
                f"not ruled out: {lost:,} FAULT, SPTE and SLOT records were lost"
                if lost
                else "no: one record alone shows it"
                if what in _ALONE
                else "no: none was lost",
            )
        ]
        if what in ("fault", "vma"):
            explanations.append(
                Innocent(
                    "the host's mapping became writable between fault-in and the install",
                    "no: that is an invalidation, after which the fault must retry",
                )
            )
        unsure = self._recording.lost("INVALIDATE") if what == "note" else 0
        if what == "note":
            explanations.append(
                Innocent(
                    "the mapping was made writable after the recorder had read /proc/PID/smaps",
                    f"not ruled out: {unsure:,} INVALIDATE records were lost"
                    if unsure
                    else "no: mprotect() and mmap() invalidate it first, and none did",
                )
            )
        sure = "probable" if what == "note" else "definite"
        return found.finding(
            self,
            self._recording,
            "inconclusive" if lost or unsure else sure,
            f"{self._title(what)}; first gfn {self._leaf[what][0]:#x} by SPTE "
            f"{self._leaf[what][1]:#x}",
            functions=_FUNCTIONS[what],
            innocent=explanations,
            detail=self._words(found.first),
        )

    def _title(self, what: str) -> str:
        """Return what is wrong; of a leaf without write access, that it may get it back."""
        if self._leaf[what][1] & int(_WRITABLE):
            return _TITLES[what]
        title = _TITLES[what].replace("are writable", "may be made writable")
        return title.replace("is mapped writable", "may be made writable")

    def _words(self, first: Mapping[str, Any]) -> dict[str, Any]:
        """Return the bits of the first leaf, if its record is at hand."""
        if first.get("new") is None:
            flags = first.get("vm_flags")
            return {} if flags is None else {"vm_flags": f"{int(flags):#x}"}
        new = int(first["new"])
        return {
            "spte": f"{new:#x}",
            "writable": bool(new & int(_WRITABLE)),
            "host_writable": bool(new & int(self._host)),
            "mmu_writable": bool(new & int(self._mmu)),
        }
