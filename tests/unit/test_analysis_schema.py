"""Declared tables: what does not fit is refused by name, what a trace gives fits."""

from pathlib import Path

import pandas as pd
import pytest

from analysis import schema
from analysis.findings import VERDICTS
from analysis.trace import open_trace
from probes.errors import PfntraceError, SchemaError
from tracer.schema import COLUMNS, FILE_KINDS

ROOT = Path(__file__).resolve().parents[2]
TRACE = ROOT / "tests/unit/traces/ttm-7.3.pfnt"


@pytest.fixture(scope="module")
def lives():
    return open_trace(TRACE).lives()


def refusal(name, frame):
    with pytest.raises(SchemaError) as caught:
        schema.check(name, frame)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_column_is_named(lives):
    assert "table lives lacks pfn" in refusal("lives", lives.drop(columns="pfn"))


def test_a_column_that_is_not_declared_is_named(lives):
    assert "table lives has unknown 'colour'" in refusal("lives", lives.assign(colour=1))


def test_columns_in_another_order_are_refused(lives):
    assert "another order" in refusal("lives", lives[reversed(lives.columns)])


def test_another_type_is_named_with_both(lives):
    wrong = refusal("lives", lives.astype({"gfn": "float64"}))
    assert "table lives, column gfn: is float64, not uint64" in wrong


def test_a_text_column_takes_no_numbers():
    frame = schema.empty("anomalies").assign(title=pd.Series([], dtype="int64"))
    assert "column title: is int64, not text" in refusal("anomalies", frame)


def test_other_categories_are_refused(lives):
    other = lives["ended_by"].cat.rename_categories({"zap": "gone"})
    assert "column ended_by: has other categories" in refusal("lives", lives.assign(ended_by=other))


def test_rows_out_of_order_are_refused(lives):
    assert "not in order of life_id" in refusal("lives", lives.iloc[::-1])
    same = pd.concat([lives.iloc[:2], lives.iloc[1:2]])
    assert schema.check("lives", same) is same


def test_rows_of_equal_time_go_by_cpu_and_number():
    faults = open_trace(TRACE).faults.head(3).assign(ts=5, cpu=[0, 1, 0])
    faults = faults.astype({"ts": "UInt64", "cpu": "UInt16"})
    assert "not in order of ts, cpu, seq" in refusal("faults", faults)


def test_the_error_is_one_that_the_front_door_tells():
    assert issubclass(SchemaError, PfntraceError)


@pytest.mark.parametrize("name", schema.TABLES)
def test_an_empty_table_is_what_is_declared(name):
    assert len(schema.check(name, schema.empty(name))) == 0


def test_every_record_of_a_trace_has_a_table_and_every_column_the_words_of_the_file():
    kinds = [kind for kinds in schema.KINDS_OF_TABLE.values() for kind in kinds]
    assert sorted(kinds) == sorted(FILE_KINDS)
    words = {column.name: (column.doc, column.unit) for column in COLUMNS}
    for name in schema.KINDS_OF_TABLE:
        for column in schema.TABLES[name].columns:
            assert words[column.name] == (column.doc, column.unit)


def test_every_column_says_what_it_means():
    for table in schema.TABLES.values():
        assert table.doc.endswith(".")
        assert len(set(table.names)) == len(table.names)
        assert all(column.doc.endswith((".", "?")) for column in table.columns)
        assert set(table.order) <= set(table.names)


def test_verdicts_are_those_of_findings():
    (column,) = [c for c in schema.TABLES["anomalies"].columns if c.name == "verdict"]
    assert column.categories == VERDICTS


def test_the_page_of_tables_is_the_schemas_own():
    assert (ROOT / "docs/TABLES.md").read_text() == schema.reference(), "run: make tables"
