"""What a check has to say: findings, questions that cannot be answered, and their JSON form.

Verdicts, in the order in which they are told:

    definite      the records alone prove it
    probable      every innocent explanation needs something that was not seen and is unlikely
    inconclusive  loss, a missing hook, a censored start or known sampling noise could explain it
    explained     a guest was hurt, and the kernel did what its generation promises

`explained` exists for faults that KVM of Linux 6.12 and older refuses because the page has no
reference count. The guest dies of it, so a person who asks why must be told; but the kernel kept
its rule, so nothing in the kernel under test is wrong and `check` does not fail (exit status 4 is
for definite and probable only). The remedy is another kernel or other memory, not a bug fix.
May import: numpy.
"""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

__all__ = (
    "EVIDENCE_MAX",
    "RANGES_MAX",
    "VERDICTS",
    "Chain",
    "Finding",
    "Innocent",
    "Unanswerable",
    "ranges_of",
    "weakest",
)

#: Worst first; see the module's docstring.
VERDICTS = ("definite", "probable", "inconclusive", "explained")
#: Those that make `pfntrace check` fail.
ANOMALIES = VERDICTS[:2]
#: Detectors whose findings other bugs lead to: of equal verdicts they are told last.
_AFTERMATH = ("use-after-free", "dead-mark", "growth")
#: Records of one chain of evidence.
EVIDENCE_MAX = 12
#: Ranges of guest or host frames that one finding names: all of most. What is told as text names
#: the first few of them.
RANGES_MAX = 4096


@dataclasses.dataclass(frozen=True, slots=True)
class Innocent:
    """An innocent explanation, and why it is ruled out, or that it is not."""

    explanation: str
    ruled_out: str

    def __post_init__(self) -> None:
        if not self.explanation or not self.ruled_out:
            raise ValueError("an explanation, and what becomes of it")


@dataclasses.dataclass(frozen=True, slots=True)
class Chain:
    """Which records to show as evidence: they are fetched after the trace was read.

    `records` are (kind, ts, cpu, seq) that must be there. Of the rest, those of the fault
    (`fault_ts`, `tid`) come first, then those that speak of `pfns` between `ts_from` and `ts_to`
    (both included; ns), nearest in time to the first record. At most EVIDENCE_MAX in all.
    """

    records: tuple[tuple[str, int, int, int], ...]
    pfns: tuple[int, ...] = ()
    #: (fault_ts, tid) of faults whose records belong to the chain.
    faults: tuple[tuple[int, int], ...] = ()
    ts_from: int = 0
    ts_to: int = (1 << 64) - 1


@dataclasses.dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong, however often it was seen.

    `count` is how often, `pages` on how many distinct host pages; `gfns` and `pfns` are ranges
    [first, last], at most RANGES_MAX of each: `more` says if that is not all. `first_ts` and
    `last_ts` are ns, CLOCK_MONOTONIC. `where` is the mapping behind the guest's memory (path, VM_*
    flags), `functions` the kernel's functions at work, `rule` the kernel's rule that is broken,
    with its source. `evidence` holds records as dicts of the columns that their kinds fill, in
    order of time.
    """

    detector: str
    verdict: str
    title: str
    rule: str
    count: int
    pages: int = 0
    vms: tuple[int, ...] = ()
    slots: tuple[int, ...] = ()
    gfns: tuple[tuple[int, int], ...] = ()
    pfns: tuple[tuple[int, int], ...] = ()
    #: were there more ranges than `gfns` or `pfns` name?
    more: bool = False
    first_ts: int = 0
    last_ts: int = 0
    where: str = ""
    functions: tuple[str, ...] = ()
    innocent: tuple[Innocent, ...] = ()
    chain: Chain | None = None
    evidence: tuple[dict[str, Any], ...] = ()
    #: in which recording of a merged trace it is; "" if the trace is one recording.
    recording: str = ""
    detail: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise ValueError(f"{self.verdict!r} is no verdict")
        if self.count < 1:
            raise ValueError("a finding was seen at least once")

    @property
    def is_anomaly(self) -> bool:
        """Does it make `pfntrace check` fail?"""
        return self.verdict in ANOMALIES

    @property
    def rank(self) -> tuple[int, bool, int, str, int]:
        """Sort key: worst verdict first, causes before what they lead to, the most frequent."""
        later = self.detector in _AFTERMATH
        return (VERDICTS.index(self.verdict), later, -self.count, self.detector, self.first_ts)

    def with_evidence(self, evidence: Iterable[dict[str, Any]]) -> "Finding":
        """Return the same finding with its records."""
        return dataclasses.replace(self, evidence=tuple(evidence))

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; numbers stay numbers, ranges are lists [first, last]."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        del data["chain"]
        data["innocent"] = [dataclasses.asdict(innocent) for innocent in self.innocent]
        return dict(json.loads(json.dumps(data, default=_plain)))


@dataclasses.dataclass(frozen=True, slots=True)
class Unanswerable:
    """A detector that cannot answer for this trace, and why: silence would look like health."""

    detector: str
    reason: str

    def to_json(self) -> dict[str, str]:
        """Return plain JSON."""
        return dataclasses.asdict(self)


def _plain(value: Any) -> Any:
    """Turn what numpy and pandas leave behind into plain JSON."""
    item = getattr(value, "item", None)
    if callable(item):
        return item()
    return str(value)


def weakest(*verdicts: str) -> str:
    """Return the weakest of some verdicts: a chain of proof is as strong as that."""
    return VERDICTS[max(VERDICTS.index(verdict) for verdict in verdicts)]


def ranges_of(
    frames: Iterable[int], limit: int = RANGES_MAX
) -> tuple[tuple[tuple[int, int], ...], bool]:
    """Join frame numbers to ranges [first, last]; also tell whether there were more than `limit`.

    >>> ranges_of([7, 1, 2, 3, 2])
    (((1, 3), (7, 7)), False)
    """
    every = np.unique(np.asarray(list(frames) if not hasattr(frames, "dtype") else frames, "u8"))
    if not len(every):
        return (), False
    breaks = np.flatnonzero(np.diff(every) != 1)
    firsts = every[np.concatenate([[0], breaks + 1])]
    lasts = every[np.concatenate([breaks, [len(every) - 1]])]
    found = tuple((int(a), int(b)) for a, b in zip(firsts[:limit], lasts[:limit], strict=True))
    return found, len(firsts) > limit
