"""Replay: real recordings conform to the model of their kernel, doctored ones do not."""

from pathlib import Path

import pytest
from unit.simkit import make

from probes.errors import TraceFormatError, UsageError
from probes.facts import KernelFacts
from tracer.simulator.kernels import KERNELS, facts_of
from tracer.simulator.replay import conform, kernel_of, replay_lines

TRACES = Path(__file__).parent / "traces"


# --- bad input ------------------------------------------------------------------------------------


def test_a_kernel_that_is_none_is_refused():
    with pytest.raises(UsageError, match=r"no such kernel; there are 6\.1"):
        conform(TRACES / "ttm-6.12.pfnt", other="5.4")


def test_a_trace_that_lost_records_cannot_be_replayed(tmp_path):
    made = make(tmp_path, hostile=("drop",))
    with pytest.raises(TraceFormatError, match="a replay needs every record"):
        conform(made.path)


def test_a_generation_without_a_model_is_refused():
    with pytest.raises(UsageError, match="has no model; say --as"):
        kernel_of("unknown", KernelFacts())


# --- real kernels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ttm-6.1", "ttm-6.12", "ttm-7.3"])
def test_real_recordings_conform(name):
    answer = conform(TRACES / f"{name}.pfnt")
    assert answer.conforms, answer.expected
    assert answer.explained == answer.records > 20
    assert next(replay_lines(answer)).startswith("conforms: ")


@pytest.mark.parametrize(
    ("there", "refused", "only_here", "only_there"),
    [("6.13", (1, 0), 0, 1), ("6.1", (1, 1), 0, 0), ("v9", (1, 0), 0, 1)],
)
def test_what_if_says_which_faults_another_kernel_would_refuse(
    there, refused, only_here, only_there
):
    # Given a guest of 6.12 that died of a TTM tail page, when another kernel is asked
    found = conform(TRACES / "ttm-6.12.pfnt", other=there).what_if
    assert found is not None

    # Then it says whether that page would have been mapped
    assert found.counts["faults_refused"] == refused
    assert (found.only_here, found.only_there) == (only_here, only_there)


def test_what_if_of_a_new_kernel_names_the_first_guest_frame_that_an_old_one_refuses():
    found = conform(TRACES / "ttm-7.3.pfnt", other="6.12").what_if
    assert found is not None
    assert found.counts["faults_refused"] == (0, 127)
    assert found.first_refusals[0] == (1, 0x10001)
    assert any("127 guest frames" in line for line in found.lines())


# --- the model itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_model_explains_its_own_stories(tmp_path, kernel):
    assert kernel_of(KERNELS[kernel].generation, facts_of(KERNELS[kernel], 2)).name == (
        "v9" if kernel == "v9-mailed" else kernel  # which facts cannot tell apart
    )
    for scenario in ("balloon", "nested", "migration", "slots", "virtio_gpu"):
        made = make(tmp_path, kernel=kernel, scenario=scenario, mem_bytes=1 << 20, seed=4)
        answer = conform(made.path)
        assert answer.kernel == kernel
        assert answer.conforms, (scenario, answer.expected, answer.divergence)


@pytest.mark.parametrize(
    ("bug", "scenario", "expects"),
    [
        ("missing_put", "demand", "1 pfn_clean, not 0"),
        ("double_put", "demand", "1 pfn_clean, not 2"),
        ("put_on_wrong_folio", "dax", "the put of the page that fault-in found"),
        ("stale_spte", "balloon", "a zap of every leaf that maps pfn"),
        ("stale_sequence", "demand", "a zap of every leaf that maps pfn"),
        ("wrong_gfn", "demand", "a memslot around this gfn"),
    ],
)
def test_a_bug_is_a_divergence_and_both_sides_are_told(tmp_path, bug, scenario, expects):
    made = make(tmp_path, bugs=(bug,), scenario=scenario, mem_bytes=4 << 20)
    answer = conform(made.path)
    assert not answer.conforms
    assert expects in answer.expected
    told = list(replay_lines(answer))
    assert told[0].startswith("diverges at record ")
    assert told[1].strip().startswith("recorded ") and told[2].strip().startswith("expected ")
    found = answer.to_json()
    assert found["records"] > found["explained"]
    assert found["first_divergence"]["expected"] == answer.expected


def test_the_ragged_end_of_a_killed_recording_is_not_judged(tmp_path):
    made = make(tmp_path, scenario="balloon", hostile=("truncate",))
    answer = conform(made.path)
    assert answer.conforms and answer.unjudged == answer.records
