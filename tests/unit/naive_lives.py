"""Lifetimes once more, slowly: a record at a time, plain dicts and lists, nothing vectorised.

The reference for `analysis.lives`: written to be read, so that one can see that it is right.
It shares no code with it but the names of columns and constants.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

Row = dict[str, Any]

PRESENT, LARGE, WRITABLE = 1 << 11, 1 << 7, 1 << 1
PFN_BITS = 0x000F_FFFF_FFFF_F000
#: How much later than an event on nothing the record of its install may come.
LATE_NS = 100_000_000


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
    """Lives in order of life_id, and the fate of every record: a life, or its name as an orphan."""

    lives: list[Row]
    fates: list[str]


def naive_lives(rows: Iterable[Row], rules: Rules, slots: Sequence[Row] = ()) -> Result:
    """Return the lives that SPTE records make; `slots` are SLOT records, both in order of time."""
    maker = _Maker(rules, list(rows), slots)
    for at in range(len(maker.rows)):
        maker.take(at)
    lives = sorted(maker.lives, key=lambda life: life["entry"])
    for number, life in enumerate(lives, 1):
        life["life_id"] = number
        _complete(life, rules, slots)
    return Result(lives, [maker.fates[at] for at in range(len(maker.rows))])


class _Maker:
    def __init__(self, rules: Rules, rows: list[Row], slots: Sequence[Row]) -> None:
        self.rules = rules
        self.slots = slots
        self.rows = rows
        self.lives: list[Row] = []
        self.fates: dict[int, str] = {}
        # The open lives of one place, oldest first.
        self.open: dict[tuple[Any, ...], list[Row]] = {}
        # Thread -> its last install of a large leaf over a table.
        self.collapsing: dict[int, Row] = {}
        # The record that is taken, and how many lives it bore.
        self.at, self.born = 0, 0

    def take(self, at: int) -> None:
        if at in self.fates:
            return  # before its turn
        row, self.at, self.born = self.rows[at], at, 0
        if row["op"] == "install":
            self.install(row)
            self.fates[at] = "life"
        elif row["op"] == "zap":
            self.fates[at] = self.zap(row)
        elif row["op"] == "change":
            self.fates[at] = self.change(row)
        else:
            self.fates[at] = "unknown op"

    def install(self, row: Row) -> None:
        place = self.place(row, row["pfn"])
        if not is_shadow(row) and row["level"] > 1 and row["old"] & PRESENT:
            self.collapsing[row["tid"]] = row
        for life in self.open.get(place, ()):
            unseen = life["birth_ts"] is None and life["pfn"] == row["pfn"]
            if unseen:
                # The oldest of them only.
                if self.is_late(row, life["first"]):
                    self.adopt(life, row)
                    return
                break
        if is_shadow(row) and place in self.open:
            # One entry holds one leaf: that of before must have gone.
            self.end(place, row, "superseded")
        self.begin(row, row["pfn"], row["cause"])

    def zap(self, row: Row) -> str:
        place = self.place(row, row["pfn"])
        self.drop_other_page(place, row, row["pfn"])
        splits = not is_shadow(row) and row["level"] > 1 and row["new"] & PRESENT
        fate = "life"
        if place not in self.open and not self.missable(row) and not splits:
            self.look_for_late_install(row)
        if place not in self.open and not self.missable(row):
            fate = "orphan zap"
        else:
            if place not in self.open:
                self.begin_unseen(row, row["pfn"])
            self.end(place, row, "split" if splits else self.reason(row))
        if splits:
            self.split(row)
        return fate

    def change(self, row: Row) -> str:
        pfn_old = (row["old"] & self.rules.address_mask) >> 12
        place = self.place(row, pfn_old)
        self.drop_other_page(place, row, pfn_old)
        if place not in self.open and self.missable(row):
            self.begin_unseen(row, pfn_old)
        if pfn_old != row["pfn"]:
            if place in self.open:
                self.end(place, row, "pfn_change")
            self.begin(row, row["pfn"], row["cause"])
            return "life"
        if place not in self.open:
            self.look_for_late_install(row)
        if place not in self.open:
            return "orphan change"
        life = self.open[place][0]
        life["changes"] += 1
        self.see(life, row["old"], row["refcount"])
        self.see(life, row["new"], row["refcount"])
        return "life"

    def look_for_late_install(self, row: Row) -> None:
        """An event on nothing: was its install written down after it?"""
        place = self.place(row, 0)[:5]
        for later in range(self.at + 1, len(self.rows)):
            other = self.rows[later]
            if later in self.fates or other["op"] not in ("install", "change", "zap"):
                continue
            if other["op"] != "install":
                if self.bears_at(other, place):
                    return
            elif self.place(other, 0)[:5] == place:
                if other["pfn"] == row["pfn"] and self.is_late(other, row):
                    now, self.at = self.at, later
                    self.begin(other, other["pfn"], other["cause"])
                    self.at = now
                    self.lives[-1]["birth_ts"] = row["ts"]
                    self.fates[later] = "life"
                return

    def bears_at(self, row: Row, place: tuple[Any, ...]) -> bool:
        """Does a change to another page, or a split, bring a leaf to this place?"""
        if row["op"] == "change":
            moved = (row["old"] & self.rules.address_mask) >> 12 != row["pfn"]
            return moved and self.place(row, 0)[:5] == place
        if is_shadow(row) or row["level"] < 2 or not row["new"] & PRESENT:
            return False
        return any(self.place(child, 0)[:5] == place for child in self.children(row))

    def is_late(self, install: Row, before: Row) -> bool:
        """Had another thread's fault begun when an event on its page was written down?"""
        return (
            install["fault_ts"] is not None
            and install["fault_ts"] <= before["ts"]
            and install["ts"] - before["ts"] <= LATE_NS
            and install["tid"] != before["tid"]
        )

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

    def drop_other_page(self, place: tuple[Any, ...], row: Row, pfn: int) -> None:
        # Of a shadow entry that held another page than this record says, a record is missing.
        if is_shadow(row) and place in self.open and self.open[place][0]["pfn"] != pfn:
            self.end(place, row, "superseded")

    def place(self, row: Row, pfn: int) -> tuple[Any, ...]:
        if is_shadow(row):
            return ("shadow", row["vm"], row["sptep"])
        return ("tdp", row["vm"], row["as_id"], row["level"], row["gfn"], pfn)

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
            life = self.begin(child, child["pfn"], "split")
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

    def begin_unseen(self, row: Row, pfn: int) -> None:
        life = self.new_life(row, pfn)
        life["spte_birth"] = row["old"]
        self.see(life, row["old"], None)
        if pfn != row["pfn"]:
            life["page"] = None

    def new_life(self, row: Row, pfn: int) -> Row:
        life: Row = dict.fromkeys(
            ("birth_ts", "birth_cause", "birth_tid", "birth_tgid", "birth_cpu", "birth_seq")
            + ("death_ts", "death_cause", "death_tid", "death_tgid", "death_cpu", "death_seq")
            + ("fault_ts", "vcpu", "refcount_birth", "mapcount_birth", "refcount_death")
            + ("refcount_min", "refcount_max")
        )
        life |= {
            "entry": (self.at, self.born),
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
        }
        self.born += 1
        self.lives.append(life)
        self.open.setdefault(self.place(row, pfn), []).append(life)
        return life

    def see(self, life: Row, spte: int, refcount: int | None) -> None:
        life["sptes"].append(spte)
        self.count(life, refcount)

    def count(self, life: Row, refcount: int | None) -> None:
        if refcount is not None:
            counts = [refcount, life["refcount_min"], life["refcount_max"]]
            life["refcount_min"] = min(c for c in counts if c is not None)
            life["refcount_max"] = max(c for c in counts if c is not None)

    def end(self, place: tuple[Any, ...], row: Row, how: str) -> None:
        life = self.open[place].pop(0)
        if not self.open[place]:
            del self.open[place]
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
    life["page_class"] = _class(life["pfn"], life.pop("page"))
    life["slot"] = _slot(life, life.pop("slot_ts"), slots)
    del life["first"], life["entry"]


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
