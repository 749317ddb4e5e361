"""The command to record: refused early, held back until it may start, never left behind."""

import os
import shlex
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from probes.errors import CommandError
from tracer.command import Command

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")


def ended(command: Command) -> int:
    """Wait for the command's end; return its status."""
    deadline = time.monotonic() + 10
    while command.poll() is None:
        assert time.monotonic() < deadline, "the command does not end"
        time.sleep(0.002)
    assert command.status is not None
    return command.status


def status_of(argv: Sequence[str]) -> int:
    command = Command(argv)
    command.start()
    return ended(command)


def is_gone(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def executable(path: Path, content: bytes, mode: int = 0o755) -> str:
    path.write_bytes(content)
    path.chmod(mode)
    return str(path)


@pytest.fixture
def no_fork(monkeypatch):
    def fork() -> int:
        raise AssertionError("forked")

    monkeypatch.setattr(os, "fork", fork)


# --- commands that cannot be started --------------------------------------------------------------


@pytest.mark.parametrize("name", ["no-such-command-here", "/no/such/command", "", "/"])
def test_a_command_that_does_not_exist_is_refused_before_any_fork(name, no_fork):
    with pytest.raises(CommandError, match="command not found; nothing was recorded") as caught:
        Command([name, "argument"])
    assert str(caught.value).startswith(f"{name}: ")
    assert caught.value.exit_code == 127


def test_a_file_that_is_not_executable_is_no_command(tmp_path, no_fork):
    with pytest.raises(CommandError, match="command not found"):
        Command([executable(tmp_path / "plain", b"#!/bin/sh\n", mode=0o644)])


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"\x7fELF and nothing more", "Exec format error"),
        (b"", "Exec format error"),
        (b"#!/no/such/interpreter\n", "No such file or directory"),
    ],
)
def test_a_file_that_cannot_be_executed_is_an_error_of_status_127(tmp_path, content, why):
    before = descriptors()
    command = Command([executable(tmp_path / "broken", content)])
    with pytest.raises(CommandError, match=f"broken: {why}; nothing was recorded") as caught:
        command.start()
    assert (caught.value.exit_code, command.status, command.poll()) == (127, 127, 127)
    assert is_gone(command.pid)
    assert descriptors() == before


def test_a_child_that_was_killed_while_it_waited_tells_so_by_its_status():
    command = Command(["true"])
    os.kill(command.pid, signal.SIGKILL)
    os.waitid(os.P_PID, command.pid, os.WEXITED | os.WNOWAIT)
    command.start()
    assert ended(command) == 128 + signal.SIGKILL


# --- how it ends ----------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, 42, 255])
def test_the_exit_status_is_the_command_s_own(status):
    assert status_of(["sh", "-c", f"exit {status}"]) == status


@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL", "SIGINT", "SIGPIPE", "SIGXFSZ", "SIGUSR1"])
def test_death_by_a_signal_is_128_and_its_number(name):
    # Python ignores SIGPIPE and SIGXFSZ, and the child SIGINT while it waits: the command may not
    # inherit that.
    assert status_of(["sh", "-c", f"kill -{name[3:]} $$"]) == 128 + getattr(signal, name)


def test_the_status_stays_once_it_is_known():
    command = Command(["sh", "-c", "exit 3"])
    command.start()
    assert ended(command) == 3
    assert [command.poll(), command.poll()] == [3, 3]
    command.stop()  # nothing is left to be signalled


def test_arguments_and_the_environment_reach_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("PFNTRACE_TEST", "x y")
    out = shlex.quote(str(tmp_path / "out"))
    assert status_of(["sh", "-c", f'echo "$0|$1|$PFNTRACE_TEST" >{out}', "a b", "*"]) == 0
    assert (tmp_path / "out").read_text() == "a b|*|x y\n"


# --- when it runs ---------------------------------------------------------------------------------


def test_the_command_does_not_run_before_it_may(tmp_path):
    mark = tmp_path / "mark"
    command = Command(["touch", str(mark)])
    time.sleep(0.05)
    assert command.poll() is None
    assert not mark.exists()
    command.start()
    assert ended(command) == 0
    assert mark.exists()


def test_an_interrupt_while_it_waits_does_not_reach_the_command():
    command = Command(["true"])
    wait_until_ignored(command.pid, signal.SIGINT)
    os.kill(command.pid, signal.SIGINT)
    command.start()
    assert ended(command) == 0


def wait_until_ignored(pid: int, number: int) -> None:
    # The child needs a moment after the fork to say what it ignores.
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        status = Path(f"/proc/{pid}/status").read_text()
        ignored = int(status.partition("SigIgn:")[2].split()[0], 16)
        if ignored >> (number - 1) & 1:
            return
        time.sleep(0.001)
    raise AssertionError("not ignored")


# --- how it is got rid of -------------------------------------------------------------------------


def test_a_command_that_is_abandoned_never_runs_and_leaves_nothing(tmp_path):
    before = descriptors()
    command = Command(["touch", str(tmp_path / "mark")])
    command.abandon()
    assert is_gone(command.pid)
    assert not (tmp_path / "mark").exists()
    assert descriptors() == before
    command.abandon()  # twice does no harm


def test_stop_ends_a_running_command_with_sigterm():
    command = Command(["sleep", "60"])
    command.start()
    assert command.poll() is None
    command.stop()
    assert ended(command) == 128 + signal.SIGTERM


def test_stop_lets_a_command_end_in_its_own_way():
    command = Command(["sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.01; done"])
    command.start()
    # The shell needs a moment to set its trap: it shows in the signals that it catches.
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        status = Path(f"/proc/{command.pid}/status").read_text()
        if int(status.partition("SigCgt:")[2].split()[0], 16) >> (signal.SIGTERM - 1) & 1:
            break
        time.sleep(0.002)
    command.stop()
    assert ended(command) == 7


def test_stop_after_the_end_does_nothing():
    command = Command(["true"])
    command.start()
    os.waitid(os.P_PID, command.pid, os.WEXITED | os.WNOWAIT)
    command.stop()
    assert ended(command) == 0
