"""Lives and checks against the truth: a few seeds here, a thousand in `make soak`."""

from zlib import crc32

import pytest
from unit.simkit import make
from unit.simtruth import FINDS, differences, judge

from tracer.simulator.bugs import BUGS
from tracer.simulator.kernels import KERNELS
from tracer.simulator.scenario import names

#: Each scenario on three kernels, each kernel with four or five; now and then the other MMU.
STORIES = [
    (kernel, scenario, "shadow" if (at + number) % 3 == 0 else "tdp")
    for number, scenario in enumerate(sorted(names()))
    for at, kernel in enumerate(KERNELS)
    if (at + number) % 3 == 0 or (at + number) % 9 == 1
]


@pytest.mark.parametrize(("kernel", "scenario", "mmu"), STORIES)
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

    # Then the lives are the ledger's, and the checks name the bug and nothing else
    assert differences(made.outcome) == []
    verdict = judge(made.outcome, kernel)
    assert (verdict.missed, verdict.wrong) == ((), ())


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_bug_of_a_kernel_gets_its_chance(tmp_path, kernel):
    for bug in BUGS.values():
        if kernel in bug.kernels:
            made = make(tmp_path, kernel=kernel, scenario=bug.scenario, mmu=bug.mmu,
                        bugs=(bug.name,), mem_bytes=4 << 20, seed=2)  # fmt: skip
            # v9 as mailed keeps every reference, whatever else is planted.
            keeps = kernel == "v9-mailed" and bug.name.startswith(("missing", "zero_page"))
            assert made.outcome.planted.get("missing_put" if keeps else bug.name), bug.name


def test_every_bug_has_detectors_that_must_find_it():
    assert set(FINDS) == set(BUGS)


@pytest.mark.parametrize("scenario", ["balloon", "nested", "slots", "idle"])
def test_nothing_is_found_where_nothing_was_planted(tmp_path, scenario):
    for kernel in ("6.1", "6.13", "v10"):
        made = make(tmp_path, kernel=kernel, scenario=scenario, mem_bytes=1 << 20, seed=3)
        assert judge(made.outcome, kernel).wrong == ()


# Duplicates are not here: the kernel's ring cannot make them, and check believes its records.
@pytest.mark.parametrize("how", ["loss", "drop", "reorder", "skew", "late", "truncate"])
def test_records_that_suffer_accuse_nobody(tmp_path, how):
    # Given a sane kernel whose recording was hurt
    made = make(tmp_path, scenario="balloon", hostile=(how,), mem_bytes=2 << 20)

    # Then nothing is said to be definite or probable
    assert judge(made.outcome, "6.12").wrong == ()
