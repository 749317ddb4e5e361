"""The hooks: which kernel functions pfntrace wants to see, under which names, and what for.

One entry is one noun of the fault path. A kernel difference in naming is a further candidate,
newest first, with the commit that made it so; nothing here compares versions. A hook that is
missing costs what its `without` sentence says; only `required` ones stop a recording.
May import: standard library only.
"""

import dataclasses

__all__ = (
    "HOOKS",
    "STRUCTS",
    "TRACEPOINTS",
    "ENUM_VALUES",
    "DATA_SYMBOLS",
    "VMLINUX_SYMBOLS",
    "Hook",
    "Tracepoint",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Hook:
    """One function to probe: `entry` and `leave` are program names in pfntrace.bpf.c."""

    name: str
    candidates: tuple[str, ...]
    entry: str = ""
    leave: str = ""
    without: str = ""
    required: bool = False
    #: attach to every candidate that exists, not only to the first.
    every: bool = False
    #: has fentry/fexit forms in pfntrace.bpf.c (-DFENTRY_<name>).
    fentry: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Tracepoint:
    """One raw tracepoint; its program is `raw_tracepoint__<event>`."""

    name: str
    event: str
    without: str
    required: bool = False
    #: has a second program `raw_tracepoint__<event>_again` for calls inside the first.
    again: bool = False


_REASON = "SPTE changes made by it carry the cause 'other'"

HOOKS: tuple[Hook, ...] = (
    # The page fault handlers: struct kvm_mmu.page_fault.
    Hook(
        "fault",
        ("kvm_tdp_page_fault",),
        "kp_fault_tdp",
        "kr_fault",
        "guest page faults cannot be seen",
        required=True,
    ),
    # kvm_mmu_do_page_fault() may call it directly where the compiler kept it.
    Hook("fault_tdp_mmu", ("kvm_tdp_mmu_page_fault",), "kp_fault_tdp_mmu", "kr_fault"),
    Hook(
        "fault_shadow",
        ("nonpaging_page_fault", "paging64_page_fault", "paging32_page_fault", "ept_page_fault"),
        "kp_fault_shadow",
        "kr_fault",
        "faults of shadow paging and of nested guests cannot be seen",
        required=True,
        every=True,
    ),
    # "mmu" prefix since Linux 447c375c9104 ("KVM: x86/mmu: Add "mmu" prefix fault-in helpers").
    Hook(
        "faultin",
        ("kvm_mmu_faultin_pfn", "kvm_faultin_pfn"),
        "kp_faultin",
        "kr_faultin",
        "the page behind a fault cannot be seen",
        required=True,
        fentry=True,
    ),
    Hook(
        "gup",
        ("hva_to_pfn",),
        "kp_gup",
        "kr_gup",
        "faults have no get_user_pages stage",
        fentry=True,
    ),
    Hook(
        "map",
        ("kvm_tdp_mmu_map",),
        "kp_map",
        "",
        "faults of the TDP MMU have no map stage",
        fentry=True,
    ),
    # follow_pte() gave way to follow_pfnmap_start() in 6.12:
    # Linux 6da8e9634bb7 ("mm: new follow_pfnmap API").
    Hook(
        "walk",
        ("follow_pfnmap_start", "follow_pte"),
        "kp_walk",
        "kr_walk",
        "a PFNMAP page that KVM refuses stays unnamed",
    ),
    # 6.1 and 7.x have both names; the one with underscores sees all changes.
    Hook(
        "spte",
        ("__handle_changed_spte", "handle_changed_spte"),
        "kp_spte",
        "",
        "SPTEs of the TDP MMU cannot be seen",
        required=True,
    ),
    Hook(
        "set_spte",
        ("mmu_set_spte",),
        "kp_set_spte",
        "kr_set_spte",
        "SPTE installs of the shadow MMU cannot be seen",
        required=True,
    ),
    Hook(
        "clear_spte",
        ("mmu_spte_clear_track_bits",),
        "kp_clear_spte",
        "",
        "SPTE zaps of the shadow MMU cannot be seen",
        required=True,
    ),
    Hook(
        "update_spte",
        ("mmu_spte_update",),
        "kp_update_spte",
        "",
        "protection changes of shadow SPTEs cannot be seen",
    ),
    # References given back. The pfn forms went with Linux 8dd861cc07e2
    # ("KVM: x86/mmu: Put refcounted pages instead of blindly releasing pfns").
    Hook("release_pfn_clean", ("kvm_release_pfn_clean",), "kp_release_pfn_clean"),
    Hook("release_pfn_dirty", ("kvm_release_pfn_dirty",), "kp_release_pfn_dirty"),
    Hook("release_page_clean", ("kvm_release_page_clean",), "kp_release_page_clean"),
    Hook("release_page_dirty", ("kvm_release_page_dirty",), "kp_release_page_dirty"),
    # Linux 710385395295 ("KVM: x86/mmu: Add a helper to finish a page fault").
    Hook("finish_fault", ("kvm_mmu_finish_page_fault",), "kp_finish_fault"),
    Hook("mark_pfn_accessed", ("kvm_set_pfn_accessed",), "kp_mark_pfn_accessed"),
    Hook("mark_pfn_dirty", ("kvm_set_pfn_dirty",), "kp_mark_pfn_dirty"),
    # Exported by the series "allow mapping non-refcounted pages", elsewhere inlined.
    Hook("mark_page_accessed", ("kvm_set_page_accessed",), "kp_mark_page_accessed"),
    Hook("mark_page_dirty", ("kvm_set_page_dirty",), "kp_mark_page_dirty"),
    Hook(
        "invalidate_start",
        ("kvm_mmu_notifier_invalidate_range_start",),
        "kp_invalidate_start",
        "kr_invalidate_start",
        "invalidations cannot be seen; zaps by notifiers carry no cause",
        required=True,
    ),
    Hook(
        "invalidate_end",
        ("kvm_mmu_notifier_invalidate_range_end",),
        "kp_invalidate_end",
        "kr_invalidate_end",
        "the end of invalidations cannot be seen",
    ),
    Hook(
        "aging",
        ("kvm_mmu_notifier_clear_flush_young", "kvm_mmu_notifier_clear_young"),
        "kp_reason_aging",
        "kr_reason_clearing",
        _REASON,
        every=True,
    ),
    Hook(
        "dirty_log",
        ("kvm_arch_mmu_enable_log_dirty_pt_masked",),
        "kp_reason_dirty_log",
        "kr_reason_clearing",
        _REASON,
    ),
    Hook(
        "slot_flush",
        ("kvm_arch_flush_shadow_memslot",),
        "kp_reason_slot",
        "kr_reason",
        _REASON,
    ),
    # The loop has a name of its own before it moved to a vhost task; else its worker.
    Hook(
        "recovery",
        ("kvm_recover_nx_huge_pages", "kvm_nx_huge_page_recovery_worker"),
        "kp_reason_recovery",
        "kr_reason",
        _REASON,
    ),
    Hook(
        "teardown",
        ("kvm_mmu_notifier_release",),
        "kp_reason_teardown_mn",
        "kr_reason",
        _REASON,
    ),
    Hook(
        "root",
        ("kvm_tdp_mmu_zap_invalidated_roots",),
        "kp_reason_root",
        "kr_reason",
        _REASON,
    ),
    # 6.1 to 6.6: roots die in a work queue, Linux 22b94c4b63eb
    # ("KVM: x86/mmu: Zap invalidated roots via asynchronous worker").
    Hook("root_work", ("tdp_mmu_zap_root_work",), "kp_reason_root_work", "kr_reason"),
    Hook(
        "guest_write",
        ("kvm_mmu_track_write", "kvm_mmu_pte_write"),
        "kp_reason_guest_write",
        "kr_reason",
        _REASON,
    ),
    # Underscores since Linux 2ff072ba7ad2 ("KVM: Migrate kvm_vcpu_map() to kvm_follow_pfn()").
    Hook(
        "vcpu_map",
        ("__kvm_vcpu_map", "kvm_vcpu_map"),
        "kp_vcpu_map",
        "kr_vcpu_map",
        "pins by kvm_vcpu_map() cannot be seen",
    ),
    Hook(
        "vcpu_unmap",
        ("kvm_vcpu_unmap",),
        "kp_vcpu_unmap",
        "kr_vcpu_unmap",
        "the end of pins cannot be seen",
    ),
    Hook(
        "gpc",
        ("__kvm_gpc_refresh", "kvm_gpc_refresh", "kvm_gfn_to_pfn_cache_refresh"),
        "kp_gpc",
        "kr_gpc",
        "pfn caches cannot be seen",
    ),
    Hook(
        "commit_slot",
        ("kvm_arch_commit_memory_region",),
        "kp_commit_slot",
        "kr_reason",
        "memslots show only when a guest faults in them",
    ),
    Hook(
        "create_vm",
        ("kvm_arch_init_vm",),
        "kp_create_vm",
        "",
        "a new VM shows only at its first event",
    ),
    Hook(
        "destroy_vm",
        ("kvm_arch_destroy_vm",),
        "kp_destroy_vm",
        "kr_destroy_vm",
        "the end of a VM cannot be seen",
        required=True,
    ),
)

TRACEPOINTS: tuple[Tracepoint, ...] = (
    Tracepoint("page_free", "mm_page_free", "frees of guest pages cannot be seen", again=True),
    Tracepoint("page_alloc", "mm_page_alloc", "reuse of guest pages cannot be seen", again=True),
    Tracepoint(
        "tdp_spte_changed",
        "kvm_tdp_mmu_spte_changed",
        "accessed and dirty bits that KVM clears one by one cannot be seen",
    ),
    Tracepoint(
        "fast_page_fault",
        "fast_page_fault",
        "lockless permission upgrades cannot be seen",
    ),
)

#: Structure -> members wanted, alternatives included; `offset()` picks the first that exists.
STRUCTS: dict[str, tuple[str, ...]] = {
    "kvm": (
        "mm",
        "mmu_notifier",
        "mmu_invalidate_seq",
        "mmu_invalidate_in_progress",
        "users_count",
    ),
    "kvm_vcpu": ("kvm", "vcpu_id"),
    "kvm_memory_slot": ("base_gfn", "npages", "userspace_addr", "flags", "id", "as_id"),
    "kvm_page_fault": (
        "addr",
        "error_code",
        "prefetch",
        "goal_level",
        "gfn",
        "slot",
        "mmu_seq",
        "pfn",
        "hva",
        "map_writable",
        "refcounted_page",
        "is_refcounted_page",
        "accessed_page",
    ),
    "kvm_mmu_page": ("role", "gfn", "shadowed_translation", "gfns"),
    "kvm_mmu_page_role": ("level", "smm"),
    "kvm_host_map": ("gfn", "pfn", "hva"),
    "gfn_to_pfn_cache": ("kvm", "gpa", "uhva", "pfn"),
    # Those of the series' versions that no program reads tell them apart: tracer.simulator.replay.
    "kvm_follow_pfn": (
        "slot",
        "gfn",
        "refcounted_page",
        "is_refcounted_page",
        "pin",
        "allow_write_mapping",
        "try_map_writable",
        "allow_non_refcounted_struct_page",
    ),
    "page": (
        "flags",
        "compound_head",
        "compound_info",
        "_mapcount",
        "_refcount",
        "private",
        "compound_order",
    ),
    "folio": ("_flags_1",),
    "mm_struct": ("owner",),
    "task_struct": ("tgid",),
    "vm_area_struct": ("vm_start", "vm_end", "vm_flags", "__vm_flags", "flags", "vm_file"),
    "file": ("f_inode",),
    "inode": ("i_rdev",),
    "mmu_notifier_range": ("start", "end", "event"),
    "follow_pfnmap_args": ("vma", "pfn"),
}

#: Enumeration constants wanted, in kvm's or the kernel's BTF.
ENUM_VALUES: tuple[str, ...] = (
    "RET_PF_CONTINUE",
    "RET_PF_RETRY",
    "RET_PF_EMULATE",
    "RET_PF_WRITE_PROTECTED",
    "RET_PF_INVALID",
    "RET_PF_FIXED",
    "RET_PF_SPURIOUS",
    "PG_head",
    "PG_reserved",
    "PG_lru",
    "PG_mlocked",
    "PG_swapcache",
    "ZONE_DEVICE",
    "__MAX_NR_ZONES",
)

#: Symbols wanted of the kernel proper; all others are KVM's.
VMLINUX_SYMBOLS: tuple[str, ...] = (
    "follow_pfnmap_start",
    "follow_pte",
    "vmemmap_base",
    "page_offset_base",
    "zero_pfn",
    "zero_page_pfn",
    "huge_zero_pfn",
)

#: Data symbols whose value is read: name -> bytes.
DATA_SYMBOLS: dict[str, int] = {
    "vmemmap_base": 8,
    "page_offset_base": 8,
    "zero_pfn": 8,
    "zero_page_pfn": 8,
    "huge_zero_pfn": 8,
    "tdp_enabled": 1,
    "tdp_mmu_enabled": 1,
    "shadow_host_writable_mask": 8,
    "shadow_mmu_writable_mask": 8,
    "shadow_nx_mask": 8,
    "shadow_x_mask": 8,
    "shadow_xs_mask": 8,
    "shadow_xu_mask": 8,
    "shadow_user_mask": 8,
    "shadow_accessed_mask": 8,
    "shadow_dirty_mask": 8,
    "shadow_present_mask": 8,
    "shadow_acc_track_mask": 8,
    "shadow_mmio_mask": 8,
    "shadow_mmio_value": 8,
    "shadow_me_mask": 8,
    "shadow_me_value": 8,
    "shadow_refcounted_mask": 8,
}
