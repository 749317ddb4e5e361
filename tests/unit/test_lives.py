"""Lifetimes: the fast pairing is what a slow, obvious one makes of the same records.

Records come from real traces, from arbitrary sequences (most of them impossible), and from a small
MMU that does what a kernel does: several VMs and roots, splits, collapses, changes, teardown, with
records taken away as a full ring or a late start would.
"""

import dataclasses
import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit import naive_lives as naive_lives_module
from unit.mmu_model import (
    ACCESSED,
    DIRTY,
    FROZEN,
    NOT_PRESENT,
    TABLE,
    WRITABLE,
    Model,
    leaf,
    record,
)
from unit.naive_lives import Rules, naive_lives
from unit.spte_rows import as_batch, plain, slot_changes

from analysis import lifedoubts, lifepairs, lifestore, lifewalk, lives, schema
from analysis.lifecontext import LifeContext
from analysis.lives import SPTE_COLUMNS, LifeBuilder, lives_of
from tracer.tracefile import TraceReader

TRACES = sorted(Path(__file__).parent.glob("traces/*.pfnt"))

Row = dict[str, Any]


# --- both ways --------------------------------------------------------------------------------


def fast(
    batch: Any, context: LifeContext, cuts: list[int]
) -> tuple[pd.DataFrame, list[tuple[int, str]], dict[str, int]]:
    builder = LifeBuilder(context)
    parts: list[pd.DataFrame] = []
    orphans: list[tuple[int, str]] = []
    bounds = [0, *sorted(cut % (len(batch) + 1) for cut in cuts), len(batch)]
    for first, last in itertools.pairwise(bounds):
        parts.append(builder.feed(batch.slice(first, last - first)))
        orphans += told(builder)
    parts.append(builder.finish())
    orphans += told(builder)
    filled = [part for part in parts if len(part)] or parts[:1]
    table = pd.concat(filled, ignore_index=True).sort_values("life_id", ignore_index=True)
    return schema.check("lives", table), orphans, dict(builder.accounted)


def told(builder: LifeBuilder) -> list[tuple[int, str]]:
    if not len(builder.orphan_records):
        return []
    return list(zip(builder.orphans["seq"], builder.orphans["orphan"], strict=True))


def python(value: Any) -> Any:
    if value is None or value is pd.NA or (isinstance(value, float) and np.isnan(value)):
        return None
    return value.item() if isinstance(value, np.generic) else value


def assert_same(table: pd.DataFrame, slow: list[Row]) -> None:
    assert len(table) == len(slow)
    for name in table.columns:
        expected = [life[name] for life in slow]
        found = [python(value) for value in table[name].tolist()]
        assert found == expected, name


def both(rows: list[Row], rules: Rules, cuts: list[int], slots: list[Row]) -> pd.DataFrame:
    """Make lives in both ways, see that they are equal and that every record has its fate."""
    batch = as_batch(rows)
    context = LifeContext(
        created=frozenset(rules.created),
        losses=tuple(rules.losses),
        address_mask=rules.address_mask,
        accessed_mask=rules.accessed_mask,
        dirty_mask=rules.dirty_mask,
        gfns=rules.gfns,
        slots=slot_changes(slots),
    )
    slow = naive_lives([plain(row) for row in batch.to_pylist()], rules, slots)
    table, orphans, accounted = fast(batch, context, cuts)
    assert_same(table, slow.lives)
    assert sorted(orphans) == [(at, fate) for at, fate in enumerate(slow.fates) if fate != "life"]
    assert sum(accounted.values()) == len(rows)
    assert accounted.get("life", 0) == slow.fates.count("life")
    return table


# --- records from anywhere ----------------------------------------------------------------------

BASE = 512 * 512
#: page_bits, refcount, mapcount.
PAGES = [(0, 0, 0), (1, 3, 0), (1, 0, -1), (3, 2, 5), (1, 0, -200), (17, 1, 0)]


@st.composite
def any_record(draw) -> Row:
    """A record of a few places and pages, so that they meet; most sequences are impossible."""
    op = draw(st.sampled_from(["install", "zap", "change", "install", "zap", "seen"]))
    level = draw(st.sampled_from([1, 1, 1, 1, 2, 3]))
    at = draw(st.integers(0, 2)) if level == 1 else 0
    pfn = BASE * draw(st.integers(1, 2)) + at
    other = draw(st.sampled_from([pfn, pfn, pfn, pfn + 7]))
    bits = draw(st.sampled_from([0, WRITABLE, ACCESSED, DIRTY, WRITABLE | DIRTY]))
    value = leaf(pfn, level, bits)
    gone = draw(st.sampled_from([0, NOT_PRESENT, FROZEN, TABLE if level > 1 else 0]))
    old, new = {"install": (gone, value), "zap": (value, gone)}.get(
        op, (leaf(other, level, bits ^ DIRTY), value)
    )
    page = draw(st.sampled_from(PAGES))
    shadow = draw(st.sampled_from([False, False, True]))
    vcpu = draw(st.integers(-1, 1))
    return record(
        op, draw(st.integers(0, 3)), vm=draw(st.integers(0, 2)), gfn=BASE + at, pfn=pfn,
        level=level, old=old, new=new, as_id=draw(st.sampled_from([0, 0, 1])),
        mmu="shadow" if shadow else draw(st.sampled_from(["tdp", "none"])),
        sptep=draw(st.sampled_from([0, 8, 16])) if shadow else 0, vcpu=vcpu,
        fault_ts=0 if vcpu < 0 else draw(st.integers(1, 60)), tid=draw(st.integers(7, 8)),
        cause=draw(st.sampled_from(["fault", "notifier", "teardown", "root", "recovery", "slot"])),
        bits=page[0], refcount=page[1], mapcount=page[2],
    )  # fmt: skip


@st.composite
def any_rules(draw, last_ts: int) -> Rules:
    times = st.integers(0, last_ts)
    begins = sorted(draw(st.lists(times, max_size=2)))
    return Rules(
        created=draw(st.sampled_from([(), (1,), (1, 2), (0, 1, 2)])),
        losses=[(begin, begin + 5) for begin in begins],
        accessed_mask=draw(st.sampled_from([0, ACCESSED])),
        dirty_mask=DIRTY,
        gfns=draw(st.sampled_from([None, (BASE, BASE + 1), (BASE + 2, BASE + 600), (0, 5)])),
    )


any_slots = st.lists(
    st.builds(
        lambda op, ts, vm, slot, gfn, npages: {
            "op": op, "ts": ts, "vm": vm, "as_id": 0, "slot": slot, "gfn": gfn, "npages": npages,
        },
        st.sampled_from(["create", "create", "delete", "move", "flags", "seen"]),
        st.integers(0, 60), st.integers(1, 2), st.integers(0, 2),
        st.sampled_from([0, BASE - 10, BASE, BASE + 1]), st.sampled_from([0, 1, 12, 1 << 30]),
    ),
    max_size=6,
)  # fmt: skip
any_cuts = st.lists(st.integers(0, 60), max_size=4)


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    """Records come late by a few ns, as many as the made-up traces are long."""
    for module in (lifedoubts, lives, lifewalk, naive_lives_module):
        monkeypatch.setattr(module, "LATE_NS", 25)


@pytest.fixture
def full_places(monkeypatch):
    """Places hold little, so that random records are soon too many."""
    for module in (lifewalk, naive_lives_module):
        monkeypatch.setattr(module, "WAITING_MAX", 2)
        monkeypatch.setattr(module, "PLACE_MAX", 4)


@pytest.fixture(params=["whole", "tiny blocks", "tiny blocks, bad hash"])
def blocks(request, monkeypatch):
    """Blocks of a few records, so that lives go from one to the next; keys that hash alike."""
    if request.param != "whole":
        monkeypatch.setattr(lives, "_BLOCK_ROWS", 5)
        monkeypatch.setattr(lifestore, "_SLOTS_MIN", 2)
    if "bad hash" in request.param:
        for module in (lifepairs, lifestore):
            monkeypatch.setattr(module, "hashed", _few_hashes)
        monkeypatch.setattr(lifepairs, "_small", lambda meta: (meta, 64))


def _few_hashes(place, meta):
    return ((place + meta) % np.uint64(3)) << np.uint64(62)


#: Of each random test, in each of three ways: `PFNTRACE_EXAMPLES=1000` looks for longer.
EXAMPLES = int(os.environ.get("PFNTRACE_EXAMPLES", "40"))
slowly = settings(
    max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@slowly
@given(data=st.data(), records=st.lists(any_record(), max_size=40), slots=any_slots, cuts=any_cuts)
def test_any_sequence_of_records_gives_the_same_lives(
    blocks, full_places, data, records, slots, cuts
):
    # GIVEN records of any order, possible or not, and what is known of the trace
    ts = 0
    for row in records:
        ts += row["ts"]
        row["ts"] = ts
        # How long ago its fault began becomes when.
        row["fault_ts"] = max(1, ts - row["fault_ts"]) if row["fault_ts"] else 0
    slots = sorted(slots, key=lambda row: row["ts"])
    rules = data.draw(any_rules(ts))
    # WHEN lives are made of them in both ways THEN they are the same
    both(records, rules, cuts, slots)


@st.composite
def crowded_record(draw) -> Row:
    """A record of one guest frame of one VM, about one of two pages: everything meets."""
    op = draw(st.sampled_from(["install", "install", "change", "zap"]))
    pfn = BASE * draw(st.integers(1, 2))
    other = draw(st.sampled_from([pfn, pfn, pfn, BASE]))
    value, gone = leaf(pfn), draw(st.sampled_from([0, NOT_PRESENT, FROZEN]))
    old, new = {"install": (gone, value), "zap": (value, gone)}.get(op, (leaf(other), value))
    return record(
        op, draw(st.integers(0, 3)), gfn=BASE, pfn=pfn, old=old, new=new, sptep=8,
        fault_ts=draw(st.integers(0, 30)), vcpu=0, tid=draw(st.integers(7, 9)),
        cause=draw(st.sampled_from(["fault", "notifier"])), refcount=draw(st.integers(1, 9)),
    )  # fmt: skip


@slowly
@given(data=st.data(), records=st.lists(crowded_record(), max_size=60),
       mmu=st.sampled_from(["tdp", "tdp", "shadow"]), cuts=any_cuts)  # fmt: skip
def test_all_that_meets_at_one_place_gives_the_same_lives(
    blocks, full_places, data, records, mmu, cuts
):
    # GIVEN more lives, and more records on nothing, than a place holds
    ts = 0
    for row in records:
        ts += row["ts"]
        row["ts"], row["mmu"] = ts, mmu
        row["fault_ts"] = max(1, ts - row["fault_ts"]) if row["fault_ts"] else 0
    # WHEN lives are made of them in both ways THEN they are the same
    both(records, data.draw(any_rules(ts)), cuts, [])


# --- records of a small MMU ----------------------------------------------------------------------

actions = st.tuples(
    st.sampled_from(
        ["map"] * 6 + ["zap"] * 3 + ["change"] * 3 + ["map_huge", "split", "move", "new_root"]
        + ["new_root", "empty_roots", "destroy"]
    ),
    st.integers(1, 3),
    st.sampled_from([0, 1, 2, 3, 511, 512, 513, 1024]),
    st.sampled_from([ACCESSED, DIRTY, WRITABLE, WRITABLE | DIRTY]),
)  # fmt: skip


def played(script: list[tuple[str, int, int, int]], shadow: frozenset[int]) -> Model:
    model = Model(3, shadow)
    for action, vm, gfn, bits in script:
        if action in ("map", "change"):
            getattr(model, action)(vm, gfn, bits)
        elif action in ("new_root", "empty_roots", "destroy"):
            getattr(model, action)(vm)
        else:
            getattr(model, action)(vm, gfn)
    return model


scripts = st.lists(actions, max_size=40)
some_shadow = st.sampled_from([frozenset(), frozenset({2}), frozenset({1, 2, 3})])


@slowly
@given(script=scripts, shadow=some_shadow, cuts=any_cuts)
def test_lives_are_what_the_mmu_did(blocks, script, shadow, cuts):
    # GIVEN the records of some VMs from the first to the last
    model = played(script, shadow)
    rules = Rules((1, 2, 3), accessed_mask=ACCESSED, dirty_mask=DIRTY)
    # WHEN
    table = both(model.rows, rules, cuts, [])
    # THEN what is open is what the MMU maps, and no birth and no end is missing
    still = table[table["ended_by"] == "censored"]
    columns = [still[name].tolist() for name in ("vm", "level", "gfn", "pfn")]
    assert sorted(zip(*columns, strict=True)) == model.alive()
    assert not table["censored_start"].any() and not table["lost"].any()
    assert (table["ended_by"] != "superseded").all()
    # AND nothing is, once all VMs are gone
    for vm in (1, 2, 3):
        model.destroy(vm)
    table = both(model.rows, rules, cuts, [])
    assert not table["censored_end"].any()


def written_late(rows: list[Row], which: set[int]) -> list[Row]:
    """Return records in which some installs come after the next record of their SPTE."""
    rows = [dict(row) for row in rows]
    for at in sorted(which):
        row = rows[at] if at < len(rows) else {"op": "none"}
        if row["op"] == "install":
            place = ("vm", "mmu", "level", "gfn")
            same = [r for r in rows[at + 1 :] if all(r[key] == row[key] for key in place)]
            # By another thread: one does not overtake itself.
            if same and same[0]["op"] != "install" and same[0]["tid"] != row["tid"]:
                row["ts"] = same[0]["ts"] + 1
    return sorted(rows, key=lambda row: row["ts"])


@slowly
@given(script=scripts, cuts=any_cuts, late=st.sets(st.integers(0, 100), max_size=30))
def test_installs_that_are_written_down_late_are_found(blocks, script, cuts, late):
    # GIVEN the records of some VMs, some of them after what came after them
    model = played(script, frozenset())
    rules = Rules((1, 2, 3), accessed_mask=ACCESSED, dirty_mask=DIRTY)
    with pytest.MonkeyPatch.context() as patch:
        for module in (lifedoubts, lives, lifewalk, naive_lives_module):
            patch.setattr(module, "LATE_NS", 10**6)
        # WHEN
        table = both(written_late(model.rows, late), rules, cuts, [])
    # THEN no record is an orphan, and what is open is what the MMU maps
    still = table[table["ended_by"] == "censored"]
    columns = [still[name].tolist() for name in ("vm", "level", "gfn", "pfn")]
    assert sorted(zip(*columns, strict=True)) == model.alive()
    assert not table["censored_start"].any()


@slowly
@given(script=scripts, shadow=some_shadow, cuts=any_cuts, start=st.integers(0, 80),
       lost=st.sets(st.integers(0, 200), max_size=20))  # fmt: skip
def test_a_late_start_and_losses_give_the_same_lives(blocks, script, shadow, cuts, start, lost):
    # GIVEN a recording that began late, and lost some records of what it saw
    rows = played(script, shadow).rows
    kept = [row for at, row in enumerate(rows) if at >= start and at not in lost]
    gone = [rows[at]["ts"] for at in sorted(lost) if start <= at < len(rows)]
    rules = Rules(
        created=() if start else (1, 2, 3),
        losses=[(ts - 10, ts + 10) for ts in gone],
        accessed_mask=ACCESSED,
        dirty_mask=DIRTY,
    )
    # WHEN
    table = both(kept, rules, cuts, [])
    # THEN no life that a loss may have touched is called whole
    open_at_end = table["censored_end"].to_numpy()
    for ts in gone:
        began = table["birth_ts"].fillna(0) <= ts
        over = table["death_ts"].fillna(1 << 62) >= ts
        assert table["lost"][(began & over).to_numpy()].all()
    assert (table["ended_by"] == "censored").to_numpy().tolist() == open_at_end.tolist()


# --- records of real kernels ----------------------------------------------------------------------


def traces() -> list[Path]:
    more = os.environ.get("PFNTRACE_TRACES", "")
    return TRACES + (sorted(Path(more).glob("**/*.pfnt")) if more else [])


@pytest.mark.parametrize("path", traces(), ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_real_traces_give_the_same_lives(path, blocks):
    # GIVEN all SPTE records of a trace
    with TraceReader(path) as reader:
        rows = [row for b in reader.records(["SPTE"], SPTE_COLUMNS) for row in b.to_pylist()]
        slots = [row for b in reader.records(["SLOT"]) for row in b.to_pylist()]
        context = LifeContext.of(reader)
    # WHEN
    rules = Rules(*(getattr(context, field.name) for field in dataclasses.fields(Rules)))
    slow = naive_lives(map(plain, rows), rules, slots)
    # THEN
    table = schema.check("lives", lives_of(path))
    assert_same(table, slow.lives)
    assert (context.accessed_mask, context.dirty_mask) == (ACCESSED, DIRTY)
