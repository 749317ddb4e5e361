"""Order restored: groups taken from several rings, bounded, and given back only when released."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.records import records
from unit.rings import FakeRing

from probes import wire
from tracer.batch import TAKE_MAX, Group, order, split_kinds, take

END = 2**63

KEYS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 9)), max_size=40)


def keys_of(array: np.ndarray) -> list[tuple[int, int, int]]:
    h = array["h"]
    return list(zip(h["ts"].tolist(), h["cpu"].tolist(), h["seq"].tolist(), strict=True))


def keyed(keys: list[tuple[int, int, int]], kind: str = "SPTE") -> np.ndarray:
    """Return records with these (ts, cpu, seq), in this order."""
    made = records(kind, len(keys))
    if keys:
        made["h"]["ts"], made["h"]["cpu"], made["h"]["seq"] = zip(*keys, strict=True)
    return made


def stamped(kind: str, *ts: int) -> np.ndarray:
    return keyed([(t, 0, i) for i, t in enumerate(ts)], kind)


def times(group: Group) -> dict[str, list[int]]:
    return {kind: array["h"]["ts"].tolist() for kind, array in group}


# --- order ----------------------------------------------------------------------------------------


@given(keys=KEYS)
@settings(max_examples=200, deadline=None)
def test_the_order_is_that_of_time_cpu_and_sequence(keys):
    assert keys_of(order(keyed(keys))) == sorted(keys)


@given(keys=st.lists(st.integers(0, 2**63), unique=True, max_size=20))
@settings(deadline=None)
def test_records_that_are_in_order_are_handed_on_as_they_are(keys):
    made = keyed([(ts, 0, 0) for ts in sorted(keys)])
    assert order(made) is made


def test_records_of_one_moment_are_sorted_though_their_times_do_not_fall():
    made = keyed([(5, 1, 0), (5, 0, 9), (5, 0, 8)])
    assert keys_of(order(made)) == [(5, 0, 8), (5, 0, 9), (5, 1, 0)]


# --- kinds ----------------------------------------------------------------------------------------


def test_no_records_are_of_no_kind():
    assert split_kinds(records("SPTE", 0)) == []


def test_records_of_one_kind_are_not_copied():
    made = records("PIN", 4)
    ((kind, array),) = split_kinds(made)
    assert kind == "PIN" and array is made


def test_records_are_split_by_kind_and_keep_their_order():
    mixed = np.concatenate([stamped("VMA", 1, 4), stamped("SPTE", 2, 5), stamped("PIN", 3)])
    group = split_kinds(order(mixed))
    assert times(group) == {"SPTE": [2, 5], "PIN": [3], "VMA": [1, 4]}
    for kind, array in group:
        assert set(array["h"]["kind"]) == {wire.KINDS.index(kind)}


# --- take -----------------------------------------------------------------------------------------


def test_nothing_is_taken_of_nothing():
    taken = take([FakeRing("events").ring(), FakeRing("faults").ring()], END)
    assert (taken.group, taken.slots, taken.more) == ([], (), False)
    taken.release()


def test_discarded_records_alone_make_no_group_but_are_given_back():
    fake = FakeRing("events")
    at = fake.reserve(stamped("SPTE", 1))
    fake.discard(at)
    ring = fake.ring()
    taken = take([ring], END)
    assert taken.group == []
    taken.release()
    assert ring.used() == 0


def test_rings_are_merged_by_time_and_kind():
    # GIVEN two rings of events and two of faults, each in its own order
    a, b, c, d = (FakeRing(kind) for kind in ("events", "events", "faults", "faults"))
    a.produce(stamped("SPTE", 1, 4, 9))
    b.produce(np.concatenate([stamped("SPTE", 2), stamped("PIN", 3, 8)]))
    c.produce(stamped("FAULT", 5, 7))
    d.produce(stamped("FAULT", 6))
    # WHEN everything is taken
    taken = take([f.ring() for f in (a, b, c, d)], END)
    # THEN each kind is in order, over all rings
    assert times(taken.group) == {"SPTE": [1, 2, 4, 9], "PIN": [3, 8], "FAULT": [5, 6, 7]}
    assert not taken.more


def test_records_younger_than_the_watermark_stay_in_their_ring():
    a, b = FakeRing("events"), FakeRing("events")
    a.produce(stamped("SPTE", 1, 2, 30))
    b.produce(stamped("SPTE", 40, 50))
    rings = [a.ring(), b.ring()]
    taken = take(rings, 10)
    assert times(taken.group) == {"SPTE": [1, 2]}
    assert [(ring, count) for ring, count in taken.slots] == [(rings[0], 2)]
    taken.release()
    assert [ring.used() for ring in rings] == [a.slot, 2 * b.slot]
    assert times(take(rings, 45).group) == {"SPTE": [30, 40]}


def test_a_group_of_one_ring_in_order_is_a_view_that_release_gives_back():
    fake = FakeRing("events")
    fake.produce(stamped("SPTE", 1, 2, 3))
    ring = fake.ring()
    taken = take([ring], END)
    ((_, array),) = taken.group
    assert np.shares_memory(array, fake.data)
    # THEN until the group is released nobody can write over it
    assert ring.used() == 3 * fake.slot
    assert array["h"]["ts"].tolist() == [1, 2, 3]
    taken.release()
    assert ring.used() == 0


def test_what_is_taken_of_a_ring_is_bounded_and_the_rest_comes_next():
    full, small = FakeRing("events"), FakeRing("events")
    full.produce(stamped("SPTE", *range(10, 17)))
    small.produce(stamped("SPTE", 1, 2))
    rings = [full.ring(), small.ring()]
    seen = []
    for more in (True, True, False):
        taken = take(rings, END, most=3)
        assert taken.more is more
        assert sum(len(array) for _, array in taken.group) <= 3 * len(rings)
        seen += times(taken.group)["SPTE"]
        taken.release()
    assert seen == [1, 2, *range(10, 17)]
    assert not any(ring.used() for ring in rings)


@pytest.mark.parametrize(("watermark", "count"), [(0, 0), (11, 1), (13, 3)])
def test_young_records_that_wait_are_no_reason_to_come_back_at_once(watermark, count):
    # GIVEN more records than one take holds, nearly all of them young
    fake = FakeRing("events")
    fake.produce(stamped("SPTE", *range(10, 20)))
    ring = fake.ring()
    # THEN there is more only while the bound, not the watermark, ends a take:
    # a caller that comes back for as long as there is more must come to an end
    takes = 0
    while (taken := take([ring], watermark, most=3)).more:
        taken.release()
        takes += 1
        assert takes < 9
    taken.release()
    assert ring.position() == count * fake.slot


def test_a_group_of_the_greatest_size_is_the_default():
    fake = FakeRing("events", 1 << 24)
    count = TAKE_MAX + 10
    assert fake.produce(records("SPTE", count)) == count
    ring = fake.ring()
    taken = take([ring], END)
    assert (taken.more, len(taken.group[0][1])) == (True, TAKE_MAX)
    taken.release()
    taken = take([ring], END)
    assert (taken.more, len(taken.group[0][1])) == (False, 10)


@given(
    shards=st.lists(st.lists(st.integers(0, 60), max_size=25), min_size=1, max_size=4),
    watermark=st.integers(0, 70),
    most=st.integers(1, 9),
)
@settings(max_examples=100, deadline=None)
def test_taking_until_there_is_no_more_takes_each_record_once(shards, watermark, most):
    fakes = [FakeRing("events", 1 << 13) for _ in shards]
    for cpu, (fake, ts) in enumerate(zip(fakes, shards, strict=True)):
        fake.produce(keyed([(t, cpu, i) for i, t in enumerate(sorted(ts))]))
    rings = [fake.ring() for fake in fakes]
    seen = []
    for _ in range(60):
        taken = take(rings, watermark, most)
        for _, array in taken.group:
            assert keys_of(array) == sorted(keys_of(array))
            seen += keys_of(array)
        taken.release()
        if not taken.more:
            break
    everything = [(t, cpu, i) for cpu, ts in enumerate(shards) for i, t in enumerate(sorted(ts))]
    assert sorted(seen) == sorted(key for key in everything if key[0] < watermark)
