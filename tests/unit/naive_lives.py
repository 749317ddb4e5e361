"""Lifetimes once more, slowly: a record at a time, plain dicts and lists, nothing vectorised.

The reference for `analysis.lives`: written to be read, so that one can see that it is right.
It shares no code with it but the names of columns and constants.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Row = dict[str, Any]
Place = tuple[Any, ...]

PRESENT, LARGE, WRITABLE = 1 << 11, 1 << 7, 1 << 1
PFN_BITS = 0x000F_FFFF_FFFF_F000
#: How much later than an event on nothing the record of its install may come.
LATE_NS = 100_000_000
#: So many events wait at a place at most, and so many lives are open there: the oldest goes.
WAITING_MAX, PLACE_MAX = 8, 64


def pages_of(level: int) -> int:
    return {1: 1, 2: 512}.get(level, 1 if level < 1 else 512 * 512)


@dataclasses.dataclass
class Rules:
    """What `LifeContext` tells: see there."""

    created: Sequence[int] = ()
    losses: Sequence[tuple[int, int]] = ()
    address_mask: int = PFN_BITS
    accessed_mask: int = 0
    dirty_mask: int = 0
    gfns: tuple[int, int] | None = None


@dataclasses.dataclass
class Result:
    """Lives in order of life_id, and the fate of every record: a life, or its name as an orphan.

    life_id counts lives as they begin, in the order of the records that say so.
    """

    lives: list[Row]
    fates: list[str]


def naive_lives(rows: Iterable[Row], rules: Rules, slots: Sequence[Row] = ()) -> Result:
    """Return the lives that SPTE records make; `slots` are SLOT records, both in order of time."""
    maker = _Maker(rules, slots)
    for row in rows:
        maker.take(row)
    for number, life in enumerate(maker.lives, 1):
        life["life_id"] = number
        _complete(life, rules, slots)
    return Result(maker.lives, maker.fates)


class _Maker:
    """Takes one record after the other. What it knows of a place is in `open` and `waiting`."""

    def __init__(self, rules: Rules, slots: Sequence[Row]) -> None:
        self.rules = rules
        self.slots = slots
        self.lives: list[Row] = []
        self.fates: list[str] = []
        # The open lives of each place, oldest first; its events on nothing that wait for an
        # install: the record, its number, what a zap would end a life by.
        self.open: dict[Place, list[Row]] = defaultdict(list)
        self.waiting: dict[Place, list[tuple[Row, int, str]]] = defaultdict(list)
        # The zaps that ended lives which nobody saw begin, or which may be none: an install may be
        # of one of these.
        self.unseen: dict[Place, list[Row]] = defaultdict(list)
        # Thread -> its last install of a large leaf over a table.
        self.collapsing: dict[int, Row] = {}

    def take(self, row: Row) -> None:
        at = len(self.fates)
        self.fates.append("life")
        if row["op"] == "install":
            if not is_shadow(row) and row["level"] > 1 and row["old"] & PRESENT:
                self.collapsing[row["tid"]] = row
            self.install(row, row["cause"])
        elif row["op"] == "zap":
            self.zap(row, at)
        elif row["op"] == "change":
            self.change(row, at)
        else:
            self.fates[at] = "unknown op"

    def install(self, row: Row, cause: str, *, whole: bool = True) -> Row:
        """Begin a life. It is not `whole` if no install record says so: then it cannot be late."""
        there = self.open[place_of(row)]
        unseen = [life for life in there if life["birth_ts"] is None and life["pfn"] == row["pfn"]]
        doubted = whole and any(
            zap["pfn"] == row["pfn"] and is_late(row, zap) for zap in self.unseen[place_of(row)]
        )
        doubted |= any(life["doubted"] and life["pfn"] == row["pfn"] for life in there)
        if whole and unseen and is_late(row, unseen[0]["first"]):
            self.adopt(unseen[0], row)
            unseen[0]["doubted"] = doubted
            return unseen[0]
        early = self.overtaken(row) if whole else []
        over = bool(early) and early[-1][0]["op"] == "zap"
        if not over:
            self.make_room(row)
        life = self.begin(row, row["pfn"], cause)
        life["doubted"] = doubted
        for event, at, why in early:
            self.fates[at] = "life"
            if event["op"] == "zap":
                self.end(life, event, why)
            else:
                self.see_change(life, event)
        if early:
            life["birth_ts"] = early[0][0]["ts"]
        return life

    def overtaken(self, install: Row) -> list[tuple[Row, int, str]]:
        """Return, and take out, the waiting events that were done after an install."""
        waiting, taken = self.waiting[place_of(install)], []
        for one in list(waiting):
            if one[0]["pfn"] == install["pfn"] and is_late(install, one[0]):
                waiting.remove(one)
                taken.append(one)
                if one[0]["op"] == "zap":
                    break
        return taken

    def wait(self, row: Row, at: int) -> None:
        """Keep an event on nothing: its install may be written down after it."""
        waiting = self.waiting[place_of(row)]
        waiting.append((row, at, self.reason(row)))
        if len(waiting) > WAITING_MAX:
            del waiting[0]

    def zap(self, row: Row, at: int) -> None:
        splits = not is_shadow(row) and row["level"] > 1 and row["new"] & PRESENT
        life = self.find(row, row["pfn"])
        if life:
            if (life["birth_ts"] is None or life["doubted"]) and not splits:
                self.unseen[place_of(row)].append(row)
            self.end(life, row, "split" if splits else self.reason(row))
        else:
            self.fates[at] = "orphan zap"
            if not splits:
                self.wait(row, at)
        if splits:
            self.split(row)

    def change(self, row: Row, at: int) -> None:
        pfn_old = (row["old"] & self.rules.address_mask) >> 12
        life = self.find(row, pfn_old)
        if pfn_old != row["pfn"]:
            if life:
                self.end(life, row, "pfn_change")
            self.install(row, row["cause"], whole=False)
        elif life:
            self.see_change(life, row)
        else:
            self.fates[at] = "orphan change"
            self.wait(row, at)

    def find(self, row: Row, pfn: int) -> Row | None:
        """Return the life of a page that a change or zap is about."""
        there = self.open[place_of(row)]
        if is_shadow(row) and there and there[0]["pfn"] != pfn:
            # Of an entry that held another page than this record says, a record is missing.
            self.end(there[0], row, "superseded")
        for life in there:
            if life["pfn"] == pfn:
                return life
        if not self.missable(row):
            return None
        self.make_room(row)
        return self.begin_unseen(row, pfn)

    def make_room(self, row: Row) -> None:
        """A shadow SPTE holds one page: that of before must have gone.

        In the TDP MMU each root holds one, and there are never so many roots.
        """
        there = self.open[place_of(row)]
        if len(there) == (1 if is_shadow(row) else PLACE_MAX):
            self.end(there[0], row, "superseded")

    def adopt(self, life: Row, row: Row) -> None:
        """The beginning that was not seen came late."""
        self.be_born(life, row, row["cause"])
        life["birth_ts"] = life["first"]["ts"]
        life |= {name: row[name] for name in ("gfn", "level", "as_id")}
        life["pages"] = pages_of(row["level"])
        life["spte_birth"] = row["new"]
        life["sptes"].insert(0, row["new"])
        life["page"] = {name: row[name] for name in ("page_bits", "refcount", "mapcount")}
        life["slot_ts"] = row["ts"]
        self.count(life, row["refcount"])

    def missable(self, row: Row) -> bool:
        if row["vm"] not in self.rules.created:
            return True
        return any(first < row["ts"] for first, _ in self.rules.losses)

    def reason(self, row: Row) -> str:
        if row["cause"] == "teardown":
            return "teardown"
        if row["cause"] == "root":
            return "invalid_root"
        if row["cause"] == "recovery":
            return "collapse"
        # Not empty, not present: the table that held it was taken out.
        if is_shadow(row) or row["new"] & PRESENT or row["new"] in (0, 1 << 63):
            return "zap"
        if row["cause"] == "slot" and row["new"] >> 63 and self.flags_changed(row):
            return "collapse"
        large = self.collapsing.get(row["tid"])
        if large is not None and row["level"] < large["level"]:
            inside = 0 <= row["gfn"] - large["gfn"] < pages_of(large["level"])
            if inside and (large["vm"], large["as_id"]) == (row["vm"], row["as_id"]):
                return "collapse"
        return "zap"

    def flags_changed(self, row: Row) -> bool:
        mine = [s["op"] for s in self.slots
                if s["vm"] == row["vm"] and s["ts"] <= row["ts"] and s["op"] != "seen"]  # fmt: skip
        return bool(mine) and mine[-1] == "flags"

    def split(self, row: Row) -> None:
        for child in self.children(row):
            life = self.install(child, "split", whole=False)
            for name in ("refcount_birth", "mapcount_birth", "refcount_min", "refcount_max"):
                life[name] = None

    def children(self, row: Row) -> Iterator[Row]:
        level = row["level"] - 1
        for index in range(512):
            gfn = row["gfn"] + index * pages_of(level)
            if self.rules.gfns is not None:
                first, last = self.rules.gfns
                if gfn > last or gfn + pages_of(level) - 1 < first:
                    continue
            spte = row["old"] | index * pages_of(level) << 12
            if level == 1:
                spte &= ~LARGE
            pfn = row["pfn"] + index * pages_of(level)
            yield {**row, "gfn": gfn, "level": level, "new": spte, "pfn": pfn}

    def begin(self, row: Row, pfn: int, cause: str) -> Row:
        life = self.new_life(row, pfn)
        self.be_born(life, row, cause)
        life["spte_birth"] = row["new"]
        self.see(life, row["new"], row["refcount"])
        return life

    def be_born(self, life: Row, row: Row, cause: str) -> None:
        life["birth_cause"] = cause
        for name in ("ts", "tid", "tgid", "cpu", "seq"):
            life[f"birth_{name}"] = row[name]
        life["fault_ts"], life["vcpu"] = row["fault_ts"], row["vcpu"]
        life["refcount_birth"], life["mapcount_birth"] = row["refcount"], row["mapcount"]

    def begin_unseen(self, row: Row, pfn: int) -> Row:
        life = self.new_life(row, pfn)
        life["spte_birth"] = row["old"]
        self.see(life, row["old"], None)
        if pfn != row["pfn"]:
            life["page"] = None
        return life

    def new_life(self, row: Row, pfn: int) -> Row:
        life: Row = dict.fromkeys(
            ("birth_ts", "birth_cause", "birth_tid", "birth_tgid", "birth_cpu", "birth_seq")
            + ("death_ts", "death_cause", "death_tid", "death_tgid", "death_cpu", "death_seq")
            + ("fault_ts", "vcpu", "refcount_birth", "mapcount_birth", "refcount_death")
            + ("refcount_min", "refcount_max")
        )
        life |= {
            "first": row,
            "vm": row["vm"],
            "as_id": row["as_id"],
            "mmu": "shadow" if is_shadow(row) else "tdp",
            "level": row["level"],
            "gfn": row["gfn"],
            "pages": pages_of(row["level"]),
            "pfn": pfn,
            "sptep": row["sptep"] if is_shadow(row) else None,
            "slot_ts": row["ts"],
            "page": {name: row[name] for name in ("page_bits", "refcount", "mapcount")},
            "sptes": [],
            "changes": 0,
            "ended_by": "censored",
            "doubted": False,
        }
        self.lives.append(life)
        self.open[place_of(row)].append(life)
        return life

    def see_change(self, life: Row, row: Row) -> None:
        life["changes"] += 1
        self.see(life, row["old"], row["refcount"])
        self.see(life, row["new"], row["refcount"])

    def see(self, life: Row, spte: int, refcount: int | None) -> None:
        life["sptes"].append(spte)
        self.count(life, refcount)

    def count(self, life: Row, refcount: int | None) -> None:
        if refcount is not None:
            counts = [refcount, life["refcount_min"], life["refcount_max"]]
            life["refcount_min"] = min(c for c in counts if c is not None)
            life["refcount_max"] = max(c for c in counts if c is not None)

    def end(self, life: Row, row: Row, how: str) -> None:
        there = self.open[place_of(row)]
        there[:] = [other for other in there if other is not life]
        life["ended_by"] = how
        for name in ("ts", "cause", "tid", "tgid", "cpu", "seq"):
            life[f"death_{name}"] = row[name]
        if how == "superseded":
            return
        if how == "pfn_change":
            # The record speaks of the new page's count.
            self.see(life, row["old"], None)
        else:
            life["refcount_death"] = row["refcount"]
            self.see(life, row["old"], row["refcount"])


def is_shadow(row: Row) -> bool:
    return bool(row["mmu"] == "shadow")


def place_of(row: Row) -> Place:
    """What can hold a leaf: an SPTE of the shadow MMU; in the TDP MMU one SPTE in each root."""
    if is_shadow(row):
        return ("shadow", row["vm"], row["sptep"])
    return ("tdp", row["vm"], row["as_id"], row["level"], row["gfn"])


def is_late(install: Row, before: Row) -> bool:
    """Had another thread's fault begun when an event on its page was written down?"""
    return (
        install["fault_ts"] is not None
        and install["fault_ts"] <= before["ts"]
        and install["ts"] - before["ts"] <= LATE_NS
        and install["tid"] != before["tid"]
    )


def _complete(life: Row, rules: Rules, slots: Sequence[Row]) -> None:
    sptes = life.pop("sptes")
    life["spte_last"] = sptes[-1]
    life["writable_birth"] = bool(life["spte_birth"] & WRITABLE)
    life["writable_last"] = bool(sptes[-1] & WRITABLE)
    life["ever_writable"] = any(spte & WRITABLE for spte in sptes)
    life["accessed"] = any(spte & rules.accessed_mask for spte in sptes)
    life["dirty"] = any(spte & rules.dirty_mask for spte in sptes)
    life["censored_start"] = life["birth_ts"] is None
    life["censored_end"] = life["death_ts"] is None
    life["lost"] = any(
        (life["death_ts"] is None or first < life["death_ts"])
        and (life["birth_ts"] is None or last >= life["birth_ts"])
        for first, last in rules.losses
    )
    life["lost"] |= life.pop("doubted")
    life["page_class"] = _class(life["pfn"], life.pop("page"))
    life["slot"] = _slot(life, life.pop("slot_ts"), slots)
    del life["first"]


def _slot(life: Row, ts: int, slots: Sequence[Row]) -> int | None:
    # A slot that is older than the trace is seen at its first fault.
    there: dict[int, Row] = {}
    for record in sorted(slots, key=lambda record: record["op"] != "seen"):
        if record["ts"] > ts and record["op"] != "seen":
            break
        if (record["vm"], record["as_id"]) != (life["vm"], life["as_id"]):
            continue
        there.pop(record["slot"], None)
        if record["op"] != "delete":
            there[record["slot"]] = record
    for record in reversed(there.values()):
        if record["gfn"] <= life["gfn"] < record["gfn"] + record["npages"]:
            return int(record["slot"])
    return None


def _class(pfn: int, page: Row | None) -> str | None:
    """The class of a page, as analysis.pages has it."""
    if page is None:
        return None
    bits, count, kind = page["page_bits"], page["refcount"] or 0, page["mapcount"]
    kind = -1 if kind is None else kind
    if bits is None:
        return "no struct page" if pfn < 1 << 40 else "no page"
    compound = bool(bits & 6)
    word = kind & 0xFFFFFFFF
    buddy = (word >> 24 == 0xFF and kind < -128 and not word & 0x80) or word >> 24 == 0xF0
    for name, holds in (
        ("zero page", bits & 16),
        ("zone device", bits & 32),
        ("reserved", bits & 8),
        ("counted, compound", count > 0 and compound),
        ("counted", count > 0),
        ("free", buddy),
        ("count 0, compound or typed", compound or kind < -128),
    ):
        if holds:
            return name
    return "uncounted"
