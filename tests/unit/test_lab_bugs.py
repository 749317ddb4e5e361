"""How `make lab-bugs` judges an answer: what must be called wrong first, then what is right."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lab import GuestLost
from live import bugs
from live.bugjudge import Truth, judge, judge_recording, judge_replay, truth_between, truth_of
from live.bugrows import Row, rows
from live.bugs import Answer, answer, script_of, table

LEAK = Row("7.3", "leak-per-fault", "prime-guest", ("balance", "growth"), ("use-after-free",))
LIVELOCK = Row(
    "7.3", "end-lost", "prime-guest", ("livelock",), repeats=True, leaves="INVALIDATE end"
)
RIGHT = Row("7.3", "unchanged", "prime-guest", (), counted=False)
REFUSED = Row("6.12", "unchanged", "ttm-guest", (), counted=False, explained_by="refused")
TRUTH = Truth(2, frozenset({16, 17}), frozenset({1, 2}), 16)
WHOLE = {"records": 9, "complete": True, "lost": 0, "missing": [], "unanswerable": []}
MADE = {"begun": 100.0, "ended": 200.0, "status": 0}
INFO = {"start_unix_ns": 150 * 10**9, "complete": True, "lost": 0, "records": 9}
SAID = "pfntrace: recorded 9 records (3 faults) of 1 VM in 0.4 s; ended by command\n"


def finding(detector: str = "balance", verdict: str = "definite", **more: Any) -> dict[str, Any]:
    """Return what check says of both planted pages."""
    pfns = more.setdefault("pfns", [[16, 17]])
    more.setdefault("pages", sum(last - first + 1 for first, last in pfns))
    said = {"count": 2, "evidence": [{"kind": "FAULT"}], "gfns": [], "more": False, "title": "t"}
    return {"detector": detector, "verdict": verdict, **said, **more}


def checked(*findings: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**WHOLE, "findings": list(findings), **more}


# Wrong: what is found


@pytest.mark.parametrize(
    ("findings", "why"),
    [
        ([], "not found by balance or growth"),
        ([finding("use-after-free")], "not found by balance or growth"),
        ([finding(pfns=[[16, 16]])], "of 2 pages 1 are named"),
        ([finding(count=9999)], "another count: it happened 2 times"),
        ([finding(count=1)], "another count: it happened 2 times"),
        ([finding(evidence=[])], "balance shows no evidence"),
        # Innocent pages: of the same finding, of a second one, of another detector
        ([finding(pfns=[[16, 18]])], "balance names other pages"),
        ([finding(), finding(pfns=[[900, 999]])], "balance names other pages"),
        ([finding(), finding("growth", pfns=[[1, 100]])], "growth names other pages"),
        (
            [finding(), finding("use-after-free", pfns=[[99, 99]])],
            "use-after-free names other pages",
        ),
        ([finding(), finding("use-after-free", evidence=[])], "use-after-free shows no evidence"),
        # Parts that overlap, or of different detectors
        ([finding(count=1), finding(pfns=[[17, 17]], count=1)], "another count"),
        ([finding(pfns=[[16, 16]]), finding("growth", pfns=[[17, 17]])], "of 2 pages 1 are named"),
        # Another detector, on the right pages
        ([finding(), finding("pins")], "pins has nothing to find"),
        ([finding(), finding("livelock", pfns=[])], "livelock has nothing to find"),
        # No pages, or others than counted
        ([finding(), finding(pfns=[])], "balance names no page"),
        ([finding(pfns=[], pages=2)], "balance names no page"),
        ([finding(pfns=[[16, 17]], pages=3)], "balance counts other pages than it names"),
        # Cut, and not by chance as many as it should be
        ([finding(pfns=[[16, 16]], pages=3, more=True)], "of 2 pages 3 are named"),
        # What is not sure is no answer, and no excuse for other pages
        ([finding(verdict="inconclusive")], "not found by balance or growth"),
        ([finding(), finding(verdict="inconclusive", pfns=[[9, 9]])], "balance names other pages"),
        ([finding(), finding("pins", "inconclusive")], "pins has nothing to find"),
        ([finding(), finding("refused", "explained")], "refused explains what did not happen"),
    ],
)
def test_a_planted_bug_that_is_not_well_found(findings: list[dict[str, Any]], why: str) -> None:
    assert judge(LEAK, TRUTH, checked(*findings)).startswith(why)


@pytest.mark.parametrize("findings", [[], [finding()]])
def test_without_truth_nothing_is_right(findings: list[dict[str, Any]]) -> None:
    assert judge(LEAK, None, checked(*findings)) == "what happened is not known"
    assert judge(LEAK, Truth(0, frozenset()), checked(*findings)) == "it did not happen"


def test_a_finding_without_a_page_is_no_answer_to_a_truth_without_one() -> None:
    # Given a change that happened and did not know its pages
    blind = Truth(5, frozenset())
    assert judge(LEAK, blind, checked(finding(pfns=[], count=5))) == "balance names no page"


def test_a_livelock_of_other_guest_pages() -> None:
    stuck = finding("livelock", pfns=[], count=70_000, gfns=[[1, 3]])
    assert judge(LIVELOCK, TRUTH, checked(stuck)) == "livelock names other guest pages"


def test_marks_of_free_pages_that_nobody_tells_from_others() -> None:
    late = replace(LEAK, found_by=("dead-mark",))
    truth = replace(TRUTH, freed=(1, frozenset({17})))
    alone = checked(finding("dead-mark"))
    assert judge(late, truth, alone) == "nobody says which 1 were free"
    other = checked(finding("dead-mark"), finding("dead-mark", pfns=[[16, 16]], count=1))
    assert judge(late, truth, other) == "nobody says which 1 were free"


@pytest.mark.parametrize("verdict", ["definite", "probable", "inconclusive", "explained"])
def test_anything_said_of_a_kernel_that_is_right(verdict: str) -> None:
    for row in (RIGHT, REFUSED):
        assert judge(row, None, checked(finding(verdict=verdict)))


def test_a_refusal_that_nobody_explains() -> None:
    assert judge(REFUSED, None, checked()) == "not explained by refused"


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"records": 0}, "no records"),
        ({"complete": False}, "not all was recorded"),
        ({"lost": 1}, "not all was recorded"),
        ({"missing": ["gup"]}, "not all was recorded"),
        ({"unanswerable": [{"detector": "growth", "reason": "x"}]}, "growth did not answer"),
        # 6.12 has no such flag; 7.3 has
        (
            {"unanswerable": [{"detector": "refcounted-flag", "reason": "no such flag"}]},
            "refcounted-flag did not answer",
        ),
    ],
)
@pytest.mark.parametrize("row", [RIGHT, LEAK])
def test_a_trace_that_cannot_answer(row: Row, more: dict[str, Any], why: str) -> None:
    findings = [finding()] if row.found_by else []
    assert judge(row, TRUTH, checked(*findings, **more)) == why


# Wrong: the recording


@pytest.mark.parametrize(
    ("made", "info", "said", "why"),
    [
        ({"begun": 151.0}, {}, SAID, "the trace is not of this boot"),
        ({"ended": 149.0}, {}, SAID, "the trace is not of this boot"),
        ({}, {"records": 0}, SAID, "the trace is empty"),
        ({}, {"complete": False}, SAID, "not all was recorded"),
        ({}, {"lost": 3}, SAID, "not all was recorded"),
        ({"status": 1}, {}, SAID, "pfntrace record ended with status 1"),
        ({}, {}, "", "the recording did not end by itself"),
        ({}, {}, SAID.replace("command", "duration"), "the recording ended before the guest"),
        (
            {"status": 2},
            {},
            SAID + "pfntrace: the command exited with status 2\n",
            "the workload ended with status 2",
        ),
    ],
)
def test_a_recording_that_proves_nothing(
    made: dict[str, Any], info: dict[str, Any], said: str, why: str
) -> None:
    assert judge_recording(RIGHT, MADE | made, INFO | info, said) == why


def test_a_workload_that_did_not_fail_as_it_must() -> None:
    stopped = replace(LIVELOCK, status=(124,))
    assert judge_recording(stopped, MADE, INFO, SAID) == "the workload ended with status 0"


def test_a_guest_that_ended_too_soon() -> None:
    early = replace(RIGHT, early=True)
    assert judge_recording(early, MADE, INFO, SAID) == "the guest ended before it"
    cut = SAID.replace("command", "duration")
    assert judge_recording(early, MADE | {"workload": 1}, INFO, cut).endswith("with status 1")


def test_an_old_recording_is_gone_before_a_new_one_is_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given what an earlier run left, and a recorder that does not start
    folder = tmp_path / "row"
    folder.mkdir()
    for name in ("x.pfnt", "truth", "row.json", "said"):
        (folder / name).write_text("old")

    def lab(_command: object, *, out: Path, **_: object) -> Any:
        (out / "said").write_text("pfntrace: error: cannot attach\n")
        return type("Result", (), {"status": 1})

    monkeypatch.setattr(bugs, "run_in_lab", lab)
    # When it is recorded anew, then nothing old answers
    assert answer(LEAK, folder).why == "no trace: pfntrace: error: cannot attach"
    assert {path.name for path in folder.iterdir()} == {"said", "row.json"}


def test_a_guest_that_is_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lab(*_: object, **__: object) -> None:
        raise GuestLost("it hangs")

    monkeypatch.setattr(bugs, "run_in_lab", lab)
    assert answer(LEAK, tmp_path / "row").why == "guest lost: guest lost: it hangs"


def test_a_trace_without_the_word_of_its_boot(tmp_path: Path) -> None:
    (tmp_path / "x.pfnt").write_text("put there by hand")
    assert answer(LEAK, tmp_path, recheck=True).why == "no trace: not recorded"


# Wrong: the replay


def divergence(kind: str, *, expected: str = "1 put, not 0", **record: Any) -> dict[str, Any]:
    first = {"record": {"kind": kind, **record}, "expected": expected, "number": 4}
    said = {"records": 9, "explained": 3, "kernel": "6.13", "conforms": False}
    return {**said, "first_divergence": first}


CONFORMS = {"records": 9, "explained": 9, "kernel": "6.13", "conforms": True}


@pytest.mark.parametrize(
    ("row", "said", "words"),
    [
        (LEAK, CONFORMS, "conforms to 6.13"),
        (RIGHT, CONFORMS | {"records": 0}, "no records"),
        (RIGHT, divergence("FAULT", result="fixed", pfn=16), "where nothing is planted"),
        (LEAK, divergence("FAULT", result="fixed", pfn=99), "where nothing is planted"),
        (LEAK, divergence("INVALIDATE", op="end"), "where nothing is planted"),
        (LIVELOCK, divergence("INVALIDATE", op="start"), "where nothing is planted"),
        (LEAK, divergence("INVALIDATE", op="start", expected="a zap of pfn 0x63"), "nothing is"),
    ],
)
def test_a_replay_that_is_not_as_it_must_be(row: Row, said: dict[str, Any], words: str) -> None:
    told, right = judge_replay(row, TRUTH if row.counted else None, said)
    assert words in told and not right


# Right


@pytest.mark.parametrize(
    "findings",
    [
        [finding()],
        # Another finding of the same bug, or of what it leads to, on some of the pages
        [finding(), finding("growth", "probable", pfns=[[17, 17]], count=1)],
        [finding(), finding("use-after-free", pfns=[[16, 16]], count=7)],
        [finding(), finding("growth", "inconclusive", pfns=[[16, 16]], count=1)],
        # In parts, by one detector
        [finding(pfns=[[16, 16]], count=1), finding(pfns=[[17, 17]], count=1)],
    ],
)
def test_the_right_pages_as_often_as_it_happened(findings: list[dict[str, Any]]) -> None:
    assert judge(LEAK, TRUTH, checked(*findings)) == ""


def test_what_a_bug_leads_to_may_hurt_others_that_it_says_itself() -> None:
    truth = replace(TRUTH, victims=frozenset({18}))
    hurt = finding("use-after-free", pfns=[[18, 18]])
    assert judge(LEAK, truth, checked(finding(), hurt)) == ""
    # And nobody calls those leaked
    assert judge(LEAK, truth, checked(finding(), finding(pfns=[[18, 18]]))) != ""


def test_a_livelock_is_about_faults() -> None:
    stuck = finding("livelock", pfns=[], count=70_000, gfns=[[1, 1]])
    assert judge(LIVELOCK, Truth(7, frozenset()), checked(stuck)) == ""
    assert judge(replace(LIVELOCK, repeats=False), TRUTH, checked(stuck)) != ""


def test_marks_of_free_pages_are_told_apart() -> None:
    truth = replace(TRUTH, freed=(1, frozenset({17})))
    marks = finding("dead-mark"), finding("dead-mark", pfns=[[17, 17]], count=1, title="at 0")
    row = replace(LEAK, found_by=("dead-mark",))
    assert judge(row, truth, checked(*marks)) == ""
    # And in the table too
    line = table([Answer(row, truth, marks)])
    assert "dead-mark definite 2, 2 (t); dead-mark definite 1, 1 (at 0)" in line
    assert "| 2, 2; 1 of them, 1 when free |" in line


def test_a_refusal_explained_and_a_detector_that_has_nothing_to_look_at() -> None:
    silent = [{"detector": "refcounted-flag", "reason": "this kernel (G0b) has no such flag"}]
    said = checked(finding("refused", "explained"), unanswerable=silent)
    assert judge(REFUSED, None, said) == ""


def test_a_race_s_host_that_had_to_wait_may_be_explained() -> None:
    waited = finding("livelock", "explained", pfns=[])
    race = replace(RIGHT, workload="race-guest --gap 20")
    assert judge(race, None, checked(waited)) == ""
    # But not elsewhere, and not blamed on KVM
    assert judge(RIGHT, None, checked(waited)) == "livelock explains what did not happen"
    blamed = finding("livelock", "probable", pfns=[])
    assert judge(race, None, checked(blamed)) == "nothing is wrong, and livelock is probable"


def test_a_recording_of_this_boot() -> None:
    assert judge_recording(RIGHT, MADE, INFO, SAID) == ""
    failed = SAID + "pfntrace: the command exited with status 124\n"
    stopped = replace(LIVELOCK, status=(124,))
    assert judge_recording(stopped, MADE | {"status": 124}, INFO, failed) == ""


@pytest.mark.parametrize(
    ("row", "said", "words"),
    [
        (RIGHT, CONFORMS, "conforms to 6.13"),
        (LEAK, divergence("FAULT", result="fixed", pfn=16), "FAULT fixed, first planted page"),
        (LEAK, divergence("FAULT", result="fixed", pfn=17), "FAULT fixed, a planted page"),
        (LEAK, divergence("INVALIDATE", op="start", expected="a zap of pfn 0x10"), "first planted"),
        (LIVELOCK, divergence("INVALIDATE", op="end"), "INVALIDATE end, planted"),
    ],
)
def test_a_replay_as_it_must_be(row: Row, said: dict[str, Any], words: str) -> None:
    told, right = judge_replay(row, TRUTH, said)
    assert words in told and right


# The truth


def test_the_truth_is_what_the_changed_kvm_logged() -> None:
    text = "command: prime-guest\nevery: 50\nturns: 239\nhits: 3\n"
    text += "gfn=0x131 pfn=0x10\nfreed gfn=0x131 pfn=0x10\ngfn=0x163 pfn=0x11\n"
    text += "victim gfn=0x0 pfn=0x12\ngfn=0x0 pfn=0x0\n"
    truth = truth_of(text)
    assert truth.hits == 3
    assert set(truth.pfns) == {0x10, 0x11} and set(truth.gfns) == {0x131, 0x163}
    assert (truth.first_pfn, truth.freed[0]) == (0x10, 1)
    assert set(truth.victims) == {0x12} and set(truth.freed[1]) == {0x10}


def test_of_an_early_end_the_pages_shortly_before_and_after_are_the_bounds() -> None:
    # Given four times, of which two surely and three at most were before the end
    text = "hits: 4\n" + "".join(f"gfn=0x1 pfn={pfn:#x}\n" for pfn in (16, 17, 18, 19))
    truth = truth_between(text, 2, 3)
    early = replace(LEAK, early=True)
    # Then two and three are right, and one and four are not
    pages = {n: finding(pfns=[[16, 15 + n]], count=n) for n in (1, 2, 3, 4)}
    answers = {n: judge(early, truth, checked(item)) for n, item in pages.items()}
    assert answers[2] == answers[3] == "" and answers[1] and answers[4]
    assert "| 2 to 3, 2 to 3 |" in table([Answer(early, truth)])


def test_a_row_may_say_that_a_part_of_the_pages_is_enough() -> None:
    half = replace(LEAK, share=0.5)
    assert judge(half, TRUTH, checked(finding(pfns=[[16, 16]], count=1))) == ""
    assert judge(LEAK, TRUTH, checked(finding(pfns=[[16, 16]], count=1))) != ""
    assert judge(replace(LEAK, share=0.6), TRUTH, checked(finding(pfns=[[16, 16]], count=1))) != ""
    # But no other page, and the reader is told
    assert judge(half, TRUTH, checked(finding(pfns=[[16, 18]], count=1))) != ""
    assert all(row.note for row in rows() if row.share < 1)


def test_samples_around_the_end_bound_it() -> None:
    bounds = bugs._bounds  # the clock of samples has 10 ms
    samples = [["1.00", "3", "1.00"], ["1.50", "8", "1.50"], ["2.00", "9", "2.00"]]
    assert bounds(samples, 0.5, 1.51) == (3, 9)
    assert bounds(samples, 0.5, 1.6) == (8, 9)
    with pytest.raises(RuntimeError, match="nobody looked"):
        bounds(samples, 0.5, 2.1)


def test_what_the_workload_says_of_the_driver_s_pages(tmp_path: Path) -> None:
    (row,) = (row for row in rows(["7.3"], ["unchanged"]) if row.told)
    words = {"workload": "pages-guest", "pfn": 64, "ran": 3}
    (tmp_path / "said").write_text(f"pfntrace: x\n{json.dumps(words, separators=(',', ':'))}\n")
    truth = bugs.truth_in(row, tmp_path)
    assert truth is not None and truth.hits == 3 and set(truth.pfns) == {64, 65, 66}


# The rows


def test_rows_have_names_of_their_own_and_say_whether_the_model_must_follow() -> None:
    every = rows()
    assert len({row.name for row in every}) == len(every)
    assert {row.replays for row in every if row.kvm == "unchanged" and not row.told} == {True}
    leaks = [row for row in every if row.kvm.startswith("leak-")]
    # A put that leaves no record is missed by none
    unseen = [row for row in leaks if row.replays is None]
    assert [(row.kernel, row.kvm, bool(row.note)) for row in unseen] == [
        ("6.12", "leak-prefetch", True)
    ]
    assert {row.replays for row in leaks if row not in unseen} == {False}
    # What must be found is known to the change or to the workload
    assert all(row.counted or row.told for row in every if row.found_by)


def test_a_recording_that_ends_early_leaves_its_guest_alone() -> None:
    early = [row for row in rows() if row.early]
    assert {row.kvm for row in early} >= {"unchanged", "series-v9-as-mailed"}
    for row in early:
        assert "--duration" in script_of(row) and "trap" in script_of(row)
    assert "--duration" not in script_of(LEAK)
