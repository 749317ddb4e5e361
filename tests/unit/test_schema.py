"""The columns: what is null, what has a name, and that nothing of a record is forgotten."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.records import RESULTS, records

from probes import wire
from tracer import columns, schema
from tracer.columns import ROWS_MAX, ColumnMaker, columns_of

ROOT = Path(__file__).resolve().parents[2]
ALL_ONES = (1 << 64) - 1

#: Fields of the wire that no column shows, and why that loses nothing.
NOT_SHOWN = {
    "h.kind": "the column kind says it, by name",
    "page_end.order": "the order of a page cannot change while it is held",
}


def one(kind, **fields):
    """Return the row of one record whose fields are zero but for these."""
    record = np.zeros(1, wire.FAULT if kind == "FAULT" else wire.EVENT)
    for name, value in fields.items():
        *path, last = name.split("__")
        target = record
        for step in path:
            target = target[step]
        target[last] = value
    return ColumnMaker(RESULTS).records(kind, record).to_pylist()[0]


def dtype_of(kind):
    return wire.FAULT if kind == "FAULT" else wire.EVENT


def paths(dtype, prefix=""):
    """Yield the paths of all fields of a record that hold one number."""
    for name in dtype.names:
        inner = dtype[name]
        if inner.names:
            yield from paths(inner, f"{prefix}{name}.")
        elif name != "pad":
            yield prefix + name


# --- the declaration ------------------------------------------------------------------------------


def test_more_rows_than_a_batch_may_have_are_a_bug():
    with pytest.raises(ValueError, match="at most"):
        columns_of("SPTE", np.zeros(ROWS_MAX + 1, wire.EVENT))


def test_every_source_is_a_field_of_the_wire():
    for column in schema.COLUMNS:
        for kind, source in column.sources.items():
            if source.field:
                known = set(paths(dtype_of(kind)))
                assert source.field in known, (column.name, kind)
                assert not source.null_field or source.null_field in known


def test_every_field_of_a_fault_is_in_a_column():
    shown = {c.sources["FAULT"].field for c in schema.COLUMNS if "FAULT" in c.sources}
    assert set(paths(wire.FAULT)) - shown - {"h.op"} == set(NOT_SHOWN)


def test_every_field_of_the_other_kinds_is_in_a_column_of_some_kind():
    shown = {c.sources[k].field for c in schema.COLUMNS for k in c.kinds if k != "FAULT"}
    assert set(paths(wire.EVENT)) - shown - {"h.kind"} == set()


def test_every_column_says_what_it_means():
    names = [c.name for c in schema.COLUMNS]
    assert len(set(names)) == len(names)
    for column in schema.COLUMNS:
        assert column.doc.endswith((".", "?")), column.name
        assert column.kinds, column.name
        assert set(column.sources) <= set(schema.FILE_KINDS)
        assert column.names in ("", "result", *schema.NAMES)


def test_names_fit_into_the_int8_that_stands_for_them():
    for names in (*schema.NAMES.values(), schema.result_names(RESULTS)):
        assert len(names) <= 127 and len(set(names)) == len(names)


def test_the_reference_has_a_line_for_every_column():
    lines = schema.reference().splitlines()
    assert [line.split("`")[1] for line in lines[2:]] == [c.name for c in schema.COLUMNS]
    assert {line.replace("\\|", "").count("|") for line in lines} == {6}


def test_kinds_know_their_columns():
    assert "t_gup" in schema.columns_of_kind("FAULT")
    assert "t_gup" not in schema.columns_of_kind("SPTE")
    assert schema.columns_of_kind("NOTE") == ("ts", "kind", "note")
    assert schema.columns_of_kind("no kind") == ()


# --- what is null, what has a name ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"t_map": wire.NEVER_REACHED, "t_gup": 0}, {"t_map": None, "t_gup": 0}),
        ({"hva": 0, "pfn": ALL_ONES}, {"hva": None, "pfn": None}),
        ({"hva": 4096, "pfn": 0}, {"hva": 4096, "pfn": 0}),
        ({"walk_pfn": ALL_ONES, "vm_flags": 0}, {"walk_pfn": None, "vm_flags": None}),
        ({"walk_pfn": 5, "vm_flags": 0x400}, {"walk_pfn": 5, "vm_flags": 0x400}),
        ({"h__vcpu": -1, "h__stack": -1}, {"vcpu": None, "stack": None}),
        ({"h__vcpu": 0, "h__stack": 0}, {"vcpu": 0, "stack": 0}),
        ({"h__fault_ts": 0}, {"fault_ts": None}),
        ({"h__ts": 90, "h__fault_ts": 40}, {"dur": 50}),
        ({"h__ts": 40, "h__fault_ts": 90}, {"dur": -50}),
        ({"slot": -1}, {"slot": None}),
        ({"refcounted": 2}, {"refcounted": None}),
        ({"refcounted": 1}, {"refcounted": True}),
        ({"refcounted": 0}, {"refcounted": False}),
        ({"writable": 1, "prefetch": 1}, {"writable": True, "prefetch": True}),
        ({"ret": 5}, {"ret": 5, "result": "fixed"}),
        ({"ret": -14}, {"ret": -14, "result": "error"}),
        ({"ret": 7}, {"ret": 7, "result": "ret_7"}),
        ({"ret": 1 << 30}, {"ret": 1 << 30, "result": "ret_more"}),
        ({"mmu": 0}, {"mmu": None}),
        ({"mmu": 2}, {"mmu": "shadow"}),
        ({"mmu": 200}, {"mmu": None}),
        ({"page__refcount": 3}, {"refcount": None, "page_bits": None, "page_order": None}),
        (
            {"page__bits": 1, "page__refcount": 3, "page__mapcount": -1, "page__order": 9},
            {"page_bits": 1, "refcount": 3, "mapcount": -1, "page_order": 9, "refcount_end": None},
        ),
        ({"page_end__bits": 1, "page_end__refcount": 2}, {"refcount_end": 2, "refcount": None}),
        ({}, {"op": None, "kind": "FAULT", "hva_end": None, "note": None, "lost": None}),
    ],
)
def test_a_fault_shows(fields, expected):
    row = one("FAULT", **fields)
    assert {name: row[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("kind", "fields", "expected"),
    [
        ("SPTE", {"h__op": 13, "cause": 0}, {"op": "zap", "cause": "other", "gfn": 0}),
        ("SPTE", {"a": 1, "b": 2, "c": 0}, {"old": 1, "new": 2, "sptep": None}),
        ("SPTE", {"cause": 99, "h__op": 99}, {"cause": None, "op": None}),
        ("SPTE", {"d": 7, "pfn": ALL_ONES}, {"slot": None, "ret": None, "pfn": None}),
        ("RELEASE", {"cause": 4, "gfn": 0}, {"call": "page_dirty", "cause": None, "gfn": None}),
        ("RELEASE", {"gfn": 3, "cause": 0}, {"gfn": 3, "call": None}),
        ("INVALIDATE", {"a": 0, "b": ALL_ONES}, {"hva": 0, "hva_end": ALL_ONES}),
        (
            "INVALIDATE",
            {"cause": 0, "c": 5, "d": 1, "h__op": 2},
            {"event": "unmap", "invalidate_seq": 5, "in_progress": 1, "op": "end", "cause": None},
        ),
        ("PAGE_FREE", {"pfn": 8, "d": 9}, {"pfn": 8, "order": 9, "gfn": None, "page_bits": None}),
        ("PAGE_ALLOC", {"page__bits": 1}, {"refcount": 0, "page_bits": 1, "refcount_end": None}),
        ("PIN", {"d": 0xFFFFFFF2, "b": 0, "h__op": 8}, {"ret": -14, "hva": None, "op": "map"}),
        ("PIN", {"gfn": 4, "b": 4096}, {"gfn": 4, "hva": 4096, "result": None}),
        (
            "SLOT",
            {"a": 16, "b": 4096, "c": 2, "d": 3, "h__op": 3},
            {"npages": 16, "hva": 4096, "slot_flags": 2, "slot": 3, "op": "create"},
        ),
        ("VM", {"a": 1 << 63, "d": 42}, {"kvm": 1 << 63, "vm_tgid": 42, "slot": None}),
        ("VMA", {"a": 1, "b": 2, "c": 0x400, "d": 0}, {"hva": 1, "vm_flags": 0x400, "rdev": None}),
    ],
)
def test_an_event_shows(kind, fields, expected):
    row = one(kind, **fields)
    assert row["kind"] == kind
    assert {name: row[name] for name in expected} == expected


def expected_value(column, source, record, kind):
    """Return what a cell must be, computed the slow way: one record, one field at a time."""

    def at(path):
        value = record
        for name in path.split("."):
            value = value[name]
        return int(value)

    if column.name == "kind":
        return kind
    if column.name == "dur":
        wrapped = (at("h.ts") - at("h.fault_ts")) & ALL_ONES
        return wrapped - (1 << 64) if wrapped >> 63 else wrapped
    bits = 8 if column.names or column.type == pa.bool_() else column.type.bit_width
    value = at(source.field)
    if source.null is not None:
        judged = at(source.null_field) if source.null_field else value
        size = 32 if source.null_field else bits
        if (judged - source.null) % (1 << size) == 0:
            return None
    if column.names == "result":
        names = schema.result_names(RESULTS)
        return names[0] if value < 0 else names[min(value + 1, len(names) - 1)]
    if column.names:
        names = schema.NAMES[column.names]
        return names[value] if value < len(names) else None
    if column.type == pa.bool_():
        return value != 0
    value %= 1 << bits
    signed = pa.types.is_signed_integer(column.type) and value >> (bits - 1)
    return value - (1 << bits) if signed else value


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(schema.RECORD_KINDS),
    count=st.integers(0, 9),
    random=st.randoms(use_true_random=False),
)
def test_records_of_any_content_become_what_the_declaration_says(kind, count, random):
    # GIVEN records with arbitrary bytes
    dtype = dtype_of(kind)
    array = np.frombuffer(random.randbytes(count * dtype.itemsize), dtype)
    # WHEN they become a batch
    batch = ColumnMaker(RESULTS).records(kind, array)
    # THEN it is a valid one, and every cell is what the declaration says of its record
    batch.validate(full=True)
    assert batch.schema.equals(schema.arrow_schema())
    for column in schema.COLUMNS:
        source = column.sources.get(kind)
        found = batch.column(column.name).to_pylist()
        if source is None:
            assert found == [None] * count
        else:
            assert found == [expected_value(column, source, r, kind) for r in array], column.name


def test_a_batch_of_the_largest_size_is_whole():
    array = records("FAULT", ROWS_MAX)
    batch = columns_of("FAULT", array)
    batch.validate(full=True)
    assert batch.column("gfn").to_numpy().tolist() == array["gfn"].tolist()
    assert batch.column("note").null_count == ROWS_MAX


def test_rows_of_the_recorder_itself_leave_all_else_null():
    maker = columns.ColumnMaker({})
    batch = maker.rows("LOSS", {"ts": [1, 2], "loss_kind": ["FAULT", "VM"], "lost": [0, 1 << 63]})
    batch.validate(full=True)
    rows = [{k: v for k, v in row.items() if v is not None} for row in batch.to_pylist()]
    assert rows == [
        {"ts": 1, "kind": "LOSS", "loss_kind": "FAULT", "lost": 0},
        {"ts": 2, "kind": "LOSS", "loss_kind": "VM", "lost": 1 << 63},
    ]


def test_writing_needs_neither_pandas_nor_arrow_s_compute_module():
    # Both may be installed; each costs seconds in the emulated lab.
    code = (
        "import sys, pathlib, tempfile\n"
        "from unit.records import group, write_trace\n"
        "path = pathlib.Path(tempfile.mkdtemp()) / 'x.pfnt'\n"
        "write_trace(path, [group()])\n"
        "from tracer.tracefile import TraceReader\n"
        "assert TraceReader(path).info()['complete']\n"
        "print([m for m in ('pandas', 'pyarrow.compute', 'polars') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
