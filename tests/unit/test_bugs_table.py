"""The table of planted bugs: what counts as right is decided here, before any kernel boots."""

import dataclasses

import pytest
from live.bugs import Row, Truth, judge, rows, table, truth_of

LEAK = Row("6.12", "leak-per-fault", "prime-guest", ("balance", "growth"))
SANE = Row("6.12", "unchanged", "prime-guest", (), counted=False)
THREE = Truth(3, frozenset({1, 2, 3}))


def _answer(*findings: tuple[str, str, int, int]) -> dict[str, object]:
    names = ("detector", "verdict", "count", "pages")
    return {"findings": [dict(zip(names, finding, strict=True)) for finding in findings]}


@pytest.mark.parametrize(
    ("findings", "why"),
    [
        ([], "not found by balance or growth"),
        ([("balance", "inconclusive", 3, 3)], "not found by balance or growth"),
        ([("livelock", "definite", 3, 3)], "not found by balance or growth"),
        ([("balance", "definite", 2, 2)], "another number of pages"),
        ([("balance", "definite", 3, 3)], ""),
        ([("balance", "definite", 2, 2), ("growth", "probable", 3, 3)], ""),
        ([("balance", "definite", 3, 0)], ""),
    ],
)
def test_a_planted_bug_must_be_found_by_the_right_detector_with_its_pages(
    findings: list[tuple[str, str, int, int]], why: str
) -> None:
    # Given a bug that happened on three pages, when check says so much
    answer = judge(LEAK, THREE, _answer(*findings))

    # Then the row is right, or says why not
    assert (answer.right, answer.why) == (not why, why)


def test_a_bug_that_did_not_happen_proves_nothing() -> None:
    answer = judge(LEAK, Truth(0, frozenset()), _answer(("balance", "definite", 3, 3)))
    assert answer.why == "it did not happen"


def test_a_sane_kernel_must_not_be_accused() -> None:
    assert judge(SANE, None, _answer(("livelock", "explained", 9, 0))).right
    accused = judge(SANE, None, _answer(("balance", "probable", 1, 1)))
    assert accused.why == "nothing is wrong, and something was found"


def test_the_truth_is_what_the_changed_kvm_logged() -> None:
    text = "command: prime-guest\nevery: 50\nturns: 239\nhits: 3\n"
    text += "gfn=0x131 pfn=0x10\ngfn=0x163 pfn=0x11\ngfn=0x131 pfn=0x10\n"
    assert truth_of(text) == Truth(3, frozenset({0x10, 0x11}))


def test_every_change_has_a_row_on_each_of_its_kernels_under_a_name_of_its_own() -> None:
    everything = rows()
    assert {(row.kernel, row.kvm) for row in everything} > {
        ("6.12", "double-put"),
        ("7.3", "double-put"),
        ("6.12", "series-v9"),
    }
    names = [row.name for row in everything]
    assert len(set(names)) == len(names)
    assert {row.kernel for row in rows(["7.3"], ["double-put"])} == {"7.3"}


def test_the_table_says_what_happened_and_what_was_found() -> None:
    found = judge(LEAK, THREE, _answer(("balance", "definite", 3, 3)))
    missed = judge(dataclasses.replace(LEAK, npt="off"), THREE, _answer())
    lines = table([found, missed]).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|")
    assert "| TDP | `prime-guest` | 3, 3 | balance definite 3, 3 | right |" in lines[2]
    assert "| shadow |" in lines[3] and lines[3].endswith("| not found by balance or growth |")
