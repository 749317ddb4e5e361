"""SPTE and SLOT records written down as dicts, in the forms in which the analysis takes them."""

from typing import Any

import numpy as np
from unit.records import RESULTS

from analysis.lifeslots import Slots
from probes import wire
from tracer.columns import ColumnMaker

__all__ = ("as_batch", "plain", "slot_changes")

Row = dict[str, Any]


def as_batch(rows: list[Row]):
    """Return records as a trace has them. `rows` say what differs from a plain install."""
    out = np.zeros(len(rows), wire.EVENT)
    h = out["h"]
    h["kind"], h["stack"], h["tgid"] = wire.KINDS.index("SPTE"), -1, 77
    h["seq"] = np.arange(len(rows))
    for at, row in enumerate(rows):
        h["op"][at] = wire.OPS.index(row["op"])
        for name in ("ts", "fault_ts", "cpu", "tid", "vm", "vcpu"):
            h[name][at] = row[name]
        for name in ("gfn", "pfn", "level", "as_id"):
            out[name][at] = row[name]
        for name, field in (("old", "a"), ("new", "b"), ("sptep", "c")):
            out[field][at] = row[name]
        out["cause"][at] = wire.CAUSES.index(row["cause"])
        out["mmu"][at] = wire.MMUS.index(row["mmu"])
        for name in ("bits", "refcount", "mapcount"):
            out["page"][name][at] = row[name]
    return ColumnMaker(RESULTS).records("SPTE", out)


def slot_changes(rows: list[Row]) -> Slots:
    """Return SLOT rows as the fast way takes them, those that were seen late first."""
    rows = sorted(rows, key=lambda row: row["op"] != "seen")
    columns: dict[str, Any] = {
        "ts": np.array([0 if r["op"] == "seen" else r["ts"] for r in rows], np.uint64),
        "op": np.array([wire.OPS.index(r["op"]) for r in rows], np.int8),
    }
    for name in ("vm", "as_id", "slot", "gfn", "npages"):
        columns[name] = np.array([r[name] for r in rows], np.uint64)
    return Slots(columns)


def plain(row: Row) -> Row:
    """Return a row of a trace without nulls that are no question."""
    zeros: dict[str, Any] = dict.fromkeys(
        ("vm", "as_id", "level", "gfn", "tid", "tgid", "cpu", "seq", "ts"), 0
    )
    zeros |= {"old": 0, "new": 0, "pfn": (1 << 64) - 1, "cause": "other"}
    return {k: zeros.get(k) if v is None else v for k, v in row.items()}
