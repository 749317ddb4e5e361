"""A page that the host may only read is mapped writable.

In which generation: 6.12 (G0) and 7.3 (G2). It stands for the permission half of CVE-2021-22543,
where KVM did not honour that the host's PTE was read-only (KVM-FACTS 7, bug 1). A trace must
show: a fault-in that says "not writable" and a writable SPTE from it.
"""

from ..kvmchange import Change, Edit
from ._sites import MMU, TDP_MMU

EDITS = (
    Edit(
        TDP_MMU,
        "tdp_mmu_map_handle_target_level",
        "fault->map_writable, &new_spte);",
        "fault->map_writable || lab_planted(fault->gfn, fault->pfn), &new_spte);",
    ),
    Edit(
        MMU,
        "mmu_set_spte",
        "!fault || fault->map_writable;",
        "!fault || fault->map_writable || lab_planted(gfn, pfn);",
    ),
)

CHANGE = Change(
    name="ro-spte-writable",
    title="a writable SPTE for a page that the host may only read",
    stands_for="the permission half of CVE-2021-22543 (KVM-FACTS 7: 1)",
    shows="fault-in says not writable, the SPTE is writable",
    workload="prime-guest --read",
    found_by=("writable",),
    edits={"6.12": EDITS, "7.3": EDITS},
)
