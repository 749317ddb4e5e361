"""Records as numpy arrays: nulls, names, bits, and a page's fields by frame number."""

import numpy as np
import pytest
from unit.records import records, write_trace
from unit.tracekit import SHIPPED

from analysis.columns import NULLS, Records, code, codes
from analysis.pagemap import FRAMES_MAX, PageMap
from tracer.schema import COLUMNS, columns_of_kind
from tracer.tracefile import TraceReader

TTM = SHIPPED / "ttm-7.3.pfnt"


def of_kind(path, kind, columns=None):
    with TraceReader(path) as reader:
        return Records(kind, list(reader.records([kind], columns or columns_of_kind(kind))))


@pytest.mark.parametrize("kind", ["FAULT", "SPTE", "RELEASE", "INVALIDATE", "PIN", "SLOT", "VM"])
def test_every_column_is_the_file_s_with_nulls_as_numbers(kind):
    # GIVEN the values as Arrow has them
    path = TTM if kind != "PIN" else SHIPPED / "nested-6.12.pfnt"
    found = of_kind(path, kind)
    with TraceReader(path) as reader:
        rows = [row for batch in reader.records([kind]) for row in batch.to_pylist()]
    assert len(found) == len(rows) > 0
    names = {c.name for c in COLUMNS if c.names}
    for name in columns_of_kind(kind):
        if name in names or name in ("kind", "note"):
            continue
        # THEN they are the same, or the null of that column
        expected = [NULLS.get(name, 0) if row[name] is None else row[name] for row in rows]
        assert [int(v) for v in found[name]] == [int(v) for v in expected], name
        assert found.known(name).tolist() == [row[name] is not None for row in rows], name


def test_a_name_is_its_number():
    found = of_kind(TTM, "SPTE")
    with TraceReader(TTM) as reader:
        ops = [row["op"] for batch in reader.records(["SPTE"]) for row in batch.to_pylist()]
    assert (found["op"] == code("op", "zap")).tolist() == [op == "zap" for op in ops]
    both = codes("op", "zap", "install")
    assert np.isin(found["op"], both).all()


def test_a_column_that_the_kind_does_not_fill_is_a_mistake_of_the_program():
    with pytest.raises(KeyError, match="SPTE records have no column call"):
        of_kind(TTM, "SPTE")["call"]


def test_no_records_have_columns_too():
    nothing = Records("FAULT")
    assert len(nothing) == 0
    assert nothing["pfn"].dtype == np.uint64 and nothing["prefetch"].dtype == np.bool_
    assert nothing.table(["pfn", "op" if "op" in columns_of_kind("FAULT") else "ts"]).num_rows == 0


def test_slices_of_batches_are_read_where_they_begin(tmp_path):
    # GIVEN a batch of which a part is taken, which begins amid a byte of its bits
    path = write_trace(tmp_path / "t.pfnt", [[("FAULT", records("FAULT", 50))]])
    with TraceReader(path) as reader:
        batch = next(iter(reader.records(["FAULT"], ["ts", "pfn", "writable", "slot", "hva"])))
    whole = Records("FAULT", [batch])
    parts = Records("FAULT", [batch.slice(3, 10), batch.slice(13, 37)])
    for name in ("pfn", "writable", "slot", "hva"):
        assert (parts[name] == whole[name][3:]).all()
        assert (parts.known(name) == whole.known(name)[3:]).all()
    # AND rows are found in either part
    assert [row["pfn"] for row in parts.rows([0, 10, 46])] == whole["pfn"][[3, 13, 49]].tolist()


# --- pages by frame number ------------------------------------------------------------------------


def test_a_page_keeps_its_fields_when_others_are_met():
    pages = PageMap({"count": np.int32})
    first = pages.at(np.array([5, 600, 5], np.uint64), add=True)
    pages["count"][first] = [1, 2, 1]
    far = pages.at(np.array([1 << 30, 5], np.uint64), add=True)
    pages["count"][far[:1]] = 9
    at = pages.at(np.array([600, 5, 1 << 30], np.uint64))
    assert pages["count"][at].tolist() == [2, 1, 9]
    assert pages.frames(at).tolist() == [600, 5, 1 << 30]


def test_a_page_that_was_never_met_has_no_place():
    pages = PageMap({"count": np.int32})
    pages.at(np.array([5], np.uint64), add=True)
    asked = np.array([4096, (1 << 64) - 1, FRAMES_MAX], np.uint64)
    assert pages.at(asked).tolist() == [-1, -1, -1]


def test_device_memory_and_error_values_are_not_kept():
    pages = PageMap({"count": np.int32})
    asked = np.array([FRAMES_MAX, (1 << 64) - 1], np.uint64)
    assert pages.at(asked, add=True).tolist() == [-1, -1] and len(pages) == 0


def test_pages_beyond_the_limit_are_counted_not_kept():
    pages = PageMap({"count": np.int8}, most=1024)
    asked = np.arange(0, 4 * 512, 512, dtype=np.uint64)
    at = pages.at(asked, add=True)
    assert (at >= 0).tolist() == [True, True, False, False]
    assert pages.refused == 2 and len(pages) == 1024
