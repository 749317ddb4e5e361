"""Installs that KVM should have thrown away, since the memory changed while the fault was at work.

A fault takes mmu_invalidate_seq before it asks the host for a page, and compares under mmu_lock
before it maps. Invalidations change the sequence and the range in progress under mmu_lock too. So
whatever an INVALIDATE record says that was written before the install, held before the comparison.

Which of two records was written first is sure if one cpu wrote both. The clocks of two cpus may
differ a little: between them a distance of more than `CLOCKS_NS` is asked for.
May import: `analysis`, numpy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.columns import Records, code, codes
from analysis.detector import Chunk
from analysis.detectors.common import CLOCKS_NS, NEVER, Occurrences
from analysis.faultjoin import FaultJoin
from analysis.findings import Finding, Innocent
from analysis.lifearrays import LifeArrays
from analysis.recording import Recording
from analysis.text import plural

__all__ = ("StaleInstall",)

_PAGE = 4096
#: Invalidations in progress at one moment that are looked at.
_PARALLEL_MAX = 64


class _Changes:
    """The invalidations of one VM: when a record of them was written, and what it said."""

    def __init__(self) -> None:
        self.ts = np.zeros(0, np.uint64)
        self.seq = np.zeros(0, np.uint64)
        self.start = np.zeros(0, np.bool_)
        self.hva = np.zeros(0, np.uint64)
        self.hva_end = np.zeros(0, np.uint64)
        self.cpu = np.zeros(0, np.uint16)
        self.number = np.zeros(0, np.uint32)

    def add(self, records: Records, at: npt.NDArray[np.int64], starts: int) -> None:
        """Take the next records, and forget those that say nothing that later ones do not."""
        # Only starts of the newest sequence can still be in progress for a later fault; one older
        # record keeps the sequence itself.
        kept = np.flatnonzero(self.seq == self.seq.max(initial=0))[-_PARALLEL_MAX:]
        self.cpu = np.concatenate([self.cpu[kept], records["cpu"][at]])
        self.number = np.concatenate([self.number[kept], records["seq"][at]])
        self.ts = np.concatenate([self.ts[kept], records["ts"][at]])
        self.seq = np.concatenate([self.seq[kept], records["invalidate_seq"][at]])
        self.start = np.concatenate([self.start[kept], records["op"][at] == starts])
        self.hva = np.concatenate([self.hva[kept], records["hva"][at]])
        self.hva_end = np.concatenate([self.hva_end[kept], records["hva_end"][at]])

    def key(self, at: int) -> tuple[str, int, int, int]:
        """Return what names a record in the file."""
        return ("INVALIDATE", int(self.ts[at]), int(self.cpu[at]), int(self.number[at]))

    def cpu_of(self, at: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the cpu that wrote each record `at`, -1 for none."""
        if not len(self.cpu):
            return np.full(len(at), -1, np.int64)
        return np.where(at >= 0, self.cpu[np.maximum(at, 0)].astype(np.int64), -1)

    def before(
        self,
        when: npt.NDArray[np.uint64],
        seq: npt.NDArray[np.uint64],
        hva: npt.NDArray[np.uint64],
    ) -> npt.NDArray[np.int64]:
        """Return for each install the record that made it stale, -1 if there is none.

        `when` it was made, with which sequence taken before and of which address.
        """
        proof = np.full(len(when), -1, np.int64)
        if not len(self.ts):
            return proof
        highest = np.maximum.accumulate(self.seq)
        last = np.searchsorted(self.ts, when) - 1
        later = (last >= 0) & (highest[np.maximum(last, 0)] > seq)
        proof[later] = np.searchsorted(highest, seq[later], "right")
        at, left = last.copy(), ~later
        for _ in range(_PARALLEL_MAX):
            left &= (at >= 0) & (proof < 0)
            if not left.any():
                break
            row = np.maximum(at, 0)
            covers = (self.hva[row] < hva + np.uint64(_PAGE)) & (hva < self.hva_end[row])
            hit = left & self.start[row] & (self.seq[row] >= seq) & covers
            proof[hit] = at[hit]
            at -= 1
        return proof


class StaleInstall:
    """Detector 6: a fault mapped a page although an invalidation had made it stale."""

    name = "stale-install"
    title = "installs by faults that an invalidation had made stale"
    rule = (
        "A fault must not map what it looked up before an invalidation: is_page_fault_stale(), "
        "called under mmu_lock, fails it if mmu_invalidate_seq has changed or an invalidation of "
        "its range is in progress (arch/x86/kvm/mmu/mmu.c; mmu_invalidate_retry_gfn(), "
        "include/linux/kvm_host.h)."
    )
    columns: Mapping[str, Sequence[str]] = {
        "INVALIDATE": ("vm", "op", "hva", "hva_end", "invalidate_seq")
    }
    wants_lives = False
    joins_faults = True

    def __init__(self) -> None:
        self._seen = Occurrences()
        self._close = Occurrences()
        self._changes: dict[int, _Changes] = {}

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; return "" or why no answer is possible."""
        self._recording = recording
        self._starts = code("op", "start")
        return ""

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        invalidations = chunk["INVALIDATE"]
        vms = invalidations["vm"]
        for vm in np.unique(vms):
            changes = self._changes.setdefault(int(vm), _Changes())
            changes.add(invalidations, np.flatnonzero(vms == vm), self._starts)
        if not self._changes:
            return
        join = chunk.faults
        faults = join.records
        # At the end of a stale fault the sequence has moved on, or an invalidation is at work.
        suspects = (faults["invalidate_seq"] != faults["mmu_seq"]) | (faults["in_progress"] > 0)
        suspects &= (faults["t_faultin_end"] != NEVER) & (faults["slot"] >= 0)
        if suspects.any():
            self._judge(join, suspects)

    def _judge(self, join: FaultJoin, suspects: npt.NDArray[np.bool_]) -> None:
        faults, sptes = join.records, join.sptes
        installs = (sptes["op"] == code("op", "install")) & suspects[sptes.fault]
        installs &= np.isin(sptes["cause"], codes("cause", "fault", "prefetch"))
        rows = np.flatnonzero(installs)
        # The first install of each fault: rows are in order of time.
        _, first = np.unique(sptes.fault[rows], return_index=True)
        rows = rows[first]
        which: npt.NDArray[Any] = sptes.fault[rows]
        when = sptes["ts"][rows].astype(np.uint64)
        for vm, changes in self._changes.items():
            mine = faults["vm"][which] == vm
            at = which[mine]
            what = faults["mmu_seq"][at], faults["hva"][at]
            early = when[mine] - np.minimum(when[mine], np.uint64(CLOCKS_NS))
            far, near = changes.before(early, *what), changes.before(when[mine], *what)
            sure = (far >= 0) | ((near >= 0) & (changes.cpu_of(near) == sptes["cpu"][rows[mine]]))
            proof = np.where(far >= 0, far, near)
            for seen, which_ones in ((self._seen, sure), (self._close, ~sure & (near >= 0))):
                bad = np.flatnonzero(which_ones)
                if len(bad):
                    more = [changes.key(int(proof[bad[0]])), sptes.key(int(rows[mine][bad[0]]))]
                    seen.add(faults, at[bad], faults=True, more=more)

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found."""
        found = (self._seen, "definite"), (self._close, "inconclusive")
        return [self._finding(seen, verdict) for seen, verdict in found if seen]

    def _finding(self, seen: Occurrences, verdict: str) -> Finding:
        sure = verdict == "definite"
        return seen.finding(
            self,
            self._recording,
            verdict,
            f"{plural(seen.count, 'fault')} mapped a page that an invalidation had made stale"
            + _sequences(seen.first),
            functions=("is_page_fault_stale", "mmu_invalidate_retry_gfn"),
            innocent=(
                Innocent(
                    "the invalidation came after the comparison",
                    "no: its record was written before the install, and the sequence changes "
                    "only under mmu_lock, which the fault held from comparison to install"
                    if sure
                    else "not ruled out: see the clocks",
                ),
                Innocent(
                    "the clocks of two cpus differ, and the order of the records is not theirs",
                    f"no: one cpu wrote both, or they are more than {CLOCKS_NS // 1000} us apart"
                    if sure
                    else f"not ruled out: less than {CLOCKS_NS // 1000} us are between them",
                ),
            ),
        )


def _sequences(first: Mapping[str, Any]) -> str:
    """Return what the first fault says: the sequence that it took, and the one that it ended at."""
    taken, left = first.get("mmu_seq"), first.get("invalidate_seq")
    if taken is None or left is None or taken == left:
        return ""
    return f": the first took mmu_invalidate_seq {taken:#x} and ended at {left:#x}"
