"""Pages in the words of the reports: classes, error pfns, flags of mappings."""

import pandas as pd
import pytest

from analysis.pages import (
    PAGE_CLASSES,
    frame_of,
    not_counted,
    page_class,
    pfn_error,
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


def test_a_page_that_kvm_refused_is_the_one_that_the_walk_found():
    # GIVEN a fault with a frame, one that KVM refused after a walk, one without either
    rows = [(0x100, STRUCT, 2, 0), (ERR_FAULT, STRUCT, 0, PLAIN), (ERR_FAULT, None, None, None)]
    table = pages(*rows, walk_pfn=("UInt64", [None, 0x1981, None]))
    # WHEN THEN
    assert frame_of(table).tolist() == [0x100, 0x1981, pd.NA]
    assert list(page_class(table)) == ["counted", "uncounted", "no page"]


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
