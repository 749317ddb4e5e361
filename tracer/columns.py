"""From wire records to Arrow columns, a whole batch at a time.

Runs in the recorder, so each field is gathered once into a contiguous array and handed to Arrow
as it is; nothing here is done per record in Python. Columns that a kind does not fill are slices
of one all-null array. May import: `probes.wire`, `tracer.schema`, numpy, pyarrow (not its compute
module, which takes as long to import as all the rest).
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tracer import schema

__all__ = ("ROWS_MAX", "ColumnMaker", "columns_of")

#: Rows in one batch, part of the file format: it bounds what a reader allocates for one.
ROWS_MAX = 1 << 15

Records = npt.NDArray[np.void]


@dataclasses.dataclass(frozen=True, slots=True)
class _Step:
    # How one column of one kind is made: `gather` indexes the gathered fields, `null_at` the one
    # that says null (-1: none).
    column: int
    type: pa.DataType
    how: str
    gather: int
    null: int | None
    null_at: int


@dataclasses.dataclass(frozen=True, slots=True)
class _Plan:
    # What one kind needs: fields with the type they are gathered as, then the columns.
    fields: tuple[tuple[tuple[str, ...], np.dtype[Any]], ...]
    steps: tuple[_Step, ...]
    #: columns that the kind does not fill.
    absent: tuple[int, ...]


def _gathered_dtype(column: schema.Column) -> np.dtype[Any]:
    """Type of the contiguous array: the column's own where it has one, else the wire's."""
    if column.names == "result":
        return np.dtype("<i4")
    if column.names or pa.types.is_boolean(column.type):
        return np.dtype("u1")
    return np.dtype(str(column.type))


def _how(column: schema.Column) -> str:
    if column.name in ("kind", "dur"):
        return column.name
    if column.names:
        return "result" if column.names == "result" else "name"
    return "bool" if pa.types.is_boolean(column.type) else "plain"


@functools.cache
def _plan(kind: str) -> _Plan:
    fields: dict[tuple[str, np.dtype[Any]], int] = {}
    steps = []
    for index, column in enumerate(schema.COLUMNS):
        source = column.sources.get(kind)
        if source is None:
            continue
        how = _how(column)
        gather = null_at = -1
        if source.field:
            key = (source.field, _gathered_dtype(column))
            gather = null_at = fields.setdefault(key, len(fields))
        if source.null_field:
            null_at = fields.setdefault((source.null_field, np.dtype("<u4")), len(fields))
        null = source.null
        steps.append(
            _Step(index, column.type, how, gather, null, null_at if null is not None else -1)
        )
    paths = tuple((tuple(field.split(".")), dtype) for field, dtype in fields)
    absent = set(range(len(schema.COLUMNS))) - {step.column for step in steps}
    return _Plan(paths, tuple(steps), tuple(sorted(absent)))


def _gather(records: Records, plan: _Plan) -> list[npt.NDArray[Any]]:
    """Copy each needed field of all records into a contiguous array of its own."""
    gathered = []
    for path, dtype in plan.fields:
        view: npt.NDArray[Any] = records
        for name in path:
            view = view[name]
        gathered.append(view.astype(dtype, order="C"))
    return gathered


def _validity(null: npt.NDArray[np.bool_]) -> tuple[pa.Buffer | None, int]:
    """Return Arrow's validity bitmap and null count for a mask that is True where null."""
    count = int(np.count_nonzero(null))
    if not count:
        return None, 0
    return pa.py_buffer(np.packbits(~null, bitorder="little")), count


def _plain_array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """Make a column of integers or text without nulls.

    pa.array() would do, but it imports pandas to ask whether it was given one: three seconds in
    the lab, of a recorder that needs none of it.
    """
    if kind != pa.utf8():
        data = np.array(values, np.dtype(str(kind)))
        return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(data)])
    texts = [str(v).encode() for v in values]
    ends = np.cumsum([0, *map(len, texts)], dtype="i4")
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(b"".join(texts))]
    return pa.Array.from_buffers(kind, len(texts), buffers)


def _renamed(array: pa.DictionaryArray, names: Any) -> tuple[int, list[pa.Buffer | None], int]:
    """Return rows, buffers and nulls of a column of names whose numbers are those of `names`."""
    at = np.frombuffer(array.indices.buffers()[1], "i1")[array.offset : array.offset + len(array)]
    ours, theirs = names.to_pylist(), array.dictionary.to_pylist()
    missing = len(ours)
    number = np.array([ours.index(n) if n in ours else missing for n in theirs], "i2")
    null = np.zeros(len(array), bool)
    if array.null_count:
        bits = np.unpackbits(np.frombuffer(array.buffers()[0], "u1"), bitorder="little")
        null = bits[array.offset : array.offset + len(array)] == 0
    found = number[np.where(null, 0, at)]
    if (found[~null] == missing).any():
        raise ValueError("a name that no pfntrace of this version writes")
    validity, nulls = _validity(null)
    return len(array), [validity, pa.py_buffer(found.astype("i1"))], nulls


class ColumnMaker:
    """Makes the batches of one file: its names of results are those of one kernel."""

    def __init__(self, results: Mapping[int, str]) -> None:
        self.schema = schema.arrow_schema()
        names = {**schema.NAMES, "result": schema.result_names(results)}
        # One Arrow array per column, so that each column has its own dictionary id in the file.
        self._names: list[Any] = [
            _plain_array(names[c.names], pa.utf8()) if c.names else None for c in schema.COLUMNS
        ]
        zeros = pa.py_buffer(np.zeros(ROWS_MAX * 8 + 8, "u1"))
        self._nulls = [self._null_column(i, zeros) for i in range(len(schema.COLUMNS))]

    def _null_column(self, index: int, zeros: pa.Buffer) -> pa.Array:
        column, names = schema.COLUMNS[index], self._names[index]
        # Text needs offsets too, which are zeros as well.
        buffers = [zeros, zeros, zeros] if column.type == pa.utf8() else [zeros, zeros]
        return self._array(column.type, ROWS_MAX, buffers, ROWS_MAX, names)

    @staticmethod
    def _array(
        kind: pa.DataType, rows: int, buffers: list[pa.Buffer | None], nulls: int, names: Any
    ) -> pa.Array:
        if names is None:
            return pa.Array.from_buffers(kind, rows, buffers, nulls)
        return pa.DictionaryArray.from_buffers(kind, rows, buffers, names, nulls)

    def records(self, kind: str, records: Records) -> pa.RecordBatch:
        """Return wire records of one kind as a batch; at most ROWS_MAX of them.

        `records` is of dtype `wire.FAULT` for FAULT, else `wire.EVENT`, contiguous or strided; it
        is copied. Numbers that have no name become null.
        """
        rows = len(records)
        if rows > ROWS_MAX:
            raise ValueError(f"{rows} rows in one batch, {ROWS_MAX} at most")
        plan = _plan(kind)
        gathered = _gather(records, plan)
        arrays: list[Any] = [None] * len(self._nulls)
        for column in plan.absent:
            arrays[column] = self._nulls[column].slice(0, rows)
        masks: dict[tuple[int, int], tuple[pa.Buffer | None, int]] = {}
        for step in plan.steps:
            arrays[step.column] = self._make(kind, step, gathered, rows, masks)
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def _make(
        self,
        kind: str,
        step: _Step,
        gathered: list[npt.NDArray[Any]],
        rows: int,
        masks: dict[tuple[int, int], tuple[pa.Buffer | None, int]],
    ) -> pa.Array:
        names = self._names[step.column]
        validity, nulls = None, 0
        if step.how == "name":
            values = gathered[step.gather]
            null = values >= len(names)
            if step.null is not None:
                null |= values == step.null
            validity, nulls = _validity(null)
        elif step.null is not None:
            key = (step.null_at, step.null)
            if key not in masks:
                masks[key] = _validity(gathered[step.null_at] == step.null)
            validity, nulls = masks[key]
        if step.how == "kind":
            values = np.full(rows, schema.NAMES["kind"].index(kind), "i1")
        elif step.how == "dur":
            values = (gathered[0] - gathered[1]).view("<i8")  # ts and fault_ts come first
        elif step.how == "result":
            ret = gathered[step.gather]
            values = np.where(ret < 0, 0, np.minimum(ret, len(names) - 2) + 1).astype("i1")
        elif step.how == "bool":
            values = np.packbits(gathered[step.gather], bitorder="little")
        else:
            values = gathered[step.gather]
        return self._array(step.type, rows, [validity, pa.py_buffer(values)], nulls, names)

    def adopt(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return rows of another trace as rows of this one, that is with its numbers for names.

        `batch` has all columns. Raises ValueError for a name that this file does not have.
        """
        arrays = []
        for column, names, array in zip(schema.COLUMNS, self._names, batch.columns, strict=True):
            if names is not None:
                array = self._array(column.type, *_renamed(array, names), names)
            arrays.append(array)
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)

    def rows(self, kind: str, columns: Mapping[str, Sequence[Any]]) -> pa.RecordBatch:
        """Return rows that the recorder itself makes (LOSS, NOTE) as a batch.

        `columns` are lists of equal length, names as their dictionary's text; `kind` is added.
        """
        count = len(next(iter(columns.values())))
        arrays = [null.slice(0, count) for null in self._nulls]
        for index, column in enumerate(schema.COLUMNS):
            names = self._names[index]
            if column.name == "kind":
                values: Sequence[Any] = [kind] * count
            elif column.name in columns:
                values = columns[column.name]
            else:
                continue
            if names is None:
                arrays[index] = _plain_array(values, column.type)
            else:
                text = names.to_pylist()
                at = np.array([text.index(v) for v in values], "i1")
                buffers = [None, pa.py_buffer(at)]
                arrays[index] = self._array(column.type, count, buffers, 0, names)
        return pa.RecordBatch.from_arrays(arrays, schema=self.schema)


@functools.cache
def _plain_maker() -> ColumnMaker:
    return ColumnMaker({})


def columns_of(kind: str, records: Records) -> pa.RecordBatch:
    """Return wire records of one kind as a batch, results without their kernel's names."""
    return _plain_maker().records(kind, records)
