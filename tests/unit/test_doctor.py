"""What `pfntrace doctor` says of hosts that can and cannot record.

Each host is a fixture of a real one, or such a fixture with one thing taken away.
"""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from probes.facts import KernelFacts
from probes.hooks import HOOKS, TRACEPOINTS
from tracer.doctor import Check, Examination, as_json, as_lines, examine
from tracer.observe import observe

FACTS = Path(__file__).parent / "facts"
FIXTURES = sorted(path.stem for path in FACTS.glob("*.json"))
ABLE = ("6.1", "6.12", "6.12-integrity", "6.12-shadow", "7.3", "7.3-shadow")


def facts_of(name: str, **changes: Any) -> KernelFacts:
    facts = KernelFacts.from_json((FACTS / f"{name}.json").read_text())
    return dataclasses.replace(facts, **changes)


def check_of(examination: Examination, name: str) -> Check:
    (check,) = (check for check in examination.checks if check.name == name)
    return check


def assert_refuses(facts: KernelFacts, reason: str, remedy: str) -> Examination:
    """Assert that the host cannot record, for this reason first, in one line."""
    examination = examine(facts)
    assert not examination.can_record
    problem = examination.first_problem
    found, _, step = problem.partition("; ")
    assert reason in found, problem
    assert remedy in step, problem
    assert "\n" not in problem
    assert as_lines(examination)[0].endswith("cannot record")
    return examination


# --- hosts that can -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ABLE)
def test_a_kernel_of_the_lab_can_record(name):
    examination = examine(facts_of(name))
    assert examination.can_record
    assert examination.first_problem == ""
    assert not [check for check in examination.checks if check.status == "missing"]
    assert examination.profile is not None


def test_lockdown_integrity_is_no_obstacle():
    examination = examine(facts_of("6.12-integrity"))
    assert check_of(examination, "lockdown").found == "integrity"
    assert check_of(examination, "kcore").status == "ok"


def test_the_generation_is_named_and_explained():
    for name, generation in (("6.1", "G0a"), ("6.12", "G0b"), ("7.3", "G2")):
        examination = examine(facts_of(name))
        assert examination.generation == generation
        assert check_of(examination, "generation").found.startswith(f"{generation}, as 6.")


def test_the_mmu_that_guests_run_on_is_named():
    assert "TDP MMU" in check_of(examine(facts_of("6.12")), "paging").found
    shadow = check_of(examine(facts_of("6.12-shadow")), "paging").found
    assert "shadow MMU" in shadow and "npt" in shadow


def test_kvm_that_is_built_in_has_its_types_in_vmlinux():
    examination = examine(facts_of("6.18-no-kprobes"))
    assert "built in" in check_of(examination, "kvm BTF").found
    assert check_of(examination, "kvm").found == "built in"
    assert check_of(examination, "kvm vendor").status == "ok"


@pytest.mark.parametrize("name", ABLE)
def test_every_hook_has_a_check_with_its_symbol_or_the_reason(name):
    facts = facts_of(name)
    examination = examine(facts)
    checks = {c.name.removeprefix("hook "): c for c in examination.checks if " " in c.name}
    for each in [hook.name for hook in HOOKS] + [point.name for point in TRACEPOINTS]:
        assert checks[each].found
    how = "fentry" if facts.preempt == "voluntary" else "kprobe"
    assert f"hva_to_pfn ({how}" in checks["gup"].found
    assert "kvm_tdp_page_fault (kprobe" in checks["fault"].found
    assert checks["fault"].required and not checks["gup"].required


def test_a_missing_optional_hook_degrades_by_name_and_says_what_it_costs():
    facts = facts_of("6.12")
    symbols = tuple(symbol for symbol in facts.symbols if symbol != "hva_to_pfn")
    examination = examine(dataclasses.replace(facts, symbols=symbols))
    check = check_of(examination, "hook gup")
    assert examination.can_record
    assert (check.status, check.found.split(":")[0]) == ("degraded", "hva_to_pfn")
    assert "get_user_pages" in check.why
    assert "with 1 shortcoming" in as_lines(examination)[0]


def test_a_hook_of_another_generation_is_no_shortcoming():
    check = check_of(examine(facts_of("7.3")), "hook release_pfn_clean")
    assert check.status == "ok"
    assert "nothing is lost" in check.found


# --- hosts that cannot: the first problem is the cause of the others ------------------------------


def test_who_forgot_sudo_is_told_so_before_anything_that_follows_from_it():
    examination = assert_refuses(facts_of("6.12-nobody"), "not privileged: CAP_BPF", "sudo")
    assert check_of(examination, "kallsyms").status == "missing"
    assert check_of(examination, "mappings").status == "degraded"


def test_capabilities_count_not_the_user():
    capabilities = ("CAP_BPF", "CAP_PERFMON", "CAP_SYSLOG", "CAP_SYS_RAWIO")
    examination = examine(facts_of("6.12", capabilities=capabilities))
    assert examination.can_record
    assert check_of(examination, "mappings").status == "degraded"


@pytest.mark.parametrize("gone", ["CAP_BPF", "CAP_PERFMON"])
def test_a_single_missing_capability_is_named(gone):
    some = {"CAP_BPF", "CAP_PERFMON", "CAP_SYSLOG", "CAP_SYS_RAWIO"} - {gone}
    assert_refuses(facts_of("6.12", capabilities=tuple(some)), f"not privileged: {gone} miss", "")
    admin = (*some, "CAP_SYS_ADMIN")
    assert examine(facts_of("6.12", capabilities=admin)).can_record


def test_lockdown_confidentiality_comes_before_the_memory_it_closes():
    examination = assert_refuses(
        facts_of("6.12-lockdown"), "locked down (confidentiality)", "lockdown=integrity"
    )
    assert "kernel_lockdown(7)" in examination.first_problem
    assert check_of(examination, "kcore").status == "missing"


def test_a_kernel_without_kprobes_is_named_before_what_else_it_lacks():
    examination = assert_refuses(
        facts_of("6.18-no-kprobes"), "without CONFIG_KPROBES", "CONFIG_KPROBES=y"
    )
    assert check_of(examination, "bcc").status == "missing"
    assert check_of(examination, "hooks").status == "unknown"


def test_without_a_kernel_configuration_sysfs_speaks_for_kprobes():
    assert_refuses(facts_of("6.12", config={}, kprobes=False), "without CONFIG_KPROBES", "boot")
    for known in (True, None):
        assert examine(facts_of("6.12", config={}, kprobes=known)).can_record
    unknown = examine(facts_of("6.12", config={}, kprobes=None))
    assert check_of(unknown, "kprobes").status == "unknown"


@pytest.mark.parametrize("option", ["CONFIG_BPF_SYSCALL", "CONFIG_BPF_EVENTS"])
def test_a_kernel_without_bpf_is_refused(option):
    facts = facts_of("6.12")
    without = {**facts.config, option: "n"}
    assert_refuses(dataclasses.replace(facts, config=without), option, f"{option}=y")


def test_without_kvm_the_remedy_is_to_load_it_not_to_look_for_hooks():
    examination = assert_refuses(facts_of("6.12-no-kvm"), "kvm is not loaded", "modprobe kvm_amd")
    assert "kvm_intel" in examination.first_problem
    assert check_of(examination, "kvm BTF").status == "unknown"
    assert check_of(examination, "hooks").status == "unknown"
    assert examination.profile is None


def test_kvm_without_its_vendor_half_is_refused():
    facts = facts_of("6.12", modules=("kvm",), dev_kvm=False)
    assert_refuses(facts, "neither kvm_amd nor kvm_intel", "modprobe")


def test_a_host_without_dev_kvm_can_still_record_what_runs():
    examination = examine(facts_of("6.12", dev_kvm=False))
    assert examination.can_record
    assert check_of(examination, "/dev/kvm").status == "degraded"


def test_without_btf_of_the_kernel():
    facts = facts_of("6.12", btf_vmlinux=False, btf_kvm=False, structs={}, functions={}, enums={})
    assert_refuses(facts, "no BTF (/sys/kernel/btf/vmlinux)", "CONFIG_DEBUG_INFO_BTF=y")


def test_without_btf_of_the_module():
    facts = facts_of("6.12")
    structs = {n: s for n, s in facts.structs.items() if not n.startswith("kvm")}
    stripped = dataclasses.replace(facts, btf_kvm=False, structs=structs, functions={})
    assert_refuses(stripped, "the kvm module has no BTF", "CONFIG_DEBUG_INFO_BTF_MODULES=y")


def test_without_libbpf_the_remedy_is_a_package_not_a_kernel():
    note = "libbpf is not installed: apt install libbpf1 (python3-bpfcc brings it)"
    facts = facts_of("6.12", btf_vmlinux=False, btf_kvm=False, structs={}, notes=(note,))
    assert_refuses(facts, "libbpf", "apt install python3-bpfcc")


def test_addresses_hidden_even_from_root():
    note = "/proc/kallsyms hides addresses (no CAP_SYSLOG, or kptr_restrict=2)"
    facts = facts_of("6.12", kallsyms=False, kcore=False, values={}, notes=(note,))
    assert_refuses(facts, "hides addresses", "sysctl kernel.kptr_restrict=1")


def test_kallsyms_without_data_symbols():
    facts = facts_of("6.12", kcore=False, values={})
    assert_refuses(facts, "no data symbols", "CONFIG_KALLSYMS_ALL=y")


def test_kcore_closed_for_another_reason():
    note = "/proc/kcore cannot be read: [Errno 2] No such file or directory: '/proc/kcore'"
    facts = facts_of("6.12", kcore=False, values={}, notes=(note,))
    assert_refuses(facts, "/proc/kcore cannot be read", "CONFIG_PROC_KCORE=y")


def test_without_bcc():
    facts = facts_of("6.12", bcc_version="", bcc_path="", bcc_problem="not installed")
    assert_refuses(facts, "bcc is not installed", "apt install python3-bpfcc")


def test_the_bcc_of_pypi_is_named_as_what_it_is():
    problem = "site-packages/bcc/__init__.py is PyPI's unrelated package of that name"
    facts = facts_of("6.12", bcc_version="", bcc_path="", bcc_problem=problem)
    examination = assert_refuses(facts, "PyPI's unrelated", "apt install python3-bpfcc")
    assert "pip uninstall" in examination.first_problem


def test_an_old_bcc_degrades_to_kprobes():
    examination = examine(facts_of("6.12", bcc_version="0.26.0", bcc_module_fentry=False))
    assert examination.can_record
    assert check_of(examination, "bcc fentry").status == "degraded"
    assert "(kprobe" in check_of(examination, "hook fault").found


def test_an_old_python_is_refused():
    assert_refuses(facts_of("6.12", python="3.9.2"), "Python 3.9.2 is older than 3.11", "3.11")


def test_another_machine_is_refused():
    assert_refuses(facts_of("6.12", machine="aarch64"), "aarch64", "x86-64 host")


def test_a_missing_required_hook_is_refused_by_the_function_s_name():
    facts = facts_of("6.12")
    symbols = tuple(symbol for symbol in facts.symbols if symbol != "kvm_faultin_pfn")
    examination = examine(dataclasses.replace(facts, symbols=symbols))
    assert not examination.can_record
    assert "faultin_pfn: no such symbol" in examination.first_problem
    assert "MISSING" in "\n".join(as_lines(examination))


def test_a_choice_that_cannot_be_had_is_one_failed_check():
    facts = facts_of("6.12", bcc_module_fentry=False)
    examination = examine(facts, attach="fentry")
    assert not examination.can_record
    assert "use --attach auto" in examination.first_problem


# --- whatever the facts ---------------------------------------------------------------------------


def assert_sound(facts: KernelFacts) -> None:
    """Assert that examining these facts gives a complete picture and a consistent verdict."""
    examination = examine(facts)
    assert examination.can_record == (examination.first_problem == "")
    assert all(check.found for check in examination.checks)
    assert all(c.remedy for c in examination.checks if c.blocks)
    assert all(len(line) <= 80 for line in as_lines(examination))
    data = json.loads(json.dumps(as_json(examination, facts)))
    assert data["can_record"] == examination.can_record
    assert data["problem"] == (examination.first_problem or None)
    assert KernelFacts.from_json(json.dumps(data["facts"])) == facts


@pytest.mark.parametrize("name", FIXTURES)
def test_the_picture_is_complete_for_every_fixture(name):
    assert_sound(facts_of(name))


def test_a_host_of_which_nothing_is_known():
    assert_sound(KernelFacts())


@pytest.mark.parametrize("name", ["6.1", "6.12", "7.3"])
@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(KernelFacts)])
def test_any_fact_may_be_missing(name, field):
    assert_sound(facts_of(name, **{field: getattr(KernelFacts(), field)}))


@pytest.mark.parametrize("name", ["6.1", "6.12", "7.3"])
def test_any_structure_member_enumeration_or_value_may_be_missing(name):
    facts = facts_of(name)
    for struct, members in facts.structs.items():
        for member in members:
            left = {m: place for m, place in members.items() if m != member}
            assert_sound(dataclasses.replace(facts, structs={**facts.structs, struct: left}))
        others = {s: m for s, m in facts.structs.items() if s != struct}
        assert_sound(dataclasses.replace(facts, structs=others))
    for key in ("enums", "values", "config", "params", "functions"):
        whole = getattr(facts, key)
        for gone in whole:
            changes: dict[str, Any] = {key: {k: v for k, v in whole.items() if k != gone}}
            assert_sound(dataclasses.replace(facts, **changes))


def test_json_has_the_names_that_scripts_rely_on():
    facts = facts_of("7.3")
    data = as_json(examine(facts), facts)
    assert data["kernel"] == facts.release and data["generation"] == "G2"
    assert data["hooks"]["faultin"]["symbols"] == ("kvm_mmu_faultin_pfn",)
    assert data["missing_hooks"]["root_work"]["why"]
    assert set(data["checks"][0]) == {"name", "status", "found", "why", "remedy", "required"}


def test_this_host_is_examined_without_an_exception():
    facts = observe()
    assert_sound(dataclasses.replace(facts, python=f"3.11 ({Path(sys.executable).name})"))
