"""invalidation: an SPTE that survives the invalidation of its range, on all three kernels."""

import numpy as np
import pytest
from unit.mapkit import GENERATIONS, MAPS, SANE, ask, only, page, reclaim
from unit.tracekit import SHIPPED

from analysis.check import check_trace
from analysis.detectors.common import CLOCKS_NS
from probes import wire

NAME = "invalidation"


def skip_zap(copy, *pages):
    """Let the kernel forget the zaps of some pages."""
    copy.drop("SPTE", np.isin(np.arange(len(copy["SPTE"])), [one.zap for one in pages]))


def invalidate(copy, op, ts, first, end, tid=5):
    """Add one end of an invalidation of the addresses [first, end)."""
    fields = {"h__op": wire.OPS.index(op), "h__ts": ts, "h__vm": 1, "h__tid": tid}
    copy.add("INVALIDATE", **fields, a=first, b=end)


@pytest.mark.parametrize("path", SANE, ids=lambda path: path.stem)
def test_unchanged_kernels_are_not_accused(path):
    assert check_trace(path, [NAME]).findings == ()


@pytest.mark.parametrize("kernel", ["6.12", "7.3"])
def test_a_kvm_that_forgets_zaps_is_found_out(kernel):
    finding = only(check_trace(SHIPPED / f"map-zap-skipped-{kernel}.pfnt", [NAME]))
    assert (finding.verdict, finding.count, finding.pages) == ("definite", 4, 4)
    assert [low for low, _ in finding.gfns] == [0x13C, 0x163, 0x1A0, 0x1C7]


@pytest.mark.parametrize(("kernel", "mmu"), MAPS)
def test_one_page_whose_zap_was_skipped(kernel, mmu, tmp_path):
    # Given a recording in which one page is not zapped by the invalidation of its address
    copy = reclaim(kernel, mmu)
    one = page(copy)
    skip_zap(copy, one)
    # When it is checked
    finding = only(ask(copy, tmp_path, NAME))
    # Then that page is named, and both ends of the invalidation are evidence
    assert (finding.verdict, finding.count, finding.pages) == ("definite", 1, 1)
    assert finding.gfns == ((one.gfn, one.gfn),) and finding.pfns == ((one.pfn, one.pfn),)
    chain = [(row["kind"], row.get("op")) for row in finding.evidence]
    wanted = [
        ("SPTE", "install"), ("INVALIDATE", "start"), ("INVALIDATE", "end"), ("PAGE_FREE", None),
    ]  # fmt: skip
    assert [step for step in chain if step in wanted] == wanted
    ranges = [row for row in finding.evidence if row["kind"] == "INVALIDATE"]
    assert {row["hva"] for row in ranges} == {int(copy["INVALIDATE"]["a"][one.start])}
    assert all(innocent.ruled_out.startswith("no") for innocent in finding.innocent)


@pytest.mark.parametrize("kernel", GENERATIONS)
@pytest.mark.parametrize("event", wire.INVALIDATE_EVENTS)
def test_every_kind_of_invalidation_must_zap(kernel, event, tmp_path):
    copy = reclaim(kernel)
    one = page(copy)
    skip_zap(copy, one)
    copy["INVALIDATE"]["cause"][[one.start, one.end]] = wire.INVALIDATE_EVENTS.index(event)
    assert only(ask(copy, tmp_path, NAME)).verdict == "definite"


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_loss_leaves_it_open(kernel, tmp_path):
    copy = reclaim(kernel)
    skip_zap(copy, page(copy))
    copy.lose("SPTE", 1)
    finding = only(ask(copy, tmp_path, NAME))
    assert finding.verdict == "inconclusive"
    assert finding.innocent[0].ruled_out == "not ruled out"


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_fault_may_map_again_when_the_invalidation_is_over(kernel, tmp_path):
    # Given a page that is mapped anew after the invalidation, and stays mapped
    copy = reclaim(kernel)
    one = page(copy)
    row = np.arange(len(copy["SPTE"])) == one.install
    copy.again("SPTE", row, h__ts=one.ends + 1000, h__fault_ts=0)
    assert ask(copy, tmp_path, NAME).findings == ()


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_mapping_made_in_the_end_s_own_return_is_allowed(kernel, tmp_path):
    copy = reclaim(kernel)
    one = page(copy)
    row = np.arange(len(copy["SPTE"])) == one.install
    copy.again("SPTE", row, h__ts=one.ends - 1, h__fault_ts=0)
    assert ask(copy, tmp_path, NAME).findings == ()


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_large_range_covers_all_its_pages(kernel, tmp_path):
    # Given an invalidation of a GiB around all pages, early, that zapped none of them
    copy = reclaim(kernel)
    pages = [page(copy, number) for number in range(23)]
    born, hva = max(one.born for one in pages), int(copy["FAULT"]["hva"][pages[0].fault])
    for op, ts in (("start", born + CLOCKS_NS), ("end", born + CLOCKS_NS + 10)):
        invalidate(copy, op, ts, hva - (1 << 29), hva + (1 << 29))
    finding = only(ask(copy, tmp_path, NAME))
    assert (finding.count, finding.pages) == (23, 23)
    assert finding.gfns == ((pages[0].gfn, pages[-1].gfn),)


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_what_is_beside_the_range_may_stay(kernel, tmp_path):
    copy = reclaim(kernel)
    one, after = page(copy, 4), page(copy, 5)
    hva = int(copy["FAULT"]["hva"][one.fault])
    late = max(one.born, after.born)
    for op, ts in (("start", late + 10), ("end", late + 20)):
        invalidate(copy, op, ts, hva + 1, hva + 2)
    # A range inside of one page covers that page, and no other.
    assert only(ask(copy, tmp_path, NAME)).gfns == ((one.gfn, one.gfn),)


def test_an_invalidation_of_another_process_covers_nothing(tmp_path):
    copy = reclaim("6.12")
    one = page(copy)
    skip_zap(copy, one)
    copy["INVALIDATE"]["h"]["vm"][[one.start, one.end]] = 2
    assert ask(copy, tmp_path, NAME).findings == ()


def test_an_invalidation_that_has_not_ended_says_nothing(tmp_path):
    copy = reclaim("6.12")
    one = page(copy)
    skip_zap(copy, one)
    copy.drop("INVALIDATE", np.arange(len(copy["INVALIDATE"])) == one.end)
    assert ask(copy, tmp_path, NAME).findings == ()


def test_invalidations_of_two_threads_are_told_apart(tmp_path):
    # Given two threads that invalidate one range: one ends before the other's start returns
    copy = reclaim("6.12")
    one = page(copy)
    late = one.born + 1000
    hva = int(copy["FAULT"]["hva"][one.fault])
    for op, ts, tid in (("start", one.born - 50, 5), ("end", late, 5), ("start", late + 5, 6)):
        invalidate(copy, op, ts, hva, hva + 4096, tid)
    # The page was mapped between the first start and its end, so neither is whole for it.
    assert ask(copy, tmp_path, NAME).findings == ()


def test_a_moved_slot_lies_elsewhere(tmp_path):
    # Given a slot that moved away before the invalidation, and a page of its old place
    copy = reclaim("6.12")
    one = page(copy)
    skip_zap(copy, one)
    row = np.zeros(len(copy["SLOT"]), bool)
    row[0] = True
    slot = copy["SLOT"][0]
    copy.again("SLOT", row, h__ts=one.starts - 10, h__op=wire.OPS.index("move"),
               gfn=int(slot["gfn"]) + (1 << 20))  # fmt: skip
    assert ask(copy, tmp_path, NAME).findings == ()


def test_memory_of_guest_memfd_is_not_subject_to_notifiers(tmp_path):
    copy = reclaim("7.3")
    skip_zap(copy, page(copy))
    copy["SLOT"]["c"] = 1 << 2
    assert ask(copy, tmp_path, NAME).findings == ()


@pytest.mark.parametrize("rows_max", [1, 13, 60])
def test_the_answer_does_not_depend_on_the_size_of_pieces(rows_max, tmp_path):
    copy = reclaim("6.1", "shadow")
    skip_zap(copy, page(copy, 3), page(copy, 11))
    whole, cut = ask(copy, tmp_path, NAME), ask(copy, tmp_path, NAME, rows_max=rows_max)
    assert [f.to_json() for f in whole.findings] == [f.to_json() for f in cut.findings]
    assert only(cut).count == 2


@pytest.mark.parametrize("hook", ["invalidate_start", "invalidate_end"])
def test_without_both_ends_there_is_no_answer(hook, tmp_path):
    copy = reclaim("6.12")
    copy.unhook(hook)
    result = ask(copy, tmp_path, NAME)
    assert result.findings == () and hook in result.unanswerable[0].reason


@pytest.mark.parametrize("nearer", [0, 1])
def test_a_leaf_that_another_cpu_made_just_before_may_have_come_just_after(nearer, tmp_path):
    # Given an invalidation that another cpu wrote so soon after a leaf, or a nanosecond later
    copy = reclaim("6.12")
    one = page(copy, 4)
    hva = int(copy["FAULT"]["hva"][one.fault])
    cpu = int(copy["SPTE"]["h"]["cpu"][copy["SPTE"]["h"]["ts"] == one.born][0])
    since = one.born + CLOCKS_NS - nearer
    for op, ts in (("start", since), ("end", since + 10)):
        invalidate(copy, op, ts, hva, hva + 4096)
    copy["INVALIDATE"]["h"]["cpu"][-2:] = cpu ^ 1
    copy["INVALIDATE"]["h"]["seq"][-2:] = 0, 1
    # Then nobody is accused if their clocks could have it so
    finding = only(ask(copy, tmp_path, NAME))
    assert finding.verdict == ("inconclusive" if nearer else "definite")
