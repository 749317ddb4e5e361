"""`pfntrace export`: tables of a trace as Parquet or CSV files, or a trace for Perfetto's UI.

Rows pass through in pieces, so a trace may be larger than memory. What a table holds is declared
in `analysis.schema` (docs/TABLES.md); rows of records are in order of (ts, cpu, seq), lives in
order of their ends. A Parquet file carries in its metadata, key `pfntrace`, what the trace lost
and whether it is complete. May import: `analysis`, `probes.errors`, `tracer`, pandas, pyarrow.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pandas as pd
import pyarrow as pa

from analysis.outfile import check_new, new_file
from analysis.schema import KINDS_OF_TABLE, TABLES
from probes.errors import OutputError, TraceFormatError, UsageError
from tracer.schema import COLUMNS
from tracer.tracefile import TraceReader

__all__ = ("FORMATS", "Exported", "arrow_table_schema", "export", "table_batches")

FORMATS = ("parquet", "csv", "perfetto")
#: Rows written at once: a row group of Parquet.
_ROWS_AT_ONCE = 1 << 17
#: What a Parquet file says of the trace it comes from.
_INFO = (
    *("records", "produced", "lost", "filtered", "torn", "complete", "reason", "kernel"),
    *("generation", "hostname", "start", "duration_s", "schema_version"),
)
_ARROW = {
    "int64": pa.int64(),
    "uint64": pa.uint64(),
    "uint32": pa.uint32(),
    "uint8": pa.uint8(),
    "bool": pa.bool_(),
    "Int32": pa.int32(),
    "Int64": pa.int64(),
    "UInt16": pa.uint16(),
    "UInt32": pa.uint32(),
    "UInt64": pa.uint64(),
    "text": pa.utf8(),
    "category": pa.dictionary(pa.int8(), pa.utf8()),
}
_RECORD_TYPES = {column.name: column.type for column in COLUMNS}

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Exported:
    """One file that was written; `left_out` are rows that the format cannot hold."""

    path: Path
    rows: int
    left_out: int = 0


class _Writer(Protocol):
    def write_table(self, table: pa.Table) -> None: ...
    def close(self) -> None: ...


def export(
    path: Path,
    form: str,
    output: Path,
    tables: Sequence[str] = (),
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> tuple[list[Exported], dict[str, Any]]:
    """Write a trace in another form; return the files made, and `TraceReader.info` afterwards.

    perfetto makes one file. parquet and csv make one of each table named, all if none is: with one
    name `output` is the file, else it is a folder that gets NAME.parquet or NAME.csv. `progress`
    is called with (rows done, rows to do).

    Raises UsageError for a form or a table that does not exist, TraceFormatError if the file is
    no trace, OutputError if something cannot be written; files that were complete stay then.
    """
    if form not in FORMATS:
        raise UsageError(f"--format {form!a:.40}: say {', '.join(FORMATS)}")
    for name in tables:
        if name not in TABLES:
            raise UsageError(f"no table {name!a:.40}; there are {' '.join(TABLES)}")
    if form == "perfetto" and tables:
        raise UsageError("--table is for parquet and csv: a Perfetto trace is one file")
    with TraceReader(path) as reader:
        if form == "perfetto":
            return [_perfetto(reader, output, overwrite, progress)], reader.info()
        files = _files(path, form, output, tables, overwrite=overwrite)
        # Damage shows only where a batch is read, and a Parquet file says first what is missing.
        reader.info(verify=form == "parquet")
        steps = _Steps(reader, files, progress)
        done = [
            _table(reader, name, form, file, overwrite=overwrite, step=steps)
            for name, file in files.items()
        ]
        return done, reader.info()


class _Steps:
    """Counts the rows of all tables together."""

    def __init__(
        self, reader: TraceReader, names: Iterable[str], progress: Progress | None
    ) -> None:
        kinds = reader.info()["kinds"]
        asked = [kind for name in names for kind in KINDS_OF_TABLE.get(name, ("SPTE",))]
        self._total = sum(kinds.get(kind, 0) for kind in asked)
        self._done = 0
        self._progress = progress

    def __call__(self, rows: int) -> None:
        self._done += rows
        if self._progress is not None:
            self._progress(self._done, self._total)


def _perfetto(
    reader: TraceReader, output: Path, overwrite: bool, progress: Progress | None
) -> Exported:
    from analysis.check import check_trace
    from analysis.perfetto import write_perfetto

    def half(number: int) -> Progress | None:
        # Checking and writing count for the same.
        if progress is None:
            return None
        return lambda done, total: progress(number * total + min(done, total), 2 * total)

    source = reader.path
    with new_file(output, source, overwrite=overwrite) as made, made.open("wb") as file:
        findings = check_trace(source, progress=half(0)).findings
        rows, left_out = write_perfetto(reader, file, half(1), findings)
    return Exported(output, rows, left_out)


def _files(
    source: Path, form: str, output: Path, tables: Sequence[str], *, overwrite: bool
) -> dict[str, Path]:
    """Return table -> file; makes the folder if there are several."""
    if len(tables) == 1:
        check_new(output, source, overwrite=overwrite)
        return {tables[0]: output}
    try:
        output.mkdir(exist_ok=True)
    except FileExistsError:
        raise OutputError(f"{output} is a file; name a folder for several tables") from None
    except OSError as err:
        raise OutputError(f"{output} cannot be made: {err.strerror}; name another") from err
    files = {name: output / f"{name}.{form}" for name in dict.fromkeys(tables or TABLES)}
    for file in files.values():
        check_new(file, source, overwrite=overwrite)
    return files


def _table(
    reader: TraceReader,
    name: str,
    form: str,
    file: Path,
    *,
    overwrite: bool,
    step: Callable[[int], None],
) -> Exported:
    schema = arrow_table_schema(name)
    if form == "csv":
        # Names become text: CSV has no dictionaries.
        schema = pa.schema([(f.name, _plain(f.type)) for f in schema])
    else:
        info = reader.info()
        known = json.dumps({key: info[key] for key in _INFO})
        schema = schema.with_metadata({"pfntrace": known, "pfntrace.table": name})
    rows = 0
    with new_file(file, reader.path, overwrite=overwrite) as unfinished:
        writer = _writer(form, unfinished, schema)
        try:
            for table in _gathered(table_batches(reader, name, step), schema):
                writer.write_table(table)
                rows += len(table)
        finally:
            writer.close()
    return Exported(file, rows)


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _writer(form: str, path: Path, schema: pa.Schema) -> _Writer:
    if form == "csv":
        from pyarrow import csv

        return csv.CSVWriter(path, schema)  # type: ignore[no-any-return]
    from pyarrow import parquet

    return parquet.ParquetWriter(path, schema, compression="zstd")  # type: ignore[no-any-return]


def _gathered(batches: Iterable[pa.RecordBatch], schema: pa.Schema) -> Iterator[pa.Table]:
    """Yield batches as tables of about `_ROWS_AT_ONCE` rows with the schema of the file."""
    held: list[pa.RecordBatch] = []
    rows = 0
    for batch in batches:
        held.append(batch)
        rows += len(batch)
        if rows >= _ROWS_AT_ONCE:
            yield _cast(held, schema)
            held, rows = [], 0
    if held:
        yield _cast(held, schema)


def _cast(batches: Sequence[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    return pa.Table.from_batches(batches).cast(schema)


def arrow_table_schema(name: str) -> pa.Schema:
    """Return the Arrow schema of a table: columns and types of `analysis.schema.TABLES`."""
    columns = TABLES[name].columns
    if name in KINDS_OF_TABLE:
        return pa.schema([(column.name, _RECORD_TYPES[column.name]) for column in columns])
    return pa.schema([(column.name, _ARROW[column.dtype]) for column in columns])


def table_batches(
    reader: TraceReader, name: str, step: Callable[[int], None]
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a table in batches, in bounded memory; `step` is told of each batch.

    Where the trace is damaged they end; `reader.reason` says so.
    """
    if name in KINDS_OF_TABLE:
        for batch in reader.records(KINDS_OF_TABLE[name], TABLES[name].names):
            step(len(batch))
            yield batch
    elif name == "lives":
        yield from _lives(reader, step)
    else:
        yield from _anomalies(reader)


def _lives(reader: TraceReader, step: Callable[[int], None]) -> Iterator[pa.RecordBatch]:
    from analysis.lives import iter_lives

    for lives in iter_lives(reader):
        step(len(lives))
        yield from _batches("lives", lives)


def _anomalies(reader: TraceReader) -> Iterator[pa.RecordBatch]:
    from analysis.trace import anomalies_table

    yield from _batches("anomalies", anomalies_table(reader.path))


def _batches(name: str, frame: pd.DataFrame) -> Iterator[pa.RecordBatch]:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    try:
        yield from table.cast(arrow_table_schema(name)).to_batches()
    except (pa.ArrowException, ValueError) as err:
        raise TraceFormatError(f"table {name} cannot be written: {err}") from err
