"""Zaps of what was not mapped, and mappings that nobody ever zapped: the books must balance.

In all complete recordings of 6.1, 6.12 and 7.3 of VMs whose creation was seen, every zap and every
change belongs to an install, and when a VM is gone nothing of it is left. Exceptions that are none:
KVM clears accessed and dirty bits, and the fast path of page faults sets the writable bit, without
the lock that zaps hold, so their record can come after that of a zap. Eager splitting of large
pages in the shadow MMU installs leaves where no hook is; the TDP MMU's splits are known by their
parent. May import: `analysis`, numpy.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from analysis.columns import Records, code, codes
from analysis.detector import Chunk
from analysis.detectors.common import CLOCKS_NS, Occurrences
from analysis.detectors.mapped import Key, WrongLives, lost_or_seen, unsure
from analysis.findings import Finding, Innocent
from analysis.framelog import Spaces
from analysis.lifearrays import LifeArrays
from analysis.recording import Recording
from analysis.slotmap import SLOT_COLUMNS, SlotMap

__all__ = ("Unpaired",)

_ZAP, _DELETE, _SHADOW = code("op", "zap"), code("op", "delete"), code("mmu", "shadow")
#: Causes of changes that KVM makes without mmu_lock.
_LOCKLESS = codes("cause", "fast", "aging", "dirty_log")
#: An orphan has waited for its install no longer than this (analysis.lives: 100 ms).
_WAITED_NS = 2 * 10**8
#: Pieces kept for that, whatever a hostile trace says of its times.
_PIECES_MAX = 64
#: Orphans that are held against zaps nearby; a sane trace has none.
_NEAR_MAX = 1 << 10


class Unpaired:
    """Detector 3: a zap that closes no life, and a life that no zap closed."""

    name = "unpaired"
    title = "zaps of what was not mapped, mappings that outlived their VM"
    rule = (
        "Every leaf SPTE is installed once and zapped once: in the TDP MMU handle_changed_spte() "
        "(arch/x86/kvm/mmu/tdp_mmu.c) sees both, in the shadow MMU mmu_set_spte() and "
        "mmu_spte_clear_track_bits() (arch/x86/kvm/mmu/mmu.c); kvm_arch_destroy_vm() leaves none."
    )
    columns: Mapping[str, Sequence[str]] = {"VM": ("op", "vm"), "SLOT": SLOT_COLUMNS}
    wants_lives = True
    joins_faults = False

    def __init__(self) -> None:
        self._slots = SlotMap(Spaces())
        whys = ("", "lost", "lockless", "split", "clocks")
        self._orphans = {why: Occurrences() for why in whys}
        #: the newest SPTE records: an orphan may be of an earlier piece, having waited.
        self._pieces: list[Records] = []
        self._ended_vms: dict[int, Key] = {}
        #: VMs with large leaves in the shadow MMU, which may have been split.
        self._large: set[int] = set()

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; an answer is always possible."""
        self._recording = recording
        return ""

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        self._slots.feed(chunk["SLOT"])
        sptes = chunk["SPTE"]
        large = (sptes["level"] > 1) & (sptes["mmu"] == _SHADOW)
        if large.any():
            self._large |= set(np.unique(sptes["vm"][large]).tolist())
        if len(sptes):
            since = int(sptes["ts"][0]) - _WAITED_NS
            late = [piece for piece in self._pieces if int(piece["ts"][-1]) >= since]
            self._pieces = [*late[-_PIECES_MAX:], sptes]
        if len(chunk.orphan_records):
            self._take_orphans(chunk.orphan_records)
        vms = chunk["VM"]
        for at in np.flatnonzero(vms["op"] == _DELETE).tolist():
            self._ended_vms[int(vms["vm"][at])] = vms.key(at)

    def _take_orphans(self, sptes: Records) -> None:
        at = np.arange(len(sptes))
        lost = np.full(len(at), bool(self._recording.lost("SPTE")))
        lockless = (sptes["op"][at] != _ZAP) & np.isin(sptes["cause"][at], _LOCKLESS)
        split = np.isin(sptes["vm"][at], np.array(sorted(self._large), np.uint32))
        split &= (sptes["mmu"][at] == _SHADOW) & ~lost & ~lockless
        clocks = self._zapped_near(sptes, ~(lost | lockless | split))
        self._orphans["clocks"].add(sptes, at[clocks])
        self._orphans["lost"].add(sptes, at[lost])
        self._orphans["lockless"].add(sptes, at[lockless & ~lost])
        self._orphans["split"].add(sptes, at[split])
        self._orphans[""].add(sptes, at[~(lost | lockless | split | clocks)])

    def _zapped_near(self, sptes: Records, which: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Tell which changes are so near to a zap by another cpu that clocks say nothing."""
        near = np.zeros(len(sptes), np.bool_)
        for at in np.flatnonzero(which & (sptes["op"] != _ZAP))[:_NEAR_MAX].tolist():
            ts = int(sptes["ts"][at])
            for piece in self._pieces:
                if not int(piece["ts"][0]) - CLOCKS_NS <= ts <= int(piece["ts"][-1]) + CLOCKS_NS:
                    continue
                low, high = np.searchsorted(piece["ts"], [max(0, ts - CLOCKS_NS), ts + CLOCKS_NS])
                rows = slice(int(low), int(high))
                hit = (piece["op"][rows] == _ZAP) & (piece["cpu"][rows] != sptes["cpu"][at])
                hit &= (piece["vm"][rows] == sptes["vm"][at]) & (
                    piece["gfn"][rows] == sptes["gfn"][at]
                )
                near[at] |= bool(hit.any())
        return near

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found."""
        found = [self._orphan(why, seen) for why, seen in self._orphans.items() if seen]
        return found + self._left(open_lives)

    def _orphan(self, why: str, found: Occurrences) -> Finding:
        first = found.first
        lost = self._recording.lost("SPTE")
        innocent = (
            Innocent(
                "the install was missed",
                f"not ruled out: {lost:,} SPTE records were lost"
                if why == "lost"
                else "no: the VM was created in this recording and no SPTE record was lost",
            ),
            Innocent(
                "the change, made without mmu_lock, was written down after the zap",
                "not ruled out" if why == "lockless" else "no: this one is made under mmu_lock",
            ),
            Innocent(
                "the clocks of two cpus differ, and the change came before the zap",
                f"not ruled out: less than {CLOCKS_NS // 1000} us are between them"
                if why == "clocks"
                else f"no: one cpu wrote both, or no zap of it is within {CLOCKS_NS // 1000} us",
            ),
            Innocent(
                "a large page of the shadow MMU was split, which no hook sees",
                "not ruled out: this VM had some"
                if why == "split"
                else "no: the VM had none when it happened",
            ),
        )
        return found.finding(
            self,
            self._recording,
            "inconclusive" if why else "probable",
            f"leaves were zapped or changed that nobody had installed (first: {first['op']}, "
            f"cause {first['cause']})",
            functions=("mmu_spte_clear_track_bits" if first["mmu"] == "shadow"
                       else "handle_changed_spte",),
            innocent=innocent,
            detail={"shape": "orphan"},
        )  # fmt: skip

    def _left(self, rest: LifeArrays) -> list[Finding]:
        at = np.flatnonzero(np.isin(rest["vm"], np.array(sorted(self._ended_vms), np.uint32)))
        findings = []
        for shaky in (False, True):
            mine = at[unsure(rest, at) == shaky]
            if not len(mine):
                continue
            found = WrongLives()
            ends = [self._ended_vms[int(vm)] for vm in rest["vm"][mine]]
            ts = np.array([key[1] for key in ends], np.uint64)
            found.add(rest, mine, ts, more=functools.partial(_one, ends))
            findings.append(
                found.finding(
                    self,
                    self._recording,
                    "inconclusive" if shaky else "probable",
                    "leaves were still mapped when their VM was gone: no zap ever ended them",
                    slots=self._slots,
                    functions=("kvm_arch_destroy_vm",),
                    innocent=(
                        lost_or_seen(self._recording, shaky),
                        Innocent(
                            "the page tables were freed on a way that no hook sees",
                            "unlikely: no recording of an unchanged kernel has such a leaf",
                        ),
                    ),
                    detail={"shape": "left"},
                )
            )
        return findings


def _one(keys: Sequence[Key], at: int) -> tuple[Key]:
    return (keys[at],)
