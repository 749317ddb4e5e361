"""Pages that are never freed: what they prove, and what else could hold them.

May import: `analysis.findings`.
"""

import dataclasses

from analysis.findings import Innocent

__all__ = ("LRU_PAGES", "KeptPages")

#: Pages that the LRU batches of a cpu can hold: 31 in each of add, activate, mlock (mm/swap.c).
LRU_PAGES = 93


@dataclasses.dataclass(frozen=True, slots=True)
class KeptPages:
    """What is known of pages that were let go with references left, and never freed.

    There are `pages` of them on a machine with `cpus`; `batched` have one reference more than KVM
    took; `old` are in no LRU batch any more, 0 if there are more pages than all batches could hold.
    `anonymous`: is their memory? `several`: had many of them several faults? `ended`: has the
    process? `alike`: were other pages of their slots freed? `lost` records of frees and zaps.
    """

    pages: int
    cpus: int
    batched: int
    old: int
    anonymous: bool
    several: bool
    ended: bool
    alike: bool
    lost: int

    @property
    def verdict(self) -> str:
        """What they prove, as `analysis.findings` has it."""
        if self.lost >= max(1, self.old or self.pages):
            return "inconclusive"
        if (self.several or (self.ended and self.anonymous)) and not self.old:
            return "definite"
        return "probable" if self.alike and self.ended else "inconclusive"

    @property
    def innocent(self) -> tuple[Innocent, ...]:
        """What else could hold them, and why it does not."""
        bound = LRU_PAGES * self.cpus
        batches = f"no: they hold {bound:,} pages at most on {self.cpus} cpus"
        if self.old:
            batches = (
                f"no, not {self.old:,} of them: each was followed on its cpu by {LRU_PAGES} new "
                "pages or more, which drained the batches, and those were freed"
            )
        if self.batched:
            batches += (
                f"; {self.batched:,} of the pages have one reference more than KVM took, which may "
                "be such a batch's"
            )
        oftener = "no: pages with more faults are held more often"
        if self.anonymous:
            cache = "no: the memory is anonymous"
        elif self.several:
            cache = oftener
        elif self.alike:
            cache = "unlikely: other pages of the same slots were held by nobody, and freed"
        else:
            cache = "not ruled out: what stands behind the memory is not known"
        swapped = oftener if self.several else "not ruled out: the recording ended first"
        frees = f"not ruled out: {self.lost:,} records were lost"
        if not self.lost:
            frees = "no: no record of a free or a zap was lost"
        elif self.lost < (self.old or self.pages):
            frees = f"no: {self.lost:,} records of frees and zaps were lost"
        return (
            Innocent("per-cpu LRU batches hold the pages", batches),
            Innocent("a file's page cache holds them", cache),
            Innocent(
                "the process lives on with its memory, which is in the swap cache too",
                "no: it has ended" if self.ended else swapped,
            ),
            Innocent("their frees were lost", frees),
        )
