"""A trace for a notebook: tables, lifetimes, anomalies, loaded when asked for and kept.

    >>> trace = open_trace("tests/unit/traces/ttm-6.12.pfnt")
    >>> trace.info["generation"], trace.info["lost"]
    ('G0b', 0)
    >>> trace.sptes[["op", "gfn", "level", "pfn", "refcount"]].iloc[0].to_dict()
    {'op': 'install', 'gfn': 1, 'level': 1, 'pfn': 120928, 'refcount': 3}
    >>> trace.lives().groupby(["page_class", "ended_by"], observed=True).size().to_dict()
    {('counted', 'teardown'): 2}

Every table is what `analysis.schema` declares (docs/TABLES.md): times are ns of CLOCK_MONOTONIC,
`gfn` and `pfn` are in pages of 4 KiB, integers that can be null are pandas' nullable types.
May import: pandas, pyarrow, `analysis`, `tracer.tracefile`.
"""

import functools
import json
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from analysis.check import CheckResult, check_trace
from analysis.lives import lives_of
from analysis.pfnview import PfnHistory, pfn_history
from analysis.schema import KINDS_OF_TABLE, TABLES, VERDICTS, check, empty
from analysis.tables import DTYPES
from tracer.tracefile import TraceReader

__all__ = ("Trace", "anomalies_table", "open_trace")


class Trace:
    """One trace. Tables are loaded at the first use; a trace larger than memory needs `export`."""

    def __init__(self, path: Path) -> None:
        """Take the path of a trace; raises TraceFormatError if it is none."""
        self.path = path
        with TraceReader(path) as reader:
            self._start_ns = reader.meta.start_monotonic_ns
            self._info = reader.info()
            self._results = tuple(reader.meta.results.values())

    @property
    def info(self) -> dict[str, Any]:
        """What the trace says of itself, as plain JSON.

        records              rows that the kernel wrote; kinds: {kind: rows}, zeros included
        produced, lost, filtered, torn
                             the kernel's counters of records, summed over kinds and cpus
        complete, reason     does the file end with its end mark; if not, why ("" if it does)
        kernel, generation   release, and which rules of reference counting it has: G0a, G0b, G1, G2
        hooks, missing       [{hook, how, symbols}] attached; [{hook, why, without}] not attached
        command, hostname, start, start_unix_ns, duration_s
                             what was recorded, where, when (ISO 8601 UTC; ns), how long (s)
        vms                  [{vm, tgid}] of VMs that were created or destroyed meanwhile
        summary              what the recorder said at its end, {} if it did not
        merged               of a merged trace what is known of its parts, else {}
        bytes, schema_version, pfntrace_version
                             of the file
        """
        return self._info

    def __repr__(self) -> str:
        """Return for example "Trace('a.pfnt', 1,204 records, lost 0)"."""
        info = self.info
        return f"Trace({str(self.path)!r}, {info['records']:,} records, lost {info['lost']:,})"

    @functools.cached_property
    def faults(self) -> pd.DataFrame:
        """Guest page faults, one row each: where, which page, how long, with which result.

        `fault_ts` and `ts` (ns) are its begin and end; `vm`, `vcpu`, `tid`; `gfn` (4K pages) with
        `slot` and `hva` (bytes); `pfn` (4K pages, or one of KVM's error values), `level`, `mmu`;
        `error_code` and `ret` with its name `result`; `t_faultin`, `t_gup`, … `t_map` (ns after
        fault_ts, null if the fault never got there); `refcount` at fault-in return and
        `refcount_end`.

        >>> trace = open_trace("tests/unit/traces/ttm-6.12.pfnt")
        >>> trace.faults.groupby("result", observed=True).size().to_dict()
        {'error': 1, 'fixed': 2}
        """
        return self._load("faults")

    @functools.cached_property
    def sptes(self) -> pd.DataFrame:
        """Changes of leaf SPTEs, one row each.

        `ts` (ns), `op` install, change or zap, `cause`; `vm`, `as_id`, `level` (1: 4K), `gfn` and
        `pfn` (4K pages), `mmu`, `sptep` (bytes); `old` and `new` (bits of the SPTE); `refcount` and
        `mapcount` of the page; `fault_ts` (ns) of the fault that it happened in.

        >>> trace = open_trace("tests/unit/traces/ttm-6.12.pfnt")
        >>> trace.sptes["op"].value_counts().to_dict()
        {'install': 2, 'zap': 2, 'change': 0}
        """
        return self._load("sptes")

    @functools.cached_property
    def releases(self) -> pd.DataFrame:
        """References that KVM gave back, and pages that it marked, one row each.

        `ts` (ns), `call` (pfn_clean, … page_dirty, finish_fault, mark_accessed, mark_dirty), `pfn`
        (4K pages), `refcount` before it, `mapcount`, `page_flags` and `page_bits` (bits); `vm`,
        `tid`, `fault_ts` (ns).
        """
        return self._load("releases")

    @functools.cached_property
    def invalidations(self) -> pd.DataFrame:
        """MMU notifier calls, one row each.

        `ts` (ns), `op` start or end, `vm`, [`hva`, `hva_end`) in bytes, `event` (why memory
        changes), `invalidate_seq` and `in_progress` at the end of the call.
        """
        return self._load("invalidations")

    @functools.cached_property
    def page_events(self) -> pd.DataFrame:
        """Pages freed that a VM had mapped (`kind` PAGE_FREE), and handed out again (PAGE_ALLOC).

        A row speaks of 2^`order` pages from `pfn` (4K pages) at `ts` (ns); `vm` mapped them;
        `refcount`, `mapcount`, `page_flags` and `page_bits` (bits) as they were.
        """
        return self._load("page_events")

    @functools.cached_property
    def pins(self) -> pd.DataFrame:
        """Guest pages that KVM mapped for itself, one row for each time.

        `ts` (ns), `op` map, unmap or refresh, `vm`, `gfn` and `pfn` (4K pages), `refcount`.
        """
        return self._load("pins")

    @functools.cached_property
    def slots(self) -> pd.DataFrame:
        """Memslots, one row for each change.

        `ts` (ns), `op` create, delete, move, flags, or seen if it was there before the trace;
        `vm`, `as_id`, `slot`, `gfn` and `npages` (4K pages), `hva` (bytes), `slot_flags` (bits).
        """
        return self._load("slots")

    @functools.cached_property
    def vms(self) -> pd.DataFrame:
        """VMs: `ts` (ns), `op` create or delete, `vm`, `vm_tgid` (its process)."""
        return self._load("vms")

    @functools.cached_property
    def vmas(self) -> pd.DataFrame:
        """PFNMAP mappings of the VM's process that a fault walked.

        `ts` (ns), `vm`, [`hva`, `hva_end`) in bytes, `vm_flags` (bits), `rdev` of the file.
        """
        return self._load("vmas")

    @functools.cached_property
    def losses(self) -> pd.DataFrame:
        """Counters per `cpu` and `loss_kind`, in records since the start.

        `ts` (ns), `produced`; of these `lost` (of these `torn`) and `filtered`.
        """
        return self._load("losses")

    @functools.cached_property
    def notes(self) -> pd.DataFrame:
        """What the recorder noted: `ts` (ns), `note` (one JSON object)."""
        return self._load("notes")

    @functools.cached_property
    def _lives(self) -> pd.DataFrame:
        return check("lives", lives_of(self.path))

    @functools.cached_property
    def _checked(self) -> CheckResult:
        return check_trace(self.path)

    def lives(
        self,
        *,
        vm: int | None = None,
        gfn: int | None = None,
        pfn: int | None = None,
        slot: int | None = None,
    ) -> pd.DataFrame:
        """Return mapping lifetimes, the table `lives`: all, or those of a VM, a page, a memslot.

        `gfn` and `pfn` (4K pages) also find large leaves that hold that page. `birth_ts` and
        `death_ts` (ns), `birth_cause`, `death_cause`, `ended_by`; `vm`, `as_id`, `level`; `gfn`,
        `pages` and `pfn` (4K pages), `page_class`; `refcount_birth`, `_death`, `_min`, `_max`;
        `ever_writable`, `accessed`, `dirty`; `censored_start`, `censored_end`, `lost`.

        >>> trace = open_trace("tests/unit/traces/ttm-6.12.pfnt")
        >>> life = trace.lives(gfn=65536).iloc[0]
        >>> int(life["death_ts"] - life["birth_ts"]) > 0, life["censored_start"].item()
        (True, False)
        """
        lives = self._lives
        wanted = pd.Series(True, index=lives.index)
        for name, value in (("vm", vm), ("slot", slot)):
            if value is not None:
                wanted &= (lives[name] == value).fillna(False).astype(bool)
        for name, value in (("gfn", gfn), ("pfn", pfn)):
            if value is not None:
                wanted &= (lives[name] <= value) & (value < lives[name] + lives["pages"])
        return lives[wanted]

    def anomalies(self) -> pd.DataFrame:
        """Return what `pfntrace check` finds, the table `anomalies`, worst first.

        `detector`, `verdict`, `title`, `count`, `pages` (4K pages), `first_ts` and `last_ts` (ns);
        `vms`, `slots`, `gfns`, `pfns`, `evidence`, … are JSON.

        >>> trace = open_trace("tests/unit/traces/ttm-7.3.pfnt")
        >>> len(trace.anomalies())
        0
        """
        return _anomalies(self._checked)

    def unanswerable(self) -> dict[str, str]:
        """Return which detectors cannot answer for this trace, and why."""
        return {item.detector: item.reason for item in self._checked.unanswerable}

    def pfn_history(self, pfn: int) -> PfnHistory:
        """Return all that is known of one host page: its mappings, and records in order of time.

        >>> trace = open_trace("tests/unit/traces/ttm-6.12.pfnt")
        >>> history = trace.pfn_history(120928)
        >>> history.events["event"].tolist()[:3]
        ['install', 'pfn_clean', 'fault fixed']
        """
        with TraceReader(self.path) as reader:
            return pfn_history(reader, (pfn, pfn))

    def seconds(self, ts: Any) -> Any:
        """Return times of the trace (ns, a number or a column) as seconds since it began."""
        return (ts - self._start_ns) / 1e9

    def _load(self, name: str) -> pd.DataFrame:
        columns = TABLES[name].names
        with TraceReader(self.path) as reader:
            batches = [b for b in reader.records(KINDS_OF_TABLE[name], columns) if len(b)]
        if not batches:
            return empty(name)
        table = pa.Table.from_batches(batches).to_pandas(types_mapper=DTYPES.get)
        return check(name, _with_names(name, table, ("error", *self._results)))


def _with_names(name: str, table: pd.DataFrame, results: tuple[str, ...]) -> pd.DataFrame:
    """Return a table whose categories are the names declared for it, not those of all tables.

    `results` are those of the kernel. What a record says that is no such name stays.
    """
    changed = {}
    for column in TABLES[name].columns:
        if column.dtype == "category":
            values = table[column.name].cat
            used = values.remove_unused_categories().cat.categories
            known = dict.fromkeys([*(column.names or results), *used])
            changed[column.name] = values.set_categories(list(known))
    return table.assign(**changed)


def open_trace(path: Path | str) -> Trace:
    """Open a trace; raises TraceFormatError if the file is not one.

    >>> open_trace("tests/unit/traces/ttm-6.12.pfnt")
    Trace('tests/unit/traces/ttm-6.12.pfnt', 22 records, lost 0)
    """
    return Trace(Path(path))


def anomalies_table(path: Path) -> pd.DataFrame:
    """Return what `pfntrace check` finds in a trace: the table `anomalies`, worst first."""
    return _anomalies(check_trace(path))


def _anomalies(result: CheckResult) -> pd.DataFrame:
    frame = empty("anomalies")
    rows = [finding.to_json() for finding in result.findings]
    if not rows:
        return frame
    columns = {}
    for column in TABLES["anomalies"].columns:
        values = [row[column.name] for row in rows]
        if column.unit == "JSON":
            values = [json.dumps(value) for value in values]
        elif column.name.endswith("_ts"):
            values = [value or None for value in values]
        # One by one: a list of numbers and None would become floats, which round 64 bits.
        dtype = None if column.name == "verdict" else frame[column.name].dtype
        columns[column.name] = pd.Series(values, dtype=dtype)
    table = pd.DataFrame(columns)
    table["verdict"] = pd.Categorical(table["verdict"], categories=list(VERDICTS))
    return check("anomalies", table)
