"""Every table that leaves the analysis, declared in one place: columns, types, units, meaning.

`check` stands at the boundary: what it lets through is what docs/TABLES.md says, which `reference`
makes. Tables of records take their columns and words from `tracer.schema`; integers that can be
null are pandas' nullable types, names are categories, flags of a life are plain bool.
May import: numpy, pandas, `analysis.findings`, `analysis.pages`, `analysis.tables`,
`probes.errors`, `probes.wire`, `tracer.schema`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.findings import VERDICTS
from analysis.pages import PAGE_CLASSES
from analysis.tables import DTYPES
from probes.errors import SchemaError
from probes.wire import CAUSES
from tracer import schema as records

__all__ = (
    "BIRTH_CAUSES",
    "ENDED_BY",
    "KINDS_OF_TABLE",
    "MMUS",
    "TABLES",
    "VERDICTS",
    "VIEWS",
    "ColumnSpec",
    "TableSpec",
    "check",
    "empty",
    "reference",
)

#: Which records a table holds.
KINDS_OF_TABLE: dict[str, tuple[str, ...]] = {
    "faults": ("FAULT",),
    "sptes": ("SPTE",),
    "releases": ("RELEASE",),
    "invalidations": ("INVALIDATE",),
    "page_events": ("PAGE_FREE", "PAGE_ALLOC"),
    "pins": ("PIN",),
    "slots": ("SLOT",),
    "vms": ("VM",),
    "vmas": ("VMA",),
    "losses": ("LOSS",),
    "notes": ("NOTE",),
}
_TABLE_DOCS = {
    "faults": "One row per guest page fault, written at its end.",
    "sptes": "One row per change of a leaf SPTE: install, change, zap.",
    "releases": "One row per reference given back or page marked accessed or dirty by KVM.",
    "invalidations": "Starts and ends of MMU notifier invalidations.",
    "page_events": "Frees of pages that a VM mapped, and the first use of such pages afterwards.",
    "pins": "Guest pages that KVM mapped for itself: kvm_vcpu_map, pfn caches.",
    "slots": "Memslots created, moved, deleted, or with new flags.",
    "vms": "VMs created and destroyed.",
    "vmas": "PFNMAP mappings of the VM's process that a fault walked.",
    "losses": "Counters of records lost and filtered, cumulative, per kind and cpu.",
    "notes": "Notes of the recorder.",
}

#: What is done, in each table.
_OPS: dict[str, tuple[str, ...]] = {
    "sptes": ("install", "change", "zap"),
    "invalidations": ("start", "end"),
    "pins": ("map", "unmap", "refresh"),
    "slots": ("seen", "create", "delete", "move", "flags"),
    "vms": ("create", "delete"),
    "vmas": ("seen",),
}

#: The MMU that holds a mapping; records that do not say are of the TDP MMU.
MMUS = ("tdp", "shadow")
#: Why a mapping began: the cause of its record, or that a larger leaf was split.
BIRTH_CAUSES = (*CAUSES, "split")
#: What ended a mapping; see the column `ended_by` of `lives`.
ENDED_BY = (
    "zap",
    "pfn_change",
    "split",
    "collapse",
    "invalid_root",
    "teardown",
    "superseded",
    "censored",
)


@dataclasses.dataclass(frozen=True, slots=True)
class ColumnSpec:
    """One column: `dtype` as pandas names it, or "text".

    `categories` are those of a category, () if they differ from trace to trace. `names` are what
    a category of records says: of what else a record says, if it is not of pfntrace, they are
    followed.
    """

    name: str
    dtype: str
    unit: str
    doc: str
    categories: tuple[str, ...] = ()
    names: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class TableSpec:
    """One table; its rows ascend by the columns `order`."""

    name: str
    doc: str
    columns: tuple[ColumnSpec, ...]
    order: tuple[str, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns in order."""
        return tuple(column.name for column in self.columns)


def _names(table: str, column: records.Column) -> tuple[str, ...]:
    """Return the names of a column in a table; () if it has none or the kernel gives them."""
    if column.name == "kind":
        return KINDS_OF_TABLE[table]
    if column.name == "loss_kind":
        return records.RECORD_KINDS
    if column.name == "op":
        return _OPS[table]
    # A number of 0 stands for none, which is null in a table.
    return tuple(name for name in records.NAMES.get(column.names, ()) if name != "none")


def _record_table(name: str) -> TableSpec:
    kinds = KINDS_OF_TABLE[name]
    columns = tuple(
        ColumnSpec(
            column.name,
            "category" if column.names else str(DTYPES.get(column.type, "text")),
            column.unit,
            column.doc,
            names=_names(name, column),
        )
        for column in records.COLUMNS
        if set(kinds) & set(column.kinds)
    )
    names = [column.name for column in columns]
    order = tuple(key for key in ("ts", "cpu", "seq") if key in names)
    return TableSpec(name, _TABLE_DOCS[name], columns, order)


_LIFE_COLUMNS = (
    ColumnSpec("life_id", "int64", "", "Number of the life: 1, 2, … in order of first records."),
    ColumnSpec("vm", "uint32", "", "Number of the VM in this recording; 0 is unknown."),
    ColumnSpec("as_id", "uint8", "", "Address space of the VM: 0 normal, 1 SMM."),
    ColumnSpec("mmu", "category", "", "The MMU whose page table holds the SPTE.", MMUS),
    ColumnSpec("level", "uint8", "", "Page table level: 1 = 4K, 2 = 2M, 3 = 1G."),
    ColumnSpec("gfn", "uint64", "4K pages", "First guest frame."),
    ColumnSpec("pages", "uint32", "4K pages", "Length: 512^(level - 1)."),
    ColumnSpec("pfn", "uint64", "4K pages", "First host frame."),
    ColumnSpec("sptep", "UInt64", "bytes", "Address of the SPTE; null in the TDP MMU."),
    ColumnSpec("slot", "Int32", "", "Memslot that held gfn at birth; null if none is known."),
    ColumnSpec(
        "page_class", "category", "", "What kind of page it was at birth (at the first record if "
        "the birth was not seen).", PAGE_CLASSES,
    ),
    ColumnSpec(
        "birth_ts", "UInt64", "ns", "When its first record was written; null if its birth was not "
        "seen.",
    ),
    ColumnSpec("birth_cause", "category", "", "Why it was mapped; null as birth_ts.", BIRTH_CAUSES),
    ColumnSpec("birth_tid", "UInt32", "", "Thread that mapped it; null as birth_ts."),
    ColumnSpec("birth_tgid", "UInt32", "", "Its process."),
    ColumnSpec("birth_cpu", "UInt16", "", "CPU of the record of its birth."),
    ColumnSpec("birth_seq", "UInt32", "", "Number of that record on its cpu."),
    ColumnSpec("fault_ts", "UInt64", "ns", "Entry of the fault that mapped it; null if none did."),
    ColumnSpec("vcpu", "Int32", "", "vCPU of that fault; null if none."),
    ColumnSpec("death_ts", "UInt64", "ns", "When it ended; null if that was not seen."),
    ColumnSpec("death_cause", "category", "", "Why it ended; null as death_ts.", CAUSES),
    ColumnSpec("death_tid", "UInt32", "", "Thread that ended it; null as death_ts."),
    ColumnSpec("death_tgid", "UInt32", "", "Its process."),
    ColumnSpec("death_cpu", "UInt16", "", "CPU of the record of its end."),
    ColumnSpec("death_seq", "UInt32", "", "Number of that record on its cpu."),
    ColumnSpec("spte_birth", "uint64", "bits", "First value of the SPTE that was seen."),
    ColumnSpec("spte_last", "uint64", "bits", "Last value that was seen while it was mapped."),
    ColumnSpec("writable_birth", "bool", "", "Was spte_birth writable?"),
    ColumnSpec("writable_last", "bool", "", "Was spte_last writable?"),
    ColumnSpec("ever_writable", "bool", "", "Was any value that was seen writable?"),
    ColumnSpec(
        "accessed", "bool", "", "Was the accessed bit set in any value that was seen? False where "
        "this host has no such bit.",
    ),
    ColumnSpec("dirty", "bool", "", "Was the dirty bit set in any value seen? False as accessed."),
    ColumnSpec("changes", "uint32", "records", "Changes in place: protection, accessed, dirty."),
    ColumnSpec("refcount_birth", "Int32", "", "_refcount of the (head) page at birth."),
    ColumnSpec("refcount_death", "Int32", "", "_refcount of the (head) page at the end."),
    ColumnSpec("refcount_min", "Int32", "", "Least _refcount in the SPTE records of this life."),
    ColumnSpec("refcount_max", "Int32", "", "Greatest _refcount in them."),
    ColumnSpec("mapcount_birth", "Int32", "", "Raw _mapcount of the page at birth."),
    ColumnSpec("censored_start", "bool", "", "Its birth was not seen: before the trace, or lost."),
    ColumnSpec("censored_end", "bool", "", "Its end was not seen: after the trace, or lost."),
    ColumnSpec(
        "lost", "bool", "", "A record of it may be missing, or be another's: some were lost while "
        "it lived, or its install may be that of a life that nobody saw begin, written late.",
    ),
    ColumnSpec(
        "ended_by", "category", "", "zap; pfn_change, another page in the same SPTE; split into "
        "smaller leaves; collapse, its table gave way to a larger leaf, or made room for one; "
        "invalid_root, zapped later "
        "in a root that no vCPU uses; teardown of the VM; superseded, a shadow SPTE that was seen "
        "with another page, the zap between was not seen (or the oldest of more lives at one place "
        "than a VM can have roots); censored.", ENDED_BY,
    ),
)  # fmt: skip

_ANOMALY_COLUMNS = (
    ColumnSpec("detector", "text", "", "Name of the detector that found it."),
    ColumnSpec("verdict", "category", "", "How sure it is.", VERDICTS),
    ColumnSpec("title", "text", "", "What is wrong, in one line."),
    ColumnSpec("count", "Int64", "", "How often it was seen."),
    ColumnSpec("pages", "Int64", "4K pages", "How many distinct pages it concerns."),
    ColumnSpec("first_ts", "UInt64", "ns", "When it was first seen; null if it has no time."),
    ColumnSpec("last_ts", "UInt64", "ns", "When it was last seen."),
    ColumnSpec("vms", "text", "JSON", "List of VM numbers."),
    ColumnSpec("slots", "text", "JSON", "List of memslot ids."),
    ColumnSpec("gfns", "text", "JSON", "List of [first, last] guest frames."),
    ColumnSpec("pfns", "text", "JSON", "List of [first, last] host frames."),
    ColumnSpec("where", "text", "", "File and VMA flags behind the pages, if known."),
    ColumnSpec("functions", "text", "JSON", "List of kernel functions involved."),
    ColumnSpec("rule", "text", "", "The kernel's rule that it breaks, and its source."),
    ColumnSpec("innocent", "text", "JSON", "List of [explanation, why it is ruled out or not]."),
    ColumnSpec("evidence", "text", "JSON", "List of records that show it, in order of time."),
    ColumnSpec("detail", "text", "JSON", "What else the detector says."),
)

_PFN_EVENT_COLUMNS = (
    ColumnSpec("recording", "UInt32", "", "Number of the recording in a merged trace, else 1."),
    ColumnSpec("ts", "UInt64", "ns", "When the record was written, CLOCK_MONOTONIC."),
    ColumnSpec("kind", "text", "", "Kind of the record."),
    ColumnSpec(
        "event", "text", "", "install, change, zap; the call of a release; free, alloc; fault and "
        "its result; map, unmap, refresh of a page that KVM maps for itself.",
    ),
    ColumnSpec("cause", "text", "", "Why the SPTE changed; null of other records."),
    ColumnSpec("vm", "UInt32", "", "Number of the VM in this recording; 0 is unknown."),
    ColumnSpec("gfn", "UInt64", "4K pages", "First guest frame; null if the record has none."),
    ColumnSpec("level", "UInt8", "", "Page table level: 1 = 4K, 2 = 2M, 3 = 1G; null if none."),
    ColumnSpec(
        "pfn", "UInt64", "4K pages", "First host frame; of a fault that KVM refused what the walk "
        "found.",
    ),
    ColumnSpec("pages", "UInt64", "4K pages", "How many pages from pfn on the record speaks of."),
    ColumnSpec("refcount", "Int32", "", "_refcount of the (head) page; null if it was not read."),
    ColumnSpec("mapcount", "Int32", "", "Own raw _mapcount; -1: not mapped by users."),
    ColumnSpec("cpu", "UInt16", "", "CPU that wrote the record."),
    ColumnSpec("seq", "UInt32", "", "Number of the record on its cpu."),
    ColumnSpec("tid", "UInt32", "", "Thread that ran."),
    ColumnSpec(
        "life_id", "Int64", "", "Life that an SPTE record is part of, of a change the latest that "
        "it can be; null of other records.",
    ),
)  # fmt: skip

TABLES: dict[str, TableSpec] = {
    **{name: _record_table(name) for name in KINDS_OF_TABLE},
    "lives": TableSpec(
        "lives",
        "One row per mapping lifetime: a leaf SPTE from the record that made it to the record that "
        "ended it. A pfn is used again and again, so rows are told apart by life_id.",
        _LIFE_COLUMNS,
        ("life_id",),
    ),
    "anomalies": TableSpec(
        "anomalies",
        "One row per finding of `pfntrace check`, the surest first.",
        _ANOMALY_COLUMNS,
        (),
    ),
}

#: Tables of a part of a trace: made for who asks, and not exported.
VIEWS: dict[str, TableSpec] = {
    "pfn_events": TableSpec(
        "pfn_events",
        "One row per record of a host page: `Trace.pfn_history(pfn).events`.",
        _PFN_EVENT_COLUMNS,
        ("recording", "ts"),
    ),
}


def check(name: str, frame: pd.DataFrame) -> pd.DataFrame:
    """Return `frame` if it is what the table `name` declares, columns in that order.

    Raises SchemaError, naming table and column, for a missing or unknown column, another type,
    another category, or rows out of order.
    """
    table = TABLES.get(name) or VIEWS[name]
    if tuple(frame.columns) != table.names:
        unknown = [str(c) for c in frame.columns if c not in table.names]
        missing = [c for c in table.names if c not in frame.columns]
        what = f"lacks {', '.join(missing)}" if missing else "has its columns in another order"
        raise SchemaError(
            f"table {name} {f'has unknown {unknown[0]!r}' if unknown else what}; see docs/TABLES.md"
        )
    for column in table.columns:
        wrong = _wrong(column, frame[column.name])
        if wrong:
            raise SchemaError(f"table {name}, column {column.name}: {wrong}; see docs/TABLES.md")
    if not _ascends(frame, table.order):
        raise SchemaError(f"table {name} is not in order of {', '.join(table.order)}")
    return frame


def _wrong(column: ColumnSpec, values: pd.Series) -> str:
    """Return what is wrong with a column, "" if nothing."""
    if column.dtype == "text":
        fits = isinstance(values.dtype, pd.StringDtype) or values.dtype == np.dtype(object)
        return "" if fits else f"is {values.dtype}, not text"
    if str(values.dtype) != column.dtype:
        return f"is {values.dtype}, not {column.dtype}"
    if column.categories and tuple(values.cat.categories) != column.categories:
        return "has other categories"
    return ""


def _ascends(frame: pd.DataFrame, order: Sequence[str]) -> bool:
    if len(frame) < 2 or not order:
        return True
    equal = np.ones(len(frame) - 1, bool)
    for key in order:
        values: npt.NDArray[np.uint64] = frame[key].to_numpy(dtype=np.uint64, na_value=0)
        if (equal & (values[1:] < values[:-1])).any():
            return False
        equal &= values[1:] == values[:-1]
        if not equal.any():
            return True
    return True


def empty(name: str) -> pd.DataFrame:
    """Return the table `name` without rows."""
    return pd.DataFrame({c.name: _no_values(c) for c in TABLES[name].columns})


def _no_values(column: ColumnSpec) -> pd.Series:
    if column.dtype == "category":
        names = column.categories or column.names
        return pd.Series(pd.Categorical([], categories=list(names)))
    return pd.Series([], dtype="str" if column.dtype == "text" else column.dtype)


def reference() -> str:
    """Return all tables as Markdown: the text of docs/TABLES.md."""
    lines = [
        "# Tables",
        "",
        "What `analysis.trace.open_trace` gives, and `pfntrace export` writes. Made by",
        "`analysis.schema.reference()` (`make tables`); a test keeps it so. Types are pandas';",
        "those with a capital letter can be null. A category is one of a few names: those that its",
        "meaning ends with, or the kernel's.",
    ]
    for table in (*TABLES.values(), *VIEWS.values()):
        order = f" In order of {', '.join(f'`{c}`' for c in table.order)}." if table.order else ""
        lines += ["", f"## {table.name}", "", table.doc + order, ""]
        lines += ["| column | type | unit | meaning |", "|---|---|---|---|"]
        for c in table.columns:
            names = c.categories or c.names
            told = f" One of {', '.join(names)}." if len(names) > 1 else ""
            doc = (c.doc + told).replace("|", "\\|")
            lines.append(f"| `{c.name}` | {c.dtype} | {c.unit} | {doc} |")
    return "\n".join(lines) + "\n"
