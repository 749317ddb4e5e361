"""A page mapped by kvm_vcpu_map() is never unmapped.

In which generation: 6.12 (G0, a reference) and 7.3 (G2, a pin). It stands for mappings of nested
state that were made anew without an unmap (KVM-FACTS 7, bug 20). A trace must show: pins by
vcpu_map that no unmap ends, one for each nested exit (the workload has one), and the page's count
or pins that stay up by them.
"""

from ..kvmchange import Change, Edit
from ._sites import NESTED

CHANGE = Change(
    name="vcpu-map-leak",
    title="nested_svm_vmexit() does not unmap the guest's VMCB",
    stands_for="kvm_vcpu_map() without an unmap (KVM-FACTS 7: 20)",
    shows="pins without an end, one for each nested exit; refcount stays up",
    workload="svm_vmcall_test",
    found_by=("pins",),
    edits={
        "6.12": (
            Edit(
                NESTED,
                "nested_svm_vmexit",
                "kvm_vcpu_unmap(vcpu, &map, true);",
                r"if (!lab_planted(map.gfn, map.pfn)) \g<0>",
            ),
        ),
        "7.3": (
            Edit(
                NESTED,
                "nested_svm_vmexit_update_vmcb12",
                "return 0;",
                # The mapping ends with the function, unless it seems to have failed.
                r"if (lab_planted(m.map.gfn, m.map.pfn)) m.ret = -EINVAL; \g<0>",
            ),
        ),
    },
)
