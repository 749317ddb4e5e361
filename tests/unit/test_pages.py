"""Pages: their classes, why KVM refused one, which ones it maps without counting them."""

import pandas as pd
import pytest

from analysis import explain, failures, uncounted
from analysis.mappings import Mappings, VmaMapping
from analysis.pages import (
    PAGE_CLASSES,
    frame_of,
    not_counted,
    page_class,
    page_class_names,
    pfn_error,
    row_frame,
    vm_flag_names,
)
from probes.wire import PAGE_BITS

STRUCT, TAIL, HEAD, RESERVED, ZERO, DEVICE = (1 << bit for bit in range(6))
ERR_FAULT = 0x7FF << 52
PLAIN = -1
#: _mapcount's word of a buddy page: up to Linux 6.10 a cleared bit, later a top byte.
BUDDY_61 = -129
BUDDY_612 = 0xF0000000 - (1 << 32)
HUGETLB_612 = 0xF4000000 - (1 << 32)
SLAB_61 = ~0x200
CARD0 = VmaMapping(1, 0, 1 << 63, ("VM_PFNMAP", "VM_IO"), "/dev/dri/card0")


def pages(*rows, **more):
    """Return a FAULT table of (pfn, page_bits, refcount, mapcount) with the file's types."""
    table = pd.DataFrame(rows, columns=["pfn", "page_bits", "refcount", "mapcount"], dtype=object)
    table = table.astype(
        {"pfn": "UInt64", "page_bits": "UInt32", "refcount": "Int32", "mapcount": "Int32"}
    )
    for name, (dtype, values) in more.items():
        table[name] = pd.Series(values, dtype=dtype)
    return table


def test_the_bits_of_this_test_are_those_of_the_wire():
    names = ("has_struct", "tail", "head", "reserved", "zero", "zone_device")
    assert [PAGE_BITS[name] for name in names] == [STRUCT, TAIL, HEAD, RESERVED, ZERO, DEVICE]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ((0x100, STRUCT, 2, 0), "counted"),
        ((0x100, STRUCT, 1, PLAIN), "counted"),
        ((0x100, STRUCT | HEAD, 2, 0), "counted, compound"),
        ((0x101, STRUCT | TAIL, 513, 0), "counted, compound"),
        ((0x101, STRUCT, 0, PLAIN), "uncounted"),
        ((0x101, STRUCT | TAIL, 0, PLAIN), "count 0, compound or typed"),
        ((0x101, STRUCT, 0, HUGETLB_612), "count 0, compound or typed"),
        ((0x101, STRUCT, 0, SLAB_61), "count 0, compound or typed"),
        ((0x101, STRUCT, 0, BUDDY_61), "free"),
        ((0x101, STRUCT, 0, BUDDY_612), "free"),
        ((0x101, STRUCT | RESERVED, 1, PLAIN), "reserved"),
        ((0x101, STRUCT | RESERVED | ZERO, 900, PLAIN), "zero page"),
        ((0x101, STRUCT | DEVICE, 1, PLAIN), "zone device"),
        ((0xE0000, None, None, None), "no struct page"),
        ((ERR_FAULT, None, None, None), "no page"),
        ((None, None, None, None), "no page"),
    ],
)
def test_a_page_has_one_class(row, expected):
    classes = page_class(pages(row))
    assert list(classes) == [expected]
    assert tuple(classes.cat.categories) == PAGE_CLASSES
    # And so has one row, as a dict.
    names = ("pfn", "page_bits", "refcount", "mapcount")
    assert page_class_names([dict(zip(names, row, strict=True))]) == [expected]


def test_a_page_that_kvm_refused_is_the_one_that_the_walk_found():
    # GIVEN a fault with a frame, one that KVM refused after a walk, one without either
    rows = [(0x100, STRUCT, 2, 0), (ERR_FAULT, STRUCT, 0, PLAIN), (ERR_FAULT, None, None, None)]
    table = pages(*rows, walk_pfn=("UInt64", [None, 0x1981, None]))
    # WHEN THEN
    assert frame_of(table).tolist() == [0x100, 0x1981, pd.NA]
    assert list(page_class(table)) == ["counted", "uncounted", "no page"]
    dicts = table.astype(object).where(table.notna(), None).to_dict("records")
    assert [row_frame(row) for row in dicts] == [0x100, 0x1981, None]
    assert page_class_names(dicts) == ["counted", "uncounted", "no page"]


def test_the_classes_keep_the_rows_of_their_table():
    table = pages((1, STRUCT, 1, 0), (2, STRUCT, 0, PLAIN))
    table.index = [7, 3]
    assert page_class(table).loc[3] == "uncounted"


def test_the_kernel_s_word_on_counting_goes_before_ours():
    # GIVEN a head page whose count is 1 by accident, then a tail, an ordinary page, and no page
    rows = [(8, STRUCT, 1, PLAIN), (9, STRUCT, 0, PLAIN), (10, STRUCT, 3, 0), (None,) * 4]
    said = pages(*rows, refcounted=("boolean", [False, False, True, False]))
    silent = pages(*rows, refcounted=("boolean", [None] * 4))
    # WHEN THEN
    assert not_counted(said).tolist() == [True, True, False, False]
    assert not_counted(silent).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("pfn", "name"),
    [
        (0x1981, ""),
        (ERR_FAULT, "KVM_PFN_ERR_FAULT"),
        (ERR_FAULT + 1, "KVM_PFN_ERR_HWPOISON"),
        (ERR_FAULT + 2, "KVM_PFN_ERR_RO_FAULT"),
        (ERR_FAULT + 3, "KVM_PFN_ERR_SIGPENDING"),
        (ERR_FAULT + 4, "KVM_PFN_ERR_NEEDS_IO"),
        (ERR_FAULT + 9, "KVM_PFN_ERR_9"),
        (1 << 63, "KVM_PFN_NOSLOT"),
    ],
)
def test_an_error_pfn_has_the_kernel_s_name(pfn, name):
    assert pfn_error(pfn) == name


def test_flags_of_a_mapping_read_the_same_from_both_witnesses():
    # The qxl driver's mapping, from struct vm_area_struct and from smaps' VmFlags.
    assert vm_flag_names(201606395) == ("VM_PFNMAP", "VM_IO")
    assert vm_flag_names(smaps=["rd", "wr", "io", "pf", "de", "dd"]) == ("VM_PFNMAP", "VM_IO")
    assert vm_flag_names(0x10000000) == ("VM_MIXEDMAP",)
    assert vm_flag_names() == ()


# --- why a fault failed ---------------------------------------------------------------------------


def spoken(entry):
    """Return an entry as one running text."""
    return " ".join([entry.lead, *(f"{label} {fact}" for label, fact in entry.facts)])


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
    # GIVEN two faults in one 2M leaf, one in the next
    (memory,) = memory_of(
        (1, 2, 0x40123, 0x80123, 0), (1, 2, 0x40145, 0x80145, 0), (1, 2, 0x40345, 0x80345, 0)
    )
    # THEN
    assert (memory.pages, memory.leaves, memory.hva) == (1024, 2, 0x40000000)
    assert memory.gfns == ((0x40000, 0x403FF),) and memory.frames == ((0x80000, 0x803FF),)
