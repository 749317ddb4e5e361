"""The same simulation under the lab's Python and under this one: the same bytes."""

import hashlib
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from live.boots import Evidence
from live.guest.scenario import SIMULATED
from pfntrace import app
from tracer.simulator.truthfile import truth_paths
from tracer.tracefile import TraceReader

pytestmark = pytest.mark.lab

in_the_lab = pytest.mark.parametrize("evidence", ["6.12-confidential"], indirect=True)


def digests(trace: Path) -> list[str]:
    """Return the SHA-256 of a trace and of each table of its truth."""
    paths = [trace, *truth_paths(trace).values()]
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


def arrow(trace: Path) -> str:
    """Return which Arrow wrote the truth of a trace."""
    return str(pq.read_metadata(truth_paths(trace)["lives"]).created_by)


def rows(trace: Path) -> list[object]:
    """Return what a trace and its truth say, however Arrow has laid it out."""
    records = [row for batch in TraceReader(trace).records() for row in batch.to_pylist()]
    truth = [pq.read_table(path).to_pylist() for path in truth_paths(trace).values()]
    return [records, *truth]


@in_the_lab
@pytest.mark.parametrize("number", range(len(SIMULATED)))
def test_another_python_makes_the_same_simulation(
    evidence: Evidence, number: int, tmp_path: Path
) -> None:
    # Given a simulation that the lab's Python made, where nothing can be recorded
    said = evidence.step(f"simulated{number}")
    theirs = evidence.path(f"simulated{number}")
    assert said["status"] == 0, said["stderr"]
    assert tuple(said["python"]) != sys.version_info[:2], "the lab is to have another Python"

    # When this one makes it too
    ours = tmp_path / "ours.pfnt"
    done = CliRunner().invoke(app, ["simulate", "-o", str(ours), *SIMULATED[number]])
    assert done.exit_code == 0, done.output

    # Then trace and truth are the same, byte for byte if both have the same Arrow
    assert rows(ours) == rows(theirs)
    if arrow(ours) == arrow(theirs):
        assert digests(ours) == digests(theirs)
