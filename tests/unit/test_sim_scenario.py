"""Scenario files: what is wrong with one is said in a line, and nothing is left on the disk."""

import copy
import dataclasses
import json
import math
import os
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from unit.simkit import make

from probes.errors import UsageError
from tracer.simulator import grammar
from tracer.simulator.grammar import Problem, read_step, step_of
from tracer.simulator.ops import VERBS
from tracer.simulator.scenario import Memory, Phase, Scenario, load, names

ROOT = Path(__file__).resolve().parent.parent.parent
NAN, INF = math.nan, math.inf

#: A story that is right, with a bit of everything.
RIGHT = {
    "title": "a story",
    "mmu": "tdp",
    "exit": True,
    "sequence": 5,
    "aliases": 2,
    "memory": [
        {"name": "ram", "kind": "anon", "gfn": 0x200, "pages": 512},
        {"name": "huge", "kind": "thp", "gfn": 0x100000, "share": 0.5, "flags": 0},
    ],
    "phase": [
        {
            "touch": {"memory": "ram", "order": "random", "write": 0.7, "fetch": 0.1, "share": 0.5},
            "host": [
                {"do": "discard", "memory": "huge", "pages": 7, "times": "busy", "event": "unmap"},
                {"do": "pfncache", "memory": "ram", "times": 3, "every_us": 20},
                {"do": "dirty_log", "memory": "ram", "rounds": 1, "every_us": 50},
            ],
            "after": [
                {"do": "age", "memory": "ram", "pages": 64},
                {"do": "move", "memory": "huge", "times": 1},
                {"do": "churn", "memory": "ram", "times": 1},
                {"do": "sleep", "memory": "ram", "us": 5},
                {"do": "discard", "memory": "ram", "pages": "all"},
            ],
            "passes": True,
        },
        {
            "touch": {"memory": "huge"},
            "host": [
                {"do": "merge", "memory": "ram", "times": 4},
                {"do": "storm", "memory": "huge", "times": 4},
                {"do": "pin", "memory": "huge"},
            ],
        },
    ],
}


def toml(value):
    """Return a value as TOML writes it in one line."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(k)} = {toml(v)}" for k, v in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return json.dumps(value)


def written(folder, story):
    path = folder / "mine.toml"
    path.write_text("".join(f"{json.dumps(k)} = {toml(v)}\n" for k, v in story.items()))
    return str(path)


def put(story, place, value):
    """Return a copy of a story with one value changed; `place` is a path of keys and numbers."""
    changed = copy.deepcopy(story)
    table = changed
    for step in place[:-1]:
        table = table[step]
    table[place[-1]] = value
    return changed


def refused(folder, story, faults=20):
    """Simulate a story that is none; return what is said of it."""
    before = set(folder.iterdir())
    with pytest.raises(UsageError) as told:
        make(folder, scenario=written(folder, story), mem_bytes=1 << 20, faults=faults)
    left = set(folder.iterdir()) - before - {folder / "mine.toml"}
    assert not left, "something is left behind"
    said = str(told.value)
    assert "\n" not in said
    return said.removeprefix(f"{folder / 'mine.toml'}: ")


FRAMES = "write a whole number from 0 to 1,099,511,627,775"
SHARE = "write a number from 0 to 1"
FIRST, TOUCH = ("memory", 0), ("phase", 0, "touch")
DISCARD, CACHE, LOG = (("phase", 0, "host", at) for at in range(3))
MOVE, SLEEP = ("phase", 0, "after", 1), ("phase", 0, "after", 3)
WRONG: list[tuple[tuple, object, str]] = [
    *[((*FIRST, "gfn"), v, f"memory 1: gfn = .*; {FRAMES}") for v in ("abc", 1.5, -5, 1 << 40)],
    *[((*FIRST, "gfn"), v, f"memory 1: gfn = .*; {FRAMES}") for v in (True, [1], "")],
    *[
        ((*FIRST, "pages"), v, "memory 1: pages = .*; write a whole number from 0 to 268,435,456$")
        for v in (100.5, "9", -5, [1], 1 << 40)
    ],
    *[((*FIRST, "flags"), v, "memory 1: flags = .*; write one of 0, 2") for v in ("x", -1, 1, 4)],
    *[
        (("memory", 1, "share"), v, f"memory 2: share = .*; {SHARE}")
        for v in ([1], NAN, INF, -0.1, 1e30, "1", True)
    ],
    ((*FIRST, "kind"), [1], r"memory 1: kind = \[1\]; write one of anon, thp"),
    ((*FIRST, "name"), "", "memory 1: name = ''; write one line of text"),
    ((*FIRST, "name"), "huge", "memory 2: there is a memory 'huge' already"),
    ((*FIRST, "size"), 3, "memory 1: there is no key 'size'; it takes name, kind, gfn"),
    ((*FIRST, "share"), 0.5, "memory 1: pages and share; keep one of them"),
    ((*FIRST, "gfn"), 0x100010, "memory 'ram'.* is within memory 'huge', .* before 0x100800"),
    ((*FIRST, "gfn"), (1 << 40) - 2, "memory 'ram'.* beyond guest frame 0xffffffffff"),
    (("memory", 1, "gfn"), (1 << 40) - 512, "memory 'huge'.* beyond guest frame"),  # it is moved
    (("mmu",), 5, "mmu = 5; write one of tdp, shadow"),
    (("exit",), "no", "exit = 'no'; write one of false, true"),
    (("exit",), 1, "exit = 1; write one of false, true"),
    *[(("sequence",), v, "sequence = .*; write a whole number") for v in ("abc", -1, 10**26)],
    (("sequence",), 10**4000, "sequence = a number of more than 64 bits; write a whole number"),
    *[(("aliases",), v, "aliases = .*; write a whole number") for v in ("3", 0, -3, 65)],
    *[(("title",), v, "title = .*; write one line of text") for v in (5, [1], "two\nlines", "")],
    (("titel",), "x", "there is no key 'titel'; it takes title, mmu"),
    (("memory",), [], r"memory = \[\]; write an array of 1 to 64 tables"),
    (("memory",), [1], r"memory = \[1\]; write an array of 1 to 64 tables"),
    (("phase",), "x", "phase = 'x'; write an array"),
    (("phase", 0, "passes"), "yes", "phase 1: passes = 'yes'; write one of false, true"),
    (("phase", 0, "touch"), {}, "phase 1: passes without touch has no end"),
    (("phase", 0, "touch"), 5, "phase 1: touch = 5; write a table"),
    (("phase", 0, "before"), [], "phase 1: there is no key 'before'; it takes touch, host"),
    ((*TOUCH, "order"), "sideways", "phase 1: touch: order = .*; write one of sequential, random"),
    ((*TOUCH, "memory"), "rom", "phase 1: touch: no memory 'rom'; there is ram, huge"),
    ((*TOUCH, "wirte"), 0.5, "phase 1: touch: there is no key 'wirte'; it takes memory, order"),
    *[
        ((*TOUCH, name), v, f"phase 1: touch: {name} = .*; {SHARE}")
        for name in ("write", "fetch", "share")
        for v in ("yes", NAN, INF, -0.5, 1.5, True)
    ],
    (("phase", 0, "host"), [{"do": "sleep", "memory": "ram"}] * 4, "write an array of 0 to 3"),
    ((*DISCARD, "do"), "dance", "phase 1: host 1: do = 'dance'; write one of discard, merge"),
    ((*DISCARD, "do"), [1], r"phase 1: host 1: do = \[1\]; write one of discard"),
    *[
        ((*DISCARD, "pages"), v, r"phase 1: host 1 \(discard\): pages = .*; write a .* or \"all\"$")
        for v in ([1], "many", 0, -1, 1.5, 1 << 40)
    ],
    *[
        ((*DISCARD, "times"), v, r"host 1 \(discard\): times = .*; write a whole .* or \"busy\"$")
        for v in ([1], "often", -1, 10**9, NAN)
    ],
    *[
        ((*DISCARD, "event"), v, r"host 1 \(discard\): event = .*; write one of unmap, clear")
        for v in ("nonsense", 5)
    ],
    ((*DISCARD, "pages"), "all", r"\(discard\): times says nothing of pages = \"all\"; take times"),
    ((*DISCARD, "tims"), 3, r"host 1 \(discard\): there is no key 'tims'; it takes do, memory,"),
    *[
        ((*CACHE, "every_us"), v, r"phase 1: host 2 \(pfncache\): every_us = .*; write a whole")
        for v in ("x", NAN, INF, 0, -1, 10**18)
    ],
    *[((*LOG, "rounds"), v, r"\(dirty_log\): rounds = ") for v in ("x", NAN, INF, -1, 10**9)],
    ((*LOG, "times"), 3, r"\(dirty_log\): there is no key 'times'; it takes do, memory, rounds"),
    (DISCARD, {"do": "churn", "memory": "ram"}, "phase 1: host: churn and dirty_log wait for each"),
    (DISCARD, {"memory": "ram"}, "phase 1: host 1: lacks 'do'; write one of discard"),
    (DISCARD, {"do": "pin"}, r"phase 1: host 1 \(pin\): lacks 'memory'; write"),
    ((*MOVE, "times"), "busy", r"phase 1: after 2 \(move\): times = 'busy'; write a whole number"),
    *[((*SLEEP, "us"), v, r"after 4 \(sleep\): us = ") for v in ("x", NAN, INF, -1, 10**18)],
]


@pytest.mark.parametrize(
    ("place", "value", "says"), WRONG, ids=[f"{p[-1]}-{str(v)[:20]!a}" for p, v, _ in WRONG]
)
def test_a_wrong_value_is_told_with_its_table_its_key_and_what_to_write(
    tmp_path, place, value, says
):
    # Given a story that is right, and one value of it that is not
    said = refused(tmp_path, put(RIGHT, place, value))
    # Then one line says where, what and the next step; no words of Python are in it
    assert re.search(says, said), said
    assert not re.search(r"__|argument|unhashable|NoneType|object", said)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"title", "not a scenario: .*; write TOML"),
        (b"title = '\xff'", "not a scenario: no text in UTF-8"),
        (b"a = " + b"[" * 20_000, "nested too deeply"),
        (b"#" * 70_000, "too long for a scenario; 64 KiB at most"),
        (b"", "lacks 'title'"),
    ],
)
def test_a_file_that_is_no_scenario_is_told_in_one_line(tmp_path, data, says):
    path = tmp_path / "mine.toml"
    path.write_bytes(data)
    with pytest.raises(UsageError, match=says) as told:
        load(str(path))
    assert "\n" not in str(told.value)


def test_a_file_without_end_is_not_read_to_its_end():
    with pytest.raises(UsageError, match="too long"):
        load("/dev/zero")


def test_a_story_of_more_than_a_year_ends_and_leaves_nothing(tmp_path):
    # Given a guest that touches its only page, and sleeps 64 hours each time
    nap = {"do": "sleep", "memory": "ram", "us": 3_600_000_000}
    phase = {"touch": {"memory": "ram"}, "after": [nap] * 64, "passes": True}
    ram = {"name": "ram", "kind": "anon", "gfn": 0x200, "pages": 1}
    said = refused(tmp_path, {"title": "x", "memory": [ram], "phase": [phase]}, faults=200)
    # Then it is too long, in a line
    assert "more than a year" in said


# --- what is right --------------------------------------------------------------------------------


def test_every_story_that_comes_along_is_read_and_has_room(tmp_path):
    for name in names():
        assert sum(load(name).sizes(1 << 18).values()) > 0


def test_the_story_with_a_bit_of_everything_is_told(tmp_path):
    made = make(tmp_path, scenario=written(tmp_path, RIGHT), faults=300)
    assert made.outcome.records > 300


def test_what_is_left_out_is_what_the_table_says():
    assert step_of("discard") == {
        "do": "discard", "memory": "", "pages": 64, "times": 1, "every_us": 200, "event": "clear",
    }  # fmt: skip
    assert read_step({"do": "age", "memory": "a", "times": 2})["pages"] == "all"
    with pytest.raises(Problem):
        step_of("sleep", times=3)


def test_the_table_has_each_verb_and_each_field():
    assert list(grammar.VERBS) == list(VERBS)
    for table, made in ((grammar.MEMORY, Memory), (grammar.PHASE, Phase)):
        assert list(table) == [field.name for field in dataclasses.fields(made)]
    kept = {"name", "phases"} | set(grammar.FILE) - {"phase"}
    assert kept == {field.name for field in dataclasses.fields(Scenario)}


def test_each_default_is_a_value_that_its_key_takes():
    tables = [grammar.FILE, grammar.MEMORY, grammar.PHASE, grammar.TOUCH, *grammar.VERBS.values()]
    for name, key in ((n, k) for table in tables for n, k in table.items()):
        assert key.default is None or key.takes.has(key.default), name


def test_more_pages_than_there_are_is_all_of_them(tmp_path):
    # Given a balloon far larger than its memory
    story = put(RIGHT, DISCARD, {"do": "discard", "memory": "ram", "pages": 1 << 28, "times": 2})
    made = make(tmp_path, scenario=written(tmp_path, story), faults=100)
    # Then each invalidation ends where the memory ends
    slot = min(note["slot"]["hva"] for note in made.notes() if "slot" in note)
    high = [row["hva_end"] for row in made.rows("INVALIDATE") if row["hva"] == slot]
    assert high and max(high) == slot + (512 << 12)


# --- anything -------------------------------------------------------------------------------------


def places(value, path=()):
    """Yield the path of every value of a story."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in entries:
        if isinstance(inner, dict | list):
            yield from places(inner, (*path, key))
        else:
            yield (*path, key)


VALUES = st.one_of(
    st.sampled_from(
        [0, 1, 2, 3, -1, 64, 511, 512, 0x80000, (1 << 40) - 1, 1 << 64, 10**26, 0.0, 1.0, 0.5, 1.5,
         NAN, INF, -INF, 1e30, True, False, "", "busy", "all", "ram", "huge", "x", "\x1b[2J",
         "move", "churn", "merge", "sleep", "discard", "shadow", "hugetlb", "ttm", "dax", "mmio",
         "readonly", "pfnmap_ro", "hugetlb1g", [], [1], {}, [{}], {"memory": "ram"}]
    ),
    st.integers(-5, 5000),
    st.floats(0, 1),
)  # fmt: skip


@settings(
    max_examples=int(os.environ.get("PFNTRACE_EXAMPLES", "60")),
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
@given(
    st.lists(
        st.tuples(st.sampled_from(list(places(RIGHT))), st.sampled_from(["", "x"]), VALUES),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(["6.1", "v9", "6.13"]),
    st.sampled_from(["", "shadow"]),
)
def test_any_file_is_either_told_or_refused_in_a_line(changes, kernel, mmu):
    # Given a story with some values and names of keys that somebody got wrong, or right
    story = RIGHT
    for place, more, value in changes:
        if more and isinstance(place[-1], str):
            place = (*place[:-1], place[-1] + more)
        try:
            story = put(story, place, value)
        except (TypeError, KeyError, IndexError):
            continue  # an earlier change took its table away
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = written(folder, story)
        try:
            # When it is simulated
            made = make(folder, scenario=file, kernel=kernel, mmu=mmu, mem_bytes=1 << 20, faults=60)
        except UsageError as err:
            # Then it is refused, and nothing is left
            assert "\n" not in str(err) and "\x1b" not in str(err)
            assert [path.name for path in folder.iterdir()] == ["mine.toml"]
        else:
            # … or a whole trace is there
            assert made.outcome.records > 0
