"""Merging whatever comes in: no record is lost or doubled, and memory stays bounded."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.mergekit import KEYS, SECOND, everything, merged, notes, of_vm, part, refused
from unit.records import START_NS, meta, records

from probes import wire
from probes.errors import MergeError, PfntraceError
from tracer import schema
from tracer.merge import merge
from tracer.tracefile import TraceReader, TraceWriter

ROOT = Path(__file__).resolve().parent.parent.parent

# --- nothing is lost, whatever comes in -----------------------------------------------------------

flush_of_anything = st.tuples(
    st.sampled_from(schema.RECORD_KINDS), st.integers(0, 40), st.integers(0, 5)
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    parts=st.lists(
        st.tuples(st.integers(0, 2), st.lists(flush_of_anything, max_size=5)),
        min_size=1,
        max_size=5,
    )
)
def test_every_record_of_every_part_is_there_once_in_order_of_time(tmp_path_factory, parts):
    # GIVEN recordings of up to three boots whose records overlap in time in any way
    tmp_path = tmp_path_factory.mktemp("any")
    paths = []
    for number, (boot, flushes) in enumerate(parts):
        groups = [
            [(kind, records(kind, count, seed=97 * number + at, start_ns=START_NS + late * 30_000))]
            for at, (kind, count, late) in enumerate(flushes)
        ]
        # A VM of its own for each, else two recordings would be one.
        for flush in groups:
            for kind, array in flush:
                if kind == "VM":
                    array["a"], array["d"] = 4096 * number, number
        paths.append(
            part(tmp_path, str(number), groups, boot=f"b{boot}", start=number, wall=boot * SECOND)
        )
    out, told = merged(tmp_path, *paths)
    rows, info = everything(out)
    # THEN they are sorted, as many as there were, and each part's are found by its numbers
    keys = [tuple(row[k] for k in KEYS) for row in rows]
    assert keys == sorted(keys) and info["complete"]
    assert len(rows) == sum(len(everything(path)[0]) for path in paths)
    for number, path in enumerate(paths):
        place = next(p for p in told.parts if p["file"] == path.name)
        expected = everything(path)[0]
        for row in expected:
            row["ts"] += place["shift_ns"]
            row["cpu"] += place["cpu_base"]
            row["vm"] += place["vm_base"]
            if row["fault_ts"] is not None:
                row["fault_ts"] += place["shift_ns"]
        found = [row for row in rows if row["vm"] == place["vm_base"] + 1] if expected else []
        assert sorted(map(str, found)) == sorted(map(str, expected)), number


def test_real_traces_of_two_kernels_are_refused():
    traces = Path(__file__).parent / "traces"
    a, b = traces / "ttm-6.12.pfnt", traces / "ttm-7.3.pfnt"
    with pytest.raises(MergeError, match="generation"):
        merge([a, b], Path("never.pfnt"), version="0", argv=[])
    assert not Path("never.pfnt").exists()


# --- limits ---------------------------------------------------------------------------------------


def test_long_parts_are_merged_in_bounded_memory(tmp_path):
    # GIVEN two recordings at the same time of 20 flushes of 16,384 records, 300 bytes each in
    # memory: 200 MB, merged by a process that may not have more than half of that beyond what it
    # needs to start
    count = 1 << 14
    paths = []
    for name in ("a", "b"):
        writer = TraceWriter(
            tmp_path / f"{name}.pfnt",
            meta(settings={"boot_id": name}, start_unix_ns=10**18 + (name == "b")),
        )
        base = records("FAULT", count, seed=ord(name))
        span = base["h"]["ts"][-1] - START_NS + np.uint64(1)
        for number in range(20):
            flush = base.copy()
            flush["h"]["ts"] += np.uint64(number) * span
            writer.write_group([("FAULT", flush)])
        writer.close({}, ts=int(flush["h"]["ts"][-1]))
        paths.append(str(tmp_path / f"{name}.pfnt"))
    code = (
        "import sys, resource, pathlib\n"
        "from tracer.merge import merge\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "merge([pathlib.Path(p) for p in sys.argv[2:]], pathlib.Path(sys.argv[1]),"
        " version='0', argv=[])\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    out = tmp_path / "merged.pfnt"
    done = subprocess.run(
        [sys.executable, "-c", code, str(out), *paths], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 100_000, f"{done.stdout} KiB"
    with TraceReader(out) as reader:
        assert reader.info()["records"] == 2 * 20 * count


def test_more_records_of_one_moment_than_any_recorder_writes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tracer.merge._HELD_ROWS_MAX", 100)
    flushes = [[("FAULT", records("FAULT", 60, seed=n, h__ts=START_NS))] for n in range(4)]
    assert "of the same time" in refused(tmp_path, part(tmp_path, "a", flushes))


def test_notes_of_any_content_do_no_harm(tmp_path):
    # GIVEN notes as a hostile file may have them; the writer itself would refuse most
    path = tmp_path / "a.pfnt"
    writer = TraceWriter(path, meta())
    for text in ("7", "[1]", "{", "null", '{"vms": [1, {"vm": "x"}], "stack": "y", "slot": 4}'):
        writer._notes.append((START_NS, text))
    writer._notes.append((START_NS, '{"big": "' + "x" * 200_000 + '"}'))
    writer._notes.append((START_NS, '{"end": 7}'))
    writer.write_group(of_vm(1))
    writer.close({})
    out, _ = merged(tmp_path, path)
    *found, end = notes(out)
    assert found == [{"vms": [1, {"vm": "x"}], "stack": "y", "slot": 4, "part": 0}]
    assert end["end"]["why"] == "merged"


@pytest.mark.parametrize(
    "settings_",
    [{"boot_id": 7}, {"boot_id": ["x"]}, {"gfns": {"a": [1]}}, {"merged": "yes"}],
    ids=str,
)
def test_settings_of_any_content_are_no_traceback(tmp_path, settings_):
    a = part(tmp_path, "a", [of_vm(1)], settings=settings_)
    b = part(tmp_path, "b", [of_vm(1, 9)], start=SECOND, settings=settings_)
    try:
        out, _ = merged(tmp_path, a, b)
    except PfntraceError as err:
        assert "\n" not in str(err)
    else:
        assert everything(out)[1]["records"] == 20


def test_kinds_on_the_wire_are_all_moved(tmp_path):
    # Every kind of record, so that a new one is not forgotten.
    flush = [
        (kind, records(kind, 4, seed=at + 1))
        for at, kind in enumerate(wire.KINDS[1:])
    ]  # fmt: skip
    a = part(tmp_path, "a", [flush])
    rows, info = everything(merged(tmp_path, a)[0])
    assert rows == everything(a)[0]
    assert info["kinds"] == dict.fromkeys(schema.RECORD_KINDS, 4)


def test_names_stay_the_same_text_whatever_numbers_a_part_gives_them(tmp_path, monkeypatch):
    # GIVEN a part whose names are in another order
    with monkeypatch.context() as patch:
        for key, names in schema.NAMES.items():
            if key != "kind":
                patch.setitem(schema.NAMES, key, tuple(reversed(names)))
        a = part(tmp_path, "a", [[(kind, records(kind, 6)) for kind in schema.RECORD_KINDS]])
    b = part(tmp_path, "b", [of_vm(1, 1500)], start=SECOND)
    expected = [row["op"] for row in everything(a)[0]]
    found = everything(merged(tmp_path, a, b)[0])[0]
    assert [row["op"] for row in found[: len(expected)]] == expected
    assert "fault" in {row["cause"] for row in found if row["kind"] == "SPTE"}


def test_a_name_that_is_not_known_here_is_refused(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setitem(schema.NAMES, "op", tuple(f"{name}!" for name in schema.NAMES["op"]))
        a = part(tmp_path, "a", [of_vm(1)])
    assert "a name that no pfntrace" in refused(tmp_path, a)
