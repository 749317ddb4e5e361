"""Planted bugs, found in live recordings: one for each kernel; `make lab-bugs` does them all.

And how an answer is judged, which needs no lab.
"""

from pathlib import Path
from typing import Any

import pytest
from lab.kvmbuild import KERNELS_WITH_SOURCE

from live.bugs import Row, Truth, answer, judge, rows, table, truth_of

LEAK = Row("6.12", "leak-per-fault", "prime-guest", ("balance", "growth"))
RIGHT = Row("6.12", "unchanged", "ttm-guest", (), counted=False, explained_by="refused")
TRUTH = Truth(2, frozenset({16, 17}))


def finding(detector: str = "balance", verdict: str = "definite", **more: Any) -> dict[str, Any]:
    said = {"count": 2, "pages": 2, "pfns": [[16, 17]], "evidence": [{"kind": "FAULT"}]}
    return {"detector": detector, "verdict": verdict, **said, **more}


# What is not as it must be


@pytest.mark.parametrize(
    ("findings", "truth", "why"),
    [
        ([], TRUTH, "not found by balance or growth"),
        ([finding("livelock")], TRUTH, "not found by balance or growth"),
        ([finding(verdict="inconclusive")], TRUTH, "not found by balance or growth"),
        ([finding()], Truth(0, frozenset()), "it did not happen"),
        ([finding(pages=1)], TRUTH, "another number of pages"),
        ([finding(pfns=[[16, 16], [99, 99]])], TRUTH, "other pages"),
        ([finding(evidence=[])], TRUTH, "no evidence"),
    ],
)
def test_a_planted_bug_that_is_not_well_found(
    findings: list[dict[str, Any]], truth: Truth, why: str
) -> None:
    said = judge(LEAK, truth, {"findings": findings})
    assert (said.right, said.why) == (False, why)
    assert f"**{why}**" in table([said])


@pytest.mark.parametrize("verdict", ["definite", "probable", "inconclusive", "explained"])
def test_anything_said_of_a_kernel_that_is_right(verdict: str) -> None:
    said = judge(RIGHT, None, {"findings": [finding(verdict=verdict)]})
    assert not said.right and "nothing is wrong" in said.why


def test_a_refusal_that_nobody_explains() -> None:
    assert judge(RIGHT, None, {"findings": []}).why == "not explained by refused"


# What is


def test_the_right_detector_with_the_right_pages() -> None:
    # Given a second finding of the same bug that names fewer pages
    said = judge(LEAK, TRUTH, {"findings": [finding(), finding("growth", "probable", pages=1)]})
    assert said.right
    assert "balance definite 2, 2; growth probable 2, 1" in table([said])


def test_a_livelock_is_about_no_page() -> None:
    # Given a change that did not know the page either
    truth = truth_of("hits: 7\ngfn=0x0 pfn=0x0\n")
    livelock = Row("6.12", "end-lost", "prime-guest", ("livelock",))
    assert truth == Truth(7, frozenset())
    assert judge(livelock, truth, {"findings": [finding("livelock", pages=0, pfns=[])]}).right


def test_the_truth_is_what_the_changed_kvm_logged() -> None:
    text = "command: prime-guest\nevery: 50\nturns: 239\nhits: 3\n"
    text += "gfn=0x131 pfn=0x10\ngfn=0x163 pfn=0x11\ngfn=0x131 pfn=0x10\n"
    assert truth_of(text) == Truth(3, frozenset({0x10, 0x11}))


def test_a_refusal_explained() -> None:
    assert judge(RIGHT, None, {"findings": [finding("refused", "explained")]}).right


def test_rows_have_names_of_their_own_and_say_whether_the_model_must_follow() -> None:
    every = rows()
    assert len({row.name for row in every}) == len(every)
    assert {row.replays for row in every if row.kvm == "unchanged" and not row.note} == {True}
    leaks = [row for row in every if row.kvm.startswith("leak-")]
    # A put that leaves no record is missed by none
    unseen = [row for row in leaks if row.replays is None]
    assert [(row.kernel, row.kvm, bool(row.note)) for row in unseen] == [
        ("6.12", "leak-prefetch", True)
    ]
    assert {row.replays for row in leaks if row not in unseen} == {False}


@pytest.mark.lab
@pytest.mark.parametrize("kernel", KERNELS_WITH_SOURCE)
def test_a_rare_leak_is_found_on_exactly_its_pages(kernel: str, tmp_path: Path) -> None:
    # Given a KVM that keeps the reference of one fault in a thousand
    (row,) = [row for row in rows([kernel], ["leak-per-fault"]) if row.every == 1000]

    # When it runs a guest under the recorder
    said = answer(row, tmp_path)

    # Then the leak is found, on as many pages as KVM itself counted
    assert said.truth and said.truth.hits == 8
    assert said.right, said.why
    # And the model leaves the recording
    assert said.replayed_right, said.replay
