"""Places of KVM's source that several changes edit, by the lab's kernel. Imports only
``kvmchange``.
"""

from ..kvmchange import Edit

MMU = "arch/x86/kvm/mmu/mmu.c"
TDP_MMU = "arch/x86/kvm/mmu/tdp_mmu.c"
PAGING = "arch/x86/kvm/mmu/paging_tmpl.h"
MAIN = "virt/kvm/kvm_main.c"
NESTED = "arch/x86/kvm/svm/nested.c"

#: Where a fault's reference is put: TDP MMU, shadow MMU without and with guest paging.
RELEASES = (
    (MMU, "kvm_tdp_mmu_page_fault"),
    (MMU, "direct_page_fault"),
    (PAGING, "FNAME(page_fault)"),
)
RELEASE = {
    "6.12": "kvm_release_pfn_clean(orig_pfn);",
    "7.3": "kvm_mmu_finish_page_fault(vcpu, fault, r);",
}
#: The page whose reference is put there, as pfn, and whether there is one.
PFN = {"6.12": "orig_pfn", "7.3": "page_to_pfn(fault->refcounted_page)"}
REFCOUNTED = {
    "6.12": "kvm_pfn_to_refcounted_page(orig_pfn)",
    "7.3": "fault->refcounted_page",
}


def at_release(kernel: str, code: str) -> tuple[Edit, ...]:
    """Return edits that replace each put of a fault's reference by *code*.

    In *code* ``RELEASE`` is the put itself, ``PFN`` the page, ``REFCOUNTED`` whether there is one.
    """
    for word, texts in (("RELEASE", RELEASE), ("PFN", PFN), ("REFCOUNTED", REFCOUNTED)):
        code = code.replace(word, texts[kernel])
    return tuple(Edit(path, function, RELEASE[kernel], code) for path, function in RELEASES)


def noted(word: str, gfn: str, pfn: str) -> str:
    """Return C that logs a page beside those that are counted: ``victim``, or ``freed`` already."""
    line = rf'printk(KERN_INFO "lab-planted: {word} gfn=0x%llx pfn=0x%llx\\n"'
    return f"{line}, (u64)({gfn}), (u64)({pfn}))"


def before_lock(code: str) -> tuple[Edit, ...]:
    """Return the edit that runs *code* in a fault of the TDP MMU between fault-in and mmu_lock."""
    function = "kvm_tdp_mmu_page_fault"
    lock = "read_lock(&vcpu->kvm->mmu_lock);"
    return (Edit(MMU, function, lock, f"{code} {lock}"),)
