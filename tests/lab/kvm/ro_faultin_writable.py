"""Fault-in says of a page that the host may only read that it may be written.

In which generation: 6.12 (G0) and 7.3 (G2). It stands for the permission half of CVE-2021-22543
(KVM-FACTS 7, bug 1) with the lie told earlier: the SPTE agrees with the fault-in, and both are
wrong. A trace must show: writable SPTEs of the zero page, or in a VMA without write permission.
"""

from ..kvmchange import Change, Edit
from ._sites import MMU

EDITS = {
    kernel: (
        Edit(
            MMU,
            function,
            "if (unlikely(is_error_pfn(fault->pfn)))",
            r"if (!is_error_noslot_pfn(fault->pfn) && !fault->map_writable &&"
            r" lab_planted(fault->gfn, fault->pfn)) fault->map_writable = true; \g<0>",
        ),
    )
    for kernel, function in (("6.12", "kvm_faultin_pfn"), ("7.3", "kvm_mmu_faultin_pfn"))
}

CHANGE = Change(
    name="ro-faultin-writable",
    title="fault-in calls a page writable that the host may only read",
    stands_for="the permission half of CVE-2021-22543 (KVM-FACTS 7: 1)",
    shows="writable SPTEs of the zero page",
    workload="prime-guest --read",
    found_by=("writable",),
    edits=EDITS,
)
