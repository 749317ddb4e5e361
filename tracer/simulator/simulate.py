"""Run one simulation: knobs in, a trace and its truth out.

May import: `probes`, standard library, `tracer`.
"""

import dataclasses
import gc
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from probes.errors import UsageError
from tracer.schema import SCHEMA_VERSION
from tracer.simulator.bugs import BUGS, parse_bugs
from tracer.simulator.clock import FOREVER, START_NS, Dice, Story, Task, Turns
from tracer.simulator.fault import Vcpu
from tracer.simulator.grammar import HELPERS
from tracer.simulator.host import KINDS, Host, Page
from tracer.simulator.host import Mapping as HostMapping
from tracer.simulator.hostile import HOSTILE, Hostile, parse_hostile
from tracer.simulator.invalidate import invalidate
from tracer.simulator.kernels import KERNELS, facts_of, profile_of
from tracer.simulator.ledger import Ledger
from tracer.simulator.mmu import Slot, Vm, World
from tracer.simulator.ops import (
    VERBS,
    create_slot,
    create_vm,
    destroy_vm,
    discard_range,
)
from tracer.simulator.recorder import KIND, Recorder
from tracer.simulator.scenario import Memory, Phase, load, names
from tracer.simulator.truthfile import TruthFiles, check_new_files, new_files, truth_paths
from tracer.tracemeta import TraceMeta
from tracer.tracewriter import TraceWriter

__all__ = ("Knobs", "Outcome", "Progress", "catalogue", "check_knobs", "simulate")

#: When the seed thread of this project, v9 of the series, was mailed. A trace must not say when
#: it was made: the same seed gives the same bytes.
_START_UNIX_NS: Final = 1_694_398_590 * 10**9
#: Threads of the VMM and of the host beside the vCPUs.
_HOST_TASKS: Final = 1 + HELPERS
#: No story is longer on its own clock: 365 days.
_LONGEST_NS: Final = 365 * 86_400 * 10**9
_VCPUS_MAX: Final = 1024


#: Told how far a simulation is: (faults so far, faults in all).
Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Knobs:
    """Everything that a simulation depends on."""

    kernel: str = "6.12"
    scenario: str = "demand"
    bugs: tuple[str, ...] = ()
    vcpus: int = 2
    mem_bytes: int = 16 << 20
    faults: int | None = None
    seed: int = 1
    mmu: str = ""
    hostile: tuple[str, ...] = ()

    @property
    def pages(self) -> int:
        """Guest memory in 4K pages."""
        return self.mem_bytes >> 12


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulation made."""

    trace: Path
    truth: dict[str, Path]
    records: int
    faults: int
    lives: int
    planted: dict[str, int]
    seconds: float


def catalogue() -> dict[str, list[dict[str, Any]]]:
    """Return what can be asked for: bugs, scenarios, kernels, hostile; each with one line."""
    return {
        "bugs": [
            {"name": b.name, "title": b.title, "source": b.source, "kernels": list(b.kernels),
             "scenario": b.scenario, "mmu": b.mmu or "any", "rate": b.rate}
            for b in BUGS.values()
        ],
        "scenarios": [{"name": name, "title": title} for name, title in names().items()],
        "kernels": [
            {"name": k.name, "title": k.title, "generation": k.generation, "source": k.source}
            for k in KERNELS.values()
        ],
        "hostile": [{"name": name, "title": title} for name, title in HOSTILE.items()],
    }  # fmt: skip


def check_knobs(knobs: Knobs) -> None:
    """Raise UsageError if there can be no simulation with these knobs."""
    if knobs.kernel not in KERNELS:
        raise UsageError(f"--kernel {knobs.kernel}: no such kernel; there are {', '.join(KERNELS)}")
    if not 1 <= knobs.vcpus <= _VCPUS_MAX:
        raise UsageError(f"--vcpus {knobs.vcpus}: from 1 to {_VCPUS_MAX}")
    scenario = load(knobs.scenario)
    mmu = knobs.mmu or scenario.mmu
    if mmu not in ("tdp", "shadow"):
        raise UsageError(f"--mmu {mmu}: say tdp or shadow")
    parse_bugs(list(knobs.bugs), KERNELS[knobs.kernel], mmu)
    scenario.sizes(knobs.pages)
    parse_hostile(knobs.hostile, knobs.seed)


def simulate(
    knobs: Knobs, output: Path, *, version: str, overwrite: bool = False,
    progress: Progress | None = None,
) -> Outcome:  # fmt: skip
    """Run a simulation into `output`; the truth goes beside it (`truthfile.truth_paths`).

    `progress` is told (faults so far, faults to come about). Raises UsageError for knobs that make
    no sense, OutputError if a file cannot be written or is there already; then nothing is left.
    """
    hostile, span = parse_hostile(knobs.hostile, knobs.seed), (0, FOREVER)
    if hostile.cuts:  # how long the story is only its end tells
        check_new_files(output, overwrite=overwrite)
        with tempfile.TemporaryDirectory() as folder:
            whole = simulate(dataclasses.replace(knobs, hostile=()), Path(folder) / "whole.pfnt",
                             version=version, progress=progress)  # fmt: skip
        span = hostile.span(int(whole.seconds * 1e9))
    collected = gc.isenabled()
    gc.disable()  # millions of objects and no cycles: the collector would only look at them again
    try:
        with new_files(output, overwrite=overwrite) as made:
            simulation = _Simulation(knobs, output, made, version, overwrite, progress)
            simulation.hurt(hostile, span)
            return simulation.run()
    finally:
        if collected:
            gc.enable()


class _Simulation:
    def __init__(
        self, knobs: Knobs, output: Path, made: list[Path], version: str, overwrite: bool,
        progress: Progress | None,
    ) -> None:  # fmt: skip
        self._progress = progress
        check_knobs(knobs)
        self._knobs, self._output, self._version = knobs, output, version
        self._kernel = KERNELS[knobs.kernel]
        self._scenario = load(knobs.scenario)
        mmu = knobs.mmu or self._scenario.mmu
        bugs = parse_bugs(list(knobs.bugs), self._kernel, mmu)
        self._sizes = self._scenario.sizes(knobs.pages)
        self._dice = Dice(knobs.seed)
        self._cpus = knobs.vcpus + _HOST_TASKS
        self._writer = TraceWriter(output, self._meta(), overwrite=overwrite)
        made.append(output)
        self._out = Recorder(self._writer, self._cpus)
        self._killed = False
        self._ledger = Ledger()
        self._truth = TruthFiles(self._ledger, output, made)
        self._turns = Turns()
        host = Host(self._kernel, self._freed, self._handed_out)
        self._world = World(self._kernel, self._dice, self._turns, self._out, self._ledger, host)
        self._world.bugs = bugs
        tgid = 1000
        self._vm = Vm(self._world, 1, mmu, tgid, self._scenario.aliases)
        self._vm.seq = self._scenario.sequence
        self._main = Task(0, tgid, tgid, 1)
        self._helpers = [Task(n, tgid + n, tgid, 1) for n in range(1, _HOST_TASKS)]
        self._busy = False
        self._vcpus = [self._vcpu(n, tgid) for n in range(knobs.vcpus)]
        self._slots: dict[str, tuple[Memory, HostMapping, int]] = {}

    def hurt(self, hostile: Hostile, span: tuple[int, int]) -> None:
        """Let the recording suffer, and record only what happens within `span` (ns)."""
        if hostile.tampers or hostile.cuts:
            self._killed = span[1] != FOREVER
            self._out.suffer(hostile if hostile.tampers else None, span)
            self._world.armed_at = span[0]

    def _vcpu(self, number: int, tgid: int) -> Vcpu:
        task = Task(_HOST_TASKS + number, tgid + 100 + number, tgid, 1, number)
        vcpu = Vcpu(self._world, self._vm, task)
        vcpu.race = self._race
        self._vm.tasks.append(task)
        return vcpu

    def _meta(self) -> TraceMeta:
        # The output's name and the way the command was written are left out: same seed, same bytes.
        knobs = dataclasses.asdict(self._knobs)
        command = ["pfntrace", "simulate"]
        for name, value in knobs.items():
            values = value if isinstance(value, tuple) else (value,)
            command += [f"--{name}={v}" for v in values if v not in ("", None)]
        return TraceMeta(
            schema_version=SCHEMA_VERSION,
            pfntrace_version=self._version,
            command=tuple(command),
            start_unix_ns=_START_UNIX_NS,
            start_monotonic_ns=START_NS,
            hostname="simulator",
            facts=facts_of(self._kernel, self._cpus).to_json(),
            profile=profile_of(self._kernel),
            settings={"simulated": True, "seed": self._knobs.seed},
        )

    # --- pages that come and go ------------------------------------------------------------------

    def _freed(self, task: Task, page: Page) -> None:
        self._out.page_event(task, task.now, KIND["PAGE_FREE"], page)

    def _handed_out(self, task: Task, page: Page) -> None:
        self._out.page_event(task, task.now, KIND["PAGE_ALLOC"], page)

    # --- running ---------------------------------------------------------------------------------

    def run(self) -> Outcome:
        try:
            self._begin()
            for phase in self._scenario.phases:
                self._phase(phase)
            self._level_clocks()
            if self._scenario.exit:
                self._drive(
                    destroy_vm(self._world, self._vm, self._main,
                               [mapping for _, mapping, _ in self._slots.values()])
                )  # fmt: skip
            return self._finish()
        except BaseException:
            self._writer.abandon()
            self._truth.abandon()
            raise

    def _begin(self) -> None:
        create_vm(self._world, self._vm, self._main)
        hva = 0x7F0000000000
        for number, memory in enumerate(self._scenario.memory):
            npages = self._sizes[memory.name]
            mapping = HostMapping(memory.name, KINDS[memory.kind], hva, npages)
            hva += (npages << 12) + (1 << 30) & ~((1 << 21) - 1)
            slot = Slot(number, memory.gfn, npages, mapping, 0, memory.flags)
            create_slot(self._world, self._vm, self._main, slot)
            self._slots[memory.name] = (memory, mapping, number)

    def _phase(self, phase: Phase) -> None:
        total = self._knobs.faults or self._knobs.pages
        share = max(1, int(total * float(phase.touch["share"]))) if phase.touch else 0
        passes = 1
        if phase.passes:
            pages = self._slots[phase.touch["memory"]][1].npages
            passes = max(1, math.ceil(share / pages))
            share = min(share, pages)
        for _ in range(passes):
            self._level_clocks()
            if phase.touch:
                for vcpu in self._vcpus:
                    self._turns.start(self._touching(vcpu, phase.touch, share), vcpu.task.now)
            for task, step in zip(self._helpers[: len(phase.host)], phase.host, strict=True):
                self._turns.start(self._step(task, step), task.now)
            self._drive()
            for step in phase.after:
                self._level_clocks()
                self._drive(self._step(self._main, step))

    def _level_clocks(self) -> None:
        """A phase begins for everybody when the last one has ended for all."""
        tasks = [self._main, *self._helpers, *(v.task for v in self._vcpus)]
        now = max(task.now for task in tasks) + 50_000
        if now - START_NS > _LONGEST_NS:
            raise UsageError(
                f"--scenario {self._knobs.scenario}: takes more than a year of the VM's time; "
                "lower times, every_us, us or --faults"
            )
        for task in tasks:
            task.now = now

    def _drive(self, story: Story | None = None) -> None:
        if story is not None:
            self._turns.start(story, self._main.now)
        turns = self._turns
        for _ in turns.run():
            if self._out.full:
                self._out.flush(turns.now)
                self._truth.flush()
                if self._progress is not None:
                    done = sum(vcpu.faults for vcpu in self._vcpus)
                    self._progress(done, max(done, self._knobs.faults or self._knobs.pages))

    def _step(self, task: Task, step: dict[str, Any]) -> Story:
        slot = self._vm.slots[self._slots[step["memory"]][2]]
        yield from VERBS[step["do"]](self._world, self._vm, task, slot, step)

    def _touching(self, vcpu: Vcpu, touch: dict[str, Any], count: int) -> Story:
        """What one vCPU does in a phase."""
        if vcpu.task.now > self._turns.next:
            yield vcpu.task.now
        dice, number = self._dice, self._slots[touch["memory"]][2]
        vcpus = len(self._vcpus)
        mine = count // vcpus + (1 if vcpu.task.vcpu < count % vcpus else 0)
        npages = self._slots[touch["memory"]][1].npages
        write, fetch = float(touch["write"]), float(touch["fetch"])
        in_order = touch["order"] == "sequential"
        first = npages * vcpu.task.vcpu // vcpus
        self._world.touching += 1
        for at in range(mine):
            slot = self._vm.slots.get(number)
            offset = (first + at) % npages if in_order else dice.below(npages)
            if slot is None:  # gone for the moment: the guest waits for its device
                vcpu.task.now += 30_000
                yield vcpu.task.now
                continue
            writes = write >= 1 or dice.random() < write
            fetches = fetch > 0 and not writes and dice.random() < fetch
            alias = dice.below(self._vm.aliases) if self._vm.aliases > 1 else 0
            ended = yield from vcpu.touch(
                slot.base + offset, write=writes, fetch=fetches, alias=alias
            )
            vcpu.task.now += 400
            if ended == "stuck":
                break
        self._world.touching -= 1

    def _race(self, vm: Vm, slot: Slot, gfn: int, at: int, frees: bool) -> None:
        """Invalidate one page behind the back of a fault: the race that a planted bug needs."""
        if self._busy:
            return
        self._busy = True
        task = self._helpers[-1]
        task.now = max(task.now, at)
        index = gfn - slot.base + slot.first
        story = self._racing(task, slot, index) if frees else self._storming(task, slot, index)
        self._turns.start(story, task.now)

    def _storming(self, task: Task, slot: Slot, index: int) -> Story:
        hva = slot.mapping.hva + (index << 12)
        yield from invalidate(self._world, self._vm, task, hva, hva + 4096, "protection_page")
        self._busy = False

    def _racing(self, task: Task, slot: Slot, index: int) -> Story:
        for one in (task, *self._vm.tasks):  # lru_add_drain_all(): no batch keeps the page
            now, one.now = one.now, max(one.now, task.now)
            self._world.host.drain(one)
            one.now = now
        yield from discard_range(self._world, self._vm, task, slot.mapping, index, 1)
        self._busy = False

    # --- the end ---------------------------------------------------------------------------------

    def _finish(self) -> Outcome:
        end = max(t.now for t in (self._main, *self._helpers, *(v.task for v in self._vcpus)))
        for leaf in list(self._vm.all_leaves()):
            self._vm.enter(leaf, 0, 0, None, 0, "censored")
        self._out.flush(end + 1_000_000_000)
        seconds = round((end - START_NS) / 1e9, 3)
        if self._killed:  # by SIGKILL: no last flush, no end mark
            self._writer.abandon()
        else:
            self._close(end, seconds)
        self._truth.close()
        return Outcome(
            trace=self._output,
            truth=truth_paths(self._output),
            records=self._writer.records,
            faults=sum(vcpu.faults for vcpu in self._vcpus),
            lives=self._truth.rows["lives"],
            planted=dict(sorted(self._ledger.planted.items())),
            seconds=seconds,
        )

    def _close(self, end: int, seconds: float) -> None:
        """Write the end mark, with what a recorder would say."""
        totals = self._out.totals()
        summary = {
            "why": "command", "seconds": seconds, "records": self._writer.records,
            "produced": sum(kind["produced"] for kind in totals.values()),
            "lost": sum(kind["lost"] for kind in totals.values()),
            "filtered": 0, "counts": totals, "problem": "", "missed": {}, "armed_after_s": 0.0,
            "ring_peak": 0.0,
        }  # fmt: skip
        self._writer.close(summary, ts=end + 1_000_000_000)
