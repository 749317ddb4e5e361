"""What kind of page a record speaks of, in the words of the reports.

Pure functions over columns of one table. May import: numpy, pandas, `probes.wire`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from probes.wire import PAGE_BITS

__all__ = (
    "PAGE_CLASSES",
    "VM_FLAGS",
    "frame_of",
    "not_counted",
    "page_class",
    "page_class_names",
    "pfn_error",
    "row_frame",
    "vm_flag_names",
)

#: Classes, most particular first.
PAGE_CLASSES = (
    "no page",
    "no struct page",
    "zero page",
    "zone device",
    "reserved",
    "counted, compound",
    "counted",
    "free",
    "count 0, compound or typed",
    "uncounted",
)
#: Classes to which KVM cannot hold a reference: kvm_pfn_to_refcounted_page() up to Linux 6.12.
_NEVER_COUNTED = ("no struct page", "reserved", "uncounted")

#: vm_area_struct.vm_flags that matter here, include/linux/mm.h.
VM_FLAGS = {"VM_PFNMAP": 0x400, "VM_IO": 0x4000, "VM_MIXEDMAP": 0x10000000, "VM_HUGETLB": 0x400000}
#: The same as two letters of /proc/PID/smaps.
_SMAPS_FLAGS = {"pf": "VM_PFNMAP", "io": "VM_IO", "mm": "VM_MIXEDMAP", "ht": "VM_HUGETLB"}

#: Frame numbers are below this (52 bits of physical address); KVM's error values are above.
_FRAMES = 1 << 40
_NOSLOT = 1 << 63
_ERROR_MASK = 0x7FF << 52
#: KVM_PFN_ERR_*, include/linux/kvm_host.h.
_PFN_ERRORS = (
    "KVM_PFN_ERR_FAULT",
    "KVM_PFN_ERR_HWPOISON",
    "KVM_PFN_ERR_RO_FAULT",
    "KVM_PFN_ERR_SIGPENDING",
    "KVM_PFN_ERR_NEEDS_IO",
)


def frame_of(table: pd.DataFrame) -> pd.Series:
    """Return the frame number that the page state of each row is of, null if there is none.

    Of a FAULT that is `pfn`, or what the PFNMAP walk found if KVM turned that into an error.
    """
    frame = table["pfn"].astype("UInt64")
    frame = frame.where(frame < _FRAMES)
    if "walk_pfn" in table:
        walked = table["walk_pfn"].astype("UInt64")
        frame = frame.fillna(walked.where(walked < _FRAMES))
    return frame


def row_frame(row: Mapping[str, Any]) -> int | None:
    """Return the same of one row as a dict."""
    frames = (row.get("pfn"), row.get("walk_pfn"))
    return next((frame for frame in frames if frame is not None and frame < _FRAMES), None)


def page_class(table: pd.DataFrame) -> pd.Series:
    """Return the class of each row's page, from pfn, walk_pfn, page_bits, refcount and mapcount.

    A page with count 0 is `free` if the buddy allocator has it, `uncounted` if it has no type and
    is not part of a compound page: the tail of a non-compound block.
    """
    known = table["page_bits"].notna().to_numpy()
    bits = table["page_bits"].to_numpy(dtype=np.int64, na_value=0)
    counted = table["refcount"].to_numpy(dtype=np.int64, na_value=0) > 0
    kind = table["mapcount"].to_numpy(dtype=np.int64, na_value=-1)
    chosen = _codes(known, bits, counted, kind, frame_of(table).notna().to_numpy())
    return pd.Series(pd.Categorical.from_codes(chosen, PAGE_CLASSES), index=table.index)


def page_class_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the classes of a few rows as dicts: a table of them costs more."""
    bits = [row.get("page_bits") for row in rows]
    chosen = _codes(
        np.array([one is not None for one in bits], np.bool_),
        np.array([one or 0 for one in bits], np.int64),
        np.array([(row.get("refcount") or 0) > 0 for row in rows], np.bool_),
        np.array([-1 if (n := row.get("mapcount")) is None else n for row in rows], np.int64),
        np.array([row_frame(row) is not None for row in rows], np.bool_),
    )
    return [PAGE_CLASSES[code] for code in chosen.tolist()]


def _codes(
    known: np.ndarray, bits: np.ndarray, counted: np.ndarray, kind: np.ndarray, framed: np.ndarray
) -> np.ndarray:
    """Return the classes as numbers; `kind` is the mapcount, `framed` tells where a frame is."""
    compound = (bits & (PAGE_BITS["tail"] | PAGE_BITS["head"])) != 0
    conditions = {
        "zero page": known & ((bits & PAGE_BITS["zero"]) != 0),
        "zone device": known & ((bits & PAGE_BITS["zone_device"]) != 0),
        "reserved": known & ((bits & PAGE_BITS["reserved"]) != 0),
        "counted, compound": known & counted & compound,
        "counted": known & counted,
        "free": known & _is_buddy(kind),
        "count 0, compound or typed": known & (compound | (kind < -128)),
        "uncounted": known,
        "no struct page": framed,
    }
    codes = [PAGE_CLASSES.index(name) for name in conditions]
    return np.select(list(conditions.values()), codes, PAGE_CLASSES.index("no page"))


def _is_buddy(mapcount: np.ndarray) -> np.ndarray:
    # page_type shares the word with _mapcount (include/linux/page-flags.h). Up to 6.10 a type is a
    # cleared bit, PG_buddy 0x80; since Linux 4ffca5a96678 ("mm: support only one page_type per
    # page") (v6.12) it is the top byte, PGTY_buddy 0xf0, and 0xff says that there is none.
    word = mapcount & 0xFFFFFFFF
    cleared_bit = ((word >> 24) == 0xFF) & (mapcount < -128) & ((word & 0x80) == 0)
    return np.asarray(cleared_bit | ((word >> 24) == 0xF0))


def not_counted(table: pd.DataFrame) -> pd.Series:
    """Tell for each row of a FAULT table whether KVM has no reference to the page it found.

    Where the kernel says it (`refcounted`) that is the answer; else pages that nobody can count.
    """
    classes = page_class(table)
    said = table["refcounted"]
    answer = classes.isin(_NEVER_COUNTED).where(said.isna(), ~said.fillna(True).astype(bool))
    return answer & (classes != "no page")


def pfn_error(pfn: int) -> str:
    """Return the name of an error pfn, "" for a frame number."""
    if pfn & _NOSLOT:
        return "KVM_PFN_NOSLOT"
    if not pfn & _ERROR_MASK:
        return ""
    low = pfn & 0xFFFF
    return _PFN_ERRORS[low] if low < len(_PFN_ERRORS) else f"KVM_PFN_ERR_{low}"


def vm_flag_names(vm_flags: int = 0, smaps: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the names of the VMA flags that matter, from vm_flags or from smaps' letters."""
    names = {name for name, bit in VM_FLAGS.items() if vm_flags & bit}
    names |= {_SMAPS_FLAGS[f] for f in smaps if f in _SMAPS_FLAGS}
    return tuple(name for name in VM_FLAGS if name in names)
