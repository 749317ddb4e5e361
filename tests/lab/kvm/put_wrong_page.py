"""The put goes to the page of the fault before.

In which generation: 6.12 (G0) and 7.3 (G2). It stands for the FSDAX bug where the pfn was
adjusted between get and put, so that one folio kept a reference and another lost one (KVM-FACTS
7, bug 10). A trace must show: the released page is not the one that was faulted in; one count too
high, another too low. The change logs the page that is put instead as ``victim``.
"""

from ..kvmchange import Change
from ._sites import at_release, noted

# Of the same vCPU and the page next door only: such a page is still there.
CODE = {
    "6.12": """{
	static kvm_pfn_t lab_pfn; static gfn_t lab_gfn; static struct kvm_vcpu *lab_vcpu;
	kvm_pfn_t lab_put = orig_pfn;
	if ((REFCOUNTED) && r == RET_PF_FIXED) {
		if (lab_vcpu == vcpu && lab_gfn + 1 == fault->gfn && lab_planted(fault->gfn, PFN)) {
			VICTIM;
			lab_put = lab_pfn;
		}
		lab_vcpu = vcpu; lab_gfn = fault->gfn; lab_pfn = orig_pfn;
	}
	kvm_release_pfn_clean(lab_put);
	}""".replace("VICTIM", noted("victim", "lab_gfn", "lab_pfn")),
    "7.3": """{
	static struct page *lab_page; static gfn_t lab_gfn; static struct kvm_vcpu *lab_vcpu;
	struct page *lab_own = fault->refcounted_page;
	if (lab_own && r == RET_PF_FIXED) {
		if (lab_vcpu == vcpu && lab_gfn + 1 == fault->gfn && lab_planted(fault->gfn, PFN)) {
			VICTIM;
			fault->refcounted_page = lab_page;
		}
		lab_vcpu = vcpu; lab_gfn = fault->gfn; lab_page = lab_own;
	}
	RELEASE
	}""".replace("VICTIM", noted("victim", "lab_gfn", "page_to_pfn(lab_page)")),
}

CHANGE = Change(
    name="put-wrong-page",
    title="a put goes to the page of the fault before",
    stands_for="FSDAX huge pages, put with the adjusted pfn (KVM-FACTS 7: 10)",
    shows="released page is not the one faulted in: one count too high, one too low",
    workload="prime-guest",
    found_by=("wrong-folio",),
    leads_to=("dead-mark", "use-after-free"),
    every=20,
    edits={kernel: at_release(kernel, CODE[kernel]) for kernel in ("6.12", "7.3")},
)
