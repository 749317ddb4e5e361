"""Rows of one kind as numpy arrays: what a detector works on, a chunk of the trace at a time.

Nothing is converted before it is asked for, and a column without nulls is not copied. Nulls are
plain numbers here (`NULLS`), the ones that the wire format has, since masked arrays would cost
more than the work; names are their numbers (`code`).
May import: numpy, pandas, pyarrow, `analysis.tables`, `tracer.schema`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa

from analysis.tables import DTYPES
from tracer.schema import COLUMNS, NAMES, arrow_schema, columns_of_kind

__all__ = ("NULLS", "Records", "code", "codes", "numbers")

_ALL_ONES = (1 << 64) - 1
_NEVER = (1 << 32) - 1
#: What a null of a column is in `Records`; 0 for columns that are not named. `refcount`,
#: `mapcount` and `page_flags` say something only where `page_bits` is not 0.
NULLS: dict[str, int] = {
    **dict.fromkeys(("vcpu", "stack", "slot"), -1),
    **dict.fromkeys(("refcount", "refcount_end"), -1),
    **dict.fromkeys(("pfn", "walk_pfn"), _ALL_ONES),
    **dict.fromkeys(("t_faultin", "t_gup", "t_gup_end", "t_faultin_end", "t_map"), _NEVER),
    # A refcounted flag that the kernel does not have: neither 0 nor 1.
    "refcounted": 2,
}
_SCHEMA = arrow_schema()
_TYPES = {column.name: column.type for column in COLUMNS}


def code(column: str, name: str) -> int:
    """Return the number that stands for a name in a column, say `code("op", "zap")`.

    Not for `result`, whose names are the kernel's: ask `Recording.ret` and compare `ret`.
    """
    key = next(c.names for c in COLUMNS if c.name == column)
    return NAMES[key].index(name)


def codes(column: str, *names: str) -> npt.NDArray[np.int8]:
    """Return the numbers of several names."""
    return np.array([code(column, name) for name in names], np.int8)


class Records:
    """Records of one kind in order of (ts, cpu, seq), as columns.

    `records["pfn"]` is an array; its nulls are `NULLS["pfn"]`. Arrays are read-only.
    """

    def __init__(self, kind: str, batches: Sequence[pa.RecordBatch] = ()) -> None:
        """Take batches that follow one another in time."""
        self.kind = kind
        self._batches = [batch for batch in batches if len(batch)]
        self._cache: dict[str, npt.NDArray[Any]] = {}
        self._length = sum(len(batch) for batch in self._batches)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        found = self._cache.get(name)
        if found is None:
            found = self._cache[name] = self._column(name)
        return found

    def known(self, name: str) -> npt.NDArray[np.bool_]:
        """Tell where a column is not null."""
        key = f"{name}?"
        found = self._cache.get(key)
        if found is None:
            parts = [_valid(batch.column(name)) for batch in self._batches]
            found = self._cache[key] = np.concatenate(parts) if parts else np.zeros(0, bool)
        return found

    def table(self, columns: Sequence[str]) -> pa.Table:
        """Return some columns as they are in the file, nulls and names included."""
        schema = pa.schema([_SCHEMA.field(name) for name in columns])
        batches = [batch.select(list(columns)) for batch in self._batches]
        return pa.Table.from_batches(batches, schema)

    def frame(self, columns: Sequence[str], which: npt.NDArray[np.bool_]) -> pd.DataFrame:
        """Return some columns of the rows where `which` is true, as `analysis.tables` has them."""
        chosen = self.table(columns).filter(pa.array(which))
        return chosen.to_pandas(types_mapper=DTYPES.get)

    def rows(self, at: Sequence[int] | npt.NDArray[Any]) -> list[dict[str, Any]]:
        """Return some rows as dicts of all columns that were read: slow, for what was found."""
        starts = np.cumsum([0, *(len(batch) for batch in self._batches)])
        found = []
        for row in at:
            part = int(np.searchsorted(starts, row, "right")) - 1
            found += self._batches[part].slice(int(row - starts[part]), 1).to_pylist()
        return found

    def key(self, at: int) -> tuple[str, int, int, int]:
        """Return (kind, ts, cpu, seq) of a row, which names it in the file."""
        ts, cpu, seq = (int(self[name][at]) for name in ("ts", "cpu", "seq"))
        return (self.kind, ts, cpu, seq)

    def _column(self, name: str) -> npt.NDArray[Any]:
        if name not in columns_of_kind(self.kind):
            raise KeyError(f"{self.kind} records have no column {name}")
        parts = [numbers(batch.column(name), NULLS.get(name, 0)) for batch in self._batches]
        if len(parts) == 1:
            return parts[0]
        if not parts:
            return np.zeros(0, _dtype(_TYPES[name], NULLS.get(name, 0)))
        return np.concatenate(parts)


def _dtype(kind: pa.DataType, null: int) -> Any:
    if pa.types.is_dictionary(kind):
        return np.int8
    if pa.types.is_boolean(kind):
        return np.uint8 if null > 1 else np.bool_
    if pa.types.is_string(kind):
        return object
    return np.dtype(str(kind))


def numbers(column: pa.Array, null: int = 0) -> npt.NDArray[Any]:
    """Return an Arrow column as numpy, its nulls as a number; names as their numbers."""
    # Arrow's own to_numpy() makes floats of integers with nulls.
    kind = column.type
    if pa.types.is_string(kind):
        return np.array(column.to_pylist(), object)
    if pa.types.is_dictionary(kind):
        column, null = column.indices, 0
        kind = column.type
    if pa.types.is_boolean(kind):
        bits = _bits(column.buffers()[1], column.offset, len(column))
        values: npt.NDArray[Any] = bits if null > 1 else bits.view(np.bool_)
    else:
        dtype = np.dtype(str(kind))
        data = np.frombuffer(column.buffers()[1], dtype, column.offset + len(column))
        values = data[column.offset :]
    if not column.null_count:
        return values
    return np.where(_valid(column), values, values.dtype.type(null))


def _valid(column: pa.Array) -> npt.NDArray[np.bool_]:
    bitmap = column.buffers()[0]
    if bitmap is None or not column.null_count:
        return np.ones(len(column), np.bool_)
    return _bits(bitmap, column.offset, len(column)).view(np.bool_)


def _bits(buffer: Any, offset: int, length: int) -> npt.NDArray[np.uint8]:
    count = offset + length
    packed = np.frombuffer(buffer, np.uint8, (count + 7) // 8)
    return np.unpackbits(packed, count=count, bitorder="little")[offset:]
