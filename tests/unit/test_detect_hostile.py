"""Detectors of mappings asked about records that no kernel wrote: an answer, never a traceback."""

import numpy as np
import pytest
from unit.mapkit import GENERATIONS, ask, reclaim

from probes import wire

NAMES = (
    *("use-after-free", "invalidation", "stale-slot", "install", "gfn-outside", "two-leaves"),
    *("leaf-replaced", "unpaired", "writable"),
)
#: Numbers at which something wraps around or ends.
_SMALL = (0, 1, 511, 512, 1 << 18, (1 << 40) - 1, 1 << 40, 1 << 52)
EDGES = np.array([*_SMALL, (1 << 63) - 1, 1 << 63, (1 << 64) - 1], np.uint64)
OPS = {
    "SPTE": ("install", "change", "zap"),
    "INVALIDATE": ("start", "end"),
    "SLOT": ("create", "delete", "move", "flags", "seen"),
    "VM": ("create", "delete"),
}


def absurd(draw, kind, copy, count=60):
    """Return records of a kind whose numbers are drawn from the edges."""
    out = np.zeros(count, wire.FAULT if kind == "FAULT" else wire.EVENT)
    for name in out.dtype.names or ():
        dtype = out.dtype[name]
        if dtype.kind in "ui":
            bits = dtype.itemsize * 8
            out[name] = draw.choice(EDGES, count).astype(f"u{bits // 8}").view(dtype)
    h, real = out["h"], copy["SPTE"]["h"]["ts"]
    h["ts"] = draw.integers(int(real.min()), int(real.max()), count)
    h["fault_ts"] = draw.choice(EDGES, count)
    h["kind"], h["seq"] = wire.KINDS.index(kind), np.arange(count)
    h["vm"], h["tid"] = (draw.choice(EDGES, count).astype(np.uint32) for _ in range(2))
    h["op"] = draw.choice([wire.OPS.index(op) for op in OPS.get(kind, ("none",))], count)
    h["vcpu"] = h["stack"] = -1
    # Names and flags are numbers of a few values; the file holds no others.
    small = {"mmu": 3, "cause": 8, "writable": 2, "prefetch": 2, "refcounted": 3}
    for name, end in small.items():
        if name in (out.dtype.names or ()):
            out[name] = draw.integers(0, end, count)
    if kind == "FAULT":
        out["ret"] = draw.integers(-20, 7, count)
    return out


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rows_max", [1 << 18, 50])
def test_absurd_records_among_sane_ones(seed, rows_max, tmp_path):
    draw = np.random.default_rng(seed)
    copy = reclaim(GENERATIONS[seed % 3], ("tdp", "shadow")[seed // 3])
    for kind in ("SPTE", "FAULT", "PAGE_FREE", "PAGE_ALLOC", "INVALIDATE", "SLOT", "VM"):
        copy[kind] = np.concatenate([copy[kind], absurd(draw, kind, copy)])
    result = ask(copy, tmp_path, *NAMES, rows_max=rows_max)
    # Such a trace is not sane, and what is said of it can be written down.
    assert result.anomalies
    assert result.to_json()["findings"]


@pytest.mark.parametrize("kind", ["SPTE", "FAULT", "PAGE_FREE", "INVALIDATE", "SLOT", "VM"])
def test_a_kind_that_is_missing_altogether(kind, tmp_path):
    copy = reclaim("6.12")
    copy[kind] = copy[kind][:0]
    result = ask(copy, tmp_path, *NAMES)
    # Without faults or slots what they would explain is left; nothing else is made up.
    left = {"FAULT": set(), "SLOT": {"stale-slot"}}.get(kind, set())
    assert {finding.detector for finding in result.findings} == left
