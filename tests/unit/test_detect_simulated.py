"""Sane kernels that look guilty, and guilty ones that hide: stories that the simulator told."""

from collections import Counter

import pytest
from unit.simkit import make
from unit.tracekit import SHIPPED, only, told

from analysis.check import check_trace
from analysis.detectors.common import CLOCKS_NS
from tracer.simulator.kernels import KERNELS

#: v8 keeps references in the shadow MMU: it is not sane there.
SANE = sorted(set(KERNELS) - {"v8", "v9-mailed"})


def accused(path):
    return [(f.detector, f.title) for f in check_trace(path).findings if f.is_anomaly]


def numbers(made):
    """Return kind, cpu, number and time of all records that the kernel made."""
    names = ("kind", "cpu", "seq", "ts")
    rows = [row for row in made.rows() if row["kind"] not in ("LOSS", "NOTE")]
    return [tuple(row[name] for name in names) for row in rows]


@pytest.mark.parametrize("kernel", SANE)
@pytest.mark.parametrize("scenario", ["migration", "thp"])
def test_prefetched_tails_of_the_faults_own_folio_are_put_for_themselves(
    tmp_path, kernel, scenario
):
    # GIVEN faults around which frames of the same compound page were prefetched and put
    made = make(tmp_path, kernel=kernel, scenario=scenario, mmu="shadow", seed=5,
                mem_bytes=4 << 20)  # fmt: skip
    # THEN those puts are none of the fault's own
    assert accused(made.outcome.trace) == []


def test_a_record_that_is_there_twice_is_taken_once(tmp_path):
    # GIVEN a trace of a sane kernel in which records come twice
    made = make(tmp_path, scenario="balloon", hostile=("duplicate",), mem_bytes=2 << 20)
    result = check_trace(made.outcome.trace)
    # THEN nobody is accused, and the answer says how many there were
    assert not [finding.title for finding in result.findings if finding.is_anomaly]
    assert result.duplicates > 0 and result.to_json()["duplicates"] == result.duplicates
    # AND pieces of any length leave out the same
    small = check_trace(made.outcome.trace, rows_max=7)
    assert small.duplicates == result.duplicates


def test_records_that_come_twice_do_not_hide_how_many_are_lost(tmp_path):
    # GIVEN a sane kernel some of whose records are lost, and others come twice
    story = {"kernel": "6.13", "scenario": "thp", "mmu": "shadow", "vcpus": 4,
             "mem_bytes": 6 << 20, "seed": 963023640910}  # fmt: skip
    (tmp_path / "whole").mkdir()
    whole = numbers(make(tmp_path / "whole", **story))
    made = make(tmp_path, hostile=("loss", "duplicate"), **story)
    # THEN as many are said to be lost as are missing, and that explains what seems to be
    missing = len(whole) - len(set(numbers(made)))
    assert check_trace(made.outcome.trace).info["lost"] == missing > 0
    assert accused(made.outcome.trace) == []


def test_a_copy_of_a_record_has_its_time_even_where_times_are_wrong(tmp_path):
    made = make(tmp_path, vcpus=4, hostile=("reorder=0.2", "duplicate=0.2"))
    known = numbers(made)
    assert len(known) > len(set(known)) == len({key[:3] for key in known})


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "6.13", "v7"])
@pytest.mark.parametrize(
    ("hostile", "vcpus", "seed"), [("reorder", 7, 12), ("skew", 64, 27)], ids=["reorder", "skew"]
)
def test_in_a_late_recording_an_install_may_be_written_after_its_own_zap(
    tmp_path, kernel, hostile, vcpus, seed
):
    # GIVEN a storm of invalidations in a VM that is older than the trace: nobody saw what the zap
    # ended, so that it does not wait for its install
    made = make(tmp_path, kernel=kernel, scenario="storm", vcpus=vcpus, seed=seed, mmu="",
                mem_bytes=2 << 20, hostile=(hostile, "late"))  # fmt: skip
    # THEN the mapping that seems to begin then, and to have no end, accuses nobody
    assert accused(made.outcome.trace) == []


def test_many_cpus_may_install_in_the_same_nanosecond(tmp_path):
    # GIVEN a sane kernel and 64 vCPUs, nine of which write a record at the same time
    made = make(tmp_path, scenario="nested", mmu="tdp", vcpus=64, mem_bytes=6 << 20, seed=8)
    moments = Counter(row["ts"] for row in made.rows() if row["kind"] == "SPTE")
    assert max(moments.values()) == 9
    # THEN each install is joined with its fault, and nobody is accused
    assert accused(made.outcome.trace) == []


def test_a_recorders_own_trace_has_nothing_twice():
    assert check_trace(SHIPPED / "prime-6.12.pfnt").duplicates == 0


@pytest.mark.parametrize(
    ("kernel", "scenario"), [("6.12", "idle"), ("6.1", "idle"), ("6.12", "nested")]
)
def test_order_by_clocks_of_two_cpus_proves_nothing_when_close(tmp_path, kernel, scenario):
    # GIVEN cpus whose clocks differ by some microseconds, so that now and then an install seems to
    # come after an invalidation
    told_of = []
    for seed in (2, 3, 4, 5):
        made = make(tmp_path, kernel=kernel, scenario=scenario, seed=seed, hostile=("skew",),
                    mem_bytes=2 << 20)  # fmt: skip
        told_of += told(made.outcome.trace, "stale-install")
        # THEN that accuses nobody
        assert accused(made.outcome.trace) == []
    # AND it is told, but proves nothing
    assert told_of and {finding.verdict for finding in told_of} == {"inconclusive"}
    assert f"less than {CLOCKS_NS // 1000} us" in told_of[0].innocent[1].ruled_out


def test_faults_on_the_zero_page_do_not_make_v9_a_version_that_puts_earlier(tmp_path):
    # GIVEN v9, whose faults on the zero page keep references, and most faults are such
    made = make(tmp_path, kernel="v9", scenario="idle", bugs=("zero_page_growth",),
                mem_bytes=8 << 20)  # fmt: skip
    # THEN that one page is named, and none of those that were put as they should
    finding = only(told(made.outcome.trace, "balance"))
    assert finding.pages == 1 and "keeps one reference" in finding.title


def test_a_livelock_may_begin_before_bit_31_is_set(tmp_path):
    made = make(tmp_path, kernel="6.1", scenario="livelock", bugs=("sign_extension",),
                mem_bytes=4 << 20)  # fmt: skip
    finding = only(told(made.outcome.trace, "livelock"))
    assert finding.verdict == "definite" and "bit 31" in finding.title


@pytest.mark.parametrize("rows_max", [100, 1 << 18])
def test_a_leaf_in_a_wrong_page_table_is_not_called_one_of_a_slot_that_is_gone(tmp_path, rows_max):
    made = make(tmp_path, scenario="balloon", bugs=("wrong_gfn",), mem_bytes=4 << 20)
    found = check_trace(made.outcome.trace, ["gfn-outside", "stale-slot"], rows_max=rows_max)
    assert {finding.detector for finding in found.findings} == {"gfn-outside"}
    assert only(list(found.findings)).verdict == "definite"


def test_a_count_of_invalidations_that_stays_up_is_found_though_each_has_its_end(tmp_path):
    # GIVEN an invalidation that ends, by the records, but is counted as in progress for ever
    made = make(tmp_path, scenario="balloon", bugs=("unpaired_start",), mem_bytes=4 << 20)
    finding = only(told(made.outcome.trace, "livelock"))
    # THEN that is told long before a second is over
    assert (finding.verdict, finding.detail["story"]) == ("probable", "unpaired")
    assert "left a higher count" in finding.innocent[0].ruled_out
    # AND pieces of any length say the same
    assert only(told(made.outcome.trace, "livelock", rows_max=50)).verdict == "probable"


def test_invalidations_that_wait_for_the_lock_when_the_recorder_is_killed_are_no_wrong_count(
    tmp_path,
):
    # GIVEN 64 vCPUs that fault, and take pages back: what waits in its start is counted, but not
    # written yet, and the trace stops there (seed 160 of the soak)
    made = make(tmp_path, kernel="6.1", scenario="balloon", vcpus=64, mem_bytes=2 << 20, seed=160,
                mmu="tdp", hostile=("truncate",))  # fmt: skip
    # THEN eight ends in a row that leave a higher count than the records accuse nobody
    assert accused(made.outcome.trace) == []


@pytest.mark.parametrize("scenario", ["storm", "balloon", "livelock"])
def test_invalidations_of_a_sane_kernel_are_counted_as_they_should(tmp_path, scenario):
    made = make(tmp_path, scenario=scenario, mem_bytes=4 << 20)
    assert not [f for f in told(made.outcome.trace, "livelock") if f.is_anomaly]


@pytest.mark.parametrize(
    ("kernel", "hostile", "knobs"),
    [
        # Two tails of the fault's own folio were prefetched and put, and their installs lost.
        ("6.1", "drop=0.1", {"vcpus": 4, "mem_bytes": 12 << 20, "seed": 4}),
        ("v9-mailed", "loss", {"vcpus": 2, "mem_bytes": 24 << 20, "seed": 2222588937339694779}),
    ],
)
def test_what_a_fault_put_may_have_been_prefetched_where_its_installs_are_lost(
    tmp_path, kernel, hostile, knobs
):
    # GIVEN faults that count more leaves than records show, and seem to put their page twice
    made = make(tmp_path, kernel=kernel, scenario="migration", mmu="shadow", hostile=(hostile,),
                **knobs)  # fmt: skip
    found = check_trace(made.outcome.trace, ["balance", "dead-mark"]).findings
    # THEN that is told, and proves nothing: no put but a kept reference is v9-mailed's
    shapes = {(one.detail["shape"], one.verdict) for one in found}
    assert ("double put", "inconclusive") in shapes
    assert {shape for shape, verdict in shapes if verdict != "inconclusive"} <= {"leak"}
