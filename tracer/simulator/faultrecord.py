"""What one fault found and did, and the FAULT record that tells it.

May import: standard library, `tracer.simulator`.
"""

from tracer.simulator.clock import Task
from tracer.simulator.host import Page
from tracer.simulator.ledger import REFERENCES, TAKERS
from tracer.simulator.mmu import ALIAS, Slot, Vm, World
from tracer.simulator.recorder import FAULT_LAYOUT

__all__ = ("EFAULT", "ERR_FAULT", "NEVER", "NOSLOT", "NO_PFN", "Fault", "write_fault")

#: KVM_PFN_ERR_FAULT and KVM_PFN_NOSLOT, include/linux/kvm_host.h.
ERR_FAULT, NOSLOT = 0x7FF << 52, 1 << 63
#: A stage that was not reached, and a frame that nobody found.
NEVER, NO_PFN = 0xFFFFFFFF, (1 << 64) - 1
EFAULT = -14
_WRITE, _FETCH, _PRESENT, _USER = 2, 16, 1, 4
_NO_STATE = (0, 0, 0, 0, 0)
_TAKER = TAKERS.index("fault")


class Fault:
    """What one fault found and did: `struct kvm_page_fault`, as far as a record tells it.

    Values that a fault has not reached are the class's own: there is one object a vCPU, and making
    it is on the hot path.
    """

    page: Page | None = None
    pfn = walk_pfn = NO_PFN
    sptes = put_ts = put_pfn = 0
    faultin_ret, ret, level = -1, 0, 1
    #: does it hold a reference; was a race planted, and did its slot go; what KVM says of the page
    held = writable = marked = outlived = tracked = False
    counted = False
    stages = (NEVER, NEVER, NEVER, NEVER, NEVER)
    state: tuple[int, ...] = _NO_STATE

    def __init__(
        self, gfn: int, slot: Slot | None, mmu_seq: int, *, write: bool, fetch: bool, alias: int,
        jitters: tuple[int, ...], was_present: bool,
    ) -> None:  # fmt: skip
        self.gfn, self.slot, self.mmu_seq = gfn, slot, mmu_seq
        self.write, self.fetch, self.alias = write, fetch, alias
        self.jitters, self.was_present = jitters, was_present


def write_fault(world: World, vm: Vm, task: Task, fault: Fault) -> str:
    """Write the FAULT record, after everything else that the fault did; returns its result."""
    kernel, jitters = world.kernel, fault.jitters
    now = task.now = task.now + 2400 + (jitters[5] >> 2)
    slot, page, gfn, stages = fault.slot, fault.page, fault.gfn, fault.stages
    code = (_WRITE if fault.write else 0) | (_FETCH if fault.fetch else 0)
    code |= (_PRESENT if fault.was_present else 0) | (0 if vm.shadow else kernel.fault_bits | 4)
    hva = vm_flags = 0
    slot_id = -1
    if slot is not None and fault.faultin_ret != -1:
        hva, slot_id = slot.hva + (gfn - slot.base << 12), slot.id
    if slot is not None and kernel.walk_tells and fault.walk_pfn != NO_PFN:
        vm_flags = slot.mapping.kind.vm_flags
    counted, end, state = 2, _NO_STATE, fault.state
    if page is not None:
        if kernel.says_refcounted and fault.faultin_ret >= 0:
            counted = int(fault.tracked)
        end = (page.flags, page.count, page.mapcount, state[3], page.order)
    out = world.out
    data, at, seq, head = out.fault_place(task)
    FAULT_LAYOUT.pack_into(
        data, at, now, task.fault_ts, seq, head,
        (gfn << 12) + (fault.alias << ALIAS) + (now & 0xFF8), code, gfn, hva, fault.pfn,
        fault.walk_pfn, vm_flags, fault.mmu_seq, vm.seq, vm.in_progress, *stages, fault.ret,
        fault.faultin_ret, slot_id, 0, fault.level, counted, fault.writable, 0, vm.mmu,
        min(fault.sptes, 255), *state, *end,
    )  # fmt: skip
    if fault.counted:
        world.ledger.references.append(REFERENCES.pack(
            vm.id, task.vcpu, _TAKER, fault.gfn, fault.pfn, task.fault_ts,
            task.fault_ts + stages[3], fault.put_ts, fault.put_pfn,
        ))  # fmt: skip
    task.fault_ts = 0
    task.now = now + 8000 + (jitters[1] << 3)
    return "error" if fault.ret < 0 else kernel.results[fault.ret]
