"""The trace file: what the writer refuses and survives, and what comes back from a file.

Files that were cut, damaged or made to harm are in test_tracefile_damage.py.
"""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.records import START_NS, group, meta, records, rows_of, write_trace

from probes import wire
from probes.errors import OutputError, UsageError
from tracer import schema, tracescan
from tracer.columns import ROWS_MAX
from tracer.tracefile import TraceMeta, TraceReader, TraceWriter

KEYS = ["ts", "cpu", "seq"]
ROOT = Path(__file__).resolve().parents[2]


# --- what the writer refuses ----------------------------------------------------------------------


def test_an_existing_file_is_not_overwritten_unless_asked(tmp_path):
    path = tmp_path / "x.pfnt"
    path.write_text("precious")
    with pytest.raises(OutputError, match=r"exists already; .* -o, or add --force$"):
        TraceWriter(path, meta())
    assert path.read_text() == "precious"
    TraceWriter(path, meta(), overwrite=True).close({})
    assert TraceReader(path).info()["complete"]


def test_nothing_but_an_ordinary_file_is_overwritten(tmp_path):
    target = tmp_path / "target"
    target.write_text("precious")
    (tmp_path / "link.pfnt").symlink_to(target)
    for path in (tmp_path / "link.pfnt", tmp_path, Path("/dev/null")):
        with pytest.raises(OutputError, match="not an ordinary file"):
            TraceWriter(path, meta(), overwrite=True)
    assert target.read_text() == "precious" and Path("/dev/null").is_char_device()


def test_a_link_is_not_followed(tmp_path):
    (tmp_path / "link.pfnt").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OutputError):
        TraceWriter(tmp_path / "link.pfnt", meta())
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_that_is_not_there_is_said_with_what_to_do(tmp_path):
    with pytest.raises(OutputError, match=r"No such file or directory; name another place with -o"):
        TraceWriter(tmp_path / "no" / "x.pfnt", meta())


def test_the_file_is_for_its_owner_only_whatever_the_umask(tmp_path):
    for umask in (0o000, 0o777):
        before = os.umask(umask)
        try:
            path = write_trace(tmp_path / f"{umask}.pfnt")
        finally:
            os.umask(before)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_note_that_looks_like_the_end_mark_or_is_too_long_is_a_bug(tmp_path):
    writer = TraceWriter(tmp_path / "x.pfnt", meta())
    with pytest.raises(ValueError, match="end mark"):
        writer.write_note({"end": 1})
    with pytest.raises(ValueError, match="at most"):
        writer.write_note({"x": "y" * (1 << 20)})
    writer.close({})


# --- a full disk ----------------------------------------------------------------------------------


class FullDisk:
    """Replaces os.write: takes `room` bytes, a piece at a time, then fails as a full disk does."""

    def __init__(self, monkeypatch, room):
        self.room = room
        self._write = os.write
        monkeypatch.setattr(os, "write", self.write)

    def write(self, fd, data):
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken = self._write(fd, data[: min(self.room, 4096)])
        self.room -= taken
        return taken


def test_a_full_disk_leaves_a_valid_file_up_to_the_last_whole_batch(tmp_path, monkeypatch):
    # GIVEN a disk with room for the first flush and half of the second one
    path = tmp_path / "x.pfnt"
    writer = TraceWriter(path, meta())
    writer.write_group(group(0))
    whole = writer.bytes_written
    disk = FullDisk(monkeypatch, room=9_000)
    # WHEN the second one is written THEN it fails with what to do
    with pytest.raises(OutputError, match="No space left on device; the 15 records before"):
        writer.write_group(group(1))
    # and the file is as after its last whole batch
    assert path.stat().st_size == writer.bytes_written > whole
    assert TraceReader(path).info(verify=True)["records"] == writer.records == 15
    # WHEN there is room again THEN the end mark goes in
    disk.room = 1 << 20
    writer.close({"why": "full"})
    facts = TraceReader(path).info(verify=True)
    assert facts["complete"] and facts["records"] == 15 and facts["summary"] == {"why": "full"}


def test_on_a_disk_that_stays_full_closing_fails_and_the_file_is_readable(tmp_path, monkeypatch):
    path = tmp_path / "x.pfnt"
    writer = TraceWriter(path, meta())
    writer.write_group(group(0))
    writer.write_note({"hello": "x"})
    FullDisk(monkeypatch, room=0)
    with pytest.raises(OutputError, match="No space left"):
        writer.close({})
    assert writer.fileno() == -1
    facts = TraceReader(path).info()
    assert facts["records"] == 10 and facts["reason"].startswith("no end mark")
    writer.close({})  # a second time does nothing


def test_notes_held_back_give_way_to_the_end_mark(tmp_path, monkeypatch):
    path = tmp_path / "x.pfnt"
    writer = TraceWriter(path, meta())
    writer.write_note({"long": os.urandom(50_000).hex()})
    disk = FullDisk(monkeypatch, room=16_000)
    # the piece with the note takes all the room before it fails, and gives it back
    monkeypatch.setattr(os, "ftruncate", giving_room(disk, 16_000))
    writer.close({"why": "full"})
    assert TraceReader(path).info()["summary"] == {"why": "full"}


def giving_room(disk, room):
    def ftruncate(fd, size, truncate=os.ftruncate):
        truncate(fd, size)
        disk.room = room

    return ftruncate


def test_a_file_that_cannot_even_begin_is_not_left_behind(tmp_path, monkeypatch):
    FullDisk(monkeypatch, room=100)
    with pytest.raises(OutputError, match="No space left"):
        TraceWriter(tmp_path / "x.pfnt", meta())
    assert not list(tmp_path.iterdir())


def test_a_broken_piece_that_cannot_be_removed_ends_the_writing(tmp_path, monkeypatch):
    path = tmp_path / "x.pfnt"
    writer = TraceWriter(path, meta())
    writer.write_group(group(0))

    def ftruncate(fd, size):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "ftruncate", ftruncate)
    FullDisk(monkeypatch, room=3_000)
    with pytest.raises(OutputError, match="cannot be removed"):
        writer.write_group(group(1))
    writer.close({})
    facts = TraceReader(path).info()
    assert facts["records"] == 10 and facts["reason"].startswith("truncated")


# --- what comes back ------------------------------------------------------------------------------


def test_a_killed_recorder_leaves_all_it_flushed(tmp_path):
    # GIVEN a recorder that is gone in the instant after its second flush
    path = tmp_path / "x.pfnt"
    code = (
        "import os, sys, pathlib\n"
        "from tracer.tracefile import TraceWriter\n"
        "from unit.records import START_NS, group, meta\n"
        "writer = TraceWriter(pathlib.Path(sys.argv[1]), meta())\n"
        "writer.write_note({'hello': 1})\n"
        "writer.write_group(group(0))\n"
        "writer.write_losses({'FAULT': [(7, 2, 0, 0)]}, ts=START_NS)\n"
        "writer.write_losses({'FAULT': [(9, 3, 1, 0)]}, ts=START_NS + 1)\n"
        "writer.write_group(group(1))\n"
        "os.kill(os.getpid(), 9)\n"
    )
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-c", code, str(path)], env=env)
    assert done.returncode == -9
    # THEN everything is there but the end mark, and the newest losses count
    facts = TraceReader(path).info(verify=True)
    assert facts["reason"].startswith("no end mark: the recorder was killed")
    assert (facts["complete"], facts["records"]) == (False, 20)
    assert (facts["produced"], facts["lost"], facts["filtered"]) == (9, 3, 1)
    assert pa.ipc.open_stream(path).read_all().num_rows == 23


def test_a_recorder_killed_before_its_first_flush_leaves_a_readable_file(tmp_path):
    path = write_trace(tmp_path / "x.pfnt", [], complete=False)
    facts = TraceReader(path).info(verify=True)
    assert (facts["records"], facts["complete"]) == (0, False)
    assert pa.ipc.open_stream(path).read_all().num_rows == 0
    assert pl.read_ipc_stream(path).height == 0


def test_any_arrow_reader_opens_a_trace(tmp_path):
    # GIVEN a trace with records of all kinds
    path = write_trace(tmp_path / "x.pfnt", [group(0, kinds=schema.RECORD_KINDS), group(1)])
    total = 5 * len(schema.RECORD_KINDS) + 10 + 1
    # WHEN it is read with no code of ours
    with pa.ipc.open_stream(path) as stream:
        table = stream.read_all()
    frame = pl.read_ipc_stream(path)
    # THEN both see the same rows, with names as text
    table.validate(full=True)
    assert table.num_rows == frame.height == total
    assert table.column("kind").to_pylist() == frame["kind"].cast(pl.String).to_list()
    faults = frame.filter(pl.col("kind").cast(pl.String) == "FAULT")
    assert faults["result"].cast(pl.String).to_list() == ["fixed"] * 10
    assert table.column("note").to_pylist()[-1].startswith('{"end"')


records_of_any_content = st.tuples(
    st.sampled_from(schema.RECORD_KINDS), st.integers(0, 6), st.randoms(use_true_random=False)
)


def any_records(kind, count, random):
    """Records whose every byte is arbitrary, sorted as the recorder sorts them."""
    dtype = wire.FAULT if kind == "FAULT" else wire.EVENT
    out = np.frombuffer(random.randbytes(count * dtype.itemsize), dtype)
    h = out["h"]
    return out[np.lexsort([h["seq"], h["cpu"], h["ts"]])]


@settings(max_examples=60, deadline=None)
@given(flushes=st.lists(st.lists(records_of_any_content, max_size=4), max_size=4))
def test_records_come_back_as_they_were_and_in_order_of_time(tmp_path_factory, flushes):
    # GIVEN flushes of records of any content, so in no order of time among each other
    groups = [[(kind, any_records(kind, n, r)) for kind, n, r in flush] for flush in flushes]
    path = tmp_path_factory.mktemp("any") / "x.pfnt"
    write_trace(path, groups)
    written = [(kind, array) for flush in groups for kind, array in flush if len(array)]
    with TraceReader(path) as reader:
        # WHEN they are read as they lie in the file THEN nothing is changed
        batches = [b for b in reader.batches(schema.RECORD_KINDS)]
        assert len(batches) == len(written)
        for batch, (kind, array) in zip(batches, written, strict=True):
            assert set(batch.column("kind").to_pylist()) == {kind}
            for name, field in (("ts", "ts"), ("cpu", "cpu"), ("seq", "seq"), ("tid", "tid")):
                assert batch.column(name).to_pylist() == array["h"][field].tolist()
        # WHEN they are read in order of time THEN they are all there and sorted
        merged = [
            row
            for batch in reader.records(schema.RECORD_KINDS, columns=[*KEYS, "kind"])
            for row in batch.to_pylist()
        ]
        keys = [tuple(row[k] for k in KEYS) for row in merged]
        assert keys == sorted(keys)
        assert len(keys) == sum(len(array) for _, array in written)
        facts = reader.info(verify=True)
    assert facts["complete"] and facts["records"] == len(keys)
    assert all(
        facts["kinds"][kind] == sum(len(a) for k, a in written if k == kind)
        for kind in schema.RECORD_KINDS
    )


def test_time_order_holds_over_groups_that_overlap(tmp_path):
    # GIVEN flushes in which some records are older than all of the flush before
    flushes = [group(number, count=300) for number in (0, 2, 1, 5, 3, 4)]
    path = write_trace(tmp_path / "x.pfnt", flushes)
    with TraceReader(path) as reader:
        found = rows_of(reader.records(["FAULT", "SPTE"], columns=KEYS))
        again = rows_of(reader.records(["SPTE"], columns=["seq", "ts"]))
    keys = [tuple(row.values()) for row in found]
    assert keys == sorted(keys) and len(keys) == 3600
    assert [list(row) for row in again[:1]] == [["seq", "ts"]]
    assert [row["ts"] for row in again] == sorted(row["ts"] for row in again)


def test_records_of_one_time_in_two_batches_are_ordered_by_cpu(tmp_path):
    # GIVEN batches whose last and whose middle record are of the same time
    first = records("SLOT", 3, h__ts=[START_NS, START_NS + 1, START_NS + 9], h__cpu=[0, 0, 7])
    second = records("VM", 3, h__ts=[START_NS + 5, START_NS + 9, START_NS + 10], h__cpu=5)
    path = write_trace(tmp_path / "x.pfnt", [[("SLOT", first), ("VM", second)]])
    with TraceReader(path) as reader:
        found = rows_of(reader.records(["SLOT", "VM"], columns=KEYS))
    keys = [tuple(row.values()) for row in found]
    assert keys == sorted(keys) and [cpu for _, cpu, _ in keys] == [0, 0, 5, 5, 7, 5]


def test_a_flush_larger_than_a_batch_is_split_and_merged_again(tmp_path):
    # GIVEN more records of two kinds in one flush than a batch may have
    count = ROWS_MAX + 1000
    path = write_trace(tmp_path / "x.pfnt", [group(0, count=count)])
    with TraceReader(path) as reader:
        sizes = [b.num_rows for b in reader.batches(["FAULT", "SPTE"], columns=["ts"])]
        assert sizes == [ROWS_MAX, 1000, ROWS_MAX, 1000]
        # WHEN it is read in order of time THEN no batch holds much more than the kinds' batches
        merged = list(reader.records(columns=["ts"]))
    assert max(b.num_rows for b in merged) <= 3 * ROWS_MAX
    ts = np.concatenate([b.column("ts").to_numpy() for b in merged])
    assert len(ts) == 2 * count + 1 and (np.diff(ts.astype("i8")) >= 0).all()


def test_strided_records_of_a_ring_are_copied(tmp_path):
    # GIVEN records that lie in a ring, with its header between them
    ring = np.zeros(5, wire.ring_dtype(wire.FAULT))
    ring["rec"] = records("FAULT", 5)
    expected = ring["rec"]["gfn"].tolist()
    writer = TraceWriter(tmp_path / "x.pfnt", meta())
    # WHEN they were written and the ring is used again
    taken = writer.write_group([("FAULT", ring["rec"])])
    ring["rec"]["gfn"] = 0
    writer.close({})
    # THEN the file has what was there
    with TraceReader(tmp_path / "x.pfnt") as reader:
        assert [row["gfn"] for row in rows_of(reader.batches(["FAULT"]))] == expected
    assert taken > 0


def test_columns_and_kinds_that_do_not_exist_are_named_with_those_that_do(tmp_path):
    reader = TraceReader(write_trace(tmp_path / "x.pfnt"))
    for read in (reader.batches, reader.records):
        with pytest.raises(UsageError, match="'FAULTS'; there are FAULT SPTE"):
            list(read(["FAULTS"]))
        with pytest.raises(UsageError, match="no column 'gnf'"):
            list(read(columns=["gnf"]))


def test_info_says_what_the_file_holds(tmp_path):
    # GIVEN a recording of two VMs with losses
    path = tmp_path / "x.pfnt"
    writer = TraceWriter(path, meta())
    vms = records("VM", 3, h__vm=[1, 2, 1], d=[42, 43, 42])
    writer.write_group([*group(0), ("VM", vms)])
    writer.write_losses({"FAULT": [(9, 2, 1, 1), (5, 0, 0, 0)], "SPTE": [(5, 0, 0, 0)]}, ts=5)
    writer.close({"why": "duration"}, ts=START_NS + 1_500_000_000)
    # THEN info says it
    facts = TraceReader(path).info()
    assert json.loads(json.dumps(facts)) == facts
    assert facts["complete"] and facts["reason"] == ""
    assert (facts["records"], facts["lost"], facts["filtered"], facts["torn"]) == (13, 2, 1, 1)
    assert facts["produced"] == 19
    assert facts["kinds"] == dict.fromkeys(schema.RECORD_KINDS, 0) | {
        "FAULT": 5,
        "SPTE": 5,
        "VM": 3,
    }
    assert facts["vms"] == [{"vm": 1, "tgid": 42}, {"vm": 2, "tgid": 43}]
    assert facts["kernel"] == "6.12.0-test" and facts["generation"] == "G0b"
    assert facts["hooks"] == [{"hook": "fault", "symbols": ["f"], "how": "kprobe", "note": ""}]
    assert facts["missing"] == []
    assert facts["command"] == ["pfntrace", "record", "--", "qemu"]
    assert facts["start"] == "2023-11-14T22:13:20+00:00" and facts["duration_s"] == 1.5
    assert facts["bytes"] == path.stat().st_size
    assert facts["schema_version"] == schema.SCHEMA_VERSION
    assert facts["summary"] == {"why": "duration"}


def test_the_summary_of_the_recorder_counts_more_than_the_loss_rows(tmp_path):
    writer = TraceWriter(tmp_path / "x.pfnt", meta())
    writer.write_losses({"FAULT": [(9, 2, 1, 0)]})
    writer.close({"lost": 4, "filtered": "many"})
    facts = TraceReader(tmp_path / "x.pfnt").info()
    assert (facts["lost"], facts["filtered"]) == (4, 1)


def test_only_losses_that_changed_are_written(tmp_path):
    path = tmp_path / "x.pfnt"
    writer = TraceWriter(path, meta())
    for counts in ([(5, 0, 0, 0), (0, 0, 0, 0)], [(5, 0, 0, 0), (1, 1, 0, 0)]) * 2:
        writer.write_losses({"SPTE": counts}, ts=1)
    writer.close({})
    rows = rows_of(TraceReader(path).batches(["LOSS"], ["loss_kind", "cpu", "produced", "lost"]))
    assert rows[:2] == [
        {"loss_kind": "SPTE", "cpu": 0, "produced": 5, "lost": 0},
        {"loss_kind": "SPTE", "cpu": 1, "produced": 1, "lost": 1},
    ]


def test_many_notes_become_few_batches_and_none_is_lost(tmp_path):
    path = tmp_path / "x.pfnt"
    writer = TraceWriter(path, meta())
    for number in range(600):
        writer.write_note({"number": number})
    for _ in range(3):
        writer.write_note({"long": "x" * 700_000})
    writer.close({})
    with TraceReader(path) as reader:
        batches = list(reader.batches(["NOTE"], ["note"]))
        assert reader.info(verify=True)["complete"]
    notes = [json.loads(row["note"]) for row in rows_of(batches)]
    assert [n["number"] for n in notes[:600]] == list(range(600)) and len(notes) == 604
    assert len(batches) <= 5


def test_the_description_comes_back_as_it_was(tmp_path):
    given_meta = meta(command=("pfntrace", "é\udcff\x1b[0m"), settings={"a": [1, None]})
    path = write_trace(
        tmp_path / "x.pfnt", command=given_meta.command, settings=given_meta.settings
    )
    found = TraceReader(path).meta
    assert found == given_meta and isinstance(found, TraceMeta)
    assert found.results[5] == "fixed"


def test_the_same_records_make_the_same_bytes(tmp_path):
    one, two = (write_trace(tmp_path / name) for name in ("1.pfnt", "2.pfnt"))
    assert one.read_bytes() == two.read_bytes()


def test_a_trace_being_written_can_be_read(tmp_path):
    path = tmp_path / "x.pfnt"
    writer = TraceWriter(path, meta())
    writer.write_group(group(0))
    with TraceReader(path) as reader:
        writer.write_group(group(1))
        assert reader.info()["records"] == 10  # as it was when it was opened
    assert TraceReader(path).info()["records"] == 20
    writer.close({})


def test_info_of_many_batches_reads_heads_only(tmp_path, monkeypatch):
    # GIVEN a trace of 200 batches
    path = write_trace(tmp_path / "x.pfnt", [group(n, count=2) for n in range(100)])
    read = []

    def load(file, block):
        read.append(block)
        return tracescan.load(file, block)

    monkeypatch.setattr("tracer.tracereader.load", load)
    # WHEN only the description is wanted THEN one body is unpacked: the end mark
    assert TraceReader(path).info()["records"] == 400
    assert [block.kind for block in read] == ["NOTE"]
