"""What one fault found and did, and the FAULT record that tells it.

May import: standard library, `tracer.simulator`.
"""

from typing import Final

from tracer.simulator.clock import Task
from tracer.simulator.host import Page
from tracer.simulator.ledger import REFERENCES, TAKERS
from tracer.simulator.mmu import ALIAS, Slot, Vm, World
from tracer.simulator.recorder import FAULT_LAYOUT

__all__ = ("EFAULT", "ERR_FAULT", "NEVER", "NOSLOT", "NO_PFN", "Fault", "write_fault")

#: KVM_PFN_ERR_FAULT and KVM_PFN_NOSLOT, include/linux/kvm_host.h.
ERR_FAULT: Final = 0x7FF << 52
NOSLOT: Final = 1 << 63
#: A stage that was not reached, and a frame that nobody found.
NEVER: Final = 0xFFFFFFFF
NO_PFN: Final = (1 << 64) - 1
EFAULT: Final = -14
_WRITE: Final = 2
_FETCH: Final = 16
_PRESENT: Final = 1
_USER: Final = 4
_NO_STATE: Final = (0, 0, 0, 0, 0)
_TAKER: Final = TAKERS.index("fault")
_pack: Final = FAULT_LAYOUT.pack_into
_pack_reference: Final = REFERENCES.pack


class Fault:
    """What one fault found and did: `struct kvm_page_fault`, as far as a record tells it."""

    def __init__(
        self, gfn: int, slot: Slot | None, mmu_seq: int, *, write: bool, fetch: bool, alias: int,
        jitters: tuple[int, ...], was_present: bool,
    ) -> None:  # fmt: skip
        self.gfn, self.slot, self.mmu_seq = gfn, slot, mmu_seq
        self.write, self.fetch, self.alias = write, fetch, alias
        self.jitters, self.was_present = jitters, was_present
        self.page: Page | None = None
        self.pfn = self.walk_pfn = NO_PFN
        self.sptes = self.put_ts = self.put_pfn = 0
        self.faultin_ret, self.ret, self.level = -1, 0, 1
        #: does it hold a reference; was a race planted, and did its slot go
        self.held = self.writable = self.marked = self.outlived = False
        #: the bug that lets it map what is stale
        self.stale = ""
        #: is the page's count used; what KVM says of that
        self.counted = self.tracked = False
        self.stages = (NEVER, NEVER, NEVER, NEVER, NEVER)
        self.state = _NO_STATE


def write_fault(world: World, vm: Vm, task: Task, fault: Fault) -> str:
    """Write the FAULT record, after everything else that the fault did; returns its result."""
    kernel, jitters = world.kernel, fault.jitters
    now = task.now = task.now + 2400 + (jitters[5] >> 2)
    slot, page, gfn = fault.slot, fault.page, fault.gfn
    code = (_WRITE if fault.write else 0) | (_FETCH if fault.fetch else 0)
    code |= (_PRESENT if fault.was_present else 0) | (0 if vm.shadow else kernel.fault_bits | _USER)
    hva = vm_flags = 0
    slot_id = -1
    if slot is not None and fault.faultin_ret != -1:
        hva, slot_id = slot.hva + (gfn - slot.base << 12), slot.id
    if slot is not None and kernel.walk_tells and fault.walk_pfn != NO_PFN:
        vm_flags = slot.mapping.kind.vm_flags
    counted = 2
    flags, count, mapcount, bits, order = fault.state
    flags_end, count_end, mapcount_end, bits_end, order_end = _NO_STATE
    if page is not None:
        if kernel.says_refcounted and fault.faultin_ret >= 0:
            counted = int(fault.tracked)
        flags_end, count_end, mapcount_end = page.flags, page.count, page.mapcount
        bits_end, order_end = bits, page.order
    t_faultin, t_gup, t_gup_end, t_end, t_map = fault.stages
    data, at, seq, head = world.out.fault_place(task)
    _pack(
        data, at, now, task.fault_ts, seq, head,
        (gfn << 12) + (fault.alias << ALIAS) + (now & 0xFF8), code, gfn, hva, fault.pfn,
        fault.walk_pfn, vm_flags, fault.mmu_seq, vm.seq, vm.in_progress, t_faultin, t_gup,
        t_gup_end, t_end, t_map, fault.ret, fault.faultin_ret, slot_id, 0, fault.level, counted,
        fault.writable, 0, vm.mmu, min(fault.sptes, 255), flags, count, mapcount, bits, order,
        flags_end, count_end, mapcount_end, bits_end, order_end,
    )  # fmt: skip
    if fault.counted:
        world.ledger.references.append(_pack_reference(
            vm.id, task.vcpu, _TAKER, fault.gfn, fault.pfn, task.fault_ts,
            task.fault_ts + t_end, fault.put_ts, fault.put_pfn,
        ))  # fmt: skip
    task.fault_ts = 0
    task.now = now + 8000 + (jitters[1] << 3)
    return "error" if fault.ret < 0 else kernel.results[fault.ret]
