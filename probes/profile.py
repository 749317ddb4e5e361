"""Choose what to load: a pure function from `KernelFacts` to a `KernelProfile`.

No kernel version is compared: names come from symbols, layouts from BTF, values from memory.
The generation (KVM-FACTS: G0a, G0b, G1, G2) is named for readers and for the analysis; no program
depends on it. May import: `probes`.
"""

import dataclasses
from pathlib import Path

from probes.errors import UnsupportedKernel, UsageError
from probes.facts import KernelFacts
from probes.hooks import ENUM_VALUES, HOOKS, TRACEPOINTS, Hook

__all__ = (
    "BPF_SOURCE",
    "Attachment",
    "HookChoice",
    "KernelProfile",
    "MissingHook",
    "choose_profile",
    "generation_of",
    "result_names",
)

BPF_SOURCE = Path(__file__).parent / "bpf" / "pfntrace.bpf.c"

_PAGE_CHUNK = 4096
_PTE_PFN_BITS = (1 << 52) - 4096
#: fentry programs of more arguments are refused (LAB.md); our hooks need at most six.
_FENTRY_ARGS_MAX = 6


@dataclasses.dataclass(frozen=True, slots=True)
class Attachment:
    """One program on one symbol; `how` is kprobe, kretprobe, fentry, fexit or raw_tracepoint."""

    hook: str
    symbol: str
    program: str
    how: str


@dataclasses.dataclass(frozen=True, slots=True)
class HookChoice:
    """Where a hook landed and why not better: for `doctor` and for the trace."""

    hook: str
    symbols: tuple[str, ...]
    how: str
    note: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class MissingHook:
    """A hook that this kernel does not offer, and what the trace lacks therefore."""

    hook: str
    tried: tuple[str, ...]
    why: str
    without: str
    required: bool


@dataclasses.dataclass(frozen=True, slots=True)
class KernelProfile:
    """All that loading needs; saved in the trace beside the facts."""

    generation: str
    attachments: tuple[Attachment, ...]
    hooks: tuple[HookChoice, ...]
    missing: tuple[MissingHook, ...]
    defines: dict[str, str]
    #: RET_PF_* value -> name, for readers.
    results: dict[int, str]

    @property
    def blocking(self) -> tuple[MissingHook, ...]:
        """The missing hooks without which there is no recording."""
        return tuple(m for m in self.missing if m.required)


def generation_of(facts: KernelFacts) -> str:
    """Name the fault path's generation from what is there (KVM-FACTS, top).

    G2: references end with the fault (kvm_mmu_finish_page_fault). G1: the out-of-tree series
    (struct kvm_follow_pfn without G2's names). G0b/G0a: before it, told apart by
    kvm_page_fault.error_code growing to 64 bits with private memory.
    """
    fault = facts.structs.get("kvm_page_fault", {})
    if not fault:
        return "unknown"
    if "refcounted_page" in fault:
        return "G2"
    if "is_refcounted_page" in fault or "accessed_page" in fault:
        return "G1"
    return "G0b" if fault["error_code"].bits == 64 else "G0a"


def result_names(facts: KernelFacts) -> dict[int, str]:
    """Return RET_PF_* value -> lower-case name, as this kernel numbers them."""
    return {
        facts.enums[name]: name.removeprefix("RET_PF_").lower()
        for name in ENUM_VALUES
        if name.startswith("RET_PF_") and name in facts.enums
    }


def _clones(facts: KernelFacts, candidate: str) -> list[str]:
    """The symbol itself, else compiler clones that keep its entry (`.isra.0`, `.constprop.0`)."""
    if candidate in facts.symbols:
        return [candidate]
    kept = (".isra.", ".constprop.")
    return [s for s in facts.symbols if any(s.startswith(candidate + k) for k in kept)]


def _resolve(facts: KernelFacts, hook: Hook) -> tuple[list[str], str]:
    """Return the symbols to attach to and, if there are none, why."""
    found: list[str] = []
    for candidate in hook.candidates:
        for symbol in _clones(facts, candidate):
            if symbol in facts.blacklisted:
                continue
            found.append(symbol)
        if found and not hook.every:
            break
    if found:
        return found, ""
    if any(s in facts.blacklisted for c in hook.candidates for s in _clones(facts, c)):
        return [], "on the kernel's kprobe blacklist"
    return [], "no such symbol: inlined by the compiler, or of another kernel generation"


def _fentry_refusal(facts: KernelFacts, hook: Hook, symbol: str) -> str:
    """Why this hook cannot be fentry on this kernel; "" if it can."""
    if not hook.fentry:
        return "has no fentry form"
    if not facts.bcc_module_fentry:
        return "this bcc has no MODULE_KFUNC_PROBE"
    if symbol not in facts.functions:
        return "not in BTF"
    count = len(facts.functions[symbol])
    if count > _FENTRY_ARGS_MAX:
        return f"{count} arguments, fentry takes {_FENTRY_ARGS_MAX}"
    return ""


def _attach(facts: KernelFacts, hook: Hook, symbols: list[str], attach: str) -> HookChoice:
    if attach == "kprobe" or len(symbols) > 1:
        return HookChoice(hook.name, tuple(symbols), "kprobe")
    refusal = _fentry_refusal(facts, hook, symbols[0])
    if refusal:
        return HookChoice(hook.name, tuple(symbols), "kprobe", refusal)
    if facts.preempt not in ("none", "voluntary"):
        # Linux kernel/bpf/trampoline.c, __bpf_prog_enter_recur(): a program that is active on the
        # cpu is skipped; where programs are preempted that is another task's call.
        note = "this kernel may preempt fentry programs, and then misses calls"
        how = "fentry" if attach == "fentry" else "kprobe"
        return HookChoice(hook.name, tuple(symbols), how, note)
    return HookChoice(hook.name, tuple(symbols), "fentry")


def _attachments(hook: Hook, choice: HookChoice) -> list[Attachment]:
    made = []
    for symbol in choice.symbols:
        if choice.how == "fentry":
            if hook.entry:
                made.append(Attachment(hook.name, symbol, f"kfunc__kvm__{symbol}", "fentry"))
            if hook.leave:
                made.append(Attachment(hook.name, symbol, f"kretfunc__kvm__{symbol}", "fexit"))
        else:
            if hook.leave:  # first, so that no entry is seen whose return would be missed
                made.append(Attachment(hook.name, symbol, hook.leave, "kretprobe"))
            if hook.entry:
                made.append(Attachment(hook.name, symbol, hook.entry, "kprobe"))
    return made


def _offset(facts: KernelFacts, struct: str, *members: str) -> int:
    found = facts.offset(struct, *members)
    if found is None:
        raise UnsupportedKernel(
            f"BTF knows no {struct}.{members[0]}: this kernel's KVM is of a kind that pfntrace "
            "does not know; run 'pfntrace doctor --json' and report it"
        )
    return found


def _value(facts: KernelFacts, name: str) -> int:
    if name not in facts.values:
        raise UnsupportedKernel(
            f"the value of {name} cannot be read: /proc/kallsyms or /proc/kcore is closed; "
            "run as root, or with CAP_SYSLOG and CAP_SYS_RAWIO"
        )
    return facts.values[name]


def _layout_defines(facts: KernelFacts) -> dict[str, int]:
    """Byte offsets (O_x) of the members that the programs read."""
    plain = {
        "O_kvm_mm": ("kvm", "mm"),
        "O_kvm_mmu_notifier": ("kvm", "mmu_notifier"),
        "O_kvm_invalidate_seq": ("kvm", "mmu_invalidate_seq"),
        "O_kvm_in_progress": ("kvm", "mmu_invalidate_in_progress"),
        "O_kvm_users_count": ("kvm", "users_count"),
        "O_vcpu_kvm": ("kvm_vcpu", "kvm"),
        "O_vcpu_id": ("kvm_vcpu", "vcpu_id"),
        "O_slot_base_gfn": ("kvm_memory_slot", "base_gfn"),
        "O_slot_npages": ("kvm_memory_slot", "npages"),
        "O_slot_hva": ("kvm_memory_slot", "userspace_addr"),
        "O_slot_flags": ("kvm_memory_slot", "flags"),
        "O_slot_id": ("kvm_memory_slot", "id"),
        "O_slot_as_id": ("kvm_memory_slot", "as_id"),
        "O_sp_role": ("kvm_mmu_page", "role"),
        "O_sp_gfn": ("kvm_mmu_page", "gfn"),
        "O_page_flags": ("page", "flags"),
        "O_page_mapcount": ("page", "_mapcount"),
        "O_page_refcount": ("page", "_refcount"),
        "O_page_private": ("page", "private"),
        "O_task_tgid": ("task_struct", "tgid"),
        "O_range_start": ("mmu_notifier_range", "start"),
        "O_range_end": ("mmu_notifier_range", "end"),
        "O_range_event": ("mmu_notifier_range", "event"),
    }
    found = {name: _offset(facts, *place) for name, place in plain.items()}
    for member in ("addr", "error_code", "prefetch", "goal_level", "gfn", "slot", "pfn",
                   "map_writable"):  # fmt: skip
        found[f"O_fault_{member}"] = _offset(facts, "kvm_page_fault", member)
    # 7.x renamed the word that marks tails: Linux struct page, compound_info.
    found["O_page_compound"] = _offset(facts, "page", "compound_info", "compound_head")
    # mm->owner exists with CONFIG_MEMCG only; 0 makes the program use the running task.
    found["O_mm_owner"] = facts.offset("mm_struct", "owner") or 0
    page_size = facts.structs["page"][""].bits // 8
    order = facts.offset("page", "compound_order")
    # Linux 0189eaf7c2d6 era: the order moved from page[1] into the low byte of folio._flags_1.
    found["O_folio_order"] = (
        page_size + order if order is not None else _offset(facts, "folio", "_flags_1")
    )
    return found


def _value_defines(facts: KernelFacts) -> dict[str, int]:
    """Run-time values (V_x): sizes, bases, flag numbers."""
    fault = facts.structs["kvm_page_fault"]
    page_bits = facts.structs["page"][""].bits
    zones = facts.enums.get("__MAX_NR_ZONES", 0)
    nodes_shift = facts.config.get("CONFIG_NODES_SHIFT", "")
    values = {
        "V_PAGE_SIZEOF": page_bits // 8,
        "V_fault_sizeof": fault[""].bits // 8,
        "V_fault_error_code_size": fault["error_code"].bits // 8,
        "V_VMEMMAP": _value(facts, "vmemmap_base"),
        "V_PAGE_OFFSET": _value(facts, "page_offset_base"),
        "V_PAGE_CHUNKS": facts.max_pfn // _PAGE_CHUNK + 1,
        "V_ZERO_PFN": facts.values.get("zero_pfn", facts.values.get("zero_page_pfn", 0)),
        "V_SPTE_ADDR_MASK": _PTE_PFN_BITS & ~facts.values.get("shadow_me_mask", 0),
        "V_PG_head": facts.enums["PG_head"],
        "V_PG_reserved": facts.enums["PG_reserved"],
        "V_RET_PF_FIXED": facts.enums["RET_PF_FIXED"],
        "V_role_smm_shift": facts.structs["kvm_mmu_page_role"]["smm"].bit,
        "V_ZONE_MASK": 0,
        "V_ZONE_SHIFT": 0,
        "V_ZONE_DEVICE": 0,
    }
    if zones > 2 and nodes_shift.isdigit() and "ZONE_DEVICE" in facts.enums:
        # include/linux/page-flags-layout.h with SPARSEMEM_VMEMMAP: node, then zone, from the top.
        width = 2 if zones <= 4 else 3
        values["V_ZONE_MASK"] = (1 << width) - 1
        values["V_ZONE_SHIFT"] = 64 - int(nodes_shift) - width
        values["V_ZONE_DEVICE"] = facts.enums["ZONE_DEVICE"]
    return values


def _optional_defines(facts: KernelFacts, choices: dict[str, HookChoice]) -> dict[str, int]:
    """HAVE_x: what differs between kernels, and the offsets that go with it."""
    found: dict[str, int] = {}
    for member in ("refcounted_page", "is_refcounted_page", "mmu_seq"):
        place = facts.offset("kvm_page_fault", member)
        if place is not None:
            found[f"HAVE_fault_{member}"] = 1
            found[f"O_fault_{member}"] = place
    translation = facts.offset("kvm_mmu_page", "shadowed_translation", "gfns")
    if translation is not None:
        found["HAVE_sp_translation"] = 1
        found["O_sp_translation"] = translation
        # Linux 6a97575d5ccf ("KVM: x86/mmu: Cache the access bits of shadowed translations")
        shifted = facts.has_field("kvm_mmu_page", "shadowed_translation")
        found["V_sp_translation_shift"] = 12 if shifted else 0
    walk = choices.get("walk")
    if walk and walk.symbols[0] == "follow_pfnmap_start":
        found["HAVE_pfnmap_args"] = 1
        found["O_pfnmap_vma"] = _offset(facts, "follow_pfnmap_args", "vma")
        found["O_pfnmap_pfn"] = _offset(facts, "follow_pfnmap_args", "pfn")
        found["O_vma_start"] = _offset(facts, "vm_area_struct", "vm_start")
        found["O_vma_end"] = _offset(facts, "vm_area_struct", "vm_end")
        found["O_vma_file"] = _offset(facts, "vm_area_struct", "vm_file")
        found["O_file_inode"] = _offset(facts, "file", "f_inode")
        found["O_inode_rdev"] = _offset(facts, "inode", "i_rdev")
        found["O_vma_flags"] = _offset(facts, "vm_area_struct", "vm_flags", "__vm_flags", "flags")
    elif walk:
        found["HAVE_follow_pte"] = 1
    spte = choices.get("spte")
    if spte and facts.functions.get(spte.symbols[0], ("", ""))[1:2] == ("sp",):
        found["HAVE_changed_sp"] = 1
    if "vcpu_map" in choices:
        found["HAVE_vcpu_map"] = 1
        for member in ("gfn", "pfn", "hva"):
            found[f"O_map_{member}"] = _offset(facts, "kvm_host_map", member)
    if "gpc" in choices:
        found["HAVE_gpc"] = 1
        for member in ("gpa", "pfn", "uhva"):
            found[f"O_gpc_{member}"] = _offset(facts, "gfn_to_pfn_cache", member)
        names = facts.functions.get(choices["gpc"].symbols[0], ("gpc",))
        # 6.1 passes the VM, later caches know it: Linux 8c82a0b3ba1a ("KVM: Store immutable
        # gfn_to_pfn_cache properties").
        found["V_gpc_arg"] = names.index("gpc") if "gpc" in names else 0
        if not found["V_gpc_arg"]:
            found["O_gpc_kvm"] = _offset(facts, "gfn_to_pfn_cache", "kvm")
    if "finish_fault" in choices:
        found["HAVE_finish_fault"] = 1
    if "release_pfn_clean" in choices:
        found["HAVE_release_pfn"] = 1
    if "mark_page_accessed" in choices or "mark_page_dirty" in choices:
        found["HAVE_mark_page"] = 1
    for name in ("gup", "map", "spte"):
        if name in choices:
            found[f"HAVE_{name}"] = 1
    return found


def choose_profile(facts: KernelFacts, *, attach: str = "auto") -> KernelProfile:
    """Choose hooks and layout for a kernel.

    `attach` is auto (fentry where it works), kprobe, or fentry (an error if it works nowhere).
    Hooks that are missing are listed, not raised; raises UnsupportedKernel when BTF or a value
    that every program needs is missing, UsageError for an `attach` that cannot be had.
    """
    if not facts.btf_vmlinux:
        raise UnsupportedKernel(
            "no BTF: /sys/kernel/btf/vmlinux is missing; boot a kernel with CONFIG_DEBUG_INFO_BTF=y"
        )
    choices: dict[str, HookChoice] = {}
    missing: list[MissingHook] = []
    attachments: list[Attachment] = []
    for hook in HOOKS:
        symbols, why = _resolve(facts, hook)
        if not symbols:
            missing.append(
                MissingHook(hook.name, hook.candidates, why, hook.without, hook.required)
            )
            continue
        choices[hook.name] = _attach(facts, hook, symbols, attach)
        attachments += _attachments(hook, choices[hook.name])
    if attach == "fentry" and not any(c.how == "fentry" for c in choices.values()):
        raise UsageError(
            "--attach fentry: "
            + (choices["faultin"].note if "faultin" in choices else "no hook")
            + "; use --attach auto"
        )
    defines = {**_layout_defines(facts), **_value_defines(facts)}
    defines.update(_optional_defines(facts, choices))
    for tracepoint in TRACEPOINTS:
        if tracepoint.event in facts.tracepoints:
            program = f"raw_tracepoint__{tracepoint.event}"
            for name in (program, f"{program}_again")[: 1 + tracepoint.again]:
                attachments.append(
                    Attachment(tracepoint.name, tracepoint.event, name, "raw_tracepoint")
                )
            choices[tracepoint.name] = HookChoice(
                tracepoint.name, (tracepoint.event,), "raw_tracepoint"
            )
            defines[f"HAVE_{tracepoint.name}"] = 1
        else:
            missing.append(
                MissingHook(
                    tracepoint.name,
                    (tracepoint.event,),
                    "no such tracepoint in BTF",
                    tracepoint.without,
                    tracepoint.required,
                )
            )
    texts = {name: f"{value:#x}ULL" if value > 1 << 31 else str(value)
             for name, value in defines.items()}  # fmt: skip
    for name, choice in choices.items():
        if choice.how == "fentry":
            texts[f"FENTRY_{name}"] = "1"
            texts[f"SYM_{name}"] = choice.symbols[0]
    if "FENTRY_faultin" in texts:
        texts["V_faultin_args"] = str(len(facts.functions[choices["faultin"].symbols[0]]))
    return KernelProfile(
        generation=generation_of(facts),
        attachments=tuple(attachments),
        hooks=tuple(choices.values()),
        missing=tuple(missing),
        defines=texts,
        results=result_names(facts),
    )
