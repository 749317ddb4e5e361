"""The series "KVM: allow mapping non-refcounted pages" on Linux 6.12, restated in our own words.

``series()`` gives the edits of one version. What is the same in all (the struct, the bit in the
SPTE, who looks at it) is in ``series/``; what differs is when a fault's reference is put and
where the page is marked accessed: see KVM-FACTS 0.1 and 2. Imports only ``kvmchange`` and
``_sites``.
"""

from ..kvmchange import WHOLE, Edit
from ._sites import MAIN, MMU, PAGING, TDP_MMU

__all__ = ("FILES", "MARK_ACCESSED", "series")

HOST = "include/linux/kvm_host.h"
SPTE_C = "arch/x86/kvm/mmu/spte.c"
SPTE_H = "arch/x86/kvm/mmu/spte.h"
INTERNAL = "arch/x86/kvm/mmu/mmu_internal.h"

#: Where our files go in the kernel's tree.
FILES = {
    "include/linux/lab_series.h": "series/lab_series.h",
    "virt/kvm/lab_series.c": "series/lab_series.c",
    "virt/kvm/lab_vcpu_map.c": "series/lab_vcpu_map.c",
    "virt/kvm/lab_vcpu_unmap.c": "series/lab_vcpu_unmap.c",
    "arch/x86/kvm/mmu/lab_faultin.c": "series/lab_faultin.c",
    "arch/x86/kvm/mmu/lab_spte.h": "series/lab_spte.h",
}
#: The page of a fault is marked accessed; its reference stays as it is.
MARK_ACCESSED = "if (PAGE) kvm_set_page_accessed(PAGE);"


def series(version: int, *, locked: str, unlocked: str, retry: str) -> tuple[Edit, ...]:
    """Return the edits of *version*: what a fault does *locked* and *unlocked* at its end.

    *retry* is what the lockless retry does that Linux d02c357e5bfa added after the series was
    written. ``PAGE`` in them is the fault's struct page, or NULL.
    """
    return (*_common_code(version), *_sptes(version), *_fault(version, locked, unlocked, retry))


def _common_code(version: int) -> tuple[Edit, ...]:
    header = (
        f"#define LAB_SERIES {version}\n#include <linux/lab_series.h>\n\nstruct kvm_host_map {{"
    )
    gpc = """hva_to_pfn(&(struct kvm_follow_pfn){
		.flags = FOLL_WRITE | FOLL_GET, .hva = gpc->uhva });"""
    exported = tuple(
        Edit(
            MAIN,
            "",
            f"static void {name}(struct page *page)",
            rf"EXPORT_SYMBOL_GPL({name}); void {name}(struct page *page)",
        )
        for name in ("kvm_set_page_dirty", "kvm_set_page_accessed")
    )
    return (
        Edit(HOST, "", "kvm_pfn_t pfn; kvm_pfn_t gfn; };", r"bool is_refcounted_page; \g<0>"),
        Edit(HOST, "", "struct kvm_host_map {", header),
        Edit(
            "virt/kvm/kvm_mm.h",
            "",
            "kvm_pfn_t hva_to_pfn(unsigned long addr, bool atomic, bool interruptible,"
            " bool *async, bool write_fault, bool *writable);",
            "",
        ),
        *(
            Edit(MAIN, function, WHOLE, ours, was=was)
            for function, was, ours in (
                ("hva_to_pfn_fast", "1aa97109c9de", ""),
                ("hva_to_pfn_slow", "7f43338e9aab", ""),
                ("kvm_try_get_pfn", "e35dfb90d0f0", ""),
                ("hva_to_pfn_remapped", "10701bcfc24d", ""),
                ("__gfn_to_pfn_memslot", "dddf37ec80df", ""),
                ("hva_to_pfn", "cf98a927cce0", '#include "lab_series.c"'),
                ("kvm_vcpu_map", "6586ebc95cf6", '#include "lab_vcpu_map.c"'),
                ("kvm_vcpu_unmap", "0afa46e55d8a", '#include "lab_vcpu_unmap.c"'),
            )
        ),
        # The assertion that all versions begin with.
        Edit(
            MAIN,
            "kvm_is_ad_tracked_page",
            "return !PageReserved(page);",
            r"if (WARN_ON_ONCE(!page_count(page))) return false; \g<0>",
        ),
        *exported,
        Edit(
            "virt/kvm/pfncache.c",
            "hva_to_pfn_retry",
            "hva_to_pfn(gpc->uhva, false, false, NULL, true, NULL);",
            gpc,
        ),
    )


# The bit in the SPTE, and every place that marks a page by what an SPTE says.
def _sptes(version: int) -> tuple[Edit, ...]:
    marks = (
        (MMU, "mmu_spte_update", "accessed", "spte_to_pfn(old_spte)", "old_spte"),
        (MMU, "mmu_spte_update", "dirty", "spte_to_pfn(old_spte)", "old_spte"),
        (MMU, "mmu_spte_clear_track_bits", "accessed", "pfn", "old_spte"),
        (MMU, "mmu_spte_clear_track_bits", "dirty", "pfn", "old_spte"),
        (MMU, "spte_wrprot_for_clear_dirty", "dirty", "spte_to_pfn(*sptep)", "*sptep"),
        (MMU, "kvm_rmap_age_gfn_range", "dirty", "spte_to_pfn(spte)", "spte"),
        (TDP_MMU, "handle_changed_spte", "dirty", "spte_to_pfn(old_spte)", "old_spte"),
        (TDP_MMU, "handle_changed_spte", "accessed", "spte_to_pfn(old_spte)", "old_spte"),
        (TDP_MMU, "age_gfn_range", "dirty", "spte_to_pfn(iter->old_spte)", "iter->old_spte"),
        (TDP_MMU, "clear_dirty_pt_masked", "dirty", "spte_to_pfn(iter.old_spte)", "iter.old_spte"),
    )
    edits = tuple(
        Edit(path, function, f"kvm_set_pfn_{what}({pfn});", f"lab_spte_set_{what}({spte});")
        for path, function, what, pfn, spte in marks
    )
    mask = (
        Edit(MMU, "", "bool tdp_enabled = false;", r"\g<0> u64 shadow_refcounted_mask;"),
        Edit(
            MMU,
            "kvm_configure_mmu",
            "tdp_enabled = enable_tdp;",
            r"\g<0> shadow_refcounted_mask = enable_tdp ? SPTE_MMU_PAGE_REFCOUNTED : 0;",
        ),
    )
    return (
        *edits,
        Edit(
            MMU,
            "mmu_spte_clear_track_bits",
            "kvm_pfn_to_refcounted_page(pfn);",
            "lab_spte_page(old_spte);",
        ),
        Edit(SPTE_H, "", "u64 mark_spte_for_access_track(u64 spte);", _with_include("lab_spte.h")),
        *(
            Edit(path, function, "bool host_writable, u64 *new_spte", _MAKE_SPTE_ARGUMENTS)
            for path, function in ((SPTE_H, ""), (SPTE_C, "make_spte"))
        ),
        Edit(
            SPTE_C,
            "make_spte",
            "u64 spte = SPTE_MMU_PRESENT_MASK;",
            "u64 spte = SPTE_MMU_PRESENT_MASK | lab_refcounted_mask(is_refcounted);",
        ),
        *(mask if version >= 11 else ()),
    )


_MAKE_SPTE_ARGUMENTS = "bool host_writable, bool is_refcounted, u64 *new_spte"


def _with_include(name: str) -> str:
    return rf'\g<0>\n#include "{name}"'


def _fault(version: int, locked: str, unlocked: str, retry: str) -> tuple[Edit, ...]:
    member = "struct page *accessed_page;" if version >= 10 else "bool is_refcounted_page;"
    ends = (
        (MMU, "kvm_tdp_mmu_page_fault", "read_unlock"),
        (MMU, "direct_page_fault", "write_unlock"),
        (PAGING, "FNAME(page_fault)", "write_unlock"),
    )
    page = "LAB_PAGE(fault, orig_pfn)"
    return (
        Edit(INTERNAL, "", "bool map_writable;", rf"\g<0> {member}"),
        Edit(MMU, "__kvm_faultin_pfn", WHOLE, '#include "lab_faultin.c"', was="7658b4d1fdc0"),
        Edit(
            MMU,
            "kvm_faultin_pfn",
            "kvm_release_pfn_clean(fault->pfn);",
            retry.replace("PAGE", "LAB_PAGE(fault, fault->pfn)"),
        ),
        Edit(
            MMU,
            "mmu_set_spte",
            "host_writable, &spte);",
            "host_writable, !fault || LAB_REFCOUNTED(fault), &spte);",
        ),
        Edit(
            TDP_MMU,
            "tdp_mmu_map_handle_target_level",
            "fault->map_writable, &new_spte);",
            "fault->map_writable, LAB_REFCOUNTED(fault), &new_spte);",
        ),
        Edit(
            PAGING,
            "FNAME(sync_spte)",
            "host_writable, &spte);",
            "host_writable, is_refcounted_page_spte(spte), &spte);",
        ),
        *(
            Edit(
                path,
                function,
                f"{unlock}(&vcpu->kvm->mmu_lock); kvm_release_pfn_clean(orig_pfn);",
                f"{locked} {unlock}(&vcpu->kvm->mmu_lock); {unlocked}".replace("PAGE", page),
            )
            for path, function, unlock in ends
        ),
    )
