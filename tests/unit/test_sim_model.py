"""What each generation does with a page, as stories: one fault, one zap, one refusal at a time."""

from collections import Counter
from itertools import pairwise

import pytest
from unit.simkit import make
from unit.simtruth import differences

from analysis.check import check_trace
from tracer.simulator.kernels import KERNELS, REFCOUNTED_BIT
from tracer.simulator.replay import conform

#: Where the reference goes back, and what can be seen of it (KVM-FACTS 0.1).
PUT_RECORD = {
    "6.1": "pfn_clean", "6.12": "pfn_clean", "v7": None, "v8": None, "v9-mailed": None,
    "v9": "page_clean", "v10": None, "v11": None, "6.13": "finish_fault",
}  # fmt: skip


def first_write(made):
    """Return the first fault that mapped a page with a count."""
    return next(f for f in made.faults() if f["result"] == "fixed" and f["faultin_ret"] == 0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_a_fault_gives_its_reference_back_as_its_generation_does(tmp_path, kernel):
    # Given demand paging on a kernel
    made = make(tmp_path, kernel=kernel, mem_bytes=1 << 20)
    fault = first_write(made)
    chain = made.chain(fault)

    # When one fault is looked at: install, what can be seen of the put, and the fault itself
    puts = [r["call"] for r in chain if r["kind"] == "RELEASE" and r["call"] != "mark_accessed"]

    # Then the put is where the generation has it, and the count is right at both moments
    expected = PUT_RECORD[kernel]
    assert puts == ([expected] if expected else [])
    assert chain[0]["kind"] == "SPTE" and chain[-1]["kind"] == "FAULT"
    held = 0 if KERNELS[kernel].put == "faultin" else 1
    assert fault["refcount"] == chain[0]["refcount"] == 2 + held
    leak = 1 if KERNELS[kernel].put == "never" else 0
    assert fault["refcount_end"] == 2 + leak


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_a_zap_marks_and_what_the_spte_says(tmp_path, kernel):
    made = make(tmp_path, kernel=kernel, mem_bytes=1 << 20)
    marks = Counter(r["call"] for r in made.rows("RELEASE") if r["fault_ts"] is None)
    zaps = sum(r["op"] == "zap" for r in made.rows("SPTE"))
    if KERNELS[kernel].zap_marks == "none":
        assert not marks
    else:
        assert marks == {"mark_dirty": zaps, "mark_accessed": zaps}
    bit = {bool(r["new"] & REFCOUNTED_BIT) for r in made.rows("SPTE") if r["op"] == "install"}
    assert bit == {KERNELS[kernel].generation == "G1"}


def test_only_a_slot_whose_deletion_takes_seconds_counts_as_planted(tmp_path):
    # Given memslots that come and go in milliseconds, and a bug that hardly ever strikes
    made = make(tmp_path, scenario="slots", vcpus=5, mem_bytes=8 << 20, seed=938185,
                bugs=("invalid_slot=0.000001",))  # fmt: skip
    assert any(fault["result"] == "retry" for fault in made.faults())
    assert made.truth("bugs") == []


def test_a_stale_fault_that_maps_nothing_is_no_bug(tmp_path):
    # Given a fault whose sequence is stale, and a vCPU that has mapped its 2M leaf meanwhile
    made = make(tmp_path, kernel="v9", scenario="thp", mmu="tdp", vcpus=8, mem_bytes=4 << 20,
                seed=182137, bugs=("stale_sequence",))  # fmt: skip
    planted = {row["fault_ts"] for row in made.truth("bugs")}
    mapped = {row["fault_ts"] for row in made.faults() if row["sptes"]}
    assert planted <= mapped


@pytest.mark.parametrize(
    ("kernel", "scenario", "seed"), [("v11", "snapshot", 421938537), ("6.13", "demand", 1)]
)
def test_no_page_is_handed_out_before_it_is_freed(tmp_path, kernel, scenario, seed):
    # Given vCPUs that run ahead of one another by a step, one of which frees what another wants
    made = make(tmp_path, kernel=kernel, scenario=scenario, mem_bytes=8 << 20, vcpus=4, seed=seed,
                bugs=("stale_sequence",))  # fmt: skip
    free = set()
    for row in made.rows("PAGE_FREE", "PAGE_ALLOC"):
        if row["kind"] == "PAGE_FREE":
            free.add(row["pfn"])
        else:
            assert row["pfn"] in free, row
            free.remove(row["pfn"])


@pytest.mark.parametrize("kernel", KERNELS)
def test_memory_of_ttm_whose_tails_nobody_counts(tmp_path, kernel):
    # Given a blob of TTM: blocks of eight pages, of which the first has count 1, the others 0
    made = make(tmp_path, kernel=kernel, scenario="virtio_gpu")
    walked = [f for f in made.faults() if f["walk_pfn"] is not None]
    results = Counter(f["result"] for f in walked)

    # Then 6.1 and 6.12 refuse the tails (the series' subject), all others map them
    if KERNELS[kernel].pfnmap == "unless_zero":
        refused = [f for f in walked if f["result"] == "error"]
        assert refused and all((f["ret"], f["refcount"]) == (-14, 0) for f in refused)
        assert all(f["pfn"] == 0x7FF << 52 for f in refused)
        if kernel == "6.1":
            assert {f["faultin_ret"] for f in refused} == {0}
    else:
        assert results["error"] == 0
        first = 2 if KERNELS[kernel].put == "never" else 1  # the block's first page, by accident
        assert {0, first} == {f["refcount_end"] for f in walked}


def test_without_tdp_v10_refuses_what_it_cannot_count(tmp_path):
    faults = make(tmp_path, kernel="v10", scenario="virtio_gpu", mmu="shadow").faults()
    refused = [f for f in faults if f["result"] == "error"]
    assert refused and all(f["refcount"] == 0 for f in refused)


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "6.13"])
def test_an_invalidation_zaps_before_it_returns_and_frees_after_it_ends(tmp_path, kernel):
    # Given ballooning
    made = make(tmp_path, kernel=kernel, scenario="balloon")
    rows = [r for r in made.rows() if r["kind"] in ("SPTE", "INVALIDATE", "PAGE_FREE")]

    # Then every zap by the notifier lies before the start record of its task, and the sequence
    # moves by one at each end
    host = [r for r in rows if r["fault_ts"] is None and r["tid"] in (1001, 1002)]
    sequences = [r["invalidate_seq"] for r in made.rows("INVALIDATE") if r["op"] == "end"]
    assert sorted(sequences) == list(range(1, len(sequences) + 1))
    for before, after in pairwise(host):
        if before["tid"] == after["tid"] and before.get("cause") == "notifier":
            assert after.get("cause") == "notifier" or after["op"] == "start"
    mapped: set[int] = set()
    for row in rows:
        if row["kind"] == "SPTE":
            (mapped.add if row["op"] == "install" else mapped.discard)(row["pfn"])
        elif row["kind"] == "PAGE_FREE":
            assert row["pfn"] not in mapped or row["pfn"] == 0xBAB3A


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "6.13"])
def test_faults_that_an_invalidation_overtook_are_tried_again(tmp_path, kernel):
    made = make(tmp_path, kernel=kernel, scenario="storm", vcpus=3)
    retried = [f for f in made.faults() if f["result"] == "retry"]
    assert retried
    for fault in retried:
        assert fault["sptes"] == 0
    inside = {f["faultin_ret"] for f in retried}
    # Since d02c357e5bfa the fault-in function itself looks for invalidations.
    assert (1 in inside) == KERNELS[kernel].lockless_retry


def test_dirty_logging_protects_and_fast_faults_give_access_back(tmp_path):
    made = make(tmp_path, scenario="migration", mem_bytes=4 << 20)
    changes = [r for r in made.rows("SPTE") if r["op"] == "change"]
    protected = [r for r in changes if r["cause"] == "dirty_log"]
    given_back = [r for r in changes if r["cause"] == "fast"]
    assert protected and given_back
    assert all(r["old"] & 2 and not r["new"] & 2 for r in protected)
    assert all(r["new"] & 2 and r["sptep"] for r in given_back)
    fast = [f for f in made.faults() if f["faultin_ret"] == -1]
    assert fast and all(f["page_bits"] is None and f["hva"] is None for f in fast)


def test_huge_pages_are_mapped_at_once_and_counted_on_their_head(tmp_path):
    made = make(tmp_path, scenario="thp", mem_bytes=4 << 20)
    large = [r for r in made.rows("SPTE") if r["level"] == 2 and r["op"] == "install"]
    assert large
    assert all(r["gfn"] % 512 == 0 and r["pfn"] % 512 == 0 and r["page_order"] == 9 for r in large)
    tails = [f for f in made.faults() if f["page_bits"] == 3]
    assert tails and all(f["pfn"] % 512 for f in tails)


def test_the_shadow_mmu_prefetches_and_has_an_entry_for_each_address(tmp_path):
    made = make(tmp_path, scenario="nested")
    leaves = made.rows("SPTE")
    assert all(r["sptep"] for r in leaves)
    assert any(r["cause"] == "prefetch" for r in leaves)
    several = Counter(r["gfn"] for r in leaves if r["op"] == "install" and r["cause"] == "fault")
    assert max(several.values()) > 1


@pytest.mark.parametrize(("kernel", "bias"), [("6.1", 1), ("6.13", 1024)])
def test_a_pin_is_a_reference_or_follow_pin_s_bias(tmp_path, kernel, bias):
    pins = make(tmp_path, kernel=kernel, scenario="nested").rows("PIN")
    assert Counter(p["op"] for p in pins)["map"] == Counter(p["op"] for p in pins)["unmap"]
    # At its end a pin may be all that is left of a page that the host took back meanwhile.
    assert all(p["refcount"] > bias - (p["op"] == "unmap") for p in pins)


def test_a_read_finds_the_zero_page_and_a_write_copies_it(tmp_path):
    made = make(tmp_path, scenario="idle")
    zero = [f for f in made.faults() if f["page_bits"] == 25]
    assert zero and not any(f["writable"] for f in zero)
    inside = [r for r in made.rows("INVALIDATE") if r["fault_ts"] is not None]
    assert inside, "the copy invalidates the old page within the fault that writes"


def test_a_slot_that_goes_takes_every_leaf_with_it(tmp_path):
    made = make(tmp_path, scenario="slots", mem_bytes=4 << 20)
    ops = Counter(r["op"] for r in made.rows("SLOT"))
    assert ops["create"] >= 5 and ops["delete"] >= 3 and ops["move"] == 2
    assert sum(r["cause"] == "slot" for r in made.rows("SPTE")) > 100


def test_references_are_in_the_ledger_and_balance(tmp_path):
    made = make(tmp_path, scenario="nested", kernel="6.12")
    references = made.truth("references")
    assert {r["taker"] for r in references} == {"fault", "prefetch", "pin"}
    assert all(r["put_ts"] is not None and r["put_pfn"] == r["pfn"] for r in references)
    leaked = make(tmp_path, kernel="v9-mailed").truth("references")
    assert all(r["put_ts"] is None for r in leaked)


def test_a_vm_that_is_still_there_at_the_end_leaves_lives_open(tmp_path):
    scenario = tmp_path / "open.toml"
    scenario.write_text(
        "title='x'\nexit=false\n[[memory]]\nname='a'\nkind='anon'\ngfn=1\nshare=1.0\n"
        "[[phase]]\ntouch={memory='a'}\n"
    )
    made = make(tmp_path, scenario=str(scenario))
    assert {life["ended_by"] for life in made.truth("lives")} == {"censored"}
    assert not [r for r in made.rows("SPTE") if r["op"] == "zap"]


# --- large leaves, and pages that KVM maps for itself ---------------------------------------------


@pytest.mark.parametrize("kernel", ["6.12", "6.13"])
def test_dirty_logging_splits_large_leaves_in_place_and_makes_them_whole_again(tmp_path, kernel):
    # Given 2M leaves, when dirty logging protects them and ends
    made = make(tmp_path, kernel=kernel, scenario="migration", mem_bytes=8 << 20)
    leaves = made.rows("SPTE")
    split = [r for r in leaves if r["level"] == 2 and r["op"] == "zap" and r["new"] & 1 << 11]
    assert split and not any(r["new"] & 1 << 7 for r in split), "a table comes in its place"

    # Then the pieces live without an install of their own
    pieces = [life for life in made.truth("lives") if life["birth_cause"] == "split"]
    assert len(pieces) == 512 * len(split)
    assert {(p["level"], p["refcount_birth"], p["ended_by"]) for p in pieces} == {
        (1, None, "collapse")
    }

    # And end with the frozen value, behind a large leaf in place where the kernel does that
    back = [r for r in leaves if r["op"] == "install" and r["level"] == 2 and r["cause"] == "slot"]
    assert len(back) == (len(split) if KERNELS[kernel].recovers_in_place else 0)
    assert all(r["old"] & 1 << 11 and not r["old"] & 1 << 7 for r in back)
    frozen = [r for r in leaves if r["op"] == "zap" and r["new"] == KERNELS[kernel].frozen]
    assert len(frozen) == len(pieces)


def test_pages_of_1g_are_mapped_by_one_leaf(tmp_path):
    made = make(tmp_path, scenario="gigantic")
    large = [r for r in made.rows("SPTE") if r["level"] == 3 and r["op"] == "install"]
    assert large and all(r["gfn"] % (1 << 18) == r["pfn"] % (1 << 18) == 0 for r in large)
    assert {r["page_order"] for r in large} == {18}
    inside = [f for f in made.faults() if f["gfn"] >= 0x100000 and f["result"] == "fixed"]
    assert {f["level"] for f in inside} == {3}


@pytest.mark.parametrize(
    ("kernel", "put"), [("6.1", "pfn_clean"), ("6.12", "pfn_clean"), ("6.13", "page_clean")]
)
def test_a_pfn_cache_holds_no_reference_and_is_refreshed_when_the_host_took_its_page(
    tmp_path, kernel, put
):
    made = make(tmp_path, kernel=kernel, scenario="pfncache", mem_bytes=8 << 20)
    tasks = {r["tid"] for r in made.rows("PIN")}
    assert {r["op"] for r in made.rows("PIN")} == {"refresh"} and len(tasks) == 1
    puts = [r["call"] for r in made.rows("RELEASE") if r["tid"] in tasks and not r["fault_ts"]]
    assert len(made.rows("PIN")) > 4, "four caches, each invalidated sometimes"
    assert puts.count(put) >= len(made.rows("PIN"))
    references = [r for r in made.truth("references") if r["taker"] == "pfncache"]
    assert references and all(r["put_pfn"] == r["pfn"] for r in references)


def test_a_count_that_stays_up_does_not_keep_a_pfn_cache_from_its_page(tmp_path):
    # Given an invalidation that ends, and is counted as in progress for ever: faults retry, and
    # mmu_notifier_retry_cache() (virt/kvm/pfncache.c) looks at mn_active_invalidate_count instead
    made = make(tmp_path, scenario="kvmclock", bugs=("unpaired_start",), mem_bytes=4 << 20)
    # Then caches still find their pages
    stuck = min(r["ts"] for r in made.truth("bugs"))
    assert [r for r in made.rows("PIN") if r["ts"] > stuck]


@pytest.mark.parametrize("kernel", ["6.1", "v9", "6.13"])
@pytest.mark.parametrize("scenario", ["gigantic", "pfncache", "kvmclock", "migration"])
def test_these_lives_are_the_ledgers_and_nothing_is_found(tmp_path, kernel, scenario):
    made = make(tmp_path, kernel=kernel, scenario=scenario, mem_bytes=8 << 20, seed=3)
    assert differences(made.outcome) == []
    assert not [f.title for f in check_trace(made.path).findings if f.is_anomaly]
    answer = conform(made.path)
    assert answer.conforms, (answer.expected, answer.divergence)
