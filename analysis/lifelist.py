"""`pfntrace lifetimes`: mappings and how they ended, as lines of 80 columns or as a file.

The lives of a trace pass by as they end; what is kept is what is shown. May import: pandas,
pyarrow, `analysis`, `probes.errors`, `tracer.describe`, `tracer.tracefile`.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from analysis import text
from analysis.export import arrow_table_schema
from analysis.lives import iter_lives
from analysis.outfile import check_new, new_file
from analysis.pfnview import covering, pfn_history
from probes.errors import PfntraceError
from tracer.describe import printable, verdict_line
from tracer.tracefile import TraceReader

__all__ = ("Selection", "lifetime_lines", "write_lifetimes")

#: Told how much is done: (SPTE records so far, of all).
Progress = Callable[[int, int], None]

#: VMs that are named if another one was asked for.
_VMS_MAX = 20
_SIZES = {1: "4K", 2: "2M", 3: "1G"}
_ORDINARY = ("counted", "counted, compound")
_HEADER = f"{'born s':>12} {'lived':>8} {'vm':>3} {'gfn':>12}    {'pfn':>10} {'count':>8}  from, to"
_EVENTS = {"install": "mapped", "zap": "unmapped", "free": "freed", "alloc": "handed out"}


@dataclasses.dataclass(frozen=True, slots=True)
class Selection:
    """Which lives; None is any. Frames are (first, last): a large leaf counts if it holds one."""

    vm: int | None = None
    gfns: tuple[int, int] | None = None
    pfns: tuple[int, int] | None = None
    slot: int | None = None

    def of(self, lives: pd.DataFrame) -> pd.DataFrame:
        """Return those of a table `lives`."""
        wanted = np.ones(len(lives), bool)
        for name, number in (("vm", self.vm), ("slot", self.slot)):
            if number is not None:
                wanted &= lives[name].to_numpy(np.int64, na_value=-1) == number
        for name, frames in (("gfn", self.gfns), ("pfn", self.pfns)):
            if frames is not None:
                wanted &= covering(lives, name, frames)
        return lives[wanted]


def lifetime_lines(
    path: Path, chosen: Selection, limit: int, progress: Progress | None = None
) -> Iterator[str]:
    """Yield the lives of a trace in the order of their beginnings, `limit` of them.

    With `chosen.pfns` all records about these host pages follow, `limit` of each recording (of
    `chosen.vm` and of no known VM, if that is chosen). Raises TraceFormatError if the file is not
    a trace, PfntraceError if it does not have that VM.
    """
    with TraceReader(path) as reader:
        totals = _Totals(limit)
        for lives in _selected(reader, chosen, progress):
            totals.add(lives)
        start = reader.meta.start_monotonic_ns
        yield from text.wrapped(verdict_line(reader.info()), "", "  ")
        yield from text.wrapped(totals.sentence(chosen), "", "  ")
        if totals.first is not None and len(totals.first):
            yield ""
            yield _HEADER
            for row in totals.first.to_dict("records"):
                yield from _life(row, start)
        yield from _more(totals.count - limit, "life", "lives")
        if chosen.pfns is not None:
            yield from _history(reader, chosen.pfns, chosen.vm, start, limit)


def write_lifetimes(
    path: Path,
    chosen: Selection,
    files: Mapping[str, Path],
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Write lives to files, form -> path: columns of the table `lives` (docs/TABLES.md).

    Forms are csv and parquet. Returns lines that say what was made. Raises OutputError if a file
    cannot be written, PfntraceError if the trace does not have the VM that is chosen.
    """
    for output in files.values():
        check_new(output, path, overwrite=overwrite)
    said = []
    for form, output in files.items():
        with TraceReader(path) as reader:
            lives = _selected(reader, chosen, progress)
            rows = _write(lives, form, output, path, overwrite=overwrite)
            said += [verdict_line(reader.info()), f"wrote {output}: {text.plural(rows, 'row')}"]
    return list(dict.fromkeys(said))


def _write(
    tables: Iterator[pd.DataFrame], form: str, output: Path, source: Path, *, overwrite: bool
) -> int:
    """Write tables below one another; return how many rows."""
    schema = arrow_table_schema("lives")
    if form == "csv":
        plain = (f.type.value_type if pa.types.is_dictionary(f.type) else f.type for f in schema)
        schema = pa.schema(list(zip(schema.names, plain, strict=True)))
    rows = 0
    with new_file(output, source, overwrite=overwrite) as unfinished:
        with contextlib.closing(_writer(form, unfinished, schema)) as writer:
            for lives in tables:
                table = pa.Table.from_pandas(lives, preserve_index=False)
                writer.write_table(table.cast(schema))
                rows += len(lives)
    return rows


def _writer(form: str, path: Path, schema: pa.Schema) -> Any:
    if form == "csv":
        from pyarrow import csv

        return csv.CSVWriter(path, schema)
    from pyarrow import parquet

    return parquet.ParquetWriter(path, schema, compression="zstd")


def _selected(
    reader: TraceReader, chosen: Selection, progress: Progress | None
) -> Iterator[pd.DataFrame]:
    total = reader.info()["kinds"]["SPTE"]
    known = False
    for lives in iter_lives(reader, progress and (lambda done: progress(done, total))):
        known = known or chosen.vm is None or bool((lives["vm"] == chosen.vm).any())
        yield chosen.of(lives)
    if not known and chosen.vm is not None:
        _check_vm(reader, chosen.vm)


def _check_vm(reader: TraceReader, vm: int) -> None:
    """Raise PfntraceError if no record of a trace is of a VM."""
    found: set[int] = set()
    for batch in reader.batches(None, ["vm"]):
        found.update(pc.unique(batch.column("vm")).to_pylist())
    if vm not in found:
        known = sorted(number for number in found if number)
        rest = len(known) - _VMS_MAX
        listed = ", ".join(map(str, known[:_VMS_MAX])) + (f" and {rest:,} more" * (rest > 0))
        raise PfntraceError(
            f"no VM {vm} in {reader.path}; it has " + (f"VM {listed}" if known else "none")
        )


class _Totals:
    """Counts lives and keeps the first ones."""

    def __init__(self, limit: int) -> None:
        self.count = 0
        self.first: pd.DataFrame | None = None
        self._limit = limit
        self._vms: set[int] = set()
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, lives: pd.DataFrame) -> None:
        self.count += len(lives)
        self._vms |= set(lives["vm"].unique().tolist())
        for level, count in lives["level"].value_counts().items():
            self._counts["level", _size(level)] += int(count)
        for column in ("page_class", "ended_by"):
            for name, count in lives[column].value_counts().items():
                self._counts[column, str(name)] += int(count)
        for column in ("censored_start", "lost"):
            self._counts["flag", column] += int(lives[column].sum())
        known = lives if self.first is None else pd.concat([self.first, lives])
        self.first = known.nsmallest(self._limit, "life_id")

    def sentence(self, chosen: Selection) -> str:
        if not self.count:
            asked = ", of those asked for" if chosen != Selection() else ""
            return f"No mapping lived in this trace{asked}."
        parts = [f"{text.plural(self.count, 'life', 'lives')} of {self._owners()}"]
        for what, words in (("level", ""), ("page_class", "pages "), ("ended_by", "ended by ")):
            shares = [(count, name) for (kind, name), count in self._counts.items()
                      if kind == what and count]  # fmt: skip
            listed = ", ".join(f"{name} {count:,}" for count, name in sorted(shares, reverse=True))
            parts.append(words + listed)
        for flag, words in (
            ("censored_start", "began before the trace or unseen"),
            ("lost", "may lack lost records"),
        ):
            if self._counts["flag", flag]:
                parts.append(f"{self._counts['flag', flag]:,} {words}")
        return "; ".join(parts) + "."

    def _owners(self) -> str:
        return text.plural(len(self._vms), "VM")


def _size(level: Any) -> str:
    return _SIZES.get(int(level), f"level {level}")


def _life(row: dict[str, Any], start: int) -> Iterator[str]:
    birth, death = row["birth_ts"], row["death_ts"]
    born = "before" if pd.isna(birth) else f"{(birth - start) / 1e9:.6f}"
    lived = "?" if pd.isna(birth) else "open"
    if not pd.isna(death) and not pd.isna(birth):
        lived = text.duration(int(death) - int(birth))
    counts = f"{_count(row['refcount_birth'])}→{_count(row['refcount_death'])}"
    cause = "" if pd.isna(row["birth_cause"]) else str(row["birth_cause"])
    yield (
        f"{born:>12} {lived:>8} {row['vm']:>3} {row['gfn']:>#12x} {_size(row['level'])} "
        f"{row['pfn']:>#10x} {counts:>8}  {cause}, {row['ended_by']}"
    )[: text.WIDTH]
    remarks = []
    if not pd.isna(row["page_class"]) and row["page_class"] not in _ORDINARY:
        remarks.append(str(row["page_class"]))
    if row["as_id"]:
        remarks.append(f"address space {row['as_id']}")
    if row["mmu"] == "shadow":
        remarks.append("shadow MMU")
    if row["changes"]:
        remarks.append(text.plural(int(row["changes"]), "change"))
    if row["lost"]:
        remarks.append("records were lost meanwhile")
    if remarks:
        yield f"{'':>22}{'; '.join(remarks)}"


def _count(count: Any) -> str:
    return "-" if pd.isna(count) else str(count)


def _more(
    count: int, noun: str, nouns: str, how: str = "--limit, --csv, --parquet"
) -> Iterator[str]:
    if count > 0:
        yield f"... and {text.plural(count, noun, nouns)} more ({how})"


def _history(
    reader: TraceReader, frames: tuple[int, int], vm: int | None, start: int, limit: int
) -> Iterator[str]:
    """Yield what happened to some host pages, in each recording: they are others in another."""
    history = pfn_history(reader, frames)
    pages = f"{frames[0]:#x}" if frames[0] == frames[1] else f"{frames[0]:#x} to {frames[1]:#x}"
    what = f"What happened to pfn {pages}"
    parts = [part for _, part in history.events.groupby("recording", sort=True)]
    if not parts:
        yield ""
        yield f"{what}: no record"
    for part in parts:
        yield ""
        if len(history.recordings) > 1:
            name = history.recordings[int(part["recording"].iloc[0]) - 1]
            yield from text.wrapped(printable(name[:1].upper() + name[1:]), "", "  ")
        yield from _happened(what, part, vm, start, limit)


def _happened(
    what: str, events: pd.DataFrame, vm: int | None, start: int, limit: int
) -> Iterator[str]:
    shown = events if vm is None else events[events["vm"].isin([vm, 0])]
    others = len(events) - len(shown)
    left_out = f", and {others:,} of other VMs" if others else ""
    yield f"{what}: {text.plural(len(shown), 'record')}{left_out}"
    for row in shown.head(limit).to_dict("records"):
        line = f"{(int(row['ts']) - start) / 1e9:>12.6f}  {_event(row)}"
        yield printable(line)[: text.WIDTH]
    yield from _more(len(shown) - limit, "record", "records", "--limit")


def _event(row: dict[str, Any]) -> str:
    name = _EVENTS.get(row["event"], row["event"])
    parts = [f"{name:<13}", f"count {_count(row['refcount']):<5}"]
    if row["vm"]:
        parts.append(f"vm {row['vm']}")
    if not pd.isna(row["gfn"]):
        parts.append(f"gfn {row['gfn']:#x}")
    if row["pages"] > 1:
        parts.append(f"{row['pages']} pages from {row['pfn']:#x}")
    if not pd.isna(row["cause"]):
        parts.append(f"by {row['cause']}")
    if not pd.isna(row["life_id"]):
        parts.append(f"life {row['life_id']}")
    return " ".join(parts)
