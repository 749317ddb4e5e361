"""What findings call things: functions by the kernel's own names, pages by what they are, rules."""

import numpy as np
import pytest
from unit.simkit import make
from unit.tracekit import Copy, only, shipped, told

from analysis.check import check_trace
from analysis.checktext import check_lines
from analysis.detectors.common import function_of
from analysis.recording import open_recording
from probes import wire
from tracer.tracefile import TraceReader


def recorded(path):
    with TraceReader(path) as reader:
        return open_recording(reader)


# --- functions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "call", "function"),
    [
        ("6.12", "pfn_clean", "kvm_release_pfn_clean"),
        ("6.12", "mark_dirty", "kvm_set_pfn_dirty"),
        ("7.3", "finish_fault", "kvm_mmu_finish_page_fault"),
        ("7.3", "page_dirty", "kvm_release_page_dirty"),
        # It has no such function, nor is there such a call.
        ("7.3", "pfn_clean", ""),
        ("7.3", "mark_dirty", ""),
        ("6.12", "none", ""),
        ("6.12", "what is this", ""),
    ],
)
def test_a_call_is_named_as_the_recorder_found_it_in_the_kernel(kernel, call, function, tmp_path):
    copy = shipped(f"prime-{kernel}")
    assert function_of(recorded(copy.write(tmp_path / "x.pfnt")), call) == function


def test_a_hook_that_failed_names_no_function(tmp_path):
    copy = shipped("prime-6.12")
    copy.unhook("release_pfn_clean")
    assert function_of(recorded(copy.write(tmp_path / "x.pfnt")), "pfn_clean") == ""


@pytest.mark.parametrize("kernel", ["v7", "v9", "v10", "v11"])
def test_the_series_marks_by_the_functions_that_it_exports(tmp_path, kernel):
    recording = recorded(make(tmp_path, kernel=kernel, scenario="idle").path)
    names = [function_of(recording, call) for call in ("mark_accessed", "mark_dirty")]
    assert names == ["kvm_set_page_accessed", "kvm_set_page_dirty"]


def test_marks_at_count_0_name_all_functions_that_made_them(tmp_path):
    # GIVEN pages of the series that were zapped and marked when nobody counted them any more
    made = make(tmp_path, kernel="v9", scenario="balloon", bugs=("double_put",), mem_bytes=4 << 20)
    copy = Copy.of(made.path)
    calls = {wire.CALLS[call] for call in copy["RELEASE"]["cause"][
        (copy["RELEASE"]["page"]["refcount"] <= 0) & (copy["RELEASE"]["cause"] >= 6)]}  # fmt: skip
    assert calls
    found = {f.detail["shape"]: f for f in told(made.path, "dead-mark")}
    # THEN one finding is of the marks, one of the zaps, and a program can tell which
    assert set(found) == {"marked at count 0", "zapped at count 0"}
    marks = {"mark_accessed": "kvm_set_page_accessed", "mark_dirty": "kvm_set_page_dirty"}
    assert set(found["marked at count 0"].functions) == {marks[call] for call in calls}
    assert found["zapped at count 0"].functions == tuple(marks.values())


# --- pages ----------------------------------------------------------------------------------------


def words(path, label):
    return [line.split(None, 1)[1] for line in check_lines(check_trace(path))
            if line.startswith(f"  {label} ")]  # fmt: skip


def marked_at_0(page_bits):
    """Return a recording in which a page of some kind is marked when its count is 0."""
    copy = shipped("prime-6.12")
    pfn = copy["SPTE"]["pfn"][copy.ops("SPTE", "install")][3]
    for kind in ("SPTE", "RELEASE", "FAULT"):
        copy[kind]["page"]["bits"][copy[kind]["pfn"] == pfn] = page_bits
    mark = copy.calls("mark_accessed") & (copy["RELEASE"]["pfn"] == pfn)
    copy["RELEASE"]["page"]["refcount"][mark] = 0
    return copy


@pytest.mark.parametrize(
    ("bits", "page_class", "said"),
    [
        (("has_struct", "reserved", "zero"), "zero page", "the host's zero page"),
        (("has_struct", "zone_device"), "zone device", "ZONE_DEVICE"),
        (("has_struct", "head"), "counted, compound", "compound page"),
        (("has_struct",), None, None),
    ],
)
def test_a_page_that_is_not_like_any_is_called_what_it_is(tmp_path, bits, page_class, said):
    copy = marked_at_0(sum(wire.PAGE_BITS[bit] for bit in bits))
    path = copy.write(tmp_path / "x.pfnt")
    finding = only(told(path, "dead-mark"))
    assert finding.detail.get("page_class") == page_class
    assert finding.to_json()["detail"].get("page_class") == page_class
    told_of = words(path, "page")
    assert (said in told_of[0]) if said else not told_of


def test_the_zero_page_that_faults_keep_is_called_so(tmp_path):
    made = make(tmp_path, kernel="v9", scenario="idle", bugs=("zero_page_growth",),
                mem_bytes=8 << 20)  # fmt: skip
    finding = only(told(made.path, "balance"))
    assert finding.detail["page_class"] == "zero page"
    assert any("shared by all who read" in line for line in words(made.path, "page"))


# --- rules ----------------------------------------------------------------------------------------


def test_without_tdp_v10_has_no_room_to_say_who_is_not_counted(tmp_path):
    # GIVEN the series without TDP, which refuses a driver's uncounted pages
    made = make(tmp_path, kernel="v10", scenario="virtio_gpu", mmu="shadow")
    finding = only([f for f in check_trace(made.path).findings if f.detector == "refused"])
    # THEN that is explained by the bit that shadow paging has no room for, and nothing else
    assert finding.verdict == "explained" and "have count 0" in finding.title
    assert "SPTE_MMU_PAGE_REFCOUNTED is there with TDP only" in finding.rule
    assert finding.functions == ("hva_to_pfn_remapped",)
    assert finding.innocent[0].ruled_out.endswith("or load kvm with TDP")
    assert finding.detail["shape"] == "uncounted"


def test_with_tdp_v10_maps_them(tmp_path):
    made = make(tmp_path, kernel="v10", scenario="virtio_gpu", mmu="tdp")
    assert not told(made.path, "refused")


def test_the_flag_of_the_series_is_told_in_its_own_words(tmp_path):
    # GIVEN v7 to v9, whose faults say that they hold a page that nobody counts
    copy = shipped("prime-6.12")
    copy.generation("G1", kvm_page_fault=("is_refcounted_page",))
    copy["FAULT"]["refcounted"] = 1
    copy["FAULT"]["page"]["refcount"][3] = 0
    finding = only(told(copy.write(tmp_path / "x.pfnt"), "refcounted-flag"))
    # THEN it is told of a member and a function that these versions have
    assert finding.detail["shape"] == "uncounted" and finding.functions == ("hva_to_pfn",)
    assert "is_refcounted_page" in finding.rule and "kvm_resolve_pfn" not in finding.rule


# --- what a program can tell apart ----------------------------------------------------------------


def test_findings_of_one_detector_about_different_things_have_different_shapes(tmp_path):
    # GIVEN pages marked at count 0, and faults that mark their page after they put it
    copy = shipped("prime-6.12")
    late = copy.calls("mark_accessed") & (np.arange(len(copy["RELEASE"])) % 50 == 0)
    copy["RELEASE"]["page"]["refcount"][late] = 0
    copy.again("RELEASE", copy.calls("pfn_clean"), cause=wire.CALLS.index("mark_dirty"))
    copy["FAULT"]["h"]["ts"] += np.uint64(2000)
    result = check_trace(copy.write(tmp_path / "x.pfnt"), ["dead-mark"]).to_json()
    shapes = {finding["detail"]["shape"]: finding["functions"] for finding in result["findings"]}
    # THEN each says which it is, and names the function of its own marks
    assert shapes == {
        "marked at count 0": ["kvm_set_pfn_accessed"],
        "marked after put": ["kvm_set_pfn_dirty"],
    }
