"""One recording: load → attach → arm → drain → disarm → detach → close.

`Recorder` is that list as code. It owns no policy of its own: what to record comes in
`RecordOptions`, what the kernel offers in a `KernelProfile`, records leave through a
`TraceWriter`. SIGINT and SIGTERM only set a flag. May import: `probes`, `tracer`.
"""

import contextlib
import dataclasses
import os
import select
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from probes.errors import OutputError
from probes.profile import KernelProfile
from tracer.batch import TAKE_MAX, Group, take
from tracer.command import Command
from tracer.kernel import Counts, KernelSide, Settings
from tracer.ring import MappedRing, map_rings
from tracer.slots import SlotWatch
from tracer.tracewriter import TraceWriter

__all__ = ("Outcome", "Progress", "RecordOptions", "Recorder", "ring_settings")

#: A record younger than this stays in its ring: another cpu may still write an older one.
HOLDBACK_NS = 100_000_000
#: Between two drains; with the holdback it bounds what a SIGKILL can take.
DRAIN_S = 0.3
#: How often the rings' fill and the stop conditions are looked at.
TICK_S = 0.1
#: A ring fuller than this is drained at the next tick.
HURRY = 0.25
#: The drain after disarming gives up after this; what is left is counted as lost by the reader.
FINAL_DRAIN_S = 10.0


@dataclasses.dataclass(frozen=True, slots=True)
class RecordOptions:
    """What to record and when to stop."""

    pids: tuple[int, ...] = ()
    duration_s: float | None = None
    gfns: tuple[int, int] | None = None
    stacks: bool = False
    buffer_bytes: int = 64 << 20
    max_bytes: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Progress:
    """What the live status line shows."""

    seconds: float
    records: int
    faults: int
    lost: int
    bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """How a recording ended: `why` is command, interrupted, duration, size, vm, kvm or output."""

    why: str
    seconds: float
    records: int
    faults: int
    vms: int
    counts: dict[str, Counts]
    peak: float
    bytes: int
    armed_after_s: float
    #: program -> calls that the kernel skipped: what the records cannot know.
    missed: dict[str, int]
    problem: str = ""

    @property
    def lost(self) -> int:
        """Records lost: ring full, fault torn, call skipped, not written when the output failed."""
        return sum(c.lost for c in self.counts.values()) + sum(self.missed.values())

    @property
    def filtered(self) -> int:
        """Records that --vm, --gfn or --max-size kept out."""
        return sum(c.filtered for c in self.counts.values())

    @property
    def produced(self) -> int:
        """All records the probes had to write, or would have had they run."""
        return sum(c.produced for c in self.counts.values()) + sum(self.missed.values())


def _power_of_two(value: float) -> int:
    """The greatest power of two that is not more than value, at least a page."""
    return int(max(4096, 1 << max(0, int(value).bit_length() - 1)))


def ring_settings(options: RecordOptions, cpus: int) -> Settings:
    """Choose shards and sizes: fault rings take a third of the buffer, event rings two thirds."""
    rings = 1 if cpus <= 2 else 2 if cpus <= 8 else 4
    event_bytes = _power_of_two(options.buffer_bytes * 2 / 3 / rings)
    return Settings(
        rings=rings,
        fault_ring_bytes=max(4096, event_bytes // 2),
        event_ring_bytes=event_bytes,
        stacks=options.stacks,
        pids=options.pids,
        gfns=options.gfns or (0, 2**64 - 1),
    )


class Recorder:
    """Records until something ends it. One use only."""

    def __init__(
        self,
        profile: KernelProfile,
        settings: Settings,
        options: RecordOptions,
        *,
        kernel: KernelSide | None = None,
    ) -> None:
        self._options = options
        self._settings = settings
        self._writer: TraceWriter
        self._kernel = kernel or KernelSide(profile, settings)
        self._rings: list[MappedRing] = []
        # Edge-triggered: a ring is readable as long as one record waits in it, and some always do.
        self._poll = select.epoll()
        self._slots = SlotWatch()
        self._stacks: set[int] = set()
        self._interrupted = False
        self._armed_at = 0.0
        self.failed: list[tuple[str, str, str]] = []

    def prepare(self) -> None:
        """Load, attach, map the rings. Raises ProbeLoadError; nothing is armed yet."""
        self._kernel.load()
        self._kernel.attach()
        self.failed = self._kernel.failed
        sizes = {
            "faults": self._settings.fault_ring_bytes,
            "events": self._settings.event_ring_bytes,
        }
        self._rings = map_rings(self._kernel.ring_fds(), sizes)
        for ring in self._rings:
            if ring.kind == "events":
                self._poll.register(ring.fd, select.EPOLLIN | select.EPOLLET)

    def run(
        self,
        writer: TraceWriter,
        command: Command | None,
        started: float,
        told: Callable[[float], None],
        show: Callable[[Progress], None] | None = None,
    ) -> Outcome:
        """Arm, start the command, drain until the end, disarm, detach, close the trace.

        `started` is time.monotonic() at the start of the process. `told` gets the seconds from
        then on once everything is recorded and no command runs yet: whoever waits to start a VM
        may do so when it is called. The trace is valid however this ends.
        """
        problem = ""
        self._writer = writer
        with self._signals():
            self._kernel.arm()
            self._armed_at = time.monotonic()
            armed_after = self._armed_at - started
            try:
                told(armed_after)
                if command is not None:
                    command.start()
                why = self._loop(command, show)
            except OutputError as err:
                why, problem = "output", str(err)
            finally:
                self._kernel.arm(armed=False)
                stopped = time.monotonic()
            if command is not None and why != "command":
                command.stop()
            try:
                self._finish(why)
            except OutputError as err:
                why, problem = "output", problem or str(err)
            outcome = self._outcome(why, stopped, armed_after, problem)
            self._close(outcome)
        if command is not None and why != "command":
            _reap(command)
        return dataclasses.replace(outcome, bytes=self._writer.bytes_written)

    def abandon(self) -> None:
        """Free the kernel's side of a recording that never ran."""
        self._kernel.close()

    # -- the loop ---------------------------------------------------------

    def _loop(self, command: Command | None, show: Callable[[Progress], None] | None) -> str:
        kvm = _kvm_identity()
        next_drain = time.monotonic() + DRAIN_S
        next_count = next_drain
        while True:
            self._poll.poll(TICK_S)
            # Set before the look, so that no record is taken that was not looked at.
            watermark = time.monotonic_ns() - HOLDBACK_NS
            self._watch_slots()
            why = self._stop_reason(command, kvm)
            now = time.monotonic()
            if why or now >= next_drain or self._fill() > HURRY:
                # From begin to begin: a drain that takes long is followed by one sooner.
                next_drain = now + DRAIN_S
                self._drain(watermark)
            if now >= next_count:
                next_count = now + 1.0
                self._note_losses()
            if show is not None:
                show(self._progress(now))
            if why:
                return why

    def _stop_reason(self, command: Command | None, kvm: int) -> str:
        options = self._options
        if self._interrupted:
            return "interrupted"
        if command is not None and command.poll() is not None:
            return "command"
        if options.duration_s is not None:
            if time.monotonic() - self._armed_at >= options.duration_s:
                return "duration"
        if self._full():
            return "size"
        if options.pids and not any(_alive(pid) for pid in options.pids):
            return "vm"
        if kvm and _kvm_identity() != kvm:
            return "kvm"
        return ""

    def _fill(self) -> float:
        return max(ring.used() / ring.size for ring in self._rings)

    def _full(self) -> bool:
        limit = self._options.max_bytes
        return limit is not None and self._writer.bytes_written >= limit

    def _drain(self, watermark: int) -> None:
        while self._take(watermark) and not self._full():
            pass

    def _take(self, watermark: int) -> bool:
        """Write one group; return whether the rings held more than one group."""
        # A small file is filled in small steps, so that it ends near its limit.
        most = TAKE_MAX if self._options.max_bytes is None else TAKE_MAX // 64
        taken = take(self._rings, watermark, most)
        if taken.group:
            self._write(taken.group)
        taken.release()
        return taken.more

    def _write(self, group: Group) -> None:
        if self._options.stacks:
            self._note_stacks(group)
        self._writer.write_group(group)

    def _finish(self, why: str) -> None:
        """Take what is left in the rings, unless the file is full already."""
        deadline = time.monotonic() + FINAL_DRAIN_S
        self._watch_slots()
        while why not in ("size", "output") and time.monotonic() < deadline:
            if not self._take(2**63) and not any(ring.used() for ring in self._rings):
                break
        self._note_vms()
        self._note_losses()

    # -- what is noted beside the records ---------------------------------

    def _watch_slots(self) -> None:
        for note in self._slots.look(self._rings):
            self._writer.write_note(note)

    def _note_losses(self) -> None:
        self._writer.write_losses(self._kernel.counts())

    def _note_vms(self) -> None:
        vms = [v._asdict() for v in self._kernel.vms()]
        if vms:
            self._writer.write_note({"vms": vms})

    def _note_stacks(self, group: Group) -> None:
        for _, records in group:
            for stack in set(records["h"]["stack"].tolist()) - self._stacks:
                self._stacks.add(stack)
                if stack >= 0:
                    frames = self._kernel.stack(stack)
                    self._writer.write_note({"stack": stack, "frames": frames})

    # -- the end ----------------------------------------------------------

    def _totals(self) -> dict[str, Counts]:
        return {
            kind: Counts(*map(sum, zip(*cpus, strict=True)))
            for kind, cpus in self._kernel.counts().items()
        }

    def _progress(self, now: float) -> Progress:
        totals = self._totals()
        return Progress(
            seconds=now - self._armed_at,
            records=sum(c.produced - c.lost - c.filtered for c in totals.values()),
            faults=totals["FAULT"].produced - totals["FAULT"].lost - totals["FAULT"].filtered,
            lost=sum(c.lost for c in totals.values()),
            bytes=self._writer.bytes_written,
        )

    def _accounted(self, why: str) -> dict[str, Counts]:
        """Return the totals with records that were produced but not written put under a name."""
        accounted = {}
        totals = self._totals()
        # A thread's last fault has no next one to show that its end was missed.
        last = self._kernel.open_faults()
        c = totals["FAULT"]
        totals["FAULT"] = Counts(c.produced + last, c.lost + last, c.filtered, c.torn + last)
        for kind, c in totals.items():
            unwritten = c.produced - c.lost - c.filtered - self._writer.written[kind]
            if why == "size":
                accounted[kind] = c._replace(filtered=c.filtered + unwritten)
            else:
                accounted[kind] = c._replace(lost=c.lost + unwritten)
        return accounted

    def _outcome(self, why: str, stopped: float, armed_after: float, problem: str) -> Outcome:
        messages = {
            "kvm": "the kvm module was unloaded under the recording; start a new one",
        }
        return Outcome(
            why=why,
            seconds=stopped - self._armed_at,
            records=self._writer.records,
            faults=self._writer.written["FAULT"],
            vms=len(self._slots.vms | {v.vm for v in self._kernel.vms() if v.traced}),
            counts=self._accounted(why),
            peak=max(ring.peak / ring.size for ring in self._rings),
            bytes=self._writer.bytes_written,
            armed_after_s=armed_after,
            missed=self._kernel.missed(),
            problem=problem or messages.get(why, ""),
        )

    def _close(self, outcome: Outcome) -> None:
        try:
            self._writer.close(summary_of(outcome, self._writer.written))
        except OutputError:
            # The first failure is already in the outcome; the file is whole up to it.
            if not outcome.problem:
                raise
        finally:
            self._poll.close()
            for ring in self._rings:
                ring.close()
            self._kernel.close()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        def interrupt(_number: int, _frame: Any) -> None:
            self._interrupted = True

        saved = {
            n: signal.signal(n, interrupt) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        }
        try:
            yield
        finally:
            for number, handler in saved.items():
                signal.signal(number, handler)


def summary_of(outcome: Outcome, written: dict[str, int]) -> dict[str, Any]:
    """Return the trace's end mark: totals by kind and how the recording ended."""
    return {
        "why": outcome.why,
        "seconds": round(outcome.seconds, 3),
        "armed_after_s": round(outcome.armed_after_s, 3),
        "kinds": written,
        "records": outcome.records,
        "produced": outcome.produced,
        "lost": outcome.lost,
        "filtered": outcome.filtered,
        "counts": {kind: c._asdict() for kind, c in outcome.counts.items()},
        "missed": outcome.missed,
        "ring_peak": round(outcome.peak, 4),
        "problem": outcome.problem,
    }


def _alive(pid: int) -> bool:
    """A zombie has let go of its VMs."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return False
    return stat.rpartition(b")")[2].split()[0] not in (b"Z", b"X")


def _kvm_identity() -> int:
    """The inode of the module's folder changes when the module is loaded anew."""
    try:
        return os.stat("/sys/module/kvm").st_ino
    except OSError:
        return 0


def _reap(command: Command) -> None:
    """Wait a moment for a command that was told to end."""
    deadline = time.monotonic() + 2.0
    while command.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
