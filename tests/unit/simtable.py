"""What a soak found, as numbers and as the Markdown of docs/SIMULATION.md."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterator

from unit.simexcuses import (
    DETECTORS,
    ENOUGH,
    HOSTILE,
    PAGES,
    PLENTY,
    Excuse,
    excuse,
    explained,
    shown,
)
from unit.simtruth import CONSEQUENCES, FINDS, Verdict

from tracer.simulator.bugs import BUGS
from tracer.simulator.hostile import HOSTILE as KINDS
from tracer.simulator.kernels import KERNELS

__all__ = ("Job", "Run", "Table")

#: kernel, bug or "", hostile kind, two as "skew+late", or "", seed
Job = tuple[str, str, str, int]

_HEAD = """# What the checks find of what the simulator plants

Made by `make soak`: do not edit. {runs}

- Lives: the reconstruction equals the ledger in {lives}.
- Hostile runs: {accused}.

Each bug is simulated in a scenario of its own (`pfntrace simulate --list --json` names it), in
2 MiB of guest memory, 4 MiB where it needs as many pages to show, with 1 to 4 vCPUs; a kernel
without a bug in all scenarios in turn, with 1 to 64 vCPUs, with TDP and without. Where a bug has
fewer chances than there, or more vCPUs race for its pages, it may be found less often.

An explanation of every number that is not 1.00 stands under its table; the soak fails without one.
"""
_FOUND = """
## Is each bug found?

Recall / precision. Recall: runs in which one of the bug's detectors named it, of those in which it
struck. Precision: findings (definite or probable) that were of this bug or what follows from it,
and named no page but its own, of all findings. Of `(none)` only the precision; where there was no
finding at all, it is 1.00. – makes no sense there. What breaks no rule of the kernel
(endless_storm, invalid_slot: the guest is stuck, but rightly so) is found if named as `explained`.
"""
_WHICH = """
## Which detector finds which bug

Runs in which this detector named this bug, of those in which it struck. The detectors that must
(at least one of them) stand in bold, the others tell what follows from the bug.
"""
_PAGES = """
## On how many of its pages

Planted pages that the detector named (where it named the bug), of all planted pages. For livelocks
guest frames.
"""
_PRECISION = """
## Precision of each detector

Right findings / all findings of clean runs.
"""
_HOSTILE = """
## Records that suffer

False accusations (definite or probable) / runs, with every bug and none planted.
"""
_SEEN = """
What became of planted bugs there, but for those that are not found in clean runs either: found; or
not found and said to be inconclusive (or impossible to answer); or nothing said.
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """One simulation and what was said of it; `unequal` is how its lives were not the ledger's."""

    job: Job
    planted: dict[str, int]
    verdict: Verdict
    unequal: tuple[str, ...]


class _Share:
    # Adds up a share: so much of so much.
    __slots__ = ("all", "some")

    def __init__(self) -> None:
        self.some = self.all = 0.0

    def add(self, some: float, of: float = 1) -> None:
        self.some, self.all = self.some + some, self.all + of

    @property
    def value(self) -> float:
        return self.some / self.all if self.all else 1.0


class Table:
    """Adds up runs; `bad` is how many things were not as they should be."""

    def __init__(self) -> None:
        self.bad = 0
        self._seeds: set[int] = set()
        self._runs: Counter[str] = Counter()
        self._unequal = self._lives = 0
        self._recall: dict[tuple[str, str], _Share] = defaultdict(_Share)
        self._precise: dict[tuple[str, str], _Share] = defaultdict(_Share)
        self._which: dict[tuple[str, str, str], _Share] = defaultdict(_Share)
        self._pages: dict[tuple[str, str, str], _Share] = defaultdict(_Share)
        self._right: dict[tuple[str, str], Counter[bool]] = defaultdict(Counter)
        self._accused: dict[tuple[str, str], _Share] = defaultdict(_Share)
        self._became: dict[str, Counter[str]] = defaultdict(Counter)

    # --- adding up -------------------------------------------------------------------------------

    def add(self, run: Run) -> list[str]:
        """Take one run; returns what was wrong with it, a line for each."""
        kernel, bug, kind, seed = run.job
        self._seeds.add(seed)
        self._runs[kind] += 1
        verdict = run.verdict
        name = f"{kernel} {bug or '-'} {kind or 'clean'} seed {seed}: "
        told = [name + text for text in (*verdict.told, *run.unequal)]
        if kind:
            self._accused[_ways(kind), kernel].add(len(verdict.told))
            if bug in run.planted and not explained(bug, kernel, seldom=False):
                self._became[kind][_became(bug, verdict)] += 1
        else:
            self._lives += 1
            self._unequal += bool(run.unequal)
            self._clean(run)
            missed = bug in verdict.missed and not explained(bug, kernel, seldom=True)
            told += [f"{name}missed"] if missed else []
        self.bad += len(told)
        return told

    def _clean(self, run: Run) -> None:
        kernel, bug, _, _ = run.job
        verdict = run.verdict
        self._precise[bug, kernel].add(verdict.right.total(), verdict.right.total())
        self._precise[bug, kernel].add(0, verdict.wrong.total())
        for counts, right in ((verdict.right, True), (verdict.wrong, False)):
            for name, count in counts.items():
                self._right[name, kernel][right] += count
        if bug not in run.planted:
            return
        self._recall[bug, kernel].add(bool(verdict.found & FINDS[bug]))
        for name in FINDS[bug] | CONSEQUENCES.get(bug, set()):
            self._which[bug, name, kernel].add(name in verdict.found)
        for (planted, name), (named, of) in verdict.pages.items():
            if planted == bug:
                self._pages[bug, name, kernel].add(named, of)

    # --- asking ----------------------------------------------------------------------------------

    def summary(self) -> str:
        """Return one line."""
        return f"{self._runs.total():,} simulations, {self.bad} not as they should be"

    def cells(self) -> list[str]:
        """Return what is not as it should be about whole cells, and count it as bad."""
        told = []
        for title, shares, excuses in self._with_excuses():
            for (bug, name, kernel), share in shares.items():
                _, complaint = excuse(excuses.get((bug, name), ()), kernel, share.value,
                                      len(self._seeds))  # fmt: skip
                if complaint:
                    told.append(f"{title} of {bug} by {name} on {kernel} {complaint}")
            for (bug, name), reasons in excuses.items():
                if not self._enough(reasons):
                    continue
                mine = [share.value for key, share in shares.items() if key[:2] == (bug, name)]
                if mine and min(mine) >= 1:
                    told.append(f"{title} of {bug} by {name} is 1.00 everywhere, and explained")
        for bug, name in _pairs():
            if not self._enough(DETECTORS.get((bug, name), ())):
                continue
            if not any(s.some for key, s in self._which.items() if key[:2] == (bug, name)):
                told.append(f"{name} never named {bug}: take it out of what is expected")
        for bug in BUGS:
            for kernel in BUGS[bug].kernels:
                if not self._recall[bug, kernel].all:
                    told.append(f"{bug} never struck on {kernel}")
        for kind, count in self._became.items():
            if count[_BECAME[2]] and kind not in HOSTILE:
                told.append(f"{kind}: of {count[_BECAME[2]]} planted bugs nothing was said")
        self.bad += len(told)
        return told

    def _enough(self, excuses: tuple[Excuse, ...]) -> bool:
        """Are there seeds enough to say that something never happens, or always?"""
        seldom = bool(excuses) and all(one.seldom for one in excuses)
        return len(self._seeds) >= (PLENTY if seldom else ENOUGH)

    def _with_excuses(
        self,
    ) -> Iterator[
        tuple[str, dict[tuple[str, str, str], _Share], dict[tuple[str, str], tuple[Excuse, ...]]]
    ]:
        yield "recall", self._which, DETECTORS
        yield "share of pages", self._pages, PAGES

    # --- writing ---------------------------------------------------------------------------------

    def text(self) -> str:
        """Return the whole document."""
        accused = int(sum(share.some for share in self._accused.values()))
        hostile = sum(count for kind, count in self._runs.items() if kind)
        unequal = self._unequal
        seeds = len(self._seeds)
        runs = f"{seeds:,} seed{'s' if seeds != 1 else ''} of each kernel and bug: "
        runs += f"{self._runs['']:,} clean runs and {hostile:,} hostile ones."
        return "".join(
            (
                _HEAD.format(
                    runs=runs,
                    lives=f"all {self._lives:,} clean runs" if not unequal
                    else f"all but {unequal:,} of {self._lives:,} clean runs",
                    accused=f"{accused or 'no'} false definite or probable finding"
                    + ("s" if accused > 1 else ""),
                ),
                _FOUND, self._found(),
                _WHICH, self._shares(self._which, DETECTORS),
                _PAGES, self._shares(self._pages, PAGES),
                _PRECISION, self._precisions(),
                _HOSTILE, self._hostile(),
            )
        )  # fmt: skip

    def _found(self) -> str:
        rows = []
        for bug in ("", *BUGS):
            cells = []
            for kernel in KERNELS:
                recall, precise = self._recall.get((bug, kernel)), self._precise.get((bug, kernel))
                if precise is None:
                    cells.append("–")
                elif not bug:
                    cells.append(shown(precise.value))
                else:
                    cells.append(f"{shown(recall.value if recall else 0)} / {shown(precise.value)}")
            rows.append([bug or "(none)", *cells])
        return _table(["bug", *KERNELS], rows) + (
            "\nWhere recall is not 1.00, the next table says of each detector why not.\n"
        )

    def _shares(
        self, shares: dict[tuple[str, str, str], _Share],
        excuses: dict[tuple[str, str], tuple[Excuse, ...]],
    ) -> str:  # fmt: skip
        rows, notes = [], []
        for bug, name in _pairs():
            mine = {k: shares[bug, name, k] for k in KERNELS if (bug, name, k) in shares}
            if not mine:
                continue
            must = name in FINDS[bug] and shares is self._which
            title = f"**{name}**" if must else name
            cells = [shown(mine[k].value) if k in mine else "–" for k in KERNELS]
            rows.append([bug, title, *cells])
            reasons: dict[str, list[str]] = defaultdict(list)
            for kernel, share in mine.items():
                why, _ = excuse(excuses.get((bug, name), ()), kernel, share.value, 0)
                if why:
                    reasons[why].append(kernel)
            notes += [f"- {bug}, {name}, {', '.join(k)}: {why}" for why, k in reasons.items()]
        return _table(["bug", "detector", *KERNELS], rows) + "\n" + "\n".join(notes) + "\n"

    def _precisions(self) -> str:
        detectors = sorted({name for name, _ in self._right})
        rows = []
        for name in detectors:
            cells = []
            for kernel in KERNELS:
                count = self._right.get((name, kernel))
                cells.append(f"{count[True]:,} / {count.total():,}" if count else "–")
            rows.append([name, *cells])
        return _table(["detector", *KERNELS], rows)

    def _hostile(self) -> str:
        rows = []
        for kind in (*KINDS, _TWO):
            shares = [self._accused[kind, kernel] for kernel in KERNELS]
            rows.append([kind, *(f"{share.some:.0f} / {share.all:,.0f}" for share in shares)])
        text = _table(["records", *KERNELS], rows) + "\n" + _SEEN
        rows = []
        for kind in KINDS:
            count = self._became[kind]
            rows.append([kind, *(f"{count[what]:,}" for what in _BECAME)])
        notes = [f"- {kind}, nothing said: {why}" for kind, why in HOSTILE.items()]
        return text + _table(["records", *_BECAME], rows) + "\n" + "\n".join(notes) + "\n"


_BECAME = ("found", "inconclusive", "nothing said")
_TWO = "two at once"


def _ways(kind: str) -> str:
    """Return what a run's records suffered, as a row's name: "skew+late" is one of many pairs."""
    return _TWO if "+" in kind else kind


def _became(bug: str, verdict: Verdict) -> str:
    if verdict.found & FINDS[bug]:
        return _BECAME[0]
    return _BECAME[1] if verdict.unsure & FINDS[bug] else _BECAME[2]


def _pairs() -> Iterator[tuple[str, str]]:
    for bug in BUGS:
        for name in sorted(FINDS[bug]):
            yield bug, name
        for name in sorted(CONSEQUENCES.get(bug, set())):
            yield bug, name


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
