"""What is concluded from a merged trace is what is concluded from its recordings."""

import json
from collections import Counter
from pathlib import Path

import pytest
from unit.mergekit import SECOND, merged, part
from unit.records import START_NS, records, rows_of

from analysis.check import check_trace
from analysis.diffside import read_side
from analysis.export import export
from analysis.lives import iter_lives, lives_of
from analysis.reading import read
from probes import wire
from probes.errors import TraceFormatError
from tracer.simulator.replay import conform
from tracer.tracefile import TraceReader

TRACES = Path(__file__).parent / "traces"


def installs(count, start, vm=1, **fields):
    """Installs of a VM, one page each, that nothing ends."""
    made = records("SPTE", count, seed=3, start_ns=START_NS + start, h__vm=vm, **fields)
    made["h"]["op"] = wire.OPS.index("install")
    return [("SPTE", made)]


def test_a_mapping_ends_with_its_recording(tmp_path):
    # GIVEN one VM that was recorded twice, with the same pages mapped both times
    a = part(tmp_path, "a", [installs(20, 0)])
    b = part(tmp_path, "b", [installs(20, SECOND)], start=SECOND)
    out, _ = merged(tmp_path, a, b)
    lives = lives_of(out)
    # THEN nothing is concluded from one recording to the other: no mapping took another's place
    assert len(lives) == 40 and lives["censored_end"].all()
    assert set(lives["ended_by"]) == {"censored"}
    assert lives["life_id"].tolist() == list(range(1, 41)) and set(lives["vm"]) == {1, 2}


def test_lives_of_parts_and_of_the_merged_trace_are_the_same(tmp_path):
    flushes = [installs(10, 0), [("PAGE_FREE", records("PAGE_FREE", 5))]]
    zaps = installs(10, 2_000_000)
    zaps[0][1]["h"]["op"] = wire.OPS.index("zap")
    a = part(tmp_path, "a", [*flushes, zaps])
    b = part(tmp_path, "b", [installs(7, SECOND)], boot="other", wall=SECOND)
    out, told = merged(tmp_path, a, b)
    whole = lives_of(out)
    columns = ["gfn", "pfn", "level", "ended_by", "censored_start", "censored_end", "birth_cpu"]
    for place, path in zip(told.parts, (a, b), strict=True):
        own = lives_of(path)
        low, high = place["vms"]
        mine = whole[(whole["vm"] >= low) & (whole["vm"] <= high)]
        for name in columns:
            assert mine[name].tolist() == own[name].tolist(), name


def test_a_frame_of_one_host_is_not_a_frame_of_another(tmp_path):
    # GIVEN a host whose VM has pages mapped, and another host that frees frames of those numbers
    with TraceReader(TRACES / "ttm-6.12.pfnt") as reader:
        kernel = {"profile": reader.meta.profile, "facts": reader.meta.facts}
    mapped = installs(20, 0)
    mapped.insert(0, ("VM", records("VM", 1, h__ts=START_NS - 5)))
    frees = records("PAGE_FREE", 20, start_ns=START_NS + 5_000_000, h__vm=1)
    frees["pfn"] = mapped[1][1]["pfn"]
    a = part(tmp_path, "a", [mapped], **kernel)
    b = part(tmp_path, "b", [[("PAGE_FREE", frees)]], boot="other", wall=1, **kernel)
    out, _ = merged(tmp_path, a, b)
    # THEN no page was freed while it was mapped
    assert "use-after-free" not in {f.detector for f in check_trace(out).findings}
    # though on one host it would be so, and is found
    one = part(tmp_path, "one", [mapped, [("PAGE_FREE", frees)]], **kernel)
    (found,) = (f for f in check_trace(one).findings if f.detector == "use-after-free")
    assert found.pages == 20


@pytest.mark.parametrize("name", ["ttm-6.12", "ttm-7.3"])
def test_a_real_trace_merged_alone_says_what_it_said(tmp_path, name):
    path = TRACES / f"{name}.pfnt"
    out, _ = merged(tmp_path, path)
    before, after = check_trace(path), check_trace(out)
    assert [(f.detector, f.verdict, f.count) for f in after.findings] == [
        (f.detector, f.verdict, f.count) for f in before.findings
    ]
    assert lives_of(out).equals(lives_of(path))
    sides = read_side(path), read_side(out)
    assert sides[0].results == sides[1].results and sides[0].pages == sides[1].pages


def test_a_report_of_a_merged_trace_adds_its_recordings_up(tmp_path):
    a = part(tmp_path, "a", [installs(20, 0)])
    b = part(tmp_path, "b", [installs(20, SECOND)], start=SECOND)
    out, _ = merged(tmp_path, a, b)
    reading = read(out)
    assert reading.lifetimes.accounted == Counter(life=40)
    assert sum(group.after for group in reading.lifetimes.groups.values()) == 40


def test_exported_lives_of_a_merged_trace_have_numbers_of_their_own(tmp_path):
    a = part(tmp_path, "a", [installs(20, 0)])
    b = part(tmp_path, "b", [installs(20, SECOND)], start=SECOND)
    out, _ = merged(tmp_path, a, b)
    (made,), info = export(out, "csv", tmp_path / "lives.csv", ["lives"])
    assert made.rows == 40 and info["merged"]["boots"] == 1
    with TraceReader(out) as reader:
        numbers = [n for lives in iter_lives(reader) for n in lives["life_id"]]
        texts = rows_of(reader.records(["NOTE"], ["note"]))
    assert sorted(numbers) == list(range(1, 41))
    assert json.loads(texts[-1]["note"])["end"]["why"] == "merged"


def test_a_replay_asks_for_the_parts(tmp_path):
    a = part(tmp_path, "a", [installs(20, 0)])
    b = part(tmp_path, "b", [installs(20, SECOND)], start=SECOND)
    out, _ = merged(tmp_path, a, b)
    with pytest.raises(TraceFormatError, match="replay its parts"):
        conform(out)
