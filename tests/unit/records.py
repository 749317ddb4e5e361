"""Small plausible records and traces, for any test that needs some.

records("FAULT", 3, gfn=[1, 2, 3], page__refcount=2)      an array as the kernel writes it
write_trace(path, [[("FAULT", ...), ("SPTE", ...)], ...])  a file of these groups
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from probes import wire
from tracer.schema import SCHEMA_VERSION
from tracer.tracefile import TraceMeta, TraceWriter

__all__ = ("RESULTS", "START_NS", "group", "meta", "records", "rows_of", "write_trace")

#: RET_PF_* as Linux 6.12 numbers them.
RESULTS = {
    0: "continue",
    1: "retry",
    2: "emulate",
    3: "write_protected",
    4: "invalid",
    5: "fixed",
    6: "spurious",
}
FIXED = 5
#: CLOCK_MONOTONIC at the beginning of every made-up recording.
START_NS = 1_000_000_000_000

_SPTE_BITS = 0x8600000000000B77  # present, writable, accessed, dirty, host- and MMU-writable
_PAGE_FLAGS = 0x17FFFFC0000000

Group = list[tuple[str, np.ndarray]]


def records(
    kind: str, count: int, *, seed: int = 1, start_ns: int = START_NS, **fields: Any
) -> np.ndarray:
    """Return records of one kind, sorted by (ts, cpu, seq), the same for the same arguments.

    `fields` replace what is made up: names of the wire, `__` for a dot (`h__vm=2`,
    `page__bits=0`), a value or one for each record.
    """
    draw = np.random.default_rng([seed, wire.KINDS.index(kind)])
    out = np.zeros(count, wire.FAULT if kind == "FAULT" else wire.EVENT)
    h = out["h"]
    h["ts"] = start_ns + np.cumsum(draw.integers(1_000, 90_000, count)).astype("u8")
    h["seq"] = np.arange(count)
    h["cpu"] = draw.integers(0, 4, count)
    h["kind"] = wire.KINDS.index(kind)
    h["tid"], h["tgid"], h["vm"], h["stack"] = 4243, 4242, 1, -1
    h["vcpu"] = -1
    gfn = draw.integers(0x100, 0x40000, count).astype("u8")
    pfn = gfn + np.uint64(0x100000)
    if kind == "FAULT":
        _make_faults(out, draw, gfn, pfn)
    else:
        _make_events(kind, out, gfn, pfn)
    for name, value in fields.items():
        *path, last = name.split("__")
        target = out
        for step in path:
            target = target[step]
        target[last] = value
    order = np.lexsort([h["seq"], h["cpu"], h["ts"]])
    return out[order]


def _make_faults(
    out: np.ndarray, draw: np.random.Generator, gfn: np.ndarray, pfn: np.ndarray
) -> None:
    out["h"]["vcpu"] = draw.integers(0, 2, len(out))
    stages = np.cumsum(draw.integers(200, 5_000, (6, len(out))), axis=0)
    names = ("t_faultin", "t_gup", "t_gup_end", "t_faultin_end", "t_map")
    for name, stage in zip(names, stages[:5], strict=True):
        out[name] = stage
    out["h"]["fault_ts"] = out["h"]["ts"] - stages[5].astype("u8")
    out["gfn"], out["pfn"], out["addr"] = gfn, pfn, gfn << np.uint64(12)
    out["hva"] = np.uint64(0x7F0000000000) + out["addr"]
    out["error_code"] = 0x100000006
    out["walk_pfn"] = (1 << 64) - 1
    out["mmu_seq"], out["invalidate_seq"] = 7, 7
    out["ret"], out["slot"], out["level"], out["refcounted"] = FIXED, 0, 1, 2
    out["writable"], out["mmu"], out["sptes"] = 1, 1, 1
    for page, count in (("page", 3), ("page_end", 2)):
        _make_page(out[page], count)


def _make_events(kind: str, out: np.ndarray, gfn: np.ndarray, pfn: np.ndarray) -> None:
    if kind in ("SPTE", "RELEASE", "PIN"):
        out["gfn"] = gfn
    if kind in ("SPTE", "RELEASE", "PIN", "PAGE_FREE", "PAGE_ALLOC"):
        out["pfn"] = pfn
        _make_page(out["page"], 2)
    if kind == "SPTE":
        out["h"]["op"] = wire.OPS.index("install")
        out["b"] = np.uint64(_SPTE_BITS) | pfn << np.uint64(12)
        out["c"] = 0xFFFF888000000000
        out["level"], out["mmu"], out["cause"] = 1, 1, wire.CAUSES.index("fault")
    elif kind == "RELEASE":
        out["cause"] = wire.CALLS.index("page_clean")
    elif kind in ("INVALIDATE", "VMA"):
        out["h"]["op"] = wire.OPS.index("start" if kind == "INVALIDATE" else "seen")
        out["a"] = np.uint64(0x7F0000000000) + (gfn << np.uint64(12))
        out["b"] = out["a"] + np.uint64(4096)
        out["c"], out["d"], out["cause"] = 8, 1, 1 if kind == "INVALIDATE" else 0
    elif kind == "PIN":
        out["h"]["op"], out["b"] = wire.OPS.index("map"), 0x7F0000000000
    elif kind == "SLOT":
        out["h"]["op"] = wire.OPS.index("create")
        out["gfn"], out["a"], out["b"], out["d"] = 0, 0x40000, 0x7F0000000000, 3
    elif kind == "VM":
        out["h"]["op"], out["a"], out["d"] = wire.OPS.index("create"), 0xFFFFC90000000000, 4242


def _make_page(page: np.ndarray, refcount: int) -> None:
    page["flags"], page["refcount"], page["mapcount"] = _PAGE_FLAGS, refcount, 0
    page["bits"] = wire.PAGE_BITS["has_struct"]


def group(number: int = 0, count: int = 5, kinds: Sequence[str] = ("FAULT", "SPTE")) -> Group:
    """Return one flush: `count` records of each kind, a millisecond after the flush before."""
    start = START_NS + number * 1_000_000
    return [(kind, records(kind, count, seed=number + 1, start_ns=start)) for kind in kinds]


def meta(**changes: Any) -> TraceMeta:
    """Return a description; `changes` replace its fields."""
    fields: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "pfntrace_version": "0.1.0",
        "command": ("pfntrace", "record", "--", "qemu"),
        "start_unix_ns": 1_700_000_000_000_000_000,
        "start_monotonic_ns": START_NS,
        "hostname": "host",
        "facts": '{"facts_version": 1, "release": "6.12.0-test"}',
        "profile": {
            "generation": "G0b",
            "hooks": [{"hook": "fault", "symbols": ["f"], "how": "kprobe", "note": ""}],
            "missing": [],
            "results": {str(value): name for value, name in RESULTS.items()},
        },
        "settings": {"gfns": None},
    }
    return TraceMeta(**(fields | changes))


def write_trace(
    path: Path, groups: Sequence[Group] | None = None, *, complete: bool = True, **changes: Any
) -> Path:
    """Write a trace and return its path; without `complete` as a killed recorder leaves it.

    The same arguments give the same bytes. `changes` go to `meta`.
    """
    writer = TraceWriter(path, meta(**changes))
    try:
        for flush in [group()] if groups is None else groups:
            writer.write_group(flush)
        if complete:
            writer.close({"why": "duration"}, ts=START_NS + 3_000_000_000)
    finally:
        writer.abandon()
    return path


def rows_of(reader_or_batches: Any) -> list[dict[str, Any]]:
    """Return the rows of some batches as dicts."""
    return [row for batch in reader_or_batches for row in batch.to_pylist()]
