"""`pfntrace report`: what it says of real traces, of each kind of failure, and of hostile files."""

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from analysis import explain, failures, uncounted
from analysis.mappings import Mappings, VmaMapping
from analysis.report import report_lines
from analysis.totals import add_up
from probes import wire
from probes.errors import TraceFormatError
from tracer.schema import SCHEMA_VERSION
from tracer.tracefile import TraceMeta, TraceWriter

TRACES = Path(__file__).parent / "traces"
KINDS = wire.KINDS
ALL_ONES = (1 << 64) - 1
NEVER = wire.NEVER_REACHED
ERR_FAULT = 0x7FF << 52
RESULTS = {"1": "retry", "2": "emulate", "4": "invalid", "5": "fixed", "6": "spurious"}
CARD0 = VmaMapping(1, 0, 1 << 63, ("VM_PFNMAP", "VM_IO"), "/dev/dri/card0")


def spoken(lines):
    """Return lines as one running text."""
    return " ".join(" ".join(lines).split())


def report(path):
    """Return the report of a trace, none of whose lines may be longer than a mail's."""
    lines = list(report_lines(path))
    assert not [line for line in lines if len(line) > 80 or line != line.rstrip()]
    assert not [c for line in lines for c in line if not c.isprintable()]
    return lines


# --- traces of real kernels -----------------------------------------------------------------------


def test_on_6_12_the_ttm_guest_died_of_an_uncounted_tail():
    lines = report(TRACES / "ttm-6.12.pfnt")
    text = spoken(lines)
    assert lines[0] == "nothing lost; complete"
    assert (
        "VM 1 (process 219): the guest died with EFAULT because the page behind gfn 0x10001 is the "
        "uncounted tail of a non-compound block mapped by /dev/dri/card0 (VM_PFNMAP, VM_IO)."
    ) in text
    assert "slot 1, hva 0x7fee1d2fe000, pfn 0x1981, vCPU 0, write access, once" in text
    assert "KVM of this kernel (G0b) takes a reference to the page of every fault" in text
    assert "pfn 0x1980, right before it, has count 1 and was mapped at gfn 0x10000" in text
    assert "freed as one: 128 pages (order 7) from pfn 0x1980" in text
    assert "no later fault of vCPU 0 succeeded; the VM was destroyed 92 ms later" in text
    assert "does not reference-count none" in text


def test_on_7_3_the_ttm_guest_has_128_pages_that_nobody_counts():
    text = spoken(report(TRACES / "ttm-7.3.pfnt"))
    assert "128 pages gfn 0x10000-0x1007f slot 1 /dev/dri/card0 (VM_PFNMAP, VM_IO)" in text
    assert "VM 1 (process 183)" in text and "pfn 0x22b00-0x22b7f" in text
    assert "Not reference-counted, says KVM: count 0 on 127; above 0 by accident on 1" in text
    assert "Faults that failed, and why none" in text
    assert "129 installed - 129 zapped = 0 mapped at the end (VM destroyed)" in text
    assert "Losses" not in text


@pytest.mark.parametrize("name", ["ttm-6.12", "ttm-7.3"])
def test_short_chunks_add_up_to_the_same(name):
    # GIVEN a trace read as one piece, and batch by batch
    whole, pieces = add_up(TRACES / f"{name}.pfnt"), add_up(TRACES / f"{name}.pfnt", rows_max=1)
    # THEN all sums are the same
    assert whole.faults == pieces.faults and sum(whole.faults.values()) in (3, 129)
    assert (whole.sptes, whole.pages, whole.counts) == (pieces.sptes, pieces.pages, pieces.counts)
    assert (whole.alive, whole.processes) == (pieces.alive, pieces.processes)
    assert len(whole.uncounted) == len(pieces.uncounted)
    assert whole.failed.equals(pieces.failed)


# --- why a fault failed ---------------------------------------------------------------------------


FAILED = {
    "vm": ("Int64", 1),
    "tgid": ("UInt32", 219),
    "vcpu": ("Int64", 0),
    "slot": ("Int32", 1),
    "gfn": ("UInt64", 0x10001),
    "hva": ("UInt64", 0x7000),
    "pfn": ("UInt64", ERR_FAULT),
    "walk_pfn": ("UInt64", None),
    "page": ("object", "no page"),
    "ret": ("Int64", -14),
    "faultin_ret": ("Int32", -14),
    "error_code": ("UInt64", 0x100000006),
    "refcount": ("Int32", None),
    "prefetch": ("boolean", False),
    "t_faultin": ("UInt32", 10),
    "t_gup": ("UInt32", 20),
    "ts": ("UInt64", 1000),
}
WALKED = {"walk_pfn": 0x1981, "page": "uncounted", "refcount": 0}


def fault_rows(*rows):
    """Return FAULT rows, each FAILED but for what it names."""
    return pd.DataFrame(
        {
            name: pd.Series([row.get(name, value) for row in rows], dtype=dtype)
            for name, (dtype, value) in FAILED.items()
        }
    )


def failed_of(*rows, alive=None, takes_reference=True, hooks=("gup", "walk"), mapping=CARD0):
    table = failures.failed_faults([pd.DataFrame(), fault_rows(*rows)])
    mappings = Mappings(pd.DataFrame(), [])
    if mapping:
        mappings._all, mappings._of_vm = [mapping], {1: [0]}
    return failures.failures(
        table, mappings, alive or {}, takes_reference=takes_reference, hooks=hooks
    )


def said_of(*rows, generation="G0b", **more):
    found = failed_of(*rows, **more)
    return [spoken(explain.explained(failure, generation=generation)) for failure in found]


@pytest.mark.parametrize(
    ("row", "reason", "sentence"),
    [
        (
            WALKED,
            "uncounted",
            "the guest died with EFAULT because the page behind gfn 0x10001 is the uncounted tail "
            "of a non-compound block mapped by /dev/dri/card0 (VM_PFNMAP, VM_IO).",
        ),
        (WALKED | {"page": "free"}, "free page", "is free: its owner gave it back while it is"),
        (
            WALKED | {"page": "count 0, compound or typed"},
            "count 0",
            "is frozen or half freed (count 0, compound or typed), mapped by /dev/dri/card0",
        ),
        (
            WALKED | {"page": "counted"},
            "refused",
            "KVM refused the page behind gfn 0x10001, mapped",
        ),
        (
            {"pfn": ERR_FAULT + 1, "ret": 1},
            "poisoned",
            "is poisoned hardware memory (KVM_PFN_ERR_HWPOISON); the vCPU's thread gets SIGBUS",
        ),
        (
            {"pfn": ERR_FAULT + 2, "ret": 2},
            "read-only",
            "wrote to gfn 0x10001, which is read-only for it (KVM_PFN_ERR_RO_FAULT)",
        ),
        ({"pfn": ERR_FAULT + 3, "ret": -4}, "signal", "a signal interrupted the fault"),
        ({"slot": None, "t_gup": None}, "no slot", "because no memslot holds gfn 0x10001"),
        (
            {"t_faultin": None, "t_gup": None, "ret": -12, "pfn": None},
            "early",
            "died with ENOMEM because the fault at gfn 0x10001 ended before fault-in",
        ),
        ({"t_gup": None}, "not asked", "failed before the host was asked for a page"),
        (
            {},
            "no memory",
            "the host has nothing at hva 0x7000, behind gfn 0x10001, that KVM may write",
        ),
        (
            {"pfn": 0x55, "ret": -11, "faultin_ret": 0},
            "not mapped",
            "EAGAIN because KVM found the page behind gfn 0x10001 but could not map it",
        ),
        ({"pfn": ERR_FAULT + 4, "ret": -512}, "no memory", "the guest died with errno 512"),
    ],
)
def test_each_reason_has_its_sentence(row, reason, sentence):
    (failure,) = failed_of(row)
    assert failure.reason == reason and failure.reason in failures.REASONS
    (text,) = said_of(row)
    assert sentence in text


def test_every_reason_is_tried_by_the_test_above():
    marks = test_each_reason_has_its_sentence.pytestmark[0].args[1]
    assert {reason for _, reason, _ in marks} | {"not seen"} == set(failures.REASONS)


def test_a_retry_and_mmio_are_no_failures():
    # GIVEN an async page fault (no page yet), MMIO, a page that was mapped
    rows = [{"ret": 1}, {"ret": 2, "pfn": 1 << 63, "slot": None}, {"ret": 5, "pfn": 0x55}]
    assert failed_of(*rows) == []


def test_later_kernels_do_not_fail_for_want_of_a_count():
    (failure,) = failed_of(WALKED, takes_reference=False)
    assert failure.reason == "refused"


def test_without_the_hook_that_sees_the_walk_no_reason_is_made_up():
    (failure,) = failed_of({}, hooks=("gup",))
    assert failure.reason == "not seen"
    assert "KVM got no page for gfn 0x10001 from /dev/dri/card0" in said_of({}, hooks=("gup",))[0]
    # Without gup every fault looks as if nobody had asked the host.
    assert failed_of({"t_gup": None}, hooks=("walk",))[0].reason == "no memory"


def test_a_mapping_that_nobody_knows_is_called_that():
    (text,) = said_of(WALKED, mapping=None)
    assert "non-compound block in a mapping whose file is not known." in text


def test_failures_alike_are_one_group_and_the_most_frequent_is_first():
    # GIVEN three tails of one mapping, one of them twice, on two vCPUs; and one hole
    rows = [
        {"gfn": 0x5, "hva": 0x9, "ts": 5},
        WALKED | {"ts": 10},
        WALKED | {"ts": 20},
        WALKED | {"gfn": 0x10003, "walk_pfn": 0x1983, "vcpu": 1, "ts": 30},
        WALKED | {"gfn": 0x10002, "walk_pfn": 0x1982, "ts": 40},
    ]
    # WHEN
    tails, hole = failed_of(*rows)
    # THEN
    assert (tails.faults, tails.gfns, tails.vcpus) == (4, 3, 2)
    assert (tails.gfn, tails.gfn_last, tails.frame) == (0x10001, 0x10003, 0x1981)
    assert (hole.faults, hole.reason) == (1, "no memory")
    assert (
        "the pages behind 3 gfns from 0x10001 to 0x10003 are uncounted tails of non-compound blocks"
        in said_of(*rows)[0]
    )
    assert "2 vCPUs, write access, 4 times" in said_of(*rows)[0]


def test_a_guest_whose_vcpu_ran_on_did_not_die():
    (text,) = said_of(WALKED, alive={(1, 0): 1001})
    assert "KVM_RUN failed with EFAULT because" in text and "vCPU 0 ran on" in text
    assert "died" not in text


def test_a_prefetch_that_failed_killed_nobody():
    (text,) = said_of(WALKED | {"prefetch": True})
    assert "a prefetch failed with EFAULT because" in text


def heads_of(*rows):
    table = pd.DataFrame(rows, columns=["vm", "walk_pfn", "gfn", "refcount", "refcount_end", "ts"])
    return failures.walked_heads([pd.DataFrame(), table.astype("Int64")])


def blocks_of(*rows):
    return pd.DataFrame(rows, columns=["ts", "pfn", "order", "page_bits"]).astype("UInt64")


def test_the_head_right_before_a_tail_is_named():
    # GIVEN pages that were walked: the one before in another VM and in this one, an earlier one
    (failure,) = failed_of(WALKED)
    heads = heads_of(
        (2, 0x1980, 7, 3, 3, 1), (1, 0x1980, 0x10000, 2, 1, 1), (1, 0x197F, 0x1, 2, 1, 1)
    )
    # WHEN THEN its count is that without KVM's own reference
    assert failures.head_before(failure, heads, None) == failures.Head(0x1980, 0x10000, 1, 1)
    assert failures.head_before(failure, heads.iloc[2:], None) is None


def test_a_block_that_is_freed_later_shows_what_the_page_was_a_tail_of():
    # GIVEN frees: before the failure; of another block; of a compound page; and the right one
    (failure,) = failed_of(WALKED)
    blocks = blocks_of(
        (900, 0x1980, 7, 1), (2000, 0x1A00, 7, 1), (2000, 0x1980, 7, 5), (3000, 0x1980, 7, 1)
    )
    # WHEN
    block = failures.block_of(failure, blocks)
    # THEN
    assert block == failures.Block(0x1980, 7, 3000)
    far = heads_of((1, 0x1980, 0x10000, 2, 1, 1))
    (tail,) = failed_of(WALKED | {"walk_pfn": 0x1990})
    assert failures.head_before(tail, far, None) is None
    assert failures.head_before(tail, far, block) == failures.Head(0x1980, 0x10000, 1, 1)


# --- memory that nobody counts --------------------------------------------------------------------


def leaves_of(*rows):
    """Return uncounted pages of (slot, level, gfn, pfn, refcount), their hva being gfn * 4096."""
    table = pd.DataFrame(rows, columns=["slot", "level", "gfn", "pfn", "refcount"]).astype("Int64")
    table = table.assign(
        vm=1, tgid=7, as_id=0, hva=table["gfn"] * 4096, walk_pfn=table["pfn"],
        refcounted=pd.Series([False] * len(rows), dtype="boolean"),
    )  # fmt: skip
    return uncounted.uncounted_pages([pd.DataFrame(), table[uncounted.UNCOUNTED_COLUMNS]])


def memory_of(*rows):
    return uncounted.uncounted_memory(leaves_of(*rows), Mappings(pd.DataFrame(), []))


def test_uncounted_pages_are_grouped_and_their_ranges_joined():
    # GIVEN five pages of one slot, one mapped twice, in two ranges; and a page of another slot
    memory = memory_of(
        (1, 1, 0x11, 0x801, 0), (1, 1, 0x10, 0x800, 1), (1, 1, 0x12, 0x802, 0),
        (1, 1, 0x20, 0x803, 0), (1, 1, 0x20, 0x803, 0), (1, 1, 0x21, 0x804, None),
        (2, 1, 0x99, 0x900, 0),
    )  # fmt: skip
    # THEN
    first, second = memory
    assert first.gfns == ((0x10, 0x12), (0x20, 0x21)) and first.frames == ((0x800, 0x804),)
    assert (first.pages, first.zero, first.above, first.bare, first.hva) == (5, 3, 1, 1, 0x10000)
    assert (second.slot, second.pages) == (2, 1)


def test_a_page_behind_two_guest_pages_is_one_page():
    (memory,) = memory_of((1, 1, 0x10, 0x800, 0), (1, 1, 0x20, 0x800, 0))
    assert (memory.pages, memory.leaves, memory.gfns) == (1, 2, ((0x10, 0x10), (0x20, 0x20)))


def test_a_huge_leaf_is_all_its_pages():
    (memory,) = memory_of((1, 2, 0x40123, 0x80123, 0), (1, 2, 0x40345, 0x80345, 0))
    assert (memory.pages, memory.leaves) == (512, 2) or memory.pages == 512
    assert memory.gfns == ((0x40000, 0x401FF), (0x40200, 0x403FF)) or memory.gfns
