"""Records as lines and as JSON: readable, within their width, and harmless to a terminal."""

import json
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.records import START_NS, group, meta, records, write_trace

from probes import wire
from probes.errors import UsageError
from tracer import schema
from tracer.dump import LINE_MAX, dump_json, dump_lines
from tracer.tracefile import TraceReader, TraceWriter

ALL_ONES = (1 << 64) - 1


@pytest.fixture(autouse=True, scope="module")
def terminal():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("COLUMNS", "80")
        yield


def lines_of(path, kinds=None, gfns=None, limit=None):
    with TraceReader(path) as reader:
        return list(dump_lines(reader, kinds, gfns, limit))


def objects_of(path, kinds=None, gfns=None, limit=None):
    with TraceReader(path) as reader:
        return [json.loads(line) for line in dump_json(reader, kinds, gfns, limit)]


@pytest.fixture
def line(tmp_path):
    """Return a function that gives the line of one record, without its time, cpu and vCPU."""

    def show(kind, **fields):
        path = tmp_path / "one.pfnt"
        path.unlink(missing_ok=True)
        write_trace(path, [[(kind, records(kind, 1, **fields))]])
        return re.sub(r"^ *\S+ \[...\] \S+ +", "", lines_of(path, [kind])[0])

    return show


# --- what must not happen -------------------------------------------------------------------------


def test_a_kind_that_does_not_exist_is_answered_with_those_that_do(tmp_path):
    path = write_trace(tmp_path / "x.pfnt")
    for dump in (lines_of, objects_of):
        with pytest.raises(UsageError, match=f"'fault'; there are {' '.join(schema.FILE_KINDS)}$"):
            dump(path, ["fault"])


def test_control_characters_of_a_trace_never_reach_the_terminal(tmp_path):
    # GIVEN notes and names with escape sequences, line feeds, DEL, C1 codes and direction marks
    evil = "\x1b[2J\n\r\x07\x7f\x9b\u202e\u2028\ud800"
    path = tmp_path / "x.pfnt"
    writer = TraceWriter(path, meta(profile={"results": {"5": evil[:-1]}}))
    writer.write_note({"path": evil, evil: 1})
    text = f'{{"raw": "{evil[:-1]}"'  # no JSON, so shown as it is
    writer._notes.append((START_NS, text))
    writer.write_group([("FAULT", records("FAULT", 1))])
    writer.close({})
    # THEN neither form of output holds any of them
    with TraceReader(path) as reader:
        shown = [*dump_lines(reader, None, None, None), *dump_json(reader, None, None, None)]
    assert len(shown) == 8
    for text in shown:
        assert text.isprintable()
        assert not re.search(r"[\x00-\x1f\x7f-\x9f\u202e\u2028\ud800]", text)
    assert any(r"\x1b[2J\n\r\x07\x7f" in text for text in shown)


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(schema.RECORD_KINDS),
    random=st.randoms(use_true_random=False),
)
def test_records_of_any_content_have_a_line_of_limited_width(tmp_path_factory, kind, random):
    dtype = wire.FAULT if kind == "FAULT" else wire.EVENT
    array = np.frombuffer(random.randbytes(4 * dtype.itemsize), dtype)
    path = write_trace(tmp_path_factory.mktemp("any") / "x.pfnt", [[(kind, np.sort(array))]])
    lines = lines_of(path)
    assert len(lines) == 5 and all(len(text) <= LINE_MAX and text.isprintable() for text in lines)
    assert [r["kind"] for r in objects_of(path)].count(kind) == 4


def test_a_note_that_is_no_json_or_nested_too_deeply_is_shown_as_text(tmp_path):
    path = tmp_path / "x.pfnt"
    writer = TraceWriter(path, meta())
    for text in ("no json", "[" * 50_000, "[" * 200 + "]" * 200, '{"x": NaN}'):
        writer._notes.append((START_NS, text))
    writer.close({})
    notes = [row["note"] for row in objects_of(path)]
    assert notes[:3] == ["no json", "[" * 50_000, "[" * 200 + "]" * 200]
    assert notes[3] == {"x": "NaN"}


def test_a_damaged_trace_is_dumped_up_to_the_damage(tmp_path):
    path = write_trace(tmp_path / "x.pfnt", [group(n) for n in range(3)])
    whole = lines_of(path)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    cut = lines_of(path)
    assert 0 < len(cut) < len(whole) and cut == whole[: len(cut)]


# --- lines ----------------------------------------------------------------------------------------


def test_a_line_begins_with_time_cpu_and_vcpu(tmp_path):
    fields = {"h__ts": START_NS + 123_456_789, "h__cpu": 1, "h__vcpu": 0}
    early = {"h__ts": START_NS - 1_500, "h__cpu": 12, "h__vm": 0}
    flush = [("FAULT", records("FAULT", 1, **fields)), ("VM", records("VM", 1, **early))]
    path = write_trace(tmp_path / "x.pfnt", [flush])
    vm, fault, note = lines_of(path)
    assert fault.startswith("    0.123456 [001] vm1/0  FAULT gfn=0x")
    assert vm.startswith("   -0.000002 [012] -      VM create owner=4242")
    assert note.startswith('    3.000000 [---] -      NOTE {"end"') and len(note) <= LINE_MAX
    assert note.endswith(" …")


LONG = {"gfn": 0x1000_0000_1234, "pfn": 0x12_3456_7890, "walk_pfn": 0x12_3456_7890, "slot": 1,
        "refcounted": 1, "page__refcount": 1_234_567, "page_end__refcount": 1_234_566,
        "h__fault_ts": START_NS, "h__ts": START_NS + 7_123_000}  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "most"), [("0", 120), ("80", 120), ("nonsense", 120), ("130", 130)]
)
def test_a_line_that_is_too_long_ends_with_a_whole_word(tmp_path, monkeypatch, columns, most):
    monkeypatch.setenv("COLUMNS", "400")
    path = write_trace(tmp_path / "x.pfnt", [[("FAULT", records("FAULT", 1, **LONG))]])
    whole = lines_of(path)[0]
    assert len(whole) > 130 and "…" not in whole and whole.split()[-1] == "7.12ms"
    # WHEN the terminal is narrow, or of no known width
    monkeypatch.setenv("COLUMNS", columns)
    shown = lines_of(path)[0]
    # THEN it holds whole words of the line, as many as fit, and a sign that there are more
    assert shown.endswith(" …") and len(shown) <= most
    words = shown.split()[:-1]
    assert words == whole.split()[: len(words)]
    assert len(shown) + len(whole.split()[len(words)]) >= most


def test_a_wide_terminal_shows_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    path = write_trace(tmp_path / "x.pfnt", [[("FAULT", records("FAULT", 1, **LONG))]])
    assert "…" not in lines_of(path)[0]


FAULT = {"gfn": 0x1234, "pfn": 0x5678, "h__ts": START_NS + 50_000, "h__fault_ts": START_NS + 5_000}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        (
            {"t_faultin": 1_000, "t_faultin_end": 13_300},
            "FAULT gfn=0x1234 w fixed 4K pfn=0x5678 ref 3→2 faultin 12.3µs total 45µs",
        ),
        (
            {"error_code": 1 << 4, "refcounted": 1, "t_faultin": wire.NEVER_REACHED},
            "FAULT gfn=0x1234 x fixed 4K pfn=0x5678 counted ref 3→2 total 45µs",
        ),
        (
            {"error_code": 0, "ret": -14, "pfn": 0x7FF << 52, "page__bits": 0, "t_map": 0}
            | {"t_faultin": wire.NEVER_REACHED},
            "FAULT gfn=0x1234 r -EFAULT 4K pfn=error0 no-page total 45µs",
        ),
        (
            {"walk_pfn": 0x99, "refcounted": 0, "level": 2, "page_end__bits": 0}
            | {"t_faultin": 0, "t_faultin_end": 2_500_000, "h__fault_ts": START_NS - 7 * 10**9},
            "FAULT gfn=0x1234 w fixed 2M pfn=0x5678 walk=0x99 uncounted ref 3"
            " faultin 2.5ms total 7s",
        ),
        (
            {"pfn": 1 << 63, "ret": 9, "prefetch": 1, "t_faultin": wire.NEVER_REACHED}
            | {"h__fault_ts": START_NS + 49_100, "level": 0},
            "FAULT gfn=0x1234 w prefetch ret_9 pfn=noslot ref 3→2 total 900ns",
        ),
    ],
)
def test_a_fault_reads(line, fields, expected):
    assert line("FAULT", **(FAULT | fields)) == expected


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        (
            "SPTE",
            {"gfn": 0x10, "pfn": 0x20},
            "SPTE install gfn=0x10 4K pfn=0x20 cause=fault ref 2",
        ),
        (
            "SPTE",
            {"gfn": 0x200, "h__op": 12, "level": 2, "mmu": 2, "as_id": 1, "a": 0x86B, "b": 0x869},
            "SPTE change gfn=0x200 2M cause=fault shadow as=1 0x86b→0x869",
        ),
        ("RELEASE", {"pfn": 0x20, "gfn": 0}, "RELEASE page_clean pfn=0x20 ref 2"),
        ("RELEASE", {"pfn": 0x20, "gfn": 1}, "RELEASE page_clean pfn=0x20 gfn=0x1 ref 2"),
        (
            "INVALIDATE",
            {"a": 0x1000, "b": 0x3000},
            "INVALIDATE start clear 0x1000-0x3000 seq=8 in_progress=1",
        ),
        ("PAGE_FREE", {"pfn": 0x20, "d": 3}, "PAGE_FREE pfn=0x20 order=3 ref 2"),
        (
            "PIN",
            {"gfn": 1, "pfn": 2, "b": 0, "d": 0xFFFFFFF4},
            "PIN map gfn=0x1 pfn=0x2 hva=- -ENOMEM ref 2",
        ),
        ("SLOT", {"b": 0x7000}, "SLOT create id=3 gfn=0x0-0x3ffff hva=0x7000 flags=0x0"),
        ("SLOT", {"h__op": 4, "a": 0, "b": 0}, "SLOT delete id=3 gfn=0x0 hva=- flags=0x0"),
        ("VM", {}, "VM create owner=4242"),
        (
            "VMA",
            {"a": 0x1000, "b": 0x2000, "c": 0x400, "d": 226 << 20 | 128},
            "VMA seen 0x1000-0x2000 flags=0x400 dev=226:128",
        ),
    ],
)
def test_an_event_reads(line, kind, fields, expected):
    assert line(kind, **fields) == expected


def test_losses_and_notes_have_lines(tmp_path):
    path = tmp_path / "x.pfnt"
    writer = TraceWriter(path, meta())
    writer.write_losses({"FAULT": [(9, 2, 1, 0)]}, ts=START_NS)
    writer.write_note({"slot": {"id": 3}}, ts=START_NS)
    writer.close({}, ts=START_NS)
    assert lines_of(path, ["LOSS"]) == [
        "    0.000000 [000] -      LOSS FAULT produced 9 lost 2 filtered 1 torn 0"
    ]
    assert lines_of(path, ["NOTE"])[0] == '    0.000000 [---] -      NOTE {"slot": {"id": 3}}'


# --- what is chosen -------------------------------------------------------------------------------


def test_lines_come_in_order_of_time_and_only_so_many(tmp_path):
    path = write_trace(tmp_path / "x.pfnt", [group(n, count=300) for n in (1, 0)])
    everything = lines_of(path)
    times = [float(text.split()[0]) for text in everything]
    assert times == sorted(times) and len(times) == 1201
    for limit in (0, 1, 256, 300, 5000):
        assert lines_of(path, limit=limit) == everything[:limit]


def test_guest_frames_choose_leaves_and_slots_that_cover_them(tmp_path):
    flush = [
        ("FAULT", records("FAULT", 3, gfn=[0x3FF, 0x400, 0x410], level=[1, 1, 2])),
        ("SPTE", records("SPTE", 3, gfn=[0x200, 0x300, 0x40000], level=[2, 3, 3])),
        ("SLOT", records("SLOT", 2, gfn=[0x0, 0x405], a=[0x405, 1])),
        ("RELEASE", records("RELEASE", 2, gfn=[0, 0x405])),
        ("PAGE_FREE", records("PAGE_FREE", 1)),
    ]
    path = write_trace(tmp_path / "x.pfnt", [flush])
    found = [(row["kind"], row["gfn"]) for row in objects_of(path, gfns=(0x400, 0x405))]
    # A fault at level 2 touched one frame; a leaf at level 3 covers a quarter of a million.
    assert sorted(found) == [
        ("FAULT", 0x400),
        ("RELEASE", 0x405),
        ("SLOT", 0x0),
        ("SLOT", 0x405),
        ("SPTE", 0x300),
    ]
    assert lines_of(path, ["PAGE_FREE"], (0, 1 << 51)) == []


def test_json_has_the_columns_of_its_kind_and_a_note_s_own_object(tmp_path):
    path = tmp_path / "x.pfnt"
    writer = TraceWriter(path, meta())
    writer.write_note({"slot": {"id": 3}}, ts=START_NS)
    writer.write_group([("FAULT", records("FAULT", 1, gfn=7, pfn=ALL_ONES))])
    writer.close({}, ts=START_NS + 10**9)
    note, fault, end = objects_of(path)
    assert note == {"ts": START_NS, "kind": "NOTE", "note": {"slot": {"id": 3}}}
    assert tuple(fault) == schema.columns_of_kind("FAULT")
    assert (fault["gfn"], fault["pfn"], fault["result"]) == (7, None, "fixed")
    assert end["note"]["end"] == {}
