"""The wire format on Python's side: numpy dtypes and names of `probes/bpf/wire.h`.

A record is written once, by the kernel; every other part of pfntrace reads it through these
dtypes. `tests/unit/test_wire.py` compiles the header and compares every offset and constant.
May import: numpy only.
"""

import numpy as np

__all__ = (
    "CAUSES",
    "CALLS",
    "EVENT",
    "EVENT_KINDS",
    "FAULT",
    "HEADER",
    "INVALIDATE_EVENTS",
    "KINDS",
    "MMUS",
    "NEVER_REACHED",
    "OPS",
    "PAGE_BITS",
    "PAGE_STATE",
    "RING_HEADER",
    "ring_dtype",
)

#: Kinds in wire order; the index is the number on the wire (0 is never written by the kernel).
KINDS = (
    "NONE",
    "FAULT",
    "SPTE",
    "RELEASE",
    "INVALIDATE",
    "PAGE_FREE",
    "PAGE_ALLOC",
    "PIN",
    "SLOT",
    "VM",
    "VMA",
)
#: Kinds that share `struct event_record`.
EVENT_KINDS = KINDS[2:]

CAUSES = (
    "other",
    "fault",
    "prefetch",
    "notifier",
    "aging",
    "slot",
    "dirty_log",
    "recovery",
    "teardown",
    "root",
    "guest_write",
    "fast",
)
MMUS = ("none", "tdp", "shadow")
CALLS = (
    "none",
    "pfn_clean",
    "pfn_dirty",
    "page_clean",
    "page_dirty",
    "finish_fault",
    "mark_accessed",
    "mark_dirty",
)
OPS = (
    "none",
    "start",
    "end",
    "create",
    "delete",
    "move",
    "flags",
    "seen",
    "map",
    "unmap",
    "refresh",
    "install",
    "change",
    "zap",
)
#: enum mmu_notifier_event, include/linux/mmu_notifier.h (same order in 6.1, 6.12 and 7.3).
INVALIDATE_EVENTS = (
    "unmap",
    "clear",
    "protection_vma",
    "protection_page",
    "soft_dirty",
    "release",
    "migrate",
    "exclusive",
)
PAGE_BITS = {
    "has_struct": 1 << 0,
    "tail": 1 << 1,
    "head": 1 << 2,
    "reserved": 1 << 3,
    "zero": 1 << 4,
    "zone_device": 1 << 5,
}
#: Value of a stage time that the fault never reached.
NEVER_REACHED = 0xFFFFFFFF

#: BPF ring buffer record header (include/uapi/linux/bpf.h: BPF_RINGBUF_HDR_SZ).
RING_HEADER = np.dtype([("len", "<u4"), ("pgoff", "<u4")])

PAGE_STATE = np.dtype(
    [
        ("flags", "<u8"),
        ("refcount", "<i4"),
        ("mapcount", "<i4"),
        ("bits", "<u4"),
        ("order", "u1"),
        ("pad", "u1", (3,)),
    ]
)
HEADER = np.dtype(
    [
        ("ts", "<u8"),
        ("fault_ts", "<u8"),
        ("seq", "<u4"),
        ("cpu", "<u2"),
        ("kind", "u1"),
        ("op", "u1"),
        ("tid", "<u4"),
        ("tgid", "<u4"),
        ("vm", "<u4"),
        ("vcpu", "<i4"),
        ("stack", "<i4"),
        ("pad", "<u4"),
    ]
)
FAULT = np.dtype(
    [
        ("h", HEADER),
        ("addr", "<u8"),
        ("error_code", "<u8"),
        ("gfn", "<u8"),
        ("hva", "<u8"),
        ("pfn", "<u8"),
        ("walk_pfn", "<u8"),
        ("vm_flags", "<u8"),
        ("mmu_seq", "<u8"),
        ("invalidate_seq", "<u8"),
        ("in_progress", "<u4"),
        ("t_faultin", "<u4"),
        ("t_gup", "<u4"),
        ("t_gup_end", "<u4"),
        ("t_faultin_end", "<u4"),
        ("t_map", "<u4"),
        ("ret", "<i4"),
        ("faultin_ret", "<i4"),
        ("slot", "<i4"),
        ("as_id", "u1"),
        ("level", "u1"),
        ("refcounted", "u1"),
        ("writable", "u1"),
        ("prefetch", "u1"),
        ("mmu", "u1"),
        ("sptes", "u1"),
        ("pad", "u1", (5,)),
        ("page", PAGE_STATE),
        ("page_end", PAGE_STATE),
    ]
)
EVENT = np.dtype(
    [
        ("h", HEADER),
        ("gfn", "<u8"),
        ("pfn", "<u8"),
        ("a", "<u8"),
        ("b", "<u8"),
        ("c", "<u8"),
        ("d", "<u4"),
        ("level", "u1"),
        ("as_id", "u1"),
        ("cause", "u1"),
        ("mmu", "u1"),
        ("page", PAGE_STATE),
    ]
)


def ring_dtype(record: np.dtype[np.void]) -> np.dtype[np.void]:
    """Return the dtype of one ring slot: the ring's own header, then the record.

    Raises ValueError for a record whose size is not a multiple of 8, since the ring would pad it.
    """
    if record.itemsize % 8:
        raise ValueError(f"record of {record.itemsize} bytes is not a multiple of 8")
    return np.dtype([("ring", RING_HEADER), ("rec", record)])
