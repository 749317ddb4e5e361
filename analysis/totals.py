"""What a trace adds up to, chunk by chunk, so that its length does not matter.

`add_up` reads a trace once and returns `Totals`. Its counters stay small; its tables hold one row
for each distinct page of a rare kind. May import: numpy, pandas, `analysis`, `tracer.tracefile`.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from analysis.failures import FAILED_COLUMNS, failed_faults, walked_heads
from analysis.histogram import Histogram
from analysis.latency import WhereTimes
from analysis.pages import not_counted, page_class
from analysis.paths import path_of, stage_times
from analysis.tables import CHUNK_ROWS, chunks, parse_notes, stack
from analysis.uncounted import UNCOUNTED_COLUMNS, uncounted_pages
from tracer.tracefile import TraceReader

__all__ = ("COLUMNS", "COUNT_EXACT_MAX", "MANY", "NO_FAULTIN", "OUTCOMES", "Totals", "add_up")

#: kind -> the columns that are read of it.
COLUMNS: dict[str, tuple[str, ...]] = {
    "FAULT": (
        *("ts", "tgid", "vm", "vcpu", "error_code", "gfn", "hva", "pfn", "walk_pfn", "slot"),
        *("as_id", "level", "mmu", "t_faultin", "t_gup", "t_gup_end", "t_faultin_end", "t_map"),
        *("dur", "ret", "result", "faultin_ret", "refcounted", "prefetch", "refcount", "mapcount"),
        *("page_bits", "refcount_end"),
    ),
    "SPTE": ("op", "vm", "pfn", "level", "mmu", "cause", "refcount", "mapcount", "page_bits"),
    "PAGE_FREE": ("ts", "pfn", "order", "page_bits"),
    "SLOT": ("vm", "as_id", "slot", "gfn", "npages", "hva"),
    "VM": ("ts", "op", "vm", "vm_tgid"),
    "VMA": ("vm", "hva", "hva_end", "vm_flags", "rdev"),
    "LOSS": ("cpu", "loss_kind", "produced", "lost", "filtered"),
    "NOTE": ("note",),
}
#: Results of a fault that leave the guest with a mapping.
MAPPED = ("fixed", "spurious")
#: What became of a page that a fault found: mapped, with KVM's reference or without one, or not.
OUTCOMES = ("mapped", "mapped, uncounted", "not mapped")
#: Above this the exact count is left out of a reference count's change: a zero page has millions.
COUNT_EXACT_MAX = 16
#: Stands for such a count.
MANY = 1 << 32
#: Stands for the memslot of a fault that ended before fault-in, which is what names it.
NO_FAULTIN = -2


@dataclasses.dataclass(slots=True)
class Totals:
    """The sums of a trace. VM 0 stands for records that name none; times are ns."""

    #: `TraceReader.info`, asked after everything was read.
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    notes: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    #: (vm, vcpu, result) -> faults.
    faults: Counter[tuple[int, int, str]] = dataclasses.field(default_factory=Counter)
    #: (path, result, prefetch) -> faults; see `analysis.paths`.
    paths: Counter[tuple[str, str, bool]] = dataclasses.field(default_factory=Counter)
    #: (path, stage) -> how long they were, ns.
    stages: dict[tuple[str, str], Histogram] = dataclasses.field(default_factory=dict)
    #: How long faults took, by VM, memslot and level.
    latency: WhereTimes = dataclasses.field(default_factory=WhereTimes)
    #: (vm, as_id, slot, result) -> faults; slot -1 is none, NO_FAULTIN that nobody asked.
    slots: Counter[tuple[int, int, int, str]] = dataclasses.field(default_factory=Counter)
    #: Places that memslots had: vm, as_id, slot, gfn, npages, hva; each once, the newest last.
    places: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    #: (vm, mmu, level, cause, op) -> SPTE records.
    sptes: Counter[tuple[int, str, int, str, str]] = dataclasses.field(default_factory=Counter)
    #: (class, level) -> pages at the end of fault-in if level is 0, else at installs.
    pages: Counter[tuple[str, int]] = dataclasses.field(default_factory=Counter)
    #: (outcome, count at the end of fault-in, at the end of the fault) -> faults; outcome is one of
    #: OUTCOMES. A first count of MANY has the difference in place of the second.
    counts: Counter[tuple[str, int, int]] = dataclasses.field(default_factory=Counter)
    #: vm -> process that owns it; when it was made and destroyed, if that is in the trace.
    processes: dict[int, int] = dataclasses.field(default_factory=dict)
    created: dict[int, int] = dataclasses.field(default_factory=dict)
    destroyed: dict[int, int] = dataclasses.field(default_factory=dict)
    #: (vm, vcpu) -> when the last fault that did not fail ended.
    alive: dict[tuple[int, int], int] = dataclasses.field(default_factory=dict)
    #: kind -> (produced, lost, filtered), from the LOSS rows.
    losses: dict[str, tuple[int, int, int]] = dataclasses.field(default_factory=dict)
    #: See `analysis.failures` (failed, heads, blocks) and `analysis.uncounted`.
    failed: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    heads: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    blocks: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    uncounted: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)
    vmas: pd.DataFrame = dataclasses.field(default_factory=pd.DataFrame)


def add_up(
    path: Path,
    rows_max: int = CHUNK_ROWS,
    progress: Callable[[int, int], None] | None = None,
) -> Totals:
    """Read a trace, `rows_max` records of a kind at a time, and return what it adds up to.

    `progress` is told how many of the records are done, and how many there are. Raises
    TraceFormatError if it is not a trace.
    """
    totals = Totals()
    adders: dict[str, Callable[[Totals, pd.DataFrame], None]] = {
        "FAULT": _add_faults,
        "SPTE": _add_sptes,
        "PAGE_FREE": _add_frees,
        "SLOT": _add_slots,
        "VM": _add_vms,
        "VMA": _add_vmas,
    }
    newest: dict[tuple[str, int], tuple[int, int, int]] = {}
    with TraceReader(path) as reader:
        kinds = reader.info()["kinds"]
        done, wanted = 0, sum(kinds.get(kind, 0) for kind in COLUMNS)
        for kind, chunk in chunks(reader, COLUMNS, rows_max):
            done += len(chunk)
            if progress:
                progress(done, wanted)
            if kind == "NOTE":
                totals.notes += parse_notes(chunk["note"])
            elif kind == "LOSS":
                newest.update(_newest_losses(chunk))
            else:
                adders[kind](totals, chunk)
        totals.info = reader.info()
    if totals.info["merged"].get("boots", 1) != 1:
        # What was freed may have been a frame of that number on another host.
        totals.blocks = totals.blocks.iloc[:0]
    for vm, tgid in _noted_vms(totals.notes):
        totals.processes.setdefault(vm, tgid)
    for (kind, _), counts in newest.items():
        before = totals.losses.get(kind, (0, 0, 0))
        totals.losses[kind] = (before[0] + counts[0], before[1] + counts[1], before[2] + counts[2])
    return totals


def _count(table: pd.DataFrame, keys: Sequence[str]) -> Counter[tuple[Any, ...]]:
    """Count the rows of each combination of keys, none of which may be null."""
    sizes = table.groupby(list(keys), observed=True, sort=False).size()
    return Counter({key: int(size) for key, size in sizes.items()})


def _whole(column: pd.Series, null: int) -> pd.Series:
    return column.astype("Int64").fillna(null).astype(np.int64)


def _named(column: pd.Series) -> pd.Series:
    if not column.isna().any():
        return column
    return column.astype(object).fillna("?").astype("category")


def _add_faults(totals: Totals, table: pd.DataFrame) -> None:
    table = table.assign(
        vm=_whole(table["vm"], 0),
        vcpu=_whole(table["vcpu"], -1),
        result=_named(table["result"]),
        ret=_whole(table["ret"], 0),
        page=page_class(table),
        mapped=table["result"].isin(MAPPED),
        uncounted=not_counted(table),
        path=path_of(table),
        ahead=table["prefetch"].fillna(False).astype(bool),
        place=_whole(table["slot"], -1).where(table["t_faultin"].notna(), NO_FAULTIN),
        space=_whole(table["as_id"], 0),
    )
    totals.faults += _count(table, ["vm", "vcpu", "result"])
    totals.paths += _count(table, ["path", "result", "ahead"])
    totals.slots += _count(table, ["vm", "space", "place", "result"])
    _add_stages(totals, table)
    totals.latency.add(table)
    for name, size in table["page"].value_counts().items():
        totals.pages[name, 0] += int(size)
    _add_counts(totals, table)
    well = table[table["ret"] >= 0]
    for key, ts in well.groupby(["vm", "vcpu"])["ts"].max().items():
        totals.alive[key] = max(int(ts), totals.alive.get(key, 0))
    for vm, tgid in table.dropna(subset="tgid").groupby("vm")["tgid"].last().items():
        totals.processes.setdefault(vm, int(tgid))
    totals.failed = failed_faults([totals.failed, table[FAILED_COLUMNS]])
    totals.heads = walked_heads([totals.heads, table])
    totals.uncounted = uncounted_pages(
        [totals.uncounted, table.loc[table["mapped"] & table["uncounted"], UNCOUNTED_COLUMNS]]
    )


def _add_counts(totals: Totals, table: pd.DataFrame) -> None:
    both = table.dropna(subset=["refcount", "refcount_end"])
    before, after = _whole(both["refcount"], 0), _whole(both["refcount_end"], 0)
    many = before > COUNT_EXACT_MAX
    mapped = both["mapped"].to_numpy(dtype=bool)
    uncounted = both["uncounted"].to_numpy(dtype=bool)
    pairs = pd.DataFrame(
        {
            "outcome": np.select([mapped & ~uncounted, mapped], OUTCOMES[:2], OUTCOMES[2]),
            "before": before.where(~many, MANY),
            "after": after.where(~many, after - before),
        }
    )
    totals.counts += _count(pairs, ["outcome", "before", "after"])


def _add_stages(totals: Totals, table: pd.DataFrame) -> None:
    times = stage_times(table)
    for path, rows in table.groupby("path", observed=True, sort=False).indices.items():
        for stage, durations in times.items():
            reached = durations[rows]
            reached = reached[reached >= 0]
            if len(reached):
                histogram = totals.stages.setdefault((str(path), stage), Histogram())
                histogram.add(reached.astype(np.uint64))


def _add_slots(totals: Totals, table: pd.DataFrame) -> None:
    # A memslot that is deleted says where it was; tests make and delete one a thousand times.
    totals.places = stack([totals.places, table]).drop_duplicates(keep="last")


def _add_sptes(totals: Totals, table: pd.DataFrame) -> None:
    table = table.assign(
        vm=_whole(table["vm"], 0),
        level=_whole(table["level"], 0),
        mmu=_named(table["mmu"]),
        cause=_named(table["cause"]),
        op=_named(table["op"]),
    )
    totals.sptes += _count(table, ["vm", "mmu", "level", "cause", "op"])
    installs = table[table["op"] == "install"]
    at = installs.assign(page=page_class(installs), level=installs["level"].clip(lower=1))
    totals.pages += _count(at, ["page", "level"])


def _add_frees(totals: Totals, table: pd.DataFrame) -> None:
    # Single pages are no blocks, and there are as many of them as faults.
    blocks = table[(table["order"].fillna(0) > 0) & table["pfn"].notna()]
    totals.blocks = stack([totals.blocks, blocks])


def _add_vms(totals: Totals, table: pd.DataFrame) -> None:
    for ts, op, vm, tgid in table.itertuples(index=False):
        number = 0 if pd.isna(vm) else int(vm)
        if not pd.isna(tgid):
            totals.processes[number] = int(tgid)
        if op == "create":
            totals.created[number] = int(ts)
        elif op == "delete":
            totals.destroyed[number] = int(ts)


def _noted_vms(notes: Iterable[dict[str, Any]]) -> Iterator[tuple[int, int]]:
    """Yield (vm, process) of the VMs that the recorder knew at the end, older ones too."""
    for note in notes:
        vms = note.get("vms")
        for entry in vms if isinstance(vms, list) else ():
            if isinstance(entry, dict) and entry.get("traced"):
                vm, tgid = entry.get("vm"), entry.get("tgid")
                if isinstance(vm, int) and isinstance(tgid, int):
                    yield vm, tgid


def _add_vmas(totals: Totals, table: pd.DataFrame) -> None:
    # A thread that faults in two mappings by turns writes a record each time.
    totals.vmas = stack([totals.vmas, table]).drop_duplicates(keep="last")


def _newest_losses(table: pd.DataFrame) -> dict[tuple[str, int], tuple[int, int, int]]:
    """Return (kind, cpu) -> (produced, lost, filtered): the counts only grow, so the last row's."""
    newest = {}
    for row in table.itertuples(index=False):
        numbers = [0 if pd.isna(n) else int(n) for n in (row.produced, row.lost, row.filtered)]
        cpu = 0 if pd.isna(row.cpu) else int(row.cpu)
        newest[str(row.loss_kind), cpu] = (numbers[0], numbers[1], numbers[2])
    return newest
