"""Tables of a trace, and the mappings of the VM's process that they tell of."""

import numpy as np
import pandas as pd
import pytest

from analysis.mappings import Mappings, VmaMapping
from analysis.tables import chunks, largest_groups, load, parse_notes, stack
from probes import wire
from probes.errors import TraceFormatError
from tracer.schema import FILE_KINDS, SCHEMA_VERSION
from tracer.tracefile import TraceMeta, TraceReader, TraceWriter

BIG = (1 << 53) + 1
VMA_COLUMNS = ["vm", "hva", "hva_end", "vm_flags", "rdev"]
QXL_FLAGS = 0x4400
CARD0 = 226 << 20


def meta():
    return TraceMeta(
        schema_version=SCHEMA_VERSION,
        pfntrace_version="0",
        command=("pfntrace", "record"),
        start_unix_ns=0,
        start_monotonic_ns=0,
        hostname="",
        facts="{}",
        profile={"generation": "G0b", "results": {"5": "fixed"}},
    )


def faults(count, first=0):
    records = np.zeros(count, wire.FAULT)
    records["h"]["kind"] = wire.KINDS.index("FAULT")
    records["h"]["ts"] = np.arange(first, first + count)
    records["h"]["vcpu"] = -1
    records["gfn"] = BIG
    records["walk_pfn"] = (1 << 64) - 1
    records["ret"] = 5
    return records


@pytest.fixture
def trace(tmp_path):
    # Two groups whose times overlap, as those of two cpus may; and a note.
    path = tmp_path / "t.pfnt"
    writer = TraceWriter(path, meta())
    writer.write_group([("FAULT", faults(10, 5))])
    writer.write_group([("FAULT", faults(10))])
    writer.write_note({"vms": []}, ts=1)
    writer.close({}, ts=2)
    return path


def test_a_table_is_sorted_by_time_and_its_integers_are_exact(trace):
    tables = load(trace)
    table = tables["FAULT"]
    assert table["ts"].tolist() == sorted([*range(10), *range(5, 15)])
    assert set(table["gfn"]) == {BIG}
    assert table["vcpu"].isna().all() and table["walk_pfn"].isna().all()
    assert set(table["result"]) == {"fixed"}


def test_every_kind_has_a_table_with_its_columns_and_notes_are_apart(trace):
    tables = load(trace)
    assert set(tables.by_kind) == set(FILE_KINDS) - {"NOTE"}
    assert len(tables["SPTE"]) == 0 and "old" in tables["SPTE"] and "gfn" in tables["SPTE"]
    assert tables.notes[0] == {"vms": []}
    assert tables.info["records"] == 20


def test_chunks_are_short_and_have_only_what_was_asked_for(trace):
    with TraceReader(trace) as reader:
        found = list(chunks(reader, {"FAULT": ("ts", "gfn")}, rows_max=10))
    assert [(kind, len(table)) for kind, table in found] == [("FAULT", 10), ("FAULT", 10)]
    assert list(found[0][1]) == ["ts", "gfn"]


def test_damage_ends_all_kinds_at_the_same_place(tmp_path):
    # GIVEN a trace with a byte flipped behind its first batch: in that of some kind not asked for
    path = tmp_path / "damaged.pfnt"
    writer = TraceWriter(path, meta())
    writer.write_group([("FAULT", faults(10))])
    whole = writer.bytes_written
    releases = np.zeros(10, wire.EVENT)
    writer.write_group([("RELEASE", releases)])
    behind = writer.bytes_written
    writer.write_group([("FAULT", faults(10))])
    writer.close({})
    data = bytearray(path.read_bytes())
    data[(whole + behind) // 2] ^= 0xFF
    path.write_bytes(data)
    # WHEN
    with TraceReader(path) as reader:
        found = list(chunks(reader, {"FAULT": ("ts",)}))
        info = reader.info()
    # THEN the tables and the description speak of the same records
    assert [len(table) for _, table in found] == [10]
    assert info["records"] == 10 and info["reason"] and not info["complete"]


def test_a_file_that_is_no_trace_is_refused(tmp_path):
    path = tmp_path / "no.pfnt"
    path.write_text("no trace")
    with pytest.raises(TraceFormatError):
        load(path)


def test_notes_that_are_no_objects_are_left_out():
    deep = "[" * 100_000
    assert parse_notes(['{"a": 1}', "3", "null", "{", None, deep, '{"b": NaN}'])[0] == {"a": 1}


def test_tables_stack_whatever_is_empty():
    table = pd.DataFrame({"a": [1, 2]})
    assert stack([pd.DataFrame(), table, table])["a"].tolist() == [1, 2, 1, 2]
    assert list(stack([pd.DataFrame(), table.iloc[:0]])) == ["a"]


def test_only_the_largest_groups_are_made():
    table = pd.DataFrame({"slot": [1, None, 1, None, 2], "pages": [1, 5, 1, 5, 3]})
    groups = largest_groups(table, ["slot"], "pages", 2)
    assert [rows.index.tolist() for rows in groups] == [[1, 3], [4]]


# --- mappings -------------------------------------------------------------------------------------


def vmas(*rows):
    return pd.DataFrame(rows, columns=VMA_COLUMNS).astype("UInt64")


def slot_note(vm, start, end, path="/dev/dri/card0", flags=("io", "pf")):
    vma = {"start": start, "end": end, "path": path, "flags": list(flags)}
    return {"slot": {"vm": vm, "slot": 1}, "tgid": 7, "vmas": [vma]}


def found(mappings, *places):
    table = pd.DataFrame(places, columns=["vm", "hva"]).astype("UInt64")
    every = mappings.find_all(table)
    assert [mappings.find(vm, hva) for vm, hva in places] == every
    return every


def test_a_walked_mapping_has_the_path_of_its_device():
    note = {"device": {"rdev": CARD0, "path": "/dev/dri/card0"}}
    mappings = Mappings(vmas((1, 0x1000, 0x3000, QXL_FLAGS, CARD0)), [note])
    inside, behind, other = found(mappings, (1, 0x2FFF), (1, 0x3000), (2, 0x2000))
    assert inside == VmaMapping(1, 0x1000, 0x3000, ("VM_PFNMAP", "VM_IO"), "/dev/dri/card0")
    assert str(inside) == "/dev/dri/card0 (VM_PFNMAP, VM_IO)"
    assert behind is None and other is None


def test_a_device_without_a_note_is_named_by_number():
    (mapping,) = found(Mappings(vmas((1, 0, 8, 0x400, CARD0)), []), (1, 0))
    assert str(mapping) == "device 226:0 (VM_PFNMAP)"


def test_a_walked_mapping_without_a_device_takes_its_path_from_the_slot_s_note():
    notes = [slot_note(1, 0x1000, 0x2000, "/memory (deleted)")]
    (mapping,) = found(Mappings(vmas((1, 0x1000, 0x2000, 0x400, None)), notes), (1, 0x1800))
    assert str(mapping) == "/memory (deleted) (VM_PFNMAP)"


def test_a_mapping_of_which_nobody_knows_the_file_says_so():
    (mapping,) = found(Mappings(vmas((1, 0, 8, QXL_FLAGS, None)), []), (1, 0))
    assert str(mapping) == "a mapping whose file is not known (VM_PFNMAP, VM_IO)"


def test_the_slot_s_note_alone_is_enough_and_has_no_name_for_anonymous_memory():
    notes = [slot_note(1, 0x1000, 0x2000), slot_note(1, 0x2000, 0x3000, "", ())]
    device, anonymous = found(Mappings(vmas(), notes), (1, 0x1000), (1, 0x2000))
    assert str(device) == "/dev/dri/card0 (VM_PFNMAP, VM_IO)"
    assert str(anonymous) == "anonymous memory"


def test_of_two_mappings_at_an_address_the_later_one_is_right():
    # GIVEN a slot's note, then walks through two mappings of devices that nobody named
    mappings = Mappings(
        vmas((1, 0, 0x9000, 0x400, CARD0), (1, 0x4000, 0x5000, 0x4000, CARD0 + 1)),
        [slot_note(1, 0, 0x9000, "/dev/x")],
    )
    # WHEN
    names = [str(m) for m in found(mappings, (1, 0x3000), (1, 0x4000), (1, 0x5000))]
    # THEN the note names the first, being of the very same range, and not the second
    assert names == ["/dev/x (VM_PFNMAP)", "device 226:1 (VM_IO)", "/dev/x (VM_PFNMAP)"]


@pytest.mark.parametrize(
    "note",
    [
        {"slot": 5, "vmas": []},
        {"slot": {"vm": 1}, "vmas": {"start": 1}},
        {"slot": {"vm": 1}, "vmas": [3, {"start": "0", "end": 9}, {"start": 9, "end": 1}]},
        {"slot": {"vm": None}, "vmas": [{"start": 0, "end": 9, "path": "/x"}]},
        {"slot": {"vm": 1}, "vmas": [{"start": 0, "end": 1 << 70, "path": "/x"}]},
        {"device": {"rdev": "x", "path": 3}},
        {"device": []},
    ],
)
def test_notes_of_a_strange_shape_tell_nothing(note):
    assert found(Mappings(vmas(), [note]), (1, 4)) == [None]


def test_a_note_without_path_or_flags_still_tells_that_something_is_there():
    note = {"slot": {"vm": 1}, "vmas": [{"start": 0, "end": 9, "path": 3, "flags": "io"}]}
    assert [str(m) for m in found(Mappings(vmas(), [note]), (1, 4))] == [
        "a mapping whose file is not known"
    ]
