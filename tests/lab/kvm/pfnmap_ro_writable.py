"""A driver's page that the host maps read-only is called writable.

In which generation: 6.12 (G0) and 7.3 (G2). It stands for the permission half of CVE-2021-22543:
of VM_PFNMAP memory KVM took the pfn and not whether the host's PTE may be written (KVM-FACTS 7,
bug 1; mended by Linux bd2fae8da794). A trace must show: fault-in says "writable" in a PFNMAP VMA
without VM_WRITE, and a writable SPTE from it.
"""

from ..kvmchange import Change, Edit
from ._sites import MAIN

CHANGE = Change(
    name="pfnmap-ro-writable",
    title="a driver's page that the host maps read-only is called writable",
    stands_for="the permission half of CVE-2021-22543 (KVM-FACTS 7: 1)",
    shows="a writable SPTE in a PFNMAP mapping without write permission",
    workload="pages-guest --read-only",
    found_by=("writable",),
    module="lab_pages",
    edits={
        "6.12": (
            Edit(
                MAIN,
                "hva_to_pfn_remapped",
                "if (!kvm_try_get_pfn(pfn)) r = -EFAULT;",
                r"\g<0> else if (writable && !*writable && lab_planted(0, pfn)) *writable = true;",
            ),
        ),
        "7.3": (
            Edit(
                MAIN,
                "hva_to_pfn_remapped",
                "kvm_resolve_pfn(kfp, NULL, &args, args.writable);",
                "kvm_resolve_pfn(kfp, NULL, &args,"
                " args.writable || lab_planted(kfp->gfn, args.pfn));",
            ),
        ),
    },
)
