"""The invalidation count goes through an int on its way to the stale check.

In which generation: 6.12 (G0) and 7.3 (G2). It stands for the livelock of 5.17 to 6.2, "Deadlock
due to EPT_VIOLATION" of 2023 (KVM-FACTS 7, bug 11, mended by Linux ba6e3fe25543 and
a955cad84cda). VMs begin four invalidations before bit 31. A trace must show: the same fault
without end, each with a good pfn, none installed, no invalidation in between.
"""

from ..kvmchange import Change, Edit
from ._sites import MAIN, MMU

STALE = """({
	int lab_seq = fault->mmu_seq;
	bool lab_stale = mmu_invalidate_retry_gfn(vcpu->kvm, lab_seq, fault->gfn);
	if (lab_stale && !mmu_invalidate_retry_gfn(vcpu->kvm, fault->mmu_seq, fault->gfn))
		lab_happened(fault->gfn, fault->pfn);
	lab_stale;
	});"""
EDITS = (
    Edit(
        MMU,
        "is_page_fault_stale",
        "mmu_invalidate_retry_gfn(vcpu->kvm, fault->mmu_seq, fault->gfn);",
        STALE,
    ),
    Edit(
        MAIN,
        "kvm_create_vm",
        "KVM_MMU_LOCK_INIT(kvm);",
        r"\g<0> if (lab_turn()) kvm->mmu_invalidate_seq = 0x80000000ul - 4;",
    ),
)

CHANGE = Change(
    name="seq-sign-extended",
    title="the invalidation count is sign-extended before it is compared",
    stands_for="the livelock of 2023, Linux ba6e3fe25543 (KVM-FACTS 7: 11)",
    shows="one fault without end: good pfn, RETRY, no install, no invalidation",
    workload="timeout 6 prime-guest --pages 61 --repeat 20",
    found_by=("livelock",),
    status=(124,),
    edits={"6.12": EDITS, "7.3": EDITS},
)
