"""The analysis held against the simulator's truth: lives exactly, planted bugs by kind and page."""

import dataclasses

import pandas as pd

from analysis.check import check_trace
from analysis.findings import Finding
from analysis.lives import lives_of
from tracer.simulator.kernels import KERNELS
from tracer.simulator.simulate import Outcome

__all__ = ("CONSEQUENCES", "FINDS", "GAPS", "OPEN", "Verdict", "differences", "judge")

#: Columns of a life that both sides know.
COLUMNS = (
    *("vm", "as_id", "mmu", "level", "gfn", "pages", "pfn", "sptep", "slot", "birth_ts"),
    *("birth_cause", "birth_tid", "birth_tgid", "birth_cpu", "birth_seq", "fault_ts", "vcpu"),
    *("death_ts", "death_cause", "death_tid", "death_tgid", "death_cpu", "death_seq"),
    *("spte_birth", "changes", "refcount_birth", "refcount_death", "mapcount_birth", "ended_by"),
)

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
    "unpaired_start": {"unpaired", "livelock"},
    "vcpu_map_leak": {"pins"},
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
    "put_on_wrong_folio": {"balance", "growth"},
    "resurrect": {"use-after-free", "refcounted-flag"},
    "stale_spte": {"use-after-free", "dead-mark"},
    "stale_sequence": {"use-after-free", "dead-mark", "refcounted-flag"},
    "lockless_put": {"use-after-free", "dead-mark"},
    "wrong_flag": {"balance", "dead-mark"},
    "wrong_gfn": {"use-after-free", "dead-mark", "stale-slot"},
    "vcpu_map_leak": {"growth"},
}
_HIDDEN = ("v7", "v8", "v10", "v11")
#: (bug, kernel) -> why it cannot be found there, or not yet.
GAPS = {
    **{
        (bug, kernel): "the put shows nowhere and each page is faulted once: one reference more "
        "could be anybody's"
        for bug in ("missing_put", "missing_put_shadow")
        for kernel in _HIDDEN
    },
    **{
        ("writable_over_readonly", kernel): "without follow_pfnmap_start() no record has the "
        "mapping's flags"
        for kernel in ("6.1", "v9", "v9-mailed", *_HIDDEN)
    },
    ("resurrect", "v9-mailed"): "the reference is never put, so that the page is not freed",
    ("sign_extension", "6.1"): "told as inconclusive: an obsolete root could look the same",
    **{
        ("unpaired_start", kernel): "told as explained, if at all: the host's fault, not KVM's"
        for kernel in KERNELS
    },
}
#: (bug, kernel) -> why something else is named there too, until the checks are mended.
OPEN = {
    ("zero_page_growth", "v9"): "faults on the zero page that put nothing make balance believe in "
    "a version of the series that puts earlier, and blame the others",
}


@dataclasses.dataclass(frozen=True, slots=True)
class Verdict:
    """What the checks said of one simulation: `missed` bugs, findings that were `wrong`."""

    found: tuple[str, ...]
    missed: tuple[str, ...]
    wrong: tuple[str, ...]


def differences(outcome: Outcome) -> list[str]:
    """Return what the reconstructed lives and the ledger disagree about."""
    keys = ["birth_ts", "birth_cpu", "birth_seq"]
    got = lives_of(outcome.trace).sort_values(keys, ignore_index=True)
    truth = pd.read_parquet(outcome.truth["lives"]).sort_values(keys, ignore_index=True)
    if len(got) != len(truth):
        return [f"{len(got)} lives, truth has {len(truth)}"]
    told = []
    for name in COLUMNS:
        ours, theirs = (
            frame[name].astype(object).where(frame[name].notna(), None) for frame in (got, truth)
        )
        unequal = [at for at, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        if unequal:
            at = unequal[0]
            told.append(f"{name} of {len(unequal)}: {ours[at]!r}, truth {theirs[at]!r}")
    return told


def judge(outcome: Outcome, kernel: str) -> Verdict:
    """Ask the checks, and compare with what was planted: which bugs, and on which pages."""
    planted = outcome.planted
    anomalies = [f for f in check_trace(outcome.trace).findings if f.is_anomaly]
    named = {f.detector for f in anomalies}
    right: set[str] = set()
    for bug in planted:
        right |= FINDS[bug] | CONSEQUENCES.get(bug, set())
    missed = [bug for bug in planted if not named & FINDS[bug] and (bug, kernel) not in GAPS]
    wrong = [
        f"{f.detector} {f.verdict} {f.count} ({f.title})"
        for f in anomalies
        if f.detector not in right
    ]
    if len(planted) == 1 and not wrong:
        wrong = _elsewhere(outcome, anomalies, FINDS[next(iter(planted))])
    return Verdict(tuple(sorted(named)), tuple(missed), tuple(wrong))


def _elsewhere(outcome: Outcome, anomalies: list[Finding], names: set[str]) -> list[str]:
    """Return the findings of these detectors that name a page where nothing was planted."""
    bugs = pd.read_parquet(outcome.truth["bugs"])
    places = {"pfns": set(bugs["pfn"]), "gfns": set(bugs["gfn"])}
    told = []
    for finding in anomalies:
        ranges = {"pfns": finding.pfns, "gfns": finding.gfns}
        where = {
            name: all(set(range(first, last + 1)) <= places[name] for first, last in found)
            for name, found in ranges.items()
            if found
        }
        if finding.detector in names and where and not any(where.values()):
            told.append(f"{finding.detector} names other pages than were planted: {finding.pfns}")
    return told
