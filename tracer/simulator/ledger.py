"""The truth: every life of a mapping, every reference KVM took, every bug that was planted.

Kept while the model runs, written beside the trace as Parquet, and never looked at by the model.
Columns of `lives` are those of the analysis' table of that name, so that both can be compared.
May import: pyarrow, standard library, `tracer.simulator.clock`.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ("BUGS", "LIVES", "REFERENCES", "Ledger", "truth_paths")

_U8, _U16, _U32, _U64 = pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()
_I32, _BOOL, _TEXT = pa.int32(), pa.bool_(), pa.string()

#: One row for each lifetime of a mapping; null where there is none.
LIVES = pa.schema(
    [
        ("vm", _U32), ("as_id", _U8), ("mmu", _TEXT), ("level", _U8), ("gfn", _U64),
        ("pages", _U32), ("pfn", _U64), ("sptep", _U64), ("slot", _I32), ("birth_ts", _U64),
        ("birth_cause", _TEXT), ("birth_tid", _U32), ("birth_tgid", _U32), ("birth_cpu", _U16),
        ("birth_seq", _U32), ("fault_ts", _U64), ("vcpu", _I32), ("death_ts", _U64),
        ("death_cause", _TEXT), ("death_tid", _U32), ("death_tgid", _U32), ("death_cpu", _U16),
        ("death_seq", _U32), ("spte_birth", _U64), ("spte_last", _U64), ("changes", _U32),
        ("refcount_birth", _I32), ("refcount_death", _I32), ("mapcount_birth", _I32),
        ("ended_by", _TEXT),
    ]
)  # fmt: skip
#: One row for each reference that KVM took; put_ts is null if it never gave it back.
REFERENCES = pa.schema(
    [
        ("vm", _U32), ("vcpu", _I32), ("taker", _TEXT), ("gfn", _U64), ("pfn", _U64),
        ("fault_ts", _U64), ("get_ts", _U64), ("put_ts", _U64), ("put_pfn", _U64),
    ]
)  # fmt: skip
#: One row for each occurrence of a planted bug.
BUGS = pa.schema(
    [("bug", _TEXT), ("vm", _U32), ("ts", _U64), ("gfn", _U64), ("pfn", _U64),
     ("fault_ts", _U64), ("detail", _TEXT)]
)  # fmt: skip

_TABLES = {"lives": LIVES, "references": REFERENCES, "bugs": BUGS}
_ROWS = 1 << 15

Row = tuple[Any, ...]


def truth_paths(trace: Path) -> dict[str, Path]:
    """Return where the truth of a trace lies: table -> file beside it."""
    return {name: trace.with_suffix(f".truth-{name}.parquet") for name in _TABLES}


class Ledger:
    """Collects rows and writes them a row group at a time, so that memory stays bounded."""

    def __init__(self, trace: Path) -> None:
        self.lives: list[Row] = []
        self.references: list[Row] = []
        self.bugs: list[Row] = []
        self.rows = dict.fromkeys(_TABLES, 0)
        self.planted: dict[str, int] = {}
        self._writers = {
            name: pq.ParquetWriter(path, _TABLES[name], compression="zstd")
            for name, path in truth_paths(trace).items()
        }

    def bug(
        self, name: str, vm: int, ts: int, gfn: int, pfn: int, fault_ts: int = 0, detail: str = ""
    ) -> None:
        """Enter one occurrence of a planted bug."""
        self.planted[name] = self.planted.get(name, 0) + 1
        self.bugs.append((name, vm, ts, gfn, pfn, fault_ts or None, detail))

    def flush(self, most: int = _ROWS) -> None:
        """Write every table that has so many rows waiting."""
        for name, rows in (
            ("lives", self.lives), ("references", self.references), ("bugs", self.bugs),
        ):  # fmt: skip
            if rows and len(rows) >= most:
                schema = _TABLES[name]
                columns = zip(*rows, strict=True)
                arrays = [
                    pa.array(values, field.type)
                    for values, field in zip(columns, schema, strict=True)
                ]
                self._writers[name].write_table(pa.Table.from_arrays(arrays, schema=schema))
                self.rows[name] += len(rows)
                rows.clear()

    def close(self) -> None:
        """Write the rest and close the files."""
        self.flush(1)
        for writer in self._writers.values():
            writer.close()
