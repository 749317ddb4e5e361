"""The lab's kernels, as data: what they are, where they come from, what they need.

A new kernel is one entry here. Imports only ``errors``.
"""

from __future__ import annotations

from dataclasses import dataclass

from .errors import LabError

__all__ = ("KERNELS", "LabKernel", "kernel")


@dataclass(frozen=True, slots=True)
class LabKernel:
    """One kernel that the lab can boot."""

    key: str
    """What ``--kernel`` takes, and the start of ``uname -r`` in the guest."""
    suite: str
    """The Debian suite that has it."""
    package: str
    """The metapackage whose ``linux-*`` dependencies are the kernel and its modules."""
    about: str
    """Why the lab has it."""
    append: tuple[str, ...] = ()
    """Kernel arguments that this kernel needs in the lab, beyond those of every kernel."""


KERNELS: dict[str, LabKernel] = {
    entry.key: entry
    for entry in (
        LabKernel(
            "6.1",
            "bookworm",
            "linux-image-amd64",
            "Debian 12: the oldest generation supported, kvm_faultin_pfn with a kvm_page_fault.",
        ),
        LabKernel(
            "6.12",
            "trixie",
            "linux-image-amd64",
            "Debian 13: the last generation that refuses non-refcounted pages; the series' base.",
        ),
        LabKernel(
            "7.3",
            "trixie-backports",
            "linux-image-amd64",
            "Today's kernel: kvm_mmu_faultin_pfn, pages handed over without a reference held.",
        ),
    )
}


def kernel(key: str) -> LabKernel:
    """Return the lab kernel called *key*."""
    try:
        return KERNELS[key]
    except KeyError:
        known = ", ".join(KERNELS)
        raise LabError(f"no lab kernel {key!r}: choose one of {known}") from None
