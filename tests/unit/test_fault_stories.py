"""Dead marks, false flags, stale installs, livelocks, pins, refusals: stories of bugs, and of what
looks alike and is none.

The recordings were made in the lab; each story changes in one what the bug would have changed.
"""

import numpy as np
import pytest
from unit.tracekit import SHIPPED, only, shipped, told

from analysis.check import check_trace
from probes import wire

HAS_STRUCT, RESERVED = 1, 8
RETRY, FIXED = 1, 5
NEVER = 0xFFFFFFFF
REFCOUNTED_BIT = 1 << 59


# --- 7, 8: struct pages that KVM should not touch, flags that lie ---------------------------------


def test_v7_a_page_is_marked_when_its_count_is_0(tmp_path):
    copy = shipped("prime-6.12")
    late = copy.calls("mark_accessed") & (np.arange(len(copy["RELEASE"])) % 50 == 0)
    assert late.any()
    copy["RELEASE"]["page"]["refcount"][late] = 0
    finding = only(told(copy.write(tmp_path / "t.pfnt"), "dead-mark"))
    assert (finding.verdict, finding.count) == ("definite", int(late.sum()))
    assert finding.functions == ("kvm_set_pfn_accessed",)


def test_v7_a_page_is_marked_by_the_fault_that_has_put_it(tmp_path):
    # GIVEN faults that mark their page dirty a microsecond after they put it
    copy = shipped("prime-6.12")
    copy.again("RELEASE", copy.calls("pfn_clean"), cause=wire.CALLS.index("mark_dirty"))
    copy["FAULT"]["h"]["ts"] += np.uint64(2000)
    finding = only(told(copy.write(tmp_path / "t.pfnt"), "dead-mark"))
    assert (finding.verdict, finding.count) == ("definite", 239)
    assert "after putting it" in finding.title


def test_a_page_is_marked_by_the_fault_that_still_holds_it(tmp_path):
    copy = shipped("prime-6.12")
    copy.again("RELEASE", copy.calls("pfn_clean"), cause=wire.CALLS.index("mark_dirty"))
    marks = copy.calls("mark_dirty") & (copy["RELEASE"]["h"]["seq"] >= 1 << 31)
    copy["RELEASE"]["h"]["ts"][marks] -= np.uint64(1001)
    assert not told(copy.write(tmp_path / "t.pfnt"), "dead-mark")


def test_a_reserved_page_is_not_marked_at_all(tmp_path):
    copy = shipped("prime-6.12")
    copy["RELEASE"]["page"]["refcount"] = 0
    copy["RELEASE"]["page"]["bits"] = HAS_STRUCT | RESERVED
    assert not told(copy.write(tmp_path / "t.pfnt"), "dead-mark")


def of_the_series(bit):
    copy = shipped("prime-6.12")
    copy.generation("G1", kvm_page_fault=("is_refcounted_page",))
    copy["FAULT"]["refcounted"] = 1
    if bit:
        for name in ("a", "b"):
            leaf = (copy["SPTE"][name] & (1 << 11)) > 0
            copy["SPTE"][name][leaf] |= REFCOUNTED_BIT
    return copy


def test_the_series_zaps_an_spte_of_a_page_that_is_gone(tmp_path):
    copy = of_the_series(True)
    zap = np.flatnonzero(copy.ops("SPTE", "zap"))[3]
    copy["SPTE"]["page"]["refcount"][zap] = 0
    finding = only(told(copy.write(tmp_path / "t.pfnt"), "dead-mark"))
    assert (finding.verdict, finding.count) == ("definite", 1)


def test_the_series_bit_and_flag_agree(tmp_path):
    assert not told(of_the_series(True).write(tmp_path / "t.pfnt"), "refcounted-flag")


def test_a_kernel_without_the_bit_lacks_it_nowhere(tmp_path):
    assert not told(of_the_series(False).write(tmp_path / "t.pfnt"), "refcounted-flag")


def test_v7_large_pages_lack_the_bit_that_their_fault_asked_for(tmp_path):
    copy = of_the_series(True)
    installs = np.flatnonzero(copy.ops("SPTE", "install"))[:5]
    copy["SPTE"]["b"][installs] &= ~np.uint64(REFCOUNTED_BIT)
    finding = only(told(copy.write(tmp_path / "t.pfnt"), "refcounted-flag"))
    assert (finding.verdict, finding.count) == ("definite", 5)
    assert "do not say" in finding.title


def test_an_spte_says_counted_of_a_page_without_a_count(tmp_path):
    copy = of_the_series(True)
    install = np.flatnonzero(copy.ops("SPTE", "install"))[7]
    copy["SPTE"]["page"]["refcount"][install] = 0
    finding = only(told(copy.write(tmp_path / "t.pfnt"), "refcounted-flag"))
    assert (finding.verdict, finding.count) == ("definite", 1)


def test_the_flag_says_counted_of_a_tail_that_nobody_counts(tmp_path):
    # GIVEN Linux 7.3 and a TTM buffer, 128 pages of it mapped without a reference
    copy = shipped("ttm-7.3")
    uncounted = copy["FAULT"]["refcounted"] == 0
    assert uncounted.sum() == 128
    copy["FAULT"]["refcounted"][uncounted] = 1
    # THEN the flag is wrong, whichever way one looks at it
    found = told(copy.write(tmp_path / "t.pfnt"), "refcounted-flag")
    assert {finding.verdict for finding in found} == {"definite"}
    assert {finding.count for finding in found} == {127, 128}


def test_the_flag_says_uncounted_of_a_page_that_gup_gave(tmp_path):
    copy = shipped("prime-7.3")
    copy["FAULT"]["refcounted"][10:13] = 0
    finding = only(told(copy.write(tmp_path / "t.pfnt"), "refcounted-flag"))
    assert (finding.verdict, finding.count) == ("probable", 3)


# --- 6: stale installs ----------------------------------------------------------------------------


def invalidated(when, *, covers=True, end=False, seen=0):
    """Return prime-6.12 with an invalidation around the fault-in of one fault."""
    copy = shipped("prime-6.12")
    copy["INVALIDATE"] = copy["INVALIDATE"][:0]
    copy["FAULT"]["mmu_seq"] = copy["FAULT"]["invalidate_seq"] = 7
    fault = copy["FAULT"][60:61]
    install = copy["SPTE"][copy.inside("SPTE", fault[0])][0]["h"]["ts"]
    ts = int(install) + {"before": -500, "after": 500}[when]
    hva = int(fault["hva"][0]) if covers else 0x1000
    copy.add("INVALIDATE", h__ts=ts - 300, h__op=wire.OPS.index("start"), h__vm=1, a=hva,
             b=hva + 4096, c=7, d=1)  # fmt: skip
    if end:
        copy.add("INVALIDATE", h__ts=ts, h__op=wire.OPS.index("end"), h__vm=1, a=hva,
                 b=hva + 4096, c=8, d=0)  # fmt: skip
    copy["FAULT"]["invalidate_seq"][60:] = 8
    copy["FAULT"]["mmu_seq"][61:] = 8
    copy["FAULT"]["mmu_seq"][60] = 7 + seen
    return copy


def test_an_install_after_the_end_of_an_invalidation_is_stale(tmp_path):
    finding = only(told(invalidated("before", end=True).write(tmp_path / "t.pfnt"),
                        "stale-install"))  # fmt: skip
    assert (finding.verdict, finding.count) == ("definite", 1)
    assert {"INVALIDATE", "SPTE", "FAULT"} <= {row["kind"] for row in finding.evidence}


def test_an_install_within_an_invalidation_of_its_range_is_stale(tmp_path):
    found = told(invalidated("before").write(tmp_path / "t.pfnt"), "stale-install")
    assert only(found).verdict == "definite"


@pytest.mark.parametrize(
    "case",
    [
        dict(when="before", covers=False),
        dict(when="after", end=True),
        dict(when="before", end=True, seen=1),
    ],
    ids=["of another range", "begun after the install", "over before the fault looked"],
)
def test_an_invalidation_that_does_not_concern_the_fault_makes_nothing_stale(tmp_path, case):
    assert not told(invalidated(**case).write(tmp_path / "t.pfnt"), "stale-install")


# --- 11, 12: livelock and its look-alikes ---------------------------------------------------------

SIGN = 0x8002DC25


def rounds(count=200, *, every_ns=1_000_000, **fields):
    """Return prime-6.12 that ends in a fault which is retried `count` times at one address."""
    copy = shipped("prime-6.12")
    last = copy["FAULT"][-1:].copy()
    more = np.repeat(last, count)
    more["ret"], more["sptes"], more["slot"], more["t_map"] = RETRY, 0, 0, NEVER
    more["mmu_seq"] = more["invalidate_seq"] = SIGN
    step = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(every_ns)
    more["h"]["ts"] += step
    more["h"]["fault_ts"] += step
    more["h"]["seq"] = np.arange(count) | 1 << 30
    for name, value in fields.items():
        more[name] = value
    copy["FAULT"] = np.concatenate([copy["FAULT"], more])
    return copy


def test_the_livelock_of_2023_a_sequence_with_bit_31_set(tmp_path):
    finding = only(told(rounds().write(tmp_path / "t.pfnt"), "livelock"))
    assert (finding.verdict, finding.count) == ("definite", 200)
    assert "bit 31" in finding.title and finding.detail["story"] == "comparison"


def test_every_round_is_thrown_away_for_no_reason_seen(tmp_path):
    copy = rounds(2000, mmu_seq=5, invalidate_seq=5)
    assert only(told(copy.write(tmp_path / "t.pfnt"), "livelock")).verdict == "probable"


def test_a_root_may_be_obsolete_for_a_while(tmp_path):
    copy = rounds(mmu_seq=5, invalidate_seq=5)
    assert only(told(copy.write(tmp_path / "t.pfnt"), "livelock")).verdict == "inconclusive"


def test_an_invalidation_that_never_ends(tmp_path):
    copy = rounds(2000, in_progress=1)
    finding = only(told(copy.write(tmp_path / "t.pfnt"), "livelock"))
    assert (finding.verdict, finding.detail["story"]) == ("probable", "unpaired")


def lost_end(*after, gone=True):
    """Return 200 rounds behind the end of an invalidation that left a count of 1, VM then gone.

    `after` are INVALIDATE records that follow, as (op, ts since that end, count).
    """
    copy = rounds(in_progress=1)
    ts = int(copy["FAULT"]["h"]["ts"][-201])
    copy["INVALIDATE"] = copy["INVALIDATE"][:0]
    for op, at, counted in (("start", -3, 1), ("end", -2, 0), ("start", -1, 1), ("end", 0, 1)):
        invalidation(copy, op, ts + at, counted)
    for op, at, counted in after:
        invalidation(copy, op, ts + at, counted)
    copy.drop("VM", copy.ops("VM", "delete"))
    if gone:
        copy.add("VM", h__ts=ts + 10**9, h__vm=1, h__op=wire.OPS.index("delete"))
    return copy


def invalidation(copy, op, ts, counted):
    copy.add("INVALIDATE", h__ts=ts, h__vm=1, h__op=wire.OPS.index(op), d=counted)


@pytest.mark.parametrize("rows_max", [13, 10**6])
def test_an_invalidation_whose_end_is_not_counted(tmp_path, rows_max):
    # GIVEN rounds of 0.2 s, and before them the end of the only invalidation, which left a count
    path = lost_end().write(tmp_path / "t.pfnt")
    finding = only(told(path, "livelock", rows_max=rows_max))
    # THEN KVM is named, and the records of that invalidation are shown
    assert (finding.verdict, finding.functions) == ("probable", ("kvm_mmu_invalidate_end",))
    assert "counts an invalidation as in progress though each has ended" in finding.title
    shown = [(row["kind"], row["op"], row["in_progress"]) for row in finding.evidence[:2]]
    assert shown == [("INVALIDATE", "start", 1), ("INVALIDATE", "end", 1)]


@pytest.mark.parametrize(("seen", "verdict"), [(True, "probable"), (False, "explained")])
def test_the_first_invalidation_of_a_vm_is_the_one_whose_end_is_not_counted(
    tmp_path, seen, verdict
):
    # GIVEN no earlier one that left no count, and a VM that is new, or whose beginning was not seen
    copy = lost_end()
    copy["INVALIDATE"] = copy["INVALIDATE"][-2:]
    assert copy.ops("VM", "create").sum() == 1
    if not seen:
        copy.drop("VM", copy.ops("VM", "create"))
    # THEN only of the new one it is known that nothing was in progress before
    assert only(told(copy.write(tmp_path / "t.pfnt"), "livelock")).verdict == verdict


@pytest.mark.parametrize(
    "copy",
    [
        lost_end(gone=False),
        lost_end(("start", 150_000_000, 1)),
        lost_end(("start", 150_000_000, 1), ("end", 160_000_000, 0)),
    ],
    ids=["recording ended meanwhile", "its record came late", "it ended too"],
)
def test_another_invalidation_may_have_been_at_work(tmp_path, copy):
    # GIVEN that the count may be of an invalidation whose start has not returned yet
    assert only(told(copy.write(tmp_path / "t.pfnt"), "livelock")).verdict == "explained"


def test_lost_records_of_invalidations_leave_the_count_unknown(tmp_path):
    copy = lost_end()
    copy.lose("INVALIDATE", 1)
    assert only(told(copy.write(tmp_path / "t.pfnt"), "livelock")).verdict == "explained"


@pytest.mark.parametrize(
    ("fields", "story"),
    [
        (dict(in_progress=1), "unpaired"),
        (dict(mmu_seq=np.arange(200), invalidate_seq=np.arange(200) + 1), "storm"),
        (dict(pfn=(1 << 64) - 1, t_gup=NEVER, t_gup_end=NEVER), "slot"),
        (dict(pfn=0x7FF << 52), "no page"),
        (dict(t_map=9000), "contended"),
    ],
)
def test_hosts_at_work_are_told_without_blame(tmp_path, fields, story):
    finding = only(told(rounds(**fields).write(tmp_path / "t.pfnt"), "livelock"))
    assert (finding.verdict, finding.detail["story"]) == ("explained", story)


@pytest.mark.parametrize(
    "copy",
    [rounds(20), rounds(200, every_ns=10_000, in_progress=1), rounds(sptes=1), rounds(ret=FIXED)],
    ids=["few", "short", "with installs", "fixed"],
)
def test_what_ends_soon_or_gets_somewhere_is_no_livelock(tmp_path, copy):
    assert not told(copy.write(tmp_path / "t.pfnt"), "livelock")


def test_a_livelock_is_followed_over_pieces_of_any_length(tmp_path):
    path = rounds().write(tmp_path / "t.pfnt")
    assert [only(told(path, "livelock", rows_max=n)).count for n in (13, 100, 10**6)] == [200] * 3


# --- 12: pins -------------------------------------------------------------------------------------


def test_a_map_without_unmap_outlives_the_vm(tmp_path):
    copy = shipped("nested-6.12")
    unmaps = np.flatnonzero(copy.ops("PIN", "unmap"))
    copy.drop("PIN", np.isin(np.arange(len(copy["PIN"])), unmaps[-1:]))
    copy["PAGE_FREE"] = copy["PAGE_FREE"][:0]
    finding = only(told(copy.write(tmp_path / "t.pfnt"), "pins"))
    assert (finding.verdict, finding.count, finding.pages) == ("definite", 1, 1)
    assert "outlived the VM" in finding.title


def test_a_lost_unmap_explains_a_map_without_one(tmp_path):
    copy = shipped("nested-6.12")
    unmaps = np.flatnonzero(copy.ops("PIN", "unmap"))
    copy.drop("PIN", np.isin(np.arange(len(copy["PIN"])), unmaps[-1:]))
    copy["PAGE_FREE"] = copy["PAGE_FREE"][:0]
    copy.lose("PIN", 1)
    assert only(told(copy.write(tmp_path / "t.pfnt"), "pins")).verdict == "inconclusive"


def test_a_vm_that_lives_on_may_unmap_later(tmp_path):
    copy = shipped("nested-6.12")
    copy.drop("PIN", copy.ops("PIN", "unmap"))
    copy.drop("VM", copy.ops("VM", "delete"))
    copy["PAGE_FREE"] = copy["PAGE_FREE"][:0]
    assert not told(copy.write(tmp_path / "t.pfnt"), "pins")


@pytest.mark.parametrize(
    ("elsewhere", "number", "found"), [(0, 1, 1), (0, -1, 0), (1, 1, 0)],
    ids=["its cpu", "its cpu, which numbered it before", "another"],
)  # fmt: skip
def test_a_page_is_freed_while_it_is_mapped_for_kvm(elsewhere, number, found, tmp_path):
    # GIVEN a free just behind the map, as the clock of one cpu or those of two say
    copy = shipped("nested-6.12")
    copy["PIN"]["h"]["seq"] *= 4
    pin = copy["PIN"][0]
    copy.add("PAGE_FREE", h__ts=int(pin["h"]["ts"]) + 5, h__cpu=int(pin["h"]["cpu"]) ^ elsewhere,
             h__seq=int(pin["h"]["seq"]) + number, pfn=int(pin["pfn"]), page__bits=1)  # fmt: skip
    # THEN it is told if the order is sure
    findings = told(copy.write(tmp_path / "t.pfnt"), "pins", rows_max=5)
    titles = [f.title for f in findings]
    assert len(titles) == found
    assert all("freed while kvm_vcpu_map() had them mapped" in title for title in titles)


def test_the_put_of_an_unmap_that_was_written_late_frees_no_mapped_page(tmp_path):
    # GIVEN an unmap whose record has a later time than the free that its put led to
    # (seed 80 of the soak, hostile: v10, vcpu_map_leak, reorder)
    copy = shipped("nested-6.12")
    at = int(np.flatnonzero(copy.ops("PIN", "unmap"))[0])
    head, pfn = copy["PIN"][at]["h"], int(copy["PIN"][at]["pfn"])
    copy.add("PAGE_FREE", h__ts=int(head["ts"]) + 500, h__cpu=int(head["cpu"]),
             h__seq=int(head["seq"]) + 1, pfn=pfn, page__bits=1)  # fmt: skip
    copy["PIN"]["h"]["ts"][at] += 3000
    # THEN the numbers of its cpu tell the order
    assert not told(copy.write(tmp_path / "t.pfnt"), "pins")


def test_a_map_of_a_page_that_nobody_counts(tmp_path):
    copy = shipped("nested-6.12")
    copy["PIN"]["page"]["refcount"] = 0
    assert only(told(copy.write(tmp_path / "t.pfnt"), "pins")).verdict == "definite"


def test_every_refresh_of_a_pfn_cache_keeps_a_reference(tmp_path):
    copy = shipped("nested-6.12")
    pins = np.repeat(copy["PIN"][:1], 30)
    pins["h"]["op"] = wire.OPS.index("refresh")
    pins["h"]["ts"] += np.arange(30, dtype=np.uint64)
    pins["page"]["refcount"] = 3 + np.arange(30)
    copy["PIN"] = pins
    finding = only(told(copy.write(tmp_path / "t.pfnt"), "pins"))
    assert finding.verdict == "probable" and "refresh" in finding.title


# --- 15: refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["6.1", "6.12"])
def test_a_ttm_tail_is_refused_by_design_and_the_guest_dies(kernel):
    finding = only(told(SHIPPED / f"ttm-{kernel}.pfnt", "refused"))
    assert finding.verdict == "explained" and not finding.is_anomaly
    assert "the guest died with EFAULT" in finding.title
    assert "/dev/dri/card0" in finding.where
    assert any(row["ret"] == -14 for row in finding.evidence if row["kind"] == "FAULT")


def test_a_kernel_that_promises_to_map_such_pages_and_refuses_is_wrong(tmp_path):
    copy = shipped("ttm-6.12")
    copy.generation("G2")
    assert only(told(copy.write(tmp_path / "t.pfnt"), "refused")).verdict == "probable"


def test_linux_7_3_maps_them_and_nothing_is_refused():
    assert not told(SHIPPED / "ttm-7.3.pfnt", "refused")


def test_without_the_walk_nobody_knows_what_was_refused(tmp_path):
    copy = shipped("ttm-6.12")
    copy.unhook("walk")
    result = check_trace(copy.write(tmp_path / "t.pfnt"), ["refused"])
    assert not result.findings and "walk" in result.unanswerable[0].reason
