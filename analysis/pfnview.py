"""The other way round: one host page, the guests that mapped it through time, and what it suffered.

May import: numpy, pandas, `analysis`, `tracer.tracefile`.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.columns import Records
from analysis.lives import SPTE_COLUMNS, LifeBuilder, LifeContext
from analysis.recording import recording_name
from analysis.schema import VIEWS, check
from analysis.stream import pieces
from tracer.tracefile import TraceReader, recordings

__all__ = ("PfnHistory", "covering", "pfn_history")

_EVENT_COLUMNS = VIEWS["pfn_events"].names
_PAGE = ("ts", "cpu", "seq", "tid", "vm", "pfn", "refcount", "mapcount", "page_bits")
_COLUMNS: dict[str, tuple[str, ...]] = {
    "FAULT": (*_PAGE, "walk_pfn", "gfn", "level", "result"),
    "SPTE": SPTE_COLUMNS,
    "RELEASE": (*_PAGE, "call"),
    "PAGE_FREE": (*_PAGE, "order"),
    "PAGE_ALLOC": (*_PAGE, "order"),
    "PIN": (*_PAGE, "gfn", "op"),
}
_FRAMES = np.uint64(1 << 40)

_Frames = tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class PfnHistory:
    """What is known of the host pages `frames` (first, last).

    `lives` is the table `lives` of all mappings that hold one of them. `events` is every record
    about them, the table `pfn_events` (docs/TABLES.md): of one recording after the other, each in
    order of time. `ts` (ns), `kind` of the record, `event` (install, zap, the call of a release,
    free, alloc, the result of a fault, what was done to a pin), `cause` of an SPTE record, `vm`
    (0: unknown), `gfn`, `level`, `pfn`, `pages` it speaks of, `refcount` and `mapcount` of the
    head page, `cpu`, `seq`, `tid`, and `life_id` of the life that an SPTE record is part of (of a
    change the latest that it can be).

    A trace merged of several recordings has several in it: on another host or after another boot
    a frame is another page. `recordings` names them; `recording` in `events` is 1 for the first.
    """

    frames: tuple[int, int]
    lives: pd.DataFrame
    events: pd.DataFrame
    recordings: tuple[str, ...]


def covering(lives: pd.DataFrame, name: str, frames: tuple[int, int]) -> npt.NDArray[np.bool_]:
    """Tell which lives hold any of some frames, `name` being gfn or pfn."""
    first = lives[name].to_numpy(np.uint64)
    last = first + (lives["pages"].to_numpy(np.uint64) - np.uint64(1))
    low, high = (np.uint64(min(max(end, 0), (1 << 64) - 1)) for end in frames)
    return np.asarray((first <= high) & (last >= low))


def pfn_history(reader: TraceReader, frames: tuple[int, int]) -> PfnHistory:
    """Return the history of some host pages, first to last; reads the trace once."""
    lives: list[pd.DataFrame] = []
    events: list[pd.DataFrame] = []
    names: list[str] = []
    first_id = 1
    for part in recordings(reader):
        names.append(recording_name(part))
        builder = LifeBuilder(LifeContext.of(part), first_id=first_id)
        found: list[pd.DataFrame] = []
        rows: list[dict[str, Any]] = []
        for piece in pieces(part, _COLUMNS):
            closed = builder.feed(piece["SPTE"])
            found.append(closed[covering(closed, "pfn", frames)])
            rows += [row for kind in _COLUMNS for row in _events(piece[kind], frames)]
        rest = builder.finish()
        found.append(rest[covering(rest, "pfn", frames)])
        first_id = builder.next_id
        lives.append(pd.concat(found).sort_values("life_id", ignore_index=True))
        told = pd.DataFrame(rows, columns=list(_EVENT_COLUMNS)).assign(recording=len(names))
        told = told.sort_values("ts", kind="stable", ignore_index=True)
        events.append(_with_lives(_typed(told), lives[-1]))
    return PfnHistory(
        frames,
        pd.concat(lives, ignore_index=True),
        check("pfn_events", pd.concat(events, ignore_index=True)),
        tuple(names),
    )


def _events(records: Records, frames: _Frames) -> Iterator[dict[str, Any]]:
    if not len(records):
        return
    first = records["pfn"]
    if records.kind == "FAULT":
        # Where KVM made an error of it, the page is what the walk found.
        first = np.where(first < _FRAMES, first, records["walk_pfn"])
    pages = _pages(records)
    last = first + (pages - np.uint64(1))
    low, high = (np.uint64(end) for end in frames)
    at = np.flatnonzero((first <= high) & (last >= low) & (first < _FRAMES))
    for number, row in zip(at.tolist(), records.rows(at), strict=True):
        yield {
            **{name: row.get(name) for name in _EVENT_COLUMNS},
            "kind": records.kind,
            "event": _event(records.kind, row),
            "pfn": int(first[number]),
            "pages": int(pages[number]),
        }


def _pages(records: Records) -> npt.NDArray[np.uint64]:
    one = np.uint64(1)
    if records.kind == "SPTE":
        level = np.clip(records["level"], 1, 3).astype(np.uint64)
        return np.asarray(one << (np.uint64(9) * (level - one)))
    if "order" in _COLUMNS[records.kind]:
        return np.asarray(one << np.minimum(records["order"], 40).astype(np.uint64))
    return np.ones(len(records), np.uint64)


def _event(kind: str, row: dict[str, Any]) -> str:
    if kind == "FAULT":
        return f"fault {row['result']}"
    names = {"SPTE": "op", "PIN": "op", "RELEASE": "call"}
    return str(row[names[kind]]) if kind in names else kind.removeprefix("PAGE_").lower()


def _with_lives(events: pd.DataFrame, lives: pd.DataFrame) -> pd.DataFrame:
    """Number SPTE records by the lives that begin or end with them, changes by what was mapped."""
    keys = ["ts", "cpu", "seq"]
    places = ["vm", "gfn", "level"]
    numbers = pd.Series(pd.NA, index=events.index, dtype="Int64")
    for end in ("death", "birth"):
        known = lives.dropna(subset=[f"{end}_ts"]).drop_duplicates([f"{end}_{k}" for k in keys])
        index = pd.MultiIndex.from_frame(known[[f"{end}_{k}" for k in keys]])
        found = index.get_indexer(pd.MultiIndex.from_frame(events[keys]))
        hit = (found >= 0) & (events["kind"] == "SPTE").to_numpy()
        numbers[hit] = known["life_id"].to_numpy()[found[hit]]
    rest = events[numbers.isna() & (events["kind"] == "SPTE")]
    if len(rest):
        began = lives.assign(ts=lives["birth_ts"].fillna(0).astype("UInt64"))
        began = began.astype({"vm": "UInt32", "gfn": "UInt64", "level": "UInt8"})
        latest = pd.merge_asof(
            rest[["ts", *places]].reset_index().sort_values("ts"),
            began[["ts", *places, "life_id"]].sort_values("ts"),
            on="ts", by=places,
        )  # fmt: skip
        numbers[latest["index"].to_numpy()] = latest["life_id"].to_numpy()
    return events.assign(life_id=numbers)


def _typed(events: pd.DataFrame) -> pd.DataFrame:
    return events.astype(
        {
            **dict.fromkeys(("ts", "gfn", "pfn", "pages"), "UInt64"),
            **dict.fromkeys(("recording", "vm", "tid", "seq"), "UInt32"),
            **{"level": "UInt8", "cpu": "UInt16", "life_id": "Int64"},
            **dict.fromkeys(("refcount", "mapcount"), "Int32"),
            **dict.fromkeys(("kind", "event", "cause"), "str"),
        }
    )
