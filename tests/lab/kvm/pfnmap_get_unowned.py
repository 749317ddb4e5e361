"""KVM takes a reference of a page that nobody counts, and so frees it.

In which generation: 6.12 (G0) and 7.3 (G2). It stands for CVE-2021-22543: the count of such a
page is 0, becomes 1 and then 0 again, and the page is freed by KVM while its driver still owns it
(KVM-FACTS 7, bug 1). A trace must show: fault-in of a PFNMAP page with count 1, its free within
the same fault, SPTEs that map it.
"""

from ..kvmchange import Change, Edit
from ._sites import MAIN

CHANGE = Change(
    name="pfnmap-get-unowned",
    title="a reference is taken of a page with count 0",
    stands_for="CVE-2021-22543 (KVM-FACTS 7: 1)",
    shows="count 0, 1, 0 in one fault of a PFNMAP page, a free while mapped",
    workload="pages-guest",
    found_by=("use-after-free", "balance"),
    leads_to=("dead-mark", "refcounted-flag"),
    module="lab_pages",
    npt="on",
    edits={
        "6.12": (
            Edit(
                MAIN,
                "kvm_try_get_pfn",
                "return get_page_unless_zero(page);",
                "if (!page_count(page) && lab_planted(0, pfn)) { get_page(page); return 1; }"
                r" \g<0>",
            ),
        ),
        "7.3": (
            Edit(
                MAIN,
                "hva_to_pfn_remapped",
                "*p_pfn = kvm_resolve_pfn(kfp, NULL, &args, args.writable);",
                r"\g<0> if (pfn_valid(args.pfn) && !page_count(pfn_to_page(args.pfn)) &&"
                " lab_planted(kfp->gfn, args.pfn)) {"
                " *kfp->refcounted_page = pfn_to_page(args.pfn);"
                " get_page(*kfp->refcounted_page); }",
            ),
        ),
    },
)
