"""From the facts of real kernels to what pfntrace loads there.

The facts were captured in the lab (`facts/capture.py`); the expected offsets were read there too,
with bpftool, and are those of these very builds.
"""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from probes.errors import PfntraceError, UnsupportedKernel, UsageError
from probes.facts import KernelFacts
from probes.hooks import HOOKS
from probes.profile import BPF_SOURCE, KernelProfile, choose_profile, generation_of

FACTS = Path(__file__).parent / "facts"
KERNELS = ("6.1", "6.12", "7.3")


def facts_of(name: str) -> KernelFacts:
    return KernelFacts.from_json((FACTS / f"{name}.json").read_text())


def without_symbols(facts: KernelFacts, *names: str) -> KernelFacts:
    kept = tuple(symbol for symbol in facts.symbols if symbol.split(".")[0] not in names)
    return dataclasses.replace(facts, symbols=kept)


def symbols_of(profile: KernelProfile) -> dict[str, tuple[str, ...]]:
    return {choice.hook: choice.symbols for choice in profile.hooks}


def ways_of(profile: KernelProfile) -> dict[str, str]:
    return {choice.hook: choice.how for choice in profile.hooks}


# --- generations and names ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "generation"),
    [
        ("6.1", "G0a"),
        ("6.12", "G0b"),
        ("6.12-shadow", "G0b"),
        ("7.3", "G2"),
        ("7.3-shadow", "G2"),
        ("6.18-no-kprobes", "G2"),
        ("6.12-no-kvm", "unknown"),
    ],
)
def test_the_generation_is_known_by_its_structures(name, generation):
    assert generation_of(facts_of(name)) == generation


@pytest.mark.parametrize("member", ["is_refcounted_page", "accessed_page"])
def test_the_out_of_tree_series_is_known_by_the_field_it_adds(member):
    facts = facts_of("6.12")
    fault = {**facts.structs["kvm_page_fault"], member: facts.structs["kvm_page_fault"]["prefetch"]}
    series = dataclasses.replace(facts, structs={**facts.structs, "kvm_page_fault": fault})
    assert generation_of(series) == "G1"


def test_what_only_some_builds_have_as_symbols_is_hooked_there_and_nowhere_else():
    # Given a kernel with the calls that the series exports, and a page fault handler kept apart
    facts = facts_of("6.12")
    kept = ("kvm_set_page_accessed", "kvm_set_page_dirty", "kvm_tdp_mmu_page_fault")
    series = choose_profile(dataclasses.replace(facts, symbols=(*facts.symbols, *kept)))
    stock = choose_profile(facts)

    hooks = {"mark_page_accessed", "mark_page_dirty", "fault_tdp_mmu"}
    assert hooks <= set(symbols_of(series)) and series.defines["HAVE_mark_page"] == "1"
    # then the others neither attach them nor compile them nor complain of them
    assert not hooks & set(symbols_of(stock)) and "HAVE_mark_page" not in stock.defines
    assert not any(missing.without for missing in stock.missing if missing.hook in hooks)


@pytest.mark.parametrize("name", ["6.1", "6.12", "6.12-shadow", "7.3", "7.3-shadow"])
def test_every_kernel_of_the_lab_has_all_that_is_required(name):
    profile = choose_profile(facts_of(name))
    assert profile.blocking == ()
    assert {hook.name for hook in HOOKS if hook.required} <= set(symbols_of(profile))


@pytest.mark.parametrize(
    ("hook", "symbols"),
    {
        "fault": ("kvm_tdp_page_fault",) * 3,
        "faultin": ("kvm_faultin_pfn", "kvm_faultin_pfn", "kvm_mmu_faultin_pfn"),
        "gup": ("hva_to_pfn",) * 3,
        "map": ("kvm_tdp_mmu_map",) * 3,
        "walk": ("follow_pte", "follow_pfnmap_start", "follow_pfnmap_start"),
        "spte": ("__handle_changed_spte", "handle_changed_spte", "__handle_changed_spte"),
        "release_pfn_clean": ("kvm_release_pfn_clean", "kvm_release_pfn_clean", None),
        "finish_fault": (None, None, "kvm_mmu_finish_page_fault.isra.0"),
        "mark_pfn_dirty": ("kvm_set_pfn_dirty", "kvm_set_pfn_dirty", None),
        "guest_write": ("kvm_mmu_pte_write", "kvm_mmu_track_write", "kvm_mmu_track_write"),
        "vcpu_map": ("kvm_vcpu_map", "kvm_vcpu_map", "__kvm_vcpu_map"),
        "gpc": ("kvm_gfn_to_pfn_cache_refresh", "__kvm_gpc_refresh", "__kvm_gpc_refresh"),
        "recovery": (None,) + ("kvm_nx_huge_page_recovery_worker",) * 2,
        "page_free": ("mm_page_free",) * 3,
    }.items(),
)
def test_a_hook_takes_the_name_that_the_kernel_has(hook, symbols):
    for name, symbol in zip(KERNELS, symbols, strict=True):
        found = symbols_of(choose_profile(facts_of(name))).get(hook)
        assert found == ((symbol,) if symbol else None), name


@pytest.mark.parametrize("name", KERNELS)
def test_all_handlers_of_shadow_paging_are_hooked_not_only_the_first(name):
    assert set(symbols_of(choose_profile(facts_of(name)))["fault_shadow"]) == {
        "nonpaging_page_fault",
        "paging64_page_fault",
        "paging32_page_fault",
        "ept_page_fault",
    }


def test_results_are_numbered_as_the_kernel_numbers_them():
    assert choose_profile(facts_of("6.1")).results[4] == "fixed"
    for name in ("6.12", "7.3"):
        results = choose_profile(facts_of(name)).results
        assert (results[3], results[5]) == ("write_protected", "fixed")


# --- layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("define", "values"),
    {
        "O_fault_addr": (0, 0, 0),
        "O_fault_error_code": (8, 8, 8),
        "O_fault_gfn": (24, 32, 32),
        "O_fault_slot": (32, 40, 40),
        # Debian's current 6.1 has no mmu_seq in kvm_page_fault: all behind it moved up by 8.
        "O_fault_mmu_seq": (None, 48, 48),
        "O_fault_pfn": (40, 56, 56),
        "O_fault_map_writable": (56, 72, 72),
        "O_fault_refcounted_page": (None, None, 64),
        "V_fault_error_code_size": (4, 8, 8),
        "O_kvm_mm": (72, 72, 56),
        "O_kvm_invalidate_seq": (39552, 39616, 6792),
        "O_kvm_in_progress": (39560, 39624, 6800),
        "O_slot_base_gfn": (176, 176, 176),
        "O_slot_npages": (184, 184, 184),
        "O_slot_hva": (248, 248, 248),
        "O_slot_flags": (256, 256, 256),
        "O_slot_id": (260, 260, 260),
        "O_sp_role": (36, 36, 36),
        "O_sp_gfn": (40, 40, 40),
        "O_page_flags": (0, 0, 0),
        "O_page_compound": (8, 8, 8),
        "O_page_mapcount": (48, 48, 48),
        "O_page_refcount": (52, 52, 52),
        "V_PAGE_SIZEOF": (64, 64, 64),
        # page[1].compound_order, later the low byte of folio._flags_1, which is page[1].flags
        "O_folio_order": (81, 64, 64),
        "O_range_start": (16, 8, 8),
        "O_range_end": (24, 16, 16),
        "O_range_event": (36, 28, 28),
        "V_RET_PF_FIXED": (4, 5, 5),
        "HAVE_pfnmap_args": (None, 1, 1),
        "HAVE_follow_pte": (1, None, None),
        "HAVE_changed_sp": (None, None, 1),
        "HAVE_finish_fault": (None, None, 1),
        "HAVE_release_pfn": (1, 1, None),
        "V_gpc_arg": (1, 0, 0),
    }.items(),
)
def test_layouts_are_those_of_the_kernel(define, values):
    for name, value in zip(KERNELS, values, strict=True):
        found = choose_profile(facts_of(name)).defines.get(define)
        assert found == (None if value is None else str(value)), name


@pytest.mark.parametrize("name", KERNELS)
def test_defines_are_numbers_and_names_that_a_compiler_takes(name):
    for define, text in choose_profile(facts_of(name)).defines.items():
        value = text.removesuffix("ULL")
        assert define.startswith("SYM_") or int(value, 0) >= 0, define


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("attach", ["kprobe", "auto"])
def test_every_program_of_the_profile_is_in_the_c(name, attach):
    source = BPF_SOURCE.read_text() + "".join(p.read_text() for p in BPF_SOURCE.parent.glob("*.h"))
    for attachment in choose_profile(facts_of(name), attach=attach).attachments:
        if attachment.how in ("kprobe", "kretprobe"):
            # Some are made by a macro that prepends kp_, kr_ or kp_reason_.
            bare = attachment.program.removeprefix("kp_").removeprefix("kr_")
            assert attachment.program in source or bare.removeprefix("reason_") in source
        elif attachment.how == "raw_tracepoint":
            event = attachment.program.removeprefix("raw_tracepoint__")
            assert attachment.program in source or event in source


def test_the_zero_page_has_a_name_in_every_kernel():
    for name in KERNELS:
        facts = facts_of(name)
        zero = facts.values.get("zero_pfn") or facts.values["zero_page_pfn"]
        assert choose_profile(facts).defines["V_ZERO_PFN"] == str(zero)


def test_the_encryption_bit_is_no_part_of_a_frame_number():
    facts = facts_of("6.12")
    c_bit = 1 << 51
    encrypted = dataclasses.replace(facts, values={**facts.values, "shadow_me_mask": c_bit})
    plain, masked = (
        int(choose_profile(f).defines["V_SPTE_ADDR_MASK"].removesuffix("ULL"), 0)
        for f in (facts, encrypted)
    )
    assert plain & c_bit and masked == plain & ~c_bit


# --- how a hook is attached -----------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_auto_takes_fentry_where_it_can_be_had(name):
    profile = choose_profile(facts_of(name), attach="auto")
    ways = ways_of(profile)
    wanted = ("faultin", "gup", "map")
    assert ways["fault_shadow"] == "kprobe"
    if facts_of(name).preempt == "voluntary":
        assert {ways[hook] for hook in wanted} == {"fentry"}
        assert profile.defines["FENTRY_faultin"] == "1"
        assert profile.defines["SYM_faultin"] == symbols_of(profile)["faultin"][0]
    else:
        # A preempted fentry program makes the kernel skip it for the next task: calls are missed.
        assert {ways[hook] for hook in wanted} == {"kprobe"}
        notes = {choice.hook: choice.note for choice in profile.hooks}
        assert all("preempt" in notes[hook] for hook in wanted)


@pytest.mark.parametrize("name", KERNELS)
def test_kprobe_means_kprobes_only(name):
    profile = choose_profile(facts_of(name), attach="kprobe")
    assert set(ways_of(profile).values()) == {"kprobe", "raw_tracepoint"}
    assert {a.how for a in profile.attachments} == {"kprobe", "kretprobe", "raw_tracepoint"}
    assert not [define for define in profile.defines if define.startswith("FENTRY_")]


def test_a_function_with_more_than_six_arguments_stays_a_kprobe_and_says_so():
    facts = facts_of("6.12")
    wide = {**facts.functions, "kvm_tdp_mmu_map": tuple("abcdefg")}
    profile = choose_profile(dataclasses.replace(facts, functions=wide))
    (found,) = (choice for choice in profile.hooks if choice.hook == "map")
    assert found.how == "kprobe"
    assert "7 arguments" in found.note


def test_a_function_that_btf_does_not_know_stays_a_kprobe_and_says_so():
    profile = choose_profile(dataclasses.replace(facts_of("6.12"), functions={}))
    (found,) = (choice for choice in profile.hooks if choice.hook == "map")
    assert found.how == "kprobe"
    assert "BTF" in found.note


@pytest.mark.parametrize("name", KERNELS)
def test_the_return_is_attached_before_the_entry(name):
    attachments = choose_profile(facts_of(name), attach="kprobe").attachments
    for hook in ("faultin", "gup"):
        assert [a.how for a in attachments if a.hook == hook] == ["kretprobe", "kprobe"]


def test_a_bcc_that_knows_no_fentry_of_modules_means_kprobes():
    old = dataclasses.replace(facts_of("6.12"), bcc_module_fentry=False)
    profile = choose_profile(old, attach="auto")
    assert "fentry" not in ways_of(profile).values()
    assert "MODULE_KFUNC_PROBE" in next(c.note for c in profile.hooks if c.hook == "faultin")
    with pytest.raises(UsageError, match="use --attach auto"):
        choose_profile(old, attach="fentry")


# --- what is missing ------------------------------------------------------------------------------


def test_a_clone_that_the_compiler_made_is_found():
    facts = facts_of("6.12")
    renamed = tuple("hva_to_pfn.constprop.0" if s == "hva_to_pfn" else s for s in facts.symbols)
    profile = choose_profile(dataclasses.replace(facts, symbols=renamed))
    assert symbols_of(profile)["gup"] == ("hva_to_pfn.constprop.0",)


def test_a_cold_part_is_not_the_function():
    facts = without_symbols(facts_of("6.12"), "hva_to_pfn")
    cold = dataclasses.replace(facts, symbols=(*facts.symbols, "hva_to_pfn.cold"))
    profile = choose_profile(cold)
    assert "gup" in [missing.hook for missing in profile.missing]


def test_a_missing_optional_hook_is_named_with_its_cost_and_does_not_block():
    profile = choose_profile(without_symbols(facts_of("6.12"), "hva_to_pfn"))
    (gup,) = (missing for missing in profile.missing if missing.hook == "gup")
    assert gup.tried == ("hva_to_pfn",)
    assert "inlined" in gup.why
    assert "get_user_pages" in gup.without
    assert not gup.required and profile.blocking == ()
    assert "HAVE_gup" not in profile.defines


def test_a_missing_required_hook_blocks():
    profile = choose_profile(without_symbols(facts_of("6.12"), "kvm_faultin_pfn"))
    assert [missing.hook for missing in profile.blocking] == ["faultin"]


def test_a_blacklisted_function_counts_as_missing_and_says_why():
    facts = dataclasses.replace(facts_of("6.12"), blacklisted=("hva_to_pfn",))
    (gup,) = (missing for missing in choose_profile(facts).missing if missing.hook == "gup")
    assert "blacklist" in gup.why


def test_a_missing_tracepoint_is_named():
    facts = dataclasses.replace(facts_of("6.12"), tracepoints=("mm_page_free",))
    profile = choose_profile(facts)
    assert "page_free" in symbols_of(profile)
    assert "page_alloc" in [missing.hook for missing in profile.missing]


def test_without_btf_there_is_no_profile_and_a_remedy():
    with pytest.raises(UnsupportedKernel, match="CONFIG_DEBUG_INFO_BTF=y"):
        choose_profile(dataclasses.replace(facts_of("6.12"), btf_vmlinux=False))


@pytest.mark.parametrize("value", ["vmemmap_base", "page_offset_base"])
def test_without_the_value_of_a_base_there_is_no_profile(value):
    facts = facts_of("6.12")
    values = {name: v for name, v in facts.values.items() if name != value}
    with pytest.raises(UnsupportedKernel, match=value):
        choose_profile(dataclasses.replace(facts, values=values))


def test_without_a_structure_member_the_error_names_it():
    facts = facts_of("6.12")
    slot: dict[str, Any] = dict(facts.structs["kvm_memory_slot"])
    del slot["userspace_addr"]
    structs = {**facts.structs, "kvm_memory_slot": slot}
    with pytest.raises(PfntraceError, match=r"kvm_memory_slot\.userspace_addr"):
        choose_profile(dataclasses.replace(facts, structs=structs))


@pytest.mark.parametrize("name", KERNELS)
def test_choosing_is_a_pure_function(name):
    facts = facts_of(name)
    before = facts.to_json()
    assert choose_profile(facts) == choose_profile(facts)
    assert facts.to_json() == before
