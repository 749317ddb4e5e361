"""The tables of a trace: pandas, one per record kind, with only that kind's columns.

`chunks` gives them in pieces of bounded length, for traces larger than memory; `load` gives them
whole. Integers that can be null are pandas' nullable types, since a float would round 64 bits;
names are categories. May import: pandas, pyarrow, `tracer.schema`, `tracer.tracefile`.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from tracer.schema import FILE_KINDS, columns_of_kind
from tracer.tracefile import TraceReader

__all__ = (
    "CHUNK_ROWS",
    "DTYPES",
    "Tables",
    "chunks",
    "largest_groups",
    "load",
    "parse_notes",
    "stack",
)

#: A chunk is handed out when it has so many rows; it has fewer than a batch more.
CHUNK_ROWS = 1 << 18

_ORDER = ["ts", "cpu", "seq"]
#: pandas type of each Arrow type: those that can be null.
DTYPES = {
    pa.uint8(): pd.UInt8Dtype(),
    pa.uint16(): pd.UInt16Dtype(),
    pa.uint32(): pd.UInt32Dtype(),
    pa.uint64(): pd.UInt64Dtype(),
    pa.int16(): pd.Int16Dtype(),
    pa.int32(): pd.Int32Dtype(),
    pa.int64(): pd.Int64Dtype(),
    pa.bool_(): pd.BooleanDtype(),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Tables:
    """A trace in memory.

    `by_kind` has a table for every kind of `tracer.schema.FILE_KINDS` but NOTE, sorted by
    (ts, cpu, seq), empty if there are no such records. `info` is `TraceReader.info`.
    """

    by_kind: dict[str, pd.DataFrame]
    notes: list[dict[str, Any]]
    info: dict[str, Any]

    def __getitem__(self, kind: str) -> pd.DataFrame:
        return self.by_kind[kind]


def _table(kind: str, batches: list[pa.RecordBatch], columns: Sequence[str]) -> pd.DataFrame:
    if batches:
        return pa.Table.from_batches(batches).to_pandas(types_mapper=DTYPES.get)
    return pd.DataFrame({name: pd.Series(dtype="object") for name in columns})


def chunks(
    reader: TraceReader,
    columns: Mapping[str, Sequence[str]],
    rows_max: int = CHUNK_ROWS,
) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield (kind, table) for the kinds and columns named, each about `rows_max` rows long.

    A chunk is sorted by (ts, cpu, seq) only within the batches of the file that it is made of.
    All kinds are read, also those not asked for: so damage anywhere ends all of them at the same
    place, and `reader.info()` afterwards speaks of the same records as the tables.
    """
    wanted = list(dict.fromkeys(["kind", *(name for names in columns.values() for name in names)]))
    waiting: dict[str, list[pa.RecordBatch]] = {kind: [] for kind in columns}
    for batch in reader.batches(columns=wanted):
        kind = batch.column("kind")[0].as_py()
        if kind not in columns:
            continue
        waiting[kind].append(batch.select(list(columns[kind])))
        if sum(b.num_rows for b in waiting[kind]) >= rows_max:
            yield kind, _table(kind, waiting[kind], columns[kind])
            waiting[kind] = []
    for kind, batches in waiting.items():
        if batches:
            yield kind, _table(kind, batches, columns[kind])


def stack(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return tables below one another, numbered anew; empty ones may lack columns."""
    # pandas.concat warns of empty tables, since their dtypes say nothing.
    filled = [part for part in parts if len(part)]
    return pd.concat(filled, ignore_index=True) if filled else parts[-1].iloc[:0]


def largest_groups(
    table: pd.DataFrame, keys: Sequence[str], weight: str, limit: int
) -> list[pd.DataFrame]:
    """Return the rows of the groups with the greatest sums of `weight`, the greatest first."""
    group = table.groupby(list(keys), dropna=False, sort=False, observed=True).ngroup()
    sums = table[weight].groupby(group).sum().sort_values(ascending=False, kind="stable")
    return [table[group == number] for number in sums.index[:limit]]


def parse_notes(texts: Iterable[object]) -> list[dict[str, Any]]:
    """Return the notes that are JSON objects; a trace from strangers may hold anything else."""
    notes = []
    for text in texts:
        try:
            note = json.loads(str(text))
        except (ValueError, RecursionError):
            continue
        if isinstance(note, dict):
            notes.append(note)
    return notes


def load(path: Path) -> Tables:
    """Read a whole trace. Raises TraceFormatError if it is not one."""
    columns = {kind: columns_of_kind(kind) for kind in FILE_KINDS}
    parts: dict[str, list[pd.DataFrame]] = {kind: [] for kind in FILE_KINDS}
    with TraceReader(path) as reader:
        for kind, chunk in chunks(reader, columns):
            parts[kind].append(chunk)
        info = reader.info()
    notes = [text for chunk in parts.pop("NOTE") for text in chunk["note"]]
    by_kind = {}
    for kind, tables in parts.items():
        whole = stack([*tables, _table(kind, [], columns[kind])])
        order = [name for name in _ORDER if name in whole]
        by_kind[kind] = whole.sort_values(order, kind="stable", ignore_index=True)
    return Tables(by_kind, parse_notes(notes), info)
