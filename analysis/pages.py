"""What kind of page a record speaks of, in the words of the reports.

Pure functions over columns of one table. May import: numpy, pandas, `probes.wire`.
"""

import numpy as np
import pandas as pd

from probes.wire import PAGE_BITS

__all__ = (
    "PAGE_CLASSES",
    "VM_FLAGS",
    "not_counted",
    "page_class",
    "pfn_error",
    "vm_flag_names",
)

#: Classes, most particular first.
PAGE_CLASSES = (
    "no struct page",
    "zero page",
    "zone device",
    "reserved",
    "counted, compound",
    "counted",
    "free",
    "uncounted",
    "unknown",
)

#: vm_area_struct.vm_flags that matter here, include/linux/mm.h.
VM_FLAGS = {"VM_PFNMAP": 0x400, "VM_IO": 0x4000, "VM_MIXEDMAP": 0x10000000, "VM_HUGETLB": 0x400000}
#: The same as two letters of /proc/PID/smaps.
_SMAPS_FLAGS = {"pf": "VM_PFNMAP", "io": "VM_IO", "mm": "VM_MIXEDMAP", "ht": "VM_HUGETLB"}

_ERROR_MASK = 0x7FF << 52
#: KVM_PFN_ERR_*, include/linux/kvm_host.h.
_PFN_ERRORS = (
    "KVM_PFN_ERR_FAULT",
    "KVM_PFN_ERR_HWPOISON",
    "KVM_PFN_ERR_RO_FAULT",
    "KVM_PFN_ERR_SIGPENDING",
    "KVM_PFN_ERR_NEEDS_IO",
)


def page_class(table: pd.DataFrame) -> pd.Series:
    """Return the class of each row's page, from page_bits, refcount and mapcount.

    A typed page (negative mapcount below -1) without a count is free: PageBuddy,
    include/linux/page-flags.h. A page with count 0 that is neither typed nor part of a compound
    page is uncounted: the tail of a non-compound block.
    """
    bits = table["page_bits"].fillna(0).to_numpy(dtype=np.int64)
    known = table["page_bits"].notna().to_numpy()
    refcount = table["refcount"].fillna(0).to_numpy(dtype=np.int64)
    mapcount = table["mapcount"].fillna(-1).to_numpy(dtype=np.int64)
    compound = (bits & (PAGE_BITS["tail"] | PAGE_BITS["head"])) != 0
    conditions = [
        known & ((bits & PAGE_BITS["has_struct"]) == 0),
        (bits & PAGE_BITS["zero"]) != 0,
        (bits & PAGE_BITS["zone_device"]) != 0,
        (bits & PAGE_BITS["reserved"]) != 0,
        compound & (refcount > 0),
        known & (refcount > 0),
        known & (refcount == 0) & (mapcount < -1),
        known & (refcount == 0),
    ]
    names = np.select(conditions, PAGE_CLASSES[:-1], default="unknown")
    return pd.Series(pd.Categorical(names, categories=PAGE_CLASSES), index=table.index)


def not_counted(table: pd.DataFrame) -> pd.Series:
    """Tell for each row whether KVM holds no reference to the page even during the fault.

    Where the kernel says it (`refcounted`) that is the answer; else pages that nobody can count.
    """
    classes = page_class(table).isin(["no struct page", "uncounted"])
    said = table["refcounted"]
    return classes.where(said.isna(), ~said.fillna(True).astype(bool))


def pfn_error(pfn: int) -> str:
    """Return the name of an error pfn, "" for a frame number."""
    if pfn & (1 << 63):
        return "KVM_PFN_NOSLOT"
    if not pfn & _ERROR_MASK:
        return ""
    low = pfn & 0xFFFF
    return _PFN_ERRORS[low] if low < len(_PFN_ERRORS) else f"KVM_PFN_ERR_{low}"


def vm_flag_names(vm_flags: int, smaps: list[str] | None = None) -> list[str]:
    """Return the names of the VMA flags that matter, from vm_flags or from smaps' letters."""
    names = {name for name, bit in VM_FLAGS.items() if vm_flags & bit}
    names |= {_SMAPS_FLAGS[f] for f in smaps or () if f in _SMAPS_FLAGS}
    return [name for name in VM_FLAGS if name in names]
