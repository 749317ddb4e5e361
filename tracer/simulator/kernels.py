"""The generations of KVM's fault-in path, as data: what a kernel does with a page, line by line.

Every field is a statement that a reader of the kernel can check; the source of each kernel's line
stands beside it. Nothing here is chosen by a version number: the model asks these fields only.
May import: `probes.facts`, standard library.
"""

import dataclasses
from collections.abc import Mapping
from typing import Final

from probes.facts import Field, KernelFacts

__all__ = ("KERNELS", "REFCOUNTED_BIT", "Flags", "Kernel", "facts_of", "profile_of")

_NONPRESENT: Final = 1 << 63
#: SPTE_MMU_PAGE_REFCOUNTED of the series v7 to v11, arch/x86/kvm/mmu/spte.h.
REFCOUNTED_BIT: Final = 1 << 59
_RESULTS_OLD: Final = ("continue", "retry", "emulate", "invalid", "fixed", "spurious")
#: Linux 2876624e1adc era: RET_PF_WRITE_PROTECTED came between emulate and invalid (v6.12).
_RESULTS_NEW: Final = (
    "continue",
    "retry",
    "emulate",
    "write_protected",
    "invalid",
    "fixed",
    "spurious",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Flags:
    """PG_* words of an anonymous page through its life, as the lab's recordings show them."""

    fresh: int  #: just allocated, in a per-cpu LRU batch
    released: int  #: after KVM gave its first reference back
    settled: int  #: on an LRU list
    marked: int  #: marked dirty by KVM
    freed: int  #: as the buddy allocator gets it
    plain: int = 0xFFFFFC0000000  #: a driver's page, or one just handed out
    lru: int = 5  #: the number of PG_lru


@dataclasses.dataclass(frozen=True, slots=True)
class Kernel:
    """One generation.

    put             where the fault's reference is given back: "after_unlock", "locked" (still
                    under mmu_lock), "faultin" (inside the fault-in function), "never"
    put_call        the RELEASE record that this makes; "" if the put cannot be seen
    pfnmap          what hva_to_pfn_remapped() does for a page in a VM_PFNMAP mapping:
                    "unless_zero" (a reference, or -EFAULT if the count is 0), "optional" (a
                    reference for a moment if the count is not 0), "none" (no reference ever)
    fault_mark      is the page marked accessed by the fault itself: "", "locked", "unlocked"
    zap_marks       which pages are marked accessed or dirty at a zap: "all", "bit" (those whose
                    SPTE has bit 59), "none"
    says_refcounted does struct kvm_page_fault say whether the page is reference-counted?
    bit_tdp, bit_shadow
                    is bit 59 set in SPTEs of counted pages?
    shadow_refuses  without TDP, is a page that cannot be counted refused (-EFAULT)?
    prefetch_call, prefetch_direct_call
                    the RELEASE record that the put of a prefetched page makes: in prefetch_gpte(),
                    for a guest's own page tables, and in direct_pte_prefetch_many(), for a guest
                    without them; "" is an inline put_page(), which nothing shows
    recovers_in_place
                    when dirty logging ends, are large leaves put in place of their pieces at once
                    (kvm_tdp_mmu_recover_huge_pages()), or only zapped, to be faulted in anew
                    (kvm_tdp_mmu_zap_collapsible_sptes())?
    retry_call      the RELEASE record that a lockless retry makes when it gives the page back
    walk_tells      can the walk of a PFNMAP be hooked, so that records tell of its VMA?
    spurious_early  is a leaf that allows the access left alone? Before, it is written anew, and
                    make_spte() leaves the dirty bit out over a writable SPTE ("goto out")
    lockless_retry  are invalidations looked for before and after getting the pfn, without lock?
    seq_local       is mmu_seq a local variable of the fault handler, so that a recording shows what
                    it was at the call of kvm_faultin_pfn(), a moment after KVM took it?
    pin_bias        what kvm_vcpu_map() adds to the count: a reference, or FOLL_PIN's bias
    bugs            what this kernel does wrong as it was mailed (names of `bugs.BUGS`)
    """

    name: str
    title: str
    generation: str
    release: str
    source: str
    put: str
    put_call: str
    pfnmap: str
    flags: Flags
    results: tuple[str, ...] = _RESULTS_OLD
    shadow_put: str = ""  #: as `put`, where the shadow MMU differs
    prefetch_call: str = "pfn_clean"
    prefetch_direct_call: str = ""
    fault_mark: str = ""
    shadow_fault_mark: str = ""
    zap_marks: str = "all"
    says_refcounted: bool = False
    bit_tdp: bool = False
    bit_shadow: bool = False
    shadow_refuses: bool = False
    lockless_retry: bool = False
    seq_local: bool = False
    retry_call: str = ""
    walk_tells: bool = False
    spurious_early: bool = False
    error_in_faultin: bool = False  #: does the fault-in function itself return -EFAULT?
    pin_bias: int = 1
    pin_call: str = "page_dirty"
    cache_call: str = "pfn_clean"  #: the put in hva_to_pfn_retry() of a pfn cache
    nonpresent: int = 0
    frozen: int = 0x5A0
    teardown_frozen: bool = False  #: do zaps of whole tables leave the frozen value?
    recovers_in_place: bool = False
    dirty_log_marks: bool = False  #: is a page marked dirty when the log write-protects it?
    alloc_count: int = 1  #: count of a page at mm_page_alloc
    lru_batch: int = 15  #: PAGEVEC_SIZE, include/linux/pagevec.h
    activates: bool = False  #: does the release put the page into an activation batch?
    fault_bits: int = 0  #: PFERR_* bits that every TDP fault has: a guest physical address
    members: tuple[str, ...] = ()  #: of struct kvm_page_fault, that tell the generations apart
    follow_members: tuple[str, ...] = ()  #: of struct kvm_follow_pfn
    bugs: tuple[str, ...] = ()

    def result(self, name: str) -> int:
        """Return the RET_PF_* value of a name in this kernel."""
        return self.results.index(name)


_FLAGS_61: Final = Flags(
    fresh=0xFFFFFC00A0006, released=0xFFFFFC00A0024, settled=0xFFFFFC00A0034,
    marked=0xFFFFFC00A003C, freed=0xFFFFFC00A000E, lru=4,
)  # fmt: skip
_FLAGS_612: Final = Flags(
    fresh=0xFFFFFC002090C, released=0xFFFFFC0020B0C, settled=0xFFFFFE0020A2C,
    marked=0xFFFFFE0020A3C, freed=0xFFFFFC2020A1C,
)  # fmt: skip
_FLAGS_73: Final = Flags(
    fresh=0xFFFFFC202080C, released=0xFFFFFC402081C, settled=0xFFFFFDA02083C,
    marked=0xFFFFFDA02083C, freed=0xFFFFFC402081C,
)  # fmt: skip

_G0A: Final = Kernel(
    name="6.1",
    title="Linux 6.1: reference held through the fault, put after mmu_lock",
    generation="G0a",
    release="6.1.0-sim",
    source="direct_page_fault(), kvm_release_pfn_clean(), arch/x86/kvm/mmu/mmu.c of 6.1.192",
    put="after_unlock",  # KVM-FACTS 0.1: kvm_release_pfn_clean(orig_pfn) behind the unlock
    put_call="pfn_clean",  # KVM-FACTS 1; orig_pfn, not the adjusted one: KVM-FACTS 7 #10
    pfnmap="unless_zero",  # hva_to_pfn_remapped(), f8be156be163; else -EFAULT: KVM-FACTS 7 #1, #2
    flags=_FLAGS_61,
    # results: KVM-FACTS 5.3. lockless_retry is False: "no pre-lock retry", KVM-FACTS 1.
    # zap_marks is "all": "again accessed/dirty at SPTE zap", KVM-FACTS 0.1.
    teardown_frozen=True,  # REMOVED_SPTE behind zaps of whole roots: recordings, ARCHITECTURE
    activates=True,  # mark_page_accessed(), mm/swap.c: recordings show one more reference
    seq_local=True,  # direct_page_fault(); struct kvm_page_fault has no mmu_seq: BTF, ARCHITECTURE
    members=("hva",),  # struct kvm_page_fault: KVM-FACTS 1
)
_G0B: Final = dataclasses.replace(
    _G0A,
    name="6.12",
    title="Linux 6.12: as 6.1, with lockless retries around fault-in",
    generation="G0b",
    release="6.12.0-sim",
    source="kvm_faultin_pfn(), Linux d02c357e5bfa (lockless retry), mmu.c of 6.12.117",
    flags=_FLAGS_612,
    results=_RESULTS_NEW,  # KVM-FACTS 5.3
    seq_local=False,  # mmu_seq of struct kvm_page_fault: BTF
    lockless_retry=True,  # KVM-FACTS 1b: two checks, mmu_invalidate_retry_gfn_unsafe()
    walk_tells=True,  # hva_to_pfn_remapped() is a function of its own: recordings
    retry_call="pfn_clean",  # KVM-FACTS 1b: "the second one itself releases the ref"
    error_in_faultin=True,  # KVM-FACTS 1b: kvm_handle_error_pfn() is inside of kvm_faultin_pfn()
    nonpresent=_NONPRESENT,  # SHADOW_NONPRESENT_VALUE: KVM-FACTS 5.2
    frozen=_NONPRESENT | 0x5A0,  # FROZEN_SPTE: KVM-FACTS 5.2
    teardown_frozen=False,  # recordings, ARCHITECTURE
    dirty_log_marks=True,  # clear_dirty_pt_masked(): kvm_set_pfn_dirty(), tdp_mmu.c
    lru_batch=31,  # PAGEVEC_SIZE, include/linux/pagevec.h: recordings, ARCHITECTURE
    activates=False,  # recordings
    fault_bits=1 << 32,  # PFERR_GUEST_FINAL_MASK: recordings
)
#: The out-of-tree series "KVM: allow mapping non-refcounted pages": bases are 6.4 to 6.8.
_G1: Final = dataclasses.replace(
    _G0A,
    generation="G1",
    flags=_FLAGS_612,
    seq_local=False,  # mmu_seq of struct kvm_page_fault: BTF
    teardown_frozen=False,
    activates=False,
    zap_marks="bit",  # KVM-FACTS 2.3: readers test the bit, is_refcounted_page_spte()
    pfnmap="optional",  # KVM-FACTS 2.4 v8, v9: a count of 0 is no error where KVM is guarded
    put="faultin",  # KVM-FACTS 0.1: v7, v8, v10, v11 put in hva_to_pfn*()
    put_call="",  # KVM-FACTS 2.7: "no kvm_release_pfn_clean per fault"
    error_in_faultin=True,
    says_refcounted=True,  # KVM-FACTS 2.2: is_refcounted_page of struct kvm_page_fault
    bit_tdp=True,  # KVM-FACTS 2.3
    bit_shadow=True,  # KVM-FACTS 2.3: up to v9 "set unconditionally"
    members=("hva", "is_refcounted_page"),  # KVM-FACTS 2.2
)
_V7: Final = dataclasses.replace(
    _G1,
    name="v7",
    title="series v7: reference put at once; the page is marked accessed outside of mmu_lock",
    release="6.5.0-sim-v7",
    source="KVM-FACTS 2.4 v7; hva_to_pfn*() with !FOLL_GET; kvm_set_page_accessed() unlocked",
    fault_mark="unlocked",  # KVM-FACTS 0.1, 7 #3: "accessed outside lock after ref is gone"
    shadow_fault_mark="unlocked",
    follow_members=("slot", "gfn", "flags", "allow_write_mapping", "is_refcounted_page"),  # 2.1
)
_V8: Final = dataclasses.replace(
    _G1,
    name="v8",
    title="series v8: reference put at once, except without TDP, where it stays (leak)",
    release="6.5.0-sim-v8",
    source="KVM-FACTS 2.4 v8, 7 #4; FOLL_GET for !tdp whose release was removed",
    fault_mark="locked",  # KVM-FACTS 0.1: "accessed under lock"
    shadow_fault_mark="locked",
    shadow_put="never",  # KVM-FACTS 7 #4
    follow_members=("slot", "gfn", "flags", "try_map_writable", "is_refcounted_page"),  # 2.1
    bugs=("missing_put_shadow",),
)
_V9_MAILED: Final = dataclasses.replace(
    _G1,
    name="v9-mailed",
    title="series v9 as mailed: references are taken and never put (leak)",
    release="6.6.0-sim-v9",
    source="KVM-FACTS 2.4 v9, 7 #5; the fault path only marks the page accessed",
    put="never",  # KVM-FACTS 0.1, 7 #5
    fault_mark="locked",  # KVM-FACTS 0.1: "direct/tdp under lock, paging_tmpl outside"
    shadow_fault_mark="unlocked",
    follow_members=(  # KVM-FACTS 2.1
        "slot", "gfn", "flags", "try_map_writable", "is_refcounted_page",
        "allow_non_refcounted_struct_page",
    ),
    bugs=("missing_put",),
)  # fmt: skip
_V9: Final = dataclasses.replace(
    _V9_MAILED,
    name="v9",
    title="series v9 corrected: kvm_release_page_clean() after mmu_lock",
    release="6.6.0-sim-v9c",
    source="KVM-FACTS 0.1 v9 corrected; kvm_release_page_clean(pfn_to_page(fault->pfn))",
    put="after_unlock",  # KVM-FACTS 0.1
    put_call="page_clean",  # KVM-FACTS 0.1; recordings of the port to 6.12
    fault_mark="",  # "at release": kvm_release_page_clean() marks by itself
    shadow_fault_mark="",
    bugs=(),
)
_V10: Final = dataclasses.replace(
    _G1,
    name="v10",
    title="series v10: reference put in kvm_follow_refcounted_pfn(); bit 59 only with TDP",
    release="6.8.0-sim-v10",
    source="KVM-FACTS 2.2, 2.3 v10; spte_has_refcount_bit(), fault->accessed_page under mmu_lock",
    fault_mark="locked",  # KVM-FACTS 0.1: kvm_set_page_accessed(fault->accessed_page) under lock
    shadow_fault_mark="locked",
    says_refcounted=False,  # KVM-FACTS 2.2: accessed_page holds no reference
    bit_shadow=False,  # KVM-FACTS 2.3: spte_has_refcount_bit()
    shadow_refuses=True,  # KVM-FACTS 2.3: "refuse non-refcounted pages" without the bit
    members=("hva", "accessed_page"),  # KVM-FACTS 2.2
    follow_members=("slot", "gfn", "flags", "try_map_writable", "refcounted_page"),  # 2.1
)
_V11: Final = dataclasses.replace(
    _V10,
    name="v11",
    title="series v11: as v10, with shadow_refcounted_mask",
    release="6.8.0-sim-v11",
    source="KVM-FACTS 2.3 v11; shadow_refcounted_mask set in kvm_configure_mmu()",
)
_G2: Final = dataclasses.replace(
    _G0B,
    name="6.13",
    title="Linux 6.13 to 7.x: reference put under mmu_lock; PFNMAP memory has none",
    generation="G2",
    release="7.3.0-sim",
    source="kvm_mmu_finish_page_fault(), Linux 8dd861cc07e2, 1c7b627e9306; mmu.c of 7.3.4",
    put="locked",  # KVM-FACTS 0.1, 3: kvm_mmu_finish_page_fault() before the unlock
    put_call="finish_fault",  # KVM-FACTS 3
    # kvm_mmu_finish_page_fault() is inlined into kvm_mmu_faultin_pfn(): recordings
    retry_call="",
    spurious_early=True,  # KVM-FACTS 4: "7.x early SPURIOUS returns emit nothing"
    prefetch_call="page_dirty",  # KVM-FACTS 3: kvm_mmu_prefetch_sptes()
    prefetch_direct_call="page_dirty",  # the same function
    pfnmap="none",  # KVM-FACTS 0.1: "PFNMAP takes none"
    flags=_FLAGS_73,
    zap_marks="none",  # KVM-FACTS 0.1: "zap/age touch no struct page"
    says_refcounted=True,  # KVM-FACTS 3: refcounted_page of struct kvm_page_fault
    pin_bias=1024,  # 2bcb52a3602b, FOLL_PIN: KVM-FACTS 3, 6
    pin_call="",  # unpin_user_page(): KVM-FACTS 3
    cache_call="page_clean",  # 3154ddcb6a90: KVM-FACTS 3
    frozen=_NONPRESENT | 0x1A0,  # KVM-FACTS 5.2
    dirty_log_marks=False,  # 365e31920844: "dirty decided at map time", KVM-FACTS 3
    recovers_in_place=True,  # kvm_tdp_mmu_recover_huge_pages(): recordings, ARCHITECTURE
    alloc_count=0,  # mm_page_alloc is before the count is set: recordings
    members=("refcounted_page",),  # KVM-FACTS 3: offset 64, where hva was
    follow_members=("slot", "gfn", "hva", "flags", "pin", "map_writable", "refcounted_page"),  # 3
)

#: All kernels that can be simulated, oldest idea first.
KERNELS: Final[Mapping[str, Kernel]] = {
    kernel.name: kernel for kernel in (_G0A, _G0B, _V7, _V8, _V9_MAILED, _V9, _V10, _V11, _G2)
}

#: NPT: arch/x86/kvm/mmu/spte.c, kvm_mmu_reset_all_pte_masks(), without encrypted memory.
_MASKS: Final = {
    "shadow_accessed_mask": 1 << 5,
    "shadow_acc_track_mask": 0,
    "shadow_dirty_mask": 1 << 6,
    "shadow_host_writable_mask": 1 << 9,
    "shadow_me_mask": 0,
    "shadow_me_value": 0,
    "shadow_mmio_mask": 1 << 51 | 1,
    "shadow_mmio_value": 1 << 51 | 1,
    "shadow_mmu_writable_mask": 1 << 10,
    "shadow_nx_mask": 1 << 63,
    "shadow_present_mask": 1,
    "shadow_user_mask": 1 << 2,
}

_COMMON_HOOKS: Final = (
    ("fault", "kvm_tdp_page_fault"),
    ("fault_shadow", "ept_page_fault"),
    ("gup", "hva_to_pfn"),
    ("map", "kvm_tdp_mmu_map"),
    ("set_spte", "mmu_set_spte"),
    ("clear_spte", "mmu_spte_clear_track_bits"),
    ("update_spte", "mmu_spte_update"),
    ("release_page_clean", "kvm_release_page_clean"),
    ("release_page_dirty", "kvm_release_page_dirty"),
    ("invalidate_start", "kvm_mmu_notifier_invalidate_range_start"),
    ("invalidate_end", "kvm_mmu_notifier_invalidate_range_end"),
    ("aging", "kvm_mmu_notifier_clear_young"),
    ("dirty_log", "kvm_arch_mmu_enable_log_dirty_pt_masked"),
    ("slot_flush", "kvm_arch_flush_shadow_memslot"),
    ("teardown", "kvm_mmu_notifier_release"),
    ("root", "kvm_tdp_mmu_zap_invalidated_roots"),
    ("vcpu_unmap", "kvm_vcpu_unmap"),
    ("commit_slot", "kvm_arch_commit_memory_region"),
    ("create_vm", "kvm_arch_init_vm"),
    ("destroy_vm", "kvm_arch_destroy_vm"),
    ("page_free", "mm_page_free"),
    ("page_alloc", "mm_page_alloc"),
    ("tdp_spte_changed", "kvm_tdp_mmu_spte_changed"),
    ("fast_page_fault", "fast_page_fault"),
)
_OPTIONAL_HOOKS: Final = {
    "G0a": (
        ("faultin", "kvm_faultin_pfn"), ("walk", "follow_pte"), ("spte", "__handle_changed_spte"),
        ("release_pfn_clean", "kvm_release_pfn_clean"),
        ("release_pfn_dirty", "kvm_release_pfn_dirty"),
        ("mark_pfn_accessed", "kvm_set_pfn_accessed"), ("mark_pfn_dirty", "kvm_set_pfn_dirty"),
        ("guest_write", "kvm_mmu_pte_write"), ("vcpu_map", "kvm_vcpu_map"),
        ("gpc", "kvm_gfn_to_pfn_cache_refresh"),
    ),
    "G0b": (
        ("faultin", "kvm_faultin_pfn"), ("walk", "follow_pfnmap_start"),
        ("spte", "handle_changed_spte"), ("release_pfn_clean", "kvm_release_pfn_clean"),
        ("release_pfn_dirty", "kvm_release_pfn_dirty"),
        ("mark_pfn_accessed", "kvm_set_pfn_accessed"), ("mark_pfn_dirty", "kvm_set_pfn_dirty"),
        ("recovery", "kvm_nx_huge_page_recovery_worker"), ("guest_write", "kvm_mmu_track_write"),
        ("vcpu_map", "kvm_vcpu_map"), ("gpc", "__kvm_gpc_refresh"),
    ),
    "G1": (
        ("faultin", "kvm_faultin_pfn"), ("walk", "follow_pte"), ("spte", "handle_changed_spte"),
        ("release_pfn_clean", "kvm_release_pfn_clean"),
        ("release_pfn_dirty", "kvm_release_pfn_dirty"),
        ("mark_pfn_accessed", "kvm_set_page_accessed"), ("mark_pfn_dirty", "kvm_set_page_dirty"),
        ("guest_write", "kvm_mmu_track_write"), ("vcpu_map", "kvm_vcpu_map"),
        ("gpc", "__kvm_gpc_refresh"),
    ),
    "G2": (
        ("faultin", "kvm_mmu_faultin_pfn"), ("walk", "follow_pfnmap_start"),
        ("spte", "__handle_changed_spte"), ("finish_fault", "kvm_mmu_finish_page_fault"),
        ("recovery", "kvm_nx_huge_page_recovery_worker"), ("guest_write", "kvm_mmu_track_write"),
        ("vcpu_map", "__kvm_vcpu_map"), ("gpc", "__kvm_gpc_refresh"),
    ),
}  # fmt: skip
_RELEASE_HOOKS: Final = (
    "release_pfn_clean", "release_pfn_dirty", "mark_pfn_accessed", "mark_pfn_dirty", "finish_fault",
    "recovery",
)  # fmt: skip


def facts_of(kernel: Kernel, cpus: int) -> KernelFacts:
    """Return what an observer would see of the kernel: the part that a reader of traces needs."""
    names = {"addr": 64, "error_code": 32 if kernel.generation == "G0a" else 64, "pfn": 64}
    names |= dict.fromkeys(kernel.members, 64)
    structs = {"kvm_page_fault": _layout(names)}
    if kernel.follow_members:
        structs["kvm_follow_pfn"] = _layout(dict.fromkeys(kernel.follow_members, 64))
    values = dict(_MASKS)
    if kernel.name == "v11":
        values["shadow_refcounted_mask"] = REFCOUNTED_BIT
    return KernelFacts(
        release=kernel.release,
        version=f"pfntrace simulator, {kernel.title}",
        machine="x86_64",
        cpus=cpus,
        structs=structs,
        enums={
            **{f"RET_PF_{name.upper()}": value for value, name in enumerate(kernel.results)},
            "PG_lru": kernel.flags.lru,
        },
        values=values,
        btf_vmlinux=True,
        btf_kvm=True,
        dev_kvm=True,
    )


def _layout(members: Mapping[str, int]) -> dict[str, Field]:
    return {name: Field(64 * at, bits) for at, (name, bits) in enumerate(members.items())}


def profile_of(kernel: Kernel) -> dict[str, object]:
    """Return the head of a trace about the hooks, as `tracer.recording` writes it."""
    chosen = (*_COMMON_HOOKS, *_OPTIONAL_HOOKS[kernel.generation])
    there = {name for name, _ in chosen}
    return {
        "generation": kernel.generation,
        "hooks": [
            {"hook": name, "symbols": [symbol], "how": "kprobe", "note": "simulated"}
            for name, symbol in chosen
        ],
        "missing": [
            {
                "hook": name,
                "tried": [],
                "why": "not of this kernel generation",
                "without": "",
                "required": False,
            }
            for name in _RELEASE_HOOKS
            if name not in there
        ],
        "failed": [],
        "results": {str(value): name for value, name in enumerate(kernel.results)},
    }
