"""One recording from arming to the end mark, with a kernel's side that is made up here.

A story is what the made-up kernel does at each tick of the recorder; the trace is a real one.
"""

import dataclasses
import errno
import os
import signal
import time
from collections.abc import Callable

import numpy as np
import pytest
from unit.records import meta, records
from unit.rings import FakeKernel

from probes.errors import CommandError, OutputError
from tracer import session, slots
from tracer.command import Command
from tracer.kernel import Settings, VmEntry
from tracer.ring import MappedRing
from tracer.session import Outcome, Recorder, RecordOptions, ring_settings
from tracer.tracefile import TraceReader, TraceWriter

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

MIB = 1 << 20


def old(kind: str, count: int, age_ms: float = 1000, **fields) -> np.ndarray:
    """Return records whose last is at least so old."""
    made = records(kind, count, **fields)
    ts = made["h"]["ts"].astype("i8")
    made["h"]["ts"] = ts - ts.max(initial=0) + time.monotonic_ns() - int(age_ms * 1e6)
    return made


class FailingWriter(TraceWriter):
    """Writes `room` groups; then the disk is full."""

    room = 0

    def write_group(self, groups):
        if not self.room:
            raise OutputError(f"{self._path}: {os.strerror(errno.ENOSPC)}")
        self.room -= 1
        return super().write_group(groups)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Make ticks and drains fast; the holdback still is one."""
    monkeypatch.setattr(session, "TICK_S", 0.002)
    monkeypatch.setattr(session, "DRAIN_S", 0.004)
    monkeypatch.setattr(session, "HOLDBACK_NS", 20_000_000)
    monkeypatch.setattr(session, "FINAL_DRAIN_S", 0.1)
    monkeypatch.setattr(session, "_kvm_identity", lambda: 7)


@pytest.fixture
def kernel(monkeypatch):
    made = FakeKernel()
    map_fakes(monkeypatch, made)
    return made


def map_fakes(monkeypatch, kernel: FakeKernel) -> None:
    """Map the fake rings as the kernel's are; a memfd cannot be polled, so another stands in."""

    def map_rings(fds, _sizes):
        rings = []
        for kind, fd in fds:
            ring = MappedRing(kind, fd, kernel.fakes[kind].size)
            ring.fd = kernel.wake
            rings.append(ring)
        return rings

    monkeypatch.setattr(session, "map_rings", map_rings)


class Story:
    """Runs a recorder; `steps[n]` is called at its tick n, the last one at every later tick."""

    def __init__(self, kernel: FakeKernel, path, **options) -> None:
        self.kernel, self.path = kernel, path / "x.pfnt"
        self.options = RecordOptions(**options)
        self.ticks = 0
        self.told: list[list[str]] = []
        self.shown: list[session.Progress] = []
        self.steps: list[Callable[[], None]] = []

    def _show(self, progress: session.Progress) -> None:
        self.shown.append(progress)
        assert len(self.shown) < 2000, "the recording does not end"
        if self.steps:
            self.steps[min(self.ticks, len(self.steps) - 1)]()
        self.ticks += 1

    def _armed(self, after_s: float) -> None:
        assert 1.5 <= after_s < 10
        self.told.append(list(self.kernel.calls))

    def run(self, command=None, writer_class=TraceWriter, room=0) -> Outcome:
        settings = Settings(1, 1 << 16, 1 << 16)
        self.recorder = Recorder(None, settings, self.options, kernel=self.kernel)  # type: ignore[arg-type]
        self.recorder.prepare()
        self.writer = writer_class(self.path, meta())
        if room:
            self.writer.room = room
        return self.recorder.run(
            self.writer, command, time.monotonic() - 1.5, self._armed, self._show
        )

    def info(self) -> dict:
        with TraceReader(self.path) as reader:
            return reader.info()

    def notes(self) -> list[str]:
        with TraceReader(self.path) as reader:
            batches = reader.records(["NOTE"])
            return [row["note"] for batch in batches for row in batch.to_pylist()]


def nothing() -> None:
    pass


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def assert_conserved(outcome: Outcome, written: dict[str, int]) -> None:
    """Assert produced = written + lost + filtered, for every kind and in all."""
    for kind, c in outcome.counts.items():
        assert c.produced == written.get(kind, 0) + c.lost + c.filtered, kind
    assert outcome.records == sum(written.values())
    assert outcome.produced == outcome.records + outcome.lost + outcome.filtered


def assert_told(story: Story, outcome: Outcome) -> None:
    """Assert that the file is complete and says what the outcome says."""
    info = story.info()
    assert (info["complete"], info["reason"]) == (True, "")
    for name in ("records", "produced", "lost", "filtered"):
        assert info[name] == getattr(outcome, name), name
    assert info["summary"]["why"] == outcome.why
    assert info["bytes"] == outcome.bytes == story.path.stat().st_size
    assert_conserved(outcome, info["kinds"])


# --- failures -------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 1])
def test_a_full_disk_ends_the_recording_and_what_is_not_written_counts_as_lost(
    kernel, tmp_path, room
):
    story = Story(kernel, tmp_path)
    story.steps = [lambda: kernel.write(old("SPTE", 10)), lambda: kernel.write(old("FAULT", 5))]
    outcome = story.run(writer_class=FailingWriter, room=room)
    assert outcome.why == "output"
    assert outcome.problem.endswith("x.pfnt: No space left on device")
    assert outcome.lost > 0
    assert (outcome.records > 0) is bool(room)
    assert_told(story, outcome)
    assert kernel.calls[-2:] == ["disarm", "close"]


def test_a_disk_that_is_full_at_the_very_end_is_told_too(kernel, tmp_path):
    # GIVEN records too young to be written before the end, and no room then
    kernel.on_arm = lambda: kernel.write(old("SPTE", 10, age_ms=-5000))
    story = Story(kernel, tmp_path, duration_s=0.0)
    outcome = story.run(writer_class=FailingWriter)
    assert (outcome.why, outcome.lost, outcome.records) == ("output", 10, 0)
    assert outcome.problem
    assert_told(story, outcome)


def test_a_command_that_cannot_be_executed_leaves_nothing_armed(kernel, tmp_path):
    broken = tmp_path / "broken"
    broken.write_bytes(b"\x7fELF")
    broken.chmod(0o755)
    story = Story(kernel, tmp_path)
    with pytest.raises(CommandError):
        story.run(Command([str(broken)]))
    assert kernel.calls == ["load", "attach", "arm", "disarm"]
    story.recorder.abandon()
    assert kernel.calls[-1] == "close"


def test_a_record_that_is_never_finished_does_not_keep_the_recorder(kernel, tmp_path):
    # GIVEN a producer that died, or so it seems, between reserving and committing
    def write() -> None:
        kernel.write(old("SPTE", 2))
        kernel.fakes["events"].reserve(old("SPTE", 1))
        kernel.count("SPTE", produced=1)
        kernel.write(old("SPTE", 3))

    kernel.on_arm = write
    story = Story(kernel, tmp_path, duration_s=0.0)
    started = time.monotonic()
    outcome = story.run()
    # THEN the last drain is given up, and what it could not have is lost
    assert time.monotonic() - started < 5
    assert (outcome.records, outcome.lost) == (2, 4)
    assert_told(story, outcome)


def test_programs_that_the_kernel_skipped_count_as_lost(kernel, tmp_path):
    kernel.skipped = {"kp_spte": 3, "fentry_fault": 1}
    kernel.on_arm = lambda: kernel.write(old("SPTE", 5))
    story = Story(kernel, tmp_path, duration_s=0.0)
    outcome = story.run()
    assert (outcome.records, outcome.lost, outcome.produced) == (5, 4, 9)
    assert story.info()["summary"]["missed"] == kernel.skipped
    assert_told(story, outcome)


def test_a_module_that_was_loaded_anew_ends_the_recording_with_a_problem(
    kernel, tmp_path, monkeypatch
):
    story = Story(kernel, tmp_path)
    story.steps = [nothing, lambda: monkeypatch.setattr(session, "_kvm_identity", lambda: 8)]
    outcome = story.run()
    assert outcome.why == "kvm"
    assert "kvm module was unloaded" in outcome.problem
    assert_told(story, outcome)


# --- the ways to end ------------------------------------------------------------------------------


def test_the_verbs_come_in_their_order(kernel, tmp_path):
    story = Story(kernel, tmp_path, duration_s=0.0)
    story.run()
    assert kernel.calls == ["load", "attach", "arm", "disarm", "close"]
    assert story.recorder.failed == [("gup", "hva_to_pfn", "refused")]


def test_a_recording_ends_with_its_command(kernel, tmp_path):
    # GIVEN a command that waits until a mark is there, and faults meanwhile
    mark = tmp_path / "mark"
    command = Command(["sh", "-c", f"until [ -e '{mark}' ]; do sleep 0.005; done; exit 5"])
    story = Story(kernel, tmp_path)
    story.steps = [
        lambda: kernel.write(old("FAULT", 20), filtered=2),
        lambda: kernel.write(old("SPTE", 20), filtered=3),
        mark.touch,
        nothing,
    ]
    # WHEN it ends
    outcome = story.run(command)
    # THEN so does the recording, with everything in the trace
    assert (outcome.why, command.status, outcome.problem) == ("command", 5, "")
    assert (outcome.records, outcome.faults, outcome.filtered, outcome.lost) == (40, 20, 5, 0)
    assert 1.5 <= outcome.armed_after_s < 10
    assert 0 < outcome.peak < 1
    assert_told(story, outcome)
    assert story.info()["kinds"]["FAULT"] == 20


def test_nobody_is_told_that_the_probes_are_armed_before_they_are(kernel, tmp_path):
    # Given one who waits for that word to let a VM go on: what it does then is recorded
    story = Story(kernel, tmp_path, duration_s=0)
    story.run()
    assert story.told == [["load", "attach", "arm"]]


def test_the_command_does_not_start_before_the_probes_are_armed(kernel, tmp_path):
    mark = tmp_path / "mark"
    command = Command(["touch", str(mark)])
    seen = []
    kernel.on_arm = lambda: seen.append(mark.exists())
    assert Story(kernel, tmp_path).run(command).why == "command"
    assert (seen, mark.exists()) == ([False], True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_ends_the_recording_and_keeps_what_there_is(kernel, tmp_path, number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    story = Story(kernel, tmp_path)
    story.steps = [
        lambda: kernel.write(old("SPTE", 7)),
        lambda: os.kill(os.getpid(), number),
    ]
    outcome = story.run()
    assert (outcome.why, outcome.records) == ("interrupted", 7)
    assert_told(story, outcome)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_an_interrupt_ends_the_command_too(kernel, tmp_path):
    command = Command(["sleep", "60"])
    story = Story(kernel, tmp_path)
    story.steps = [interrupt]
    assert story.run(command).why == "interrupted"
    assert command.status == 128 + signal.SIGTERM


def test_a_recording_ends_after_its_duration(kernel, tmp_path):
    story = Story(kernel, tmp_path, duration_s=0.03)
    story.steps = [lambda: kernel.write(old("SPTE", 1))]
    outcome = story.run()
    assert outcome.why == "duration"
    assert 0.03 <= outcome.seconds < 5
    assert outcome.records == story.ticks
    assert_told(story, outcome)


def test_a_recording_ends_when_the_last_of_its_processes_has(kernel, tmp_path, monkeypatch):
    living = {11, 12}
    monkeypatch.setattr(session, "_alive", living.__contains__)
    story = Story(kernel, tmp_path, pids=(11, 12))
    story.steps = [lambda: living.discard(11), lambda: kernel.write(old("SPTE", 4)), living.clear]
    outcome = story.run()
    assert (outcome.why, outcome.records) == ("vm", 4)
    assert_told(story, outcome)


def test_a_recording_ends_near_its_greatest_size_and_the_rest_counts_as_filtered(
    tmp_path, monkeypatch
):
    kernel = FakeKernel(1 << 20)
    map_fakes(monkeypatch, kernel)
    story = Story(kernel, tmp_path, max_bytes=100_000)
    story.steps = [lambda: kernel.write(old("SPTE", 3000))]
    outcome = story.run()
    assert (outcome.why, outcome.problem) == ("size", "")
    assert 100_000 <= outcome.bytes < 200_000
    assert outcome.filtered > 0
    assert_told(story, outcome)


# --- draining -------------------------------------------------------------------------------------


def test_young_records_wait_but_are_in_the_trace_in_the_end(kernel, tmp_path):
    # GIVEN records stamped in the future, as another cpu's clock may be ahead
    kernel.on_arm = lambda: kernel.write(old("SPTE", 5, age_ms=-60_000))
    story = Story(kernel, tmp_path)
    written = []
    story.steps = [*[lambda: written.append(story.writer.records)] * 8, interrupt]
    outcome = story.run()
    assert set(written) == {0}
    assert outcome.records == 5
    assert_told(story, outcome)


def test_more_young_records_than_one_take_holds_do_not_stop_the_recorder(tmp_path, monkeypatch):
    # GIVEN a small file, so that takes are small, and more young records than one take
    kernel = FakeKernel(1 << 20)
    map_fakes(monkeypatch, kernel)
    kernel.on_arm = lambda: kernel.write(old("SPTE", 3000, age_ms=-60_000))
    story = Story(kernel, tmp_path, max_bytes=1 << 30)
    story.steps = [*[nothing] * 4, interrupt]
    # THEN ticks go on, which an interrupt ends
    outcome = story.run()
    assert (outcome.why, outcome.records) == ("interrupted", 3000)
    assert_told(story, outcome)


def test_a_ring_that_fills_up_is_drained_before_its_turn(tmp_path, monkeypatch):
    monkeypatch.setattr(session, "DRAIN_S", 60.0)
    kernel = FakeKernel(1 << 14)
    map_fakes(monkeypatch, kernel)
    story = Story(kernel, tmp_path)
    story.steps = [*[lambda: kernel.write(old("SPTE", 40))] * 10, interrupt]
    outcome = story.run()
    assert (outcome.records, outcome.lost) == (400, 0)
    assert 0.25 < outcome.peak < 1
    assert_told(story, outcome)


def test_what_finds_no_room_is_lost_and_said_so_while_it_goes_on(tmp_path, monkeypatch):
    kernel = FakeKernel(4096)
    map_fakes(monkeypatch, kernel)
    story = Story(kernel, tmp_path)
    story.steps = [
        *[lambda: kernel.write(old("SPTE", 50), filtered=1)] * 5,
        lambda: kernel.write(old("FAULT", 50)),
        interrupt,
    ]
    outcome = story.run()
    assert outcome.lost > 0 and outcome.filtered == 5
    assert outcome.records == 300 - outcome.lost
    assert story.shown[-1].lost == outcome.lost
    assert outcome.peak > 0.9
    assert_told(story, outcome)


def test_the_recorder_sleeps_while_records_wait(kernel, tmp_path, monkeypatch):
    # GIVEN a ring that is readable all the time, as one with young records in it is
    monkeypatch.setattr(session, "TICK_S", 0.02)
    os.eventfd_write(kernel.wake, 1)
    story = Story(kernel, tmp_path, duration_s=0.1)
    story.run()
    # THEN it is woken up for it once, not for as long as it is so
    assert story.ticks <= 10


def test_the_status_line_is_told_what_the_counters_say(kernel, tmp_path):
    story = Story(kernel, tmp_path)
    story.steps = [
        lambda: kernel.write(old("FAULT", 4), filtered=1),
        lambda: kernel.write(old("SPTE", 6)),
        interrupt,
    ]
    story.run()
    first, last = story.shown[0], story.shown[-1]
    assert (first.records, first.faults, first.lost) == (0, 0, 0)
    assert (last.records, last.faults, last.lost) == (10, 4, 0)
    assert last.seconds > first.seconds >= 0
    assert last.bytes >= first.bytes > 0


# --- notes ----------------------------------------------------------------------------------------


def test_slots_vms_and_stacks_are_noted_once(kernel, tmp_path, monkeypatch):
    monkeypatch.setattr(slots, "read_vmas", lambda pid, ranges: ([], "gone"))
    kernel.known = [VmEntry(1, 0xABC, 4242, True, True), VmEntry(9, 0xDEF, 99, False, True)]
    story = Story(kernel, tmp_path, stacks=True)
    story.steps = [
        lambda: kernel.write(old("SLOT", 1)),
        lambda: kernel.write(old("SPTE", 4, h__stack=[3, -1, 3, -14])),
        lambda: kernel.write(old("SPTE", 2, h__stack=3)),
        interrupt,
    ]
    outcome = story.run()
    notes = "\n".join(story.notes())
    assert notes.count('"slot":') == 2  # the note, and the slot's number in it
    assert notes.count('"frames": ["frame3", "asm_exc_page_fault"]') == 1
    assert notes.count('"frames"') == 1
    assert notes.count('"vms"') == 1 and '"tgid": 99' in notes
    assert outcome.vms == 1  # the other one is not traced
    assert_told(story, outcome)


def test_a_slot_that_appears_while_others_are_looked_at_is_not_missed(
    kernel, tmp_path, monkeypatch
):
    # GIVEN a look that takes longer than the holdback, and a slot that appears during it
    monkeypatch.setattr(session, "HURRY", 0.0)
    monkeypatch.setattr(session, "HOLDBACK_NS", 1_000_000)

    def read_vmas(_pid, ranges):
        if ranges[0][0] == 0x1000:
            kernel.write(old("SLOT", 1, age_ms=0, b=0x2000))
            time.sleep(0.01)
        return [], f"looked at {ranges[0][0]:#x}"

    monkeypatch.setattr(slots, "read_vmas", read_vmas)
    kernel.on_arm = lambda: kernel.write(old("SLOT", 1, b=0x1000))
    story = Story(kernel, tmp_path)
    story.steps = [nothing, nothing, interrupt]
    story.run()
    notes = "\n".join(story.notes())
    assert "looked at 0x1000" in notes and "looked at 0x2000" in notes


# --- ring sizes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("cpus", "rings"), [(1, 1), (2, 1), (3, 2), (8, 2), (9, 4), (512, 4)])
def test_more_cpus_share_more_rings(cpus, rings):
    assert ring_settings(RecordOptions(), cpus).rings == rings


@pytest.mark.parametrize("cpus", [1, 4, 64])
@pytest.mark.parametrize("size", [1, 4096, 10_485, 100_000, MIB, 3 * MIB, 64 * MIB, 1000 * MIB])
def test_rings_are_powers_of_two_that_fit_in_the_buffer(size, cpus):
    settings = ring_settings(RecordOptions(buffer_bytes=size), cpus)
    sizes = (settings.fault_ring_bytes, settings.event_ring_bytes)
    for each in sizes:
        assert each >= 4096 and each & (each - 1) == 0
    # As much as fits, but a page each at least.
    together = settings.rings * sum(sizes)
    assert size / 4 < together <= max(size, settings.rings * 2 * 4096)


def test_the_filters_reach_the_programs():
    options = RecordOptions(pids=(4, 5), gfns=(0x10, 0x1F), stacks=True)
    settings = ring_settings(options, 2)
    assert (settings.pids, settings.gfns, settings.stacks) == ((4, 5), (0x10, 0x1F), True)
    everything = dataclasses.replace(options, gfns=None)
    assert ring_settings(everything, 2).gfns == (0, 2**64 - 1)
