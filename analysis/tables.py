"""The tables of a trace: one pandas DataFrame per record kind, with only that kind's columns.

`load` keeps whole tables in memory. May import: pandas, pyarrow, `tracer.tracefile`,
`tracer.schema`, `probes.errors`.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from tracer.schema import COLUMNS
from tracer.tracefile import TraceReader

__all__ = ("Tables", "load")

_KINDS = (
    "FAULT",
    "SPTE",
    "RELEASE",
    "INVALIDATE",
    "PAGE_FREE",
    "PAGE_ALLOC",
    "PIN",
    "SLOT",
    "VM",
)


@dataclasses.dataclass(frozen=True, slots=True)
class Tables:
    """A trace in memory: `by_kind[KIND]` sorted by ts, the notes, and the trace's own `info`."""

    by_kind: dict[str, pd.DataFrame]
    notes: list[dict[str, Any]]
    info: dict[str, Any]

    def __getitem__(self, kind: str) -> pd.DataFrame:
        return self.by_kind[kind]


def _columns(kind: str) -> list[str]:
    return [c.name for c in COLUMNS if not c.kinds or kind in c.kinds]


def _table(kind: str, batches: list[pa.RecordBatch]) -> pd.DataFrame:
    names = _columns(kind)
    if not batches:
        return pd.DataFrame({name: pd.Series(dtype="object") for name in names})
    table = pa.Table.from_batches([b.select(names) for b in batches])
    # Nullable dtypes keep 64-bit values exact where some are missing.
    frame = table.to_pandas(types_mapper=_DTYPES.get)
    return frame.sort_values(["ts", "cpu", "seq"], kind="stable", ignore_index=True)


_DTYPES = {
    pa.uint8(): pd.UInt8Dtype(),
    pa.uint16(): pd.UInt16Dtype(),
    pa.uint32(): pd.UInt32Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
    pa.int16(): pd.Int16Dtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}


def load(path: Path) -> Tables:
    """Read a trace. Raises TraceFormatError if it is not one."""
    reader = TraceReader(path)
    by_kind: dict[str, list[pa.RecordBatch]] = {kind: [] for kind in _KINDS}
    notes: list[dict[str, Any]] = []
    for batch in reader.batches():
        kind = batch.column("kind")[0].as_py()
        if kind == "NOTE":
            notes += [json.loads(text) for text in batch.column("note").to_pylist()]
        elif kind in by_kind:
            by_kind[kind].append(batch)
    tables = {kind: _table(kind, batches) for kind, batches in by_kind.items()}
    return Tables(tables, notes, reader.info())
