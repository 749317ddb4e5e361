"""Pieces of a trace: complete, in order, aligned in time, and cut where kinds are missing."""

import dataclasses
import itertools

import numpy as np
import pytest
from unit import records as made
from unit.records import START_NS, records, write_trace
from unit.tracekit import SHIPPED, shipped

from analysis.faultjoin import JOIN_COLUMNS, FaultJoiner
from analysis.recording import open_recording
from analysis.stream import pieces
from probes.errors import TraceFormatError
from tracer.tracefile import TraceReader

KINDS = {"FAULT": ("pfn",), "SPTE": ("pfn",), "RELEASE": ("pfn",), "PAGE_FREE": ("pfn",)}


def read(path, rows_max, kinds=KINDS, until=None):
    with TraceReader(path) as reader:
        return list(pieces(reader, kinds, rows_max, until))


@pytest.mark.parametrize("rows_max", [1, 3, 64, 10**6])
def test_pieces_hold_every_record_once_and_in_order(rows_max):
    path = SHIPPED / "prime-6.12.pfnt"
    whole = read(path, 10**6)[0]
    found = read(path, rows_max)
    for kind in KINDS:
        ts = np.concatenate([piece[kind]["ts"] for piece in found])
        assert (ts == whole[kind]["ts"]).all() and (np.diff(ts.astype(np.int64)) >= 0).all()


def test_all_kinds_of_a_piece_cover_the_same_time():
    found = read(SHIPPED / "prime-6.12.pfnt", 16)
    assert len(found) > 10
    for before, piece in itertools.pairwise(found):
        assert before.ts_to == piece.ts_from
    for piece in found:
        for kind in KINDS:
            ts = piece[kind]["ts"]
            assert ((ts >= piece.ts_from) & (ts < piece.ts_to)).all()


def test_a_kind_without_records_is_empty_in_every_piece():
    found = read(SHIPPED / "prime-6.12.pfnt", 64, {"FAULT": (), "PIN": ("gfn",)})
    assert {len(piece["PIN"]) for piece in found} == {0} and len(found) > 1


def test_what_comes_after_a_time_is_left_out():
    whole = read(SHIPPED / "prime-6.12.pfnt", 10**6)[0]
    until = int(whole["FAULT"]["ts"][100])
    for rows_max in (5, 10**6):
        found = read(SHIPPED / "prime-6.12.pfnt", rows_max, until=until)
        assert sum(len(piece["FAULT"]) for piece in found) == 100
        assert max(int(p[k]["ts"].max()) for p in found for k in KINDS if len(p[k])) < until


def test_nothing_comes_after_a_damaged_batch(tmp_path):
    # GIVEN three groups, the second one's SPTE batch with a byte changed
    groups = [made.group(number, 200) for number in range(3)]
    path = write_trace(tmp_path / "t.pfnt", groups)
    with TraceReader(path) as reader:
        block = [b for b in reader.blocks() if b.kind == "SPTE"][1]
    data = bytearray(path.read_bytes())
    data[block.offset + block.head_size + 99] ^= 1
    path.write_bytes(data)
    # WHEN THEN both kinds end together
    found = read(path, 50, {"FAULT": (), "SPTE": ()})
    last = max(int(piece[kind]["ts"].max()) for piece in found for kind in ("FAULT", "SPTE")
               if len(piece[kind]))  # fmt: skip
    assert last <= block.ts_min
    assert sum(len(piece["SPTE"]) for piece in found) <= 200


def test_times_of_64_bits_are_not_rounded(tmp_path):
    # GIVEN a host that is up for a year: its nanoseconds are no float's
    start = 1 << 55
    group = [(k, records(k, 300, seed=1, start_ns=start)) for k in ("FAULT", "SPTE")]
    path = write_trace(tmp_path / "t.pfnt", [group])
    found = read(path, 7, {"FAULT": (), "SPTE": ()})
    assert sum(map(len, found)) == 600


def test_records_of_one_moment_without_end_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.stream._HELD_MAX", 100)
    group = [("SPTE", records("SPTE", 300, h__ts=START_NS))]
    path = write_trace(tmp_path / "t.pfnt", [group])
    with pytest.raises(TraceFormatError, match="records of one moment"):
        read(path, 7, {"SPTE": (), "FAULT": ()})


# --- what a recording that was cut short lacks ----------------------------------------------------


def cut_short(copy, why):
    """Leave out the last third of all events, but none of the faults."""
    end = int(np.quantile(copy["SPTE"]["h"]["ts"], 0.6))
    for kind in list(copy.records):
        if kind != "FAULT":
            copy.drop(kind, copy[kind]["h"]["ts"] > end)
    copy.summary = None if why is None else {**copy.summary, "why": why}
    return end


@pytest.mark.parametrize("why", [None, "size", "output"])
def test_where_faults_run_ahead_of_their_events_nothing_is_judged(tmp_path, why):
    # GIVEN a recorder that was killed, or whose file was full
    copy = shipped("prime-6.12")
    end = cut_short(copy, why)
    with TraceReader(copy.write(tmp_path / "t.pfnt")) as reader:
        sound = open_recording(reader).sound_until
    assert sound is not None and sound <= end


def test_a_recording_that_ended_by_itself_is_sound_to_its_end():
    with TraceReader(SHIPPED / "prime-6.12.pfnt") as reader:
        assert open_recording(reader).sound_until is None


def test_a_ring_that_was_idle_for_long_does_not_hold_the_others_back(tmp_path):
    # GIVEN two rings, one of cpus that saw nothing in the last minute
    copy = shipped("prime-6.12")
    copy.setting(rings=2)
    for kind in copy.records:
        copy[kind]["h"]["cpu"] = 0
    copy.add("SPTE", h__ts=int(copy["SPTE"]["h"]["ts"].min()), h__cpu=1)
    for kind in copy.records:
        late = copy[kind]["h"]["cpu"] == 0
        copy[kind]["h"]["ts"][late] += np.uint64(60 * 10**9)
    copy.summary = None
    with TraceReader(copy.write(tmp_path / "t.pfnt")) as reader:
        sound = open_recording(reader).sound_until
    assert sound == max(int(copy[k]["h"]["ts"].max()) for k in copy.records
                        if k != "FAULT" and len(copy[k]))  # fmt: skip


# --- what a recording says of itself --------------------------------------------------------------


def recording_of(copy, path):
    with TraceReader(copy.write(path)) as reader:
        return open_recording(reader)


def test_losses_are_those_of_the_end_or_else_of_the_newest_counters(tmp_path):
    copy = shipped("prime-6.12")
    copy.lose("RELEASE", 7)
    assert recording_of(copy, tmp_path / "a.pfnt").lost("RELEASE", "SPTE") == 7
    copy.summary = None
    assert recording_of(copy, tmp_path / "b.pfnt").lost("RELEASE", "SPTE") == 7


def test_a_hook_that_could_not_be_attached_is_not_there(tmp_path):
    copy = shipped("prime-6.12")
    copy.notes.append((START_NS, {"failed": {"hook": "walk", "symbol": "x", "why": "y"}}))
    recording = recording_of(copy, tmp_path / "t.pfnt")
    assert recording.without("walk", "gup") == ("walk",)


@pytest.mark.parametrize(
    "facts", ["", "[]", '{"facts_version": 1, "values": [], "cpus": "many"}',
              '{"facts_version": 1, "values": {"shadow_refcounted_mask": -1}, "params": 3}']
)  # fmt: skip
def test_facts_from_strangers_may_be_anything(tmp_path, facts):
    copy = shipped("prime-6.12")
    copy.meta = dataclasses.replace(copy.meta, facts=facts, settings={"gfns": [-5, 10**30]})
    recording = recording_of(copy, tmp_path / "t.pfnt")
    assert recording.mask("shadow_refcounted_mask") == 0
    assert recording.facts.cpus == 1
    assert recording.gfns == (0, (1 << 64) - 1)


# --- faults with what happened in them ------------------------------------------------------------


def joined(path, rows_max):
    joiner = FaultJoiner()
    found = [joiner.join(piece) for piece in read(path, rows_max, JOIN_COLUMNS)]
    return found, joiner


@pytest.mark.parametrize("rows_max", [1, 2, 5, 50, 10**6])
def test_every_fault_has_its_releases_and_installs_however_the_trace_is_cut(rows_max):
    # GIVEN a guest whose every fault installs one SPTE and puts one reference
    found, joiner = joined(SHIPPED / "prime-6.12.pfnt", rows_max)
    for one in found:
        every = np.ones(len(one.releases), bool)
        assert (one.releases.per_fault(every, len(one)) == 1).all()
        assert (one.releases["pfn"] == one.records["pfn"][one.releases.fault]).all()
        assert (one.sptes["gfn"] == one.records["gfn"][one.sptes.fault]).all()
    assert sum(map(len, found)) == 239
    assert not joiner._releases.columns and not joiner._sptes.columns


def test_records_of_a_torn_fault_are_dropped_when_its_thread_faults_again(tmp_path, monkeypatch):
    # GIVEN faults of which every second one left no FAULT record
    monkeypatch.setattr("analysis.faultjoin._WAITING_MANY", 4)
    copy = shipped("prime-6.12")
    copy.drop("FAULT", np.arange(len(copy["FAULT"])) % 2 == 0)
    found, joiner = joined(copy.write(tmp_path / "t.pfnt"), 20)
    # THEN those that are left have what is theirs, and the rest does not pile up
    assert sum(len(one.releases) for one in found) == len(copy["FAULT"])
    assert len(joiner._releases.columns.get("ts", ())) <= 5


def test_waiting_records_are_bounded_whatever_the_trace_says(tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.faultjoin._WAITING_MANY", 4)
    monkeypatch.setattr("analysis.faultjoin._WAITING_MAX", 10)
    copy = shipped("prime-6.12")
    copy["FAULT"] = copy["FAULT"][:0]
    _, joiner = joined(copy.write(tmp_path / "t.pfnt"), 50)
    assert len(joiner._releases.columns["ts"]) == 10


def test_two_threads_that_fault_in_the_same_nanosecond_are_told_apart(tmp_path):
    copy = shipped("prime-6.12")
    first, second = copy["FAULT"][10].copy(), copy["FAULT"][11].copy()
    for kind in ("FAULT", "RELEASE", "SPTE"):
        rows = copy.inside(kind, second)
        copy[kind]["h"]["fault_ts"][rows] = first["h"]["fault_ts"]
        copy[kind]["h"]["tid"][rows] = int(first["h"]["tid"]) + 1
    (one,), _ = joined(copy.write(tmp_path / "t.pfnt"), 10**6)
    assert (one.releases["pfn"] == one.records["pfn"][one.releases.fault]).all()
