"""The analysis held against the simulator's truth: lives exactly, planted bugs by kind and page."""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from analysis.check import CheckResult, check_trace
from analysis.findings import Finding
from analysis.lives import lives_of
from tracer.simulator.simulate import Outcome
from tracer.tracefile import TraceReader

__all__ = (
    "COLUMNS", "CONSEQUENCES", "FINDS", "SHAPES", "STORIES", "Verdict", "differences", "judge",
    "right_kind", "told_stories",
)  # fmt: skip

#: Columns of a life that both sides know.
COLUMNS = (
    *("vm", "as_id", "mmu", "level", "gfn", "pages", "pfn", "sptep", "slot", "birth_ts"),
    *("birth_cause", "birth_tid", "birth_tgid", "birth_cpu", "birth_seq", "fault_ts", "vcpu"),
    *("death_ts", "death_cause", "death_tid", "death_tgid", "death_cpu", "death_seq"),
    *("spte_birth", "changes", "refcount_birth", "refcount_death", "mapcount_birth", "ended_by"),
)

_KEYS = ("birth_ts", "birth_cpu", "birth_seq")

#: Planted bug -> the detectors of which one must name it.
FINDS = {
    "missing_put": {"balance", "growth"},
    "missing_put_shadow": {"balance", "growth"},
    "double_put": {"balance", "use-after-free"},
    "put_on_wrong_folio": {"wrong-folio"},
    "use_after_put": {"dead-mark"},
    "resurrect": {"balance", "dead-mark"},
    "stale_spte": {"invalidation"},
    "stale_sequence": {"stale-install"},
    "stale_slot": {"stale-slot"},
    "sign_extension": {"livelock"},
    "unpaired_start": {"livelock"},
    "endless_storm": {"livelock"},
    "obsolete_root": {"livelock"},
    "invalid_slot": {"livelock"},
    "vcpu_map_leak": {"pins"},
    "cache_leak": {"pins"},
    "zero_page_growth": {"growth", "balance"},
    "lockless_put": {"balance"},
    "wrong_flag": {"refcounted-flag"},
    "writable_over_readonly": {"writable"},
    "double_install": {"two-leaves"},
    "wrong_gfn": {"gfn-outside"},
}
#: What the same bug makes happen to the same pages: right, but not the bug's own name.
CONSEQUENCES = {
    "double_put": {"dead-mark", "refcounted-flag"},
    "put_on_wrong_folio": {"balance", "dead-mark"},
    "resurrect": {"use-after-free", "refcounted-flag"},
    "stale_spte": {"use-after-free", "dead-mark"},
    "stale_sequence": {"use-after-free", "dead-mark", "refcounted-flag"},
    "lockless_put": {"use-after-free", "dead-mark"},
    "wrong_flag": {"balance", "dead-mark"},
    "wrong_gfn": {"use-after-free", "dead-mark"},
}
#: The same where records are missing: of a fault that was under way when the recording began, the
#: leaf in the wrong place is nobody's.
_IN_PART = {"wrong_gfn": {"install"}}
#: What may become of a page that is mapped and has no reference.
_FREED = {"freed", "freed by put", "freed by drain", "reused"}
#: A free page's leaf says that it is counted: it was made too late, or its page put too often.
_FREE_AND_BIT = {"bit set", "uncounted"}
#: Bug -> detector -> the kinds of finding (`detail["shape"]`) that are right there; of what is not
#: named any kind is, or the detector tells only one.
SHAPES = {
    "missing_put": {"balance": {"leak"}, "growth": {"never freed", "new pages", "rises"}},
    "missing_put_shadow": {
        "balance": {"leak"},
        "growth": {"never freed", "new pages", "rises"},
    },
    "double_put": {
        "balance": {"double put", "fewer than mapped", "put at count 0"},
        "use-after-free": _FREED,
        "refcounted-flag": _FREE_AND_BIT,
    },
    "put_on_wrong_folio": {
        "balance": {"put at count 0", "fewer than mapped"},
        "dead-mark": {"marked at count 0", "zapped at count 0"},
    },
    "use_after_put": {"dead-mark": {"marked at count 0"}},
    "resurrect": {
        "balance": {"resurrected"},
        "use-after-free": _FREED,
        "refcounted-flag": _FREE_AND_BIT,
    },
    "zero_page_growth": {"balance": {"leak"}, "growth": {"rises"}},
    "lockless_put": {
        "balance": {"put without a get", "put at count 0"},
        "use-after-free": _FREED,
    },
    "vcpu_map_leak": {"pins": {"leaked"}},
    "cache_leak": {"pins": {"refreshed"}},
    "stale_spte": {"use-after-free": _FREED},
    "stale_sequence": {
        "use-after-free": _FREED,
        "refcounted-flag": _FREE_AND_BIT,
        "dead-mark": {"marked at count 0", "zapped at count 0"},
    },
    "wrong_flag": {
        "balance": {"leak"},
        "refcounted-flag": {"bit set", "counted", "uncounted", "walked"},
        "dead-mark": {"marked at count 0", "zapped at count 0"},
    },
    "wrong_gfn": {"use-after-free": _FREED},
}
#: Planted livelock -> the story that detector livelock must tell of it, and its verdict: only the
#: two of KVM are KVM's, an invalidation without end is somebody's, the others are hosts at work.
STORIES = {
    "sign_extension": ("comparison", "definite"),
    "obsolete_root": ("comparison", "probable"),
    "unpaired_start": ("unpaired", "probable"),
    "endless_storm": ("storm", "explained"),
    "invalid_slot": ("slot", "explained"),
}


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What the checks said of one simulation.

    `found` are the detectors that named a planted bug on its pages, `right` and `wrong` how many
    findings of each detector were and were not, `told` the wrong ones in words, `missed` the bugs
    that nobody named, `unsure` the detectors that were inconclusive or could not answer. `pages`
    is for each bug and detector of FINDS (planted pages that it named, planted pages).
    """

    found: frozenset[str]
    missed: tuple[str, ...]
    right: Counter[str]
    wrong: Counter[str]
    told: tuple[str, ...]
    unsure: frozenset[str]
    pages: dict[tuple[str, str], tuple[int, int]]


def differences(outcome: Outcome, trace: TraceReader | None = None) -> list[str]:
    """Return what the reconstructed lives and the ledger disagree about; `trace` may be open."""
    truth = pq.ParquetFile(outcome.truth["lives"]).read(list(COLUMNS), use_threads=False)
    truth = truth.sort_by([(name, "ascending") for name in _KEYS])
    got = lives_of(trace or outcome.trace)
    if len(got) != len(truth):
        return [f"{len(got)} lives, truth has {len(truth)}"]
    # Not Table.from_pandas(), most of which describes the DataFrame for who wants it back.
    columns = [pa.array(got[name], truth.schema.field(name).type, from_pandas=True)
               for name in COLUMNS]  # fmt: skip
    keys = [got[name].to_numpy(np.uint64, na_value=(1 << 64) - 1) for name in reversed(_KEYS)]
    order = np.lexsort(keys)
    ours = pa.table(columns, names=list(COLUMNS)).take(pa.array(order))
    told = []
    for name in COLUMNS:
        if not ours[name].equals(truth[name]):
            pairs = list(zip(ours[name].to_pylist(), truth[name].to_pylist(), strict=True))
            unequal = [pair for pair in pairs if pair[0] != pair[1]]
            told.append(f"{name} of {len(unequal)}: {unequal[0][0]!r}, truth {unequal[0][1]!r}")
    return told


class _Truth:
    """What was planted, by bug: host frames, guest frames."""

    def __init__(self, outcome: Outcome) -> None:
        self.planted = outcome.planted
        self.pfns: dict[str, set[int]] = defaultdict(set)
        self.gfns: dict[str, set[int]] = defaultdict(set)
        bugs = pq.read_table(outcome.truth["bugs"], columns=["bug", "pfn", "gfn"]).to_pydict()
        for bug, pfn, gfn in zip(bugs["bug"], bugs["pfn"], bugs["gfn"], strict=True):
            self.pfns[bug].add(pfn)
            self.gfns[bug].add(gfn)
        if "put_on_wrong_folio" in self.planted:  # the page that was put instead is one, too
            puts = pq.read_table(outcome.truth["references"], columns=["pfn", "put_pfn"])
            pairs = zip(*puts.to_pydict().values(), strict=True)
            wrong = {put for got, put in pairs if put is not None and put != got}
            self.instead = wrong
        else:
            self.instead = set()

    def allows(self, finding: Finding, exact: bool) -> bool:
        """Is this detector right here, and all pages that it names (some: one) of its bugs?"""
        bugs = [
            bug for bug in self.planted
            if (
                finding.detector in FINDS[bug] | CONSEQUENCES.get(bug, set())
                or (not exact and finding.detector in _IN_PART.get(bug, set()))
            )
            and right_kind(bug, finding)
        ]  # fmt: skip
        if finding.detector == "livelock":
            bugs = [bug for bug in bugs if _story(finding) == STORIES[bug]]
        if not bugs:
            return False
        if finding.pfns:
            named, planted = finding.pfns, self.instead.union(*(self.pfns[bug] for bug in bugs))
        else:
            named, planted = finding.gfns, set().union(*(self.gfns[bug] for bug in bugs))
        frames = _frames(named)
        return frames <= planted if exact or not frames else bool(frames & planted)

    def named(self, bug: str, findings: Sequence[Finding]) -> tuple[int, int]:
        """Return (pages of the bug that right findings name, pages of the bug)."""
        by_gfn = bug in STORIES
        planted = (self.gfns if by_gfn else self.pfns)[bug]
        listed: set[int] = set()
        counted = 0
        for finding in findings:
            listed |= _frames(finding.gfns if by_gfn else finding.pfns)
            counted = max(counted, 0 if by_gfn else finding.pages)
        return min(max(len(listed & planted), counted), len(planted)), len(planted)


def right_kind(bug: str, finding: Finding) -> bool:
    """Is what a detector tells the kind of thing that the bug does?"""
    kinds = SHAPES.get(bug, {}).get(finding.detector)
    return kinds is None or finding.detail.get("shape") in kinds


def _story(finding: Finding) -> tuple[str, str]:
    return finding.detail["story"], finding.verdict


def _frames(ranges: Sequence[tuple[int, int]]) -> set[int]:
    return {frame for first, last in ranges for frame in range(first, last + 1)}


def told_stories(result: CheckResult) -> set[tuple[str, str]]:
    """Return (story, verdict) of each livelock that was told."""
    return {_story(one) for one in result.findings if one.detector == "livelock"}


def judge(outcome: Outcome, trace: TraceReader | None = None, *, exact: bool = True) -> Verdict:
    """Ask the checks, and compare with what was planted: which bugs, and on which pages.

    `trace` may be open. Unless `exact`, a right finding may name other pages too: where records
    were lost, a page whose put was lost cannot be told from one that was never put.
    """
    truth, result = _Truth(outcome), check_trace(trace or outcome.trace)
    hosts = {STORIES[bug] for bug in outcome.planted if bug in STORIES}
    heard = [
        one for one in result.findings
        if one.is_anomaly or (one.detector == "livelock" and _story(one) in hosts)
    ]  # fmt: skip
    right = [one for one in heard if truth.allows(one, exact)]
    wrong = [one for one in heard if one not in right]
    found = frozenset(one.detector for one in right)
    unsure = {one.detector for one in result.findings if one.verdict == "inconclusive"}
    return Verdict(
        found=found,
        missed=tuple(bug for bug in outcome.planted if not found & FINDS[bug]),
        right=Counter(one.detector for one in right),
        wrong=Counter(one.detector for one in wrong),
        told=tuple(
            f"{one.detector} {one.verdict} {one.count} on {one.pfns[:3]} ({one.title})"
            for one in wrong
        ),
        unsure=frozenset(unsure | {one.detector for one in result.unanswerable}),
        pages={
            (bug, name): truth.named(bug, [one for one in right if one.detector == name])
            for bug in outcome.planted
            for name in FINDS[bug] & found
        },
    )
