"""writable: writable SPTEs over memory that the host maps read-only; on all three kernels."""

import dataclasses
import json

import numpy as np
import pytest
from unit.mapkit import GENERATIONS, MAPS, SANE, ask, only, page, reclaim
from unit.simkit import make
from unit.tracekit import NO_PFN, SHIPPED, Copy

from analysis.check import check_trace
from probes import wire

NAME = "writable"
NEVER = (1 << 32) - 1
WRITE = 1 << 1


def masks(copy):
    """Return the host-writable and MMU-writable bits of the recorded kernel."""
    values = json.loads(copy.meta.facts)["values"]
    return values["shadow_host_writable_mask"], values["shadow_mmu_writable_mask"]


@pytest.mark.parametrize("path", SANE, ids=lambda path: path.stem)
def test_unchanged_kernels_are_not_accused(path):
    assert check_trace(path, [NAME]).findings == ()


@pytest.mark.parametrize(("kernel", "mmu"), MAPS)
def test_a_fault_in_that_said_read_only(kernel, mmu, tmp_path):
    # Given a fault-in that found the host's mapping read-only, and a writable leaf
    copy = reclaim(kernel, mmu)
    one = page(copy)
    copy["FAULT"]["writable"][one.fault] = 0
    # When it is checked
    finding = only(ask(copy, tmp_path, NAME))
    # Then that page is named, with the fault and the leaf
    assert (finding.verdict, finding.count, finding.pages) == ("definite", 1, 1)
    assert finding.pfns == ((one.pfn, one.pfn),) and finding.gfns == ((one.gfn, one.gfn),)
    assert {"FAULT", "SPTE"} <= {row["kind"] for row in finding.evidence}
    assert "make_spte" in finding.functions
    # And loss leaves it open: a torn fault may have left its leaf to another
    copy.lose("FAULT", 1)
    assert only(ask(copy, tmp_path, NAME)).verdict == "inconclusive"


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_host_writable_alone_is_enough(kernel, tmp_path):
    # Given a leaf that is not writable yet, but may become so without asking the host again
    copy = reclaim(kernel)
    one = page(copy)
    copy["FAULT"]["writable"][one.fault] = 0
    _, mmu = masks(copy)
    copy["SPTE"]["b"][one.install] = int(copy["SPTE"]["b"][one.install]) & ~(WRITE | mmu)
    assert only(ask(copy, tmp_path, NAME)).count == 1


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_read_only_leaf_over_read_only_memory_is_right(kernel, tmp_path):
    copy = reclaim(kernel)
    one = page(copy)
    copy["FAULT"]["writable"][one.fault] = 0
    copy["SPTE"]["b"][one.install] = int(copy["SPTE"]["b"][one.install]) & ~(
        WRITE | sum(masks(copy))
    )
    changed = (copy["SPTE"]["gfn"] == one.gfn) & copy.ops("SPTE", "change")
    copy.drop("SPTE", changed)
    assert ask(copy, tmp_path, NAME).findings == ()


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_fault_in_whose_return_was_missed_says_nothing(kernel, tmp_path):
    copy = reclaim(kernel)
    one = page(copy)
    copy["FAULT"]["writable"][one.fault] = 0
    copy["FAULT"]["t_faultin_end"][one.fault] = NEVER
    assert ask(copy, tmp_path, NAME).findings == ()


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_pfnmap_mapping_without_vm_write(kernel, tmp_path):
    # Given the real PFNMAP recording, with a mapping that has VM_PFNMAP and VM_IO, not VM_WRITE
    # (up to 6.11 the walk shows no VMA; there it is given one)
    copy = Copy.of(SHIPPED / f"ttm-{kernel}.pfnt")
    walked = copy["FAULT"]["walk_pfn"] != NO_PFN
    copy["FAULT"]["vm_flags"][walked] = 0x4000 | 0x400 | 0x1
    # Then every leaf of it that is writable is found, as CVE-2021-22543 made them
    finding = only(ask(copy, tmp_path, NAME))
    assert finding.verdict == "definite" and "PFNMAP" in finding.title
    assert finding.count == (walked & copy.fixed()).sum() >= 1
    assert finding.detail["vm_flags"] == "0x4401"


def noted(copy, *more, perms="r--s", after=1):
    """Return a recording of a driver's pages with a note that they are mapped read-only.

    The note is `after` ns older than the first fault of them. `more` are INVALIDATE records of the
    mapping, as (event, ts since that fault).
    """
    copy["FAULT"]["vm_flags"] = 0
    walked = copy["FAULT"]["walk_pfn"] != NO_PFN
    first = int(copy["FAULT"]["h"]["ts"][walked].min())
    low = int(copy["FAULT"]["hva"][walked].min())
    high = int(copy["FAULT"]["hva"][walked].max()) + 4096
    vma = {"start": low, "end": high, "perms": perms, "flags": [], "path": "/dev/dri/card0"}
    copy.notes = [(first - after, {"slot": {"vm": 1, "slot": 1}, "vmas": [vma]})]
    for event, at in more:
        copy.add("INVALIDATE", h__ts=first + at, h__vm=1, a=low, b=high,
                 cause=wire.INVALIDATE_EVENTS.index(event))  # fmt: skip
    return copy, int((walked & copy.fixed()).sum())


def driver_pages(kernel="7.3"):
    return Copy.of(SHIPPED / f"ttm-{kernel}.pfnt")


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_mapping_that_proc_calls_read_only(kernel, tmp_path):
    # Given a kernel whose walk shows no VMA, and what the recorder read when the slot appeared
    copy, leaves = noted(driver_pages(kernel))
    finding = only(ask(copy, tmp_path, NAME))
    assert finding.verdict == "probable" and finding.count == leaves >= 1
    assert "the host's mapping behind them is read-only" in finding.title
    assert "none did" in finding.innocent[-1].ruled_out


def test_an_invalidation_that_changes_no_protection_is_no_excuse(tmp_path):
    copy, leaves = noted(driver_pages(), ("clear", -1), ("protection_vma", -3 * 10**9))
    assert only(ask(copy, tmp_path, NAME)).count == leaves


@pytest.mark.parametrize("event", ["unmap", "protection_vma"])
@pytest.mark.parametrize("at", [0, -5 * 10**8])
def test_a_mapping_may_be_made_writable_later(event, at, tmp_path):
    # Given mprotect() or mmap() before the leaves were made, or while /proc was being read
    copy, _ = noted(driver_pages(), (event, at), after=3 * 10**8)
    assert not ask(copy, tmp_path, NAME).findings


def test_a_note_that_was_read_after_the_protection_had_changed_says_nothing_of_before(tmp_path):
    copy, _ = noted(driver_pages(), ("protection_vma", 10**9), after=-4 * 10**9)
    assert not ask(copy, tmp_path, NAME).findings


def test_lost_invalidations_may_have_been_of_protections(tmp_path):
    copy, _ = noted(driver_pages())
    copy.lose("INVALIDATE", 1)
    assert only(ask(copy, tmp_path, NAME)).verdict == "inconclusive"


@pytest.mark.parametrize("perms", ["rw-s", "---p", "", None, 7, "r-", "r--ss"])
def test_other_permissions_say_nothing(perms, tmp_path):
    copy, _ = noted(driver_pages(), perms=perms)
    assert not ask(copy, tmp_path, NAME).findings


def test_memory_of_guest_memfd_is_not_what_the_process_maps(tmp_path):
    copy, _ = noted(driver_pages())
    copy["SLOT"]["c"] |= 1 << 2
    assert not ask(copy, tmp_path, NAME).findings


def test_without_invalidations_nobody_knows_how_long_a_note_is_good(tmp_path):
    copy, _ = noted(driver_pages())
    copy.unhook("invalidate_start")
    assert not ask(copy, tmp_path, NAME).findings


@pytest.mark.parametrize("kernel", GENERATIONS)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_writable_leaf_in_a_read_only_slot(kernel, lost, tmp_path):
    copy = reclaim(kernel)
    copy["SLOT"]["c"] = 1 << 1
    if lost:
        copy.lose("SLOT", lost)
    finding = only(ask(copy, tmp_path, NAME))
    assert finding.verdict == ("inconclusive" if lost else "definite")
    assert finding.pages == 23 and "read-only memslot" in finding.title


@pytest.mark.parametrize(("kernel", "mmu"), MAPS)
def test_a_writable_zero_page(kernel, mmu, tmp_path):
    copy = reclaim(kernel, mmu)
    one = page(copy)
    copy["SPTE"]["page"]["bits"][one.install] |= wire.PAGE_BITS["zero"]
    copy.lose("SPTE", 3)  # one record alone shows it
    finding = only(ask(copy, tmp_path, NAME))
    assert (finding.verdict, finding.pages) == ("definite", 1)
    assert "zero page" in finding.title and finding.detail["writable"]


@pytest.mark.parametrize(("kernel", "mmu"), MAPS)
@pytest.mark.parametrize("gone", [0, 1])
def test_a_writable_leaf_without_the_bits_that_allow_it(kernel, mmu, gone, tmp_path):
    copy = reclaim(kernel, mmu)
    one = page(copy)
    bit = masks(copy)[gone]
    copy["SPTE"]["b"][one.install] = int(copy["SPTE"]["b"][one.install]) & ~bit
    copy.drop("SPTE", (copy["SPTE"]["gfn"] == one.gfn) & copy.ops("SPTE", "change"))
    finding = only(ask(copy, tmp_path, NAME))
    assert finding.verdict == "definite" and "host-writable, MMU-writable" in finding.title


@pytest.mark.parametrize("kernel", GENERATIONS)
@pytest.mark.parametrize("cause", ["fast", "aging", "fault"])
def test_a_leaf_becomes_host_writable_only_by_a_fault(kernel, cause, tmp_path):
    copy = reclaim(kernel)
    one = page(copy)
    host, mmu = masks(copy)
    new = int(copy["SPTE"]["b"][one.install])
    old = new & ~(WRITE | host | mmu)
    which = np.arange(len(copy["SPTE"])) == one.install
    copy.again("SPTE", which, h__op=wire.OPS.index("change"), a=old, b=new,
               cause=wire.CAUSES.index(cause))  # fmt: skip
    findings = ask(copy, tmp_path, NAME).findings
    assert [f.verdict for f in findings] == ([] if cause == "fault" else ["definite"])


def test_without_the_kernel_s_masks_there_is_no_answer(tmp_path):
    copy = reclaim("6.12")
    facts = json.loads(copy.meta.facts)
    facts["values"].pop("shadow_host_writable_mask")
    copy.meta = dataclasses.replace(copy.meta, facts=json.dumps(facts))
    result = ask(copy, tmp_path, NAME)
    assert result.findings == () and "shadow_host_writable_mask" in result.unanswerable[0].reason


# --- simulated ------------------------------------------------------------------------------------


def test_dirty_logging_takes_write_access_and_leaves_what_lets_it_be_given_back(tmp_path):
    # GIVEN a guest under dirty logging, whose reads get the zero page as if the host let it write:
    # no leaf is writable, but the next write fault would make it so without asking the host
    made = make(tmp_path, kernel="6.12", scenario="migration", bugs=("writable_over_readonly",),
                vcpus=4, seed=288531778)  # fmt: skip
    leaves = [row["new"] for row in made.rows("SPTE") if row["pfn"] == 0xBAB3A]
    assert leaves and not any(new & 2 for new in leaves)
    # THEN it is told as what it is
    finding = only(check_trace(made.path, ["writable"]))
    assert finding.verdict == "definite"
    assert "the host's zero page may be made writable" in finding.title
