"""Lives and checks against the truth: a few seeds here, 20 in `make test`, more in `make soak`."""

import dataclasses
from collections import Counter
from zlib import crc32

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from unit.simexcuses import Excuse, check_names, excuse, explained
from unit.simkit import make
from unit.simsoak import Kept, jobs_of, knobs_of, one
from unit.simtable import Table
from unit.simtruth import (
    COLUMNS,
    CONSEQUENCES,
    FINDS,
    STORIES,
    differences,
    judge,
    right_kind,
    told_stories,
)

from analysis.check import check_trace
from tracer.simulator.bugs import BUGS
from tracer.simulator.hostile import HOSTILE
from tracer.simulator.kernels import KERNELS
from tracer.simulator.scenario import names

#: Each scenario on three kernels, each kernel with four or five; now and then the other MMU.
STORIES_OF = [
    (kernel, scenario, "shadow" if (at + number) % 3 == 0 else "tdp")
    for number, scenario in enumerate(sorted(names()))
    for at, kernel in enumerate(KERNELS)
    if (at + number) % 3 == 0 or (at + number) % 9 == 1
]


@pytest.mark.parametrize(("kernel", "scenario", "mmu"), STORIES_OF)
def test_lives_are_those_of_the_ledger(tmp_path, kernel, scenario, mmu):
    seed = crc32(f"{kernel} {scenario}".encode()) % 1000
    made = make(tmp_path, kernel=kernel, scenario=scenario, mmu=mmu, vcpus=3, seed=seed)
    assert made.outcome.lives >= 2
    assert differences(made.outcome) == []


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_is_found_and_the_lives_are_right(tmp_path, bug):
    # Given the oldest kernel that can have the bug, and a scenario that gives it a chance
    kernel = BUGS[bug].kernels[0]
    made = make(tmp_path, kernel=kernel, scenario=BUGS[bug].scenario, mmu=BUGS[bug].mmu,
                bugs=(bug,), mem_bytes=4 << 20)  # fmt: skip
    rows = made.truth("bugs")
    assert sum(row["bug"] == bug for row in rows) == made.outcome.planted[bug] > 0

    # Then the lives are the ledger's, and the checks name the bug, on its pages, and nothing else
    assert differences(made.outcome) == []
    verdict = judge(made.outcome)
    assert verdict.told == ()
    assert not verdict.missed or explained(bug, kernel, seldom=False)


def test_another_kind_of_finding_by_the_right_detector_is_not_right(tmp_path):
    # Given a put that is missing, of which balance tells
    made = make(tmp_path, bugs=("missing_put",), mem_bytes=4 << 20)
    (leak,) = check_trace(made.path, ["balance"]).findings
    assert right_kind("missing_put", leak)
    # Then that a page was put twice would be wrong
    twice = dataclasses.replace(leak, detail={"shape": "double put"})
    assert not right_kind("missing_put", twice) and right_kind("double_put", twice)


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_bug_of_a_kernel_gets_its_chance(tmp_path, kernel):
    for bug in BUGS.values():
        if kernel in bug.kernels:
            made = make(tmp_path, kernel=kernel, scenario=bug.scenario, mmu=bug.mmu,
                        bugs=(bug.name,), mem_bytes=4 << 20, seed=2)  # fmt: skip
            assert made.outcome.planted.get(bug.name), bug.name


@pytest.mark.parametrize("kernel", ["6.1", "v8", "6.13"])
def test_five_livelocks_are_told_apart(tmp_path, kernel):
    # Given each reason that a vCPU can have to fault at one address for ever
    for bug, (story, verdict) in STORIES.items():
        if kernel not in BUGS[bug].kernels:
            continue
        made = make(tmp_path, kernel=kernel, scenario=BUGS[bug].scenario, bugs=(bug,))

        # Then check tells that one, with the blame that is due, and no other
        result = check_trace(made.path)
        assert told_stories(result) == {(story, verdict)}, bug
        found = [one for one in result.findings if one.detector == "livelock"]
        assert all(one.detail["signed"] == (bug == "sign_extension") for one in found)


@pytest.mark.parametrize("scenario", ["balloon", "nested", "slots", "idle"])
def test_nothing_is_found_where_nothing_was_planted(tmp_path, scenario):
    for kernel in ("6.1", "6.13", "v10"):
        made = make(tmp_path, kernel=kernel, scenario=scenario, mem_bytes=1 << 20, seed=3)
        assert judge(made.outcome).told == ()


def test_a_fault_that_is_mapped_with_bit_31_set_clears_the_comparison(tmp_path):
    # Given a sequence past bit 31, an obsolete root of some vCPUs, and faults of others that map
    made = make(tmp_path, kernel="6.13", scenario="livelock", bugs=("obsolete_root",), vcpus=3,
                mem_bytes=4 << 20, seed=4)  # fmt: skip
    assert any(
        row["sptes"] and row["mmu_seq"] >> 31 for row in made.rows() if row["kind"] == "FAULT"
    )

    # Then nobody says that the sequence is compared as a negative number
    verdict = judge(made.outcome)
    assert verdict.told == () and verdict.missed == ()
    found = [one for one in check_trace(made.path).findings if one.detector == "livelock"]
    assert found and not any(one.detail["signed"] for one in found)


def test_invalidations_that_end_are_not_said_to_be_without_end(tmp_path):
    # Given vCPUs whose root is obsolete for ever, in a storm: most of their rounds meet an
    # invalidation in progress, but between two nothing is
    made = make(tmp_path, kernel="6.13", scenario="storm", bugs=("obsolete_root",), vcpus=8,
                mem_bytes=2 << 20, seed=7706)  # fmt: skip
    told = told_stories(check_trace(made.path))
    assert told and ("unpaired", "probable") not in told


@pytest.mark.parametrize("mmu", ["tdp", "shadow"])
@pytest.mark.parametrize(
    ("bug", "scenario", "more"),
    [("stale_slot", "slots", {"vcpus": 4, "seed": 3}), ("wrong_gfn", "demand", {"faults": 6000})],
)
def test_what_a_bug_leads_to_is_planted_where_it_is(tmp_path, mmu, bug, scenario, more):
    # Given a slot that is gone, around which nothing may be prefetched any more; or a wrong leaf
    # in a page table, which the same fault would make again
    made = make(tmp_path, kernel="6.12", scenario=scenario, bugs=(bug,), mmu=mmu,
                mem_bytes=4 << 20, **more)  # fmt: skip
    # Then the truth has each of its pages
    assert differences(made.outcome) == []
    verdict = judge(made.outcome)
    assert verdict.told == () and verdict.missed == ()


def test_who_takes_half_of_a_large_mapping_back_invalidates_all_of_it(tmp_path):
    # Given memory of 2M mappings without compound pages, which the host takes back while a vCPU
    # faults (seed 112 of the soak: an invalidation of parts of two, a fault beside it in one)
    made = make(tmp_path, scenario="dax", bugs=("put_on_wrong_folio",), seed=112, vcpus=1,
                mem_bytes=2 << 20, mmu="tdp")  # fmt: skip

    # Then every invalidation is of whole ones, and no leaf is said to have outlived one
    rows = [row for row in made.rows() if row["kind"] == "INVALIDATE"]
    sizes = {row["hva_end"] - row["hva"] for row in rows}
    assert sizes == {2 << 20}
    assert judge(made.outcome).told == ()


@pytest.mark.parametrize("how", HOSTILE)
def test_records_that_suffer_accuse_nobody(tmp_path, how):
    # Given a sane kernel whose recording was hurt
    made = make(tmp_path, scenario="balloon", hostile=(how,), mem_bytes=2 << 20)

    # Then nothing is said to be definite or probable
    assert judge(made.outcome, exact=False).told == ()


# --- the table ------------------------------------------------------------------------------------


def test_every_bug_has_detectors_that_must_find_it():
    assert set(FINDS) == set(BUGS)
    assert set(CONSEQUENCES) <= set(BUGS)
    assert set(STORIES) == {bug for bug, found in FINDS.items() if found == {"livelock"}}
    assert check_names() == []


def test_a_number_below_one_needs_an_explanation_that_holds():
    # Given a detector that cannot see one kernel's put
    found = (Excuse("not seen", ("v7",), at_least=0.2),)

    # Then that is said of this kernel, as long as it is true, and of no other
    assert excuse(found, "v7", 0.5, 20) == ("not seen", "")
    assert excuse(found, "6.1", 1.0, 20) == ("", "")
    assert "nothing explains" in excuse(found, "6.1", 0.99, 20)[1]
    assert "less than 0.2" in excuse(found, "v7", 0.1, 20)[1]
    assert "still explained" in excuse(found, "v7", 1.0, 20)[1]
    assert excuse(found, "v7", 1.0, 19) == ("", ""), "few seeds do not mend a detector"


def test_a_run_that_went_wrong_is_counted_and_named():
    # Given a run with a bug that a detector must find, judged as if it had been missed
    job = next(job for job in jobs_of(1) if job[:3] == ("6.13", "wrong_gfn", ""))
    run = one(job)
    table = Table()
    assert table.add(run) == []
    assert "all 1 clean runs" in table.text()
    blind = dataclasses.replace(run.verdict, found=frozenset(), missed=("wrong_gfn",))
    complaints = table.add(dataclasses.replace(run, verdict=blind, unequal=("gfn of 1",)))

    # Then it is told, and the table is bad
    assert [text.split(": ")[1] for text in complaints] == ["gfn of 1", "missed"]
    assert table.bad == 2
    assert "all but 1 of 2 clean runs" in table.text()
    assert any("nothing explains it" in text for text in table.cells())


def test_the_soak_simulates_every_kernel_with_every_bug_clean_and_hostile():
    jobs = [*jobs_of(3), *jobs_of(4)]
    assert len(jobs) == len(set(jobs))
    pairs = {(kernel, bug) for bug in BUGS for kernel in BUGS[bug].kernels}
    for clean in (True, False):
        assert pairs == {(k, b) for k, b, kind, _ in jobs if b and (not kind) == clean}
    alone = {kind for _, bug, kind, _ in jobs if not bug and "+" not in kind}
    assert alone == {"", *HOSTILE}


def test_the_soak_lets_records_suffer_in_two_ways_at_once_all_pairs_in_turn():
    pairs = Counter(job[2] for seed in range(1, 22) for job in jobs_of(seed) if "+" in job[2])
    assert len(pairs) == 21 and set(pairs.values()) == {len(KERNELS)}
    assert knobs_of(("6.12", "", "skew+late", 5)).hostile == ("skew", "late")


def test_a_soak_that_was_interrupted_goes_on_where_it_was(tmp_path, monkeypatch):
    # Given a soak that kept the runs of one seed
    runs = [one(("6.12", "missing_put", "", 3))]
    Kept(str(tmp_path)).put(3, runs)

    # When the next one begins, then it has them, and only them
    kept = Kept(str(tmp_path))
    assert kept.get(3) == runs and kept.get(4) is None
    # And nothing of another tree, nor where nothing is kept
    monkeypatch.setattr("unit.simsoak.tree", lambda: "of another model")
    assert Kept(str(tmp_path)).get(3) is None
    assert Kept("").get(3) is None


@pytest.mark.parametrize("column", COLUMNS)
def test_a_life_that_is_wrong_in_one_column_is_told(tmp_path, column):
    # Given a truth of which one life is another than what was recorded
    made = make(tmp_path, kernel="6.12", scenario="nested", mem_bytes=1 << 20)
    path = made.outcome.truth["lives"]
    table = pq.read_table(path)
    values = table[column].to_pylist()
    at = next(n for n, value in enumerate(values) if value is not None)
    values[at] = "split" if isinstance(values[at], str) else values[at] + 1
    place = table.schema.get_field_index(column)
    field = table.schema.field(column)
    pq.write_table(table.set_column(place, field, pa.array(values, field.type)), path)

    # When both are compared, then this column is named, and no other (but what is in order by it)
    told = differences(made.outcome)
    assert any(text.startswith(f"{column} of ") for text in told)
    assert len(told) == 1 or column in ("birth_ts", "birth_cpu", "birth_seq")
