"""Findings: their verdicts, their JSON, frames joined to ranges."""

import json

import numpy as np
import pytest

from analysis.findings import (
    RANGES_MAX,
    VERDICTS,
    Chain,
    Finding,
    Innocent,
    Unanswerable,
    ranges_of,
    weakest,
)
from analysis.findingwords import finding_entry


def finding(**changes):
    values = {"detector": "balance", "verdict": "definite", "title": "t", "rule": "r", "count": 3}
    return Finding(**{**values, **changes})


def test_a_word_that_is_no_verdict_is_a_mistake_of_the_program():
    with pytest.raises(ValueError, match="'sure' is no verdict"):
        finding(verdict="sure")


def test_what_was_never_seen_is_no_finding():
    with pytest.raises(ValueError, match="at least once"):
        finding(count=0)


def test_an_innocent_explanation_says_what_became_of_it():
    with pytest.raises(ValueError):
        Innocent("somebody else did it", "")


@pytest.mark.parametrize(
    ("verdict", "counts"), [*zip(VERDICTS, [True, True, False, False], strict=True)]
)
def test_only_definite_and_probable_make_a_check_fail(verdict, counts):
    assert finding(verdict=verdict).is_anomaly is counts


def test_the_worst_comes_first_then_the_most_frequent():
    found = [
        finding(verdict="explained", count=9),
        finding(verdict="probable", count=2),
        finding(verdict="definite", count=1),
        finding(verdict="probable", count=5),
    ]
    ordered = [(f.verdict, f.count) for f in sorted(found, key=lambda f: f.rank)]
    assert ordered == [("definite", 1), ("probable", 5), ("probable", 2), ("explained", 9)]


def test_a_cause_comes_before_what_it_leads_to():
    # GIVEN a page that was freed too early: marks and frees are seen more often than their cause
    found = [
        finding(detector="dead-mark", verdict="definite", count=30),
        finding(detector="use-after-free", verdict="definite", count=19),
        finding(detector="stale-install", verdict="definite", count=20),
        finding(detector="install", verdict="probable", count=40),
    ]
    ordered = [f.detector for f in sorted(found, key=lambda f: f.rank)]
    assert ordered == ["stale-install", "dead-mark", "use-after-free", "install"]


def test_a_chain_of_proof_is_as_strong_as_its_weakest_link():
    assert weakest("definite", "inconclusive", "probable") == "inconclusive"


def test_its_json_is_plain_and_leaves_out_how_evidence_was_asked_for():
    # GIVEN numbers as numpy leaves them behind
    one = finding(
        pages=np.int64(7),
        gfns=((np.uint64(1), np.uint64(2)),),
        innocent=(Innocent("why", "no"),),
        chain=Chain(records=(("FAULT", 1, 0, 2),)),
        detail={"judged": np.int32(4)},
    ).with_evidence([{"kind": "FAULT", "ts": 5}])
    # WHEN
    data = json.loads(json.dumps(one.to_json()))
    # THEN
    assert data["pages"] == 7 and data["gfns"] == [[1, 2]] and data["detail"] == {"judged": 4}
    assert data["innocent"] == [{"explanation": "why", "ruled_out": "no"}]
    assert data["evidence"] == [{"kind": "FAULT", "ts": 5}]
    assert "chain" not in data


def test_what_cannot_be_answered_has_a_json_too():
    assert Unanswerable("pins", "why").to_json() == {"detector": "pins", "reason": "why"}


@pytest.mark.parametrize(
    ("frames", "ranges"),
    [
        ([], ()),
        ([5], ((5, 5),)),
        ([7, 1, 2, 3, 2], ((1, 3), (7, 7))),
        ([(1 << 64) - 1, 0], ((0, 0), ((1 << 64) - 1, (1 << 64) - 1))),
    ],
)
def test_frames_are_joined_to_ranges(frames, ranges):
    assert ranges_of(frames) == (ranges, False)


def test_json_names_all_ranges_and_text_the_first():
    # Given a finding on every other page of 100
    pfns, more = ranges_of(np.arange(0, 200, 2))
    one = finding(pages=100, pfns=pfns, more=more)
    # Then its JSON has them all, and says so
    told = one.to_json()
    assert [low for low, _ in told["pfns"]] == list(range(0, 200, 2)) and not told["more"]
    # And text has a few, and says so
    place = dict(finding_entry(one, 0).facts)["in"]
    assert place.count("0x") == 16 and place.endswith(" and more")


def test_of_many_ranges_the_first_are_named():
    ranges, more = ranges_of(np.arange(0, 3 * RANGES_MAX, 2))
    assert len(ranges) == RANGES_MAX and more
