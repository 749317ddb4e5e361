"""`make soak`: many seeds of every kernel and bug, and the table of what the checks found.

    python tests/unit/simsoak.py SEEDS [TABLE [MINUTES [FOLDER]]]

Each kernel and bug is simulated with each seed twice: clean, where lives, kinds and pages must be
those of the ledger exactly, and hostile, where nobody may be accused. Exit status 1 if one run was
not as it should be, or if a cell of the table is not 1.00 and has no explanation, or has become
1.00 and still has one. With TABLE the Markdown is written there; after MINUTES no seed is begun.
With FOLDER what each seed said is kept there, and a soak that was interrupted goes on where it was,
as long as neither the model nor what judges it has changed.
"""

import gc
import hashlib
import itertools
import pickle
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from unit.compiled import source_of, stale  # noqa: E402
from unit.simtable import Job, Run, Table  # noqa: E402
from unit.simtruth import differences, judge  # noqa: E402

from tracer.simulator.bugs import BUGS  # noqa: E402
from tracer.simulator.hostile import HOSTILE  # noqa: E402
from tracer.simulator.kernels import KERNELS  # noqa: E402
from tracer.simulator.scenario import names  # noqa: E402
from tracer.simulator.simulate import Knobs, simulate  # noqa: E402
from tracer.tracefile import TraceReader  # noqa: E402

#: Enough for most bugs to strike, and for a run in less than 0.1 s.
_MEM = 2 << 20
#: Those that need more: pages kept by the thousand, a slot that faults race with, pages that are
#: not handed out again at once.
_MEM_MORE = dict.fromkeys(
    ("missing_put", "missing_put_shadow", "double_put", "stale_slot", "use_after_put"), 4 << 20
)
#: Two ways to be hostile at once.
PAIRS = ["+".join(pair) for pair in itertools.combinations(HOSTILE, 2)]
#: Of a kernel without a bug, in turn and not in step with scenarios and MMUs: many collide. A bug
#: has few, since each vCPU must get far enough in so little memory to be hit.
_VCPUS = (1, 2, 3, 4, 2, 7, 64)
#: Seeds of which records suffer, too: all at first, then one in so many.
_HOSTILE_SEEDS, _HOSTILE_EACH = 64, 16
#: What a run depends on, and of that what only tells of runs.
_DEPENDS, _TELLS = ("analysis", "probes", "tests", "tracer"), ("simtable", "simexcuses")


def jobs_of(seed: int) -> Iterator[Job]:
    """Yield what is simulated with one seed.

    Clean, every bug on every kernel. Hostile, a sane kernel in every way and in two at once, all
    pairs in turn, and with every second seed each bug in one way, all ways in turn; of many seeds
    only some.
    """
    kinds = list(HOSTILE) if seed <= _HOSTILE_SEEDS or seed % _HOSTILE_EACH == 0 else []
    for at, kernel in enumerate(KERNELS):
        for number, bug in enumerate(("", *BUGS)):
            if not bug or kernel in BUGS[bug].kernels:
                yield kernel, bug, "", seed
                if bug and kinds and (seed + at + number) % 2:
                    yield kernel, bug, kinds[seed % len(kinds)], seed
        for kind in [*kinds, PAIRS[(seed + at) % len(PAIRS)]] if kinds else ():
            yield kernel, "", kind, seed


def knobs_of(job: Job) -> Knobs:
    """Return the knobs of a run: a bug's own scenario, else all scenarios in turn."""
    kernel, bug, kind, seed = job
    scenarios = sorted(names())
    return Knobs(
        kernel=kernel,
        scenario=BUGS[bug].scenario if bug else scenarios[seed % len(scenarios)],
        bugs=(bug,) if bug else (),
        mmu=BUGS[bug].mmu if bug else ("", "tdp", "shadow")[seed % 3],
        hostile=tuple(kind.split("+")) if kind else (),
        seed=seed,
        mem_bytes=_MEM_MORE.get(bug, _MEM),
        vcpus=1 + seed % 4 if bug else _VCPUS[seed % len(_VCPUS)],
    )


def one(job: Job) -> Run:
    """Simulate once and ask everybody."""
    with tempfile.TemporaryDirectory() as folder:
        outcome = simulate(knobs_of(job), Path(folder) / "soak.pfnt", version="soak")
        with TraceReader(outcome.trace) as trace:
            verdict = judge(outcome, trace, exact=not job[2])
            unequal = () if job[2] else tuple(differences(outcome, trace))
    return Run(job, outcome.planted, verdict, unequal)


def tree() -> str:
    """Return a digest of all that the runs of a soak depend on: what one run loads."""
    one(("6.12", "missing_put", "", 1))
    loaded = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    files = {source_of(Path(path)) for path in loaded if path}
    files |= set(ROOT.glob("tracer/simulator/*/*.toml"))
    told = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted(files):
        if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in _DEPENDS:
            if path.stem not in _TELLS:
                told.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return told.hexdigest()[:16]


class Kept:
    """What earlier seeds said, in `folder` (none if "")."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder) / tree() if folder else None
        if self._folder:
            self._folder.mkdir(parents=True, exist_ok=True)

    def get(self, seed: int) -> list[Run] | None:
        """Return the runs of a seed, None if they were never all made."""
        path = self._folder / f"{seed}.pickle" if self._folder else None
        return pickle.loads(path.read_bytes()) if path and path.exists() else None

    def put(self, seed: int, runs: list[Run]) -> None:
        """Keep the runs of a seed."""
        if self._folder:
            part = self._folder / f"{seed}.part"
            part.write_bytes(pickle.dumps(runs))
            part.rename(self._folder / f"{seed}.pickle")


def main(seeds: int, output: str = "", minutes: str = "", folder: str = "") -> int:
    """Run, tell what went wrong, write the table."""
    if why := stale():
        print(why, file=sys.stderr)
        return 1
    table, kept, began = Table(), Kept(folder), time.monotonic()
    with ProcessPoolExecutor(2, initializer=gc.freeze) as pool:
        for seed in range(1, seeds + 1):
            if minutes and time.monotonic() - began > 60 * float(minutes):
                print(f"stopped after {minutes} minutes", file=sys.stderr)
                break
            runs = kept.get(seed)
            if runs is None:
                runs = list(pool.map(one, list(jobs_of(seed)), chunksize=2))
                kept.put(seed, runs)
            for run in runs:
                for complaint in table.add(run):
                    print(complaint[:300], file=sys.stderr, flush=True)
            if output and seed % 10 == 0:
                Path(output).write_text(table.text())
    for complaint in table.cells():
        print(complaint, file=sys.stderr)
    if output:
        Path(output).write_text(table.text())
    took = time.monotonic() - began
    print(f"{table.summary()} in {took:.0f} s", file=sys.stderr)
    return 1 if table.bad else 0


if __name__ == "__main__":
    raise SystemExit(main(int(sys.argv[1]), *sys.argv[2:5]))
