"""Large leaves in pieces, and whole again: what dirty logging makes of 2M mappings.

Eager splitting (kvm.eager_page_split, on by default since 5.18) writes a table of 512 leaves and
puts it in the large leaf's place: a zap that leaves a table behind, and no record for any of the
children. When logging ends, 6.1 and 6.12 zap the table (its leaves change to the frozen value,
kvm_tdp_mmu_zap_collapsible_sptes()); 7.x puts the large leaf in the table's place at once, and the
table's leaves change to the frozen value behind it (kvm_tdp_mmu_recover_huge_pages()).
May import: standard library, `tracer.simulator`.
"""

from typing import Final

from tracer.simulator.clock import Story, Task
from tracer.simulator.ledger import NO_COUNT
from tracer.simulator.mmu import SPLIT, ZAP_NS, Leaf, Slot, Vm, World
from tracer.simulator.recorder import CAUSE

__all__ = ("recover", "split")

_PAGES: Final = 512
_LARGE: Final = 0x80
#: What a page table's entry has beside the frame: present, writable, user, accessed, MMU_PRESENT.
_TABLE: Final = 0x827
_SLOT: Final = CAUSE["slot"]
_CHILD_NS: Final = 60


def split(vm: Vm, task: Task, ts: int, leaf: Leaf, cause: int) -> None:
    """tdp_mmu_split_huge_page(): 512 leaves of 4K with the bits that the large one had."""
    root, first, spte, seq = leaf.root, leaf.key, leaf.spte & ~_LARGE, task.seq
    table = vm.new_table() >> 12 & 0xFFFFFFFF
    vm.zap(task, ts, leaf, cause, new=table << 12 | _TABLE, ended_by="split")
    root.split[first] = table << 12 | _TABLE
    for at in range(_PAGES):
        child = Leaf(root, first + at, 1, spte + (at << 12), leaf.pfn + at, leaf.page)
        child.slot_id, child.as_id = leaf.slot_id, leaf.as_id
        vm.born(task, ts, child, SPLIT, seq, NO_COUNT, NO_COUNT)
        root.leaves[first + at] = child


def recover(world: World, vm: Vm, task: Task, slot: Slot) -> Story:
    """Logging has ended: tables that large leaves could replace go."""
    root = vm.root
    # Where 0 is the empty value, leaves of a deleted slot look the same (KVM-FACTS 5.2).
    ended_by = "collapse" if world.kernel.nonpresent else "zap"
    for first in [key for key in root.split if slot.base <= key < slot.end]:
        yield from vm.write_lock(task, _PAGES * ZAP_NS)
        if root is not vm.root or first not in root.split:
            return
        table = root.split.pop(first)
        children = [root.leaves[key] for key in range(first, first + _PAGES) if key in root.leaves]
        if not children or children[0].level > 1:
            continue
        large = None
        if world.kernel.recovers_in_place:
            child = children[0]
            behind = child.key - first
            spte = (child.spte | _LARGE) - (behind << 12)
            for one in children:
                del root.leaves[one.key]
            large = vm.install(task, task.now, first, 2, child.pfn - behind, child.page, spte,
                               slot, _SLOT, old=table)  # fmt: skip
        for one in children:
            task.now += _CHILD_NS
            vm.zap(task, task.now, one, _SLOT, new=world.kernel.frozen, ended_by=ended_by)
            task.now += 0 if world.kernel.zap_marks == "none" else ZAP_NS
        if large is not None:
            root.leaves[first] = large
        task.now += 1000
