"""References taken on one folio and given back on another.

May import: `analysis`, numpy.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from analysis.detector import Chunk
from analysis.detectors.common import Occurrences, loss_verdict, missing_hooks
from analysis.detectors.puts import judged_faults, only_strangers, own_puts
from analysis.findings import Finding, Innocent
from analysis.lifearrays import LifeArrays
from analysis.recording import Recording
from analysis.text import plural

__all__ = ("WrongFolio",)


class WrongFolio:
    """Detector 13: the reference was taken on one folio and given back on another."""

    name = "wrong-folio"
    title = "references taken on one folio and given back on another"
    rule = (
        "The page that a fault puts is the one that it got. kvm_mmu_hugepage_adjust() rounds "
        "fault->pfn down to the large page, which is another folio where the host's memory is not "
        'one compound page: Linux 2f6305dd5676 ("KVM: MMU: change direct_page_fault() arguments to '
        'kvm_page_fault") (v5.16), mended in stable kernels by keeping orig_pfn.'
    )
    columns: Mapping[str, Sequence[str]] = {}
    wants_lives = False
    joins_faults = True

    def __init__(self) -> None:
        self._seen = Occurrences()

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; return "" or why no answer is possible."""
        self._recording = recording
        if recording.semantics.put not in ("in fault", "either"):
            return "faults of this kernel put their page where no record shows it"
        return missing_hooks(recording, *recording.semantics.put_hooks)

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        join = chunk.faults
        if not len(join):
            return
        own, other = own_puts(join)
        if not other.any():
            return
        astray = judged_faults(join.records, self._recording)
        astray &= join.releases.per_fault(own, len(join)) == 0
        astray &= only_strangers(join, other)
        self._seen.add(join.records, np.flatnonzero(astray), faults=True)

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found."""
        if not self._seen:
            return []
        count = self._seen.count
        # Without its install a page that was prefetched and put looks like another fault's.
        verdict, loss = loss_verdict("definite", self._recording, count, "RELEASE", "SPTE")
        return [
            self._seen.finding(
                self,
                self._recording,
                verdict,
                f"{plural(count, 'fault')} took a reference on one folio and gave one back on "
                "another: the first leaks, the second loses one that others own",
                functions=("kvm_mmu_hugepage_adjust", self._recording.semantics.put_function),
                innocent=(
                    loss,
                    Innocent(
                        "both frames are of one compound page, where it does not matter",
                        "no: the records say that their folios differ",
                    ),
                    Innocent(
                        "the other page was prefetched around the fault",
                        "no: no SPTE of a prefetch has it",
                    ),
                ),
            )
        ]
