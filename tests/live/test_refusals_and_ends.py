"""Every way a recording ends or is refused: a clear line, a valid file, the right status."""

import json

import polars as pl
import pytest

from live.boots import Evidence
from tracer.tracefile import TraceReader

pytestmark = pytest.mark.lab

on_6_12 = pytest.mark.parametrize("evidence", ["6.12-ends"], indirect=True)
locked = pytest.mark.parametrize("evidence", ["6.12-confidential"], indirect=True)


def last_words(evidence: Evidence, step: str) -> tuple[int, str]:
    said = evidence.step(step)
    assert "Traceback" not in said["stderr"]
    return said["status"], said["stderr"]


@on_6_12
@pytest.mark.parametrize(
    ("step", "status", "words"),
    [
        ("not_found", 127, "no-such-command-anywhere: command not found"),
        ("unwritable", 1, "/sys/x.pfnt cannot be created"),
        ("taken", 1, "taken.pfnt exists: choose another name with -o, or overwrite with --force"),
        ("no_kvm", 1, "kvm is not loaded; modprobe kvm_amd"),
        ("no_caps", 1, "not privileged: CAP_BPF, CAP_PERFMON"),
    ],
)
def test_what_cannot_be_recorded_is_refused_in_one_line(
    evidence: Evidence, step: str, status: int, words: str
) -> None:
    said = last_words(evidence, step)

    assert said[0] == status
    assert words in said[1] and len(said[1].strip().splitlines()) == 1
    assert step == "taken" or not evidence.path(step).exists()


@on_6_12
@pytest.mark.parametrize("step", ["no_kvm_doctor", "no_caps_doctor"])
def test_doctor_draws_the_full_picture_of_a_host_that_cannot(evidence: Evidence, step: str) -> None:
    status, _ = last_words(evidence, step)
    said = json.loads(evidence.step(step)["stdout"])

    assert status == 1 and said["can_record"] is False
    assert said["problem"] and len(said["checks"]) > 10


@locked
def test_lockdown_confidentiality_is_named_as_the_reason(evidence: Evidence) -> None:
    status, said = last_words(evidence, "locked")
    doctor = json.loads(evidence.step("locked_doctor")["stdout"])

    assert status == 1 and "lockdown" in said and len(said.strip().splitlines()) == 1
    assert doctor["can_record"] is False and "lockdown" in doctor["problem"]


@on_6_12
def test_an_existing_file_is_not_touched(evidence: Evidence) -> None:
    assert evidence.path("taken").read_text() == "mine"


@on_6_12
@pytest.mark.parametrize(
    ("step", "status", "why"),
    [
        ("fails", 7, "command"),
        ("duration", 0, "duration"),
        ("max_size", 0, "size"),
        ("interrupted", 130, "interrupted"),
        ("vm_ends", 0, "vm"),
        ("vm_later", 0, "duration"),
        ("module", 0, "duration"),
        ("reloaded", 0, "command"),
    ],
)
def test_every_end_leaves_a_valid_trace_and_the_right_status(
    evidence: Evidence, step: str, status: int, why: str
) -> None:
    info = evidence.info(step)

    assert last_words(evidence, step)[0] == status
    assert info["complete"] is True and info["summary"]["why"] == why
    assert info["produced"] == info["records"] + info["lost"] + info["filtered"]


@on_6_12
@pytest.mark.parametrize("step", ["interrupted", "vm_ends", "vm_later", "module", "reloaded"])
def test_the_guest_is_in_the_trace(evidence: Evidence, step: str) -> None:
    assert evidence.info(step)["kinds"]["FAULT"] == 239
    assert evidence.info(step)["lost"] == 0


@on_6_12
def test_a_size_limit_is_kept_and_what_it_left_out_is_counted(evidence: Evidence) -> None:
    info = evidence.info("max_size")

    assert info["bytes"] < 2 * 0.3 * (1 << 20)
    assert info["filtered"] > 0 and info["lost"] == 0


@on_6_12
def test_a_full_disk_loses_records_by_name(evidence: Evidence) -> None:
    status, said = last_words(evidence, "disk_full")

    # Given a full disk, then the recorder says what it lost and the file says that it ends early
    assert status == 1 and "No space left on device" in said and "LOST" in said
    info = evidence.info("disk_full")
    assert info["kinds"]["FAULT"] > 0
    # (the end mark itself may not have found room)
    assert info["lost"] > 0 if info["complete"] else "no end mark" in info["reason"]


@on_6_12
def test_kvm_cannot_be_unloaded_under_a_recording(evidence: Evidence) -> None:
    assert "in use" in json.loads((evidence.out / "module_rmmod.json").read_text())["stderr"]


killed = pytest.mark.parametrize("evidence", ["6.12-killed"], indirect=True)
#: A guest that starts when the recorder is armed has faulted by then, and is on disk (ns).
WRITTEN_NS = 1_500_000_000


@killed
def test_after_sigkill_the_file_opens_and_misses_at_most_the_last_second(
    evidence: Evidence,
) -> None:
    # Given recorders killed at twelve moments, ten of them while a guest faulted
    runs = json.loads((evidence.out / "killed.json").read_text())["runs"]
    armed = [run for run in runs if evidence.path(run["name"]).exists()]
    assert len(runs) == 12 and len(armed) >= 10

    faults = []
    for run in armed:
        # When the file is read, which may end within a batch
        reader = TraceReader(evidence.path(run["name"]))
        times = [batch.column("ts")[-1].as_py() for batch in reader.batches(columns=["ts"])]
        newest = max(times, default=run["armed_ns"])
        info = reader.info()

        # Then it says that its end is missing, and that is less than a second
        assert info["complete"] is False
        assert "killed" in info["reason"] or "truncated" in info["reason"]
        assert run["killed_ns"] - newest < 1_000_000_000, run
        # (of a recorder killed sooner, what is there may be as late as that second)
        if run["killed_ns"] - run["armed_ns"] > WRITTEN_NS:
            faults.append(info["kinds"]["FAULT"])

    # and the guest is in it, if it had begun in time: on a busy host one or two have not
    assert len(faults) >= 5 and sum(count > 0 for count in faults) >= 4


@killed
def test_after_sigkill_nothing_is_left_in_the_kernel(evidence: Evidence) -> None:
    result = json.loads((evidence.out / "killed.json").read_text())

    assert result["after"] == result["before"]


each_attach = pytest.mark.parametrize(
    "evidence", ["6.1-attach", "6.12-attach", "7.3-attach"], indirect=True
)


@each_attach
def test_forced_loss_is_counted_to_the_last_record(evidence: Evidence) -> None:
    # Given a buffer of a few kilobytes and a flood of faults
    info = evidence.info("loss")

    # Then produced = received + lost + filtered for every kind, and the exit status is 3
    for kind, counts in info["summary"]["counts"].items():
        received = info["kinds"][kind]
        assert counts["produced"] == received + counts["lost"] + counts["filtered"], kind
    assert info["lost"] > 0 and evidence.step("loss")["status"] == 3
    # and the records that came through are numbered so that the gaps show
    records = evidence.records("loss").filter(~pl.col("kind").is_in(["LOSS", "NOTE"]))
    gaps = records.group_by("cpu").agg(span=pl.col("seq").max() - pl.col("seq").min() + 1)
    assert gaps["span"].sum() > records.height


@each_attach
def test_loss_is_on_the_first_line_of_info_and_report(evidence: Evidence) -> None:
    from analysis.report import report_lines
    from tracer.describe import info_lines

    assert next(iter(info_lines(evidence.info("loss")))).startswith("LOST ")
    assert next(iter(report_lines(evidence.path("loss")))).startswith("LOST ")


@each_attach
@pytest.mark.parametrize("step", ["attach_kprobe", "attach_fentry"])
def test_both_ways_to_attach_see_the_same_guest(evidence: Evidence, step: str) -> None:
    info = evidence.info(step)

    assert info["kinds"]["FAULT"] == 239 and info["kinds"]["SPTE"] == 478
    assert {h["how"] for h in info["hooks"]} >= {step.removeprefix("attach_")}


@each_attach
def test_a_gfn_filter_works_in_the_kernel_and_counts_what_it_left_out(evidence: Evidence) -> None:
    info = evidence.info("gfn")
    faults = evidence.records("gfn").filter(pl.col("kind") == "FAULT")

    assert sorted(faults["gfn"]) == list(range(0x100, 0x10B))
    assert info["summary"]["counts"]["FAULT"]["filtered"] == 239 - 11
    assert info["produced"] == info["records"] + info["lost"] + info["filtered"]


@each_attach
def test_stacks_are_kept_with_their_symbols(evidence: Evidence) -> None:
    records = evidence.records("stacks")
    notes = [json.loads(n) for n in records.filter(pl.col("kind") == "NOTE")["note"]]
    frames = [frame for note in notes if "stack" in note for frame in note["frames"]]

    assert records.filter(pl.col("kind") == "SPTE")["stack"].null_count() == 0
    assert any("kvm" in frame for frame in frames)


@each_attach
def test_two_vms_are_told_apart(evidence: Evidence) -> None:
    faults = evidence.records("two_vms").filter(pl.col("kind") == "FAULT")

    assert sorted(faults.group_by("vm").len()["len"]) == [239, 239]


@each_attach
def test_faults_whose_end_was_missed_are_counted_as_torn(evidence: Evidence) -> None:
    # Given 24 vCPUs that sleep in userfaultfd on two cpus, and KVM's own count of faults
    taken = evidence.stats("asleep", "vcpu")["pf_taken"]
    info = evidence.info("asleep")

    # Then every fault is in the trace or counted as lost
    counts = info["summary"]["counts"]["FAULT"]
    assert info["kinds"]["FAULT"] + counts["lost"] == taken
    assert counts["torn"] == counts["lost"]


@each_attach
def test_every_fault_on_one_page_shows_its_own_release(evidence: Evidence) -> None:
    # Given 101 guest pages that all read the zero page, then each has a release of its own
    records = evidence.records("zero_page")
    puts = records.filter(
        (pl.col("kind") == "RELEASE") & pl.col("call").is_in(["pfn_clean", "finish_fault"])
    )

    assert records.filter(pl.col("kind") == "FAULT").height == 101
    assert sorted(puts["gfn"].drop_nulls()) == list(range(0x100, 0x100 + 101))
