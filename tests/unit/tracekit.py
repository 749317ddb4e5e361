"""Real traces, made ill: read one, change what a buggy kernel would have changed, write it anew.

    copy = Copy.of(SHIPPED / "ttm-6.12.pfnt")
    copy.drop("RELEASE", copy.calls("pfn_clean"))          # a kernel that never gives back
    copy["FAULT"]["page_end"]["refcount"] += 1
    path = copy.write(tmp_path / "leak.pfnt")

Records are arrays as the kernel writes them (`probes.wire`), so a change is a line of numpy. What
is not changed is written as it was: times, losses, notes, the description of the kernel.

    finding = only(told(path, "balance"))                  # what a check says of it
"""

import dataclasses
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from analysis.check import check_trace
from analysis.findings import Finding
from analysis.stream import PIECE_ROWS
from probes import wire
from tracer.schema import COLUMNS, NAMES, RECORD_KINDS, Column, Source
from tracer.tracefile import TraceMeta, TraceReader, TraceWriter

__all__ = ("NO_PFN", "SHIPPED", "Copy", "only", "shipped", "told")

#: The traces that come with the tests.
SHIPPED = Path(__file__).parent / "traces"
#: A null pfn on the wire.
NO_PFN = (1 << 64) - 1


def _dtype(kind: str) -> np.dtype:
    return wire.FAULT if kind == "FAULT" else wire.EVENT


@dataclasses.dataclass
class Copy:
    """A trace in memory that can be changed and written."""

    meta: TraceMeta
    records: dict[str, np.ndarray]
    notes: list[tuple[int, dict[str, Any]]]
    #: rows of LOSS: kind -> cpu -> (produced, lost, filtered, torn), the newest ones.
    losses: dict[str, dict[int, tuple[int, int, int, int]]]
    #: what the recorder said at the end; None if it was killed.
    summary: dict[str, Any] | None

    @classmethod
    def of(cls, path: Path) -> "Copy":
        """Read a whole trace."""
        with TraceReader(path) as reader:
            records = {kind: _read(reader, kind) for kind in RECORD_KINDS}
            notes = [
                (row["ts"], json.loads(row["note"]))
                for batch in reader.batches(["NOTE"], ["ts", "note"])
                for row in batch.to_pylist()
            ]
            losses: dict[str, dict[int, tuple[int, int, int, int]]] = {}
            names = ("produced", "lost", "filtered", "torn")
            for batch in reader.batches(["LOSS"], ["loss_kind", "cpu", *names]):
                for row in batch.to_pylist():
                    of_kind = losses.setdefault(row["loss_kind"], {})
                    of_kind[row["cpu"]] = tuple(row[name] for name in names)
            info = reader.info()
            summary = dict(info["summary"]) if info["complete"] else None
            return cls(reader.meta, records, [n for n in notes if "end" not in n[1]],
                       losses, summary)  # fmt: skip

    def __getitem__(self, kind: str) -> np.ndarray:
        return self.records[kind]

    def __setitem__(self, kind: str, records: np.ndarray) -> None:
        self.records[kind] = records

    def write(self, path: Path) -> Path:
        """Write the trace, each kind sorted by (ts, cpu, seq), and return its path."""
        writer = TraceWriter(path, self.meta)
        for ts, note in self.notes:
            writer.write_note(note, ts=ts)
        end = max((int(r["h"]["ts"].max()) for r in self.records.values() if len(r)), default=0)
        try:
            writer.write_group([(k, _sorted(r)) for k, r in self.records.items() if len(r)])
            writer.write_losses(self._losses(), ts=end)
            writer.flush()
            if self.summary is not None:
                writer.close(self.summary, ts=end + 1)
        finally:
            writer.abandon()
        return path

    def _losses(self) -> dict[str, list[tuple[int, int, int, int]]]:
        return {
            kind: [of_kind.get(cpu, (0, 0, 0, 0)) for cpu in range(max(of_kind) + 1)]
            for kind, of_kind in self.losses.items()
        }

    # --- what to change -------------------------------------------------------------------------

    def drop(self, kind: str, which: np.ndarray) -> int:
        """Leave out records, as if what they tell of had not happened; return how many."""
        self.records[kind] = self.records[kind][~which]
        return int(which.sum())

    def add(self, kind: str, **fields: Any) -> np.ndarray:
        """Add a record; `fields` as in `unit.records.records` (`h__ts=…`, `page__refcount=…`)."""
        row = np.zeros(1, _dtype(kind))
        row["h"]["kind"], row["h"]["vcpu"], row["h"]["stack"] = wire.KINDS.index(kind), -1, -1
        row["h"]["seq"] = 1 << 31 | len(self.records[kind])
        if kind == "FAULT":
            row["walk_pfn"] = NO_PFN
        for name, value in fields.items():
            *path, last = name.split("__")
            target = row
            for step in path:
                target = target[step]
            target[last] = value
        self.records[kind] = np.concatenate([self.records[kind], row])
        return row

    def again(self, kind: str, which: np.ndarray, **fields: Any) -> None:
        """Add copies of some records, a microsecond later if `fields` name no time."""
        rows = self.records[kind][which].copy()
        rows["h"]["ts"] += np.uint64(1000)
        rows["h"]["seq"] |= np.uint32(1 << 31)
        for name, value in fields.items():
            *path, last = name.split("__")
            target = rows
            for step in path:
                target = target[step]
            target[last] = value
        self.records[kind] = np.concatenate([self.records[kind], rows])

    def lose(self, kind: str, count: int, cpu: int = 0) -> None:
        """Say that so many records of a kind were lost."""
        of_kind = self.losses.setdefault(kind, {})
        produced, lost, filtered, torn = of_kind.get(cpu, (0, 0, 0, 0))
        of_kind[cpu] = (produced + count, lost + count, filtered, torn)
        if self.summary is not None:
            counts = self.summary.get("counts", {}).get(kind)
            self.summary["lost"] = int(self.summary.get("lost", 0)) + count
            self.summary["produced"] = int(self.summary.get("produced", 0)) + count
            if counts is not None:
                counts["lost"] += count
                counts["produced"] += count

    def unhook(self, *names: str) -> None:
        """Say that some hooks were missing."""
        profile = dict(self.meta.profile)
        gone = [hook for hook in profile["hooks"] if hook["hook"] in names]
        profile["hooks"] = [hook for hook in profile["hooks"] if hook["hook"] not in names]
        profile["missing"] = [
            *profile["missing"],
            *(
                {"hook": hook["hook"], "tried": hook["symbols"], "why": "no such symbol",
                 "without": "it cannot be seen", "required": False}
                for hook in gone
            ),
        ]  # fmt: skip
        self.meta = dataclasses.replace(self.meta, profile=profile)

    def hook(self, *names: str) -> None:
        """Say that some hooks were attached too."""
        profile = dict(self.meta.profile)
        more = [{"hook": name, "symbols": [], "how": "kprobe", "note": ""} for name in names]
        profile["hooks"] = [*profile["hooks"], *more]
        self.meta = dataclasses.replace(self.meta, profile=profile)

    def setting(self, **values: Any) -> None:
        """Change settings of the recording."""
        settings = {**self.meta.settings, **values}
        self.meta = dataclasses.replace(self.meta, settings=settings)

    def generation(self, name: str, **members: tuple[str, ...]) -> None:
        """Say that the kernel is of another generation; `members` are added to its structures."""
        facts = json.loads(self.meta.facts)
        for struct, names in members.items():
            facts["structs"].setdefault(struct, {}).update({n: [0, 8] for n in names})
        self.meta = dataclasses.replace(
            self.meta,
            facts=json.dumps(facts),
            profile={**self.meta.profile, "generation": name},
        )

    # --- which records --------------------------------------------------------------------------

    def calls(self, *names: str) -> np.ndarray:
        """Tell which RELEASE records are of some calls."""
        return np.isin(self["RELEASE"]["cause"], [wire.CALLS.index(name) for name in names])

    def ops(self, kind: str, *names: str) -> np.ndarray:
        """Tell which records of a kind have some op."""
        return np.isin(self[kind]["h"]["op"], [wire.OPS.index(name) for name in names])

    def causes(self, *names: str) -> np.ndarray:
        """Tell which SPTE records have some cause."""
        return np.isin(self["SPTE"]["cause"], [wire.CAUSES.index(name) for name in names])

    def fixed(self) -> np.ndarray:
        """Tell which FAULT records were fixed with a page of the host."""
        value = next(v for v, name in self.meta.results.items() if name == "fixed")
        return (self["FAULT"]["ret"] == value) & (self["FAULT"]["pfn"] < 1 << 40)

    def inside(self, kind: str, fault: np.ndarray) -> np.ndarray:
        """Tell which records of a kind happened in one FAULT record."""
        h = self[kind]["h"]
        return (h["fault_ts"] == fault["h"]["fault_ts"]) & (h["tid"] == fault["h"]["tid"])


def _sorted(records: np.ndarray) -> np.ndarray:
    h = records["h"]
    return records[np.lexsort([h["seq"], h["cpu"], h["ts"]])]


def _read(reader: TraceReader, kind: str) -> np.ndarray:
    parts = [_records(kind, batch) for batch in reader.records([kind])]
    return np.concatenate(parts) if parts else np.zeros(0, _dtype(kind))


def _records(kind: str, batch: Any) -> np.ndarray:
    out = np.zeros(len(batch), _dtype(kind))
    out["h"]["kind"] = wire.KINDS.index(kind)
    for column, source in _filled(kind):
        if not source.field:
            continue
        *path, last = source.field.split(".")
        target = out
        for step in path:
            target = target[step]
        target[last] = _values(column, source, batch.column(column.name).to_pylist())
    return out


def _filled(kind: str) -> Iterable[tuple[Column, Source]]:
    # A value that only `result` needs comes from `ret` again, and `ts` first: it is never null.
    return ((c, c.sources[kind]) for c in COLUMNS if kind in c.sources and c.name != "result")


def _values(column: Column, source: Source, values: list[Any]) -> list[Any]:
    null = 0 if source.null is None or source.null_field else source.null
    number: Callable[[Any], Any] = int
    if column.names:
        number = NAMES[column.names].index
    return [null if value is None else number(value) for value in values]


def shipped(name: str) -> Copy:
    """Return one of the traces that come with the tests."""
    return Copy.of(SHIPPED / f"{name}.pfnt")


def told(path: Path, *detectors: str, rows_max: int | None = None) -> list[Finding]:
    """Return what some detectors find in a trace, all if none is named."""
    result = check_trace(path, detectors or None, rows_max=rows_max or PIECE_ROWS)
    return list(result.findings)


def only(findings: list[Finding]) -> Finding:
    """Return the one finding."""
    assert len(findings) == 1, [finding.title for finding in findings]
    return findings[0]
