"""Leaks, underflows and wrong puts as traces show them, and the sane kernels that look alike.

The recordings named `*-6.12`, `*-7.3` were made in the lab: of unchanged kernels, or of ones with
a bug planted (`tests/lab/kvm`). The others are those recordings with a line changed as the bug of
that name would have changed it.
"""

from pathlib import Path

import numpy as np
import pytest
from unit.tracekit import SHIPPED, only, shipped, told

from analysis.check import check_trace
from probes import wire

HAS_STRUCT, HEAD, RESERVED, ZERO = 1, 4, 8, 16
RETRY = 1

SANE = sorted(
    path.stem
    for path in SHIPPED.glob("*.pfnt")
    if path.stem.startswith(("prime", "ttm", "nested", "map-reclaim", "map-slots"))
)


@pytest.mark.parametrize("name", SANE)
def test_an_unchanged_kernel_is_accused_of_nothing(name):
    # GIVEN a recording of an unchanged kernel WHEN all detectors are asked
    result = check_trace(SHIPPED / f"{name}.pfnt")
    # THEN nothing definite or probable comes out
    assert not [finding.title for finding in result.findings if finding.is_anomaly]


@pytest.mark.parametrize("name", SANE)
def test_a_trace_says_the_same_in_small_pieces(name):
    # GIVEN pieces so small that faults, their releases and their pages' frees are apart
    path = SHIPPED / f"{name}.pfnt"
    small, whole = check_trace(path, rows_max=7), check_trace(path)
    # THEN nothing is found that was not found in the whole
    assert [f.title for f in small.findings] == [f.title for f in whole.findings]


# --- planted in the lab ---------------------------------------------------------------------------

PLANTED = [
    # The recording, the detector, how often the bug happened (as the kernel itself counted).
    ("double-put-7.3", "balance", 4, "put the same page twice"),
    ("leak-on-retry-6.12", "balance", 20, "every fault that was retried keeps one reference"),
    ("leak-prefetch-7.3", "balance", 406, "every prefetched page on this kernel keeps one"),
    ("put-wrong-page-6.12", "wrong-folio", 11, "took a reference on one folio and gave one back"),
    (
        "stale-install-6.12",
        "stale-install",
        20,
        "mapped a page that an invalidation had made stale",
    ),
]


@pytest.mark.parametrize(("name", "detector", "count", "words"), PLANTED)
def test_a_planted_bug_is_found_as_often_as_it_happened(name, detector, count, words):
    finding = only(told(SHIPPED / f"{name}.pfnt", detector))
    assert (finding.verdict, finding.count) == ("definite", count)
    assert words in finding.title
    # AND its evidence is a chain in the order of time, with the fault in it
    times = [row["ts"] for row in finding.evidence]
    assert times == sorted(times)
    assert "FAULT" in {row["kind"] for row in finding.evidence}


@pytest.mark.parametrize(("name", "detector", "count", "words"), PLANTED)
def test_a_planted_bug_is_found_in_small_pieces_too(name, detector, count, words):
    finding = only(told(SHIPPED / f"{name}.pfnt", detector, rows_max=11))
    assert (finding.verdict, finding.count) == ("definite", count)


def test_a_leak_that_no_record_shows_is_seen_by_what_is_never_freed():
    # GIVEN Linux 6.12, which puts prefetched pages inline, with that put missing
    finding = only(told(SHIPPED / "leak-prefetch-6.12.pfnt", "growth"))
    # THEN nobody said what memory it is, but other pages of the slot were freed
    assert finding.verdict == "probable" and finding.pages > 300
    assert "never freed" in finding.title


# --- 4: references that faults keep or lose -------------------------------------------------------


def leaking(which):
    """Return prime-6.12 with the puts of some faults left out."""
    copy = shipped("prime-6.12")
    faults = copy["FAULT"][which]
    keys = faults["h"]["fault_ts"]
    h = copy["RELEASE"]["h"]
    puts = copy.calls("pfn_clean") & np.isin(h["fault_ts"], keys)
    assert copy.drop("RELEASE", puts) == len(faults)
    kept = np.isin(copy["FAULT"]["h"]["fault_ts"], keys)
    copy["FAULT"]["page_end"]["refcount"][kept] = copy["FAULT"]["page"]["refcount"][kept]
    return copy


def test_v9_as_mailed_every_fault_keeps_a_reference_and_that_is_one_finding(tmp_path):
    copy = leaking(slice(None))
    faults = len(copy["FAULT"])
    finding = only(told(copy.write(tmp_path / "t.pfnt"), "balance"))
    assert finding.verdict == "definite"
    assert finding.title.startswith("every fault on this kernel keeps one reference: ")
    assert finding.count == finding.pages == faults
    assert "kvm_release_pfn_clean" in finding.functions


def test_one_leak_among_many_is_found(tmp_path):
    finding = only(told(leaking(slice(100, 101)).write(tmp_path / "t.pfnt"), "balance"))
    assert (finding.verdict, finding.count) == ("definite", 1)
    assert finding.title == "1 of 239 faults keeps one reference: 1 page"


def test_a_leak_of_large_pages_only_is_named_so(tmp_path):
    copy = leaking(slice(100, 140))
    copy["FAULT"]["level"][100:140] = 2
    finding = only(told(copy.write(tmp_path / "t.pfnt"), "balance"))
    assert finding.title == "every fault of a large page keeps one reference: 40 pages"


@pytest.mark.parametrize(("lost", "verdict"), [(40, "inconclusive"), (39, "definite")])
def test_loss_explains_as_many_missing_puts_as_were_lost(tmp_path, lost, verdict):
    # GIVEN 40 faults without a put, and some RELEASE records lost
    copy = leaking(slice(100, 140))
    copy.lose("RELEASE", lost)
    finding = only(told(copy.write(tmp_path / "t.pfnt"), "balance"))
    assert finding.verdict == verdict
    assert f"{lost} RELEASE records were lost" in finding.innocent[0].explanation


def test_without_the_hook_a_missing_put_means_nothing(tmp_path):
    copy = leaking(slice(None))
    copy.unhook("release_pfn_clean")
    result = check_trace(copy.write(tmp_path / "t.pfnt"), ["balance"])
    assert not result.findings
    assert "hook release_pfn_clean not attached" in result.unanswerable[0].reason


def test_a_put_that_the_compiler_made_inline_is_no_leak(tmp_path):
    # GIVEN no record of a put, but the counts fall as they should
    copy = shipped("prime-6.12")
    copy.drop("RELEASE", copy.calls("pfn_clean"))
    finding = only(told(copy.write(tmp_path / "t.pfnt"), "balance"))
    assert finding.verdict == "inconclusive"
    assert "inline" in " ".join(one.explanation for one in finding.innocent)


def test_a_fault_outside_of_the_wanted_range_owes_no_record(tmp_path):
    # GIVEN --gfn, and a large page that only begins outside of it
    copy = leaking(slice(100, 101))
    gfn = int(copy["FAULT"]["gfn"][100])
    copy.setting(gfns=[gfn + 1, gfn + 400])
    assert not told(copy.write(tmp_path / "t.pfnt"), "balance")


def test_a_put_that_shows_as_two_calls_is_one(tmp_path):
    # GIVEN Linux 7.3, where kvm_mmu_finish_page_fault() calls kvm_release_page_dirty(), and
    # another task drops a reference between the two, so that the recorder takes them for two
    copy = shipped("prime-7.3")
    first = copy.calls("finish_fault") & (np.arange(len(copy["RELEASE"])) < 40)
    copy["FAULT"]["writable"] = 1
    page_dirty = wire.CALLS.index("page_dirty")
    copy.again("RELEASE", first, cause=page_dirty, page__refcount=2)
    assert not told(copy.write(tmp_path / "t.pfnt"), "balance")


def test_v11_a_put_without_a_get_in_a_retry_takes_a_reference_of_others(tmp_path):
    # GIVEN the series' v11, whose faults hold nothing when fault-in has returned …
    copy = shipped("prime-6.12")
    copy.generation("G1", kvm_page_fault=("accessed_page",))
    puts = copy.calls("pfn_clean")
    # … and a retry in which Linux 6.8 puts the page all the same
    retried = copy["FAULT"][50]
    mine = copy.inside("RELEASE", retried)
    copy.drop("RELEASE", puts & ~mine)
    copy["FAULT"]["ret"][50], copy["FAULT"]["faultin_ret"][50] = RETRY, RETRY
    finding = only(told(copy.write(tmp_path / "t.pfnt"), "balance"))
    assert (finding.verdict, finding.count) == ("definite", 1)
    assert "put a page in a fault that held no reference" in finding.title


@pytest.mark.parametrize(
    ("member", "of_walk"),
    [
        ("accessed_page", "try_map_writable"),  # v10, v11
        ("is_refcounted_page", "try_map_writable"),  # v8
        ("is_refcounted_page", "allow_write_mapping"),  # v7
    ],
)
def test_the_series_gives_back_before_the_fault_ends_and_that_is_no_leak(tmp_path, member, of_walk):
    found = told(given_back_early(tmp_path, member, of_walk), "balance", "growth")
    assert not found


def test_a_version_of_the_series_that_does_not_say_where_it_puts_is_not_cleared(tmp_path):
    # GIVEN a kernel that may put before fault-in returns, or never: its structures do not tell
    (finding,) = told(given_back_early(tmp_path, "is_refcounted_page"), "balance")
    # THEN that no fault shows a put is said, and proves nothing
    assert finding.verdict == "inconclusive"
    assert "no fault put its page" in finding.title and "not ruled out" in str(finding.innocent)


def test_version_9_that_puts_nothing_keeps_every_reference(tmp_path):
    # GIVEN v9, which has a member that no other version has, and which puts in the fault
    trace = given_back_early(
        tmp_path, "is_refcounted_page", "try_map_writable", "allow_non_refcounted_struct_page"
    )
    # THEN faults without a put accuse, though nothing was unmapped yet
    (finding,) = told(trace, "balance")
    assert (finding.verdict, finding.count) == ("definite", finding.pages)
    assert "every fault on this kernel keeps one reference" in finding.title


def given_back_early(folder: Path, member: str, *of_walk: str) -> Path:
    """Return a recording of the series in which no fault shows a put."""
    copy = shipped("prime-6.12")
    copy.generation("G1", kvm_page_fault=(member,), kvm_follow_pfn=of_walk)
    copy.drop("RELEASE", copy.calls("pfn_clean"))
    copy["FAULT"]["page"]["refcount"] -= 1
    copy["FAULT"]["refcounted"] = 1
    return copy.write(folder / "t.pfnt")


def test_the_series_as_corrected_puts_in_the_fault_and_forgets_it_on_retry(tmp_path):
    # GIVEN v9 with its put, which one retried fault leaves out
    copy = leaking(slice(10, 20))
    copy.generation("G1", kvm_page_fault=("is_refcounted_page",))
    copy["FAULT"]["refcounted"] = 1
    copy["FAULT"]["ret"][10:20] = RETRY
    finding = only(told(copy.write(tmp_path / "t.pfnt"), "balance"))
    assert finding.title == "every fault that was retried keeps one reference: 10 pages"


def test_a_put_of_a_page_with_count_0_is_an_underflow(tmp_path):
    copy = shipped("prime-6.12")
    copy["RELEASE"]["page"]["refcount"][copy.calls("pfn_clean")] = 0
    findings = told(copy.write(tmp_path / "t.pfnt"), "balance")
    assert only(findings).verdict == "definite"
    assert "whose reference count was 0 already" in findings[0].title


def test_a_put_of_a_reserved_page_does_nothing(tmp_path):
    copy = shipped("prime-6.12")
    copy["RELEASE"]["page"]["refcount"][copy.calls("pfn_clean")] = 0
    copy["RELEASE"]["page"]["bits"] = HAS_STRUCT | RESERVED
    assert not told(copy.write(tmp_path / "t.pfnt"), "balance")


def test_fewer_references_than_mappings_is_what_a_second_put_leaves(tmp_path):
    copy = shipped("prime-6.12")
    copy["FAULT"]["page_end"]["refcount"][5:9] = 0
    finding = only(told(copy.write(tmp_path / "t.pfnt"), "balance"))
    assert (finding.verdict, finding.count) == ("definite", 4)
    assert "fewer references than there are mappings" in finding.title


def test_cve_2021_22543_a_reference_to_a_page_that_nobody_counts_frees_it(tmp_path):
    # GIVEN a PFNMAP page whose count was 0: with KVM's reference it is 1
    copy = shipped("ttm-6.12")
    walked = copy["FAULT"]["walk_pfn"] == copy["FAULT"]["pfn"]
    copy["FAULT"]["page"]["refcount"][walked] = 1
    copy["FAULT"]["page_end"]["refcount"][walked] = 0
    finding = only(told(copy.write(tmp_path / "t.pfnt"), "balance"))
    assert finding.verdict == "definite"
    assert "CVE-2021-22543" in finding.rule and "/dev/dri/card0" in finding.where


def test_a_page_that_the_host_unmapped_meanwhile_is_not_resurrected(tmp_path):
    # GIVEN the same counts, but an invalidation during the fault
    copy = shipped("ttm-6.12")
    walked = copy["FAULT"]["walk_pfn"] == copy["FAULT"]["pfn"]
    copy["FAULT"]["page"]["refcount"][walked] = 1
    copy["FAULT"]["invalidate_seq"] += 1
    assert not told(copy.write(tmp_path / "t.pfnt"), "balance")


# --- 13: the wrong folio --------------------------------------------------------------------------


def straying(order):
    """Return prime-6.12 with a fault whose put is of the first page of its 2M range."""
    copy = shipped("prime-6.12")
    at = int(np.flatnonzero(copy["FAULT"]["pfn"] % 512)[50])
    fault = copy["FAULT"][at]
    put = copy.inside("RELEASE", fault) & copy.calls("pfn_clean")
    copy["RELEASE"]["pfn"][put] &= ~np.uint64(511)
    for page in (copy["RELEASE"]["page"], copy["FAULT"]["page"]):
        page["order"] = order
        page["bits"] = HAS_STRUCT | (HEAD if order else 0)
    return copy


def test_fsdax_the_adjusted_pfn_puts_another_folio(tmp_path):
    finding = only(told(straying(0).write(tmp_path / "t.pfnt"), "wrong-folio", "balance"))
    assert (finding.detector, finding.verdict, finding.count) == ("wrong-folio", "definite", 1)


@pytest.mark.parametrize("kind", ["RELEASE", "SPTE"])
def test_what_was_lost_may_be_its_own_put_or_the_install_of_a_prefetched_page(tmp_path, kind):
    copy = straying(0)
    copy.lose(kind, 1)
    (finding,) = told(copy.write(tmp_path / "t.pfnt"), "wrong-folio")
    assert finding.verdict == "inconclusive"


def test_the_adjusted_pfn_of_one_compound_page_is_harmless(tmp_path):
    assert not told(straying(9).write(tmp_path / "t.pfnt"), "wrong-folio", "balance")


# --- 14: counts that only grow --------------------------------------------------------------------


def zero_page(rise):
    """Return prime-6.12 as if all its faults were of the zero page, whose count rises."""
    copy = shipped("prime-6.12")
    steps = np.arange(len(copy["FAULT"])) * rise
    for name in ("FAULT", "SPTE", "RELEASE"):
        copy[name]["pfn"] = 0x9550D
        copy[name]["page"]["bits"] = HAS_STRUCT | RESERVED | ZERO
        copy[name]["page"]["order"] = 0
    for name in ("page", "page_end"):
        copy["FAULT"][name]["bits"] = HAS_STRUCT | RESERVED | ZERO
        copy["FAULT"][name]["mapcount"] = -1
    copy["FAULT"]["page"]["refcount"] = 1000 + steps
    copy["FAULT"]["page_end"]["refcount"] = 1000 + steps - (rise == 0)
    copy["PAGE_FREE"] = copy["PAGE_FREE"][:0]
    return copy


def test_the_zero_page_s_count_rises_with_every_fault(tmp_path):
    finding = only(told(zero_page(1).write(tmp_path / "t.pfnt"), "growth"))
    assert finding.verdict == "definite" and finding.pages == 1
    assert "pfn 0x9550d rose by 238 in 239 faults" in finding.title
    assert finding.evidence


def test_the_zero_page_is_faulted_in_often_and_its_count_stays(tmp_path):
    assert not told(zero_page(0).write(tmp_path / "t.pfnt"), "growth")


@pytest.mark.parametrize(("faults", "rise", "found"), [(2, 1, 0), (4, 1, 0), (6, 5, 1)])
def test_pages_that_the_lru_queues_at_their_second_fault_do_not_leak(tmp_path, faults, rise, found):
    # GIVEN pages that are faulted in several times, and whose count rises: once for the queue of
    # pages to activate, or with every fault
    copy = never_freed(0)
    rows = np.tile(copy["FAULT"], faults)
    number = np.repeat(np.arange(faults), len(copy["FAULT"]))
    rows["h"]["ts"] += (number * 10**9).astype("u8")
    rows["h"]["fault_ts"] += (number * 10**9).astype("u8")
    rows["h"]["seq"] = np.arange(len(rows))
    rows["page_end"]["refcount"] = 2 + np.minimum(number, rise)
    copy["FAULT"] = rows
    copy["SPTE"] = copy["SPTE"][:0]
    assert len(told(copy.write(tmp_path / "t.pfnt"), "growth")) == found


def never_freed(excess, path=""):
    """Return prime-6.12 of four times the memory, let go with references left and never freed."""
    copy = shipped("prime-6.12")
    for name in ("FAULT", "SPTE", "RELEASE"):
        rows = [copy[name].copy() for _ in range(4)]
        for number, part in enumerate(rows):
            part["pfn"] += np.uint64(number << 24)
            part["gfn"] += np.uint64(number << 24)
            part["h"]["ts"] += np.uint64(number)
            part["h"]["fault_ts"][part["h"]["fault_ts"] > 0] += np.uint64(number)
        copy[name] = np.concatenate(rows)
    copy["PAGE_FREE"] = copy["PAGE_FREE"][:0]
    zaps = copy.ops("SPTE", "zap")
    copy["SPTE"]["page"]["refcount"][zaps] = 1 + excess
    copy["SPTE"]["page"]["mapcount"][zaps] = 0
    if path is not None:
        hva = copy["FAULT"]["hva"]
        vma = {"start": int(hva.min()), "end": int(hva.max()) + 4096, "path": path, "flags": []}
        slot = {"vm": 1, "id": 0}
        copy.notes.append((int(copy["FAULT"]["h"]["ts"][0]), {"slot": slot, "vmas": [vma]}))
    return copy


def test_pages_that_are_never_freed_and_held_once_for_each_fault(tmp_path):
    finding = only(told(never_freed(1).write(tmp_path / "t.pfnt"), "growth"))
    assert finding.verdict == "definite" and finding.pages == 4 * 239
    assert "never freed" in finding.title


def test_memory_of_a_file_outlives_the_vm_and_is_held_by_the_page_cache(tmp_path):
    assert not told(never_freed(1, "/dev/shm/guest").write(tmp_path / "t.pfnt"), "growth")


def test_memory_of_which_nothing_is_known_may_be_a_file_s(tmp_path):
    finding = only(told(never_freed(1, None).write(tmp_path / "t.pfnt"), "growth"))
    assert finding.verdict == "inconclusive"


def test_a_process_that_keeps_its_memory_after_the_vm_holds_no_extra_reference(tmp_path):
    assert not told(never_freed(0).write(tmp_path / "t.pfnt"), "growth")


def test_a_process_that_lives_on_may_have_its_memory_in_the_swap_cache(tmp_path):
    copy = never_freed(1)
    copy.summary["why"] = "interrupted"
    finding = only(told(copy.write(tmp_path / "t.pfnt"), "growth"))
    assert finding.verdict == "inconclusive"


def test_a_vm_that_is_there_may_let_go_of_pages_that_are_still_mapped(tmp_path):
    copy = never_freed(1)
    copy.drop("VM", copy.ops("VM", "delete"))
    assert not told(copy.write(tmp_path / "t.pfnt"), "growth")


def test_lost_frees_explain_pages_that_are_never_freed(tmp_path):
    copy = never_freed(1)
    copy.lose("PAGE_FREE", 4 * 239)
    assert only(told(copy.write(tmp_path / "t.pfnt"), "growth")).verdict == "inconclusive"
