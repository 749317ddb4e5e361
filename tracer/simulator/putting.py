"""How a fault gives its page back, and the bugs that keep it from doing so.

May import: standard library, `tracer.simulator`.
"""

from collections.abc import Callable
from typing import Final

from tracer.simulator.clock import Story, Task
from tracer.simulator.faultrecord import Fault
from tracer.simulator.host import Page
from tracer.simulator.mmu import Slot, Vm, World
from tracer.simulator.recorder import CALL

__all__ = ("Putting",)

_MARK_ACCESSED: Final = CALL["mark_accessed"]


class Putting:
    """The part of a vCPU that ends the references of its faults."""

    def __init__(self, world: World, vm: Vm, task: Task) -> None:
        self.world, self.vm, self.task = world, vm, task
        #: starts an invalidation of one page by another task, for planted races; frees it too?
        self.race: Callable[[Vm, Slot, int, int, bool], None] = lambda *_: None

    def _forgets(self, fault: Fault) -> bool:
        """Does a planted bug keep the reference?"""
        world = self.world
        page = fault.page
        if page is world.host.zero and world.strikes("zero_page_growth"):
            self._plant("zero_page_growth", fault, fault.pfn)
            return True
        for bug in ("missing_put", "missing_put_shadow"):
            if (bug == "missing_put" or self.vm.shadow) and world.strikes(bug):
                self._plant(bug, fault, fault.pfn)
                return True
        return False

    def _put(self, fault: Fault) -> None:
        """Give the fault's reference back, as a record if this generation's put can be seen."""
        world, task, page = self.world, self.task, fault.page
        if not fault.held or page is None or (world.bugs and self._forgets(fault)):
            return
        task.now += 900
        if (
            world.bugs
            and fault.level > 1
            and not page.order
            and world.strikes("put_on_wrong_folio")
        ):
            base = fault.slot.mapping.entry(
                (fault.gfn & ~511) - fault.slot.base + fault.slot.first
            ) if fault.slot else None  # fmt: skip
            if base is not None and base[0] is not page:
                self._plant("put_on_wrong_folio", fault, fault.pfn)
                self._release(fault, base[0], base[1])
                world.host.put(task, base[0])
                fault.put_ts, fault.put_pfn, fault.held = task.now, base[1], False
                return
        self._release(fault, page, fault.pfn)
        self._give_back(fault, page)
        if world.bugs and world.strikes("double_put"):
            self._plant("double_put", fault, fault.pfn)
            task.now += 600
            self._release(fault, page, fault.pfn)
            world.host.put(task, page)

    def _release(self, fault: Fault, page: Page, pfn: int) -> None:
        world, task, kernel = self.world, self.task, self.world.kernel
        if kernel.put_call:
            world.out.release(task, task.now, CALL[kernel.put_call], fault.gfn, pfn, page)

    def _give_back(self, fault: Fault, page: Page) -> None:
        world, task, flags = self.world, self.task, self.world.kernel.flags
        if page.lru and world.kernel.activates and page.flags != flags.settled and page.count > 1:
            world.host.activate(task, page)
        elif page.flags == flags.fresh:
            page.flags = flags.released
        world.host.put(task, page)
        fault.held, fault.put_ts, fault.put_pfn = False, task.now, fault.pfn

    def _late_mark(self, fault: Fault) -> Story:
        """v7: mark_page_accessed() after the reference is gone and mmu_lock is released."""
        world, task, page, slot = self.world, self.task, fault.page, fault.slot
        assert page is not None and slot is not None
        raced = not slot.mapping.kind.driver and world.strikes("use_after_put")
        if raced:
            self.race(self.vm, slot, fault.gfn, task.now, True)
            task.now += 30_000
            yield task.now
            if page.freed_at >= task.fault_ts:
                self._plant("use_after_put", fault, fault.pfn)
        task.now += 300
        world.out.release(task, task.now, _MARK_ACCESSED, fault.gfn, fault.pfn, page)

    def _plant(self, bug: str, fault: Fault, pfn: int) -> None:
        self.world.ledger.bug(bug, self.vm.id, self.task.now, fault.gfn, pfn, self.task.fault_ts)
