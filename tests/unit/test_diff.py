"""Diff: the figures of both traces side by side, and an honest word about what they can tell."""

import json
import os
import re
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit.records import START_NS, group, meta, records, rows_of, write_trace

from analysis import diff as diffing
from analysis import diffside
from analysis.diff import CountRow, compare, diff_json, unlike
from analysis.diffside import Distinct, Stretches, read_side
from analysis.diffwords import diff_lines
from analysis.findings import Finding, Unanswerable
from analysis.histogram import Histogram
from analysis.noise import FAULTS_MIN, Shift, median_shift, rank_p
from probes import wire
from probes.errors import TraceFormatError
from tracer.merge import merge
from tracer.tracefile import TraceReader, TraceWriter

TRACES = Path(__file__).parent / "traces"
SECOND = 1_000_000_000


def trace(tmp_path, name, *flushes, **changes):
    return write_trace(tmp_path / f"{name}.pfnt", list(flushes), **changes)


def faults(count, **fields):
    return [("FAULT", records("FAULT", count, **fields))]


def lines(a, b):
    return list(diff_lines(compare(a, b)))


def test_places_are_compared_one_by_one(tmp_path):
    # GIVEN A with 4K leaves only, B with some of 2M that took longer, in a second memslot
    small = records("FAULT", 4, t_faultin=1, ret=5, level=1, slot=0)
    large = records("FAULT", 2, t_faultin=1, ret=5, level=2, slot=1)
    for made in (small, large):
        made["h"]["fault_ts"] = made["h"]["ts"] - 10_000
    large["h"]["fault_ts"] -= 10_000
    a = trace(tmp_path, "a", [("FAULT", small)])
    b = trace(tmp_path, "b", [("FAULT", small)], [("FAULT", large)])
    # WHEN
    found = compare(a, b)
    # THEN
    vm = small["h"]["vm"][0]
    assert {(row.group, row.name): (row.a.n, row.b.n) for row in found.places} == {
        ("VM", f"VM {vm}"): (4, 6),
        ("level", "2M"): (0, 2),
        ("level", "4K"): (4, 4),
        ("memslot", f"VM {vm} slot 0"): (4, 4),
        ("memslot", f"VM {vm} slot 1"): (0, 2),
    }
    medians = {row.name: row.b.p50 for row in found.places}
    assert medians["2M"] == pytest.approx(20_000, rel=0.004)
    assert medians["4K"] == pytest.approx(10_000, rel=0.004)
    text = "\n".join(diff_lines(found))
    assert "Fault latency by level mapped, VM and memslot" in text
    assert re.search(r"2M +0 +2 +- +20\.0 us", text) and len(diff_json(found)["places"]) == 5


# --- what is refused, what is cut -----------------------------------------------------------------


def test_a_file_that_is_no_trace_is_named(tmp_path):
    bad = tmp_path / "bad.pfnt"
    bad.write_bytes(b"x" * 100)
    good = trace(tmp_path, "good", group(0))
    for pair in ((bad, good), (good, bad)):
        with pytest.raises(TraceFormatError, match=r"bad\.pfnt"):
            compare(*pair)


def test_a_cut_trace_is_compared_to_its_end_and_the_first_line_says_so(tmp_path):
    a = trace(tmp_path, "a", *[group(n) for n in range(8)])
    b = trace(tmp_path, "b", *[group(n) for n in range(8)])
    os.truncate(b, b.stat().st_size // 2)
    shown = lines(a, b)
    assert shown[0].startswith("A: nothing lost; complete. B: no loss known; INCOMPLETE: truncated")
    assert "lower bounds" in " ".join(shown[:5])
    found = compare(a, b)
    assert found.totals[0].a == 40 > found.totals[0].b > 0


def test_traces_without_faults_are_no_traceback(tmp_path):
    empty = trace(tmp_path, "empty")
    shown = lines(empty, empty)
    assert shown[0] == "A and B: nothing lost; complete"
    full = trace(tmp_path, "full", group(0))
    json.dumps(diff_json(compare(empty, full)), allow_nan=False)
    json.dumps(diff_json(compare(full, empty)), allow_nan=False)


# --- losses, and how they were recorded -----------------------------------------------------------


def test_losses_of_both_are_on_the_first_line(tmp_path):
    def losing(name, lost):
        writer = TraceWriter(tmp_path / f"{name}.pfnt", meta())
        writer.write_group(group(0))
        writer.close({"lost": lost, "produced": 10 + lost}, ts=START_NS + SECOND)
        return tmp_path / f"{name}.pfnt"

    first = lines(losing("a", 2), losing("b", 30))[0]
    assert "A: LOST 2 of 12 records" in first and "B: LOST 30 of 40" in first


def test_what_was_recorded_otherwise_is_named(tmp_path):
    hooks = [
        {"hook": "fault", "symbols": ["f"], "how": "kprobe", "note": ""},
        {"hook": "gup", "symbols": ["g"], "how": "fentry", "note": ""},
    ]
    profile = {**meta().profile, "generation": "G2", "hooks": hooks}
    profile["hooks"] = [dict(hooks[0], how="fentry"), hooks[1]]
    a = trace(tmp_path, "a", group(0))
    b = trace(
        tmp_path, "b", group(0), profile=profile, hostname="other",
        facts='{"release": "7.3", "params": {"kvm.tdp_mmu": "N"}}', settings={"gfns": [1, 2]},
        command=("pfntrace", "record", "\x1b[31m"),
    )  # fmt: skip
    assert list(unlike(read_side(a), read_side(b))) == [
        ("kernel", "6.12.0-test", "7.3"),
        ("generation", "G0b", "G2"),
        ("host", "host", "other"),
        ("parameter kvm.tdp_mmu", "-", "N"),
        ("hook fault", "kprobe", "fentry"),
        ("hook gup", "not attached", "fentry"),
        ("--gfn", "null", "[1, 2]"),
        ("command", "pfntrace record -- qemu", "pfntrace record \x1b[31m"),
    ]
    text = "\n".join(lines(a, b))
    assert "times are not comparable" in " ".join(text.split())
    assert "generation: G0b in A, G2 in B" in text and "\x1b" not in text


def test_the_same_trace_is_the_same(tmp_path):
    a = trace(tmp_path, "a", group(0, 300))
    found = compare(a, a)
    assert not found.unlike
    for rows in (found.totals, found.results, found.paths, found.classes, found.installs):
        assert all((row.a, row.a_of) == (row.b, row.b_of) for row in rows)
    for row in found.latency:
        assert row.a == row.b and row.shift is not None
        assert row.shift.ratio == 1 or row.a.p50 == 0
    assert "Kernel, generation, hooks and command are the same." in lines(a, a)[5:9].__str__()


# --- figures --------------------------------------------------------------------------------------


def test_faults_are_counted_by_result_and_per_page(tmp_path):
    # GIVEN 4 faults on 2 pages, and 3 faults on 3 pages of which one failed
    a = trace(tmp_path, "a", faults(4, gfn=[1, 1, 1, 2], ret=5))
    b = trace(tmp_path, "b", faults(3, gfn=[1, 2, 3], ret=[5, 5, -14]))
    found = compare(a, b)
    assert found.totals[:2] == (
        CountRow("faults", 4, 3),
        CountRow("guest pages that faulted", 2, 3),
    )
    assert found.results == (CountRow("fixed", 4, 2, 4, 3), CountRow("error", 0, 1, 4, 3))
    text = "\n".join(lines(a, b))
    assert re.search(r"faults per page, fixed\s+2\.000\s+0\.667", text)
    assert re.search(r"error\s+0\s+1\s+\+1\s+-\s+0\.0 %\s+33\.3 %", text)


def test_pages_of_two_vms_or_address_spaces_are_two_pages(tmp_path):
    a = trace(tmp_path, "a", faults(4, gfn=7, h__vm=[1, 1, 2, 2], as_id=[0, 1, 0, 0]))
    assert read_side(a).pages == 3


def test_classes_and_installs_are_compared(tmp_path):
    a = trace(tmp_path, "a", faults(3), [("SPTE", records("SPTE", 3, level=[1, 1, 2]))])
    b = trace(tmp_path, "b", faults(3, page__refcount=[0, 2, 2]))
    found = compare(a, b)
    assert found.classes == (CountRow("counted", 3, 2, 3, 3), CountRow("uncounted", 0, 1, 3, 3))
    assert found.installs == (
        CountRow("4K counted", 2, 0, 3, 0),
        CountRow("2M counted", 1, 0, 3, 0),
    )


def test_figures_do_not_depend_on_how_a_trace_is_cut_into_pieces():
    path = TRACES / "ttm-6.12.pfnt"
    whole, pieces = read_side(path), read_side(path, rows_max=1)
    for name in ("results", "classes", "installs", "ops", "paths", "pages"):
        assert getattr(whole, name) == getattr(pieces, name), name
    for key, times in whole.times.items():
        assert (times.counts == pieces.times[key].counts).all(), key


@pytest.mark.parametrize("path", sorted(TRACES.glob("*.pfnt")), ids=lambda path: path.stem)
def test_figures_of_a_real_trace_are_those_of_its_rows(path):
    side = read_side(path)
    with TraceReader(path) as reader:
        rows = rows_of(reader.records(["FAULT", "SPTE"]))
    of = [row for row in rows if row["kind"] == "FAULT"]
    assert side.results == Counter(row["result"] for row in of)
    assert side.pages == len({(row["vm"], row["as_id"], row["gfn"]) for row in of})
    assert side.ops == Counter(row["op"] for row in rows if row["kind"] == "SPTE")
    # every fault has a duration, and those of all paths together are all durations
    durations = np.sort([row["dur"] for row in of])
    whole = [times.whole for (_, stage), times in side.times.items() if stage == "all"]
    assert sum(h.n for h in whole) == len(durations)
    assert max(h.max for h in whole) == durations[-1]


def test_a_lifetime_is_compared_by_level_and_class_with_what_ended_it(tmp_path):
    def lived(name, ns):
        sptes = records("SPTE", 2, gfn=7, pfn=9, h__ts=[START_NS, START_NS + ns])
        sptes["h"]["op"] = [wire.OPS.index("install"), wire.OPS.index("zap")]
        sptes["b"] = [0x8600000000000B77 | 9 << 12, 0]
        sptes["a"] = [0, 0x8600000000000B77 | 9 << 12]
        sptes["cause"] = [wire.CAUSES.index("fault"), wire.CAUSES.index("notifier")]
        vm = records("VM", 1, h__ts=START_NS - 5)
        return trace(tmp_path, name, [("VM", vm)], [("SPTE", sptes)])

    found = compare(lived("a", 1000), lived("b", 3000))
    assert found.lives[0] == CountRow("mappings", 1, 1)
    assert found.ends == (CountRow("zap (notifier)", 1, 1, 1, 1),)
    (row,) = found.lifetimes
    assert (row.group, row.a.n, row.b.n) == ("4K", 1, 1)
    assert [row.a.p50, row.b.p50] == pytest.approx([1000, 3000], rel=0.01)


# --- medians and their noise ----------------------------------------------------------------------


def side_of(durations, stretches=32):
    """Durations in order of time, cut into stretches."""
    made = Stretches(stretches)
    at = np.arange(len(durations)) * stretches // max(1, len(durations))
    made.add(at, np.asarray(durations, np.uint64))
    return made.counts


def drawn(seed, count=5000, scale=1.0):
    return (np.random.default_rng(seed).lognormal(10, 0.3, count) * scale).astype(np.uint64)


def interval(a, b):
    shift = median_shift(a, b)
    assert shift.low is not None and shift.high is not None
    return shift.low, shift.high


def test_two_draws_of_the_same_are_not_told_apart_and_twice_as_slow_is():
    low, high = interval(side_of(drawn(1)), side_of(drawn(2)))
    assert low <= 1 <= high
    twice = median_shift(side_of(drawn(1)), side_of(drawn(2, scale=2)))
    assert twice.ratio == pytest.approx(2, rel=0.03) and (twice.low or 0) > 1.9


def test_drift_within_a_recording_makes_the_interval_wider():
    # GIVEN the same durations, once in random order and once ascending: neighbours are alike
    plain, other = drawn(1), drawn(2)
    mixed = interval(side_of(plain), side_of(other))
    drifting = interval(side_of(np.sort(plain)), side_of(np.sort(other)))
    assert drifting[1] - drifting[0] > 4 * (mixed[1] - mixed[0])


def test_from_single_recordings_nothing_is_concluded():
    shift = median_shift(side_of(drawn(1)), side_of(drawn(2, scale=3)))
    assert shift.p is None and shift.verdict == ""


def test_few_faults_have_a_ratio_but_no_interval():
    few = median_shift(side_of(drawn(1, FAULTS_MIN - 1)), side_of(drawn(2)))
    assert few.ratio is not None and few.low is None and few.verdict == ""
    assert median_shift(side_of([]), side_of(drawn(1))) == Shift(None)


@pytest.mark.parametrize(
    ("a", "b", "low", "high"),
    [
        ([1, 2, 3, 4, 5], [11, 12, 13, 14, 15], 0.004, 0.013),  # 2 of 252 ways
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], 1, 1),
        ([1, 3, 5, 7, 9], [2, 4, 6, 8, 10], 0.6, 0.8),  # the exact p is 0.69
        ([5, 5, 5, 5, 5], [5, 5, 5, 5, 5], 1, 1),
    ],
)
def test_the_rank_test_is_that_of_the_books(a, b, low, high):
    p = rank_p(np.array(a, float), np.array(b, float))
    assert low <= p <= high
    assert p == rank_p(np.array(a, float), np.array(b, float)), "the same traces, the same figure"


def test_the_rank_test_finds_by_chance_what_it_says_it_does():
    draw = np.random.default_rng(5)
    found = [rank_p(draw.normal(size=6), draw.normal(size=6)) <= 0.05 for _ in range(200)]
    assert sum(found) <= 20  # 10 expected; more than 20 happens once in 1,500 runs


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=60), st.integers(1, 40))
def test_stretches_add_up_to_the_whole(durations, stretches):
    counts = side_of(durations, stretches)
    whole = Histogram()
    whole.add(np.array(durations, np.uint64))
    assert (counts.sum(axis=0) == whole.counts).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 50) | st.integers(0, 2**64 - 1), max_size=20), max_size=12))
def test_distinct_counts_like_a_set(chunks):
    found = Distinct()
    for chunk in chunks:
        found.add(np.array(chunk, np.uint64))
    assert len(found) == len({key for chunk in chunks for key in chunk})


# --- several recordings of each -------------------------------------------------------------------


@pytest.fixture(scope="module")
def repeated(tmp_path_factory):
    """Recordings of a kernel and of a slower one, six each, merged; and the numbers of faults."""
    tmp_path = tmp_path_factory.mktemp("repeated")
    paths = []
    for name, scale in (("a", 1.0), ("b", 1.3)):
        parts = []
        for number in range(6):
            start = number * SECOND
            array = records(
                "FAULT", 60, seed=number + (name == "b") * 10, start_ns=START_NS + start
            )
            for field in ("t_faultin", "t_gup", "t_gup_end", "t_faultin_end", "t_map"):
                array[field] = (array[field] * scale).astype("u4")
            array["h"]["fault_ts"] = array["h"]["ts"] - (array["t_map"] + np.uint64(1000))
            parts.append(
                trace(
                    tmp_path, f"{name}{number}", [("FAULT", array)],
                    start_monotonic_ns=START_NS + start, start_unix_ns=10**18 + start,
                )
            )  # fmt: skip
        out = tmp_path / f"{name}.pfnt"
        merge(parts, out, version="0", argv=["merge"])
        paths.append(out)
    return paths


def test_of_merged_recordings_the_medians_are_judged_by_rank(repeated):
    found = compare(*repeated)
    assert [side.cut for side in found.sides] == ["recordings"] * 2
    row = next(row for row in found.latency if row.name == "hva_to_pfn")
    assert row.shift is not None and row.shift.verdict == "slower" and (row.shift.p or 1) < 0.05
    same = compare(repeated[0], repeated[0])
    assert {r.shift.verdict for r in same.latency if r.shift and r.shift.low} == {"same"}
    text = " ".join("\n".join(diff_lines(found)).split())
    assert "6 recordings" in text and "would be marked by chance" in text and "*0.0" in text


def test_recordings_on_one_side_only_are_not_judged(repeated, tmp_path):
    single = trace(tmp_path, "single", faults(500))
    found = compare(repeated[0], single)
    assert all(row.shift.p is None for row in found.latency if row.shift)
    text = " ".join("\n".join(diff_lines(found)).split())
    assert "6 recordings (A) and 32 equal parts, in order of time (B)" in text
    assert "nobody can tell a patch from chance" in text


def test_each_recording_is_one_stretch(repeated):
    side = read_side(repeated[0])
    counts = side.times["GUP", "all"].counts
    assert counts.shape[0] == 6 and (counts.sum(axis=1) == 60).all()


# --- form -----------------------------------------------------------------------------------------


def test_every_line_fits_and_is_printable(tmp_path):
    for a, b in ((TRACES / "ttm-6.12.pfnt", TRACES / "ttm-7.3.pfnt"),):
        for line in lines(a, b):
            assert len(line) <= 80 and line.isprintable(), line


def test_json_has_both_of_everything():
    found = compare(TRACES / "ttm-6.12.pfnt", TRACES / "ttm-7.3.pfnt")
    data = json.loads(json.dumps(diff_json(found), allow_nan=False))
    assert [t["generation"] for t in data["traces"]] == ["G0b", "G2"]
    assert {"unlike", "totals", "results", "paths", "classes", "installs", "lives", "ends",
            "lifetimes", "anomalies", "latency"} <= set(data)  # fmt: skip
    for row in data["totals"] + data["results"]:
        assert {"name", "a", "b"} <= set(row)
    row = data["latency"][0]
    assert row["a"]["n"] and {"ratio", "low", "high", "p", "verdict"} <= set(row)


def test_anomalies_are_those_of_check_new_ones_marked(tmp_path, monkeypatch):
    a, b = trace(tmp_path, "a", group(0)), trace(tmp_path, "b", group(1))

    def found(path, progress=None):
        one = Finding("leak", "definite", "t", "r", count=3, pages=2)
        old = Finding("stale", "probable", "t", "r", count=1)
        silent = Unanswerable("pins", "hook \x1b is missing")
        results = ((old,), ()) if path == a else ((one, old), (silent,))
        return types.SimpleNamespace(
            findings=results[0], unanswerable=results[1], detectors=("leak", "stale", "pins")
        )

    monkeypatch.setattr(diffing, "check_trace", found)
    rows = compare(a, b).findings
    assert [(r.detector, r.verdict, r.a, r.b) for r in rows] == [
        ("leak", "definite", 0, 3),
        ("stale", "probable", 1, 1),
        ("pins", "", 0, None),
    ]
    text = "\n".join(lines(a, b))
    assert re.search(r"definite\s+leak\s+0\s+3\s+0\s+2\s+NEW in B", text)
    assert "pins cannot answer for B: hook \\x1b is missing" in text


def test_progress_ascends_over_all_readings():
    seen = []
    path = TRACES / "ttm-6.12.pfnt"
    compare(path, path, lambda done, total: seen.append(done / total))
    assert seen == sorted(seen) and seen[-1] == 1


def test_recordings_are_told_only_by_a_sound_description():
    odd: list[object] = [None, 7, [1], [{"vm_base": "x"}] * 9, [{"vm_base": -1}] * 9, [{}] * 9]
    for parts in odd:
        assert diffside._recordings({"merged": {"parts": parts}}) == []
    six = [{"vm_base": n} for n in (5, 0, 9, 9, 12, 20)]
    assert diffside._recordings({"merged": {"parts": six}}) == [0, 5, 9, 12, 20]
