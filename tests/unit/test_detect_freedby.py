"""Who freed a page that a guest still maps: KVM's own put, a drain of LRU batches, its owner."""

import copy as copying

import numpy as np
import pytest
from unit.mapkit import GENERATIONS, ask, only, page, reclaim
from unit.simkit import make
from unit.tracekit import Copy, told

from analysis.check import check_trace
from analysis.detectors.freed import settled
from analysis.detectors.freedby import DRAIN, OTHER, PUT, Stacks, kvm_function
from analysis.findings import Finding
from probes import wire

NAME = "use-after-free"
#: As real kernels recorded them, the tracer's own frames included.
TRACING = ["bpf_prog_48b8ce2e_raw_tail_free+0x676 [bpf]", "bpf_trace_run2+0x86 [kernel]",
           "__traceiter_mm_page_free+0x30 [kernel]"]  # fmt: skip
HOST_FAULT = ["do_anonymous_page+0x4ce [kernel]", "__handle_mm_fault+0xb14 [kernel]",
              "get_user_pages_unlocked+0xe6 [kernel]", "hva_to_pfn+0xb1 [kvm]",
              "bpf_trampoline_45097272771+0x99 [bpf]", "kvm_faultin_pfn+0x129 [kvm]"]  # fmt: skip
DRAINED = {
    "6.12": ["free_unref_folios+0x3bf [kernel]", "folios_put_refs+0x11f [kernel]",
             "folio_batch_move_lru+0xcb [kernel]", "__folio_batch_add_and_move+0x56 [kernel]"],
    "7.3": ["free_unref_folios+0x236 [kernel]", "folio_batch_move_lru+0x236 [kernel]"],
    "6.1": ["free_unref_page_list+0x10a [kernel]", "release_pages+0x1b1 [kernel]",
            "__pagevec_lru_add+0x2d4 [kernel]", "folio_add_lru+0x5d [kernel]"],
}  # fmt: skip
STACKS = {
    # The put itself was left by a tail call, and shows on none of them.
    "6.12 put": (["free_unref_page+0x217 [kernel]", "kvm_tdp_page_fault+0xde [kvm]"], PUT),
    "7.3 put": (["__free_frozen_pages+0x26c [kernel]", "kvm_tdp_page_fault+0xcb [kvm]"], PUT),
    "v11 retry": (["free_unref_page+0x217 [kernel]", "bpf_trampoline_450972+0x81 [bpf]",
                   "kvm_faultin_pfn.isra.0+0x27e [kvm]"], PUT),
    "vendor": (["__folio_put+0x10 [kernel]", "nested_unmap+0x2 [kvm_intel]"], PUT),
    "built in": (["__folio_put+0x10 [kernel]", "kvm_release_page_clean+0x2 [kernel]"], PUT),
    **{f"{k} drain": ([*frames, *HOST_FAULT], DRAIN) for k, frames in DRAINED.items()},
    # KVM marks a page accessed, which drains a batch with pages of others.
    "mark": ([*DRAINED["6.12"], "folio_activate+0x8 [kernel]",
              "kvm_release_pfn_clean+0x9c [kvm]"], DRAIN),
    "driver": (["__free_pages_ok+0x1ed [kernel]", "lab_write+0xe7 [lab_pages]",
                "vfs_write+0xf5 [kernel]"], OTHER),
    "exit": (["free_unref_folios+0x3bf [kernel]", "folios_put_refs+0x11f [kernel]",
              "free_pages_and_swap_cache+0x10f [kernel]", "exit_mmap+0xf6 [kernel]"], OTHER),
    "host's fault": (["__folio_put+0x4 [kernel]", *HOST_FAULT], OTHER),
    "a batch of KVM's": (["release_pages+0x1 [kernel]", "kvm_free+0x9 [kvm]"], OTHER),
    "no frames": ([], OTHER),
    "no list": (17, OTHER),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
def test_a_stack_says_who_freed(name):
    frames, way = STACKS[name]
    if isinstance(frames, list):
        frames = [*TRACING, *frames]
    stacks = Stacks([{"what": "else"}, {"stack": "x"}, {"stack": 7, "frames": frames}])
    assert stacks.ways(np.array([7, 8, -1], np.int32)).tolist() == [way, OTHER, OTHER]
    assert not any("bpf" in frame for frame in stacks.frames[7])


def test_kvms_function_is_named_without_what_the_compiler_appended():
    frames, _ = STACKS["v11 retry"]
    assert kvm_function(Stacks([{"stack": 1, "frames": frames}]).frames[1]) == "kvm_faultin_pfn"


def later_fault(copy, one):
    """Return a fault after the birth of a page, of the same thread, and a moment inside it."""
    faults = copy["FAULT"]
    after = np.flatnonzero(faults["h"]["fault_ts"] > one.born)
    row = faults[after[np.argmin(faults["h"]["ts"][after])]]
    return row, int(row["h"]["fault_ts"]) + 1


def free(copy, fault, ts, pfn, **more):
    """Let the thread of a fault free a page."""
    head = fault["h"]
    copy.add("PAGE_FREE", h__ts=ts, h__tid=head["tid"], h__vm=1, h__cpu=head["cpu"], pfn=pfn,
             page__bits=1, **more)  # fmt: skip


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_drain_in_a_later_fault_is_not_kvms_put(kernel, tmp_path):
    # Given a page that is freed while mapped, by a drain of an LRU batch in a later fault
    copy = reclaim(kernel)
    one = page(copy)
    fault, inside = later_fault(copy, one)
    copy.notes.append((one.born, {"stack": 9, "frames": [*DRAINED[kernel], *HOST_FAULT]}))
    free(copy, fault, inside + 1, one.pfn, h__stack=9)
    # And a put of it right before, which cannot have freed it
    put = np.isin(copy["RELEASE"]["cause"], [1, 5])
    copy.add("RELEASE", h__ts=inside, h__tid=fault["h"]["tid"], h__vm=1, h__cpu=fault["h"]["cpu"],
             h__fault_ts=fault["h"]["fault_ts"], cause=copy["RELEASE"]["cause"][put][0],
             pfn=one.pfn, page__bits=1, page__refcount=1)  # fmt: skip
    # When it is checked
    finding = only(ask(copy, tmp_path, NAME))
    # Then the free is proven, and nobody is accused of it who only came by
    assert finding.verdict == "definite" and finding.gfns == ((one.gfn, one.gfn),)
    assert "by a drain of LRU batches" in finding.title and "KVM's own put" not in finding.title
    assert finding.detail["shape"] == "freed by drain"
    drains = {"6.1": "__pagevec_lru_add", "6.12": "folio_batch_move_lru",
              "7.3": "folio_batch_move_lru"}  # fmt: skip
    assert finding.functions[:2] == (drains[kernel], "mm_page_free")
    assert "batch" in finding.innocent[-2].ruled_out
    assert finding.innocent[-1].explanation.startswith("nobody told KVM: the owner freed")
    assert finding.innocent[-1].ruled_out.startswith("not ruled out")


@pytest.mark.parametrize("rows_max", [1, 1 << 18])
@pytest.mark.parametrize("kernel", GENERATIONS)
def test_without_stacks_the_put_right_before_names_kvm(kernel, rows_max, tmp_path):
    # Given a fault that puts another page at count 1, which is freed at once, and no stack
    copy = reclaim(kernel)
    one = page(copy)
    fault, inside = later_fault(copy, one)
    puts = np.isin(copy["RELEASE"]["cause"], [wire.CALLS.index("pfn_clean"),
                                              wire.CALLS.index("finish_fault")])  # fmt: skip
    call = int(copy["RELEASE"]["cause"][np.flatnonzero(puts)[0]])
    copy.add("RELEASE", h__ts=inside, h__tid=fault["h"]["tid"], h__vm=1, h__cpu=fault["h"]["cpu"],
             h__fault_ts=fault["h"]["fault_ts"], cause=call, pfn=one.pfn, page__bits=1,
             page__refcount=1)  # fmt: skip
    ended = copying.deepcopy(copy)
    other = copying.deepcopy(copy)
    free(copy, fault, inside + 1, one.pfn)
    # When it is checked, in pieces of any length
    finding = only(ask(copy, tmp_path, NAME, rows_max=rows_max))
    # Then it was KVM's put, by the function that this kernel's recording saw
    assert "by KVM's own put" in finding.title and finding.detail["shape"] == "freed by put"
    assert finding.functions[0] == {"6.1": "kvm_release_pfn_clean", "6.12": "kvm_release_pfn_clean",
                                    "7.3": "kvm_mmu_finish_page_fault"}[kernel]  # fmt: skip
    assert finding.detail["freed_by_call"] == wire.CALLS[call]
    # But not if the fault was over, nor if another thread freed
    free(ended, fault, int(fault["h"]["ts"]) + 1, one.pfn)
    assert only(ask(ended, tmp_path, NAME, rows_max=rows_max)).detail["shape"] == "freed"
    fault["h"]["tid"] += 1
    free(other, fault, inside + 1, one.pfn)
    assert only(ask(other, tmp_path, NAME, rows_max=rows_max)).detail["shape"] == "freed"


@pytest.mark.parametrize("kernel", ["6.1", "6.12", "6.13"])
def test_a_page_put_twice_is_blamed_on_the_puts_not_on_the_free(kernel, tmp_path):
    # Given a simulated KVM that puts pages twice; the last reference goes elsewhere, later
    made = make(
        tmp_path, kernel=kernel, scenario="balloon", bugs=("double_put",), mem_bytes=4 << 20
    )
    found = {f.detector: f for f in reversed(check_trace(made.path).findings)}
    freed = found[NAME]
    # Then the page is found, not said to be freed by a put that only lowered its count
    assert freed.verdict == "definite" and freed.detail["shape"] == "freed"
    # And the owner is cleared by what balance proves
    assert freed.innocent[-1].ruled_out == "no: KVM itself is wrong about these pages, see balance"
    # Asked alone it does not know
    assert "not ruled out here" in told(made.path, NAME)[0].innocent[-1].ruled_out


def drained_driver(tmp_path, kernel="6.13", **knobs):
    """A driver's page is freed by an LRU drain inside somebody's fault, while a guest maps it."""
    made = make(tmp_path, kernel=kernel, scenario="virtio_gpu", **knobs)
    copy = Copy.of(made.path)
    sptes, faults = copy["SPTE"], copy["FAULT"]
    walked = np.flatnonzero((faults["walk_pfn"] == faults["pfn"]) & (faults["sptes"] > 0))
    pfn = int(faults["pfn"][walked[0]])
    mine = sptes["pfn"] == pfn
    born = int(sptes["h"]["ts"][np.flatnonzero(mine & copy.ops("SPTE", "install"))[0]])
    died = int(sptes["h"]["ts"][np.flatnonzero(mine & copy.ops("SPTE", "zap"))[0]])
    begin, end = faults["h"]["fault_ts"], faults["h"]["ts"]
    fault = faults[np.flatnonzero((begin > born + 9000) & (end + 9000 < died))[0]]
    copy.notes.append((born, {"stack": 9, "frames": [*DRAINED["7.3"], *HOST_FAULT]}))
    free(copy, fault, int(fault["h"]["fault_ts"]) + 1, pfn, h__stack=9)
    return copy, pfn


def test_a_drivers_page_freed_by_a_drain_in_a_fault_is_not_blamed_on_kvm(tmp_path):
    copy, pfn = drained_driver(tmp_path)
    # When everybody is asked
    result = check_trace(copy.write(tmp_path / "x.pfnt"))
    (finding,) = [f for f in result.findings if f.detector == NAME]
    # Then it is proven that the page was freed, and that by no fault of KVM
    assert (finding.verdict, finding.pfns) == ("definite", ((pfn, pfn),))
    assert "by a drain of LRU batches" in finding.title
    assert "/dev/" in finding.where
    assert finding.innocent[-1].ruled_out.startswith("yes, by this trace: no detector finds")
    assert not [f for f in result.findings if f.is_anomaly and f.detector != NAME]


def test_where_something_was_lost_the_owner_is_not_blamed_either(tmp_path):
    copy, _ = drained_driver(tmp_path)
    copy.lose("INVALIDATE", 1)
    result = check_trace(copy.write(tmp_path / "x.pfnt"))
    (finding,) = [f for f in result.findings if f.detector == NAME]
    assert finding.innocent[-1].ruled_out.startswith("not ruled out here")


# --- what others found of the same pages ----------------------------------------------------------

EVERYBODY = ("invalidation", "stale-install", "stale-slot", "install", "balance", "wrong-folio")
HERE, ELSEWHERE = {"pfns": ((8, 9),), "vms": (1,)}, {"pfns": ((70, 79),), "vms": (1,)}


def found(detector, verdict="definite", **fields):
    return Finding(detector=detector, verdict=verdict, title="t", rule="r", count=1, **fields)


@pytest.fixture
def freed(tmp_path):
    """What is said of pages 8 to 11 that were freed, when nobody else was asked."""
    copy, _ = drained_driver(tmp_path)
    (alone,) = told(copy.write(tmp_path / "x.pfnt"), NAME)
    return found(NAME, pfns=((8, 11),), vms=(1,), innocent=alone.innocent)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (found("balance", **HERE), "no: KVM itself is wrong about these pages, see balance"),
        (found("stale-install", **HERE), "no: KVM itself is wrong"),
        (found("invalidation", "inconclusive", **HERE), "not ruled out: KVM itself may be wrong"),
        (found("wrong-folio", **ELSEWHERE), "not ruled out: KVM itself may be wrong"),
        # Another VM's, references that are kept, and what a free leads to, say nothing of it.
        (found("balance", pfns=((8, 9),), vms=(2,)), "yes, by this trace"),
        (found("balance", detail={"kept": 3}, **HERE), "yes, by this trace"),
        (found("dead-mark", **HERE), "yes, by this trace"),
    ],
)
def test_what_another_detector_found_decides_about_the_owner(freed, other, said):
    one, same = settled([freed, other], EVERYBODY, lossless=True)
    assert one.innocent[-1].ruled_out.startswith(said)
    assert same == other and one.innocent[:-1] == freed.innocent[:-1]


@pytest.mark.parametrize("missing", EVERYBODY)
def test_who_could_not_answer_leaves_it_open(freed, missing):
    answered = set(EVERYBODY) - {missing}
    assert settled([freed], answered, lossless=True) == [freed]
    assert settled([freed], EVERYBODY, lossless=False) == [freed]
    assert settled([freed], EVERYBODY, lossless=True) != [freed]
