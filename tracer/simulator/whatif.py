"""What if: the recorded accesses, judged by the rules of their own generation and of another.

Accesses, host pages and invalidations are taken as recorded; mappings, references, refusals and
the kernel's work on struct pages are what each generation's rules make of them. A kernel that
broke its rules did otherwise: that is the replay's divergence, not this table. A guest whose fault
is refused ends there on a real kernel, so that what it did afterwards is an estimate.
May import: standard library, `tracer.simulator`.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from tracer.simulator.kernels import Kernel
from tracer.simulator.replayleaves import Sight

__all__ = ("Difference", "WhatIf")

Row = Mapping[str, Any]


@dataclasses.dataclass(slots=True)
class _Side:
    mappings: int = 0
    refused: int = 0
    references: int = 0
    leaked: int = 0
    puts: int = 0
    puts_locked: int = 0
    marks: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class Difference:
    """Counts by name: (by the rules of the recorded generation, by those of the other)."""

    counts: dict[str, tuple[int, int]]
    #: guest frames that only one of them maps
    only_here: int
    only_there: int
    first_refusals: tuple[tuple[int, int], ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON."""
        return {
            **{name: {"own": a, "other": b} for name, (a, b) in self.counts.items()},
            "gfns_only_own": self.only_here,
            "gfns_only_other": self.only_there,
            "refused_first": [{"vm": vm, "gfn": gfn} for vm, gfn in self.first_refusals],
        }

    def lines(self, own: str, other: str) -> Iterator[str]:
        """Yield a small table of two kernels by name, then what differs in words."""
        yield f"{'by the rules of':<28} {own:>10} {other:>10}"
        for name, (here, there) in self.counts.items():
            yield f"{name.replace('_', ' '):<28} {here:>10,} {there:>10,}"
        if self.only_there:
            yield f"{_frames(self.only_there)} refused by {own} would be mapped by {other}"
        if self.only_here:
            yield f"{_frames(self.only_here)} mapped by {own} would be refused by {other} (EFAULT)"
            vm, gfn = self.first_refusals[0]
            yield f"the first: VM {vm}, gfn {gfn:#x}"


def _frames(count: int) -> str:
    return f"{count:,} guest frame{'s' if count != 1 else ''}"


class WhatIf:
    """Counts for two kernels while the records go by."""

    def __init__(self, here: Kernel, there: Kernel, sight: Sight) -> None:
        self._hardware = (sight.accessed, sight.dirty)
        self._kernels = (here, there)
        self._sides = (_Side(), _Side())
        self._mapped: tuple[set[tuple[int, int]], set[tuple[int, int]]] = (set(), set())
        self._refused: tuple[set[tuple[int, int]], set[tuple[int, int]]] = (set(), set())
        self._order: list[tuple[int, int]] = []

    def take(self, row: Row) -> None:
        """Look at one record."""
        if row["kind"] == "FAULT" and row["faultin_ret"] not in (-1, 1):
            self._fault(row)
        elif row["kind"] == "SPTE" and row["op"] == "zap":
            self._zap(row)

    def _zap(self, row: Row) -> None:
        """Count what a zap marks: the SPTE's accessed and dirty bits, where there is a leaf."""
        marks = sum(bool(row["old"] & bit) for bit in self._hardware)
        for at, (kernel, side) in enumerate(zip(self._kernels, self._sides, strict=True)):
            if (row["vm"], row["gfn"]) in self._refused[at]:
                continue
            if kernel.zap_marks == "all" or (kernel.zap_marks == "bit" and row["refcount"]):
                side.marks += marks

    def _fault(self, row: Row) -> None:
        if row["slot"] is None or row["page_bits"] is None:
            return
        shadow = row["mmu"] == "shadow"
        held = 0 if self._put(self._kernels[0], shadow) == "faultin" else 1
        walked = row["walk_pfn"] is not None
        had_pfn = row["pfn"] is not None and not row["pfn"] >> 52
        taken = held and had_pfn and not (walked and self._kernels[0].pfnmap == "none")
        counted = (row["refcount"] or 0) - int(bool(taken)) > 0
        where = (row["vm"], row["gfn"])
        for at, kernel in enumerate(self._kernels):
            side = self._sides[at]
            if self._refuses(kernel, walked=walked, counted=counted, shadow=shadow):
                side.refused += 1
                if where not in self._refused[at]:
                    self._refused[at].add(where)
                    if at == 1:
                        self._order.append(where)
                continue
            if row["result"] in ("fixed", "error"):
                side.mappings += 1
                self._mapped[at].add(where)
            if (walked and (kernel.pfnmap == "none" or not counted)) or not counted:
                continue
            put = self._put(kernel, shadow)
            side.references += 1
            side.leaked += put == "never"
            side.puts += put != "never"
            side.puts_locked += put == "locked"
            side.marks += bool(kernel.shadow_fault_mark if shadow else kernel.fault_mark)

    @staticmethod
    def _put(kernel: Kernel, shadow: bool) -> str:
        return kernel.shadow_put or kernel.put if shadow else kernel.put

    @staticmethod
    def _refuses(kernel: Kernel, *, walked: bool, counted: bool, shadow: bool) -> bool:
        if not walked or counted:
            return False
        return kernel.pfnmap == "unless_zero" or (shadow and kernel.shadow_refuses)

    def difference(self) -> Difference:
        """Return what was counted."""
        here, there = self._sides
        names = {
            "mappings": "mappings", "refused": "faults_refused", "references": "references_taken",
            "leaked": "references_never_put", "puts": "references_put",
            "puts_locked": "puts_under_mmu_lock", "marks": "marks_of_struct_pages",
        }  # fmt: skip
        return Difference(
            {told: (getattr(here, name), getattr(there, name)) for name, told in names.items()},
            only_here=len(self._mapped[0] - self._mapped[1]),
            only_there=len(self._mapped[1] - self._mapped[0]),
            first_refusals=tuple(self._order[:16]),
        )
