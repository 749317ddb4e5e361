"""The reference of a prefetched page is never put.

In which generation: 6.12 (G0) and 7.3 (G2); the shadow MMU alone prefetches. It stands for: none
recorded; the shape of v8 and v9 of the series (KVM-FACTS 7, bugs 4 and 5) where it is rarely looked
for: prefetched pages never reach the fault's own release. A trace must show: pages installed with
cause prefetch whose count stays one too high, and no fault of their own.
"""

from ..kvmchange import Change, Edit
from ._sites import MMU

CHANGE = Change(
    name="leak-prefetch",
    title="a prefetched page keeps its reference",
    stands_for="none recorded; the shape of a put forgotten where few look",
    shows="refcount one too high on pages installed with cause prefetch",
    workload="prime-guest --prefault",
    found_by=("balance", "growth"),
    npt="off",
    edits={
        "6.12": (
            Edit(
                MMU,
                "direct_pte_prefetch_many",
                "put_page(pages[i]);",
                r"if (!lab_planted(gfn, page_to_pfn(pages[i]))) \g<0>",
            ),
        ),
        "7.3": (
            Edit(
                MMU,
                "kvm_mmu_prefetch_sptes",
                "kvm_release_page_dirty(pages[i]);",
                r"if (!lab_planted(gfn, page_to_pfn(pages[i]))) \g<0>",
            ),
        ),
    },
)
