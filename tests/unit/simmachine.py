"""The model without scenario or file: each step is driven by hand, and the lives are made at once.

A `Bench` is one VM. What it records goes straight to `analysis.lives`, so that after every step
the leaves of the model and the lives of the reconstruction can be compared.
"""

from collections.abc import Iterable
from typing import Any, cast

import pandas as pd
import pyarrow as pa

from analysis.columns import Records
from analysis.lifeslots import Slots
from analysis.lives import LifeBuilder, LifeContext
from tracer.columns import ColumnMaker
from tracer.simulator.clock import START_NS, Dice, Story, Task, Turns
from tracer.simulator.fault import Vcpu
from tracer.simulator.grammar import step_of
from tracer.simulator.host import KINDS, Host, Mapping
from tracer.simulator.kernels import KERNELS
from tracer.simulator.ledger import LIVES, Ledger
from tracer.simulator.mmu import Leaf, Slot, Vm, World
from tracer.simulator.ops import VERBS, create_slot, create_vm, delete_slot, destroy_vm
from tracer.simulator.recorder import KIND, Recorder
from tracer.tracewriter import TraceWriter

__all__ = ("PAGES", "VCPUS", "Bench")

VCPUS, _HELPERS = 3, 3
#: Pages of each slot: two huge pages.
PAGES = 1024
#: What a life says of its page: both sides have it while it is open, and when it has ended.
_OPEN = ("gfn", "pfn", "level", "sptep", "birth_ts", "birth_cpu", "birth_seq", "changes")
_ENDED = (*_OPEN, "death_ts", "death_cause", "death_cpu", "death_seq", "ended_by")

_SLOT_COLUMNS = ("ts", "op", "vm", "as_id", "slot", "gfn", "npages")

Lives = set[tuple[Any, ...]]


class _Tap:
    """Takes the place of the trace file: SPTE records become lives, with what SLOT records tell."""

    def __init__(self, results: dict[int, str]) -> None:
        self._maker = ColumnMaker(results)
        self._slots: list[pa.RecordBatch] = []
        self._changes: dict[str, Any] = {}
        self._remember([])
        context = LifeContext(created=frozenset({1}), slots=Slots(self._changes))
        self._builder = LifeBuilder(context)
        self.ended: Lives = set()
        self.orphans = 0

    def write_group(self, groups: Iterable[tuple[str, Any]]) -> None:
        batches = [(kind, self._maker.records(kind, records)) for kind, records in groups
                   if kind in ("SPTE", "SLOT")]  # fmt: skip
        self._remember([batch for kind, batch in batches if kind == "SLOT"])
        for kind, batch in batches:
            if kind == "SPTE":
                self.ended |= _rows(self._builder.feed(batch), _ENDED)
                self.orphans += len(self._builder.orphan_records)

    def _remember(self, batches: list[pa.RecordBatch]) -> None:
        """Add changes of memslots to those that the lives are told of: the same dictionary."""
        self._slots += batches
        records = Records("SLOT", self._slots)
        self._changes.update({name: records[name] for name in _SLOT_COLUMNS})

    def write_note(self, note: object, ts: int) -> None:
        """Notes do not matter to lives."""

    def write_losses(self, counts: object, ts: int) -> None:
        """Nothing is lost here."""

    def open(self) -> Lives:
        return _rows(self._builder.open(), _OPEN)


def _born(leaf: Leaf) -> tuple[int, int, int]:
    """Return birth_ts, birth_cpu, birth_seq of a leaf; every leaf has them."""
    assert leaf.born_by is not None, f"leaf of gfn {leaf.gfn:#x} was never born"
    return leaf.birth_ts, leaf.born_by.cpu, leaf.birth_seq


def _rows(frame: pd.DataFrame, names: tuple[str, ...]) -> Lives:
    columns = (frame[name].astype(object).where(frame[name].notna(), None) for name in names)
    return set(zip(*columns, strict=True))


def _ended(ledger: Ledger) -> Lives:
    rows = LIVES.batch(ledger.lives).select(list(_ENDED)).to_pydict()
    return set(zip(*rows.values(), strict=True))


class Bench:
    """One VM whose every step is asked for; `told` are the steps, as a story to read."""

    def __init__(self, kernel: str, mmu: str, kinds: tuple[str, ...], seed: int = 0) -> None:
        self.told = [f"Bench({kernel!r}, {mmu!r}, {kinds!r})"]
        generation = KERNELS[kernel]
        self._turns, self._ledger = Turns(), Ledger()
        self._tap = _Tap(dict(enumerate(generation.results)))
        out = Recorder(cast(TraceWriter, self._tap), VCPUS + _HELPERS)
        host = Host(
            generation,
            lambda task, page: out.page_event(task, task.now, KIND["PAGE_FREE"], page),
            lambda task, page: out.page_event(task, task.now, KIND["PAGE_ALLOC"], page),
        )
        self._world = World(generation, Dice(seed), self._turns, out, self._ledger, host)
        self.vm = Vm(self._world, 1, mmu, 1000, aliases=2)
        self._tasks = [Task(n, 1000 + n, 1000, 1) for n in range(_HELPERS)]
        vcpus = [Task(_HELPERS + n, 1100 + n, 1000, 1, n) for n in range(VCPUS)]
        self.vm.tasks += vcpus
        self._vcpus = [Vcpu(self._world, self.vm, task) for task in vcpus]
        self.mappings: list[Mapping] = []
        create_vm(self._world, self.vm, self._tasks[0])
        for number, kind in enumerate(kinds):
            hva = 0x7F0000000000 + (number << 32)
            mapping = Mapping(f"m{number}", KINDS[kind], hva, PAGES)
            self.mappings.append(mapping)
            self.create(number)

    # --- steps: each is started, and all that were started run together ---------------------------

    def touch(self, vcpu: int, slot: int, page: int, *, write: bool) -> None:
        """A vCPU accesses a page of a slot, if that is there."""
        self.told.append(f"touch({vcpu}, {slot}, {page}, write={write})")
        found = self.vm.slots.get(slot)
        if found is not None:
            alias = page % 2 if self.vm.aliases > 1 else 0
            story = self._touching(self._vcpus[vcpu], found.base + page, write, alias)
            self._turns.start(story, self._vcpus[vcpu].task.now)

    def _touching(self, vcpu: Vcpu, gfn: int, write: bool, alias: int) -> Story:
        if vcpu.task.now > self._turns.next:
            yield vcpu.task.now
        yield from vcpu.touch(gfn, write=write, alias=alias)

    def host(self, verb: str, slot: int, **args: int) -> None:
        """Another thread does something to a slot: a verb of scenario files."""
        given = "".join(f", {name}={value}" for name, value in args.items())
        self.told.append(f"host({verb!r}, {slot}{given})")
        found = self.vm.slots.get(slot)
        if found is not None:
            step = step_of(verb, **args)
            self._turns.start(self._hosting(verb, found, step), self._tasks[1].now)

    def _hosting(self, verb: str, slot: Slot, args: dict[str, Any]) -> Story:
        task = self._tasks[1]
        if task.now > self._turns.next:
            yield task.now
        yield from VERBS[verb](self._world, self.vm, task, slot, args)

    def delete(self, slot: int) -> None:
        """The VMM deletes a slot."""
        self.told.append(f"delete({slot})")
        found = self.vm.slots.get(slot)
        if found is not None:
            task = self._tasks[0]
            self._turns.start(delete_slot(self._world, self.vm, task, found), task.now)

    def create(self, slot: int) -> None:
        """The VMM creates a slot, unless it is there."""
        if slot not in self.vm.slots:
            made = Slot(slot, 0x200 + (slot << 20), PAGES, self.mappings[slot], 0, 0)
            create_slot(self._world, self.vm, self._tasks[0], made)

    def destroy(self) -> None:
        """The VM's process exits."""
        self.told.append("destroy()")
        self.run()
        task = self._tasks[0]
        self._turns.start(destroy_vm(self._world, self.vm, task, self.mappings), task.now)
        self.run()

    def run(self) -> None:
        """Let all that was started happen; afterwards everybody's clock is the same."""
        self.told.append("run()")
        for _ in self._turns.run():
            pass
        tasks = [*self._tasks, *self.vm.tasks]
        now = max(task.now for task in tasks) + 50_000
        for task in tasks:
            task.now = now
        assert now > START_NS
        self._world.out.flush(now)

    # --- what both sides say ----------------------------------------------------------------------

    def leaves(self) -> Lives:
        """Return the model's live leaves: columns _OPEN."""
        return {
            (leaf.gfn, leaf.pfn, leaf.level, leaf.sptep or None, *_born(leaf), leaf.changes)
            for leaf in self.vm.all_leaves()
        }  # fmt: skip

    def difference(self) -> str:
        """Return how reconstruction and model differ, "" if they do not."""
        for name, ours, theirs in (
            ("open", self._tap.open(), self.leaves()),
            ("ended", self._tap.ended, _ended(self._ledger)),
        ):
            if ours != theirs:
                return (
                    f"{name}: {len(ours - theirs)} only in the reconstruction, "
                    f"{len(theirs - ours)} only in the model, say {sorted(ours ^ theirs)[0]}\n"
                    + "\n".join(self.told)
                )
        return f"{self._tap.orphans} records belong to no life" if self._tap.orphans else ""
