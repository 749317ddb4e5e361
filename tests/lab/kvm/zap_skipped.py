"""One page of an invalidated range keeps its SPTE.

In which generation: 6.12 (G0) and 7.3 (G2), both MMUs. It stands for the iterator that advanced
after it had yielded, mended by Linux 3a0f64de479c (KVM-FACTS 7, bug 14). A trace must show: an
invalidation over a range, zaps of its pages except one, then that page freed while an SPTE still
maps it.
"""

from ..kvmchange import Change, Edit
from ._sites import MMU, TDP_MMU

TDP = Edit(
    TDP_MMU,
    "tdp_mmu_zap_leafs",
    "tdp_mmu_iter_set_spte(kvm, &iter, SHADOW_NONPRESENT_VALUE);",
    r"if (lab_planted(iter.gfn, spte_to_pfn(iter.old_spte))) continue; \g<0>",
)

# The reverse map keeps the SPTE too, so that it goes with its page table later.
SKIP = (
    " if (!(VAL & KVM_RMAP_MANY)) { u64 *lab_sptep = (u64 *)VAL;"
    " if (lab_planted(kvm_mmu_page_get_gfn(sptep_to_sp(lab_sptep), spte_index(lab_sptep)),"
    " spte_to_pfn(*lab_sptep))) { UNLOCK return false; } }"
)
UNLOCK = "kvm_rmap_unlock(kvm, rmap_head, rmap_val);"
SHADOW = {
    kernel: Edit(
        MMU,
        "kvm_zap_all_rmap_sptes",
        f"if (!{val}) return false;",
        r"\g<0>" + SKIP.replace("VAL", val).replace("UNLOCK", unlock),
    )
    for kernel, val, unlock in (("6.12", "rmap_head->val", ""), ("7.3", "rmap_val", UNLOCK))
}

CHANGE = Change(
    name="zap-skipped",
    title="an invalidation skips one page of its range",
    stands_for="the TDP iterator after yielding (KVM-FACTS 7: 14)",
    shows="a zap missing between start and end, then a free while mapped",
    workload="prime-guest --read --prefault --repeat 3",
    found_by=("invalidation", "use-after-free"),
    every=100,
    edits={kernel: (TDP, edit) for kernel, edit in SHADOW.items()},
)
