"""install and gfn-outside: leaves without a fault-in, or in the wrong place; on all kernels."""

import numpy as np
import pytest
from unit.mapkit import GENERATIONS, MAPS, SANE, ask, only, page, reclaim
from unit.tracekit import NO_PFN

from analysis.check import check_trace
from analysis.checktext import check_lines
from probes import wire

NAME = "install"
NEVER = (1 << 32) - 1


@pytest.mark.parametrize("name", ["install", "gfn-outside"])
@pytest.mark.parametrize("path", SANE, ids=lambda path: path.stem)
def test_unchanged_kernels_are_not_accused(path, name):
    assert check_trace(path, [name]).findings == ()


def nobody(copy, one):
    copy["SPTE"]["h"]["fault_ts"][one.install] = 0
    copy["SPTE"]["cause"][one.install] = wire.CAUSES.index("other")


def no_record(copy, one):
    copy.drop("FAULT", np.arange(len(copy["FAULT"])) == one.fault)


def not_entered(copy, one):
    copy["FAULT"]["t_faultin"][one.fault] = copy["FAULT"]["t_faultin_end"][one.fault] = NEVER


def refused(copy, one):
    copy["FAULT"]["faultin_ret"][one.fault] = 1


def refused_with_an_error(copy, one):
    copy["FAULT"]["pfn"][one.fault] = 0x7FF << 52


def other_page(copy, one):
    copy["FAULT"]["pfn"][one.fault] += 1


def other_vm(copy, one):
    copy["SPTE"]["h"]["vm"][one.install] = 2


WRONG = [nobody, no_record, not_entered, refused, refused_with_an_error, other_page, other_vm]


@pytest.mark.parametrize(("kernel", "mmu"), MAPS)
@pytest.mark.parametrize("wrong", WRONG)
def test_an_install_that_no_fault_in_stands_behind(kernel, mmu, wrong, tmp_path):
    # Given a recording in which one page was installed against the rule
    copy = reclaim(kernel, mmu)
    one = page(copy)
    wrong(copy, one)
    # When it is checked
    finding = only(ask(copy, tmp_path, NAME))
    # Then that page is named, and its install is evidence
    probable = wrong in (nobody, no_record)
    assert finding.verdict == ("probable" if probable else "definite")
    assert (finding.count, finding.pages) == (1, 1)
    assert finding.pfns == ((one.pfn, one.pfn),) and finding.gfns == ((one.gfn, one.gfn),)
    shown = [row["ts"] for row in finding.evidence if row.get("op") == "install"]
    assert one.born in shown
    # And if records were lost, it is left open
    copy.lose("FAULT", 1)
    assert only(ask(copy, tmp_path, NAME)).verdict == "inconclusive"


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_fault_that_has_not_ended_yet(kernel, tmp_path):
    # Given the last fault of the recording's thread, of which no record is left
    copy = reclaim(kernel)
    last = int(np.argmax(copy["FAULT"]["h"]["ts"]))
    copy.drop("FAULT", np.arange(len(copy["FAULT"])) == last)
    assert ask(copy, tmp_path, NAME).findings == ()


def armed_in_a_fault(kernel, number=7):
    """Return what a recorder sees that was armed amid a fault of a guest that runs already."""
    copy = reclaim(kernel)
    one = page(copy, number)
    began = int(copy["FAULT"]["h"]["fault_ts"][one.fault])
    copy.drop("FAULT", np.arange(len(copy["FAULT"])) == one.fault)
    for kind in ("SPTE", "RELEASE"):
        copy[kind]["h"]["fault_ts"][copy[kind]["h"]["fault_ts"] == began] = 0
    first = copy["SPTE"]["h"]["ts"] == one.born
    copy["SPTE"]["cause"][first] = wire.CAUSES.index("other")
    slots = copy["SLOT"]  # which the next fault makes known
    slots["h"]["op"], slots["h"]["ts"] = wire.OPS.index("seen"), one.born + 1
    for kind in copy.records:
        copy.drop(kind, copy[kind]["h"]["ts"] < one.born)
    return copy, one


@pytest.mark.parametrize("kernel", GENERATIONS)
@pytest.mark.parametrize("rows_max", [1, 1 << 18])
def test_a_fault_that_was_under_way_when_the_recorder_was_armed(kernel, rows_max, tmp_path):
    # Given a VM that ran before, and as its first record a leaf of a fault that nobody saw begin
    copy, _ = armed_in_a_fault(kernel)
    # When everybody is asked, then nobody is accused
    assert ask(copy, tmp_path, rows_max=rows_max).findings == ()


@pytest.mark.parametrize("kernel", GENERATIONS)
@pytest.mark.parametrize("wrong", ["new VM", "elsewhere", "later"])
def test_what_no_fault_under_way_can_have_installed(kernel, wrong, tmp_path):
    # Given the same, but of a VM that was made in the recording; or the thread's second leaf, far
    # from the first; or one after another fault of the thread
    copy, one = armed_in_a_fault(kernel)
    if wrong == "new VM":
        copy.add("VM", h__ts=one.born - 1, h__op=wire.OPS.index("create"), h__vm=1)
    else:
        other = page(copy, 15)
        nobody(copy, other)
        if wrong == "elsewhere":
            copy["SPTE"]["h"]["ts"][other.install] = one.born + 10
    # Then it was nobody
    finding = only(ask(copy, tmp_path, NAME))
    assert (finding.verdict, finding.count) == ("probable", 1)
    assert "by nobody" in finding.title


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_fault_in_whose_return_was_missed_says_nothing(kernel, tmp_path):
    copy = reclaim(kernel)
    one = page(copy)
    copy["FAULT"]["t_faultin_end"][one.fault] = NEVER
    copy["FAULT"]["pfn"][one.fault] = NO_PFN
    assert ask(copy, tmp_path, NAME).findings == ()


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_leaf_over_a_page_table_needs_no_fault(kernel, tmp_path):
    # Given huge page recovery: a 2M leaf takes the place of a page table
    copy = reclaim(kernel)
    one = page(copy)
    which = np.arange(len(copy["SPTE"])) == one.install
    copy.again("SPTE", which, level=2, gfn=1 << 20, pfn=1 << 18, h__fault_ts=0,
               a=0x12345000 | 1 << 11 | 7, cause=wire.CAUSES.index("slot"))  # fmt: skip
    copy["SPTE"]["b"][-1] = (int(copy["SPTE"]["b"][-1]) & 0xFFF) | 1 << 7 | 1 << 30
    assert ask(copy, tmp_path, NAME).findings == ()


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_prefetch_maps_pages_of_its_own(kernel, tmp_path):
    copy = reclaim(kernel, "shadow")
    one = page(copy)
    which = np.arange(len(copy["SPTE"])) == one.install
    copy.again("SPTE", which, gfn=0x7777, pfn=0x8888, cause=wire.CAUSES.index("prefetch"),
               c=0xFFFF888000000000)  # fmt: skip
    assert ask(copy, tmp_path, NAME, "gfn-outside").findings == ()


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_large_leaf_maps_the_fault_s_page_at_its_place(kernel, tmp_path):
    copy = reclaim(kernel)
    one = page(copy)
    spte = copy["SPTE"]
    base_gfn, base_pfn = one.gfn >> 9 << 9, 1 << 18
    spte["level"][one.install], spte["gfn"][one.install] = 2, base_gfn
    spte["pfn"][one.install] = base_pfn
    copy["FAULT"]["pfn"][one.fault] = base_pfn + one.gfn - base_gfn
    assert ask(copy, tmp_path, NAME, "gfn-outside").findings == ()
    # One frame beside is another page.
    copy["FAULT"]["pfn"][one.fault] += 1
    assert "other pages" in only(ask(copy, tmp_path, NAME)).title


@pytest.mark.parametrize("rows_max", [1, 13])
def test_the_answer_does_not_depend_on_the_size_of_pieces(rows_max, tmp_path):
    copy = reclaim("6.12")
    no_record(copy, page(copy, 3))
    other_page(copy, page(copy, 11))
    whole, cut = ask(copy, tmp_path, NAME), ask(copy, tmp_path, NAME, rows_max=rows_max)
    assert [f.to_json() for f in whole.findings] == [f.to_json() for f in cut.findings]
    assert len(cut.findings) == 2


# --- gfn-outside ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "mmu"), MAPS)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_leaf_in_a_page_table_of_other_frames(kernel, mmu, lost, tmp_path):
    # Given a leaf that was set in the table of another guest frame
    copy = reclaim(kernel, mmu)
    one = page(copy)
    copy["SPTE"]["gfn"][one.install] += 512
    if lost:
        copy.lose("SPTE", lost)
    result = ask(copy, tmp_path, "gfn-outside", NAME)
    # Then that is what is wrong, and not the page
    finding = only(result)
    assert finding.detector == "gfn-outside"
    assert finding.verdict == ("inconclusive" if lost else "definite")
    assert finding.pfns == ((one.pfn, one.pfn),)
    assert {"FAULT", "SPTE"} <= {row["kind"] for row in finding.evidence}


# --- hooks that do not fire -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["install", "gfn-outside"])
def test_a_fault_handler_that_was_inlined_leaves_no_answer(name, tmp_path):
    # Given a kernel whose compiler inlined the handler: its hook is attached and never fires
    copy = reclaim("6.12")
    copy["FAULT"] = copy["FAULT"][:0]
    copy["SPTE"]["h"]["fault_ts"] = 0
    copy["SPTE"]["cause"][copy.ops("SPTE", "install")] = wire.CAUSES.index("other")
    result = ask(copy, tmp_path, name)
    assert result.findings == () and "never fired" in result.unanswerable[0].reason


@pytest.mark.parametrize("cause", ["other", "fault"])
def test_a_kernel_whose_faults_pass_all_hooks_by_is_not_called_healthy(cause, tmp_path):
    # Given a changed KVM that has the functions that are hooked, and calls others
    copy = reclaim("7.3")
    copy["FAULT"] = copy["FAULT"][:0]
    copy["SPTE"]["cause"][copy.ops("SPTE", "install")] = wire.CAUSES.index(cause)
    # When all detectors are asked
    result = check_trace(copy.write(tmp_path / "t.pfnt"))
    # Then each that needs faults says how many leaves came without
    reasons = {item.detector: item.reason for item in result.unanswerable}
    assert {"balance", "growth", "livelock", "refused", "install"} <= set(reasons)
    assert "23 leaves were installed" in reasons["balance"] == reasons["install"]
    # And a person reads it once
    lines = " ".join(line.strip() for line in check_lines(result))
    assert lines.count("hooks of the fault handler never fired") == 1


@pytest.mark.parametrize("how", ["lost", "filtered", "no install"])
def test_faults_that_are_missing_for_another_reason(how, tmp_path):
    copy = reclaim("7.3")
    copy["FAULT"] = copy["FAULT"][:0]
    if how == "lost":
        copy.lose("FAULT", 23)
    if how == "filtered":
        assert copy.summary is not None
        copy.summary["counts"]["FAULT"]["filtered"] = 23
    if how == "no install":
        copy.drop("SPTE", copy.ops("SPTE", "install"))
    result = check_trace(copy.write(tmp_path / "t.pfnt"))
    assert not [item for item in result.unanswerable if "were installed" in item.reason]


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_fault_handler_that_was_inlined_here_and_there_accuses_nobody(kernel, tmp_path):
    copy = reclaim(kernel)
    for number in range(5):
        one = page(copy, number)
        nobody(copy, one)
    finding = only(ask(copy, tmp_path, NAME))
    assert (finding.verdict, finding.count) == ("inconclusive", 5)
    assert any("inlined" in i.explanation and "not ruled" in i.ruled_out for i in finding.innocent)
