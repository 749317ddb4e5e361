"""The bugs that can be planted, by name: what goes wrong, where it can, and what should find it.

Each is one of KVM-FACTS 7 or of the series' review; `model` says where its switch is. A bug is a
probability at each chance that it gets. May import: standard library, `tracer.simulator.kernels`.
"""

import dataclasses
from collections.abc import Mapping

from probes.errors import UsageError
from tracer.simulator.kernels import KERNELS, Kernel

__all__ = ("BUGS", "Bug", "check_bug", "parse_bugs")

_ALL = tuple(KERNELS)
_G0 = ("6.1", "6.12")
_PUT_HIDDEN = ("v7", "v8", "v10", "v11")
#: Those that put what they take: v9 as mailed keeps everything, and no bug can keep more.
_PUTS = (*_G0, *_PUT_HIDDEN, "v9", "6.13")


@dataclasses.dataclass(frozen=True, slots=True)
class Bug:
    """One bug. `scenario` is one that gives it a chance; `rate` how often it strikes by default."""

    name: str
    title: str
    source: str
    kernels: tuple[str, ...]
    scenario: str
    rate: float = 0.05
    #: needs the shadow MMU ("shadow") or the TDP MMU ("tdp"); "" both
    mmu: str = ""


#: All bugs by name.
BUGS: Mapping[str, Bug] = {
    bug.name: bug
    for bug in (
        Bug("missing_put", "a fault keeps its reference",
            "KVM-FACTS 7 #5: v9 as mailed", _ALL, "demand"),
        Bug("missing_put_shadow", "a fault of the shadow MMU keeps its reference",
            "KVM-FACTS 7 #4: v8", _PUTS, "demand", 0.05, "shadow"),
        Bug("double_put", "a fault gives its reference back twice",
            "the page is freed while it is mapped",
            _PUTS, "demand", 0.01),
        Bug("put_on_wrong_folio", "the reference is taken on one folio and put on another",
            "KVM-FACTS 7 #10: put of the hugepage-adjusted pfn (FSDAX)",
            (*_G0, "6.13"), "dax", 0.5, "tdp"),
        Bug("use_after_put", "a page is marked accessed after its reference is gone and it is free",
            "KVM-FACTS 7 #3: v7", ("v7",), "demand", 0.02),
        Bug("resurrect", "a page with count 0 gets a reference, and is freed by its put",
            "KVM-FACTS 7 #1: CVE-2021-22543", (*_G0, *_PUT_HIDDEN, "v9"), "virtio_gpu", 0.2),
        Bug("stale_spte", "an invalidation overlooks one SPTE",
            "KVM-FACTS 7 #14: 3a0f64de479c", _ALL, "balloon", 0.02),
        Bug("stale_sequence", "a fault maps a page although an invalidation has passed",
            "the stale check is not made", _ALL, "demand", 0.01),
        Bug("stale_slot", "a fault maps through a memslot that was deleted meanwhile",
            "KVM-FACTS 7 #18", _ALL, "slots", 0.1),
        Bug("sign_extension", "with bit 31 of the sequence set every fault looks stale: livelock",
            "KVM-FACTS 7 #11: ba6e3fe25543", ("6.1",), "livelock", 1.0),
        Bug("unpaired_start", "an invalidation that never ends: faults retry for ever",
            "KVM-FACTS 7 #12a", _ALL, "balloon", 0.05),
        Bug("endless_storm", "every fault is overtaken by an invalidation, for ever: the host's",
            "KVM-FACTS 7 #12b", _ALL, "demand", 1.0),
        Bug("obsolete_root", "a vCPU keeps a root that is obsolete: every fault looks stale",
            "KVM-FACTS 7 #12c", _ALL, "demand", 0.01),
        Bug("invalid_slot", "a memslot that is being deleted for seconds: faults retry meanwhile",
            "KVM-FACTS 7 #12d", _ALL, "slots", 1.0),
        Bug("vcpu_map_leak", "kvm_vcpu_map() without kvm_vcpu_unmap()",
            "KVM-FACTS 7 #20", _ALL, "nested", 0.2),
        Bug("cache_leak", "a pfn cache keeps a reference whenever it finds its page again",
            "KVM-FACTS 7 #21: 3dddf65b4f4c", _ALL, "kvmclock", 1.0),
        Bug("zero_page_growth", "faults on the zero page keep their references",
            "KVM-FACTS 7 #8: 7df003c85218", _PUTS, "idle", 1.0),
        Bug("lockless_put", "a retry without lock gives back a reference that was never held",
            "KVM-FACTS 7 #6: v11 on 6.8 and newer", ("v10", "v11"), "demand", 0.02),
        Bug("wrong_flag", "the kernel says counted of a page that is not, or the reverse",
            "KVM-FACTS 2.3: bit 59", ("v7", "v8", "v9-mailed", "v9", "6.13"), "virtio_gpu", 0.1),
        Bug("writable_over_readonly", "a writable SPTE over a mapping that the host may only read",
            "KVM-FACTS 7 #1, permission half: bd2fae8da794", _ALL, "readonly", 0.3),
        Bug("double_install", "a leaf is installed over a leaf that was never zapped",
            "KVM-FACTS 7 #15: CVE-2026-23401", _ALL, "demand", 0.02, "shadow"),
        Bug("wrong_gfn", "a leaf is installed for a frame outside of every memslot",
            "KVM-FACTS 7 #16: CVE-2026-46113", _ALL, "demand", 0.02),
    )
}  # fmt: skip


def check_bug(bug: Bug, kernel: Kernel, mmu: str) -> None:
    """Raise UsageError if the bug makes no sense there."""
    if kernel.name not in bug.kernels:
        raise UsageError(
            f"--bug {bug.name}: makes no sense on {kernel.name}; it does on "
            + ", ".join(bug.kernels)
        )
    if bug.mmu and bug.mmu != mmu:
        raise UsageError(f"--bug {bug.name}: needs --mmu {bug.mmu}")


def parse_bugs(texts: list[str], kernel: Kernel, mmu: str) -> dict[str, float]:
    """Return bug -> rate from `NAME` or `NAME=RATE`, and the kernel's own bugs at rate 1."""
    found = {name: 1.0 for name in kernel.bugs if BUGS[name].mmu in ("", mmu)}
    for text in texts:
        name, _, rate = text.partition("=")
        if name not in BUGS:
            raise UsageError(f"--bug {name}: no such bug; see pfntrace simulate --list")
        check_bug(BUGS[name], kernel, mmu)
        try:
            value = float(rate) if rate else BUGS[name].rate
        except ValueError:
            value = -1.0
        if not 0 < value <= 1:
            raise UsageError(f"--bug {text}: the rate is a number above 0, at most 1")
        found[name] = value
    return found
