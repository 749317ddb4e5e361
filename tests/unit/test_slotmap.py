"""Memslots through time: where guest frames lie, and which lie nowhere."""

import numpy as np
import pytest
from unit.made import events, write

from analysis.columns import Records
from analysis.framelog import Spaces
from analysis.slotmap import SlotMap
from tracer.tracefile import TraceReader

PAGE = 4096


def slots(tmp_path, *rows):
    """Return SLOT records of rows (ts, op, slot, gfn, pages, hva)."""
    parts = []
    for ts, op, slot, gfn, pages, hva in rows:
        row = events("SLOT", 1, op, gfn=gfn, a=pages, b=hva, d=slot)
        row["h"]["ts"] = ts
        parts.append(row)
    path = write(tmp_path / f"{len(list(tmp_path.iterdir()))}.pfnt", *parts)
    with TraceReader(path) as reader:
        return Records("SLOT", list(reader.records(["SLOT"])))


def outside(found, frames, ts, ended=()):
    space = np.ones(len(frames), np.uint64)
    gfns, when = np.array(frames, np.uint64), np.array(ts, np.uint64)
    return found.outside(space, gfns, when, ended).tolist()


@pytest.fixture
def found():
    return SlotMap(Spaces())


def test_without_records_everything_lies_outside(found, tmp_path):
    assert found.feed(slots(tmp_path)) == []
    assert outside(found, [5], [10]) == [0]
    assert found.at(1, 0, 5, 10) is None


def test_a_slot_holds_its_frames_from_its_record_on(found, tmp_path):
    found.feed(slots(tmp_path, (10, "create", 3, 0x100, 16, 0x70000000)))
    assert outside(found, [0xFF, 0x100, 0x10F, 0x110], [20] * 4) == [0, 3]
    assert outside(found, [0x100], [9]) == [0]
    slot = found.at(1, 0, 0x101, 20)
    assert slot and (slot.number, slot.hva_of(0x101)) == (3, 0x70000000 + PAGE)


def test_a_deleted_slot_held_its_frames_until_then(found, tmp_path):
    found.feed(slots(tmp_path, (10, "create", 3, 0x100, 16, 0x70000000)))
    (ended,) = found.feed(slots(tmp_path, (50, "delete", 3, 0x100, 16, 0x70000000)))
    assert (ended.number, ended.ts, ended.ts_end) == (3, 10, 50)
    assert outside(found, [0x100, 0x100], [40, 60], [ended]) == [1]
    assert found.at(1, 0, 0x100, 40) and not found.at(1, 0, 0x100, 60)


def test_a_moved_slot_leaves_its_old_frames(found, tmp_path):
    found.feed(slots(tmp_path, (10, "create", 3, 0x100, 16, 0x70000000)))
    (ended,) = found.feed(slots(tmp_path, (50, "move", 3, 0x900, 16, 0x70000000)))
    assert (ended.gfn, ended.ts_end) == (0x100, 50)
    assert outside(found, [0x100, 0x900, 0x900], [60, 60, 40], [ended]) == [0, 2]


def test_new_flags_move_nothing(found, tmp_path):
    assert not found.feed(
        slots(
            tmp_path,
            (10, "seen", 3, 0x100, 16, 0x70000000),
            (11, "create", 3, 0x100, 16, 0x70000000),
            (20, "flags", 3, 0x100, 16, 0x70000000),
        )
    )
    assert outside(found, [0x100], [10]) == []


def test_a_slot_nobody_saw_is_known_to_have_been_there_when_it_is_deleted(found, tmp_path):
    (ended,) = found.feed(slots(tmp_path, (50, "delete", 3, 0x100, 16, 0x70000000)))
    assert (ended.ts, ended.ts_end) == (0, 50)


def test_what_no_kernel_can_have_is_cut_to_size(found, tmp_path):
    huge = (1 << 64) - 1
    found.feed(slots(tmp_path, (10, "create", 3, huge, huge, huge)))
    slot = found.at(1, 0, (1 << 40) - 1, 20)
    assert slot and slot.pages < 1 << 32 and slot.hva < 1 << 58
    assert outside(found, [5], [20]) == [0]
