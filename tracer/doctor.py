"""Say what a host offers for recording and what it lacks: pure functions of its `KernelFacts`.

The checks stand in the order of their causes: what makes another check fail comes before it, so
that the first one that blocks is the one worth a user's time (`Examination.first_problem`).
Texts are for the front door, which prints them. May import: `probes`.
"""

import dataclasses
import json
import re
import textwrap
from collections.abc import Iterator
from typing import Any, Literal

from probes.errors import PfntraceError
from probes.facts import KernelFacts
from probes.hooks import HOOKS, TRACEPOINTS
from probes.profile import KernelProfile, choose_profile, generation_of

__all__ = ("Check", "Examination", "as_json", "as_lines", "examine")

Status = Literal["ok", "missing", "degraded", "unknown"]

_AS_ROOT = "run it as root (sudo)"
_REPORT = "run 'pfntrace doctor --json' and report it"
_PYTHON_MIN = (3, 11)
_GENERATIONS = {
    "G0a": "as 6.1: a page is put after mmu_lock; pages not reference-counted are refused",
    "G0b": "as 6.12: like G0a, with private memory and lockless retries",
    "G1": "the out-of-tree series: pages not reference-counted are followed and marked",
    "G2": "as 6.13 and later: a page is put under mmu_lock; PFNMAP pages are never counted",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. `found` is a clause that can stand alone in an error message."""

    name: str
    status: Status
    found: str
    #: what it is for, or what it costs not to have it.
    why: str = ""
    #: the exact next step; "" where nothing can or need be done.
    remedy: str = ""
    #: there is no recording without it.
    required: bool = False

    @property
    def blocks(self) -> bool:
        """Tell whether this alone keeps a recording from starting."""
        return self.required and self.status == "missing"


@dataclasses.dataclass(frozen=True, slots=True)
class Examination:
    """All checks of one host, causes before effects; `profile` is None if none can be chosen."""

    release: str
    generation: str
    checks: tuple[Check, ...]
    profile: KernelProfile | None

    @property
    def can_record(self) -> bool:
        """Tell whether nothing that recording requires is known to be missing."""
        return not any(check.blocks for check in self.checks)

    @property
    def first_problem(self) -> str:
        """Return "reason; remedy" of the first check that blocks, "" if none does."""
        for check in self.checks:
            if check.blocks:
                return f"{check.found}; {check.remedy}" if check.remedy else check.found
        return ""


def examine(facts: KernelFacts, *, attach: str = "auto") -> Examination:
    """Examine a host for a recording with `--attach ATTACH`; never raises, whatever the facts."""
    checks = [
        _machine(facts),
        _privileges(facts),
        _ptrace(facts),
        _lockdown(facts),
        *_config(facts),
        _btf_vmlinux(facts),
        _btf_kvm(facts),
        _kvm(facts),
        _vendor(facts),
        _dev_kvm(facts),
        _paging(facts),
        _kallsyms(facts),
        _kcore(facts),
        _bcc(facts),
        _bcc_fentry(facts),
        _python(facts),
    ]
    profile: KernelProfile | None = None
    try:
        profile = choose_profile(facts, attach=attach)
        checks += _hooks(profile)
    except PfntraceError as err:
        checks.append(_no_profile(checks, str(err)))
    except LookupError as err:  # a fact that no kernel seen so far lacked
        checks.append(_no_profile(checks, f"BTF does not know {err}; {_REPORT}"))
    try:
        generation = generation_of(facts)
    except LookupError:
        generation = "unknown"
    checks.append(_generation(generation))
    return Examination(facts.release, generation, tuple(checks), profile)


# --- who we are, and what the kernel lets us do ---------------------------------------------------


def _machine(facts: KernelFacts) -> Check:
    why = "the probes know x86-64 only"
    if facts.machine in ("x86_64", ""):
        return Check("machine", "ok", facts.machine or "not known", why, required=True)
    found = f"this machine is {facts.machine}, not x86-64"
    remedy = "record on an x86-64 host; a trace can be read anywhere"
    return Check("machine", "missing", found, why, remedy, required=True)


def _lacking(facts: KernelFacts) -> list[str]:
    # Capabilities that are not there and are missed: some hosts show kallsyms to everybody.
    lacking = []
    if "CAP_SYS_ADMIN" not in facts.capabilities:
        lacking += [c for c in ("CAP_BPF", "CAP_PERFMON") if c not in facts.capabilities]
    if "CAP_SYSLOG" not in facts.capabilities and not facts.kallsyms:
        lacking.append("CAP_SYSLOG")
    if "CAP_SYS_RAWIO" not in facts.capabilities and not facts.kcore:
        lacking.append("CAP_SYS_RAWIO")
    return lacking


def _privileges(facts: KernelFacts) -> Check:
    lacking = _lacking(facts)
    why = "load and attach BPF programs, read addresses and values of the kernel"
    if lacking:
        found = f"not privileged: {', '.join(lacking)} missing"
        return Check("privileges", "missing", found, why, _AS_ROOT, required=True)
    held = [c for c in facts.capabilities if c != "CAP_SYS_RESOURCE"]
    return Check("privileges", "ok", ", ".join(held), why, required=True)


def _ptrace(facts: KernelFacts) -> Check:
    why = "without it, paths and VmFlags behind other users' memslots cannot be read"
    if "CAP_SYS_PTRACE" in facts.capabilities:
        return Check("mappings", "ok", "/proc/PID/smaps of every process (CAP_SYS_PTRACE)", why)
    return Check("mappings", "degraded", "CAP_SYS_PTRACE missing", why, _AS_ROOT)


def _lockdown(facts: KernelFacts) -> Check:
    why = "lockdown 'confidentiality' forbids BPF and kcore to read kernel memory"
    if facts.lockdown == "confidentiality":
        found = "the kernel is locked down (confidentiality), its memory must not be read"
        remedy = "boot with lockdown=integrity or lockdown=none, see kernel_lockdown(7)"
        return Check("lockdown", "missing", found, why, remedy, required=True)
    found = facts.lockdown or "no /sys/kernel/security/lockdown here"
    return Check("lockdown", "ok", found, why, required=True)


_CONFIG = (
    ("kprobes", "CONFIG_KPROBES", "hooks are kprobes wherever fentry does not serve"),
    ("kprobe events", "CONFIG_KPROBE_EVENTS", "kprobes are attached through perf events"),
    ("bpf", "CONFIG_BPF_SYSCALL", "the probes are BPF programs"),
    ("bpf events", "CONFIG_BPF_EVENTS", "BPF programs run on kprobes and tracepoints"),
)


def _config(facts: KernelFacts) -> Iterator[Check]:
    for name, option, why in _CONFIG:
        value = facts.config.get(option, "")
        if option == "CONFIG_KPROBES" and not value:
            # No configuration to read: the kprobe event source in sysfs speaks for it.
            value = {True: "y", False: "n", None: ""}[facts.kprobes]
        if value == "y":
            yield Check(name, "ok", f"{option}=y", why, required=True)
        elif value:
            found = f"this kernel is built without {option}"
            remedy = f"boot a kernel with {option}=y (distribution kernels have it)"
            yield Check(name, "missing", found, why, remedy, required=True)
        else:
            found = f"{option}: no kernel configuration in /boot or /proc/config.gz"
            yield Check(name, "unknown", found, why, required=True)


# --- types and kvm --------------------------------------------------------------------------------


def _btf_vmlinux(facts: KernelFacts) -> Check:
    why = "structure layouts of the running kernel come from it, not from headers"
    if facts.btf_vmlinux:
        return Check("vmlinux BTF", "ok", "/sys/kernel/btf/vmlinux", why, required=True)
    if any("libbpf" in note for note in facts.notes):
        found = "libbpf, which reads BTF, is not installed"
        remedy = "apt install python3-bpfcc (it brings libbpf and bcc)"
    else:
        found = "this kernel has no BTF (/sys/kernel/btf/vmlinux)"
        remedy = "boot a kernel with CONFIG_DEBUG_INFO_BTF=y"
    return Check("vmlinux BTF", "missing", found, why, remedy, required=True)


def _built_in(facts: KernelFacts) -> bool:
    return facts.config.get("CONFIG_KVM") == "y" or (
        not facts.btf_kvm and "kvm_page_fault" in facts.structs
    )


def _has_kvm(facts: KernelFacts) -> bool:
    return "kvm" in facts.modules or _built_in(facts)


def _btf_kvm(facts: KernelFacts) -> Check:
    why = "KVM's own structures and function arguments"
    if facts.btf_kvm:
        return Check("kvm BTF", "ok", "/sys/kernel/btf/kvm", why, required=True)
    if not facts.btf_vmlinux or not _has_kvm(facts):
        return Check("kvm BTF", "unknown", "shows once kvm is loaded", why, required=True)
    if "kvm_page_fault" in facts.structs:
        return Check("kvm BTF", "ok", "in vmlinux's: kvm is built in", why, required=True)
    found = "the kvm module has no BTF (/sys/kernel/btf/kvm)"
    remedy = "boot a kernel with CONFIG_DEBUG_INFO_BTF_MODULES=y"
    return Check("kvm BTF", "missing", found, why, remedy, required=True)


_MODPROBE = "modprobe kvm_amd (AMD) or modprobe kvm_intel (Intel)"


def _kvm(facts: KernelFacts) -> Check:
    why = "its functions are what is traced"
    if _has_kvm(facts):
        found = "built in" if _built_in(facts) else "module loaded"
        return Check("kvm", "ok", found, why, required=True)
    return Check("kvm", "missing", "kvm is not loaded", why, _MODPROBE, required=True)


def _vendor(facts: KernelFacts) -> Check:
    why = "the processor's half of KVM: without it no guest runs"
    loaded = [m for m in ("kvm_amd", "kvm_intel") if m in facts.modules]
    if not _has_kvm(facts):
        return Check("kvm vendor", "unknown", "loads together with kvm", why, required=True)
    if loaded:
        return Check("kvm vendor", "ok", ", ".join(loaded), why, required=True)
    if facts.dev_kvm:
        return Check("kvm vendor", "ok", "built in (/dev/kvm is there)", why, required=True)
    found = "neither kvm_amd nor kvm_intel is loaded"
    return Check("kvm vendor", "missing", found, why, _MODPROBE, required=True)


def _dev_kvm(facts: KernelFacts) -> Check:
    why = "a command that starts a VM opens it; a VM that runs already does not need it"
    if facts.dev_kvm:
        return Check("/dev/kvm", "ok", "there", why)
    if not _has_kvm(facts):
        return Check("/dev/kvm", "unknown", "comes with kvm", why)
    return Check("/dev/kvm", "degraded", "not there", why, _MODPROBE)


def _paging(facts: KernelFacts) -> Check:
    why = "which MMU guests run on; both are traced"
    shown = ("kvm.tdp_mmu", "kvm_amd.npt", "kvm_intel.ept")
    params = [f"{name}={facts.params[name]}" for name in shown if name in facts.params]
    if not params:
        return Check("paging", "unknown", "no module parameters to read", why)
    mmu = "TDP MMU" if facts.params.get("kvm.tdp_mmu") in ("Y", "1") else "shadow MMU"
    return Check("paging", "ok", f"{mmu} ({', '.join(params)})", why)


# --- addresses and values -------------------------------------------------------------------------


def _kallsyms(facts: KernelFacts) -> Check:
    why = "hooks are found by symbol, and values by address"
    if facts.kallsyms and (facts.values or facts.kcore or _kcore_note(facts)):
        found = f"{len(facts.symbols)} of the hooks' symbols"
        return Check("kallsyms", "ok", found, why, required=True)
    if facts.kallsyms:
        found = "/proc/kallsyms has no data symbols (vmemmap_base)"
        remedy = "boot a kernel with CONFIG_KALLSYMS_ALL=y (distribution kernels have it)"
        return Check("kallsyms", "missing", found, why, remedy, required=True)
    note = next((n for n in facts.notes if n.startswith("/proc/kallsyms")), "")
    found = note or "/proc/kallsyms is empty: this kernel is built without CONFIG_KALLSYMS"
    remedy = "boot a kernel with CONFIG_KALLSYMS=y"
    if note:
        held = "CAP_SYSLOG" in facts.capabilities
        remedy = "sysctl kernel.kptr_restrict=1" if held else _AS_ROOT
    return Check("kallsyms", "missing", found, why, remedy, required=True)


def _kcore_note(facts: KernelFacts) -> str:
    return next((n for n in facts.notes if "kcore" in n), "")


def _kcore(facts: KernelFacts) -> Check:
    why = "where struct pages lie, which SPTE bits mean what: read once, before loading"
    if facts.kcore:
        found = f"{len(facts.values)} values read"
        return Check("kcore", "ok", found, why, required=True)
    note = _kcore_note(facts)
    if not note:
        return Check("kcore", "unknown", "not read: no addresses to read at", why, required=True)
    remedy = _AS_ROOT
    if facts.lockdown == "confidentiality":
        remedy = "boot with lockdown=integrity or lockdown=none"
    elif "CAP_SYS_RAWIO" in facts.capabilities:
        remedy = "boot a kernel with CONFIG_PROC_KCORE=y, and leave containers that hide it"
    return Check("kcore", "missing", note, why, remedy, required=True)


# --- bcc and Python -------------------------------------------------------------------------------


def _bcc(facts: KernelFacts) -> Check:
    why = "compiles and attaches the probes; it comes from the distribution only"
    if facts.bcc_version and not facts.bcc_problem:
        found = f"{facts.bcc_version} in {facts.bcc_path}"
        return Check("bcc", "ok", found, why, required=True)
    problem = facts.bcc_problem or "not installed"
    found = "bcc is not installed" if problem == "not installed" else f"no usable bcc: {problem}"
    remedy = "apt install python3-bpfcc"
    if "PyPI" in problem:
        remedy += " (and pip uninstall bcc)"
    return Check("bcc", "missing", found, why, remedy, required=True)


def _bcc_fentry(facts: KernelFacts) -> Check:
    why = "without it all hooks are kprobes, which cost about twice a fentry"
    if facts.bcc_module_fentry:
        return Check("bcc fentry", "ok", "knows functions of modules", why)
    if not facts.bcc_version:
        return Check("bcc fentry", "unknown", "no bcc to ask", why)
    found = f"bcc {facts.bcc_version} has no fentry for modules"
    return Check("bcc fentry", "degraded", found, why, "install a newer bcc (0.31 has it)")


def _python(facts: KernelFacts) -> Check:
    why = "the interpreter that runs pfntrace"
    match = re.match(r"(\d+)\.(\d+)", facts.python)
    if not match:
        return Check("python", "unknown", facts.python or "not known", why)
    if (int(match[1]), int(match[2])) >= _PYTHON_MIN:
        return Check("python", "ok", facts.python, why)
    minimum = ".".join(map(str, _PYTHON_MIN))
    found = f"Python {facts.python} is older than {minimum}"
    return Check("python", "missing", found, why, f"use Python {minimum} or newer", required=True)


# --- hooks ----------------------------------------------------------------------------------------


def _no_profile(checks: list[Check], text: str) -> Check:
    # The facts allow no choice: the cause is above if there is one, else it is in the error.
    why = "the kernel functions that the probes are attached to"
    cause = next((check.name for check in checks if check.blocks), "")
    if cause:
        found = f"not examined, {cause} comes first"
        return Check("hooks", "unknown", found, why, required=True)
    found, _, remedy = text.rpartition("; ")
    return Check("hooks", "missing", found or text, why, remedy if found else "", required=True)


def _hooks(profile: KernelProfile) -> Iterator[Check]:
    # One check a hook, in the order of the fault path.
    known = {h.name: (h.without, h.required) for h in HOOKS}
    known |= {t.name: (t.without, t.required) for t in TRACEPOINTS}
    for choice in profile.hooks:
        note = f": {choice.note}" if choice.note else ""
        found = f"{' '.join(choice.symbols)} ({choice.how}{note})"
        why, required = known[choice.hook]
        yield Check(f"hook {choice.hook}", "ok", found, why, required=required)
    for missing in profile.missing:
        name = f"hook {missing.hook}"
        if missing.required:
            found = f"{missing.tried[0]}: {missing.why}"
            yield Check(name, "missing", found, missing.without, _REPORT, required=True)
        elif missing.without:
            found = f"{', '.join(missing.tried)}: {missing.why}"
            yield Check(name, "degraded", found, missing.without)
        else:
            yield Check(name, "ok", "not in this kernel's fault path: nothing is lost")


def _generation(generation: str) -> Check:
    why = "names how this kernel holds page references, for readers of the trace"
    if generation == "unknown":
        return Check("generation", "unknown", "shows once kvm's BTF does", why)
    return Check("generation", "ok", f"{generation}, {_GENERATIONS[generation]}", why)


# --- for the front door ---------------------------------------------------------------------------


def as_json(examination: Examination, facts: KernelFacts) -> dict[str, Any]:
    """Return the examination and all facts as one JSON object.

    Keys: can_record, problem (null if none), kernel, generation, checks (list of name, status,
    found, why, remedy, required), hooks (hook -> symbols, how, note), missing_hooks (hook ->
    tried, why, without, required), facts.
    """
    profile = examination.profile
    found = [dataclasses.asdict(choice) for choice in profile.hooks] if profile else []
    missing = [dataclasses.asdict(hook) for hook in profile.missing] if profile else []
    return {
        "can_record": examination.can_record,
        "problem": examination.first_problem or None,
        "kernel": examination.release,
        "generation": examination.generation,
        "checks": [dataclasses.asdict(check) for check in examination.checks],
        "hooks": {choice.pop("hook"): choice for choice in found},
        "missing_hooks": {hook.pop("hook"): hook for hook in missing},
        "facts": json.loads(facts.to_json()),
    }


_WIDTH = 80
_MARKS = {"ok": "ok", "missing": "MISSING", "degraded": "degraded", "unknown": "?"}
_INDENT = 2 + 9 + 15


def _block(status: Status, name: str, *texts: str) -> list[str]:
    # The mark and the name, then each text as a paragraph of its own in the third column.
    lines: list[str] = []
    for text in filter(None, texts):
        lines += textwrap.wrap(text, _WIDTH - _INDENT, break_on_hyphens=False)
    first = f"  {_MARKS[status]:<9}{name:<14} "
    return [(first if i == 0 else " " * _INDENT) + line for i, line in enumerate(lines)]


def as_lines(examination: Examination) -> list[str]:
    """Return the examination as plain text, at most 80 columns, one line for each hook."""
    lines = [f"Linux {examination.release or '?'}: " + _verdict(examination)]
    lines += textwrap.wrap(examination.first_problem, _WIDTH, break_on_hyphens=False)
    lines.append("")
    for check in examination.checks:
        if not check.name.startswith("hook "):
            lines += _check_lines(check.name, check)
    if examination.profile is not None:
        lines += _hook_lines(examination, examination.profile)
    return lines


def _verdict(examination: Examination) -> str:
    if not examination.can_record:
        return "cannot record"
    short = sum(check.status == "degraded" for check in examination.checks)
    return "can record" + (f", with {short} shortcoming{'s' * (short > 1)}" if short else "")


def _check_lines(name: str, check: Check) -> list[str]:
    if check.status == "ok":
        return _block("ok", name, check.found)
    remedy = f"-> {check.remedy}" if check.remedy else ""
    return _block(check.status, name, check.found, f"({check.why})" if check.why else "", remedy)


def _hook_lines(examination: Examination, profile: KernelProfile) -> list[str]:
    # One line a symbol: hook, symbol, how; then, with a mark, what is missing and what it costs.
    total = len(HOOKS) + len(TRACEPOINTS)
    free = [missing.hook for missing in profile.missing if not missing.without]
    count = f"{len(profile.hooks)} of {total}, as listed below"
    absent = f"not in this kernel's fault path: {', '.join(free)}" if free else ""
    lines = _block("missing" if profile.blocking else "ok", "hooks", count, absent)
    for choice in profile.hooks:
        how = choice.how.removeprefix("raw_")
        for i, symbol in enumerate(choice.symbols):
            lines.append(f"    {'' if i else choice.hook:<19} {symbol:<43} {how}")
    for check in examination.checks:
        if check.name.startswith("hook ") and check.status != "ok":
            lines += _check_lines(check.name.removeprefix("hook "), check)
    return lines
