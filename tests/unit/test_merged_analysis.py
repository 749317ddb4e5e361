"""What is concluded from a merged trace is what is concluded from its recordings."""

import json
from collections import Counter
from pathlib import Path

import pytest
from matplotlib.text import Text
from unit.mergekit import SECOND, merged, part
from unit.records import START_NS, records, rows_of

from analysis.check import _Answer, _unable, check_trace
from analysis.diffside import read_side
from analysis.export import export
from analysis.figures import style
from analysis.findings import Unanswerable
from analysis.lifelist import Selection, lifetime_lines
from analysis.lives import iter_lives, lives_of
from analysis.plot import figures
from analysis.reading import read
from analysis.reportdata import report_of
from analysis.trace import open_trace
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


def test_the_history_of_a_page_is_one_for_each_recording(tmp_path):
    # GIVEN two boots, on each of which a frame of the same number was mapped
    a = part(tmp_path, "a", [installs(3, 0, pfn=[5, 6, 5], level=1)])
    b = part(tmp_path, "b", [installs(2, SECOND, pfn=5, level=1)], boot="other", wall=SECOND)
    out, _ = merged(tmp_path, a, b)
    # WHEN the page is asked for
    history = open_trace(out).pfn_history(5)
    # THEN there are two histories, and no record is part of a life of the other boot
    assert len(history.recordings) == 2
    assert history.events["recording"].tolist() == [1, 1, 2, 2]
    vms = dict(zip(history.lives["life_id"], history.lives["vm"], strict=True))
    assert [vms[life] for life in history.events["life_id"]] == history.events["vm"].tolist()
    told = list(lifetime_lines(out, Selection(pfns=(5, 5)), 40))
    assert sum(line.startswith("Recording on ") for line in told) == 2
    assert told.count("What happened to pfn 0x5: 2 records") == 2


def test_a_figure_of_a_page_is_of_one_recording_and_says_of_which(tmp_path):
    late = 60 * SECOND
    a = part(tmp_path, "a", [installs(1, 0, pfn=5, level=1)])
    groups = [installs(3, late, pfn=5, level=1)]
    b = part(tmp_path, "b", groups, boot="other", start=late, wall=SECOND)
    out, _ = merged(tmp_path, a, b)
    reading = read(out, lives=True, check=False)
    with style.style():
        report = report_of(reading)
        ((_, shown),) = figures(reading, report, ["refcount"], pfn=5)
        ((_, chosen),) = figures(reading, report, ["refcount"])
    for figure in (shown, chosen):
        said = " ".join(text.get_text() for text in figure.findobj(Text))
        assert "mapped 3 times" in said and "This is the recording on" in said
        # what lies between the parts is not a time in which nothing happened
        assert "s were recorded: the rest lies between the parts" in said
    assert "1 other recording has records of that frame too" in " ".join(
        text.get_text() for text in shown.findobj(Text)
    )


def test_what_no_recording_can_answer_is_said_once(tmp_path):
    # GIVEN three recordings without facts of their kernel
    parts = [
        part(tmp_path, boot, [installs(3 + at, 0)], boot=boot, wall=at * SECOND)
        for at, boot in enumerate(("a", "b", "c"))
    ]
    out, _ = merged(tmp_path, *parts)
    silent = check_trace(out).unanswerable
    # THEN each reason that all have stands once, without the names of all
    shared = [one for one in silent if not one.reason.startswith("recording on")]
    assert "hook page_free not attached in this recording" in {one.reason for one in shared}
    assert len(set(shared)) == len(shared)
    everyones = {one.reason for one in shared}
    assert not [one for one in silent if one.reason.partition(": ")[2] in everyones]


def test_what_one_recording_cannot_answer_names_it():
    answers = [_Answer("A", (), (Unanswerable("pins", "why"),)), _Answer("B", (), ())]
    assert [one.reason for one in _unable(answers)] == ["A: why"]


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
