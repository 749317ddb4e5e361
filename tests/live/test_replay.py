"""`pfntrace replay` of what the lab records: the model of its kernel explains every record."""

from pathlib import Path

import pytest

from live.boots import BOOTS, Evidence
from probes.errors import TraceFormatError
from tracer.simulator.replay import Conformance, conform

pytestmark = pytest.mark.lab

STEPS = {
    "basic": ("demand1", "demand2", "slots", "dirty", "nested", "aging"),
    "large": ("large1", "split", "smm"),
    "ttm": ("ttm",),
}


def replay(path: Path, evidence: Evidence) -> Conformance | None:
    """Replay a trace; None if it lost records, which no replay can do without."""
    if not evidence.info(path.stem)["lost"]:
        return conform(path)
    with pytest.raises(TraceFormatError, match="records were lost"):
        conform(path)
    return None


@pytest.mark.parametrize(
    ("evidence", "step"),
    [(name, step) for name, boot in BOOTS.items() for step in STEPS.get(boot.scenario, ())],
    indirect=["evidence"],
)
def test_the_model_explains_every_record_of_a_real_kernel(evidence: Evidence, step: str) -> None:
    # Given a recording of an unchanged kernel, when it is replayed through the kernel's model
    answer = replay(evidence.path(step), evidence)

    # Then no record is left that the model did not expect
    if answer is None:
        assert step == "split", "only recordings of a splitting storm may overrun the ring"
        return
    assert answer.conforms, (answer.expected, answer.divergence)
    assert answer.explained == answer.records > 0


@pytest.mark.parametrize(
    ("evidence", "other", "refused"),
    [("6.12-ttm", "6.13", (1, 0)), ("6.12-ttm", "6.1", (1, 1)), ("7.3-ttm", "6.12", (0, 127))],
    indirect=["evidence"],
)
def test_what_if_tells_which_faults_another_kernel_refuses(
    evidence: Evidence, other: str, refused: tuple[int, int]
) -> None:
    # Given a guest over a TTM buffer, of whose 128 pages only each block's first has a count
    found = conform(evidence.path("ttm"), other=other).what_if

    # Then the faults on the others are refused where a count is needed (up to 6.12), and only there
    assert found is not None and found.counts["faults_refused"] == refused
