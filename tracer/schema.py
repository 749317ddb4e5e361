"""The columns of a trace file, declared as data: name, type, unit, meaning, origin on the wire.

One flat schema serves all kinds of records; a column means the same in every kind that fills it
and is null in the others. A value that the kernel did not give (a stage never reached, no struct
page behind the frame) is null too, never a magic number. Integers and dictionaries only, so that
any Arrow reader shows a trace without code of ours. Conversion is in `tracer.columns`.
May import: `probes.wire`, numpy, pyarrow.
"""

import dataclasses
import functools
from collections.abc import Mapping

import pyarrow as pa

from probes import wire

__all__ = (
    "COLUMNS",
    "FILE_KINDS",
    "NAMES",
    "RECORD_KINDS",
    "SCHEMA_VERSION",
    "Column",
    "Source",
    "arrow_schema",
    "columns_of_kind",
    "reference",
    "result_names",
)

#: Changes whenever a reader of the previous one would misread a file.
SCHEMA_VERSION = 1
#: Kinds that the kernel writes, in wire order.
RECORD_KINDS = wire.KINDS[1:]
#: All kinds that a row can have; LOSS and NOTE rows are written by the recorder itself.
FILE_KINDS = (*RECORD_KINDS, "LOSS", "NOTE")

#: RET_PF_* values of this many get a name of their own; there are about seven.
_RESULTS_MAX = 32


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """Where a column's value lies in the wire record of one kind.

    `field` is a path in `wire.FAULT` or `wire.EVENT`; "" means that the writer makes the value.
    The value is null where `null_field` (the field itself if "") equals `null`.
    """

    field: str
    null: int | None = None
    null_field: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Column:
    """One column: `names` is the key of its dictionary in `NAMES`, "" for a plain type."""

    name: str
    type: pa.DataType
    unit: str
    doc: str
    sources: Mapping[str, Source]
    names: str = ""

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kinds that fill the column, in order of `FILE_KINDS`."""
        return tuple(kind for kind in FILE_KINDS if kind in self.sources)


#: Dictionaries that are the same in every file: index = number on the wire.
NAMES: dict[str, tuple[str, ...]] = {
    "kind": (*wire.KINDS, "LOSS", "NOTE"),
    "op": wire.OPS,
    "cause": wire.CAUSES,
    "call": wire.CALLS,
    "mmu": wire.MMUS,
    "event": wire.INVALIDATE_EVENTS,
}

_I32, _I64 = pa.int32(), pa.int64()
_U8, _U16, _U32, _U64 = pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()
_BOOL, _TEXT = pa.bool_(), pa.utf8()
_NAME = pa.dictionary(pa.int8(), pa.utf8())

_ALL_ONES = (1 << 64) - 1
_EVENTS = wire.EVENT_KINDS
#: Kinds that carry the state of one page.
_PAGE_KINDS = ("FAULT", "SPTE", "RELEASE", "PAGE_FREE", "PAGE_ALLOC", "PIN")
_WRITER = Source("")


def _same(kinds: tuple[str, ...], field: str, null: int | None = None) -> dict[str, Source]:
    return dict.fromkeys(kinds, Source(field, null))


def _fault(field: str, null: int | None = None) -> dict[str, Source]:
    return {"FAULT": Source(field, null)}


# Without PAGE_HAS_STRUCT nothing was read, and the other fields say nothing.
def _page(field: str) -> dict[str, Source]:
    return dict.fromkeys(_PAGE_KINDS, Source(f"page.{field}", 0, "page.bits"))


def _page_end(field: str) -> dict[str, Source]:
    return {"FAULT": Source(f"page_end.{field}", 0, "page_end.bits")}


def _stage(name: str, doc: str) -> Column:
    return Column(
        name, _U32, "ns", f"{doc}, after fault_ts; null if the fault never got there.",
        _fault(name, wire.NEVER_REACHED),
    )  # fmt: skip


_HEADER = (
    Column(
        "ts", _U64, "ns", "When the record was written, CLOCK_MONOTONIC; of a FAULT its end.",
        _same(RECORD_KINDS, "h.ts") | {"LOSS": _WRITER, "NOTE": _WRITER},
    ),
    Column(
        "fault_ts", _U64, "ns", "Entry of the guest page fault that this happened in.",
        _same(RECORD_KINDS, "h.fault_ts", 0),
    ),
    Column(
        "seq", _U32, "", "Number of the record on its cpu; lost ones are counted, so gaps show.",
        _same(RECORD_KINDS, "h.seq"),
    ),
    Column(
        "cpu", _U16, "", "CPU that wrote the record; in LOSS the CPU that the counts are of.",
        _same(RECORD_KINDS, "h.cpu") | {"LOSS": _WRITER},
    ),
    Column(
        "kind", _NAME, "", "Kind of the record.",
        dict.fromkeys(FILE_KINDS, _WRITER), "kind",
    ),
    Column(
        "op", _NAME, "", "What was done: install, change, zap; start, end; create, delete, ….",
        _same(("SPTE", "INVALIDATE", "PIN", "SLOT", "VM", "VMA"), "h.op", 0), "op",
    ),
    Column("tid", _U32, "", "Thread that ran.", _same(RECORD_KINDS, "h.tid")),
    Column("tgid", _U32, "", "Its process.", _same(RECORD_KINDS, "h.tgid")),
    Column(
        "vm", _U32, "", "Number of the VM in this recording; 0 is unknown.",
        _same(RECORD_KINDS, "h.vm"),
    ),
    Column(
        "vcpu", _I32, "", "vCPU that was in a fault; null outside of faults.",
        _same(RECORD_KINDS, "h.vcpu", -1),
    ),
    Column(
        "stack", _I32, "", "Number of the kernel stack; null without --stacks.",
        _same(RECORD_KINDS, "h.stack", -1),
    ),
)  # fmt: skip

_PLACE = (
    Column(
        "addr", _U64, "bytes", "Faulting address: guest physical with TDP, else guest virtual.",
        _fault("addr"),
    ),
    Column("error_code", _U64, "bits", "Page fault error code, PFERR_*.", _fault("error_code")),
    Column(
        "gfn", _U64, "4K pages", "Guest frame; of a SLOT its first one.",
        _same(("FAULT", "SPTE", "PIN", "SLOT"), "gfn") | {"RELEASE": Source("gfn", 0)},
    ),
    Column(
        "hva", _U64, "bytes", "Host virtual address; of INVALIDATE, SLOT and VMA the first one.",
        _fault("hva", 0) | {"PIN": Source("b", 0), "SLOT": Source("b", 0)}
        | {"INVALIDATE": Source("a"), "VMA": Source("a")},
    ),
    Column(
        "hva_end", _U64, "bytes", "End of the range, exclusive.",
        _same(("INVALIDATE", "VMA"), "b"),
    ),
    Column(
        "pfn", _U64, "4K pages", "Host frame; of a FAULT as the fault-in function returned it, "
        "which may be one of KVM's error values (bits 52 and up set).",
        _fault("pfn", _ALL_ONES)
        | _same(("SPTE", "RELEASE", "PAGE_FREE", "PAGE_ALLOC", "PIN"), "pfn", _ALL_ONES),
    ),
    Column(
        "walk_pfn", _U64, "4K pages", "Host frame found by the PFNMAP walk; null if none ran.",
        _fault("walk_pfn", _ALL_ONES),
    ),
    Column(
        "vm_flags", _U64, "bits", "VM_* flags of the PFNMAP mapping; null if there was none.",
        _fault("vm_flags", 0) | {"VMA": Source("c")},
    ),
    Column(
        "slot", _I32, "", "Memslot id; null if the fault had none.",
        {"FAULT": Source("slot", -1), "SLOT": Source("d")},
    ),
    Column(
        "as_id", _U8, "", "Address space of the VM: 0 normal, 1 SMM.",
        _same(("FAULT", "SPTE", "SLOT"), "as_id"),
    ),
    Column(
        "level", _U8, "", "Page table level: 1 = 4K, 2 = 2M, 3 = 1G; of a FAULT the goal.",
        _same(("FAULT", "SPTE"), "level"),
    ),
    Column(
        "mmu", _NAME, "", "The MMU at work: tdp, or shadow (also for nested guests).",
        _same(("FAULT", "SPTE"), "mmu", 0), "mmu",
    ),
)  # fmt: skip

_FAULT_ONLY = (
    Column(
        "mmu_seq", _U64, "", "mmu_invalidate_seq as the fault took it before fault-in.",
        _fault("mmu_seq"),
    ),
    Column(
        "invalidate_seq", _U64, "", "mmu_invalidate_seq at the end of the fault or notifier call.",
        _fault("invalidate_seq") | {"INVALIDATE": Source("c")},
    ),
    Column(
        "in_progress", _U32, "", "mmu_invalidate_in_progress at the same moment.",
        _fault("in_progress") | {"INVALIDATE": Source("d")},
    ),
    _stage("t_faultin", "Entry of the fault-in function"),
    _stage("t_gup", "Entry of the first hva_to_pfn"),
    _stage("t_gup_end", "Return of the last hva_to_pfn"),
    _stage("t_faultin_end", "Return of the fault-in function"),
    _stage("t_map", "Begin of the mapping"),
    Column("dur", _I64, "ns", "Length of the fault: ts - fault_ts.", {"FAULT": _WRITER}),
    Column(
        "ret", _I32, "", "Return value: RET_PF_* or -errno of a fault; of a PIN its error.",
        _fault("ret") | {"PIN": Source("d")},
    ),
    Column(
        "result", _NAME, "", "Name of ret as this kernel numbers RET_PF_*; error if negative.",
        _fault("ret"), "result",
    ),
    Column("faultin_ret", _I32, "", "What the fault-in function returned.", _fault("faultin_ret")),
    Column(
        "refcounted", _BOOL, "", "Did the kernel treat the page as reference-counted? Null if this "
        "kernel does not say.", _fault("refcounted", 2),
    ),
    Column("writable", _BOOL, "", "fault->map_writable after fault-in.", _fault("writable")),
    Column("prefetch", _BOOL, "", "Was it a prefetch, not an access?", _fault("prefetch")),
    Column("sptes", _U8, "", "Leaf SPTEs that this fault installed, at most 255.", _fault("sptes")),
)  # fmt: skip

_PAGE = (
    Column(
        "refcount", _I32, "", "_refcount of the (head) page; of a FAULT at fault-in return.",
        _page("refcount"),
    ),
    Column("mapcount", _I32, "", "Own raw _mapcount; -1: not mapped by users.", _page("mapcount")),
    Column("page_flags", _U64, "bits", "PG_* flags of the (head) page.", _page("flags")),
    Column(
        "page_bits", _U32, "bits", "What the page is: "
        + ", ".join(f"{bit} {name}" for name, bit in wire.PAGE_BITS.items())
        + "; null if nothing could be read.", _page("bits"),
    ),
    Column("page_order", _U8, "", "Order of the compound page, else 0.", _page("order")),
    Column("refcount_end", _I32, "", "As refcount, at the fault's end.", _page_end("refcount")),
    Column("mapcount_end", _I32, "", "As mapcount, at the fault's end.", _page_end("mapcount")),
    Column(
        "page_flags_end", _U64, "bits", "As page_flags, at the fault's end.", _page_end("flags"),
    ),
    Column("page_bits_end", _U32, "bits", "As page_bits, at the fault's end.", _page_end("bits")),
)  # fmt: skip

_EVENT_ONLY = (
    Column("old", _U64, "bits", "The SPTE before.", {"SPTE": Source("a")}),
    Column("new", _U64, "bits", "The SPTE after.", {"SPTE": Source("b")}),
    Column("sptep", _U64, "bytes", "Address of the SPTE, if known.", {"SPTE": Source("c", 0)}),
    Column("cause", _NAME, "", "Why the SPTE changed.", {"SPTE": Source("cause")}, "cause"),
    Column("call", _NAME, "", "How KVM gave it back.", {"RELEASE": Source("cause", 0)}, "call"),
    Column("event", _NAME, "", "Why memory changes.", {"INVALIDATE": Source("cause")}, "event"),
    Column(
        "order", _U8, "", "Order of the block that was freed or handed out.",
        _same(("PAGE_FREE", "PAGE_ALLOC"), "d"),
    ),
    Column("npages", _U64, "4K pages", "Length of the slot.", {"SLOT": Source("a")}),
    Column("slot_flags", _U64, "bits", "KVM_MEM_* flags of the slot.", {"SLOT": Source("c")}),
    Column("kvm", _U64, "bytes", "Kernel address of struct kvm.", {"VM": Source("a")}),
    Column(
        "rdev", _U32, "", "Device number of the mapped file: major << 20 | minor; null if none.",
        {"VMA": Source("d", 0)},
    ),
    Column("vm_tgid", _U32, "", "Process that owns the VM.", {"VM": Source("d", 0)}),
)  # fmt: skip

_WRITTEN = (
    Column("loss_kind", _NAME, "", "Kind that the counts are of.", {"LOSS": _WRITER}, "kind"),
    Column("produced", _U64, "records", "Produced since the start on this cpu.", {"LOSS": _WRITER}),
    Column("lost", _U64, "records", "Of these lost: ring full, or torn.", {"LOSS": _WRITER}),
    Column("filtered", _U64, "records", "Of these left out by a filter.", {"LOSS": _WRITER}),
    Column("torn", _U64, "records", "Of the lost: their end was missed.", {"LOSS": _WRITER}),
    Column("note", _TEXT, "JSON", "A note of the recorder, one JSON object.", {"NOTE": _WRITER}),
)

#: All columns in file order.
COLUMNS: tuple[Column, ...] = _HEADER + _PLACE + _FAULT_ONLY + _PAGE + _EVENT_ONLY + _WRITTEN


def result_names(results: Mapping[int, str]) -> tuple[str, ...]:
    """Return the dictionary of the column `result`: "error", then one name for each value.

    `results` is RET_PF_* value -> name (`KernelProfile.results`); values without a name are
    called ret_N, those of 32 and above ret_more.
    """
    named = (results.get(value, f"ret_{value}") for value in range(_RESULTS_MAX))
    return ("error", *named, "ret_more")


def arrow_schema(metadata: Mapping[str, str] | None = None) -> pa.Schema:
    """Return the schema of every trace file; all columns are nullable."""
    return pa.schema([pa.field(c.name, c.type) for c in COLUMNS], metadata=metadata)


@functools.cache
def columns_of_kind(kind: str) -> tuple[str, ...]:
    """Return the names of the columns that rows of this kind fill, in file order."""
    return tuple(c.name for c in COLUMNS if kind in c.sources)


def reference() -> str:
    """Return the columns as a Markdown table, for the documentation."""
    lines = ["| column | type | unit | kinds | meaning |", "|---|---|---|---|---|"]
    for c in COLUMNS:
        kinds = "all" if len(c.kinds) == len(FILE_KINDS) else ", ".join(c.kinds)
        kinds = "all but LOSS, NOTE" if c.kinds == RECORD_KINDS else kinds
        kind_of_type = "name" if c.names else str(c.type)
        doc = c.doc.replace("|", "\\|")
        lines.append(f"| `{c.name}` | {kind_of_type} | {c.unit} | {kinds} | {doc} |")
    return "\n".join(lines) + "\n"
