"""Replay: real recordings conform to the model of their kernel, doctored ones do not."""

from pathlib import Path

import numpy as np
import pytest
from unit.simkit import make
from unit.tracekit import Copy

from analysis.check import check_trace
from probes.errors import TraceFormatError, UsageError
from probes.facts import KernelFacts
from probes.wire import CALLS
from tracer.simulator.kernels import KERNELS, facts_of
from tracer.simulator.replay import conform, kernel_of, replay_lines

TRACES = Path(__file__).parent / "traces"
#: Beginnings of real recordings (their first thousands of records, none changed), for replays only.
CUT = TRACES / "replay"


# --- bad input ------------------------------------------------------------------------------------


def test_a_kernel_that_is_none_is_refused():
    with pytest.raises(UsageError, match=r"no such kernel; there are 6\.1"):
        conform(TRACES / "ttm-6.12.pfnt", other="5.4")


def test_a_model_that_is_none_is_refused():
    with pytest.raises(UsageError, match=r"--model 5\.4: no such kernel"):
        conform(TRACES / "ttm-6.12.pfnt", model="5.4")


def test_a_trace_that_lost_records_cannot_be_replayed(tmp_path):
    made = make(tmp_path, hostile=("drop",))
    with pytest.raises(TraceFormatError, match="a replay needs every record"):
        conform(made.path)


def test_a_generation_without_a_model_is_refused():
    with pytest.raises(UsageError, match="has no model; say --as"):
        kernel_of("unknown", KernelFacts())


# --- real kernels ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "7.3"])
@pytest.mark.parametrize(
    "workload",
    ["prime-", "ttm-", "replay/slots-", "replay/split-", "replay/dirty-shadow-"],
)
def test_real_recordings_conform(kernel, workload):
    # Given demand paging, TTM memory, memslots that come and go under a vCPU, huge pages that
    # dirty logging splits, and dirty logging without TDP, on three real kernels
    answer = conform(TRACES / f"{workload}{kernel}.pfnt")

    # Then the model explains every record
    assert answer.conforms, (answer.expected, answer.divergence)
    assert answer.explained == answer.records > 20
    assert next(replay_lines(answer)).startswith("conforms: ")


def test_a_pfn_cache_holds_its_page_for_a_moment_before_its_record(tmp_path):
    # Given a kernel whose puts no record shows, a fault on a page that a cache looks up just then
    made = make(tmp_path, kernel="v7", scenario="kvmclock", vcpus=3, mem_bytes=1 << 20,
                seed=2713057, mmu="tdp")  # fmt: skip
    answer = conform(made.path)
    assert answer.conforms, answer.expected


def test_a_fault_of_6_1_that_was_interrupted_before_its_look_is_retried_for_no_visible_reason(
    tmp_path,
):
    # Given an invalidation that ended after KVM took its snapshot, and before the recorder did at
    # the call of fault-in: then the retry shows equal sequences (the lab's 6.1 under load)
    made = make(tmp_path, kernel="6.1", scenario="storm", vcpus=2)
    copy = Copy.of(made.path)
    faults, ends = copy["FAULT"], copy["INVALIDATE"][copy.ops("INVALIDATE", "end")]
    retried = faults["ret"] == KERNELS["6.1"].result("retry")
    overtaken = retried & (faults["mmu_seq"] + 1 == faults["invalidate_seq"])
    assert np.count_nonzero(overtaken) > 3
    for at in np.flatnonzero(overtaken):
        began = int(faults["h"]["fault_ts"][at])
        ended = int(ends["h"]["ts"][ends["c"] == faults["invalidate_seq"][at]][0])
        faults["mmu_seq"][at] += 1
        faults["t_faultin"][at] = faults["t_gup"][at] = faults["t_faultin_end"][at] = ended - began

    # Then the model explains all of them
    assert conform(copy.write(tmp_path / "interrupted.pfnt")).conforms

    # And none whose look was before the invalidation ended
    faults["t_faultin"][overtaken] -= 1
    answer = conform(copy.write(tmp_path / "early.pfnt"))
    assert "no retry: nothing was invalidated" in answer.expected


def test_a_real_nested_guest_conforms():
    assert conform(TRACES / "nested-6.12.pfnt").conforms


def test_the_series_as_corrected_conforms():
    answer = conform(CUT / "series-v9-6.12.pfnt")
    assert (answer.kernel, answer.conforms) == ("v9", True), answer.expected


EARLY = CUT / "change-before-install-6.12.pfnt"


def test_the_record_of_an_install_may_come_behind_that_of_a_change_of_it():
    # Given vCPU 0 that changed a leaf 2.4 ms before the record of vCPU 1's install was written
    answer = conform(EARLY)
    assert answer.conforms and answer.explained == 600, answer.expected


@pytest.mark.parametrize("why", ["its own thread's", "a later fault's", "never written"])
def test_an_install_that_cannot_be_the_one_that_was_changed(tmp_path, why):
    # Given the same, but an install that was not under way when the change was written
    copy = Copy.of(EARLY)
    sptes = copy["SPTE"]
    (change,) = (row for row in sptes[copy.ops("SPTE", "change")] if row["gfn"] == 0x180)
    install = copy.ops("SPTE", "install") & (sptes["gfn"] == 0x180)
    if why == "its own thread's":
        sptes["h"]["tid"][install] = change["h"]["tid"]
    elif why == "a later fault's":
        sptes["h"]["fault_ts"][install] = change["h"]["ts"] + 1
    else:
        copy.drop("SPTE", install)
    # Then one of the two is wrong
    answer = conform(copy.write(tmp_path / "t.pfnt"))
    assert not answer.conforms and answer.divergence is not None


def test_a_nested_guest_under_the_series_conforms():
    # kvm_vcpu_unmap() of a page that was written marks it dirty before it puts it
    answer = conform(CUT / "series-v9-nested-6.12.pfnt", model="v9")
    assert answer.conforms, answer.expected


@pytest.mark.parametrize(
    ("name", "kind", "gfn", "expects"),
    [
        # The truths: what each changed KVM counted itself, tests/lab/kvm/.
        ("double-put-7.3", "RELEASE", 0x131, "the put of this generation, finish_fault"),
        ("leak-on-retry-6.12", "FAULT", 0x10002, "1 pfn_clean, not 0"),
        ("leak-prefetch-7.3", "SPTE", 0x102, "the put of the prefetched pfn 0x5ccf before"),
        ("put-wrong-page-6.12", "RELEASE", None, "the page that the fault mapped, pfn 0x11e37"),
        ("stale-install-6.12", "SPTE", 0x10002, "an invalidation had made it 1 by then"),
        ("replay/bug-zap-skipped-6.12", "INVALIDATE", None, "a zap of the leaf of gfn 0x163"),
        ("replay/bug-ro-spte-writable-6.12", "SPTE", 0x101, "nobody may write to the zero page"),
        ("replay/bug-pfnmap-ro-writable-6.12", "FAULT", 0x10000, "host's mapping is read-only"),
        ("replay/bug-vcpu-map-leak-7.3", "PIN", 0x116, "a kvm_vcpu_unmap() of it"),
        ("replay/bug-series-v9-as-mailed-6.12", "FAULT", 0x100, "a count of 2 at most"),
        ("replay/bug-series-v8-notdp-leak-6.12", "FAULT", 0x116, "a count of 2 at most"),
    ],
)
def test_recordings_of_wrong_kernels_diverge_at_the_first_wrong_record(name, kind, gfn, expects):
    # Given recordings of kernels with one change each, which logged what it did
    answer = conform(TRACES / f"{name}.pfnt")

    # Then the first record that is not explained is of the first page on which it happened
    assert not answer.conforms and answer.divergence is not None
    assert (answer.divergence["kind"], answer.divergence.get("gfn")) == (kind, gfn)
    assert expects in answer.expected
    assert answer.known_at > answer.explained


def test_a_leak_of_prefetched_pages_is_invisible_where_their_put_is_inlined():
    # On 6.12 direct_pte_prefetch_many() puts with an inline put_page(): neither a put nor its
    # absence makes a record, and counts of settled pages may have other holders.
    assert conform(TRACES / "leak-prefetch-6.12.pfnt").conforms


def test_a_replay_says_of_how_many_puts_nothing_is_known(tmp_path):
    # Given huge pages on a kernel whose put no record shows, and where it is missing
    made = make(tmp_path, kernel="v8", scenario="thp", mmu="shadow", bugs=("missing_put_shadow",),
                mem_bytes=8 << 20)  # fmt: skip
    answer = conform(made.path)
    # Then their counts prove nothing, and that is said
    assert answer.conforms and answer.unseen > 100
    told = list(replay_lines(answer))
    assert told[1].startswith(f"  Of {answer.unseen:,} faults on compound pages")
    assert max(map(len, told)) <= 80 and answer.to_json()["puts_unseen"] == answer.unseen
    # and of pages whose put has a record everything is known
    made = make(tmp_path, kernel="v9", scenario="thp", mem_bytes=8 << 20)
    assert conform(made.path).unseen == 0


def test_a_version_of_the_series_explains_its_own_bug_when_it_is_named():
    trace = CUT / "bug-series-v9-as-mailed-6.12.pfnt"
    assert conform(trace, model="v9-mailed").conforms
    corrected = conform(trace, model="v9")
    assert (corrected.explained, corrected.expected) == (3, "1 page_clean, not 0")


def test_an_install_is_found_wrong_by_its_faults_sequence_later(tmp_path):
    # Given a real fault of 6.12 whose snapshot was older than an invalidation before its install
    copy = Copy.of(CUT / "slots-6.12.pfnt")
    ends = copy["INVALIDATE"][copy.ops("INVALIDATE", "end")]
    moved = next(r for r in ends if r["c"] > 3)
    after = copy.fixed() & (copy["FAULT"]["h"]["fault_ts"] > moved["h"]["ts"])
    after &= copy["FAULT"]["sptes"] == 1
    one = np.flatnonzero(after)[0]
    copy["FAULT"]["mmu_seq"][one] = 1
    ts = copy["FAULT"]["h"]["fault_ts"][one]

    # Then its install is the first wrong record, known from the FAULT record behind it
    answer = conform(copy.write(tmp_path / "stale.pfnt"))
    assert answer.divergence is not None and answer.divergence["kind"] == "SPTE"
    assert answer.divergence["fault_ts"] == ts
    assert "no install: its fault began at mmu_seq 1" in answer.expected
    assert answer.known_at > answer.explained + 1


@pytest.mark.parametrize(
    ("there", "refused", "only_here", "only_there"),
    [("6.13", (1, 0), 0, 1), ("6.1", (1, 1), 0, 0), ("v9", (1, 0), 0, 1)],
)
def test_what_if_says_which_faults_another_kernel_would_refuse(
    there, refused, only_here, only_there
):
    # Given a guest of 6.12 that died of a TTM tail page, when another kernel is asked
    found = conform(TRACES / "ttm-6.12.pfnt", other=there).what_if
    assert found is not None

    # Then it says whether that page would have been mapped
    assert found.counts["faults_refused"] == refused
    assert (found.only_here, found.only_there) == (only_here, only_there)


def test_what_if_of_a_kernel_with_a_bug_says_that_the_table_is_of_its_rules(tmp_path):
    # Given a v9 that keeps references, which nobody may take for what v9's rules make of them
    made = make(tmp_path, kernel="v9", scenario="demand", bugs=("missing_put",))
    lines = list(replay_lines(conform(made.path, other="v11")))

    # Then each column has the name of the rules, and the words say what the table is not
    head = next(at for at, line in enumerate(lines) if "by the rules of" in line)
    assert lines[head].split()[-2:] == ["v9", "v11"]
    assert not any("recorded" in line for line in lines[head:])
    assert "broke the rules of v9" in " ".join(lines[head:])


def test_what_if_of_a_new_kernel_names_the_first_guest_frame_that_an_old_one_refuses():
    found = conform(TRACES / "ttm-7.3.pfnt", other="6.12").what_if
    assert found is not None
    assert found.counts["faults_refused"] == (0, 127)
    assert found.first_refusals[0] == (1, 0x10001)
    assert any("127 guest frames mapped by 6.13" in line for line in found.lines("6.13", "6.12"))
    # and marks only the two pages that it would have mapped, accessed and dirty each
    assert found.counts["marks_of_struct_pages"] == (0, 4)


# --- the model itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_each_model_explains_its_own_stories(tmp_path, kernel):
    assert kernel_of(KERNELS[kernel].generation, facts_of(KERNELS[kernel], 2)).name == (
        "v9" if kernel == "v9-mailed" else kernel  # which facts cannot tell apart
    )
    wrong = KERNELS[kernel].bugs  # as mailed: it explains its own bug only when it is named
    for scenario in ("balloon", "nested", "migration", "slots", "virtio_gpu"):
        made = make(tmp_path, kernel=kernel, scenario=scenario, mem_bytes=1 << 20, seed=4)
        answer = conform(made.path, model=kernel if wrong else "")
        assert answer.kernel == kernel
        assert answer.conforms, (scenario, answer.expected, answer.divergence)


@pytest.mark.parametrize("kernel", [name for name in KERNELS if not KERNELS[name].bugs])
def test_a_recording_that_begins_amid_faults_and_invalidations_conforms(tmp_path, kernel):
    # Given a guest that runs already, and recorders that are armed at any moment of its work
    under_way = working = 0
    for scenario in ("balloon", "storm", "nested", "demand"):
        for seed, share in enumerate((0.23, 0.33, 0.43, 0.53)):
            made = make(tmp_path, kernel=kernel, scenario=scenario, mem_bytes=1 << 20, vcpus=3,
                        seed=seed, hostile=(f"late={share}",))  # fmt: skip
            sptes, ranges = made.rows("SPTE"), made.rows("INVALIDATE")
            under_way += any(r["op"] == "install" and r["cause"] == "other" for r in sptes)
            working += bool(ranges and ranges[0]["in_progress"] > (ranges[0]["op"] == "start"))
            # When it is replayed and checked
            answer = conform(made.path)
            # Then what was begun before is no wrong record, and nobody is accused
            assert answer.conforms, (scenario, seed, answer.expected, answer.divergence)
            found = check_trace(made.path).findings
            assert not [f for f in found if f.verdict in ("definite", "probable")]
    assert under_way and working


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "v9"])
def test_puts_of_nobody_do_not_conform_in_an_old_vm_either(tmp_path, kernel):
    # Given the same, but a thread that puts and puts, and never faults
    made = make(tmp_path, kernel=kernel, scenario="demand", hostile=("late=0.3",))
    copy = Copy.of(made.path)
    assert conform(made.path).conforms
    one = copy["RELEASE"][copy["RELEASE"]["h"]["fault_ts"] > 0][:1].copy()
    one["h"]["fault_ts"], one["h"]["vcpu"], one["h"]["tid"], one["h"]["vm"] = 0, -1, 77, 0
    many = np.repeat(one, 21)
    many["h"]["seq"] += np.arange(21, dtype="u4") + (1 << 30)
    copy["RELEASE"] = np.concatenate([copy["RELEASE"], many])
    answer = conform(copy.write(tmp_path / "t.pfnt"))
    assert not answer.conforms and "a put outside of faults" in answer.expected


@pytest.mark.parametrize(
    ("bug", "scenario", "expects"),
    [
        ("missing_put", "demand", "1 pfn_clean, not 0"),
        ("double_put", "demand", "no second put"),
        ("put_on_wrong_folio", "dax", "the put of the page that fault-in found"),
        ("stale_spte", "balloon", "before range_start returns"),
        ("stale_sequence", "demand", "no install: its fault began at mmu_seq"),
        ("vcpu_map_leak", "nested", "a kvm_vcpu_unmap() of it"),
        ("unpaired_start", "balloon", "mmu_invalidate_in_progress 0"),
        ("wrong_gfn", "demand", "a memslot around this gfn"),
    ],
)
def test_a_bug_is_a_divergence_and_both_sides_are_told(tmp_path, bug, scenario, expects):
    made = make(tmp_path, bugs=(bug,), scenario=scenario, mem_bytes=4 << 20)
    answer = conform(made.path)
    assert not answer.conforms
    assert expects in answer.expected
    told = list(replay_lines(answer))
    assert told[0].startswith("diverges at record ")
    words = [line.split()[0] for line in told[1:]]
    assert words.index("recorded") < words.index("expected") < words.index("model")
    assert max(map(len, told)) <= 80
    found = answer.to_json()
    assert found["records"] > found["explained"]
    assert found["first_divergence"]["expected"] == answer.expected


def test_a_recording_without_a_record_says_so(tmp_path):
    # Given a recorder that was armed when all was over: complete, and empty
    made = make(tmp_path, scenario="dax", mem_bytes=1 << 20, seed=3, hostile=("late=1",))
    answer = conform(made.path)
    assert answer.records == 0 and not answer.conforms
    lines = list(replay_lines(answer))
    assert (
        lines[0] == "nothing to replay: the recording is complete and holds no record"
        and len(lines) == 2
    )


def test_json_names_what_was_recorded_and_the_model_it_is_held_against(tmp_path):
    found = conform(make(tmp_path, kernel="6.13").path, model="v7").to_json()
    assert (found["recorded"], found["kernel"]) == ("7.3.0-sim", "v7")


def test_the_ragged_end_of_a_killed_recording_is_not_judged_and_does_not_conform(tmp_path):
    made = make(tmp_path, scenario="balloon", hostile=("truncate",))
    answer = conform(made.path)
    assert answer.unjudged == answer.records and answer.divergence is None
    assert not answer.conforms and not answer.to_json()["conforms"]
    told = list(replay_lines(answer))
    assert told[0] == f"stops early: 0 of {answer.records:,} records explained, none wrong"
    assert max(map(len, told)) <= 80


@pytest.mark.parametrize("share", [0.05, 0.3, 0.8, 0.999])
def test_a_recording_that_was_cut_does_not_conform_wherever_that_was(tmp_path, share):
    # Given a sound recording of which the end is missing
    made = make(tmp_path, scenario="demand", mem_bytes=8 << 20)
    assert conform(made.path).conforms
    data = made.path.read_bytes()
    cut = tmp_path / "cut.pfnt"
    cut.write_bytes(data[: int(len(data) * share)])

    # Then a replay of it fails, and accuses nobody
    answer = conform(cut)
    assert not answer.conforms and answer.divergence is None
    assert answer.explained + answer.unjudged == answer.records
    assert next(replay_lines(answer)).startswith("stops early: ")


@pytest.mark.parametrize("count", [1, 0])
def test_a_mark_after_the_put_is_the_first_wrong_record_of_a_7_3(tmp_path, count):
    # Given a real 7.3 whose faults put their page, and one of them that marks it afterwards
    copy = Copy.of(TRACES / "prime-7.3.pfnt")
    puts = np.flatnonzero(copy.calls("finish_fault"))
    late = np.zeros(len(copy["RELEASE"]), bool)
    late[puts[20]] = True
    first = copy["RELEASE"][puts[20]]
    copy.again("RELEASE", late, cause=CALLS.index("mark_dirty"),
               page__refcount=first["page"]["refcount"] - count)  # fmt: skip

    # When it is replayed, then that record is where the model leaves; but for the mark that
    # kvm_release_page_dirty() makes before it puts, at the count before the put
    answer = conform(copy.write(tmp_path / "t.pfnt"))
    assert answer.conforms == (count == 0), answer.expected
    if count:
        assert answer.expected == "no mark_dirty when the fault has put the page"
        assert answer.divergence is not None and answer.divergence["pfn"] == first["pfn"]
