"""A simulation makes an ordinary trace: same bytes from the same seed, everywhere."""

import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from unit.simdigest import STORIES, digest, pinned
from unit.simkit import make

from probes import wire
from probes.errors import OutputError, UsageError
from probes.facts import KernelFacts
from probes.profile import generation_of
from tracer.simulator import recorder
from tracer.simulator.clock import START_NS, Dice, Task, Turns
from tracer.simulator.kernels import KERNELS, facts_of
from tracer.simulator.scenario import names
from tracer.simulator.simulate import Knobs, catalogue, simulate
from tracer.simulator.wording import outcome_lines
from tracer.tracefile import TraceReader

ROOT = Path(__file__).resolve().parent.parent.parent


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "says"),
    [
        ({"kernel": "2.6"}, "no such kernel; there are 6.1, 6.12"),
        ({"scenario": "party"}, "no such scenario; there are balloon"),
        ({"scenario": "./nowhere.toml"}, "No such file"),
        ({"bugs": ("gremlin",)}, "no such bug"),
        ({"bugs": ("sign_extension",)}, "makes no sense on 6.12; it does on 6.1"),
        ({"bugs": ("missing_put=2",)}, "a number above 0, at most 1"),
        ({"bugs": ("missing_put=x",)}, "a number above 0, at most 1"),
        ({"bugs": ("double_install",)}, "needs --mmu shadow"),
        ({"mmu": "ept"}, "say tdp or shadow"),
        ({"vcpus": 0}, "from 1 to"),
        ({"hostile": ("rain",)}, "no such thing"),
        ({"hostile": ("loss=-1",)}, "a share above 0"),
        ({"hostile": ("skew=50000",)}, "the amount is 1 to 10000 ns"),
    ],
)
def test_knobs_that_make_no_sense_are_refused_in_one_line(tmp_path, knobs, says):
    with pytest.raises(UsageError, match=says) as told:
        make(tmp_path, **knobs)
    assert "\n" not in str(told.value)
    assert not list(tmp_path.glob("*.pfnt")), "nothing is left behind"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("title = 'x'", "lacks 'memory'"),
        ("title = 'x'\nmemory = 3\nphase = []", "memory = 3; write an array"),
        ("title = [", "not a scenario"),
        (
            "title = 'x'\n[[memory]]\nname='a'\nkind='soft'\ngfn=1\nshare=1.0\n[[phase]]\n",
            "kind = 'soft'; write one of anon",
        ),
        (
            "title='x'\n[[memory]]\nname='a'\nkind='anon'\ngfn=1\nshare=1.0\n"
            "[[phase]]\nhost=[{do='dance', memory='a'}]\n",
            "do = 'dance'; write one of discard",
        ),
        (
            "title='x'\n[[memory]]\nname='a'\nkind='anon'\ngfn=1\nshare=1.0\n"
            "[[phase]]\ntouch={memory='b'}\n",
            "no memory 'b'",
        ),
    ],
)
def test_a_scenario_that_is_none_says_what_is_wrong_with_it(tmp_path, text, says):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=says):
        make(tmp_path, scenario=str(path))


def test_a_trace_is_not_overwritten_unasked(tmp_path):
    path = tmp_path / "there.pfnt"
    path.write_bytes(b"mine")
    with pytest.raises(OutputError, match="exists already"):
        simulate(Knobs(mem_bytes=1 << 20), path, version="0")
    assert path.read_bytes() == b"mine"


# --- the same story everywhere --------------------------------------------------------------------


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_one_seed_is_one_trace_and_one_truth_in_every_process(tmp_path):
    # Given the same knobs in processes with other hash seeds and other file names
    code = (
        "import sys; from pathlib import Path\n"
        "from tracer.simulator.simulate import Knobs, simulate\n"
        "knobs = Knobs(scenario='nested', mem_bytes=2 << 20, seed=7, bugs=('vcpu_map_leak',))\n"
        "simulate(knobs, Path(sys.argv[1]) / 'a.pfnt', version='0')\n"
    )
    found = []
    for number, hash_seed in enumerate(("0", "4242")):
        folder = tmp_path / str(number)
        folder.mkdir()
        subprocess.run(
            [sys.executable, "-c", code, str(folder)],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": hash_seed, "TZ": f"UTC+{number}"},
            check=True,
        )
        found.append(digests(folder))

    # Then trace, lives, references and bugs are the same bytes
    assert len(found[0]) == 4
    assert found[0] == found[1]


def test_another_seed_is_another_story(tmp_path):
    first, second = (make(tmp_path, seed=seed, scenario="balloon") for seed in (1, 2))
    assert first.path.read_bytes() != second.path.read_bytes()


def test_the_dice_are_those_that_python_promises_to_keep():
    # "Notes on Reproducibility", module random: the sequence of random() for a seed stays.
    first = [0.13436424411240122, 0.8474337369372327, 0.763774618976614]
    assert [random.Random(1).random()] == first[:1]
    dice, jitters = Dice(1), 6 * (1 << 11)
    plain = random.Random(1)
    drawn = [int(plain.random() * 1024) for _ in range(jitters)]
    assert dice.jitters() == tuple(drawn[6:12])
    assert [dice.below(1 << 30) for _ in range(3)] == [
        int(plain.random() * (1 << 30)) for _ in range(3)
    ]
    assert drawn[:3] == [int(number * 1024) for number in first]


def test_nothing_in_a_trace_says_when_or_where_it_was_made(tmp_path):
    made = make(tmp_path)
    info = TraceReader(made.path).info()
    assert (info["hostname"], info["start"]) == ("simulator", "2023-09-11T02:16:30+00:00")
    assert str(tmp_path) not in " ".join(info["command"])


# --- an ordinary trace ----------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_head_names_the_generation_that_the_facts_show(kernel):
    facts = facts_of(KERNELS[kernel], 4)
    assert generation_of(facts) == KERNELS[kernel].generation
    assert KernelFacts.from_json(facts.to_json()) == facts


def test_a_trace_is_complete_and_its_counts_add_up(tmp_path):
    made = make(tmp_path, scenario="nested")
    info = TraceReader(made.path).info()
    assert info["complete"]
    assert info["records"] == made.outcome.records == info["produced"]
    assert (info["lost"], info["filtered"], info["torn"]) == (0, 0, 0)
    losses = made.rows("LOSS")
    newest = {(row["loss_kind"], row["cpu"]): row["produced"] for row in losses}
    for kind, count in info["kinds"].items():
        assert count == sum(made for (name, _), made in newest.items() if name == kind)


def test_the_end_of_a_vm_is_written_in_parts(tmp_path):
    # Given a VM with 32,768 pages mapped, which nobody disturbs while it lets go of them
    made = make(tmp_path, scenario="demand", mem_bytes=128 << 20)

    # Then what is held in memory at a time is bounded: the recorder writes as it goes
    reader = TraceReader(made.path)
    flushed = np.unique(np.concatenate([b["ts"].to_numpy() for b in reader.batches(["LOSS"])]))
    ts = np.concatenate([b["ts"].to_numpy() for b in reader.records(columns=["ts"])])
    parts = np.bincount(np.searchsorted(flushed, ts, side="right"))
    assert parts.sum() > 200_000 and parts.max() < 2 * recorder._HELD


@pytest.mark.parametrize("scenario", sorted(names()))
def test_numbers_on_a_cpu_have_no_gaps_and_time_does_not_run_backwards(tmp_path, scenario):
    rows = make(tmp_path, scenario=scenario).rows(*wire.KINDS[1:])
    by_cpu: dict[int, list[tuple[int, int]]] = {}
    for row in rows:
        by_cpu.setdefault(row["cpu"], []).append((row["seq"], row["ts"]))
    for numbered in by_cpu.values():
        numbered.sort()
        assert [seq for seq, _ in numbered] == list(range(len(numbered)))
        times = [ts for _, ts in numbered]
        assert times == sorted(times)


def test_the_packed_layouts_are_those_of_the_wire():
    assert recorder.FAULT_LAYOUT.size == wire.FAULT.itemsize
    for layout in ("EVENT", "SPTE", "RELEASE", "PAGE", "INVALIDATE"):
        assert getattr(recorder, f"{layout}_LAYOUT").size == wire.EVENT.itemsize


def test_every_field_of_a_record_lands_where_the_wire_has_it():
    # Given one record of each layout with a different number in each field
    task = Task(3, 11, 12, 13, 14)
    task.fault_ts = 99
    head = recorder.head_of(task, 2, 11)
    fields = recorder.EVENT_LAYOUT.pack(
        1, 2, 3, head, *range(4, 10), 10, 11, 12, 13, *range(14, 19)
    )
    event = np.frombuffer(fields, wire.EVENT)[0]
    spte = np.frombuffer(
        recorder.SPTE_LAYOUT.pack(1, 2, 3, head, 4, 5, 6, 7, 8, 10, 11, 12, 13, *range(14, 19)),
        wire.EVENT,
    )[0]
    release = np.frombuffer(
        recorder.RELEASE_LAYOUT.pack(1, 2, 3, head, 4, 5, 12, *range(14, 19)), wire.EVENT
    )[0]
    page = np.frombuffer(
        recorder.PAGE_LAYOUT.pack(1, 2, 3, head, 5, 9, *range(14, 19)), wire.EVENT
    )[0]
    invalidation = np.frombuffer(
        recorder.INVALIDATE_LAYOUT.pack(1, 2, 3, head, 6, 7, 8, 9, 12), wire.EVENT
    )[0]

    # Then each is at home
    header = {"ts": 1, "fault_ts": 2, "seq": 3, "cpu": 3, "kind": 2, "op": 11, "tid": 11}
    header |= {"tgid": 12, "vm": 13, "vcpu": 14, "stack": -1, "pad": 0}
    for record in (event, spte, release, page, invalidation):
        assert {name: record["h"][name] for name in header} == header
    for record in (event, spte, release, page):
        assert [record["page"][n] for n in ("flags", "refcount", "mapcount", "bits", "order")] == [
            14, 15, 16, 17, 18,
        ]  # fmt: skip
    body = ("gfn", "pfn", "a", "b", "c", "d", "level", "as_id", "cause", "mmu")
    assert [event[name] for name in body] == list(range(4, 14))
    assert [spte[name] for name in body] == [4, 5, 6, 7, 8, 0, 10, 11, 12, 13]
    assert [release[name] for name in body] == [4, 5, 0, 0, 0, 0, 0, 0, 12, 0]
    assert [page[name] for name in body] == [0, 5, 0, 0, 0, 9, 0, 0, 0, 0]
    assert [invalidation[name] for name in body] == [0, 0, 6, 7, 8, 9, 0, 0, 12, 0]
    assert invalidation["page"].tobytes() == bytes(24)


# --- turns ----------------------------------------------------------------------------------------


def test_stories_run_in_the_order_of_their_times():
    seen = []

    def story(name, *steps):
        for step in steps:
            yield START_NS + step
            seen.append(name + str(step))

    turns = Turns()
    turns.start(story("a", 30, 50), START_NS)
    turns.start(story("b", 20, 60), START_NS)
    for _ in turns.run():
        pass
    assert seen == ["b20", "a30", "a50", "b60"]
    assert turns.now == START_NS + 60


# --- what there is --------------------------------------------------------------------------------


def test_the_catalogue_names_everything_with_one_line():
    found = catalogue()
    assert set(found) == {"bugs", "scenarios", "kernels", "hostile"}
    for entries in found.values():
        assert entries
        assert all(entry["name"] and entry["title"] for entry in entries)
        assert all("\n" not in entry["title"] for entry in entries)
    json.dumps(found)
    scenarios = {entry["name"] for entry in found["scenarios"]}
    assert {bug["scenario"] for bug in found["bugs"]} <= scenarios
    kernels = {entry["name"] for entry in found["kernels"]}
    assert all(set(bug["kernels"]) <= kernels for bug in found["bugs"])


def test_no_other_part_of_the_tracer_knows_the_simulator():
    for path in (ROOT / "tracer").glob("*.py"):
        assert "tracer.simulator" not in path.read_text(), path.name


def test_the_command_line_lists_and_simulates(tmp_path):
    def run(*words):
        return subprocess.run(
            [sys.executable, str(ROOT / "pfntrace.py"), "simulate", *words],
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    listed = run("--list", "--json")
    assert set(json.loads(listed.stdout)) == {"bugs", "scenarios", "kernels", "hostile"}
    made = run("--kernel", "v9", "--mem", "1M", "--seed", "5", "-o", "x.pfnt")
    assert (made.returncode, made.stdout) == (0, "")
    assert made.stderr.splitlines()[0] == "pfntrace: seed      5"
    assert {p.name for p in tmp_path.iterdir()} == {
        "x.pfnt", "x.truth-lives.parquet", "x.truth-references.parquet", "x.truth-bugs.parquet",
    }  # fmt: skip
    for words in (("--mem", "tiny"), ("--bug", "gremlin"), ("--scenario", "party")):
        refused = run(*words)
        assert (refused.returncode, refused.stderr.count("\n")) == (2, 1), refused.stderr


def test_a_bug_that_never_struck_is_told_with_the_scenario_where_it_does(tmp_path):
    made = make(tmp_path, kernel="6.1", scenario="demand", bugs=("resurrect",))
    lines = list(outcome_lines(made.outcome, ("resurrect=0.5",)))
    assert "planted resurrect 0 times: it had no chance; try --scenario virtio_gpu" in lines


# --- no accident ----------------------------------------------------------------------------------


def test_simulations_are_those_that_were_pinned(tmp_path):
    # After a change on purpose: python tests/unit/simdigest.py --write
    known = pinned()
    assert set(known) == set(STORIES)
    changed = [
        name
        for name, knobs in STORIES.items()
        if digest(make(tmp_path, mem_bytes=1 << 20, seed=11, **knobs)) != known[name]
    ]
    assert changed == []
