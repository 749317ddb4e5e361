"""Merging: what may become one trace, whose numbers go where, and that no record gets lost.

Parts are made by the writer that a recorder uses; what comes out is read as any trace.
"""

import json
import os

import pytest
from unit.mergekit import SECOND, everything, merged, notes, of_vm, part, refused
from unit.records import START_NS, meta, records, rows_of, write_trace

from probes.errors import MergeError, OutputError, TraceFormatError
from tracer.merge import merge
from tracer.tracefile import TraceReader, TraceWriter

# --- what cannot become one trace -----------------------------------------------------------------


def test_a_part_that_is_no_trace_is_named(tmp_path):
    good = part(tmp_path, "good", [of_vm(1)])
    bad = tmp_path / "bad.pfnt"
    bad.write_bytes(b"not a trace")
    assert "bad.pfnt" in refused(tmp_path, good, bad, error=TraceFormatError)


def test_a_part_of_another_version_is_refused(tmp_path):
    old = part(tmp_path, "old", [of_vm(1)], schema_version=2)
    assert "schema version" in refused(tmp_path, old, error=TraceFormatError)


def test_the_same_part_twice_is_refused_also_as_a_copy(tmp_path):
    a = part(tmp_path, "a", [of_vm(1)])
    copy = tmp_path / "copy.pfnt"
    copy.write_bytes(a.read_bytes())
    assert "the same records" in refused(tmp_path, a, copy)
    assert "the same records" in refused(tmp_path, a, a)


def test_a_copy_that_was_cut_is_a_copy_too(tmp_path):
    a = part(tmp_path, "a", [of_vm(1, 0), of_vm(1, 1)])
    copy = tmp_path / "copy.pfnt"
    copy.write_bytes(a.read_bytes()[: a.stat().st_size * 2 // 3])
    assert "the same records" in refused(tmp_path, a, copy)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"generation": "G2"}, "generation"),
        ({"hooks": []}, "hooks"),
        ({"missing": [{"hook": "gup"}]}, "missing hooks"),
        ({"results": {"0": "other"}}, "names of results"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_parts_with_other_rules_are_refused_and_sent_to_diff(tmp_path, change, word):
    a = part(tmp_path, "a", [of_vm(1)])
    b = part(tmp_path, "b", [of_vm(1, 9)], boot="x", profile={**meta().profile, **change})
    message = refused(tmp_path, a, b)
    assert word in message and "pfntrace diff" in message


@pytest.mark.parametrize(
    "facts",
    [
        {"values": {"shadow_dirty_mask": 64}},
        {"enums": {"PG_head": 16}},
    ],
)
def test_kernels_whose_bits_differ_are_refused(tmp_path, facts):
    a = part(tmp_path, "a", [of_vm(1)])
    b = part(tmp_path, "b", [of_vm(1, 9)], boot="x", facts=json.dumps({"release": "6.12", **facts}))
    refused(tmp_path, a, b)


def test_another_gfn_filter_is_refused_since_absence_means_something_else(tmp_path):
    a = part(tmp_path, "a", [of_vm(1)])
    b = part(tmp_path, "b", [of_vm(1, 9)], start=SECOND, settings={"gfns": [1, 2]})
    assert "--gfn" in refused(tmp_path, a, b)


def test_two_recordings_of_one_vm_at_one_time_are_refused(tmp_path):
    # GIVEN two recorders that both saw VM creation, each with numbers and times of its own
    def recorder(seed):
        vm = records("VM", 1, seed=seed, start_ns=START_NS)
        return [[("VM", vm)], of_vm(1, seed)]

    a = part(tmp_path, "a", recorder(1))
    b = part(tmp_path, "b", recorder(2), start=5)
    assert "same VM at the same time" in refused(tmp_path, a, b)


def test_a_merged_trace_is_no_part(tmp_path):
    a, b = part(tmp_path, "a", [of_vm(1)]), part(tmp_path, "b", [of_vm(1, 9)], start=SECOND)
    out, _ = merged(tmp_path, a, b)
    out = out.rename(tmp_path / "first.pfnt")
    c = part(tmp_path, "c", [of_vm(1, 20)], start=2 * SECOND)
    assert "itself made by merge" in refused(tmp_path, out, c)


@pytest.mark.parametrize(
    ("fields", "word"),
    [({"h__vm": 2**32 - 1}, "VM"), ({"h__stack": 2**31 - 1}, "stack"), ({"h__cpu": 65535}, "cpu")],
)
def test_numbers_that_leave_no_room_for_others_are_refused(tmp_path, fields, word):
    # A cpu number has to be moved only beside another host's.
    a = part(tmp_path, "a", [[("FAULT", records("FAULT", 3, **fields))]])
    b = part(tmp_path, "b", [[("FAULT", records("FAULT", 3, seed=2, **fields))]], boot="x", wall=1)
    assert f"no room for its {word} numbers" in refused(tmp_path, a, b)


def test_a_clock_beyond_all_clocks_is_refused(tmp_path):
    late = records("FAULT", 2, h__ts=[2**64 - 2, 2**64 - 1])
    a = part(tmp_path, "a", [of_vm(1)])
    b = part(tmp_path, "b", [[("FAULT", late)]], boot="x", wall=SECOND)
    assert "time" in refused(tmp_path, a, b)


def test_too_many_parts_are_refused_before_any_is_opened(tmp_path):
    gone = tmp_path / "gone.pfnt"
    assert "at most" in refused(tmp_path, *[gone] * 501)


# --- where the result goes ------------------------------------------------------------------------


def test_what_exists_is_not_overwritten_unless_asked(tmp_path):
    a = part(tmp_path, "a", [of_vm(1)])
    out = tmp_path / "merged.pfnt"
    out.write_bytes(b"precious")
    with pytest.raises(OutputError, match="--force"):
        merged(tmp_path, a)
    assert out.read_bytes() == b"precious"
    merged(tmp_path, a, overwrite=True)
    assert everything(out)[1]["complete"] and (out.stat().st_mode & 0o777) == 0o600


def test_a_failure_leaves_what_was_there_also_with_force(tmp_path):
    a = part(tmp_path, "a", [of_vm(1)])
    out = tmp_path / "merged.pfnt"
    out.write_bytes(b"precious")
    with pytest.raises(MergeError):
        merged(tmp_path, a, a, overwrite=True)
    assert out.read_bytes() == b"precious"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.pfnt", "merged.pfnt"]


def test_a_part_is_never_its_own_result(tmp_path):
    a = part(tmp_path, "a", [of_vm(1)])
    before = a.read_bytes()
    with pytest.raises(OutputError, match="one of the parts"):
        merge([a], a, version="0", argv=[], overwrite=True)
    assert a.read_bytes() == before


def test_a_folder_that_is_not_there_is_said_so(tmp_path):
    a = part(tmp_path, "a", [of_vm(1)])
    with pytest.raises(OutputError) as caught:
        merge([a], tmp_path / "no" / "x.pfnt", version="0", argv=[])
    assert "cannot be created" in str(caught.value)
    assert ".part" not in str(caught.value)


def test_an_error_names_the_file_that_was_asked_for(tmp_path, monkeypatch):
    # GIVEN a disk that is full
    a = part(tmp_path, "a", [of_vm(1)])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tracer.tracewriter.os.write", full)
    with pytest.raises(OutputError, match=r"/x\.pfnt: No space left") as caught:
        merge([a], tmp_path / "x.pfnt", version="0", argv=[])
    assert ".part" not in str(caught.value)


# --- parts of one recording -----------------------------------------------------------------------


def test_parts_of_one_recording_become_what_the_recording_was(tmp_path):
    # GIVEN a recording in one file, and the same in two, as a rotating recorder leaves them
    flushes = [of_vm(1, number) for number in range(6)]
    whole = write_trace(tmp_path / "whole.pfnt", flushes)
    first = write_trace(tmp_path / "first.pfnt", flushes[:3])
    second = write_trace(tmp_path / "second.pfnt", flushes[3:])
    # WHEN they are merged, in whatever order they are named
    out, told = merged(tmp_path, second, first)
    # THEN every record is as it was, numbers and clock included
    assert everything(out)[0] == everything(whole)[0]
    assert told.boots == 1 and not told.remarks
    with TraceReader(out) as reader:
        assert reader.meta.command == meta().command
        assert reader.meta.start_monotonic_ns == START_NS


def test_counters_of_one_recording_are_not_added_to_themselves(tmp_path):
    # GIVEN parts whose counters go on where the part before ended
    def rotated(name, number, produced):
        writer = TraceWriter(tmp_path / f"{name}.pfnt", meta())
        writer.write_group(of_vm(1, number))
        writer.write_losses({"FAULT": [(produced, produced // 10, 0, 0)]}, ts=START_NS + number)
        writer.close({"lost": produced // 10}, ts=START_NS + number)
        return tmp_path / f"{name}.pfnt"

    out, told = merged(tmp_path, rotated("a", 1, 100), rotated("b", 2, 300))
    info = everything(out)[1]
    assert (info["produced"], info["lost"], told.lost) == (300, 30, 30)
    with TraceReader(out) as reader:
        rows = rows_of(reader.records(["LOSS"], ["produced", "lost"]))
    assert rows == [{"produced": 100, "lost": 10}, {"produced": 300, "lost": 30}]


# --- recordings of one boot -----------------------------------------------------------------------


def test_recordings_of_one_boot_keep_the_clock_and_number_their_vms_apart(tmp_path):
    # GIVEN two recordings of one boot, both with a VM 1; the second began a second later
    a = part(tmp_path, "a", [of_vm(1, 0), of_vm(2, 1)])
    b = part(tmp_path, "b", [of_vm(1, 1500)], start=SECOND)
    out, told = merged(tmp_path, b, a)
    rows, info = everything(out)
    # THEN the earlier one keeps its numbers, the later one's come after them
    assert [part["file"] for part in told.parts] == ["a.pfnt", "b.pfnt"]
    assert {row["vm"] for row in rows} == {1, 2, 3}
    late = [row for row in rows if row["vm"] == 3]
    assert [r["ts"] for r in late] == [r["ts"] for r in everything(b)[0]]
    assert {row["cpu"] for row in late} <= {0, 1, 2, 3}
    assert "what happened between" in told.remarks[0]
    assert info["merged"]["clock"] == "monotonic"
    assert [p["vms"] for p in info["merged"]["parts"]] == [[1, 2], [3, 3]]


def test_a_vm_that_is_not_known_stays_so(tmp_path):
    a, b = part(tmp_path, "a", [of_vm(7)]), part(tmp_path, "b", [of_vm(0, 9)], start=SECOND)
    assert {row["vm"] for row in everything(merged(tmp_path, a, b)[0])[0]} == {0, 7}


def test_losses_of_recordings_are_added_up_and_only_grow(tmp_path):
    def recording(name, start, counts):
        writer = TraceWriter(
            tmp_path / f"{name}.pfnt",
            meta(start_monotonic_ns=START_NS + start, start_unix_ns=10**18 + start),
        )
        for at, row in enumerate(counts):
            writer.write_losses({"FAULT": [row, row]}, ts=START_NS + start + at)
        writer.close({}, ts=START_NS + start + 10)
        return tmp_path / f"{name}.pfnt"

    a = recording("a", 0, [(10, 1, 0, 0), (20, 2, 3, 1)])
    b = recording("b", SECOND, [(5, 0, 0, 0), (9, 4, 0, 4)])
    out, told = merged(tmp_path, a, b)
    info = everything(out)[1]
    # THEN the last row of each cpu is the sum of both recordings' last rows
    with TraceReader(out) as reader:
        rows = rows_of(reader.records(["LOSS"], ["cpu", "produced", "lost", "filtered", "torn"]))
    for cpu in (0, 1):
        of_cpu = [r for r in rows if r["cpu"] == cpu]
        assert [r["produced"] for r in of_cpu] == [10, 20, 25, 29]
        assert of_cpu[-1] == {"cpu": cpu, "produced": 29, "lost": 6, "filtered": 3, "torn": 5}
    # and so is what the trace says of itself
    assert (info["produced"], info["lost"], info["filtered"], info["torn"]) == (58, 12, 6, 10)
    assert told.lost == 12
    assert info["summary"]["counts"]["FAULT"] == {
        "produced": 58, "lost": 12, "filtered": 6, "torn": 10,
    }  # fmt: skip


# --- recordings of several boots ------------------------------------------------------------------


def test_hosts_are_laid_over_each_other_by_the_wall_clock(tmp_path):
    # GIVEN two hosts that recorded at the same time, the second booted a minute later: its clock
    # shows a minute less
    a = part(tmp_path, "a", [of_vm(1)], hostname="a")
    b = part(tmp_path, "b", [of_vm(1, 1)], boot="boot-2", wall=60 * SECOND, hostname="b")
    out, told = merged(tmp_path, a, b)
    rows, info = everything(out)
    # THEN the second's times are a minute later, those inside its records too
    own = everything(b)[0]
    moved = [row for row in rows if row["vm"] == 2]
    assert [r["ts"] for r in moved] == [r["ts"] + 60 * SECOND for r in own]
    faults = [(m, o) for m, o in zip(moved, own, strict=True) if o["kind"] == "FAULT"]
    assert all(m["fault_ts"] == o["fault_ts"] + 60 * SECOND for m, o in faults)
    assert all(m["dur"] == o["dur"] for m, o in faults)
    # and its cpus are others, since it is another machine
    cpus = 1 + max(row["cpu"] for row in everything(a)[0])
    assert [r["cpu"] for r in moved] == [r["cpu"] + cpus for r in own]
    assert info["hostname"] == "a, b" and info["merged"]["clock"] == "wall" and told.boots == 2
    assert "page frames are not comparable" in told.remarks[0]


def test_kernels_that_differ_only_in_name_are_named_and_allowed(tmp_path):
    a = part(tmp_path, "a", [of_vm(1)])
    b = part(tmp_path, "b", [of_vm(1, 9)], boot="x", facts='{"release": "6.12.8"}')
    out, told = merged(tmp_path, a, b)
    assert everything(out)[1]["kernel"] == "6.12.0-test, 6.12.8"
    assert "alike in all" in told.remarks[0]


VALUES = {"page_offset_base": 1, "vmemmap_base": 2, "zero_pfn": 3, "huge_zero_pfn": 4}


@pytest.mark.parametrize(
    ("other", "wall", "boots"),
    [
        ({}, 0, 1),
        ({}, 9 * SECOND, 1),
        ({}, 11 * SECOND, 2),
        ({"values": {**VALUES, "vmemmap_base": 5}}, 0, 2),
        ({"version": "Linux version 6.13"}, 0, 2),
        ({"values": None}, 0, 2),
    ],
    ids=["same", "NTP", "clock", "KASLR", "kernel", "unknown"],
)
def test_traces_without_a_boot_id_are_of_one_boot_only_if_everything_says_so(
    tmp_path, other, wall, boots
):
    facts = {"release": "6.12", "version": "Linux version 6.12", "values": VALUES}
    a = part(tmp_path, "a", [of_vm(1)], settings={}, facts=json.dumps(facts))
    b = part(
        tmp_path, "b", [of_vm(1, 9)], settings={}, wall=wall, facts=json.dumps(facts | other)
    )  # fmt: skip
    assert merged(tmp_path, a, b)[1].boots == boots


# --- notes ----------------------------------------------------------------------------------------


def test_notes_are_kept_with_the_new_numbers_and_say_which_part_they_are_of(tmp_path):
    def recording(name, start):
        path = tmp_path / f"{name}.pfnt"
        writer = TraceWriter(
            path, meta(start_monotonic_ns=START_NS + start, start_unix_ns=10**18 + start)
        )
        records_ = records("FAULT", 3, seed=start + 1, start_ns=START_NS + start, h__stack=4)
        writer.write_note({"slot": {"vm": 1, "slot": 0}, "vmas": []}, ts=START_NS + start)
        writer.write_note({"vms": [{"vm": 1, "tgid": 7, "traced": True}]}, ts=START_NS + start)
        writer.write_note({"stack": 4, "frames": ["f", name]}, ts=START_NS + start)
        writer.write_note({"device": {"rdev": 1}, "vms": 3}, ts=START_NS + start)
        writer.write_group([("FAULT", records_)])
        writer.close({"why": "command"}, ts=START_NS + start + 1)
        return path

    out, _ = merged(tmp_path, recording("a", 0), recording("b", SECOND))
    *found, end = notes(out)
    assert [n["part"] for n in found] == [0] * 4 + [1] * 4
    assert [n["slot"]["vm"] for n in found if "slot" in n] == [1, 2]
    assert [n["vms"][0]["vm"] for n in found if isinstance(n.get("vms"), list)] == [1, 2]
    # A stack's number is its recording's: both of the name 4 are told apart, in records too.
    frames = {n["stack"]: n["frames"][1] for n in found if "stack" in n}
    assert frames == {4: "a", 9: "b"}
    rows = everything(out)[0]
    assert {(row["vm"], row["stack"]) for row in rows} == {(1, 4), (2, 9)}
    assert end["end"]["why"] == "merged" and end["end"]["parts"] == 2


# --- parts that are cut ---------------------------------------------------------------------------


def test_a_cut_part_makes_the_whole_incomplete_and_is_used_to_its_end(tmp_path):
    a = part(tmp_path, "a", [of_vm(1, n) for n in range(8)])
    b = part(tmp_path, "b", [of_vm(1, 1500)], start=SECOND)
    whole = len(everything(a)[0])
    os.truncate(a, a.stat().st_size // 2)
    left = len(everything(a)[0])
    assert 0 < left < whole
    out, told = merged(tmp_path, a, b)
    rows, info = everything(out)
    assert len(rows) == left + 10
    assert not info["complete"] and info["reason"].startswith("a.pfnt: truncated at byte")
    assert [p["complete"] for p in told.parts] == [False, True]


def test_a_part_damaged_inside_is_used_up_to_there(tmp_path):
    a = part(tmp_path, "a", [of_vm(1, n) for n in range(8)])
    data = bytearray(a.read_bytes())
    with TraceReader(a) as reader:
        block = reader.blocks()[6]
    data[block.end - 9] ^= 0xFF
    a.write_bytes(data)
    out, _ = merged(tmp_path, a, part(tmp_path, "b", [of_vm(1, 1500)], start=SECOND))
    rows, info = everything(out)
    assert len(rows) == 6 * 5 + 10
    assert f"a.pfnt: damaged at byte {block.offset}" in info["reason"]


def test_a_killed_recorder_s_part_is_as_good_as_its_records(tmp_path):
    a = part(tmp_path, "a", [of_vm(1)], complete=False)
    out, _ = merged(tmp_path, a)
    rows, info = everything(out)
    assert len(rows) == 10 and "no end mark" in info["reason"]


def test_a_part_without_any_record_is_no_obstacle(tmp_path):
    empty = part(tmp_path, "empty", [], complete=False)
    out, told = merged(tmp_path, empty, part(tmp_path, "b", [of_vm(1)], start=SECOND))
    assert len(everything(out)[0]) == 10 and len(told.parts) == 2
    assert len(everything(merged(tmp_path, empty, overwrite=True)[0])[0]) == 0
