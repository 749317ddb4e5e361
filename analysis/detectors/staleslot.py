"""Leaves of memslots that are gone: left over after a delete or move, or installed without a slot.

KVM removes a slot in three steps: it marks it invalid, so that faults retry; it zaps, either
everything (kvm_mmu_zap_all_fast()) or the slot's leaves; then the slot is gone and
kvm_arch_commit_memory_region() writes the SLOT record. In all recordings of 6.1, 6.12 and 7.3
nothing of a slot was mapped at that record, nor mapped before the slot's own first record, even
with a vCPU that faults while slots come and go. A leaf in a page table that stands for other guest
frames than the fault's is `gfn-outside`'s, whatever slot those frames are in.
May import: `analysis`, numpy.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from analysis.columns import Records, code, codes
from analysis.detector import Chunk
from analysis.detectors.common import Occurrences, missing_hooks
from analysis.detectors.installs import misplaced
from analysis.detectors.mapped import Key, WrongLives, forgotten, lost_or_seen, unsure
from analysis.findings import Finding, Innocent
from analysis.framelog import Events, FrameLog, Hits, Spaces
from analysis.lifearrays import LifeArrays
from analysis.recording import Recording
from analysis.slotmap import SLOT_COLUMNS, Slot, SlotMap

__all__ = ("StaleSlot",)

_INSTALL, _CREATE = code("op", "install"), code("op", "create")
_FAULT = codes("cause", "fault")
_CPU, _LOW = 32, (1 << 32) - 1
#: Leaves in wrong page tables that are remembered.
_MISPLACED_MAX = 1 << 16


class StaleSlot:
    """Row 18 of the known bugs: a leaf of a memslot that was deleted or moved."""

    name = "stale-slot"
    title = "leaves of memslots that were deleted or moved, or of none"
    rule = (
        "When a memslot has been deleted or moved, none of its leaves is left: "
        "kvm_arch_flush_shadow_memslot() (arch/x86/kvm/x86.c) zaps them first, and faults that "
        "began before see KVM_MEMSLOT_INVALID or an obsolete root, and retry."
    )
    columns: Mapping[str, Sequence[str]] = {
        "SLOT": SLOT_COLUMNS,
        "VM": ("op", "vm"),
        "SPTE": ("op", "vm", "as_id", "gfn", "pfn", "cause", "fault_ts", "tid"),
    }
    wants_lives = True
    joins_faults = True

    def __init__(self) -> None:
        self._spaces = Spaces()
        self._slots = SlotMap(self._spaces)
        self._log = FrameLog(tags=1)
        self._left = {why: WrongLives() for why in ("", "lost")}
        self._outside = Occurrences()
        # Installs of the last piece: their fault can end in the next one.
        self._waiting: tuple[Records, npt.NDArray[np.int64]] | None = None
        self._misplaced: set[Key] = set()
        self._created: set[int] = set()

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; return "" or why no answer is possible."""
        self._recording = recording
        return missing_hooks(recording, "commit_slot")

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        vms = chunk["VM"]
        self._created |= set(vms["vm"][vms["op"] == _CREATE].tolist())
        ended = self._slots.feed(chunk["SLOT"])
        join = chunk.faults
        rows = misplaced(join)[: max(0, _MISPLACED_MAX - len(self._misplaced))]
        self._misplaced |= {join.sptes.key(at) for at in rows.tolist()}
        self._settle()
        self._installs(chunk["SPTE"], ended)
        lives = chunk.lives
        space = self._spaces.of(lives["vm"], lives["as_id"])
        self._take(lives, self._log.step(lives.guest(space), self._events(ended)))

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found."""
        self._settle()
        rest = open_lives
        space = self._spaces.of(rest["vm"], rest["as_id"])
        self._take(rest, self._log.rest(rest.guest(space)))
        found = [self._left_finding(why, left) for why, left in self._left.items() if left]
        if self._outside:
            found.append(self._outside_finding())
        return found + forgotten(self, self._log)

    def _events(self, ended: Sequence[Slot]) -> Events:
        if not ended:
            return Events.none(1)
        ended = sorted(ended, key=lambda slot: slot.ts_end)
        columns = np.array(
            [
                (
                    self._spaces.one(slot.vm, slot.as_id),
                    slot.gfn,
                    slot.pages,
                    slot.ts_end,
                    slot.end_key[2] << _CPU | slot.end_key[3] if slot.end_key else 0,
                )
                for slot in ended
            ],
            np.uint64,
        ).T
        space, first, count, ts, key = columns
        return Events(space, first, count, ts, ts, (key,))

    def _installs(self, sptes: Records, ended: Sequence[Slot]) -> None:
        """Find installs in no slot at all.

        Of a VM older than the recording only those by faults count: each fault makes its slot
        known, a prefetch does not.
        """
        at = np.flatnonzero(sptes["op"] == _INSTALL)
        vm = sptes["vm"][at]
        known = np.isin(sptes["cause"][at], _FAULT)
        known |= np.isin(vm, np.array(sorted(self._created), np.uint32))
        if not known.all():
            at = at[known]
            vm = vm[known]
        space = self._spaces.of(vm, sptes["as_id"][at])
        out = self._slots.outside(space, sptes["gfn"][at], sptes["ts"][at], ended)
        if len(out):
            self._waiting = sptes, at[out]

    def _settle(self) -> None:
        """Add the installs that waited, but for those in a wrong page table."""
        if self._waiting is None:
            return
        sptes, at = self._waiting
        self._waiting = None
        right = [row for row in at.tolist() if sptes.key(row) not in self._misplaced]
        self._outside.add(sptes, np.array(right, np.int64), faults=True)

    def _take(self, lives: LifeArrays, hits: Hits) -> None:
        if not len(hits):
            return
        shaky = unsure(lives, hits.life)
        for why, chosen in (("lost", shaky), ("", ~shaky)):
            mine = hits.at(chosen)
            self._left[why].add(lives, mine.life, mine.ts, more=functools.partial(_key, mine))

    def _left_finding(self, why: str, found: WrongLives) -> Finding:
        return found.finding(
            self,
            self._recording,
            "inconclusive" if why else "definite",
            "leaves were still mapped when their memslot had been deleted or moved",
            slots=self._slots,
            functions=("kvm_arch_flush_shadow_memslot", "kvm_set_memslot"),
            innocent=(
                lost_or_seen(self._recording, why == "lost"),
                Innocent(
                    "they belong to a root that was made invalid, and go later",
                    "no: KVM waits for that before the slot is gone "
                    "(kvm_tdp_mmu_zap_invalidated_roots())",
                ),
            ),
        )

    def _outside_finding(self) -> Finding:
        recording = self._recording
        lost = recording.lost("SLOT", "SPTE")
        return self._outside.finding(
            self,
            recording,
            "inconclusive" if lost else "definite",
            "leaves were installed for guest frames that no memslot held",
            functions=("kvm_faultin_pfn", "kvm_set_memslot"),
            innocent=(
                Innocent(
                    "the slot's record was lost",
                    f"not ruled out: {lost:,} SLOT and SPTE records were lost"
                    if lost
                    else "no: no SLOT record was lost",
                ),
            ),
        )


def _key(hits: Hits, at: int) -> tuple[Key]:
    tag = int(hits.tags[0][at])
    return (("SLOT", int(hits.ts[at]), tag >> _CPU, tag & _LOW),)
