"""Whole traces made record by record, for tests of what is said and drawn of a trace.

    write(path, events("VM", 1, "create"), faults(5), sptes(5, "install"), sptes(5, "zap"))

Every record can be changed before it is written; unlike those of `unit.records` nothing in them is
drawn at random, so that a test can say what comes out.
"""

from typing import Any

import numpy as np

from probes import wire
from tracer.schema import SCHEMA_VERSION
from tracer.tracefile import TraceMeta, TraceWriter

__all__ = (
    "ALL_ONES",
    "ERR_FAULT",
    "KINDS",
    "events",
    "faults",
    "sptes",
    "write",
)

KINDS = wire.KINDS
ALL_ONES = (1 << 64) - 1
ERR_FAULT = 0x7FF << 52
RESULTS = {"1": "retry", "2": "emulate", "4": "invalid", "5": "fixed", "6": "spurious"}
#: SPTE_MMU_PRESENT_MASK, PT_PAGE_SIZE_MASK, PT_WRITABLE_MASK, arch/x86/kvm/mmu/spte.h.
PRESENT, LARGE, WRITABLE = 1 << 11, 1 << 7, 1 << 1


def faults(count, **fields):
    """Return FAULT records of VM 1 that fixed one page each; `fields` overrides."""
    records = np.zeros(count, wire.FAULT)
    records["h"]["kind"] = KINDS.index("FAULT")
    records["h"]["ts"] = np.arange(count) + 1000
    records["h"]["tgid"], records["h"]["vm"], records["h"]["stack"] = 219, 1, -1
    records["gfn"] = np.arange(count)
    records["hva"] = 0x7000_0000 + np.arange(count) * 4096
    records["pfn"] = 0x1000 + np.arange(count)
    records["walk_pfn"] = ALL_ONES
    records["level"], records["mmu"], records["slot"], records["ret"] = 1, 1, 1, 5
    records["refcounted"] = 2
    for page, refcount in (("page", 3), ("page_end", 2)):
        records[page]["bits"], records[page]["refcount"] = 1, refcount
    for name, value in fields.items():
        records[name] = value
    return records


def events(kind, count, op=None, **fields):
    """Return records of another kind of VM 1."""
    records = np.zeros(count, wire.EVENT)
    records["h"]["kind"], records["h"]["vcpu"] = KINDS.index(kind), -1
    records["h"]["op"] = wire.OPS.index(op) if op else 0
    records["h"]["ts"] = np.arange(count) + 2000
    records["h"]["vm"] = 1
    for name, value in fields.items():
        records[name] = value
    return records


def sptes(count, op, cause="fault", level=1):
    """Return SPTE records of VM 1 that install, change or zap one leaf each."""
    found = events("SPTE", count, op, level=level, mmu=1, cause=wire.CAUSES.index(cause))
    pages = 512 ** (level - 1)
    found["gfn"], found["pfn"] = np.arange(count) * pages, (0x1000 + np.arange(count)) * pages
    leaf = found["pfn"] << 12 | PRESENT | WRITABLE | (LARGE if level > 1 else 0)
    found["a"] = leaf if op != "install" else 0
    found["b"] = leaf if op != "zap" else 0
    found["page"]["bits"], found["page"]["refcount"] = 1, 3
    return found


def write(path, *groups, notes=(), summary=None, losses=None, complete=True, **meta):
    """Write a trace of groups of records."""
    profile = {
        "generation": meta.pop("generation", "G0b"),
        "hooks": [{"hook": "gup"}, {"hook": "walk"}],
        "missing": meta.pop("missing", []),
        "results": RESULTS,
    }
    known: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "pfntrace_version": "0",
        "command": ("pfntrace", "record"),
        "start_unix_ns": 0,
        "start_monotonic_ns": 0,
        "hostname": "",
        "facts": '{"release": "6.12.0"}',
        "profile": profile,
    }
    writer = TraceWriter(path, TraceMeta(**(known | meta)))
    for records in groups:
        writer.write_group([(KINDS[records["h"]["kind"][0]], records)])
    for note in notes:
        writer.write_note(note, ts=1)
    if losses:
        writer.write_losses(losses, ts=1)
    if complete:
        writer.close(summary or {}, ts=1)
    else:
        writer.flush()
        writer.abandon()
    return path
