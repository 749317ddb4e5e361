"""The truth: every life of a mapping, every reference KVM took, every bug that was planted.

Kept while the model runs, written beside the trace (`truthfile`), never looked at by the model.
Columns of `lives` are those of the analysis' table of that name, so that both can be compared.
May import: `probes.wire`, `tracer.simulator.bugs`, numpy, pyarrow, standard library.
"""

import struct
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from probes import wire
from tracer.simulator.bugs import BUGS

__all__ = (
    "ALIVE", "BIRTH", "BIRTH_CAUSES", "DEATH", "ENDINGS", "LIVES", "MMUS", "NO_COUNT", "PLANTED",
    "REFERENCES", "TAKERS", "Ledger", "Table",
)  # fmt: skip

MMUS: Final = ("none", "tdp", "shadow")
#: A leaf that came about when a large one was split has no install, and so no cause on the wire.
BIRTH_CAUSES: Final = (*wire.CAUSES, "split")
ENDINGS: Final = ("zap", "teardown", "split", "collapse", "superseded", "censored")
TAKERS: Final = ("fault", "prefetch", "pin", "pfncache")
#: What stands for "there is none" in a column, where 0 is a value.
NO_COUNT: Final = -(1 << 31)
_NO_CPU: Final = 0xFFFF
_NO_SEQ: Final = 0xFFFFFFFF
_NO_NAME: Final = 0xFF

_ARROW: Final = {
    "B": pa.uint8(),
    "H": pa.uint16(),
    "I": pa.uint32(),
    "Q": pa.uint64(),
    "i": pa.int32(),
}


class Column(NamedTuple):
    """One column: its character of `struct`, the value that means null, its numbers' names."""

    name: str
    char: str
    null: int | None = None
    names: tuple[str, ...] = ()


def _layout(columns: tuple[Column, ...]) -> struct.Struct:
    return struct.Struct("<" + "".join(column.char for column in columns))


class Table:
    """A table whose rows are packed at once: Python's own objects would be twice the work.

    `pack(*values)` makes a row, `batch(rows)` the Arrow table of many, `unpack(row)` the values.
    """

    def __init__(self, *columns: Column) -> None:
        layout = _layout(columns)
        self.pack, self.unpack = layout.pack, layout.unpack
        self._columns = columns
        self._dtype = np.dtype([(c.name, np.dtype(c.char).newbyteorder("<")) for c in columns])
        self.schema = pa.schema(
            [(c.name, _names_of(_ARROW[c.char]) if c.names else _ARROW[c.char]) for c in columns]
        )
        #: the columns of which a file keeps each value once: of numbers that is twice the work
        self.coded = [c.name for c in columns if c.names]

    def batch(self, rows: list[bytes]) -> pa.Table:
        """Return packed rows as an Arrow table of `schema`."""
        packed = np.frombuffer(b"".join(rows), self._dtype)
        arrays = [_array(packed[column.name], column) for column in self._columns]
        return pa.Table.from_arrays(arrays, schema=self.schema)


def _names_of(numbers: pa.DataType) -> pa.DataType:
    return pa.dictionary(numbers, pa.string())


def _array(values: npt.NDArray[Any], column: Column) -> pa.Array:
    # Not pa.array(): that imports pandas to ask whether it was given one, 0.3 s.
    values = np.ascontiguousarray(values)
    validity, nulls = None, 0
    if column.null is not None:
        there = values != column.null
        nulls = len(values) - int(np.count_nonzero(there))
        if nulls:
            validity = pa.py_buffer(np.packbits(there, bitorder="little"))
    buffers = [validity, pa.py_buffer(values)]
    if not column.names:
        return pa.Array.from_buffers(_ARROW[column.char], len(values), buffers, nulls)
    texts = [name.encode() for name in column.names]
    ends = np.cumsum([0, *map(len, texts)], dtype="i4")
    names = pa.Array.from_buffers(
        pa.string(), len(texts), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(texts))]
    )
    kind = _names_of(_ARROW[column.char])
    return pa.DictionaryArray.from_buffers(kind, len(values), buffers, names, nulls)


_BIRTH: Final = (
    Column("vm", "I"), Column("as_id", "B"), Column("mmu", "B", names=MMUS), Column("level", "B"),
    Column("gfn", "Q"), Column("pages", "I"), Column("pfn", "Q"), Column("sptep", "Q", 0),
    Column("slot", "i", -1), Column("birth_ts", "Q"),
    Column("birth_cause", "B", names=BIRTH_CAUSES), Column("birth_tid", "I"),
    Column("birth_tgid", "I"), Column("birth_cpu", "H"), Column("birth_seq", "I"),
    Column("fault_ts", "Q", 0), Column("vcpu", "i", -1), Column("spte_birth", "Q"),
    Column("refcount_birth", "i", NO_COUNT), Column("mapcount_birth", "i", NO_COUNT),
)  # fmt: skip
_DEATH: Final = (
    Column("death_ts", "Q", 0), Column("death_cause", "B", _NO_NAME, wire.CAUSES),
    Column("death_tid", "I", 0), Column("death_tgid", "I", 0), Column("death_cpu", "H", _NO_CPU),
    Column("death_seq", "I", _NO_SEQ), Column("spte_last", "Q"), Column("changes", "I"),
    Column("refcount_death", "i", NO_COUNT), Column("ended_by", "B", names=ENDINGS),
)  # fmt: skip
#: One row for each lifetime of a mapping; null where there is none. A row is what `BIRTH` packs
#: and behind it what `DEATH` packs.
LIVES: Final = Table(*_BIRTH, *_DEATH)
BIRTH: Final = _layout(_BIRTH)
DEATH: Final = _layout(_DEATH)
#: What stands from death_ts to death_seq in a life that has not ended.
ALIVE: Final = (0, _NO_NAME, 0, 0, _NO_CPU, _NO_SEQ)
#: One row for each reference that KVM took; put_ts is null if it never gave it back.
REFERENCES: Final = Table(
    Column("vm", "I"), Column("vcpu", "i"), Column("taker", "B", names=TAKERS), Column("gfn", "Q"),
    Column("pfn", "Q"), Column("fault_ts", "Q", 0), Column("get_ts", "Q"),
    Column("put_ts", "Q", 0), Column("put_pfn", "Q", 0),
)  # fmt: skip


#: One row for each occurrence of a planted bug.
PLANTED: Final = Table(
    Column("bug", "B", names=tuple(BUGS)), Column("vm", "I"), Column("ts", "Q"),
    Column("gfn", "Q"), Column("pfn", "Q"), Column("fault_ts", "Q", 0),
)  # fmt: skip

_BUG_NUMBER: Final = {name: number for number, name in enumerate(BUGS)}


class Ledger:
    """Collects packed rows, until somebody writes them (`truthfile`)."""

    def __init__(self) -> None:
        self.lives: list[bytes] = []
        self.references: list[bytes] = []
        self.bugs: list[bytes] = []
        self.planted: dict[str, int] = {}

    def bug(self, name: str, vm: int, ts: int, gfn: int, pfn: int, fault_ts: int = 0) -> None:
        """Enter one occurrence of a planted bug."""
        self.planted[name] = self.planted.get(name, 0) + 1
        self.bugs.append(PLANTED.pack(_BUG_NUMBER[name], vm, ts, gfn, pfn, fault_ts))
