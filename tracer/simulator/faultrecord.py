"""What one fault found and did, and the FAULT record that tells it.

May import: standard library, `tracer.simulator`.
"""

from tracer.simulator.clock import Task
from tracer.simulator.host import Page
from tracer.simulator.mmu import ALIAS, Slot, Vm, World

__all__ = ("EFAULT", "ERR_FAULT", "NEVER", "NOSLOT", "NO_PFN", "Fault", "write_fault")

#: KVM_PFN_ERR_FAULT and KVM_PFN_NOSLOT, include/linux/kvm_host.h.
ERR_FAULT, NOSLOT = 0x7FF << 52, 1 << 63
#: A stage that was not reached, and a frame that nobody found.
NEVER, NO_PFN = 0xFFFFFFFF, (1 << 64) - 1
EFAULT = -14
_WRITE, _FETCH, _PRESENT, _USER = 2, 16, 1, 4
_NO_STATE = (0, 0, 0, 0, 0)


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
    kernel = world.kernel
    jitters = fault.jitters
    task.now += 2400 + (jitters[5] >> 2)
    slot, page = fault.slot, fault.page
    code = (_WRITE if fault.write else 0) | (_FETCH if fault.fetch else 0)
    code |= (_PRESENT if fault.was_present else 0) | (0 if vm.shadow else kernel.fault_bits | 4)
    reached = fault.faultin_ret != -1
    counted = 2
    if kernel.says_refcounted and page is not None and fault.faultin_ret >= 0:
        counted = int(fault.tracked)
    end: tuple[int, ...] = _NO_STATE
    if page is not None:
        end = (page.flags, page.count, page.mapcount, fault.state[3], page.order)
    address = (fault.gfn << 12) + (fault.alias << ALIAS) + (task.now & 0xFF8)
    world.out.fault(task, task.now, (
        address, code, fault.gfn,
        slot.hva + (fault.gfn - slot.base << 12) if slot is not None and reached else 0,
        fault.pfn, fault.walk_pfn,
        slot.mapping.kind.vm_flags
        if slot is not None and fault.walk_pfn != NO_PFN
        and kernel.generation in ("G0b", "G2") else 0,
        fault.mmu_seq, vm.seq, vm.in_progress, *fault.stages, fault.ret, fault.faultin_ret,
        slot.id if slot is not None and reached else -1, 0, fault.level, counted,
        fault.writable, 0, vm.mmu, min(fault.sptes, 255), *fault.state, *end,
    ))  # fmt: skip
    if fault.counted:
        world.ledger.references.append((
            vm.id, task.vcpu, "fault", fault.gfn, fault.pfn, task.fault_ts,
            task.fault_ts + fault.stages[3], fault.put_ts or None, fault.put_pfn or None,
        ))  # fmt: skip
    task.fault_ts = 0
    task.now += 8000 + (jitters[1] << 3)
    return "error" if fault.ret < 0 else kernel.results[fault.ret]
