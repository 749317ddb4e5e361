"""The command line: what it prints, where, and with which exit status."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from live.bugs import SKIPPED

import pfntrace
from probes.arguments import parse_frames
from probes.errors import CommandError, HostError, UsageError
from tracer.closing import closing_lines, exit_status, size
from tracer.describe import info_lines
from tracer.doctor import examine
from tracer.kernel import Counts
from tracer.observe import observe
from tracer.session import Outcome, RecordOptions
from tracer.tracefile import TraceReader

ROOT = Path(__file__).resolve().parents[2]
TRACE = Path(__file__).parent / "traces" / "ttm-6.12.pfnt"
DEAD = 2**22 + 1


def run(*arguments: str, cwd: Path = ROOT) -> tuple[int, str, str]:
    """Run the command as a user does; return its status, stdout and stderr."""
    command = [sys.executable, str(ROOT / "pfntrace.py"), *arguments]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=60)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


def assert_refused(status: int, said: str, *arguments: str, cwd: Path = ROOT) -> None:
    """Assert that it ends with this status, and one line on stderr that says so."""
    got, out, err = run(*arguments, cwd=cwd)
    assert (got, out) == (status, ""), err
    assert err.count("\n") == 1 and err.startswith("pfntrace: ")
    assert re.search(said, err), err


def outcome(why: str = "command", problem: str = "", lost: int = 0, **changes) -> Outcome:
    values = {
        "seconds": 2.0,
        "records": 90,
        "faults": 40,
        "vms": 1,
        "counts": {"FAULT": Counts(100, lost, 10 - lost)},
        "peak": 0.3,
        "bytes": 3 << 20,
        "armed_after_s": 0.5,
        "missed": {},
    }
    return Outcome(why=why, problem=problem, **{**values, **changes})


def summary(ended: Outcome, status: int = 0) -> list[str]:
    return list(closing_lines(Path("x.pfnt"), ended, RecordOptions(), status))


def test_a_trace_that_may_not_be_read_is_refused_in_one_line_by_every_command(tmp_path):
    # GIVEN typer, which would check a file itself and tell of it in four lines
    command: Any = typer.main.get_command(pfntrace.app)
    arguments = [
        (name, parameter)
        for name, one in command.commands.items()
        for parameter in one.params
        if parameter.param_type_name == "argument" and name != "record"
    ]
    assert len(arguments) >= 10
    # THEN it leaves that to who opens the file, for all of them
    for name, parameter in arguments:
        told = parameter.type_descriptor.parameter_info
        assert told.readable is False and told.exists is False, name


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "7.3"])
def test_info_fits_in_80_columns_and_no_words_run_together(kernel):
    with TraceReader(TRACE.with_name(f"ttm-{kernel}.pfnt")) as reader:
        facts = reader.info()
    lines = list(info_lines(facts))
    assert max(map(len, lines)) <= 80
    words = " ".join(lines).split()
    assert all(hook["hook"] in words for hook in [*facts["hooks"], *facts["missing"]])


# --- what is refused ------------------------------------------------------------------------------


def test_a_command_that_does_not_exist_is_a_usage_error():
    status, out, err = run("recrod")
    assert (status, out) == (2, "")
    assert "No such command" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("record", "--duration", "-1"),
        ("record", "--duration", "soon"),
        ("record", "--buffer-size", "0"),
        ("record", "--vm", "qemu"),
        ("record", "--no-such-option"),
        ("dump",),
        ("info",),
        ("dump", str(TRACE), "--limit", "-1"),
    ],
)
def test_options_that_make_no_sense_are_usage_errors(arguments):
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert "Usage: " in err


@pytest.mark.parametrize(
    "gfn", ["x", "-5", "5-", "0x100-", "5-x", "0x20-0x10", "1-2-3", "0-0x10000000000000", "-"]
)
def test_a_range_of_frames_that_is_none_is_a_usage_error(gfn):
    assert_refused(2, r"--gfn .*: (write A-B|A must not)", "dump", str(TRACE), f"--gfn={gfn}")


def test_record_checks_its_options_before_the_host(tmp_path):
    assert_refused(2, "--gfn x: write A-B", "record", "--gfn", "x", cwd=tmp_path)
    assert_refused(2, "say auto, kprobe or fentry", "record", "--attach", "usdt", cwd=tmp_path)
    assert_refused(2, "no such process", "record", "--vm", str(DEAD), cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_record_on_a_host_that_cannot_refuses_in_one_line(tmp_path):
    if examine(observe()).can_record:
        pytest.skip("this host can record, and a unit test must not")
    said = "cannot record on this host: .*; "
    assert_refused(1, said, "record", cwd=tmp_path)
    assert_refused(1, said, "record", "-o", "x.pfnt", "--", "true", cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_kind_that_does_not_exist_is_a_usage_error_that_names_those_that_do():
    assert_refused(2, "'FOLT'; there are FAULT SPTE .* NOTE$", "dump", str(TRACE), "--kind=folt")


@pytest.mark.parametrize("command", ["info", "dump", "report"])
def test_what_is_no_trace_is_refused_in_one_line(tmp_path, command):
    (tmp_path / "garbage").write_bytes(os.urandom(5000))
    (tmp_path / "empty").write_bytes(b"")
    for name in ("garbage", "empty", "none", "."):
        assert_refused(1, "", command, str(tmp_path / name))


# --- what is printed ------------------------------------------------------------------------------


def test_help_names_every_command():
    for arguments in (("--help",), ()):
        status, out, err = run(*arguments)
        assert status == (0 if arguments else 2)
        for name in ("doctor", "record", "info", "dump", "report"):
            assert re.search(rf"^  {name}\s+\S", out + err, re.M), name


@pytest.mark.parametrize("command", ["doctor", "record", "info", "dump", "report"])
def test_every_command_has_help(command):
    status, out, err = run(command, "--help")
    assert (status, err) == (0, "")
    assert f" {command} " in out.splitlines()[0] + out.splitlines()[1]


def test_the_version_is_printed_alone():
    assert run("--version") == (0, f"pfntrace {pfntrace.VERSION}\n", "")


def test_data_goes_to_stdout_and_nothing_to_stderr():
    for arguments in (("info",), ("info", "--json"), ("dump", "--limit", "3"), ("report",)):
        status, out, err = run(*arguments, str(TRACE))
        assert (status, err) == (0, ""), arguments
        assert out


def test_dump_prints_what_was_asked_for():
    status, out, _ = run("dump", str(TRACE), "--kind", "fault", "--limit", "3")
    assert (status, len(out.splitlines())) == (0, 3)
    assert all(" FAULT " in line for line in out.splitlines())


def test_the_command_is_installed_under_its_name():
    script = Path(sys.executable).with_name("pfntrace")
    if not script.exists():
        pytest.skip(f"{script} is not there: make install")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, f"pfntrace {pfntrace.VERSION}\n")


# --- a reader that leaves -------------------------------------------------------------------------


def into_a_closed_pipe(*arguments: str, buffered: bool) -> tuple[int, str]:
    """Run with a stdout that nobody reads; return the status and stderr."""
    reader, writer = os.pipe()
    os.close(reader)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    if not buffered:
        environment["PYTHONUNBUFFERED"] = "1"
    command = [sys.executable, str(ROOT / "pfntrace.py"), *arguments]
    done = subprocess.run(
        command, stdout=writer, stderr=subprocess.PIPE, env=environment, text=True, timeout=60
    )
    os.close(writer)
    return done.returncode, done.stderr


def test_a_reader_that_leaves_in_the_middle_gets_no_complaint():
    script = f"'{sys.executable}' pfntrace.py dump '{TRACE}' | head -n 2"
    done = subprocess.run(
        ["sh", "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 2


@pytest.mark.parametrize("command", ["info", "dump", "report"])
@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_left_before_sees_no_traceback(command, buffered):
    status, said = into_a_closed_pipe(command, str(TRACE), buffered=buffered)
    assert status in (0, 1, 120)
    assert "Traceback" not in said


@pytest.mark.parametrize("buffered", [True, False])
def test_a_reader_that_left_before_is_no_error(buffered):
    assert into_a_closed_pipe("info", str(TRACE), buffered=buffered) == (0, "")


# --- exit status ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ended", "status", "fail_on_loss", "expected"),
    [
        (outcome(), 0, False, 0),
        (outcome(), 0, True, 0),
        (outcome(), 42, False, 42),
        (outcome(), 42, True, 42),
        (outcome("duration"), 0, False, 0),
        (outcome("size"), 0, True, 0),
        (outcome("interrupted"), 0, False, 130),
        (outcome(lost=1), 0, False, 0),
        (outcome(lost=1), 42, False, 42),
        (outcome(lost=1), 42, True, 3),
        (outcome("interrupted", lost=1), 0, True, 3),
        (outcome(missed={"kp_spte": 1}), 0, True, 3),
        (outcome("output", problem="disk full", lost=1), 0, True, 1),
        (outcome("kvm", problem="unloaded"), 0, False, 1),
    ],
)
def test_the_exit_status_says_how_it_ended(ended, status, fail_on_loss, expected):
    assert exit_status(ended, status, fail_on_loss=fail_on_loss) == expected


@pytest.mark.parametrize(
    ("error", "status"), [(UsageError, 2), (HostError, 1), (CommandError, 127)]
)
def test_an_error_is_one_line_on_stderr_and_its_status(monkeypatch, capsys, error, status):
    def fail(**_named):
        raise error("what, where; next step")

    monkeypatch.setattr(pfntrace, "app", fail)
    with pytest.raises(SystemExit) as ended:
        pfntrace.main()
    assert ended.value.code == status
    assert capsys.readouterr() == ("", "pfntrace: what, where; next step\n")


def test_an_interrupt_before_the_recording_is_130(monkeypatch, capsys):
    def interrupted(**_named):
        raise KeyboardInterrupt

    monkeypatch.setattr(pfntrace, "app", interrupted)
    with pytest.raises(SystemExit) as ended:
        pfntrace.main()
    said = "pfntrace: interrupted before recording began; nothing was written\n"
    assert (ended.value.code, capsys.readouterr()) == (130, ("", said))


# --- the summary ----------------------------------------------------------------------------------


def test_a_problem_then_loss_come_first():
    ended = outcome("output", problem="x.pfnt: No space left on device", lost=10)
    lines = summary(ended)
    assert lines[0] == ended.problem
    # A bigger buffer would not have helped a full disk.
    assert lines[1] == "LOST 10 of 100 records (10.0 %)"


def test_a_full_buffer_names_the_flag_to_raise():
    lines = summary(outcome(lost=10))
    assert lines[0] == "LOST 10 of 100 records (10.0 %): raise --buffer-size (now 64)"


def test_a_recording_without_loss_says_so_in_numbers():
    assert summary(outcome(), status=7) == [
        "recorded 90 records (40 faults) of 1 VM in 2.0 s; ended by command",
        "lost 0, filtered 10; buffer peak 30 %",
        "the command exited with status 7",
        "wrote x.pfnt (3.0 MiB); see: pfntrace report x.pfnt",
    ]


def test_what_was_missed_and_torn_is_explained():
    ended = outcome(missed={"kp_spte": 1200}, counts={"FAULT": Counts(100, 5, 0, 5)}, peak=0.9)
    text = "\n".join(summary(ended))
    assert "5 of them are faults whose end was missed" in text
    assert "interrupted by themselves: kp_spte 1,200" in text
    assert text.startswith("LOST 1,205 of 1,300 records")
    # AND the lab's tests know by these words that a recording is to be made anew
    assert SKIPPED in text
    # AND no larger buffer is asked for, which would not have kept them
    assert "--buffer-size" not in text


def test_a_buffer_that_was_nearly_full_names_its_flag():
    assert "(near full: raise --buffer-size)" in summary(outcome(peak=0.8))[1]


def test_a_recording_without_faults_asks_whether_it_was_the_right_vm():
    assert any("--vm" in line for line in summary(outcome(faults=0)))


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 << 20, "5.0 MiB"),
        (3 << 30, "3.0 GiB"),
    ],
)
def test_sizes_are_for_people(count, text):
    assert size(count) == text


@pytest.mark.parametrize(
    ("text", "gfns"),
    [("5", (5, 5)), ("0x10-0x1f", (16, 31)), ("0-0", (0, 0)), (f"0-{2**52 - 1}", (0, 2**52 - 1))],
)
def test_a_range_of_frames_is_read_in_any_base(text, gfns):
    assert parse_frames(text) == gfns


def test_leaves_without_faults_are_told_when_the_recording_ends():
    # Given a kernel of which the probes see SPTEs, but never a fault; and a host without a VM
    passed_by = outcome(faults=0, counts={"SPTE": Counts(82, 0, 0), "FAULT": Counts()})
    idle = outcome(faults=0, counts={"SPTE": Counts(), "FAULT": Counts()})

    # When their recordings end, then each hears what to look at
    assert any("no guest page fault was seen, but 82 SPTE records" in s for s in summary(passed_by))
    assert any("was a VM running, and was it this one" in line for line in summary(idle))
    assert not any("no guest page fault" in line for line in summary(outcome()))
