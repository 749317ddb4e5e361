"""What happened to frames in their lifetimes: the join finds what comparing all pairs finds."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis import frametier
from analysis.framelog import Events, FrameLog, Spaces, Spans

FOREVER = (1 << 64) - 1


def events(*rows, tags=0):
    """Make events of (space, first frame, count, ts, tag...)."""
    columns = np.array([(*row, *[0] * (4 + tags - len(row))) for row in rows], np.uint64)
    space, first, count, ts, *tag = columns.reshape(-1, 4 + tags).T
    return Events(space, first, count, ts, ts, tuple(tag))


def lives(*rows):
    """Make lives of (space, first frame, level, birth, death)."""
    space, first, level, birth, death = np.array(rows, np.uint64).reshape(-1, 5).T
    return Spans(space, first, level.astype(np.uint8), birth, death)


def test_an_event_in_the_life_of_its_frame_is_a_hit():
    log = FrameLog(tags=1)
    # Given a page mapped from 10 to 30, and one from 25 to 30
    # When it is freed at 20
    hits = log.step(lives((0, 5, 1, 10, 30), (0, 5, 1, 25, 30)), events((0, 5, 1, 20, 7), tags=1))
    # Then only the first life is hit, and the event comes back
    assert (hits.life.tolist(), hits.ts.tolist()) == ([0], [20])
    assert (hits.frame.tolist(), hits.tags[0].tolist()) == ([5], [7])


@pytest.mark.parametrize("ts", [10, 30, 5, 40])
def test_what_happens_at_birth_or_death_or_outside_is_no_hit(ts):
    assert not len(FrameLog().step(lives((0, 5, 1, 10, 30)), events((0, 5, 1, ts))))


def test_an_event_of_another_space_is_no_hit():
    assert not len(FrameLog().step(lives((1, 5, 1, 10, 30)), events((2, 5, 1, 20))))


def test_what_earlier_pieces_held_is_remembered_until_the_life_ends():
    log = FrameLog(tags=1)
    log.step(lives(), events((0, 5, 1, 20, 3), tags=1))
    log.step(lives(), Events.none(1))
    hits = log.step(lives((0, 5, 1, 10, 300), (0, 5, 1, 21, 300)), Events.none(1))
    assert (hits.life.tolist(), hits.tags[0].tolist()) == ([0], [3])
    rest = log.rest(lives((0, 5, 1, 10, FOREVER), (0, 6, 1, 10, FOREVER)))
    assert rest.life.tolist() == [0]


def test_an_event_that_began_before_the_birth_is_no_hit():
    # An invalidation that lasts from 5 to 20 concerns what was mapped at 5.
    space, first, count, since, ts = np.array([[1], [5], [1], [5], [20]], np.uint64)
    ends = Events(space, first, count, since, ts)
    assert not len(FrameLog().step(lives((1, 5, 1, 10, 30)), ends))
    assert len(FrameLog().step(lives((1, 5, 1, 4, 30)), ends))


@pytest.mark.parametrize(
    ("first", "count", "level", "frame"),
    [
        (512, 512, 1, 700),  # a 2M block, one of its pages
        (700, 1, 2, 512),  # a page of a 2M leaf
        (1 << 18, 1 << 18, 1, (1 << 18) + 12345),  # 1G
        ((1 << 18) + 99999, 1, 3, 1 << 18),
        ((1 << 18) + 512 * 7, 512, 3, 1 << 18),
        (100, 1000, 2, 512),  # a range that holds a block and parts of two
        (511, 2, 1, 512),
    ],
)
@pytest.mark.parametrize("earlier", [False, True])
def test_blocks_and_leaves_of_any_size_meet(first, count, level, frame, earlier):
    log = FrameLog()
    happened = events((0, first, count, 20))
    if earlier:
        log.step(lives(), happened)
        happened = Events.none(0)
    assert log.step(lives((0, frame, level, 10, 30)), happened).life.tolist() == [0]


def test_a_range_touches_nothing_beside_it():
    log = FrameLog()
    log.step(lives(), events((0, 100, 1000, 20)))
    beside = lives((0, 99, 1, 10, 30), (0, 1100, 1, 10, 30), (0, 1536, 2, 10, 30))
    assert not len(log.step(beside, Events.none(0)))


def test_spaces_have_one_number_each():
    spaces = Spaces()
    numbers = spaces.of(np.array([1, 1, 2, 1], np.uint32), np.array([0, 1, 0, 0], np.uint8))
    assert numbers.tolist() == [1, 2, 3, 1]
    assert spaces.one(2, 0) == 3
    assert spaces.of(np.array([9, 9], np.uint32), np.zeros(2, np.uint8)).tolist() == [4, 4]


def test_a_trace_that_touches_too_much_memory_is_told_of(monkeypatch):
    # Given room for two rows
    monkeypatch.setattr(frametier, "_ROWS_MAX", 2)
    log = FrameLog()
    # When three far apart are touched
    log.step(lives(), events((0, 0, 1, 1), (0, 10_000, 1, 2), (0, 20_000, 1, 3)))
    # Then one event is forgotten, and is not forgotten silently
    assert log.forgotten == 1
    assert len(log.rest(lives((0, 0, 1, 0, FOREVER), (0, 10_000, 1, 0, FOREVER)))) == 2


@pytest.mark.parametrize("mixed", [True, False])
def test_rows_are_found_again_however_their_keys_collide(monkeypatch, mixed):
    if not mixed:
        # All keys want one of two places.
        monkeypatch.setattr(frametier, "hashed", lambda keys, _: keys << np.uint64(63))
    keys = np.random.default_rng(5).permutation(3000).astype(np.uint64) * np.uint64(7)
    present, absent = keys[: 2000 if mixed else 100], keys[2000:]
    rows = frametier._Rows()
    assert (rows.find(keys) == -1).all()
    # When they come in several portions
    for part in np.array_split(present, 7):
        rows.add(part)
    # Then each has the number of its turn, and no other key has any
    assert rows.find(present).tolist() == list(range(len(present)))
    assert (rows.find(absent) == -1).all() and not len(rows.find(keys[:0]))
    in_order, numbers = rows.in_order()
    assert in_order.tolist() == sorted(present.tolist())
    assert (present[numbers] == in_order).all()


def naive(alive, happened):
    """Return the lives with an event inside, by comparing each with each."""
    found = set()
    for at in range(len(alive)):
        first, pages = int(alive.first[at]), 512 ** (int(alive.level[at]) - 1)
        for event in range(len(happened)):
            begin, count = int(happened.first[event]), int(happened.count[event])
            if alive.space[at] == happened.space[event] and begin < first + pages:
                inside = alive.birth[at] < happened.since[event] <= happened.ts[event]
                if first < begin + count and inside and happened.ts[event] < alive.death[at]:
                    found.add(at)
    return found


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 1 << 32), pieces=st.integers(1, 5), large=st.booleans())
def test_all_hits_are_found_whatever_the_pieces(seed, pieces, large):
    # Given lives and events drawn at random, in a small world so that they meet
    draw = np.random.default_rng(seed)
    n = 40
    level = draw.integers(1, 4 if large else 2, n).astype(np.uint64)
    first = draw.integers(0, 3000 if large else 30, n).astype(np.uint64)
    first = first >> (9 * (level - 1)) << (9 * (level - 1))
    birth = draw.integers(0, 100, n).astype(np.uint64)
    death = birth + draw.integers(1, 60, n).astype(np.uint64)
    space = draw.integers(0, 2, n).astype(np.uint64)
    alive = Spans(space, first, level.astype(np.uint8), birth, death)
    ts = np.sort(draw.integers(0, 160, n)).astype(np.uint64)
    count = draw.choice([1, 1, 1, 2, 512, 700, 5000] if large else [1, 1, 4], n).astype(np.uint64)
    begin = draw.integers(0, 3000 if large else 30, n).astype(np.uint64)
    happened = Events(draw.integers(0, 2, n).astype(np.uint64), begin, count, ts, ts)
    # When they come in pieces, each life in that of its death
    log, found = FrameLog(), set()
    edges = [0, *sorted(draw.integers(0, 160, pieces - 1).tolist()), 1 << 20]
    for low, high in itertools.pairwise(edges):
        ended = np.flatnonzero((death >= low) & (death < high))
        now = happened.at((ts >= low) & (ts < high))
        found |= set(ended[log.step(alive.at(ended), now).life].tolist())
    # Then those are hit that comparing all pairs finds
    assert found == naive(alive, happened)
