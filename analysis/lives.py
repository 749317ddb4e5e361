"""Mapping lifetimes: from SPTE records, in the order of time, to one row per life of a leaf SPTE.

A life begins with an install and ends with a zap. In the TDP MMU several roots may map a guest
frame at once (after a fast zap-all the old root's leaves go later), so a zap ends the oldest open
life of the same VM, address space, level, guest frame and host frame. In the shadow MMU there is
one entry at an address, and that is the key. Splits bear lives that no record names, pages may
change in place, and what began before the trace or was lost is censored; see `LifeBuilder`.

    analysis.lifeevents    records -> events: splits and changed pages taken apart
    analysis.lifepairs     events -> which belong together; analysis.lifewalk the odd ones
    analysis.lifestore     the lives that are open
    analysis.lifeparts     how lives begin, change and end
    analysis.lifetable     lives -> the table

May import: numpy, pandas, pyarrow, `analysis`, `tracer.tracefile`.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from analysis.columns import Records
from analysis.lifecontext import LifeContext
from analysis.lifedoubts import Doubts
from analysis.lifeevents import MOVED_FROM, SPTE_COLUMNS, Events, events_of, expected
from analysis.lifepairs import Lives, pair
from analysis.lifeparts import (
    AMENDED,
    FIELDS,
    Births,
    Collapses,
    Deaths,
    Fields,
    adopted,
    changes_of,
)
from analysis.lifestore import LIFE, NONE, Array, OpenLives, places
from analysis.lifetable import STEP, LifeTable
from analysis.lifewalk import LATE_NS, UNDECIDED, ZAP
from analysis.tables import DTYPES
from tracer.tracefile import TraceReader, opened, recordings

__all__ = ("SPTE_COLUMNS", "LifeBuilder", "LifeContext", "iter_lives", "lives_of")

#: Records that are paired at a time, at most: some hundred bytes of memory for each.
_BLOCK_ROWS = 1 << 24
#: Events of a block, since splits make many of a record.
_BLOCK_EVENTS = 1 << 25
#: Records that wait for their installs at most; more are told as orphans, the oldest first.
_HELD_MAX = 1 << 14
#: Records of one table of `iter_lives`; of `lives_of`, which keeps all lives anyway.
_CHUNK_ROWS, _WHOLE_ROWS = 1 << 19, 1 << 21


class LifeBuilder:
    """Makes lives of SPTE records fed in the order of (ts, cpu, seq), in chunks of any length.

    Only lives that are open are kept between chunks. Every record becomes part of one life, or is
    in `orphans`, records of the last chunk that belong to none (and of those before that had to
    wait for a record that comes late; see `analysis.lifewalk`):

        orphan zap      a zap of what was not mapped, where nothing can have been missed
        orphan change   a change of it
        unknown op      neither install, change nor zap

    Where something can have been missed (the VM is older than the trace, or SPTE records were lost
    before), such a record is part of a life whose start is censored.
    """

    def __init__(
        self, context: LifeContext, columns: Sequence[str] | None = None, *, first_id: int = 1
    ) -> None:
        """Take what is known of the trace; `columns` are those of `lives` to make, all if None.

        `first_id` is the number of the first life.
        """
        self._context = context
        # Numbers order the lives, whatever is asked for.
        self._columns = None if columns is None else tuple(dict.fromkeys(("life_id", *columns)))
        self._wanted = columns
        self._open = OpenLives()
        self._next = first_id
        self._collapses, self._doubts = Collapses(), Doubts()
        #: Records so far by what became of them: life, orphan zap, orphan change, unknown op.
        self.accounted: Counter[str] = Counter()
        #: The records of `orphans`.
        self.orphan_records = Records("SPTE")
        self._orphans = _NO_ORPHANS
        # Records that wait for their installs, with their names as orphans, and which of them
        # are of a table that a large leaf replaced.
        self._held, self._held_collapsed = _NO_ORPHANS, np.zeros(0, bool)

    @property
    def orphans(self) -> pd.DataFrame:
        """Return SPTE_COLUMNS of records and `orphan`, one of the names above."""
        return self._orphans.to_pandas(types_mapper=DTYPES.get)

    @property
    def next_id(self) -> int:
        """The number of the next life."""
        return self._next

    def feed(self, sptes: Records | pa.RecordBatch | pa.Table) -> pd.DataFrame:
        """Take the next records (SPTE_COLUMNS); return the lives that ended, a table `lives`.

        Raises PfntraceError if more mappings are open than `analysis.lifestore.OPEN_MAX`.
        """
        return self.feed_table(sptes).frame(self._wanted)

    def feed_table(self, sptes: Records | pa.RecordBatch | pa.Table) -> LifeTable:
        """Do the same, for who needs no pandas; the table has `life_id`, too."""
        records = sptes if isinstance(sptes, Records) else _records(sptes)
        tables: list[LifeTable] = []
        told = [_NO_ORPHANS]
        for part in _parts(records):
            self._feed(part, tables, told)
        self._tell(pa.concat_tables(told) if len(told) > 1 else _NO_ORPHANS)
        if len(tables) < 2:
            return tables[0] if tables else self._table(0)
        return LifeTable.joined(tables)

    def open(self) -> pd.DataFrame:
        """Return the lives that are open now, as `finish` would."""
        return self._open_table().frame(self._wanted)

    def _open_table(self) -> LifeTable:
        slots = self._open.slots()
        slots = slots.take(np.argsort(self._open.rows["life_id"][slots]))
        table = self._table(len(slots))
        for part in _steps(slots):
            rows = self._open.rows.take(part)
            table.add({name: rows[name] for name in FIELDS}, None)
        return table

    def finish(self) -> pd.DataFrame:
        """Return the lives that did not end: `censored_end`, in order of life_id.

        Afterwards `orphans` has those whose fate was not known before.
        """
        return self.finish_table().frame(self._wanted)

    def finish_table(self) -> LifeTable:
        """Do the same, for who needs no pandas."""
        table = self._open_table()
        self._open = OpenLives()
        self._tell(self._held)
        self._held, self._held_collapsed = _NO_ORPHANS, np.zeros(0, bool)
        return table

    def _tell(self, orphans: pa.Table) -> None:
        self._orphans, self.orphan_records = orphans, _records(orphans)
        if len(orphans):
            self.accounted.update(orphans["orphan"].to_pylist())

    def _table(self, count: int) -> LifeTable:
        return LifeTable(count, self._context, self._columns)

    def _feed(self, records: Records, tables: list[LifeTable], told: list[pa.Table]) -> None:
        """Take records that are not too many; add the lives that ended and the orphans."""
        held = len(self._held)
        if held:
            waiting = self._held.select(SPTE_COLUMNS)
            records = _records(pa.concat_tables([waiting, records.table(SPTE_COLUMNS)]))
        events = events_of(records, slice(None), self._context, held)
        collapsed = self._collapses.cover(events)
        if len(collapsed):
            collapsed[:held] = self._held_collapsed
        elif self._held_collapsed.any():
            collapsed = np.zeros(len(events), bool)
            collapsed[:held] = self._held_collapsed
        lives = self._block(events, collapsed, tables)
        orphans = _orphans(events, lives, len(records))
        if len(records) > len(orphans.row):
            self.accounted["life"] += len(records) - len(orphans.row)
        if len(orphans.row) or held:
            told.append(self._settled(records, orphans, collapsed))

    def _settled(self, records: Records, orphans: "_Orphans", collapsed: Array) -> pa.Table:
        """Return the orphans that remain so; keep those whose install may still come."""
        found = records.table(SPTE_COLUMNS).take(pa.array(orphans.row))
        found = found.append_column("orphan", pa.array(orphans.name, pa.string()))
        since = records["ts"][-1] - records["ts"][orphans.row]
        waits = orphans.waits & (since <= np.uint64(LATE_NS))
        waits[places(waits)[:-_HELD_MAX]] = False
        self._held = found.filter(pa.array(waits))
        event = orphans.event.compress(waits)
        self._held_collapsed = (
            collapsed.take(event) if len(collapsed) else np.zeros(len(event), bool)
        )
        return found.filter(pa.array(~waits))

    def _block(self, events: Events, collapsed: Array, tables: list[LifeTable]) -> Lives:
        ts, vm = events.columns["ts"], events.columns["vm"]
        lives = pair(events.keys, self._open, lambda at: self._context.missable(vm[at], ts[at]))
        doubted = self._doubts.of(events, lives, self._open)
        block = _Block(
            events, lives, collapsed, doubted, self._open, self._context, self._next
        )  # fmt: skip
        self._next += len(block.new)
        block.adopt()
        over = (lives.orphan == 0) & (lives.death != NONE)
        count = int(np.count_nonzero(over))
        table = self._table(count)
        old = places(over & (lives.slot != NONE))
        old = old.take(np.argsort(self._open.rows["life_id"][lives.slot.take(old)]))
        for part in _steps(old):
            table.add(block.carried(part), block.deaths(part))
        for part in _steps(block.new.compress(over.take(block.new))):
            table.add(block.begun(part), block.deaths(part))
        slot = lives.slot.copy()
        for part in _steps(block.new.compress(~over.take(block.new))):
            rows = block.begun(part)
            kept = np.empty(len(part), LIFE)
            for name in FIELDS:
                kept[name] = rows[name]
            slot[part] = self._open.put(kept)
        block.touch()
        lives.settle(self._open, slot)
        self._open.drop(lives.slot.take(old))
        if count:
            tables.append(table)
        return lives


class _Block:
    """A block of events and the lives that they belong to; `new` are those that begin in it."""

    def __init__(
        self,
        events: Events,
        lives: Lives,
        collapsed: Array,
        doubted: Array,
        open_lives: OpenLives,
        context: LifeContext,
        first_id: int,
    ) -> None:
        self._events, self._lives, self._collapsed = events, lives, collapsed
        self._doubted = doubted
        self._open, self._context = open_lives, context
        self._changes = changes_of(events, lives, context)
        is_new = (lives.orphan == 0) & (lives.slot == NONE)
        self.new = _by_event(lives.entry, is_new, len(events))
        self._ids = np.zeros(len(is_new), np.int64)
        self._ids[self.new] = np.arange(first_id, first_id + len(self.new))

    def begun(self, part: Array) -> Fields:
        """Return lives that began in this block."""
        lives = self._lives
        births = Births(
            self._events, lives.first.take(part), lives.since.take(part),
            lives.censored.take(part), self._doubted.take(part), self._context,
        )  # fmt: skip
        rows = Fields(births, self._changes, part)
        rows["life_id"] = self._ids.take(part)
        return rows

    def carried(self, part: Array) -> Fields:
        """Return lives that were open before."""
        rows = self._open.rows.take(self._lives.slot.take(part))
        return Fields(lambda name: rows[name], self._changes, part)

    def deaths(self, part: Array) -> Deaths:
        """Return how lives ended."""
        return Deaths(self._events, self._lives, part, self._collapsed, self._context)

    def adopt(self) -> None:
        """Write down beginnings whose records came late, of lives that are open already."""
        at = places((self._lives.slot != NONE) & (self._lives.first != NONE))
        if len(at):
            slots, first = self._lives.slot.take(at), self._lives.first.take(at)
            seen = np.zeros(len(at), bool)
            doubted = self._doubted.take(at)
            births = Births(self._events, first, first, seen, doubted, self._context)
            self._open.rows[slots] = adopted(self._open.rows.take(slots), births)

    def touch(self) -> None:
        """Write changes into the rows of lives that were open before and stay so."""
        lives = self._lives
        stay = places(self._changes.some & (lives.slot != NONE) & (lives.death == NONE))
        for part in _steps(stay):
            rows = self.carried(part)
            for name in AMENDED:
                self._open.rows[name][lives.slot.take(part)] = rows[name]


def _steps(numbers: Array) -> Iterator[Array]:
    for first in range(0, len(numbers), STEP):
        yield numbers[first : first + STEP]


def _in_order(frames: list[pd.DataFrame]) -> pd.DataFrame:
    """Return tables of lives as one, in order of life_id."""
    filled = [frame for frame in frames if len(frame)]
    if len(filled) < 2:
        return (filled or frames)[0]
    whole = pd.concat(filled, ignore_index=True)
    return whole.take(np.argsort(whole["life_id"].to_numpy())).reset_index(drop=True)


def _by_event(event: Array, wanted: Array, events: int) -> Array:
    """Return the numbers of the wanted lives in the order of an event of each."""
    lives = np.full(events, NONE, np.int64)
    at = places(wanted)
    lives[event[at]] = at
    return np.asarray(lives[lives != NONE])


@dataclasses.dataclass(slots=True)
class _Orphans:
    """Records of a block that belong to no life, in their order: the record, its event (NONE if
    it is none), its name, and whether it may yet belong to one.
    """

    row: Array
    event: Array
    name: Array
    waits: Array


def _orphans(events: Events, lives: Lives, rows: int) -> _Orphans:
    """Return which of the records belong to no life."""
    at = places(lives.orphan != 0)
    event, waits = lives.first.take(at), lives.orphan.take(at) == UNDECIDED
    row = event
    if events.record is not None and events.part is not None:
        # Of a change to another page the new one lives.
        whole = events.part.take(event) != MOVED_FROM
        event, waits = event[whole], waits[whole]
        # What is no event at all.
        strange = places(np.bincount(events.record, minlength=rows) == 0)
        row = np.concatenate([events.record.take(event), strange])
        event = np.concatenate([event, np.full(len(strange), NONE)])
        waits = np.concatenate([waits, np.zeros(len(strange), bool)])
    name = np.full(len(row), "unknown op", object)
    known = places(event != NONE)
    is_zap = events.keys.op.take(event.take(known)) == ZAP
    name[known] = np.where(is_zap, "orphan zap", "orphan change")
    order = np.argsort(row)
    return _Orphans(row[order], event[order], name[order], waits[order])


def _parts(records: Records) -> Iterator[Records]:
    """Yield records in parts that do not become too many events."""
    rows = len(records)
    if rows <= _BLOCK_ROWS and expected(records) <= _BLOCK_EVENTS:
        yield records
        return
    table = records.table(SPTE_COLUMNS)
    for first in range(0, rows, max(1, _BLOCK_ROWS // 2)):
        part = table.slice(first, max(1, _BLOCK_ROWS // 2))
        halves = [part]
        while halves:
            half = _records(halves.pop(0))
            if len(half) > 1 and expected(half) > _BLOCK_EVENTS:
                whole, middle = half.table(SPTE_COLUMNS), len(half) // 2
                halves[:0] = [whole.slice(0, middle), whole.slice(middle)]
            else:
                yield half


def _records(sptes: pa.RecordBatch | pa.Table) -> Records:
    batches = [sptes] if isinstance(sptes, pa.RecordBatch) else sptes.to_batches()
    return Records("SPTE", batches)


_NO_ORPHANS = Records("SPTE").table(SPTE_COLUMNS).append_column("orphan", pa.array([], pa.string()))


def iter_lives(
    reader: TraceReader,
    progress: Callable[[int], None] | None = None,
    *,
    chunk_rows: int = _CHUNK_ROWS,
) -> Iterator[pd.DataFrame]:
    """Yield the lives of a trace in tables `lives`: as they end, then the rest.

    The recordings of a merged trace come one after the other: a life ends with its recording.
    `progress` is told how many SPTE records were read so far; `chunk_rows` of them are held.
    Raises what `LifeBuilder.feed` does, and TraceFormatError if the file breaks off badly.
    """
    first_id, done = 1, 0
    for part in recordings(reader):
        builder = LifeBuilder(LifeContext.of(part), first_id=first_id)
        for records in _chunks(part, chunk_rows):
            yield builder.feed(records)
            done += len(records)
            if progress:
                progress(done)
        yield builder.finish()
        first_id = builder.next_id


def _chunks(reader: TraceReader, rows: int) -> Iterator[Records]:
    waiting: list[pa.RecordBatch] = []
    for batch in reader.records(["SPTE"], SPTE_COLUMNS):
        waiting.append(batch)
        if sum(map(len, waiting)) >= rows:
            yield Records("SPTE", waiting)
            waiting = []
    yield Records("SPTE", waiting)


def lives_of(trace: Path | TraceReader) -> pd.DataFrame:
    """Return all lives of a trace, a file or an open one: the table `lives`, in order of life_id.

    Raises TraceFormatError if the file is not a trace.
    """
    with opened(trace) as reader:
        return _in_order(list(iter_lives(reader, chunk_rows=_WHOLE_ROWS)))
