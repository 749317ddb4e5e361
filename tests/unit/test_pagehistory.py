"""What a trace tells of one host page: which records are of it, in which order, which count."""

from pathlib import Path

import numpy as np
import pytest
from unit.made import ALL_ONES, ERR_FAULT, events, faults, sptes, write

from analysis.pagehistory import HAPPENINGS, page_history
from probes import wire
from tracer.tracefile import TraceReader

TRACES = Path(__file__).parent / "traces"


def history(path, pfn):
    """Return (what, count) of each record of a page, in the order of time."""
    with TraceReader(path) as reader:
        found = page_history(reader, pfn)
    assert (np.diff(found.ts.astype(np.int64)) >= 0).all()
    return [(HAPPENINGS[w], int(c)) for w, c in zip(found.what, found.count, strict=True)]


def test_a_page_that_no_record_names_has_no_history(tmp_path):
    assert history(write(tmp_path / "t.pfnt", faults(3)), 0x99) == []
    assert history(write(tmp_path / "empty.pfnt"), 0x1000) == []


@pytest.mark.parametrize(
    "trace, refused",
    [("ttm-6.12.pfnt", 0x1981), ("ttm-6.1.pfnt", None), ("ttm-7.3.pfnt", 0x22B01)],
)
def test_a_page_of_ttm_from_fault_to_free(trace, refused):
    # GIVEN the second page of the block, which nobody counts
    if refused is None:
        with TraceReader(TRACES / trace) as reader:
            failed = [
                row["walk_pfn"]
                for batch in reader.records(["FAULT"], ["walk_pfn", "ret"])
                for row in batch.to_pylist()
                if row["ret"] < 0
            ]
        refused = failed[0]
    # WHEN
    found = history(TRACES / trace, refused)
    # THEN it was mapped on 7.3 only, and freed with its block everywhere
    told = [name for name, _ in found]
    mapped = ["install"] if "7.3" in trace else []
    zapped = ["zap"] if "7.3" in trace else []
    assert told == ["fault-in", *mapped, "fault end", *zapped, "freed"]
    assert {count for _, count in found} == {0}


def test_everything_that_names_the_page_is_told_in_order(tmp_path):
    # GIVEN a page that is handed out, mapped, marked, given back, pinned, zapped, freed
    made = faults(1)
    made["h"]["fault_ts"], made["h"]["ts"], made["t_faultin_end"] = 1000, 5000, 1000
    parts = [
        (events("PAGE_ALLOC", 1), 100, 1),
        (sptes(1, "install"), 3000, 3),
        (events("RELEASE", 1, cause=wire.CALLS.index("pfn_clean")), 4000, 3),
        (sptes(1, "change", "dirty_log"), 6000, 2),
        (events("RELEASE", 1, cause=wire.CALLS.index("mark_dirty")), 6500, 2),
        (events("PIN", 1, "map"), 7000, 3),
        (sptes(1, "zap", "notifier"), 8000, 2),
        (events("PAGE_FREE", 1), 9000, 0),
    ]
    for records, ts, count in parts:
        records["h"]["ts"], records["pfn"] = ts, 0x1000
        records["page"]["bits"], records["page"]["refcount"] = 1, count
    path = write(tmp_path / "t.pfnt", made, *(records for records, _, _ in parts))
    # WHEN THEN
    assert history(path, 0x1000) == [
        ("allocated", 1),
        ("fault-in", 3),
        ("install", 3),
        ("release", 3),
        ("fault end", 2),
        ("change", 2),
        ("mark", 2),
        ("pin", 3),
        ("zap", 2),
        ("freed", 0),
    ]
    assert history(path, 0x1001) == []


def test_a_large_leaf_and_a_block_are_of_all_their_pages(tmp_path):
    leaf = sptes(1, "install", level=2)
    leaf["pfn"] = 0x4000
    block = events("PAGE_FREE", 1, d=4, pfn=0x4010)
    path = write(tmp_path / "t.pfnt", leaf, block)
    assert history(path, 0x41FF) == [("install", 3)]
    assert history(path, 0x401F) == [("install", 3), ("freed", -1)]
    assert history(path, 0x4020) == [("install", 3)]
    assert history(path, 0x4200) == history(path, 0x3FFF) == []


def test_pages_of_one_compound_page_share_their_count(tmp_path):
    # GIVEN two pages of a compound page of four, and the one after it
    made = faults(3)
    made["pfn"] = (0x1001, 0x1002, 0x1004)
    made["page"]["bits"], made["page"]["order"] = wire.PAGE_BITS["has_struct"] | 2, 2
    path = write(tmp_path / "t.pfnt", made)
    # WHEN
    with TraceReader(path) as reader:
        found = page_history(reader, 0x1001)
    # THEN
    assert (len(found), int(found.other.sum())) == (4, 2)


def test_a_refused_page_is_the_one_that_the_walk_found(tmp_path):
    made = faults(1, pfn=ERR_FAULT, walk_pfn=0x77, ret=-14)
    path = write(tmp_path / "t.pfnt", made)
    assert [name for name, _ in history(path, 0x77)] == ["fault-in", "fault end"]


def test_a_page_whose_state_was_not_read_has_no_count(tmp_path):
    made = sptes(1, "install")
    made["page"]["bits"] = 0
    assert history(write(tmp_path / "t.pfnt", made), 0x1000) == [("install", -1)]


def test_impossible_values_break_nothing(tmp_path):
    random = np.random.default_rng(3)
    groups = []
    for kind in wire.KINDS[1:]:
        dtype = wire.FAULT if kind == "FAULT" else wire.EVENT
        noise = np.frombuffer(random.bytes(dtype.itemsize * 40), dtype).copy()
        noise["h"]["kind"] = wire.KINDS.index(kind)
        if "pfn" in (dtype.names or ()):
            noise["pfn"][:20] = 0x1000
        groups.append(np.sort(noise, order=["h"]))
    path = write(tmp_path / "t.pfnt", *groups)
    assert len(history(path, 0x1000)) >= 20
    assert history(path, ALL_ONES) is not None
