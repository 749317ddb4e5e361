"""Trace files that are not as they should be: of another kind, cut, damaged, made to harm.

The answer is an error of one line, or what is intact and a reason: never a crash, never memory
that a file merely claims, never other records than were written.
"""

import contextlib
import json
import os
import zlib

import numpy as np
import pyarrow as pa
import pytest
from unit.records import group, meta, records, rows_of, write_trace

from probes.errors import PfntraceError, TraceFormatError
from tracer import messages, schema
from tracer.tracefile import TraceReader, TraceWriter

#: Enough to tell the records of `group` apart, and quick to read.
KEYS = ["ts", "cpu", "seq"]


def read_keys(path):
    """Return (the records' keys in file order, why they are not all there)."""
    with TraceReader(path) as reader:
        keys: list[tuple[int, ...]] = []
        for batch in reader.batches(columns=KEYS):
            keys += zip(*(batch.column(name).to_pylist() for name in KEYS), strict=True)
        return keys, reader.reason


@contextlib.contextmanager
def refused(*words):
    """The reader says in one line what is wrong, with the file's name and these words in it."""
    with pytest.raises(TraceFormatError) as caught:
        yield
    text = str(caught.value)
    assert "\n" not in text and ".pfnt" in text
    assert all(word in text for word in words), text


# --- not a trace ----------------------------------------------------------------------------------


def test_an_empty_file_is_said_to_be_empty(tmp_path):
    path = tmp_path / "x.pfnt"
    path.touch()
    with refused("empty"):
        TraceReader(path)


@pytest.mark.parametrize(
    "content",
    [b"hello", b"\x00" * 4096, b"\xff" * 4096, b"ARROW1\0\0" + b"\0" * 64, b"PAR1" * 10],
    ids=["text", "zeros", "ones", "arrow-file", "parquet"],
)
def test_a_file_of_another_kind_is_refused(tmp_path, content):
    path = tmp_path / "x.pfnt"
    path.write_bytes(content)
    with refused():
        TraceReader(path)


def test_a_missing_file_a_folder_and_a_fifo_are_refused(tmp_path):
    with refused("No such file"):
        TraceReader(tmp_path / "gone.pfnt")
    (tmp_path / "folder.pfnt").mkdir()
    with refused("ordinary file"):
        TraceReader(tmp_path / "folder.pfnt")
    os.mkfifo(tmp_path / "fifo.pfnt")
    with refused("ordinary file"):
        TraceReader(tmp_path / "fifo.pfnt")


def test_an_arrow_stream_of_another_program_is_refused(tmp_path):
    path = tmp_path / "x.pfnt"
    table = pa.table({"ts": [1, 2]})
    with pa.ipc.new_stream(path, table.schema) as out:
        out.write_table(table)
    with refused("Arrow stream"):
        TraceReader(path)


def test_a_trace_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "x.pfnt"
    other = pa.schema([("ts", pa.uint64())], metadata=meta().to_metadata())
    with pa.ipc.new_stream(path, other):
        pass
    with refused("columns"):
        TraceReader(path)


@pytest.mark.parametrize("version", [0, 2, 10**9, "1", None])
def test_a_trace_of_another_version_is_refused_with_what_to_use(tmp_path, version):
    path = write_trace(tmp_path / "x.pfnt", schema_version=version)
    with refused("schema version", "use the pfntrace that recorded it"):
        TraceReader(path)


@pytest.mark.parametrize(
    "change",
    [
        {"command": "one word"},
        {"start_unix_ns": "now"},
        {"facts": None},
        {"profile": []},
        {"profile": {"results": {"x": 1}}},
        {"profile": {"results": 7}},
        {"profile": {"generation": [[[[]]]] * 3, "hooks": [1, {"symbols": 3}], "missing": 4}},
        {"start_unix_ns": 10**30, "start_monotonic_ns": -(10**30)},
    ],
    ids=lambda change: "-".join(change),
)
def test_a_head_of_wrong_types_is_refused_or_read_as_far_as_it_makes_sense(tmp_path, change):
    path = tmp_path / "x.pfnt"
    metadata = replaced(meta().to_metadata(), change)
    with pa.ipc.new_stream(path, schema.arrow_schema(metadata)):
        pass
    try:
        facts = TraceReader(path).info()
    except TraceFormatError as err:
        assert "\n" not in str(err)
    else:
        json.dumps(facts)
        assert all(isinstance(s, str) for hook in facts["hooks"] for s in hook["symbols"])


def replaced(metadata, change):
    """Return a trace's metadata with other values, its checksum right again."""
    text = json.dumps(json.loads(metadata["pfntrace"]) | change)
    return {"pfntrace": text, "pfntrace.crc": f"{zlib.crc32(text.encode()):08x}"}


@pytest.mark.parametrize("text", ["[" * 100_000, "{}", "7", '{"schema_version": 1}', "\x00", "NaN"])
def test_a_head_that_is_no_description_is_refused(tmp_path, text):
    path = tmp_path / "x.pfnt"
    metadata = {"pfntrace": text, "pfntrace.crc": f"{zlib.crc32(text.encode()):08x}"}
    with pa.ipc.new_stream(path, schema.arrow_schema(metadata)):
        pass
    with refused():
        TraceReader(path)


# --- cut and damaged ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small trace, its bytes and its records' keys."""
    path = tmp_path_factory.mktemp("small") / "small.pfnt"
    write_trace(path, [group(count=2, kinds=["FAULT"])])
    keys, reason = read_keys(path)
    assert not reason
    return path, path.read_bytes(), keys


def test_cut_at_every_byte_a_trace_is_a_prefix_with_a_reason(small, tmp_path):
    _, data, keys = small
    path = tmp_path / "cut.pfnt"
    path.write_bytes(data)
    lengths, refusals = set(), 0
    for size in reversed(range(len(data))):
        os.truncate(path, size)
        try:
            found, reason = read_keys(path)
        except TraceFormatError as err:
            assert "\n" not in str(err)
            refusals += 1
            continue
        assert found == keys[: len(found)]
        assert reason.startswith(("truncated at byte", "no end mark"))
        lengths.add(len(found))
    assert lengths == {0, 2, 3}  # nothing, the faults, the faults and the end mark
    assert 0 < refusals < len(data) / 2


def test_changed_at_every_byte_a_trace_is_refused_or_a_prefix_with_a_reason(small, tmp_path):
    _, data, keys = small
    path = tmp_path / "flip.pfnt"
    path.write_bytes(data)
    file = os.open(path, os.O_RDWR)
    try:
        for at, byte in enumerate(data):
            os.pwrite(file, bytes([byte ^ 1 << at % 8]), at)
            try:
                found, reason = read_keys(path)
            except TraceFormatError as err:
                assert "\n" not in str(err)
            else:
                assert reason, f"byte {at}"
                assert found == keys[: len(found)]
            os.pwrite(file, bytes([byte]), at)
    finally:
        os.close(file)
    assert read_keys(path) == (keys, "")


def test_records_and_info_agree_with_the_reason_where_a_body_is_damaged(tmp_path):
    # GIVEN three flushes, one bit changed in the middle of the second one's SPTE batch
    path = write_trace(tmp_path / "x.pfnt", [group(n) for n in range(3)])
    with TraceReader(path) as reader:
        whole = rows_of(reader.records())
        block = [b for b in reader._scan.blocks if b.kind == "SPTE"][1]
    flip(path, block.offset + block.head_size + 100)
    with TraceReader(path) as reader:
        # WHEN only heads were read THEN the damage is not known yet
        assert reader.info()["complete"]
        # WHEN all is read THEN it is, and what came before in time is there
        found = rows_of(reader.records())
        assert found == whole[: len(found)]
        assert [r["ts"] < block.ts_min for r in whole].count(True) == len(found)
        assert reader.reason == f"damaged at byte {block.offset}: its checksum is wrong"
        facts = reader.info()
        assert not facts["complete"] and facts["reason"] == reader.reason
        assert facts["records"] == 15  # three batches of five before the damaged one
        # kinds that are not damaged can be read to their end
        assert len(rows_of(reader.records(["FAULT"]))) == 15
    with TraceReader(path) as reader:
        assert not reader.info(verify=True)["complete"]


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_a_damaged_end_mark_is_noticed_by_info_alone(tmp_path):
    path = write_trace(tmp_path / "x.pfnt")
    with TraceReader(path) as reader:
        end = reader._scan.blocks[-1]
    flip(path, end.offset + end.head_size + 60)
    facts = TraceReader(path).info()
    assert not facts["complete"] and facts["reason"].startswith(f"damaged at byte {end.offset}")
    assert facts["records"] == 10


def test_bytes_after_the_end_mark_are_noticed(tmp_path):
    path = write_trace(tmp_path / "x.pfnt")
    with open(path, "ab") as file:
        file.write(b"more")
    facts = TraceReader(path).info()
    assert (facts["complete"], facts["reason"]) == (False, "4 bytes follow the end mark")
    assert facts["records"] == 10


def test_a_batch_cut_out_of_the_middle_is_noticed(tmp_path):
    path = write_trace(tmp_path / "x.pfnt", [group(n) for n in range(3)])
    with TraceReader(path) as reader:
        block = reader._scan.blocks[2]
    data = path.read_bytes()
    path.write_bytes(data[: block.offset] + data[block.end :])
    facts = TraceReader(path).info()
    assert not facts["complete"] and facts["records"] == 10


# --- made to harm: checksums right, contents not --------------------------------------------------


def resigned(data, blocks):
    """Return the file with its batches' checksums made right again."""
    out, start = bytearray(data), zlib.crc32(data[: blocks[0].offset])
    for block in blocks:
        message = bytearray(out[block.offset : block.end])
        with contextlib.suppress(messages.Malformed):
            messages.sign(message, start)
        out[block.offset : block.end] = message
        start = 0
    return bytes(out)


def read_all(path):
    """Read everything every way; return the number of records and the reason."""
    with TraceReader(path) as reader:
        rows = rows_of(reader.batches())
        list(reader.records(["FAULT"]))
        json.dumps(reader.info(verify=True))
        return len(rows), reader.reason


HUGE = [b"\xff" * 8, b"\x7f" * 8, (1 << 40).to_bytes(8, "little"), (1 << 61).to_bytes(8, "little")]


def test_wrong_numbers_with_right_checksums_never_crash_or_allocate(small, tmp_path):
    # GIVEN every eighth byte of the head of a batch, and of the first buffers' sizes
    _, data, _ = small
    path = tmp_path / "x.pfnt"
    path.write_bytes(data)
    with TraceReader(path) as reader:
        blocks = reader._scan.blocks
    first = blocks[0]
    spots = range(first.offset, first.offset + first.head_size + 512, 8)
    reasons = set()
    for number, at in enumerate(spots):
        # WHEN it is replaced by a large number
        harmful = bytearray(data)
        harmful[at : at + 8] = HUGE[number % len(HUGE)]
        path.write_bytes(resigned(bytes(harmful), blocks))
        # THEN the answer is one line or a reason
        try:
            reasons.add(read_all(path)[1].partition(": ")[2])
        except PfntraceError as err:
            assert "\n" not in str(err)
    # and Arrow was not asked for more than a batch needs
    assert pa.default_memory_pool().max_memory() < 256 << 20
    assert {
        "a column outside of its batch",
        "a column whose size is not that of its rows",
        "columns of different length",
        "more nulls than rows",
    } <= reasons


def test_names_of_impossible_size_are_refused(small, tmp_path):
    # GIVEN each eight bytes of the dictionaries
    _, data, _ = small
    path = tmp_path / "x.pfnt"
    path.write_bytes(data)
    with TraceReader(path) as reader:
        blocks, begin = reader._scan.blocks, len(reader._schema_message)
    reasons = set()
    for number, at in enumerate(range(begin, blocks[0].offset, 8)):
        harmful = bytearray(data)
        harmful[at : at + 8] = HUGE[number % len(HUGE)]
        path.write_bytes(resigned(bytes(harmful), blocks))
        reasons.add(read_all(path)[1].partition(": ")[2])
    assert {"names of impossible length", "names outside of their message"} <= reasons


@pytest.fixture
def forge(tmp_path):
    """Return a function that writes one batch, whatever it is, and gives the reader's reason."""

    def write(batch, kind="NOTE"):
        path = tmp_path / "forged.pfnt"
        path.unlink(missing_ok=True)
        writer = TraceWriter(path, meta())
        writer._write_batch(kind, batch(writer._maker) if callable(batch) else batch)
        writer.close({})
        return read_all(path)

    return write


def with_column(batch, name, array):
    at = batch.schema.get_field_index(name)
    arrays = list(batch.columns)
    arrays[at] = array
    return pa.RecordBatch.from_arrays(arrays, schema=batch.schema)


def test_a_name_out_of_range_is_damage(forge):
    def batch(maker):
        made = maker.rows("NOTE", {"ts": [1], "note": ["{}"]})
        names = made.column("op").dictionary
        wrong = pa.DictionaryArray.from_buffers(
            made.column("kind").type, 1, [None, pa.py_buffer(b"\x7f")], names
        )
        return with_column(made, "op", wrong)

    rows, reason = forge(batch)
    assert rows == 0 and reason.endswith("Arrow cannot read it")


def test_text_that_is_no_unicode_is_damage(forge):
    def batch(maker):
        made = maker.rows("NOTE", {"ts": [1], "note": ["ab"]})
        offsets = pa.py_buffer(np.array([0, 2], "i4"))
        wrong = pa.Array.from_buffers(pa.utf8(), 1, [None, offsets, pa.py_buffer(b"\xff\xfe")])
        return with_column(made, "note", wrong)

    rows, reason = forge(batch)
    assert rows == 0 and reason.endswith("Arrow cannot read it")


def test_offsets_of_text_that_lead_outside_are_damage(forge):
    def batch(maker):
        made = maker.rows("NOTE", {"ts": [1], "note": ["ab"]})
        offsets = pa.py_buffer(np.array([0, 2_000_000], "i4"))
        wrong = pa.Array.from_buffers(pa.utf8(), 1, [None, offsets, pa.py_buffer(b"ab")])
        return with_column(made, "note", wrong)

    with contextlib.suppress(pa.ArrowException, OSError):  # Arrow's writer may refuse it
        rows, reason = forge(batch)
        assert rows == 0 and reason


def test_rows_of_another_kind_than_the_head_says_are_damage(forge):
    rows, reason = forge(lambda maker: maker.records("SPTE", records("SPTE", 3)), kind="FAULT")
    assert rows == 0 and reason.endswith("other kinds than its head says")


def test_times_other_than_the_head_says_are_damage(tmp_path, monkeypatch):
    path = tmp_path / "x.pfnt"
    honest = messages.Tags.to_metadata
    monkeypatch.setattr(
        messages.Tags, "to_metadata", lambda tags: honest(tags) | {"pfntrace.ts": "5 6"}
    )
    write_trace(path)
    rows, reason = read_all(path)
    assert rows == 0 and reason.endswith("other times than its head says")


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        ("pfntrace.kind", "FAULTS"),
        ("pfntrace.kind", "\x1b[31m"),
        ("pfntrace.ts", "6 5"),
        ("pfntrace.ts", "-1 5"),
        ("pfntrace.ts", f"0 {1 << 64}"),
        ("pfntrace.ts", "1"),
        ("pfntrace.group", "x"),
        ("pfntrace.from", "8"),
        ("pfntrace.group", "9" * 65),
        ("pfntrace.crc", ""),
    ],
)
def test_tags_that_cannot_be_stop_the_reading_there(tmp_path, monkeypatch, tag, value):
    path = tmp_path / "x.pfnt"
    honest = messages.Tags.to_metadata
    monkeypatch.setattr(messages.Tags, "to_metadata", lambda tags: honest(tags) | {tag: value})
    with contextlib.suppress(messages.Malformed):
        write_trace(path, complete=False)
    rows, reason = read_all(path)
    assert rows == 0 and ("damaged" in reason or "no end mark" in reason)


def test_more_overlapping_batches_than_any_recorder_writes_are_refused(tmp_path, monkeypatch):
    path = write_trace(tmp_path / "x.pfnt", [group(0, count=50)] * 3)
    monkeypatch.setattr("tracer.timeorder.PENDING_ROWS_MAX", 100)
    with TraceReader(path) as reader, refused("100 records of the same time"):
        list(reader.records())


def test_a_file_that_becomes_shorter_while_it_is_read_is_cut_there(tmp_path):
    path = write_trace(tmp_path / "x.pfnt", [group(n) for n in range(3)])
    with TraceReader(path) as reader:
        assert reader.info()["complete"]
        os.truncate(path, reader._scan.blocks[2].offset + 10)
        assert len(rows_of(reader.batches())) == 10
        assert reader.reason.endswith("the file became shorter")


def test_a_file_that_is_changed_while_it_is_read_is_read_anew(tmp_path):
    path = write_trace(tmp_path / "x.pfnt", [group(n) for n in range(3)])
    with TraceReader(path) as reader:
        assert reader.info()["complete"] and len(rows_of(reader.batches())) == 31
        block = reader._scan.blocks[2]
        with path.open("r+b") as file:
            file.seek(block.end - 1)
            file.write(b"\xff")
        os.utime(path, ns=(1, 1))  # a clock may tick too seldom to tell
        assert len(rows_of(reader.batches())) == 10
        assert reader.info()["reason"].startswith(f"damaged at byte {block.offset}")


def test_a_trace_that_is_too_long_to_be_kept_is_read_the_same(tmp_path, monkeypatch):
    path = write_trace(tmp_path / "x.pfnt", [group(n) for n in range(3)])
    with TraceReader(path) as reader:
        kept, info = rows_of(reader.batches()), reader.info()
    monkeypatch.setattr("tracer.tracereader._KEPT_ROWS", 30)
    with TraceReader(path) as reader:
        assert rows_of(reader.batches()) == kept and reader.info() == info
        assert not reader._kept._batches


def test_a_reader_that_was_closed_says_so_in_one_line(tmp_path):
    reader = TraceReader(write_trace(tmp_path / "x.pfnt"))
    reader.close()
    with refused("cannot be read"):
        reader.info()


def test_a_name_that_stands_for_two_numbers_is_damage(tmp_path):
    results = {"results": {"0": "fixed", "5": "fixed"}}
    path = write_trace(tmp_path / "x.pfnt", [group()], profile=results)
    with TraceReader(path) as reader:
        assert not list(reader.records(["FAULT"]))
        assert "stands for two numbers" in reader.info()["reason"]


@pytest.mark.parametrize("start", [-1, 2**63, 10**30])
def test_a_beginning_at_no_time_is_refused(tmp_path, start):
    path = write_trace(tmp_path / "x.pfnt", [], start_monotonic_ns=start)
    with refused("no time"):
        TraceReader(path)
