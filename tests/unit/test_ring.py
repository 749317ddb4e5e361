"""The ring consumer, over memory that is laid out and written as the kernel does it."""

import mmap
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.records import records
from unit.rings import FakeRing, slot_bytes

from tracer.ring import MappedRing, Ring, map_rings, ready_records, take_until

SIZE = 4096
SLOT = slot_bytes("events")
#: How many events a ring of SIZE holds: one byte always stays free.
ROOM = (SIZE - 1) // SLOT


def seqs(ring: Ring, slots: np.ndarray | None = None) -> list[int]:
    """Return the sequence numbers of the records that are complete."""
    slots = ring.peek() if slots is None else slots
    return [int(seq) for seq in ring.records(slots)["h"]["seq"]]


def events(*numbers: int) -> np.ndarray:
    made = records("SPTE", len(numbers))
    made["h"]["seq"] = numbers
    return made


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, -4096, 3, 4095, 12288])
def test_a_size_that_is_no_power_of_two_is_refused(size):
    word = np.zeros(1, np.uint64)
    with pytest.raises(ValueError, match="power of two"):
        Ring("events", word, word, np.zeros(max(0, 2 * size), np.uint8), size)


@pytest.mark.parametrize("mapped", [0, SIZE, 2 * SIZE - 8, 4 * SIZE])
def test_data_that_is_not_mapped_twice_is_refused(mapped):
    word = np.zeros(1, np.uint64)
    with pytest.raises(ValueError, match="mapped twice"):
        Ring("events", word, word, np.zeros(mapped, np.uint8), SIZE)


def test_a_kind_of_ring_that_does_not_exist_is_refused():
    word = np.zeros(1, np.uint64)
    with pytest.raises(KeyError):
        Ring("notes", word, word, np.zeros(2 * SIZE, np.uint8), SIZE)


# --- empty and full -------------------------------------------------------------------------------


def test_an_empty_ring_has_nothing_to_take():
    ring = FakeRing("events", SIZE).ring()
    assert len(ring.peek()) == 0
    assert len(ring.records(ring.peek())) == 0
    assert (ring.used(), ring.peak, ring.position()) == (0, 0, 0)


def test_a_full_ring_gives_all_it_has_and_refuses_more():
    fake = FakeRing("events", SIZE)
    assert fake.produce(events(*range(ROOM + 5))) == ROOM
    ring = fake.ring()
    assert seqs(ring) == list(range(ROOM))
    assert ring.used() == ROOM * SLOT


# --- busy and discarded records -------------------------------------------------------------------


def test_a_record_that_is_still_written_stops_the_view():
    # GIVEN a committed, a busy and a committed record
    fake = FakeRing("events", SIZE)
    fake.produce(events(1))
    at = fake.reserve(events(2))
    fake.produce(events(3))
    ring = fake.ring()
    # THEN only what is before the busy one is seen, though all of it is used
    assert seqs(ring) == [1]
    assert ring.used() == 3 * SLOT
    # WHEN it is committed THEN so is what waited behind it
    fake.commit(at)
    assert seqs(ring) == [1, 2, 3]


def test_a_busy_record_at_the_head_hides_everything():
    fake = FakeRing("events", SIZE)
    fake.reserve(events(1))
    fake.produce(events(2, 3))
    assert seqs(fake.ring()) == []


def test_a_discarded_record_is_left_out_but_its_place_is_given_back():
    fake = FakeRing("events", SIZE)
    fake.produce(events(1))
    at = fake.reserve(events(2))
    fake.produce(events(3))
    fake.discard(at)
    ring = fake.ring()
    slots = ring.peek()
    assert len(slots) == 3
    assert seqs(ring, slots) == [1, 3]
    ring.advance(3)
    assert (ring.used(), ring.position()) == (0, 3 * SLOT)


def test_a_ring_of_discarded_records_only_is_drained_all_the_same():
    fake = FakeRing("events", SIZE)
    for number in range(3):
        at = fake.reserve(events(number))
        fake.discard(at)
    ring = fake.ring()
    assert len(ring.peek()) == 3
    assert seqs(ring) == []


def test_ready_records_of_nothing_is_nothing():
    ring = FakeRing("faults", SIZE).ring()
    assert len(ready_records(ring.peek())) == 0
    assert take_until(ring.peek(), 1) == 0


# --- positions ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "start",
    [
        SIZE - 8,  # the ring's own header at the end, the record at the beginning
        SIZE - SLOT + 8,  # its last word
        SIZE - SLOT // 2 // 8 * 8,
        (1 << 32) - 16,  # the position itself crosses 32 bits
        (1 << 40) + SIZE - 24,
    ],
)
def test_a_record_that_crosses_the_end_of_the_ring_is_whole(start):
    fake = FakeRing("events", SIZE, start=start)
    made = events(7, 8, 9)
    assert fake.produce(made) == 3
    ring = fake.ring()
    slots = ring.peek()
    assert (ring.records(slots) == made).all()
    ring.advance(2)
    assert ring.position() == start + 2 * SLOT
    assert seqs(ring) == [9]


def test_a_busy_record_that_crosses_the_end_is_seen_to_be_busy():
    fake = FakeRing("events", SIZE, start=(1 << 33) - 8)
    at = fake.reserve(events(1))
    assert seqs(fake.ring()) == []
    fake.commit(at)
    assert seqs(fake.ring()) == [1]


def test_advance_gives_back_exactly_the_slots_that_were_taken():
    fake = FakeRing("events", SIZE)
    fake.produce(events(*range(ROOM)))
    ring = fake.ring()
    assert fake.fits() == 0
    ring.advance(3)
    assert fake.fits() == 3
    assert int(fake.consumer[0]) == 3 * SLOT
    assert ring.used() == (ROOM - 3) * SLOT
    assert seqs(ring) == list(range(3, ROOM))


def test_many_rounds_keep_every_record_and_its_order():
    fake = FakeRing("events", SIZE)
    ring = fake.ring()
    seen: list[int] = []
    for number in range(0, 70 * 7, 7):
        assert fake.produce(events(*range(number, number + 7))) == 7
        slots = ring.peek()
        seen += seqs(ring, slots)
        ring.advance(len(slots))
    assert seen == list(range(70 * 7))
    assert ring.position() > 4 * SIZE


def test_the_peak_is_the_most_that_ever_waited():
    fake = FakeRing("events", SIZE)
    ring = fake.ring()
    for count, peak in ((3, 3), (5, 5), (1, 5)):
        fake.produce(events(*range(count)))
        ring.advance(len(ring.peek()))
        assert ring.peak == peak * SLOT
    at = fake.reserve(events(0))
    fake.produce(events(*range(8)))
    assert len(ring.peek()) == 0 and at >= 0
    assert ring.peak == 9 * SLOT  # busy ones take room too


# --- zero copy ------------------------------------------------------------------------------------


def test_neither_the_slots_nor_their_records_are_copied():
    fake = FakeRing("events", SIZE, start=SIZE - 8)
    fake.produce(events(1, 2, 3))
    ring = fake.ring()
    slots = ring.peek()
    assert np.shares_memory(slots, fake.data)
    assert np.shares_memory(ring.records(slots), fake.data)
    assert np.shares_memory(ring.records(slots[: take_until(slots, 2**63)]), fake.data)


# --- the watermark --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("watermark", "count"), [(0, 0), (10, 0), (11, 1), (20, 1), (29, 2), (31, 3), (2**63, 3)]
)
def test_only_what_is_older_than_the_watermark_is_taken(watermark, count):
    fake = FakeRing("events", SIZE)
    fake.produce(records("SPTE", 3, h__ts=[10, 20, 30]))
    assert take_until(fake.ring().peek(), watermark) == count


def test_an_old_record_behind_a_young_one_waits_with_it():
    fake = FakeRing("events", SIZE)
    for ts in (10, 50, 20):  # reserved in another order than stamped
        fake.produce(records("SPTE", 1, h__ts=ts))
    assert take_until(fake.ring().peek(), 40) == 1


# --- mapped from a descriptor ---------------------------------------------------------------------


def test_rings_are_mapped_by_kind_and_their_consumer_position_is_shared():
    fakes = [FakeRing("faults", 2 * SIZE), FakeRing("events", SIZE, start=SIZE - 8)]
    rings = map_rings([(f.kind, f.fd) for f in fakes], {"faults": 2 * SIZE, "events": SIZE})
    assert [(r.kind, r.size) for r in rings] == [("faults", 2 * SIZE), ("events", SIZE)]
    made = {"faults": records("FAULT", 4), "events": events(1, 2, 3)}
    for fake, ring in zip(fakes, rings, strict=True):
        fake.produce(made[fake.kind])
        assert (ring.records(ring.peek()) == made[fake.kind]).all()
        ring.advance(2)
        assert ring.position() == int(fake.consumer[0])
        ring.close()


def test_a_mapped_ring_s_records_cannot_be_written():
    fake = FakeRing("events", SIZE)
    fake.produce(events(1))
    ring = MappedRing("events", fake.fd, SIZE)
    with pytest.raises(ValueError, match="read-only"):
        ring.peek()["rec"]["gfn"] = 1
    ring.close()


def test_a_mapped_ring_is_not_closed_under_a_view_of_it():
    fake = FakeRing("events", SIZE)
    fake.produce(events(1))
    ring = MappedRing("events", fake.fd, SIZE)
    view = ring.peek()
    with pytest.raises(BufferError):
        ring.close()
    assert int(view["rec"]["h"]["seq"][0]) == 1


def test_a_descriptor_that_is_too_short_is_refused():
    fd = os.memfd_create("short")
    os.ftruncate(fd, 2 * mmap.PAGESIZE)
    with pytest.raises(ValueError, match="greater than file size"):
        MappedRing("events", fd, SIZE)
    os.close(fd)


# --- against a model ------------------------------------------------------------------------------

ACTIONS = st.one_of(
    st.tuples(st.just("produce"), st.integers(1, 9)),
    st.tuples(st.just("reserve"), st.just(0)),
    st.tuples(st.just("commit"), st.integers(0, 40)),
    st.tuples(st.just("discard"), st.integers(0, 40)),
    st.tuples(st.just("consume"), st.integers(0, 40)),
)


class Model:
    """A ring as a list of [number, state]; the same verbs as FakeRing and Ring."""

    def __init__(self) -> None:
        self.slots: list[list] = []
        self.next = 0
        self.peak = 0

    def add(self, count: int, state: str) -> list[int]:
        """Return the numbers of all tried; those that find no room are gone."""
        tried = list(range(self.next, self.next + count))
        self.next += count
        self.slots += [[n, state] for n in tried[: ROOM - len(self.slots)]]
        return tried

    def ready(self) -> list[list]:
        busy = [i for i, (_, state) in enumerate(self.slots) if state == "busy"]
        return self.slots[: busy[0]] if busy else self.slots

    def visible(self) -> list[int]:
        return [number for number, state in self.ready() if state == "written"]


def apply(action: str, many: int, model: Model, fake: FakeRing, places: dict[int, int]) -> None:
    """Do one thing a producer does to both; `places` are the busy records' positions."""
    if action == "produce":
        fake.produce(events(*model.add(many, "written")))
    elif action == "reserve":
        (number,) = model.add(1, "busy")
        at = fake.reserve(events(number))
        if at >= 0:
            places[number] = at
    elif places:
        number = list(places)[many % len(places)]
        getattr(fake, action)(places.pop(number))
        (slot,) = (slot for slot in model.slots if slot[0] == number)
        slot[1] = "written" if action == "commit" else "discarded"


@given(actions=st.lists(ACTIONS, max_size=60), start=st.sampled_from([0, 4088, 2**32 - 8, 2**45]))
@settings(max_examples=150, deadline=None)
def test_whatever_producers_do_a_consumer_sees_what_a_list_would_show(actions, start):
    fake = FakeRing("events", SIZE, start=start)
    ring, model, places = fake.ring(), Model(), dict[int, int]()
    for action, many in actions:
        if action == "consume":
            slots = ring.peek()[:many]
            expected = [n for n, state in model.ready()[:many] if state == "written"]
            assert seqs(ring, slots) == expected
            ring.advance(len(slots))
            model.slots = model.slots[len(slots) :]
        else:
            apply(action, many, model, fake, places)
        assert seqs(ring) == model.visible()
        model.peak = max(model.peak, len(model.slots))
        assert (ring.used(), ring.peak) == (len(model.slots) * SLOT, model.peak * SLOT)
