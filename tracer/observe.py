"""Observe this host: everything `KernelFacts` holds, and why what is missing is missing.

Nothing here decides anything and nothing here fails: what cannot be observed becomes a note.
May import: standard library, `probes`, `tracer.btf`, `tracer.kcore`.
"""

import contextlib
import gzip
import importlib.util
import mmap
import os
import platform
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from probes import hooks
from probes.errors import HostError
from probes.facts import Field, KernelFacts
from tracer import kcore
from tracer.btf import Btf

__all__ = ("bcc_spec", "observe")

#: Where Debian, Fedora and others put the distribution's Python packages: a virtual
#: environment does not see them (bcc#3029).
_DIST_PACKAGES = ("/usr/lib/python3/dist-packages",)
#: Bit numbers, include/uapi/linux/capability.h
_CAPABILITIES = {
    "CAP_SYS_RAWIO": 17,
    "CAP_SYS_PTRACE": 19,
    "CAP_SYS_ADMIN": 21,
    "CAP_SYS_RESOURCE": 24,
    "CAP_SYSLOG": 34,
    "CAP_PERFMON": 38,
    "CAP_BPF": 39,
}
_CONFIG = (
    "CONFIG_KPROBES",
    "CONFIG_KPROBE_EVENTS",
    "CONFIG_BPF_EVENTS",
    "CONFIG_BPF_SYSCALL",
    "CONFIG_DEBUG_INFO_BTF",
    "CONFIG_DEBUG_INFO_BTF_MODULES",
    "CONFIG_NODES_SHIFT",
    "CONFIG_KVM",
    "CONFIG_PREEMPT_RT",
)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace").strip()
    except OSError:
        return ""


def _capabilities() -> tuple[str, ...]:
    match = re.search(r"^CapEff:\s*([0-9a-f]+)", _read("/proc/self/status"), re.M)
    mask = int(match[1], 16) if match else 0
    return tuple(name for name, bit in _CAPABILITIES.items() if mask >> bit & 1)


def _lockdown() -> str:
    match = re.search(r"\[(\w+)\]", _read("/sys/kernel/security/lockdown"))
    return match[1] if match else ""


def _preempt(version: str, config: dict[str, str]) -> str:
    """Return the preemption model: chosen at run time, at boot, or when the kernel was built."""
    match = re.search(r"\((\w+)\)", _read("/sys/kernel/debug/sched/preempt"))
    if match:
        return match[1]
    if config.get("CONFIG_PREEMPT_RT") == "y":
        return "full"
    if "PREEMPT_DYNAMIC" in version:
        return ""  # debugfs would say it, and is closed
    return "full" if re.search(r"\bPREEMPT(_RT)?\b", version) else "voluntary"


def _config(release: str) -> dict[str, str]:
    text = _read(f"/boot/config-{release}") or _read(f"/lib/modules/{release}/config")
    if not text:
        with contextlib.suppress(OSError, EOFError):
            text = gzip.decompress(Path("/proc/config.gz").read_bytes()).decode()
    found = dict(re.findall(r"^(CONFIG_\w+)=(.*)$", text, re.M))
    if not text:
        return {}
    return {name: found.get(name, "n") for name in _CONFIG}


def _params() -> dict[str, str]:
    params = {}
    for module in ("kvm", "kvm_amd", "kvm_intel"):
        folder = Path("/sys/module") / module / "parameters"
        with contextlib.suppress(OSError):
            for entry in sorted(folder.iterdir()):
                params[f"{module}.{entry.name}"] = _read(entry)
    return params


def _max_pfn() -> int:
    """Return the end of the last zone (/proc/zoneinfo: spanned, start_pfn)."""
    top = 0
    spanned = 0
    for line in _read("/proc/zoneinfo").splitlines():
        words = line.split()
        if words[:1] == ["spanned"]:
            spanned = int(words[1])
        elif words[:1] == ["start_pfn:"]:
            top = max(top, int(words[1]) + spanned)
    return top


def bcc_spec() -> Any:
    """Find iovisor's bcc without importing it: on the path, else among the system's packages.

    PyPI's packages of that name have no `libbcc.py`; they are never what is meant.
    """
    for folder in (*sys.path, *_DIST_PACKAGES):
        package = Path(folder or ".") / "bcc"
        if (package / "libbcc.py").is_file() and (package / "__init__.py").is_file():
            return importlib.util.spec_from_file_location(
                "bcc", package / "__init__.py", submodule_search_locations=[str(package)]
            )
    return None


def _bcc() -> dict[str, Any]:
    spec = bcc_spec()
    if spec is None:
        other = importlib.util.find_spec("bcc")
        problem = "not installed"
        if other is not None and other.origin:  # a mere folder of that name has none
            problem = f"{other.origin} is PyPI's unrelated package of that name"
        return {"bcc_problem": problem}
    folder = Path(spec.origin).parent
    version = re.search(r"['\"]([\d.]+)", _read(folder / "version.py"))
    return {
        "bcc_path": str(folder),
        "bcc_version": version[1] if version else "unknown",
        "bcc_module_fentry": _libbcc_mentions(b"MODULE_KFUNC_PROBE"),
    }


def _libbcc_mentions(word: bytes) -> bool:
    """Search the library itself: its macros are compiled into it as text."""
    for path in sorted(Path("/usr").glob("lib*/*/libbcc.so.0")) + sorted(
        Path("/usr").glob("lib*/libbcc.so.0")
    ):
        with contextlib.suppress(OSError, ValueError), path.open("rb") as lib:
            with mmap.mmap(lib.fileno(), 0, access=mmap.ACCESS_READ) as view:
                return view.find(word) >= 0
    return False


def _interesting(content: bytes) -> bytes:
    """Return the lines of kallsyms worth a search: modules' and what hooks.VMLINUX_SYMBOLS names.

    Modules come last. Searching all two hundred thousand lines for every name takes over a second
    where a kernel is emulated. Where kvm is built in, all lines are returned.
    """
    first = content.find(b"\t[")
    if first < 0 or content.find(b"\t[kvm]") < 0:
        return content
    parts = []
    for name in hooks.VMLINUX_SYMBOLS:
        at = content.find(f" {name}\n".encode())
        if at >= 0:
            parts.append(content[content.rfind(b"\n", 0, at) + 1 : at + len(name) + 2])
    return b"".join(parts) + content[content.rfind(b"\n", 0, first) + 1 :]


def _kallsyms(notes: list[str]) -> tuple[tuple[str, ...], dict[str, int], bool]:
    """Return the hooks' text symbols, the data symbols' addresses, and whether addresses show."""
    wanted = {name for hook in hooks.HOOKS for name in hook.candidates}
    names = "|".join(map(re.escape, sorted(wanted)))
    text = re.compile(rf"^\S+ [tT] ((?:{names})(?:\.\S+)?)(?:\t|$)".encode(), re.M)
    data = re.compile(
        rf"^([0-9a-f]+) [a-zA-Z] ({'|'.join(hooks.DATA_SYMBOLS)})(?:\t|$)".encode(), re.M
    )
    try:
        content = _interesting(Path("/proc/kallsyms").read_bytes())
    except OSError as err:
        notes.append(f"/proc/kallsyms: {err.strerror}")
        return (), {}, False
    symbols = tuple(sorted({m.decode() for m in text.findall(content)}))
    addresses = {name.decode(): int(value, 16) for value, name in data.findall(content)}
    if addresses and not any(addresses.values()):
        notes.append("/proc/kallsyms hides addresses (no CAP_SYSLOG, or kptr_restrict=2)")
        return symbols, {}, False
    return symbols, addresses, bool(content)


def _blacklisted(symbols: Iterable[str]) -> tuple[str, ...]:
    names = set(re.findall(r"\t(\S+)", _read("/sys/kernel/debug/kprobes/blacklist")))
    return tuple(sorted(names & set(symbols)))


def _btf(notes: list[str]) -> dict[str, Any]:
    """Read what the hooks want from BTF of vmlinux and kvm."""
    found: dict[str, Any] = {"btf_vmlinux": False, "btf_kvm": False}
    try:
        base = Btf()
    except HostError as err:
        notes.append(str(err))
        return found
    found["btf_vmlinux"] = True
    kvm = base
    # KVM may be built in: then its types are vmlinux's.
    if Path("/sys/kernel/btf/kvm").exists():
        try:
            kvm = Btf("kvm", base)
            found["btf_kvm"] = True
        except HostError as err:
            notes.append(str(err))
    structs: dict[str, dict[str, Field]] = {}
    for name, members in hooks.STRUCTS.items():
        places = kvm.struct(name, members)
        if places:
            structs[name] = places
    functions = {}
    if found["btf_kvm"]:
        for hook in hooks.HOOKS:
            for candidate in hook.candidates:
                parameters = kvm.own_parameters(candidate)
                if parameters is not None:
                    functions[candidate] = parameters
    enums = {**base.enum("pageflags"), **base.enum("zone_type")}
    enums.update(kvm.anonymous_enums(hooks.ENUM_VALUES) if found["btf_kvm"] else {})
    found.update(
        structs=structs,
        functions=functions,
        enums={k: v for k, v in enums.items() if k in hooks.ENUM_VALUES},
        tracepoints=tuple(
            t.event for t in hooks.TRACEPOINTS if kvm.has_typedef(f"btf_trace_{t.event}")
        ),
    )
    if kvm is not base:
        kvm.close()
    base.close()
    return found


def _kprobes(config: dict[str, str]) -> bool | None:
    if config:
        return config.get("CONFIG_KPROBES") == "y"
    if Path("/sys/bus/event_source/devices/kprobe").exists():
        return True
    return False if Path("/sys/bus/event_source/devices").exists() else None


def observe() -> KernelFacts:
    """Return the facts of the running host. Takes well under a second; needs no privilege."""
    notes: list[str] = []
    release = platform.release()
    symbols, addresses, kallsyms = _kallsyms(notes)
    values: dict[str, int] = {}
    kcore_ok = False
    if addresses:
        try:
            values = kcore.read_symbols(addresses, hooks.DATA_SYMBOLS)
            kcore_ok = True
        except HostError as err:
            notes.append(str(err))
    config = _config(release)
    found = {**_bcc(), **_btf(notes)}
    return KernelFacts(
        release=release,
        version=_read("/proc/version"),
        machine=platform.machine(),
        cpus=os.cpu_count() or 1,
        symbols=symbols,
        blacklisted=_blacklisted(symbols),
        values=values,
        params=_params(),
        config=config,
        modules=tuple(
            m for m in ("kvm", "kvm_amd", "kvm_intel") if Path("/sys/module", m).exists()
        ),
        max_pfn=_max_pfn(),
        dev_kvm=Path("/dev/kvm").exists(),
        preempt=_preempt(_read("/proc/version"), config),
        lockdown=_lockdown(),
        capabilities=_capabilities(),
        kprobes=_kprobes(config),
        kallsyms=kallsyms,
        kcore=kcore_ok,
        python=f"{platform.python_version()} ({sys.executable})",
        notes=tuple(notes),
        **found,
    )
