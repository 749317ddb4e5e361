"""The recordings of a merged trace, looked at one by one: what goes in comes out again."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.records import START_NS, group, meta, records, rows_of, write_trace

from tracer import schema
from tracer.merge import merge
from tracer.tracefile import TraceReader, TraceWriter, recordings

SECOND = 1_000_000_000
TRACES = Path(__file__).parent / "traces"


def merged(tmp_path, *parts):
    out = tmp_path / "merged.pfnt"
    return out, merge(parts, out, version="0", argv=["merge"])


def part(tmp_path, name, groups, boot="b", start=0, wall=0, losses=(), why="command"):
    path = tmp_path / f"{name}.pfnt"
    writer = TraceWriter(
        path,
        meta(
            settings={"boot_id": boot, "rings": 2, "gfns": None},
            start_monotonic_ns=START_NS + start,
            start_unix_ns=10**18 + start + wall,
            hostname=f"host-{boot}",
            command=("pfntrace", "record", name),
        ),
    )
    writer.write_note({"hello": name}, ts=START_NS + start)
    for flush in groups:
        writer.write_group(flush)
    for at, row in enumerate(losses):
        writer.write_losses({"FAULT": [row]}, ts=START_NS + start + at)
    lost = losses[-1][1] if losses else 0
    writer.close({"why": why, "lost": lost, "counts": {"FAULT": {"lost": lost}}},
                 ts=START_NS + start + SECOND // 2)  # fmt: skip
    return path


def rows(reader, kinds=schema.RECORD_KINDS):
    return rows_of(reader.records(kinds))


def as_in_the_merged_trace(path, told):
    """Return a part's own records with the VM numbers and times of the merged trace."""
    with TraceReader(path) as reader:
        found = rows(reader)
    for row in found:
        row["ts"] += told["shift_ns"]
        row["vm"] += told["vm_base"]
        if row["fault_ts"] is not None:
            row["fault_ts"] += told["shift_ns"]
    return found


def test_a_trace_that_was_not_merged_is_its_only_recording():
    with TraceReader(TRACES / "ttm-6.12.pfnt") as reader:
        assert list(recordings(reader)) == [reader]


def test_parts_of_one_recording_are_one_recording(tmp_path):
    parts = [write_trace(tmp_path / f"{n}.pfnt", [group(n)]) for n in range(3)]
    out, _ = merged(tmp_path, *parts)
    with TraceReader(out) as reader:
        assert list(recordings(reader)) == [reader]


flushes = st.lists(
    st.tuples(st.sampled_from(schema.RECORD_KINDS), st.integers(1, 20), st.integers(0, 3)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(parts=st.lists(st.tuples(st.integers(0, 2), flushes), min_size=2, max_size=4))
def test_each_recording_has_the_records_that_it_was_made_of(tmp_path_factory, parts):
    tmp_path = tmp_path_factory.mktemp("any")
    paths = []
    for number, (boot, flushed) in enumerate(parts):
        groups = [
            [(kind, records(kind, n, seed=50 * number + at, start_ns=START_NS + late * 30_000))]
            for at, (kind, n, late) in enumerate(flushed)
        ]
        for flush in groups:
            for kind, array in flush:
                if kind == "VM":
                    array["a"], array["d"] = 4096 * number, number
        paths.append(
            part(tmp_path, str(number), groups, f"b{boot}", start=number, wall=boot * SECOND)
        )
    out, told = merged(tmp_path, *paths)
    by_name = {place["file"]: place for place in told.parts}
    with TraceReader(out) as reader:
        views = list(recordings(reader))
        assert len(views) == len(paths)
        for view in recordings(reader):
            name = view.meta.command[0].split()[-1]
            place = by_name[f"{name}.pfnt"]
            expected = as_in_the_merged_trace(paths[int(name)], place)
            assert rows(view) == expected
            assert view.info()["records"] == len(expected)
            assert view.meta.start_monotonic_ns == START_NS + int(name) + place["shift_ns"]


def test_a_view_says_what_its_own_file_said(tmp_path):
    # GIVEN two recordings of one boot, one after the other, the first with losses
    a = part(tmp_path, "a", [group(0)], losses=[(5, 1, 0, 0), (9, 4, 0, 0)], why="size")
    b = part(tmp_path, "b", [group(1500)], start=SECOND, losses=[(3, 0, 0, 0), (7, 2, 0, 0)])
    out, _ = merged(tmp_path, a, b)
    with TraceReader(out) as reader:
        first, second = recordings(reader)
        for view, path in ((first, a), (second, b)):
            with TraceReader(path) as own:
                expected, found = own.info(), view.info()
            same = ("records", "kinds", "lost", "produced", "complete", "kernel", "hostname")
            assert {n: found[n] for n in same} == {n: expected[n] for n in same}
            assert found["summary"]["why"] == expected["summary"]["why"]
            assert found["duration_s"] == expected["duration_s"]
            assert view.meta.settings["rings"] == 2
    # THEN counters of losses begin at 0 in each, though they go on in the merged trace
    with TraceReader(out) as reader:
        for view, counts in zip(recordings(reader), ([1, 4], [0, 2]), strict=True):
            assert [row["lost"] for row in rows(view, ["LOSS"])] == counts
        for view, name in zip(recordings(reader), "ab", strict=True):
            (note,) = [json.loads(row["note"]) for row in rows(view, ["NOTE"])]
            assert note["hello"] == name


def test_a_cut_part_is_incomplete_and_the_others_are_not(tmp_path):
    a = part(tmp_path, "a", [group(n) for n in range(6)])
    data = a.read_bytes()
    a.write_bytes(data[: len(data) // 2])
    out, _ = merged(tmp_path, a, part(tmp_path, "b", [group(1500)], start=SECOND))
    with TraceReader(out) as reader:
        first, second = (view.info() for view in recordings(reader))
    assert not first["complete"] and first["reason"].startswith("truncated")
    assert first["summary"] == {} and second["complete"]


def test_what_happens_to_the_merged_file_happens_to_all_in_it(tmp_path):
    out, _ = merged(
        tmp_path,
        part(tmp_path, "a", [group(n) for n in range(6)]),
        part(tmp_path, "b", [group(1500)], start=SECOND),
    )
    data = out.read_bytes()
    out.write_bytes(data[:-200])
    with TraceReader(out) as reader:
        assert [view.info()["complete"] for view in recordings(reader)] == [False, False]


def test_records_of_no_known_vm_are_of_who_ran_there_then(tmp_path):
    unknown = records("PAGE_FREE", 3, seed=9, start_ns=START_NS, h__vm=0)
    a = part(tmp_path, "a", [group(0), [("PAGE_FREE", unknown)]])
    b = part(tmp_path, "b", [group(1)], boot="other", wall=1)
    out, _ = merged(tmp_path, a, b)
    with TraceReader(out) as reader:
        frees = [len(rows(view, ["PAGE_FREE"])) for view in recordings(reader)]
    assert frees == [3, 0]


@pytest.mark.parametrize(
    "told",
    [
        7,
        {"parts": 7},
        {"parts": [1, 2]},
        {"parts": [{}, {}]},
        {"parts": [{"recording": n} for n in range(3)]},
        {"parts": [{"recording": -n, "cpus": "xx", "vms": [[], {}]} for n in range(3)]},
    ],
    ids=str,
)
def test_a_description_that_is_none_makes_the_trace_one_recording(tmp_path, told):
    path = write_trace(tmp_path / "x.pfnt", [group(0)], settings={"merged": told})
    with TraceReader(path) as reader:
        assert list(recordings(reader)) == [reader]


@pytest.mark.parametrize(
    "change",
    [
        {"vms": [2**33 - 1, 0]},
        {"cpus": [65535, 0]},
        {"start_ts": 2**64 - 1, "end_ts": 0},
        {"settings": {"gfns": "x"}, "counts": {"FAULT": []}, "command": 7, "why": []},
    ],
    ids=str,
)
def test_a_hostile_description_of_parts_does_no_harm(tmp_path, change):
    a, b = part(tmp_path, "a", [group(0)]), part(tmp_path, "b", [group(1500)], start=SECOND)
    _, told = merged(tmp_path, a, b)
    parts = [{**place, **change} for place in told.parts]
    path = write_trace(tmp_path / "x.pfnt", [group(0)], settings={"merged": {"parts": parts}})
    with TraceReader(path) as reader:
        for view in recordings(reader):
            json.dumps(view.info(), allow_nan=False)
            rows(view, schema.FILE_KINDS)
