"""Two leaves that map one guest frame to two pages at once, or one leaf put over another.

At any moment a guest frame has one host page, that behind its address in the VM's process. Several
leaves may map it: in the TDP MMU each root has one (a fast zap-all leaves the old root's for some
milliseconds, seen in every recording of memslots that go; guests of nested guests without nested
paging have a root of their own, seen with kvm_vcpu_map() at work), in the shadow MMU each role.
Records do not name the root. But in all recordings of 6.1, 6.12 and 7.3 leaves of one frame that
lived at one time mapped the same page: before the page changes, the notifier zaps all of them,
those of invalid roots too. So a leaf with another page is one that a zap forgot.
May import: `analysis`, numpy.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np

from analysis.columns import Records, code
from analysis.detector import Chunk
from analysis.detectors.common import Occurrences
from analysis.detectors.mapped import (
    Flushes,
    Key,
    WrongLives,
    forgotten,
    lost_or_seen,
    sorted_out,
    unsure,
)
from analysis.findings import Finding, Innocent
from analysis.framelog import Events, FrameLog, Hits, Spaces
from analysis.lifearrays import LifeArrays
from analysis.recording import Recording
from analysis.schema import ENDED_BY
from analysis.slotmap import SLOT_COLUMNS, SlotMap

__all__ = ("LeafReplaced", "TwoLeaves")

_INSTALL, _CHANGE = code("op", "install"), code("op", "change")
_SUPERSEDED = ENDED_BY.index("superseded")
_CPU, _LOW = np.uint64(32), (1 << 32) - 1
#: Frame bits of an SPTE, 51:12.
_FRAME_MASK = np.uint64(0x000F_FFFF_FFFF_F000)


class TwoLeaves:
    """Detector 2: a guest frame mapped to two host pages at once."""

    name = "two-leaves"
    title = "two leaves at once that map one guest frame to different pages"
    rule = (
        "All leaves of a guest frame map the page that its host address has: before that changes, "
        "kvm_unmap_gfn_range() (arch/x86/kvm/mmu/mmu.c) zaps those of every root, and of every "
        "rmap entry in the shadow MMU."
    )
    columns: Mapping[str, Sequence[str]] = {"SLOT": SLOT_COLUMNS}
    wants_lives = True
    joins_faults = False

    def __init__(self) -> None:
        self._spaces = Spaces()
        self._log = FrameLog(tags=2)
        self._slots = SlotMap(self._spaces)
        self._flushes = Flushes()
        self._stale = {why: WrongLives() for why in ("", "lost", "root")}
        self._over = {why: WrongLives() for why in ("", "lost")}

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; an answer is always possible."""
        self._recording = recording
        return ""

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        ended = self._slots.feed(chunk["SLOT"])
        self._flushes.feed(chunk["SPTE"], ended)
        lives = chunk.lives
        events = self._installs(chunk["SPTE"])
        space = self._spaces.of(lives["vm"], lives["as_id"])
        self._take(lives, self._log.step(lives.guest(space), events))
        over = np.flatnonzero(lives["ended_by"] == _SUPERSEDED)
        if len(over):
            shaky = unsure(lives, over)
            self._over["lost"].add(lives, over[shaky], lives["death_ts"][over[shaky]])
            self._over[""].add(lives, over[~shaky], lives["death_ts"][over[~shaky]])

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found."""
        rest = open_lives
        space = self._spaces.of(rest["vm"], rest["as_id"])
        self._take(rest, self._log.rest(rest.guest(space)))
        found = [self._stale_finding(why, lives) for why, lives in self._stale.items() if lives]
        found += [self._over_finding(why, lives) for why, lives in self._over.items() if lives]
        return found + forgotten(self, self._log)

    def _installs(self, sptes: Records) -> Events:
        at = np.flatnonzero(sptes["op"] == _INSTALL)
        ts, gfn = sptes["ts"][at], sptes["gfn"][at]
        depth = np.clip(sptes["level"][at].astype(np.int64) - 1, 0, 2).astype(np.uint64)
        return Events(
            space=self._spaces.of(sptes["vm"][at], sptes["as_id"][at]),
            first=gfn,
            count=np.uint64(1) << np.uint64(9) * depth,
            since=ts,
            ts=ts,
            # What is the same for leaves of all sizes: how far host and guest frame are apart.
            tags=(sptes["pfn"][at] - gfn, sptes["cpu"][at].astype(np.uint64) << _CPU
                  | sptes["seq"][at]),
        )  # fmt: skip

    def _take(self, lives: LifeArrays, hits: Hits) -> None:
        if len(hits):
            hits = hits.at(hits.tags[0] != lives["pfn"][hits.life] - lives["gfn"][hits.life])
        for why, mine in sorted_out(lives, hits, self._flushes):
            self._stale[why].add(lives, mine.life, mine.ts, more=functools.partial(_key, mine))

    def _stale_finding(self, why: str, found: WrongLives) -> Finding:
        return found.finding(
            self,
            self._recording,
            "inconclusive" if why else "definite",
            "guest frames were mapped anew to other pages while an older leaf still mapped the "
            "page before",
            slots=self._slots,
            functions=("kvm_unmap_gfn_range",),
            innocent=(
                lost_or_seen(self._recording, why == "lost"),
                Innocent(
                    "the older leaf belongs to a root that a fast zap-all made invalid",
                    "not ruled out: one was under way"
                    if why == "root"
                    else "no: it lived on, and its page was changed under it",
                ),
            ),
        )

    def _over_finding(self, why: str, found: WrongLives) -> Finding:
        return found.finding(
            self,
            self._recording,
            "inconclusive" if why else "definite",
            "shadow SPTEs were set that still held another leaf, which nobody zapped",
            slots=self._slots,
            functions=("mmu_set_spte", "drop_spte"),
            innocent=(lost_or_seen(self._recording, why == "lost"),),
            rule="A leaf of the shadow MMU goes by drop_spte() (arch/x86/kvm/mmu/mmu.c), which "
            "takes its rmap entry along; else the entry dangles. See Linux aad885e77496 and "
            "CVE-2026-23401.",
        )


def _key(hits: Hits, at: int) -> tuple[Key]:
    tag = int(hits.tags[1][at])
    return (("SPTE", int(hits.ts[at]), tag >> 32, tag & _LOW),)


class LeafReplaced:
    """A present leaf that becomes another present leaf of another page in one step."""

    name = "leaf-replaced"
    title = "present leaves replaced by leaves of another page without a zap between"
    rule = (
        "A present leaf is never replaced by a present leaf of another page: handle_changed_spte() "
        '(arch/x86/kvm/mmu/tdp_mmu.c) stops the kernel with "cannot replace a present leaf SPTE '
        'with another present leaf SPTE mapping a different PFN"; mmu_set_spte() '
        "(arch/x86/kvm/mmu/mmu.c) drops the old leaf first."
    )
    columns: Mapping[str, Sequence[str]] = {
        "SPTE": ("op", "old", "new", "vm", "gfn", "pfn", "fault_ts", "tid", "mmu")
    }
    wants_lives = False
    joins_faults = False

    def __init__(self) -> None:
        self._found = Occurrences()

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; an answer is always possible."""
        self._recording = recording
        return ""

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        sptes = chunk["SPTE"]
        at = np.flatnonzero(sptes["op"] == _CHANGE)
        if len(at):
            moved = (sptes["old"][at] ^ sptes["new"][at]) & _FRAME_MASK
            self._found.add(sptes, at[moved != 0], faults=True)

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found; one record alone proves it, whatever else was lost."""
        if not self._found:
            return []
        return [
            self._found.finding(
                self,
                self._recording,
                "definite",
                "leaves were replaced by leaves of another page, without a zap between",
                functions=("handle_changed_spte", "mmu_set_spte"),
                innocent=(
                    Innocent(
                        "bits above the frame number differ, not the page",
                        "no: bits 51:12 of the SPTE differ",
                    ),
                ),
                detail={"old": f"{int(self._found.first['old']):#x}",
                        "new": f"{int(self._found.first['new']):#x}"},
            )
        ]  # fmt: skip
