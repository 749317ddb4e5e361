"""Evidence: the records that prove a finding, fetched once all findings are known.

The trace is read a second time, of each kind only what names a record; then the few batches that
hold a chosen one are read whole. May import: `analysis.columns`, `analysis.findings`,
`tracer.schema`, `tracer.tracefile`, numpy, pyarrow.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from analysis.columns import NULLS, numbers
from analysis.findings import EVIDENCE_MAX, Chain, Finding
from tracer.schema import columns_of_kind
from tracer.tracefile import TraceReader

__all__ = ("fetch",)

#: Kinds that can be part of a chain.
_KINDS = (
    *("FAULT", "SPTE", "RELEASE", "INVALIDATE", "PAGE_FREE", "PAGE_ALLOC", "PIN", "SLOT", "VM"),
)
_KEYS = ("ts", "cpu", "seq", "fault_ts", "tid", "pfn")
#: What wants a row: it was named, it happened in the fault, it speaks of the page.
_NAMED, _IN_FAULT, _OF_PAGE = range(3)
#: Rows of a page kept until the nearest are chosen: a zero page has millions.
_KEPT_MAX = 4 * EVIDENCE_MAX

#: Number of the batch, row in it.
_Place = tuple[int, int]


@dataclasses.dataclass(slots=True)
class _Wanted:
    """The rows found so far for one finding: (how it was wanted, distance in time, where it is)."""

    chain: Chain
    begin: int
    rows: list[tuple[int, int, _Place]] = dataclasses.field(default_factory=list)

    def add(self, why: int, ts: int, place: _Place) -> None:
        self.rows.append((why, abs(ts - self.begin), place))
        if len(self.rows) > 2 * _KEPT_MAX:
            self._shrink(_KEPT_MAX)

    def places(self) -> list[_Place]:
        self._shrink(EVIDENCE_MAX)
        return [place for _, _, place in self.rows]

    def _shrink(self, most: int) -> None:
        self.rows.sort()
        del self.rows[most:]


def fetch(reader: TraceReader, findings: Sequence[Finding]) -> list[Finding]:
    """Return the findings with the evidence that their chains ask for.

    Reads the trace once more, and not at all if no finding asks. Each finding gets at most
    EVIDENCE_MAX records, in order of time.
    """
    wanted = {
        at: _Wanted(finding.chain, _begin(finding.chain))
        for at, finding in enumerate(findings)
        if finding.chain is not None and not finding.evidence
    }
    if not wanted:
        return list(findings)
    _choose(reader, list(wanted.values()))
    rows = _read(reader, {place for one in wanted.values() for place in one.places()})
    return [
        finding.with_evidence(_ordered(rows, wanted[at])) if at in wanted else finding
        for at, finding in enumerate(findings)
    ]


def _begin(chain: Chain) -> int:
    return min((ts for _, ts, _, _ in chain.records), default=chain.ts_from)


def _ordered(rows: dict[_Place, dict[str, Any]], one: _Wanted) -> list[dict[str, Any]]:
    found = [rows[place] for place in one.places() if place in rows]
    return sorted(found, key=lambda row: (row["ts"], row["cpu"] or 0, row["seq"] or 0))


def _choose(reader: TraceReader, wanted: Sequence[_Wanted]) -> None:
    """Find the rows that the chains want, by the columns that name them."""
    keys = {kind: [name for name in _KEYS if name in columns_of_kind(kind)] for kind in _KINDS}
    loaders = {kind: reader.loader(keys[kind]) for kind in _KINDS}
    for number, block in enumerate(reader.blocks()):
        if block.kind not in _KINDS:
            continue
        near = [one for one in wanted if _may_hold(one.chain, block.ts_min, block.ts_max)]
        batch = loaders[block.kind](block) if near else None
        if batch is None or not len(batch):
            continue
        table = {n: numbers(batch.column(n), NULLS.get(n, 0)) for n in keys[block.kind]}
        for one in near:
            for at, why in _matches(block.kind, table, one):
                one.add(why, int(table["ts"][at]), (number, at))


def _may_hold(chain: Chain, ts_min: int, ts_max: int) -> bool:
    # What happened in a fault is after its entry; how long it took is not known.
    since = min((ts for ts, _ in chain.faults), default=1 << 64)
    named = any(ts_min <= ts <= ts_max for _, ts, _, _ in chain.records)
    page = bool(chain.pfns) and ts_max >= chain.ts_from and ts_min <= chain.ts_to
    return named or page or ts_max >= since


def _matches(
    kind: str, table: dict[str, npt.NDArray[Any]], one: _Wanted
) -> Iterator[tuple[int, int]]:
    """Yield (row, why it is wanted) of a batch, each row once."""
    ts, chain = table["ts"], one.chain
    seen: set[int] = set()
    for name, when, cpu, seq in chain.records:
        if name == kind and ts[0] <= when <= ts[-1]:
            rows = np.flatnonzero((ts == when) & (table["cpu"] == cpu) & (table["seq"] == seq))
            seen |= set(rows.tolist())
    yield from ((at, _NAMED) for at in sorted(seen))
    inside: set[int] = set()
    if "fault_ts" in table:
        for fault_ts, tid in chain.faults:
            hit = (table["fault_ts"] == fault_ts) & (table["tid"] == tid)
            inside |= set(np.flatnonzero(hit).tolist())
    yield from ((at, _IN_FAULT) for at in sorted(inside - seen))
    if chain.pfns and "pfn" in table:
        hit = np.isin(table["pfn"], np.array(chain.pfns, np.uint64))
        hit &= (ts >= chain.ts_from) & (ts <= chain.ts_to)
        of_page = set(np.flatnonzero(hit).tolist()) - seen - inside
        nearest = sorted(of_page, key=lambda at: abs(int(ts[at]) - one.begin))
        yield from ((at, _OF_PAGE) for at in nearest[:_KEPT_MAX])


def _read(reader: TraceReader, places: set[_Place]) -> dict[_Place, dict[str, Any]]:
    """Return the chosen rows with all columns that their kinds fill."""
    by_batch: dict[int, list[int]] = {}
    for number, at in places:
        by_batch.setdefault(number, []).append(at)
    blocks = reader.blocks()
    loaders: dict[str, Callable[[Any], pa.RecordBatch | None]] = {}
    found: dict[_Place, dict[str, Any]] = {}
    for number in sorted(by_batch):
        kind = blocks[number].kind
        read = loaders.setdefault(kind, reader.loader(columns_of_kind(kind)))
        batch = read(blocks[number])
        if batch is not None:
            for at in by_batch[number]:
                found[number, at] = batch.slice(at, 1).to_pylist()[0]
    return found
