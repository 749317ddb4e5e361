"""The facts of a report: one tree of plain data that the text, the JSON and the HTML are made of.

Who renders a `Report` adds nothing to it but words; `analysis.reportdata` makes one. Times are ns,
sizes 4K pages; strings are as the trace has them, so they may be hostile. May import: `analysis`.
"""

import dataclasses

from analysis.failures import Block, Failure, Head
from analysis.findings import Finding, Unanswerable
from analysis.histogram import Percentiles
from analysis.uncounted import UncountedMemory

__all__ = (
    "ClassRow",
    "CountRow",
    "EndRow",
    "FailureRow",
    "LatencyRow",
    "LifeRow",
    "LossRow",
    "PathRow",
    "Report",
    "ResultRow",
    "SlotRow",
    "SpteRow",
    "StageRow",
    "VmRow",
)


@dataclasses.dataclass(frozen=True, slots=True)
class VmRow:
    """A VM; 0 stands for records that name none. `process` is None if it is not known."""

    vm: int
    process: int | None
    vcpus: int
    faults: int
    created: bool
    destroyed: bool
    installed: int
    zapped: int


@dataclasses.dataclass(frozen=True, slots=True)
class ResultRow:
    """Faults of a VM that ended alike."""

    vm: int
    result: str
    faults: int


@dataclasses.dataclass(frozen=True, slots=True)
class PathRow:
    """Faults that took one path of `analysis.paths`; `prefetches` of them were no accesses."""

    path: str
    meaning: str
    faults: int
    prefetches: int
    results: dict[str, int]
    times: Percentiles


@dataclasses.dataclass(frozen=True, slots=True)
class StageRow:
    """How long one stage of the faults of one path was."""

    path: str
    stage: str
    meaning: str
    times: Percentiles


@dataclasses.dataclass(frozen=True, slots=True)
class LatencyRow:
    """How long whole faults took: of a level, a VM or a memslot, as `by` says.

    `name` is it in words; of `vm`, `as_id`, `slot` and `level` those are None that do not belong
    to it. Of a level are only faults that ended with a mapping.
    """

    by: str
    name: str
    vm: int | None
    as_id: int | None
    slot: int | None
    level: int | None
    times: Percentiles


@dataclasses.dataclass(frozen=True, slots=True)
class SlotRow:
    """Faults in a memslot, None standing for none; where it was last, and what is behind it.

    `asked` is False for faults that ended before fault-in, which is what would name the slot;
    `places` is how many places the slot had, 0 if the trace does not tell.
    """

    vm: int
    as_id: int
    slot: int | None
    asked: bool
    gfn: int | None
    pages: int
    hva: int
    places: int
    behind: str | None
    results: dict[str, int]


@dataclasses.dataclass(frozen=True, slots=True)
class ClassRow:
    """Pages of a class as faults found them if `level` is 0, else as SPTEs of it mapped them."""

    page_class: str
    level: int
    pages: int


@dataclasses.dataclass(frozen=True, slots=True)
class CountRow:
    """Faults whose page had a count of `before` after fault-in and `change` more at the end.

    `before` is None if it was above COUNT_EXACT_MAX.
    """

    outcome: str
    before: int | None
    change: int
    faults: int


@dataclasses.dataclass(frozen=True, slots=True)
class SpteRow:
    """Changes of leaf SPTEs that had one cause."""

    vm: int
    mmu: str
    level: int
    cause: str
    installed: int
    changed: int
    zapped: int


@dataclasses.dataclass(frozen=True, slots=True)
class LifeRow:
    """Mappings of one level and class; `times` are of those seen from birth to death.

    `before` were mapped before their first record, `after` after their last one; `lost` were
    touched by a loss, so that a record of theirs may be missing.
    """

    level: int
    page_class: str
    lives: int
    before: int
    after: int
    lost: int
    times: Percentiles


@dataclasses.dataclass(frozen=True, slots=True)
class EndRow:
    """Mappings that ended alike; `cause` is that of the record, "" of a censored end."""

    ended_by: str
    cause: str
    lives: int


@dataclasses.dataclass(frozen=True, slots=True)
class FailureRow:
    """Faults that failed alike, and what the trace knows of the page; see `analysis.failures`."""

    failure: Failure
    block: Block | None
    head: Head | None
    destroyed_ts: int | None


@dataclasses.dataclass(frozen=True, slots=True)
class LossRow:
    """The account of one kind of records; `missing` is what does not add up."""

    kind: str
    produced: int
    recorded: int
    lost: int
    filtered: int
    missing: int


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """What a trace says. `without` and `failed_hooks` are what could not be seen in it."""

    trace: str
    verdict: str
    complete: bool
    reason: str
    produced: int
    lost: int
    torn: int
    filtered: int
    unread: int
    without: tuple[dict[str, str], ...]
    failed_hooks: tuple[dict[str, str], ...]
    command: str
    kernel: str
    generation: str
    start: str
    #: The same by the clock of the records, CLOCK_MONOTONIC.
    start_ns: int
    seconds: float
    ended_by: str
    problem: str
    #: Files that a merged trace was made of.
    parts: tuple[str, ...]
    records: dict[str, int]
    vms: tuple[VmRow, ...]
    results: tuple[ResultRow, ...]
    paths: tuple[PathRow, ...]
    stages: tuple[StageRow, ...]
    latency: tuple[LatencyRow, ...]
    slots: tuple[SlotRow, ...]
    classes: tuple[ClassRow, ...]
    counts: tuple[CountRow, ...]
    sptes: tuple[SpteRow, ...]
    lifetimes: tuple[LifeRow, ...]
    lifetime_ends: tuple[EndRow, ...]
    #: SPTE records that are part of no mapping, by kind: orphan zap, orphan change.
    orphans: dict[str, int]
    #: What the detectors found, worst first; which of them cannot answer; None if none was asked.
    findings: tuple[Finding, ...]
    unanswerable: tuple[Unanswerable, ...]
    detectors: tuple[str, ...] | None
    failures: tuple[FailureRow, ...]
    #: Failed faults of kinds that are not among `failures`.
    failures_more: int
    uncounted: tuple[UncountedMemory, ...]
    #: Leaves that map uncounted pages and are not in `uncounted`.
    uncounted_more: int
    losses: tuple[LossRow, ...]
