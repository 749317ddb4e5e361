"""Memslots and devices, noticed in the rings before their records' turn to be written."""

import numpy as np
import pytest
from unit.records import records
from unit.rings import FakeRing, slot_bytes

from probes import wire
from tracer import slots
from tracer.slots import SlotWatch

SIZE = 4096
VMAS = [
    {"start": 0x10000, "end": 0x20000, "path": "/dev/dri/card0", "flags": ["pf", "io"]},
    {"start": 0x20000, "end": 0x30000, "path": "", "flags": ["rd"]},
]


def slot(op: str = "create", **fields) -> np.ndarray:
    """Return a SLOT record: gfn 0x100, 16 pages at 0x10000, slot 3 of VM 1, process 4242."""
    place = {"gfn": 0x100, "a": 16, "b": 0x10000, "d": 3}
    return records("SLOT", 1, h__op=wire.OPS.index(op), **{**place, **fields})


def vma(rdev: int) -> np.ndarray:
    return records("VMA", 1, d=rdev)


def notes(watch: SlotWatch, *rings) -> list[dict]:
    return list(watch.look(rings))


@pytest.fixture
def asked(monkeypatch):
    """Stand in for /proc and /sys; return the list of what was asked for."""
    asked: list = []

    def read_vmas(pid, ranges):
        asked.append((pid, ranges))
        return VMAS, ""

    def device_path(rdev):
        asked.append(rdev)
        return f"/dev/number{rdev}"

    monkeypatch.setattr(slots, "read_vmas", read_vmas)
    monkeypatch.setattr(slots, "device_path", device_path)
    return asked


@pytest.fixture
def fake():
    return FakeRing("events", SIZE)


# --- what makes no note ---------------------------------------------------------------------------


def test_empty_rings_make_no_notes(asked, fake):
    watch = SlotWatch()
    assert notes(watch, fake.ring(), FakeRing("faults").ring()) == []
    assert (asked, watch.vms) == ([], set())


def test_records_of_other_kinds_make_no_notes(asked, fake):
    for kind in ("SPTE", "PIN", "VM", "INVALIDATE"):
        fake.produce(records(kind, 2))
    assert notes(SlotWatch(), fake.ring()) == []
    assert asked == []


def test_rings_of_faults_are_not_searched(asked):
    fake = FakeRing("faults")
    fake.produce(records("FAULT", 3, h__kind=wire.KINDS.index("SLOT")))
    assert notes(SlotWatch(), fake.ring()) == []


def test_a_slot_that_is_deleted_makes_no_note(asked, fake):
    fake.produce(slot("delete"))
    assert notes(SlotWatch(), fake.ring()) == []


def test_a_mapping_of_no_device_makes_no_note(asked, fake):
    fake.produce(vma(0))
    assert notes(SlotWatch(), fake.ring()) == []


def test_a_record_that_is_busy_or_discarded_makes_no_note(asked, fake):
    watch, ring = SlotWatch(), fake.ring()
    at = fake.reserve(slot())
    assert notes(watch, ring) == []
    fake.discard(at)
    assert notes(watch, ring) == []


# --- what does ------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["create", "move", "flags", "seen"])
def test_a_slot_becomes_a_note_of_what_stands_behind_it(asked, fake, op):
    fake.produce(slot(op, as_id=1))
    (note,) = notes(SlotWatch(), fake.ring())
    assert asked == [(4242, [(0x10000, 0x20000)])]
    place = {"vm": 1, "slot": 3, "as_id": 1, "gfn": 0x100, "npages": 16, "hva": 0x10000}
    assert note == {"slot": place, "tgid": 4242, "vmas": [VMAS[0]]}


def test_slots_of_one_process_are_read_at_once_and_each_has_its_own_vmas(asked, fake):
    fake.produce(slot())
    fake.produce(slot(b=0x18000, d=4))  # across both
    fake.produce(slot(h__tgid=99))
    found = notes(SlotWatch(), fake.ring())
    assert asked == [
        (4242, [(0x10000, 0x20000), (0x18000, 0x28000)]),
        (99, [(0x10000, 0x20000)]),
    ]
    behind = [(n["tgid"], n["slot"]["slot"], len(n["vmas"])) for n in found]
    assert behind == [(4242, 3, 1), (4242, 4, 2), (99, 3, 1)]


def test_a_note_says_why_nothing_is_known(monkeypatch, fake):
    monkeypatch.setattr(slots, "read_vmas", lambda pid, ranges: ([], "gone"))
    fake.produce(slot())
    (note,) = notes(SlotWatch(), fake.ring())
    assert (note["vmas"], note["problem"]) == ([], "gone")


def test_a_slot_with_nothing_behind_it_says_so(asked, fake):
    fake.produce(slot(b=0x90000))
    (note,) = notes(SlotWatch(), fake.ring())
    assert note["vmas"] == [] and "ending" in note["problem"]


def test_a_device_becomes_a_note_once(asked, fake):
    watch, ring = SlotWatch(), fake.ring()
    for rdev in (7, 8, 7, 0):
        fake.produce(vma(rdev))
    assert notes(watch, ring) == [
        {"device": {"rdev": rdev, "path": f"/dev/number{rdev}"}} for rdev in (7, 8)
    ]
    fake.produce(vma(8))
    assert notes(watch, ring) == []
    assert asked == [7, 8]


# --- once each ------------------------------------------------------------------------------------


def test_a_record_that_waits_in_the_ring_is_looked_at_once(asked, fake):
    watch, ring = SlotWatch(), fake.ring()
    fake.produce(slot())
    assert len(notes(watch, ring)) == 1
    assert notes(watch, ring) == []
    fake.produce(slot(b=0x20000))
    assert [n["slot"]["hva"] for n in notes(watch, ring)] == [0x20000]
    assert len(asked) == 2


def test_the_same_memory_of_a_process_is_noted_once_whatever_its_slot_does(asked, fake):
    other = FakeRing("events", SIZE)
    fake.produce(slot())
    fake.produce(slot("seen", d=9))
    other.produce(slot("move", gfn=0x500))  # in the ring of another cpu
    watch = SlotWatch()
    assert len(notes(watch, fake.ring(), other.ring())) == 1


@pytest.mark.parametrize("change", [{"h__tgid": 1}, {"b": 0x20000}, {"a": 17}])
def test_other_memory_is_noted_too(asked, fake, change):
    fake.produce(slot())
    fake.produce(slot(**change))
    assert len(notes(SlotWatch(), fake.ring())) == 2


def test_a_record_behind_a_busy_one_is_found_when_that_is_done(asked, fake):
    watch, ring = SlotWatch(), fake.ring()
    at = fake.reserve(records("SPTE", 1))
    fake.produce(slot())
    assert notes(watch, ring) == []
    fake.commit(at)
    assert len(notes(watch, ring)) == 1


@pytest.mark.parametrize("start", [0, SIZE - 8, 2**32 - slot_bytes("events") // 2 // 8 * 8])
def test_rounds_through_the_ring_miss_nothing_and_repeat_nothing(asked, start):
    # GIVEN a ring that is consumed between two looks, sometimes in part only
    fake = FakeRing("events", SIZE, start=start)
    watch, ring = SlotWatch(), fake.ring()
    seen = []
    for i in range(60):
        fake.produce(slot(b=(i + 1) * 0x100000))
        fake.produce(records("SPTE", 2))
        seen += [n["slot"]["hva"] // 0x100000 for n in notes(watch, ring)]
        ring.advance(min(3 + i % 2, len(ring.peek())))
    assert seen == list(range(1, 61))


# --- VMs ------------------------------------------------------------------------------------------


def test_the_vms_of_all_event_records_are_collected(asked, fake):
    watch, ring = SlotWatch(), fake.ring()
    fake.produce(records("SPTE", 4, h__vm=[5, 0, 7, 5]))
    fake.produce(slot(h__vm=2))
    notes(watch, ring)
    assert watch.vms == {2, 5, 7}
