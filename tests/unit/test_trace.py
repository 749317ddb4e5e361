"""The API for notebooks: its examples run, its tables are as declared, others are refused."""

import doctest
import json
from pathlib import Path

import numpy as np
import pytest
from unit.records import START_NS, records, write_trace

import analysis.trace
from analysis import schema
from analysis.trace import anomalies_table, open_trace
from probes import wire
from probes.errors import TraceFormatError

ROOT = Path(__file__).resolve().parents[2]
TRACES = sorted((ROOT / "tests/unit/traces").glob("*.pfnt"))


def test_a_file_that_is_no_trace_is_refused_at_once(tmp_path):
    (tmp_path / "x").write_text("no trace")
    with pytest.raises(TraceFormatError):
        open_trace(tmp_path / "x")


def test_the_examples_in_its_docstrings_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    results = doctest.testmod(analysis.trace)
    assert results.attempted > 10 and not results.failed


@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_every_table_of_a_real_trace_is_as_declared(path):
    # GIVEN a trace WHEN each table is loaded, which checks it
    trace = open_trace(path)
    rows = {name: len(getattr(trace, name)) for name in schema.KINDS_OF_TABLE}
    # THEN no record is missing
    for name, kinds in schema.KINDS_OF_TABLE.items():
        if name not in ("losses", "notes"):
            assert rows[name] == sum(trace.info["kinds"][kind] for kind in kinds)
    schema.check("lives", trace.lives())
    schema.check("anomalies", trace.anomalies())


def test_tables_without_records_have_their_columns_and_types(tmp_path):
    trace = open_trace(write_trace(tmp_path / "t.pfnt", [[("VM", records("VM", 1))]]))
    assert not len(trace.faults) and not len(trace.lives()) and not len(trace.anomalies())
    assert str(trace.faults["gfn"].dtype) == "UInt64"


def test_a_truncated_trace_is_loaded_up_to_its_end(tmp_path):
    path = write_trace(tmp_path / "t.pfnt")
    path.write_bytes(path.read_bytes()[:-300])
    trace = open_trace(path)
    assert not trace.info["complete"] and len(trace.faults) == 5


def spte(op, ts, gfn, pfn, level=1, vm=1):
    old, new = pfn << 12 | 0x881, pfn << 12 | 0x8C1
    return records(
        "SPTE", 1, h__ts=START_NS + ts, h__vm=vm, h__op=wire.OPS.index(op), gfn=gfn, pfn=pfn,
        level=level, a=old, b=0 if op == "zap" else new,
    )  # fmt: skip


@pytest.fixture
def trace(tmp_path):
    # VM 1 maps 2M, VM 2 a page of the same memory, which is then freed and handed out.
    rows = [
        spte("install", 10, 512, 0x200, level=2), spte("install", 20, 7, 0x203, vm=2),
        spte("change", 25, 7, 0x203, vm=2), spte("zap", 30, 512, 0x200, level=2),
        spte("zap", 40, 7, 0x203, vm=2),
    ]  # fmt: skip
    free = records("PAGE_FREE", 1, h__ts=START_NS + 50, h__vm=1, pfn=0x200, d=9)
    other = records("PAGE_FREE", 1, h__ts=START_NS + 60, h__vm=1, pfn=0x300, d=0)
    walked = records("FAULT", 1, h__ts=START_NS + 70, pfn=0x7FF << 52, walk_pfn=0x203, ret=-14)
    groups = [[("SPTE", np.concatenate(rows)), ("PAGE_FREE", np.concatenate([free, other]))],
              [("FAULT", walked)]]  # fmt: skip
    return open_trace(write_trace(tmp_path / "t.pfnt", groups))


def test_lives_are_found_by_a_page_that_a_large_leaf_holds(trace):
    assert trace.lives(gfn=515)["vm"].tolist() == [1]
    assert trace.lives(pfn=0x203)["vm"].tolist() == [1, 2]
    assert trace.lives(pfn=0x203, vm=2)["level"].tolist() == [1]
    assert not len(trace.lives(slot=3))


def test_the_history_of_a_page_is_all_that_touches_it_in_order_of_time(trace):
    history = trace.pfn_history(0x203)
    events = history.events
    assert history.lives["life_id"].tolist() == [1, 2]
    assert events["event"].tolist() == [
        *("install", "install", "change", "zap", "zap", "free", "fault error")
    ]
    assert events["life_id"].fillna(0).tolist() == [1, 2, 2, 1, 2, 0, 0]
    assert events["pages"].tolist() == [512, 1, 1, 512, 1, 512, 1]
    # a fault that KVM refused is about the page that the walk found
    assert events["pfn"].iloc[-1] == 0x203
    assert not len(trace.pfn_history(0x9999).events)


def test_names_of_a_column_are_those_of_its_table(trace):
    assert trace.sptes["op"].value_counts().to_dict() == {"install": 2, "change": 1, "zap": 2}
    assert trace.page_events["kind"].cat.categories.tolist() == ["PAGE_FREE", "PAGE_ALLOC"]
    assert not [name for name in trace.faults["result"].cat.categories if "ret_" in name]
    assert trace.pfn_history(0x203).events["recording"].unique().tolist() == [1]
    schema.check("pfn_events", trace.pfn_history(0x9999).events)


def test_a_name_that_no_record_of_pfntrace_has_stays(tmp_path):
    # GIVEN an SPTE record that says it created something
    made = records("SPTE", 1, h__op=wire.OPS.index("create"))
    sptes = open_trace(write_trace(tmp_path / "t.pfnt", [[("SPTE", made)]])).sptes
    assert sptes["op"].tolist() == ["create"]
    assert sptes["op"].cat.categories.tolist() == ["install", "change", "zap", "create"]


def test_times_are_seconds_since_the_beginning(trace):
    assert trace.seconds(trace.sptes["ts"]).iloc[0] == pytest.approx(10e-9)


def test_findings_become_a_table_with_lists_as_json():
    # GIVEN a trace in which a guest died, as its kernel promises
    table = anomalies_table(ROOT / "tests/unit/traces/ttm-6.12.pfnt")
    (finding,) = table.to_dict("records")
    assert finding["verdict"] == "explained"
    assert json.loads(finding["gfns"]) and json.loads(finding["evidence"])
