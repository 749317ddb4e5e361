"""The files of a simulation: their names, whom they belong to, and that none is left half done."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from probes.errors import OutputError
from tracer.simulator.simulate import Knobs, simulate
from tracer.simulator.truthfile import truth_paths
from tracer.tracewriter import TraceWriter

SMALL = Knobs(mem_bytes=1 << 20)
TABLES = ("lives", "references", "bugs")


def left(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", TABLES)
def test_a_truth_that_somebody_has_is_not_overwritten_unasked(tmp_path, table):
    # Given a file where the truth would go
    mine = tmp_path / f"run.truth-{table}.parquet"
    mine.write_bytes(b"mine")
    # Then nothing is made
    with pytest.raises(OutputError, match=f"{mine.name} exists already; name another with -o, or"):
        simulate(SMALL, tmp_path / "run.pfnt", version="0")
    assert left(tmp_path) == {mine.name} and mine.read_bytes() == b"mine"

    # But when that is asked for, then it is new
    simulate(SMALL, tmp_path / "run.pfnt", version="0", overwrite=True)
    assert len(left(tmp_path)) == 4 and mine.read_bytes()[:4] == b"PAR1"


def test_a_file_that_is_there_is_seen_before_a_story_is_told_twice(tmp_path, monkeypatch):
    # Given a recording that begins late, for which the whole story is simulated first
    late = dataclasses.replace(SMALL, hostile=("late",))
    (tmp_path / "run.pfnt").write_bytes(b"mine")
    monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda: pytest.fail("it was simulated"))
    with pytest.raises(OutputError, match="exists already"):
        simulate(late, tmp_path / "run.pfnt", version="0")


@pytest.mark.parametrize("name", ["run.pfnt", "run.truth-lives.parquet", "run.truth-bugs.parquet"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_or_a_link_of_that_name_is_left_alone(tmp_path, name, overwrite):
    for make in (Path.mkdir, lambda path: path.symlink_to("elsewhere")):
        make(tmp_path / name)
        with pytest.raises(OutputError, match=r"is not an ordinary file; name another with -o$"):
            simulate(SMALL, tmp_path / "run.pfnt", version="0", overwrite=overwrite)
        assert left(tmp_path) == {name}
        (tmp_path / name).rmdir() if (tmp_path / name).is_dir() else (tmp_path / name).unlink()


def test_a_name_that_is_too_long_for_a_truth_is_told_in_a_line(tmp_path):
    with pytest.raises(OutputError, match="cannot be written: File name too long; name another"):
        simulate(SMALL, tmp_path / ("x" * 245), version="0")
    assert not left(tmp_path)


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, OutputError("full"), MemoryError])
def test_what_ends_it_early_leaves_what_was_to_be_overwritten(tmp_path, monkeypatch, trouble):
    # Given a simulation
    simulate(SMALL, tmp_path / "run.pfnt", version="0")
    mine = {path: path.read_bytes() for path in tmp_path.iterdir()}

    # When one that would take its place fails in its midst
    def fail(*_some):
        raise trouble

    monkeypatch.setattr(TraceWriter, "write_losses", fail)
    with pytest.raises(BaseException) as told:
        simulate(SMALL, tmp_path / "run.pfnt", version="0", overwrite=True)
    assert told.type is (trouble if isinstance(trouble, type) else type(trouble))
    # Then the old one is there, and nothing else
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == mine


@pytest.mark.parametrize("trouble", [KeyboardInterrupt, OutputError("full"), MemoryError])
def test_what_ends_a_simulation_early_leaves_nothing(tmp_path, monkeypatch, trouble):
    # Given something that goes wrong when the first records are written
    def fail(*_some):
        raise trouble

    monkeypatch.setattr(TraceWriter, "write_group", fail)
    (tmp_path / "other").write_bytes(b"")
    # When it does, then no file is left that would look whole, and others are
    with pytest.raises(BaseException) as told:
        simulate(SMALL, tmp_path / "run.pfnt", version="0")
    assert told.type is (trouble if isinstance(trouble, type) else type(trouble))
    assert left(tmp_path) == {"other"}


# --- names and modes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trace", "lives"),
    [
        ("x.pfnt", "x.truth-lives.parquet"),
        ("run-6.1", "run-6.1.truth-lives.parquet"),
        ("run-6.12", "run-6.12.truth-lives.parquet"),
        ("a.b.pfnt", "a.b.truth-lives.parquet"),
    ],
)
def test_a_truth_is_named_after_the_whole_name_of_its_trace(trace, lives):
    assert truth_paths(Path("there") / trace)["lives"] == Path("there") / lives


def test_traces_of_two_kernels_have_a_truth_each(tmp_path):
    for kernel in ("6.1", "6.12"):
        simulate(Knobs(kernel=kernel, mem_bytes=1 << 20), tmp_path / f"run-{kernel}", version="0")
    assert len(left(tmp_path)) == 8


def test_the_truth_is_its_owner_s_like_the_trace(tmp_path):
    before = os.umask(0)
    try:
        simulate(SMALL, tmp_path / "run.pfnt", version="0")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


# --- the command line -----------------------------------------------------------------------------

COMMAND = [sys.executable, str(Path(__file__).resolve().parents[2] / "pfntrace.py"), "simulate"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_in_one_line_and_leaves_nothing(tmp_path, number):
    # Given a long simulation that has begun to write
    words = ["--mem", "1G", "-o", "x.pfnt"]
    running = subprocess.Popen(
        [*COMMAND, *words], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        until = time.monotonic() + 60
        while len(left(tmp_path)) < 4 and time.monotonic() < until:
            time.sleep(0.02)
        # When it is told to end
        running.send_signal(number)
        said = running.communicate(timeout=60)[1].splitlines()
    finally:
        running.kill()
    # Then the status says by what, one line says what is left, and that is true
    assert running.returncode == 128 + number
    assert [line for line in said if "interrupted" in line] == [said[-1]]
    assert said[-1].startswith(f"pfntrace: interrupted by {number.name}; the unfinished trace and")
    assert left(tmp_path) == set()


def test_the_outcome_is_json_on_stdout_and_the_knobs_on_stderr(tmp_path):
    words = ["--mem", "1M", "--seed", "5", "--bug", "missing_put", "-o", "x.pfnt", "--json"]
    done = subprocess.run([*COMMAND, *words], cwd=tmp_path, capture_output=True, text=True)
    told = json.loads(done.stdout)
    assert told["seed"] == told["knobs"]["seed"] == 5 and told["planted"]["missing_put"] > 0
    assert told["records"] > told["faults"] > 0 and told["lives"] > 0
    assert set(told["files"].values()) == left(tmp_path)
    assert done.stderr.startswith("pfntrace: seed      5\n")


def test_a_trace_does_not_go_to_a_stream(tmp_path):
    done = subprocess.run([*COMMAND, "-o", "-"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and left(tmp_path) == set()
    (line,) = done.stderr.splitlines()
    assert line.startswith("pfntrace: -o -: a trace is no stream; name a file")
