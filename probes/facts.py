"""What was observed of a kernel and its host: facts, never conclusions.

A `KernelFacts` is saved in every trace and comes back from it, so that any kernel that was once
recorded can be a test fixture (`tests/unit/facts/*.json`). It holds no kernel addresses except
the two bases that turn a frame number into its struct page. May import: standard library only.
"""

import dataclasses
import json
from typing import Any, NamedTuple

from probes.errors import TraceFormatError

__all__ = ("FACTS_VERSION", "Field", "KernelFacts", "series_version")

FACTS_VERSION = 1


class Field(NamedTuple):
    """Where a member lies in its structure: `bit` offset and `bits` of width, as in BTF."""

    bit: int
    bits: int

    @property
    def offset(self) -> int:
        """Byte offset of the member."""
        return self.bit // 8


@dataclasses.dataclass(frozen=True, slots=True)
class KernelFacts:
    """One host, as it was seen at one moment. Everything defaults to "not there"."""

    release: str = ""
    #: /proc/version: distribution, compiler, build.
    version: str = ""
    machine: str = ""
    cpus: int = 1
    #: structure -> member -> place; `""` is the structure itself (its size in bits).
    structs: dict[str, dict[str, Field]] = dataclasses.field(default_factory=dict)
    #: function (in BTF) -> parameter names.
    functions: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    #: tracepoints that have a raw form (typedef btf_trace_x in BTF).
    tracepoints: tuple[str, ...] = ()
    enums: dict[str, int] = dataclasses.field(default_factory=dict)
    #: text symbols among the hooks' candidates, compiler clones (`x.isra.0`) included.
    symbols: tuple[str, ...] = ()
    #: candidates that the kernel forbids to probe (/sys/kernel/debug/kprobes/blacklist).
    blacklisted: tuple[str, ...] = ()
    #: data symbols read at run time: masks, bases, the zero page's frame number.
    values: dict[str, int] = dataclasses.field(default_factory=dict)
    #: module parameters, "kvm.tdp_mmu" -> "Y".
    params: dict[str, str] = dataclasses.field(default_factory=dict)
    config: dict[str, str] = dataclasses.field(default_factory=dict)
    modules: tuple[str, ...] = ()
    #: highest page frame number + 1 (/proc/zoneinfo).
    max_pfn: int = 0
    btf_vmlinux: bool = False
    btf_kvm: bool = False
    dev_kvm: bool = False
    #: preemption model of the running kernel (none, voluntary, lazy, full), "" if nothing says it.
    preempt: str = ""
    #: state in brackets of /sys/kernel/security/lockdown, "" where the kernel has none.
    lockdown: str = ""
    capabilities: tuple[str, ...] = ()
    #: True, False, or None where nothing says it.
    kprobes: bool | None = None
    kallsyms: bool = False
    kcore: bool = False
    bcc_version: str = ""
    bcc_path: str = ""
    bcc_problem: str = ""
    #: does this bcc know fentry of module functions (MODULE_KFUNC_PROBE)?
    bcc_module_fentry: bool = False
    python: str = ""
    #: what could not be observed and why, in order of trying.
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """Return the facts as one JSON object with sorted keys."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return json.dumps({"facts_version": FACTS_VERSION, **data}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "KernelFacts":
        """Return the facts that `to_json` wrote.

        Raises TraceFormatError if the text is not such an object or is of another version.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            if data.pop("facts_version") != FACTS_VERSION:
                raise TraceFormatError("facts of another version; use the pfntrace that made them")
            data["structs"] = {
                name: {member: Field(*place) for member, place in members.items()}
                for name, members in data["structs"].items()
            }
            data["functions"] = {name: tuple(args) for name, args in data["functions"].items()}
            for key in (
                "tracepoints",
                "symbols",
                "blacklisted",
                "modules",
                "capabilities",
                "notes",
            ):
                data[key] = tuple(data[key])
            if not all(type(v) is int and 0 <= v < 1 << 64 for v in data["values"].values()):
                raise ValueError("values that are no numbers of 64 bits")
            return cls(**data)
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise TraceFormatError(f"not the facts of a kernel: {err}") from err

    def has_field(self, struct: str, member: str) -> bool:
        """Tell whether BTF knows this member."""
        return member in self.structs.get(struct, {})

    def offset(self, struct: str, *members: str) -> int | None:
        """Return the byte offset of the first of `members` that exists, else None."""
        known = self.structs.get(struct, {})
        for member in members:
            if member in known:
                return known[member].offset
        return None


def series_version(facts: KernelFacts) -> str:
    """Name the version of the out-of-tree series of a G1 kernel, "" if its structures do not tell.

    Each version left members of its own (KVM-FACTS 2.1 to 2.3), and v11 a mask.
    """
    if "shadow_refcounted_mask" in facts.values:
        return "v11"
    if facts.has_field("kvm_page_fault", "accessed_page"):
        return "v10"
    for member, version in (
        ("allow_write_mapping", "v7"),
        ("allow_non_refcounted_struct_page", "v9"),
        ("try_map_writable", "v8"),
    ):
        if facts.has_field("kvm_follow_pfn", member):
            return version
    return ""
