"""stale-slot: leaves of memslots that are gone, on all three kernels."""

import numpy as np
import pytest
from unit.mapkit import GENERATIONS, MAPS, SANE, ask, only, page, reclaim
from unit.tracekit import SHIPPED, Copy

from analysis.check import check_trace
from probes import wire

NAME = "stale-slot"


def take_slot_away(copy, ts, op="delete", **fields):
    """Let the only slot be deleted or moved at a time."""
    row = np.zeros(len(copy["SLOT"]), bool)
    row[0] = True
    copy.again("SLOT", row, h__ts=ts, h__op=wire.OPS.index(op), **fields)


@pytest.mark.parametrize("path", SANE, ids=lambda path: path.stem)
def test_unchanged_kernels_are_not_accused(path):
    assert check_trace(path, [NAME]).findings == ()


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_slots_that_come_and_go_leave_nothing(kernel):
    # Given the recording of twenty slots that are removed, it is not silent for want of them
    copy = Copy.of(SHIPPED / f"map-slots-tdp-{kernel}.pfnt")
    assert copy.ops("SLOT", "delete").sum() > 20
    assert (copy.ops("SPTE", "zap") & copy.causes("slot")).sum() > 50


@pytest.mark.parametrize(("kernel", "mmu"), MAPS)
def test_leaves_that_are_left_of_a_deleted_slot(kernel, mmu, tmp_path):
    # Given a slot that is deleted while one of its pages has not been zapped yet
    copy = reclaim(kernel, mmu)
    pages = [page(copy, number) for number in range(23)]
    ends = sorted(one.died for one in pages)
    take_slot_away(copy, ends[-2] + 1)
    left = next(one for one in pages if one.died == ends[-1])
    # When it is checked
    finding = only(ask(copy, tmp_path, NAME))
    # Then that page is named, and the slot's record is evidence
    assert (finding.verdict, finding.count, finding.pages) == ("definite", 1, 1)
    assert finding.gfns == ((left.gfn, left.gfn),) and finding.pfns == ((left.pfn, left.pfn),)
    assert finding.slots == (0,)
    chain = [(row["kind"], row.get("op")) for row in finding.evidence]
    wanted = [("SPTE", "install"), ("SLOT", "delete"), ("SPTE", "zap")]
    assert [step for step in chain if step in wanted] == wanted


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_leaves_that_are_left_of_a_moved_slot(kernel, tmp_path):
    copy = reclaim(kernel)
    pages = [page(copy, number) for number in range(23)]
    middle = (max(one.born for one in pages) + min(one.died for one in pages)) // 2
    take_slot_away(copy, middle, "move", gfn=1 << 24)
    finding = only(ask(copy, tmp_path, NAME))
    assert (finding.verdict, finding.count) == ("definite", 23)
    assert finding.gfns == ((pages[0].gfn, pages[-1].gfn),)


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_loss_leaves_it_open(kernel, tmp_path):
    copy = reclaim(kernel)
    pages = [page(copy, number) for number in range(23)]
    take_slot_away(copy, min(one.died for one in pages) - 1)
    copy.lose("SPTE", 40)
    finding = only(ask(copy, tmp_path, NAME))
    assert (finding.verdict, finding.count) == ("inconclusive", 23)


@pytest.mark.parametrize(("kernel", "mmu"), MAPS)
def test_an_install_by_a_fault_with_the_old_slot(kernel, mmu, tmp_path):
    # Given a slot that is deleted right before one of its pages is installed
    copy = reclaim(kernel, mmu)
    pages = [page(copy, number) for number in range(23)]
    last = max(pages, key=lambda one: one.born)
    take_slot_away(copy, last.born - 1)
    for one in pages:  # the others are zapped in time
        if one is not last:
            copy["SPTE"]["h"]["ts"][one.zap] = last.born - 2
            changed = (copy["SPTE"]["gfn"] == one.gfn) & copy.ops("SPTE", "change")
            copy["SPTE"]["h"]["ts"][changed] = one.born + 1
    finding = only(ask(copy, tmp_path, NAME))
    assert (finding.verdict, finding.count, finding.pages) == ("definite", 1, 1)
    assert finding.gfns == ((last.gfn, last.gfn),)
    assert "no memslot" in finding.title
    assert {"FAULT", "SPTE"} <= {row["kind"] for row in finding.evidence}


@pytest.mark.parametrize("kernel", GENERATIONS)
@pytest.mark.parametrize("lost", ["SLOT", "SPTE"])
def test_a_lost_slot_explains_installs_outside_of_all(kernel, lost, tmp_path):
    copy = reclaim(kernel)
    copy.drop("SLOT", copy.ops("SLOT", "create"))
    assert only(ask(copy, tmp_path, NAME)).verdict == "definite"
    copy.lose(lost, 1)
    assert only(ask(copy, tmp_path, NAME)).verdict == "inconclusive"


def test_prefetch_in_a_vm_older_than_the_recording_may_be_in_a_slot_nobody_saw(tmp_path):
    copy = reclaim("6.12", "shadow")
    copy.drop("SLOT", copy.ops("SLOT", "create"))
    copy.drop("VM", copy.ops("VM", "create"))
    copy["SPTE"]["cause"][copy.ops("SPTE", "install")] = wire.CAUSES.index("prefetch")
    assert ask(copy, tmp_path, NAME).findings == ()


@pytest.mark.parametrize("rows_max", [1, 13, 60])
def test_the_answer_does_not_depend_on_the_size_of_pieces(rows_max, tmp_path):
    copy = reclaim("7.3")
    pages = [page(copy, number) for number in range(23)]
    take_slot_away(copy, sorted(one.died for one in pages)[10] + 1)
    whole, cut = ask(copy, tmp_path, NAME), ask(copy, tmp_path, NAME, rows_max=rows_max)
    assert [f.to_json() for f in whole.findings] == [f.to_json() for f in cut.findings]
    assert only(cut).count == 12


@pytest.mark.parametrize("rows_max", [1, 2, 5])
def test_installs_in_no_slot_are_found_in_small_pieces_too(rows_max, tmp_path):
    # Given pieces of which the first record is such an install (once that was taken for none)
    copy = reclaim("6.12")
    copy.drop("SLOT", copy.ops("SLOT", "create"))
    assert only(ask(copy, tmp_path, NAME, rows_max=rows_max)).count == 23


def test_without_slot_records_there_is_no_answer(tmp_path):
    copy = reclaim("6.12")
    copy.unhook("commit_slot")
    result = ask(copy, tmp_path, NAME)
    assert result.findings == () and "commit_slot" in result.unanswerable[0].reason
