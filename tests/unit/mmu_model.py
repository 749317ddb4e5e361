"""A small MMU that writes SPTE records as a kernel does: for tests of lifetimes.

    model = Model(vms=2); model.map(1, gfn=5); model.split(1, 0); model.destroy(1); model.rows

It knows several VMs, roots that became invalid but are not emptied yet, the TDP and the shadow
MMU, large leaves, splits, collapses and changes in place. `alive()` is what is mapped: the truth.
"""

from typing import Any

__all__ = ("ACCESSED", "DIRTY", "FROZEN", "HUGE", "LARGE", "NOT_PRESENT", "PRESENT", "TABLE",
           "WRITABLE", "Model", "leaf", "record")  # fmt: skip

Row = dict[str, Any]

ACCESSED, DIRTY = 0x20, 0x40
PRESENT, LARGE, WRITABLE = 1 << 11, 1 << 7, 2
NOT_PRESENT, FROZEN = 1 << 63, 0x80000000000005A0
#: A page table's entry: present and no leaf.
TABLE = 0x1234_5000 | PRESENT | 0x27
HUGE = 512


def leaf(pfn: int, level: int = 1, bits: int = WRITABLE) -> int:
    """Return an SPTE that maps a page."""
    return pfn << 12 | PRESENT | 1 | bits | (LARGE if level > 1 else 0)


def record(op: str, ts: int, **fields: Any) -> Row:
    """Return an SPTE record; `fields` replace what is plain."""
    plain = {
        "op": op, "ts": ts, "fault_ts": 0, "cpu": 0, "tid": 7, "vm": 1, "vcpu": -1, "gfn": 0,
        "pfn": 0x1000, "level": 1, "as_id": 0, "old": 0, "new": 0, "sptep": 0, "cause": "fault",
        "mmu": "tdp", "bits": 1, "refcount": 2, "mapcount": 0,
    }  # fmt: skip
    return plain | fields


class Model:
    """VMs 1 to `vms`; those in `shadow` have no TDP. Guest frames map where `pfn_of` says."""

    def __init__(self, vms: int = 1, shadow: frozenset[int] = frozenset()) -> None:
        self.rows: list[Row] = []
        self._shadow = shadow
        # VM -> its roots, the one in use last: (level, gfn) -> SPTE.
        self._roots: dict[int, list[dict[tuple[int, int], int]]] = {
            vm: [{}] for vm in range(1, vms + 1)
        }
        self._moves: dict[tuple[int, int], int] = {}

    def alive(self) -> list[tuple[int, int, int, int]]:
        """Return (VM, level, gfn, pfn) of all leaves, in order."""
        return sorted(
            (vm, level, gfn, spte >> 12 & (1 << 40) - 1)
            for vm, roots in self._roots.items()
            for root in roots
            for (level, gfn), spte in root.items()
        )

    def pfn_of(self, vm: int, gfn: int) -> int:
        """Return the host frame behind a guest frame, which `move` changes."""
        base = gfn & ~(HUGE - 1)
        return 0x40000 * vm + self._moves.get((vm, base), 0) * 0x800 + gfn

    def map(self, vm: int, gfn: int, bits: int = WRITABLE) -> None:
        """A fault maps a 4K page, splitting the large leaf that may be in its way."""
        root = self._roots[vm][-1]
        if (2, gfn & ~(HUGE - 1)) in root:
            self.split(vm, gfn)
        if (1, gfn) not in root:
            self._install(vm, root, 1, gfn, bits)

    def map_huge(self, vm: int, gfn: int) -> None:
        """A fault maps 2M; leaves of the table in its place are zapped after it."""
        root, gfn = self._roots[vm][-1], gfn & ~(HUGE - 1)
        if (2, gfn) in root:
            return
        children = [key for key in root if key[0] == 1 and gfn <= key[1] < gfn + HUGE]
        self._install(vm, root, 2, gfn, WRITABLE, TABLE if children else 0)
        for key in children:
            # The shadow MMU only unlinks the table; here its leaves go at once too.
            self._zap(vm, root, key, "fault", FROZEN)

    def split(self, vm: int, gfn: int) -> None:
        """Dirty logging, or a fault, puts a table of 512 leaves where a large one was."""
        root, gfn = self._roots[vm][-1], gfn & ~(HUGE - 1)
        if (2, gfn) not in root or vm in self._shadow:
            return
        huge = self._zap(vm, root, (2, gfn), "dirty_log", TABLE)
        for at in range(HUGE):
            root[1, gfn + at] = (huge | at << 12) & ~LARGE

    def zap(self, vm: int, gfn: int, cause: str = "notifier") -> None:
        """The notifier zaps what maps a guest frame, in all roots."""
        for root in self._roots[vm]:
            for key in [(1, gfn), (2, gfn & ~(HUGE - 1))]:
                if key in root:
                    self._zap(vm, root, key, cause)

    def move(self, vm: int, gfn: int) -> None:
        """Another page comes to stand behind a guest frame: zapped first, as KVM must."""
        base = gfn & ~(HUGE - 1)
        for at in range(HUGE):
            self.zap(vm, base + at)
        self._moves[vm, base] = self._moves.get((vm, base), 0) + 1

    def change(self, vm: int, gfn: int, bits: int) -> None:
        """Bits of a leaf change in place; the CPU sets its own without a record."""
        for root in self._roots[vm]:
            if (1, gfn) in root:
                old = root[1, gfn] | bits & (ACCESSED | DIRTY)
                new = old ^ bits
                if new != old:
                    self._write("change", vm, (1, gfn), "aging", old, new)
                root[1, gfn] = new

    def new_root(self, vm: int) -> None:
        """Invalidate all roots, as a fast zap-all does: what they map is zapped later."""
        if vm not in self._shadow:
            self._roots[vm].append({})

    def empty_roots(self, vm: int, cause: str = "root") -> None:
        """Zap what the invalid roots still map."""
        for root in self._roots[vm][:-1]:
            for key in list(root):
                self._zap(vm, root, key, cause, FROZEN)
        self._roots[vm] = self._roots[vm][-1:]

    def destroy(self, vm: int) -> None:
        """The VM ends: everything is zapped."""
        self.new_root(vm)
        self.empty_roots(vm, "teardown")
        for root in self._roots[vm]:
            for key in list(root):
                self._zap(vm, root, key, "teardown")

    def _install(
        self, vm: int, root: dict[tuple[int, int], int], level: int, gfn: int, bits: int,
        old: int = 0,
    ) -> None:  # fmt: skip
        root[level, gfn] = spte = leaf(self.pfn_of(vm, gfn), level, bits)
        self._write("install", vm, (level, gfn), "fault", old, spte)

    def _zap(
        self, vm: int, root: dict[tuple[int, int], int], key: tuple[int, int], cause: str,
        new: int = NOT_PRESENT,
    ) -> int:  # fmt: skip
        old = root.pop(key)
        self._write("zap", vm, key, cause, old, new)
        return old

    def _write(
        self, op: str, vm: int, key: tuple[int, int], cause: str, old: int, new: int
    ) -> None:
        ts = 1000 + 10 * len(self.rows)
        in_fault = cause == "fault"
        self.rows.append(
            record(
                op, ts, vm=vm, level=key[0], gfn=key[1], cause=cause, old=old, new=new,
                pfn=(old if op == "zap" else new) >> 12 & (1 << 40) - 1, tid=100 * vm + in_fault,
                fault_ts=ts - 5 if in_fault else 0, vcpu=0 if in_fault else -1,
                refcount=2 + key[1] % 3, mmu="shadow" if vm in self._shadow else "tdp",
                sptep=(key[0] << 40 | key[1] << 3) if vm in self._shadow else 0,
            )
        )  # fmt: skip
