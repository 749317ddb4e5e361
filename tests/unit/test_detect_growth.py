"""Counts that rise with faults and pages that are never freed, from the smallest pieces of traces.

`series-v9-as-mailed-ttm-6.12` was recorded in the lab from version 9 of the series as mailed, on
Linux 6.12, while a guest was made five times over the pages of a graphics driver: KVM itself
counted ten kept references, five each on two pages.
"""

import numpy as np
import pandas as pd
import pytest
from unit.simkit import make
from unit.tracekit import SHIPPED, Copy, only, shipped, told

from analysis.check import check_trace

NAME = "growth"
DRIVER, CODE = 0x31980, 0x155DB


def driver_pages():
    return shipped("series-v9-as-mailed-ttm-6.12")


def counts(copy, pfn, fault_in, at_the_end=None):
    """Give the faults of a page other counts, in order of time."""
    rows = np.flatnonzero(copy["FAULT"]["pfn"] == pfn)
    rows = rows[np.argsort(copy["FAULT"]["h"]["ts"][rows])]
    copy["FAULT"]["page"]["refcount"][rows] = fault_in
    copy["FAULT"]["page_end"]["refcount"][rows] = at_the_end or fault_in


@pytest.mark.parametrize("name", ["ttm-6.1", "ttm-6.12", "ttm-7.3", "map-slots-tdp-6.12"])
def test_unchanged_kernels_are_not_accused(name):
    assert not told(SHIPPED / f"{name}.pfnt", NAME)


def test_five_faults_of_a_driver_s_page_that_each_keep_a_reference():
    # GIVEN the recording WHEN it is checked
    finding = only(told(SHIPPED / "series-v9-as-mailed-ttm-6.12.pfnt", NAME))
    # THEN the growth is told with each fault, on the pages and as often as KVM counted
    assert finding.verdict == "probable" and (finding.count, finding.pages) == (10, 2)
    assert "pfn 0x31980 rose by 4 in 5 faults, one with each, and never fell" in finding.title
    assert set(finding.pfns) == {(DRIVER, DRIVER), (CODE, CODE)}
    assert set(finding.gfns) == {(1, 1), (0x10000, 0x10000)} and finding.slots == (0, 1)
    assert finding.where == "/dev/dri/card0 (VM_PFNMAP, VM_IO)"
    # AND the evidence shows it, fault by fault
    rows = [row for row in finding.evidence if row["kind"] == "FAULT"]
    assert [row["refcount_end"] for row in rows] == sorted({row["refcount_end"] for row in rows})


@pytest.mark.parametrize("rows_max", [3, 17, 100])
def test_the_answer_does_not_depend_on_the_size_of_pieces(rows_max):
    path = SHIPPED / "series-v9-as-mailed-ttm-6.12.pfnt"
    small, whole = (only(told(path, NAME, rows_max=rows)) for rows in (rows_max, 10**6))
    assert (small.title, small.count, small.pfns) == (whole.title, whole.count, whole.pfns)


@pytest.mark.parametrize(
    "sane",
    [
        ([2, 2, 2, 2, 2], [1, 1, 1, 1, 1]),
        ([2, 3, 4, 4, 5], None),
        ([2, 3, 5, 6, 7], None),
        ([2, 3, 4, 3, 4], None),
        ([2, 3, 4, 5, 6], [1, 2, 3, 4, 5]),
    ],
    ids=["stays", "once not", "once two", "falls", "KVM's own is given back"],
)
def test_a_count_that_once_goes_another_way_is_somebody_else_s(sane, tmp_path):
    copy = driver_pages()
    counts(copy, DRIVER, *sane)
    assert not told(copy.write(tmp_path / "t.pfnt"), NAME)


def test_three_faults_could_be_chance(tmp_path):
    copy = driver_pages()
    late = np.sort(copy["FAULT"]["h"]["ts"][copy["FAULT"]["pfn"] == DRIVER])[3]
    copy.drop("FAULT", copy["FAULT"]["h"]["ts"] >= late)
    assert not told(copy.write(tmp_path / "t.pfnt"), NAME)


def test_the_same_few_faults_of_memory_on_lru_lists_prove_nothing(tmp_path):
    # GIVEN the same counts, of pages that get_user_pages() found
    copy = driver_pages()
    copy["FAULT"]["walk_pfn"] = (1 << 64) - 1
    # THEN the queues of the LRU can hold as many references
    assert not told(copy.write(tmp_path / "t.pfnt"), NAME)


def test_other_pages_of_drivers_that_do_not_rise_speak_for_their_driver(tmp_path):
    # GIVEN that of several pages of drivers the count of one rises
    copy = driver_pages()
    rows = copy["FAULT"][copy["FAULT"]["pfn"] == DRIVER].copy()
    rows["pfn"] = rows["walk_pfn"] = 0x77777
    rows["page"]["refcount"], rows["page_end"]["refcount"] = 2, 1
    rows["h"]["seq"] |= np.uint32(1 << 31)
    copy["FAULT"] = np.concatenate([copy["FAULT"], rows])
    assert not told(copy.write(tmp_path / "t.pfnt"), NAME)


def test_a_page_that_was_freed_and_handed_out_again_begins_anew(tmp_path):
    copy = driver_pages()
    ts = np.sort(copy["FAULT"]["h"]["ts"][copy["FAULT"]["pfn"] == DRIVER])
    copy.add("PAGE_FREE", h__ts=ts[2] - 1, h__vm=1, pfn=DRIVER)
    assert not told(copy.write(tmp_path / "t.pfnt"), NAME)


@pytest.mark.parametrize("mmu", ["tdp", "shadow"])
def test_a_count_that_rises_with_some_faults_and_never_falls_is_told_as_open(mmu, tmp_path):
    # GIVEN a kernel whose puts have no record, and that forgets seven of ten of the zero page's
    made = make(tmp_path, kernel="v10", scenario="idle", mmu=mmu, vcpus=4, mem_bytes=4 << 20,
                bugs=("zero_page_growth=0.7",), seed=2)  # fmt: skip
    # THEN it is not passed over, and nobody is accused: others may take references to that page
    (finding,) = check_trace(made.path, [NAME]).findings
    assert finding.verdict == "inconclusive" and finding.pages == 1
    assert "and never fell" in finding.title
    assert finding.innocent[0].ruled_out.startswith("not ruled out: the count rose by 0.")


# --- pages that are never freed -------------------------------------------------------------------


@pytest.mark.parametrize("rows_max", [53, 10**6])
def test_a_leak_of_prefetch_is_counted_page_by_page(rows_max):
    # GIVEN prefetched pages whose put is missing; of some the frame had another life before, and
    # some were in an LRU batch too when they were let go
    path = SHIPPED / "leak-prefetch-6.12.pfnt"
    finding = only(told(path, NAME, rows_max=rows_max))
    # THEN all are found that KVM itself counted, and the function that prefetches is named
    assert (finding.count, finding.pages) == (406, 406)
    assert finding.title.startswith("406 prefetched pages were let go but never freed")
    assert finding.functions == ("direct_pte_prefetch_many",)
    assert "14 of the pages have one reference more" in finding.innocent[0].ruled_out


def test_pages_in_lru_batches_alone_are_no_leak(tmp_path):
    # GIVEN a sane kernel, and pages that the batches of the LRU hold when KVM lets them go
    copy = shipped("prime-6.12")
    zaps = copy.ops("SPTE", "zap")
    copy["SPTE"]["page"]["refcount"][zaps] = 2
    copy["SPTE"]["page"]["mapcount"][zaps] = 0
    assert not told(copy.write(tmp_path / "t.pfnt"), NAME)


def few_leaks(tmp_path, **knobs):
    """Return a copy of a simulated version 10 of the series; nothing shows its puts."""
    made = make(tmp_path, kernel="v10", scenario="demand", mem_bytes=4 << 20, **knobs)
    return Copy.of(made.outcome.trace), made


def keep(copy, pfns):
    """Let go pages with one reference left, and never free them."""
    zaps = copy.ops("SPTE", "zap") & np.isin(copy["SPTE"]["pfn"], pfns)
    copy["SPTE"]["page"]["refcount"][zaps] = copy["SPTE"]["page"]["mapcount"][zaps] + 2
    assert copy.drop("PAGE_FREE", np.isin(copy["PAGE_FREE"]["pfn"], pfns)) == len(pfns)


def test_a_few_leaks_that_no_record_shows_are_too_old_for_lru_batches(tmp_path):
    # GIVEN a kernel whose puts have no record and that forgets one in twenty
    copy, made = few_leaks(tmp_path, bugs=("missing_put",))
    path = copy.write(tmp_path / "t.pfnt")
    # THEN its pages are found by what became of the others on their cpu
    finding = only(told(path, NAME))
    planted = pd.read_parquet(made.outcome.truth["bugs"])
    assert (finding.verdict, finding.pages) == ("probable", planted["pfn"].nunique())
    assert "each was followed on its cpu by 93 new pages" in finding.innocent[0].ruled_out
    # AND pieces of any length say the same
    assert only(told(path, NAME, rows_max=200)).pages == finding.pages


def test_what_lies_between_two_frees_of_a_page_is_over(tmp_path):
    # GIVEN pages that were freed, handed out, let go and freed again within one piece of the trace
    made = make(tmp_path, kernel="v7", scenario="nested", mmu="tdp", bugs=("missing_put",),
                vcpus=2, mem_bytes=8 << 20, faults=1500, seed=2076047)  # fmt: skip
    freed = pd.DataFrame(made.rows("PAGE_FREE")).groupby("pfn")["ts"].max()
    sptes = pd.DataFrame(made.rows("SPTE"))
    zapped = sptes[sptes["op"] == "zap"].groupby("pfn")["ts"].max()
    over = set(freed.index[freed > zapped.reindex(freed.index)])
    # THEN none of them is said never to have been freed
    finding = only(told(made.path, NAME))
    named = {pfn for first, last in finding.pfns for pfn in range(first, last + 1)}
    assert named and over and not named & over


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_page_on_no_lru_list_is_held_by_a_batch_and_not_by_kvm(seed, tmp_path):
    # GIVEN faults that forget one put in twenty, and pages that a thread of the VMM has touched
    # first: they wait in the batch of a cpu that nothing drains (once five of them were named)
    made = make(tmp_path, kernel="v7", scenario="pfncache", mmu="shadow", vcpus=2,
                bugs=("missing_put_shadow",), mem_bytes=8 << 20, seed=seed)  # fmt: skip
    # THEN only pages are named whose references were not given back
    finding = only(told(made.path, NAME))
    named = {pfn for first, last in finding.pfns for pfn in range(first, last + 1)}
    assert named <= {row["pfn"] for row in made.truth("bugs")} and len(named) > 40


@pytest.mark.parametrize("newest", [True, False], ids=["newest", "of a quiet cpu"])
def test_pages_in_lru_batches_at_the_end_are_not_old(newest, tmp_path):
    # GIVEN a sane kernel, and 31 pages that a batch holds: the newest ones of a cpu that is at
    # work, or some of a cpu that met no other page since
    copy, _ = few_leaks(tmp_path)
    faults = copy["FAULT"][np.argsort(copy["FAULT"]["h"]["ts"])]
    pages = faults["pfn"][-31:] if newest else faults["pfn"][100:131]
    keep(copy, pages)
    if not newest:
        copy["FAULT"]["h"]["cpu"][np.isin(copy["FAULT"]["pfn"], pages)] = 7
    assert not told(copy.write(tmp_path / "t.pfnt"), NAME)


def test_where_puts_have_records_they_decide(tmp_path):
    # GIVEN the same few pages on a kernel whose every put was recorded
    made = make(tmp_path, kernel="6.12", scenario="demand", mem_bytes=4 << 20)
    copy = Copy.of(made.outcome.trace)
    keep(copy, np.unique(copy["FAULT"]["pfn"])[::20])
    assert not told(copy.write(tmp_path / "t.pfnt"), NAME)


def test_the_slot_and_guest_frames_are_named():
    finding = only(told(SHIPPED / "leak-prefetch-6.12.pfnt", NAME))
    assert finding.slots == (0,) and finding.gfns[0] == (0x101, 0x107)


def test_a_slot_note_of_nonsense_names_no_mapping(tmp_path):
    copy = driver_pages()
    slots = [{"vm": 1, "gfn": "a", "npages": None, "hva": -1}, {"vm": 1}, 7, None]
    copy.notes = [(1, {"slot": slot, "vmas": []}) for slot in slots]
    finding = only(told(copy.write(tmp_path / "t.pfnt"), NAME))
    assert finding.where == ""


def test_a_check_of_the_same_trace_twice_says_the_same():
    path = SHIPPED / "leak-prefetch-6.12.pfnt"
    first, second = (check_trace(path, [NAME]).findings[0].to_json() for _ in range(2))
    assert first == second
