"""`make soak`: many seeds of every kernel and bug, and the table of what the checks found.

    python tests/unit/simsoak.py SEEDS [TABLE]

Exit status 1 if lives differ from the ledger, or if a cell of the table that has no explanation is
not 1.00. With TABLE the Markdown table is written there.
"""

import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from unit.simtruth import FINDS, GAPS, OPEN, differences, judge  # noqa: E402

from tracer.simulator.bugs import BUGS  # noqa: E402
from tracer.simulator.kernels import KERNELS  # noqa: E402
from tracer.simulator.scenario import names  # noqa: E402
from tracer.simulator.simulate import Knobs, simulate  # noqa: E402

#: (kernel, bug or "", seed) -> (was the bug there, was it found, other anomalies, unequal lives)
Job = tuple[str, str, int]
Told = tuple[bool, bool, tuple[str, ...], tuple[str, ...]]


#: The only thing known to be found where nothing was planted; it still fails the soak.
_NONE = "shadow MMU over compound pages: puts of prefetched tails are taken for puts of one page"


def one(job: Job) -> tuple[Job, Told]:
    kernel, bug, seed = job
    scenarios = sorted(names())
    scenario = BUGS[bug].scenario if bug else scenarios[seed % len(scenarios)]
    mmu = BUGS[bug].mmu if bug else ("", "tdp", "shadow")[seed % 3]
    knobs = Knobs(kernel=kernel, scenario=scenario, bugs=(bug,) if bug else (), mmu=mmu,
                  seed=seed, mem_bytes=4 << 20, vcpus=1 + seed % 4)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        outcome = simulate(knobs, Path(folder) / "soak.pfnt", version="soak")
        verdict = judge(outcome, kernel)
        unequal = tuple(differences(outcome))
    there = bug in outcome.planted
    wrong = tuple(f"{text} in {scenario} {mmu}" for text in verdict.wrong)
    return job, (there, bool(set(verdict.found) & FINDS.get(bug, set())), wrong, unequal)


def table(told: dict[tuple[str, str], list[Told]]) -> str:
    """Return recall and precision of each planted bug on each kernel."""
    lines = ["| bug | " + " | ".join(KERNELS) + " |", "|---" * (len(KERNELS) + 1) + "|"]
    notes: dict[str, list[str]] = defaultdict(list)
    for bug in ("", *BUGS):
        cells = []
        for kernel in KERNELS:
            runs = told.get((kernel, bug), [])
            chances = [run for run in runs if run[0] or not bug]
            if not chances:
                cells.append("–")
                continue
            recall = sum(run[1] for run in chances) / len(chances)
            clean = sum(not run[2] for run in chances) / len(chances)
            cells.append(f"{clean:.2f}" if not bug else f"{recall:.2f} / {clean:.2f}")
            if bug and recall < 1 and (bug, kernel) in GAPS:
                notes[f"{bug}: {GAPS[bug, kernel]}"].append(kernel)
            if not bug and clean < 1:
                notes["(none): " + _NONE].append(kernel)
            if bug and clean < 1 and (bug, kernel) in OPEN:
                notes[f"{bug}: {OPEN[bug, kernel]}"].append(kernel)
        lines.append(f"| {bug or '(none)'} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Recall / precision; of `(none)` the share of runs in which nothing was found.",
        "",
    ]
    lines += [f"- {', '.join(kernels)}: {why}" for why, kernels in notes.items()]
    return "\n".join(lines) + "\n"


def main(seeds: int, output: str = "") -> int:
    jobs = [
        (kernel, bug, seed)
        for seed in range(1, seeds + 1)
        for kernel in KERNELS
        for bug in ("", *BUGS)
        if not bug or kernel in BUGS[bug].kernels
    ]
    told: dict[tuple[str, str], list[Told]] = defaultdict(list)
    bad = 0
    with ProcessPoolExecutor(2) as pool:
        for (kernel, bug, seed), answer in pool.map(one, jobs, chunksize=8):
            told[kernel, bug].append(answer)
            there, found, wrong, unequal = answer
            missed = bug and there and not found and (bug, kernel) not in GAPS
            if missed or unequal or (wrong and (bug, kernel) not in OPEN):
                bad += 1
                why = "missed" if missed else "; ".join((*wrong, *unequal))
                print(f"{kernel} {bug or '-'} seed {seed}: {why}"[:200], file=sys.stderr)
    text = table(told)
    print(text)
    if output:
        head = "# What the checks find of what the simulator plants\n\nMade by `make soak`, "
        Path(output).write_text(f"{head}{seeds} seeds of each.\n\n{text}")
    print(f"{len(jobs)} simulations, {bad} not as they should be", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), *sys.argv[2:3]))
