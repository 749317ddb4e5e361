"""From what a trace adds up to, to the facts of its report: the last step that computes anything.

May import: pandas, `analysis`, `tracer.describe`.
"""

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pandas as pd

from analysis.failures import Failure, block_of, failures, head_before
from analysis.histogram import Percentiles
from analysis.lifetotals import LifeTotals
from analysis.mappings import Mappings
from analysis.pages import PAGE_CLASSES
from analysis.paths import PATHS, STAGES
from analysis.reading import Reading
from analysis.reportrows import (
    ClassRow,
    CountRow,
    EndRow,
    FailureRow,
    LatencyRow,
    LifeRow,
    LossRow,
    PathRow,
    Report,
    ResultRow,
    SlotRow,
    SpteRow,
    StageRow,
    VmRow,
)
from analysis.totals import MANY, NO_FAULTIN, OUTCOMES, Totals
from analysis.uncounted import uncounted_memory
from tracer.describe import verdict_line

__all__ = ("report_of", "result_order")

#: Generations in which a fault fails if its page has no count.
_TAKES_REFERENCE = ("G0a", "G0b")
#: Results in the order of a report; others follow by name.
_RESULTS = ("fixed", "spurious", "retry", "emulate", "write_protected", "continue", "error")
_SECONDS_MAX = 1e9


def report_of(reading: Reading) -> Report:
    """Return the facts of the report of a trace that was read.

    One that is cut or damaged is reported as far as it is intact, and its verdict says so.
    """
    totals, checked = reading.totals, reading.checked
    info = totals.info
    mappings = Mappings(totals.vmas, totals.notes)
    hooks = _hooks(totals)
    failed = failures(
        totals.failed,
        mappings,
        totals.alive,
        takes_reference=info["generation"] in _TAKES_REFERENCE,
        hooks=hooks,
    )
    memory = uncounted_memory(totals.uncounted, mappings)
    rest = int(sum(totals.failed["faults"], 0)) if len(totals.failed) else 0
    return Report(
        **_what_ran(reading),
        without=tuple(
            {name: str(hook.get(name, "")) for name in ("hook", "why", "without")}
            for hook in info["missing"]
            if hook.get("without")
        ),
        failed_hooks=tuple(
            {name: str(hook.get(name)) for name in ("hook", "symbol", "why")}
            for hook in _failed_hooks(totals)
        ),
        vms=tuple(_vms(totals)),
        results=tuple(_results(totals.faults)),
        paths=tuple(_paths(totals, hooks)),
        stages=tuple(_stages(totals, hooks)),
        latency=tuple(_latency(totals)),
        slots=tuple(_slots(totals, mappings)),
        classes=tuple(_classes(totals.pages)),
        counts=tuple(_counts(totals.counts)),
        sptes=tuple(_sptes(totals.sptes)),
        lifetimes=tuple(_lifetimes(reading.lifetimes)),
        lifetime_ends=tuple(
            EndRow(*key, count) for key, count in reading.lifetimes.ends.most_common()
        ),
        orphans={k: n for k, n in reading.lifetimes.accounted.items() if k != "life" and n},
        findings=checked.findings if checked else (),
        unanswerable=checked.unanswerable if checked else (),
        detectors=checked.detectors if checked else None,
        failures=tuple(_failure(failure, totals) for failure in failed),
        failures_more=rest - sum(failure.faults for failure in failed),
        uncounted=tuple(memory),
        uncounted_more=len(totals.uncounted) - sum(part.leaves for part in memory),
        losses=tuple(_losses(totals)),
    )


def _what_ran(reading: Reading) -> dict[str, Any]:
    """Return the fields of a report that are the trace's own description."""
    info = reading.totals.info
    summary = info["summary"]
    seconds = summary.get("seconds")
    if not isinstance(seconds, int | float) or not 0 <= seconds < _SECONDS_MAX:
        seconds = info["duration_s"]
    unread = summary.get("unread")
    return {
        "trace": str(reading.path),
        "verdict": verdict_line(info),
        "complete": info["complete"],
        "reason": info["reason"],
        "produced": info["records"] + info["lost"] + info["filtered"],
        **{name: info[name] for name in ("lost", "torn", "filtered")},
        "unread": unread if type(unread) is int and unread > 0 else 0,
        "command": " ".join(map(str, info["command"])),
        "kernel": info["kernel"],
        "generation": str(info["generation"]),
        "start": info["start"],
        "start_ns": reading.start,
        "seconds": float(seconds) if math.isfinite(seconds) else 0.0,
        "ended_by": str(summary.get("why", "")),
        "problem": str(summary.get("problem") or ""),
        "parts": tuple(_parts(info["merged"])),
        "records": dict(info["kinds"]),
    }


def _parts(merged: dict[str, Any]) -> Iterator[str]:
    parts = merged.get("parts")
    for part in parts if isinstance(parts, list) else ():
        if isinstance(part, dict):
            yield str(part.get("file", "?"))


def _hooks(totals: Totals) -> set[str]:
    """Return the hooks that were attached."""
    hooks = {str(hook.get("hook")) for hook in totals.info["hooks"]}
    return hooks - {str(failed.get("hook")) for failed in _failed_hooks(totals)}


def _failed_hooks(totals: Totals) -> list[dict[str, Any]]:
    notes = (note.get("failed") for note in totals.notes)
    return [failed for failed in notes if isinstance(failed, dict)]


def _vms(totals: Totals) -> Iterator[VmRow]:
    faults: Counter[int] = Counter()
    vcpus: dict[int, set[int]] = {}
    for (vm, vcpu, _), count in totals.faults.items():
        faults[vm] += count
        vcpus.setdefault(vm, set()).add(vcpu)
    ops: Counter[tuple[int, str]] = Counter()
    for (vm, _, _, _, op), count in totals.sptes.items():
        ops[vm, op] += count
    known = {*totals.processes, *totals.created, *totals.destroyed}
    for vm in sorted({*known, *faults, *(vm for vm, _ in ops)}):
        yield VmRow(
            vm=vm,
            process=totals.processes.get(vm),
            vcpus=len(vcpus.get(vm, ())),
            faults=faults[vm],
            created=vm in totals.created,
            destroyed=vm in totals.destroyed,
            installed=ops[vm, "install"],
            zapped=ops[vm, "zap"],
        )


def result_order(names: set[str]) -> list[str]:
    """Return names of results in the order of a report."""
    return [name for name in _RESULTS if name in names] + sorted(names - set(_RESULTS))


def _results(faults: Counter[tuple[int, int, str]]) -> Iterator[ResultRow]:
    by_vm: Counter[tuple[int, str]] = Counter()
    for (vm, _, result), count in faults.items():
        by_vm[vm, result] += count
    order = result_order({result for _, result in by_vm})
    for vm in sorted({vm for vm, _ in by_vm}):
        yield from (ResultRow(vm, name, by_vm[vm, name]) for name in order if by_vm[vm, name])


def _path_name(path: str, hooks: set[str]) -> str:
    return "not known" if path == "no GUP" and "gup" not in hooks else path


def _paths(totals: Totals, hooks: set[str]) -> Iterator[PathRow]:
    order = result_order({result for _, result, _ in totals.paths})
    for path in PATHS:
        results = {r: totals.paths[path, r, False] + totals.paths[path, r, True] for r in order}
        if not any(results.values()):
            continue
        name = _path_name(path, hooks)
        yield PathRow(
            path=name,
            meaning=PATHS[name],
            faults=sum(results.values()),
            prefetches=sum(totals.paths[path, result, True] for result in order),
            results={result: count for result, count in results.items() if count},
            times=_times(totals, path, "all"),
        )


def _stages(totals: Totals, hooks: set[str]) -> Iterator[StageRow]:
    for path in PATHS:
        for stage, meaning in STAGES.items():
            if (path, stage) in totals.stages:
                name = _path_name(path, hooks)
                yield StageRow(name, stage, meaning, _times(totals, path, stage))


def _times(totals: Totals, path: str, stage: str) -> Percentiles:
    histogram = totals.stages.get((path, stage))
    return histogram.percentiles() if histogram else Percentiles()


def _latency(totals: Totals) -> Iterator[LatencyRow]:
    for where, histogram in sorted(totals.latency.times.items()):
        yield LatencyRow(
            by=where.by,
            name=where.name,
            vm=None if where.by == "level" else where.vm,
            as_id=where.as_id if where.by == "memslot" else None,
            slot=where.slot if where.by == "memslot" else None,
            level=where.level if where.by == "level" else None,
            times=histogram.percentiles(),
        )


def _slots(totals: Totals, mappings: Mappings) -> Iterator[SlotRow]:
    """Yield the memslots that faults or SLOT records tell of."""
    results: dict[tuple[int, int, int], Counter[str]] = {}
    for (vm, as_id, slot, result), count in totals.slots.items():
        results.setdefault((vm, as_id, slot), Counter())[result] += count
    places: dict[tuple[int, int, int], list[tuple[int, int, int]]] = {}
    behind: dict[tuple[int, int, int], str | None] = {}
    if len(totals.places):
        found = mappings.find_all(totals.places)
        for row, mapping in zip(totals.places.itertuples(index=False), found, strict=True):
            key = (_int(row.vm), _int(row.as_id), _int(row.slot, -1))
            places.setdefault(key, []).append((_int(row.gfn), _int(row.npages), _int(row.hva)))
            behind[key] = str(mapping) if mapping is not None else None
    for key in sorted({*results, *places}, key=lambda k: (k[0], k[2] < 0, k[1:])):
        vm, as_id, slot = key
        known = places.get(key, [])
        gfn, pages, hva = known[-1] if known else (None, 0, 0)
        counts = results.get(key, Counter())
        yield SlotRow(
            vm=vm,
            as_id=as_id,
            slot=slot if slot >= 0 else None,
            asked=slot != NO_FAULTIN,
            gfn=gfn,
            pages=pages,
            hva=hva,
            places=len(known),
            behind=behind.get(key),
            results={name: counts[name] for name in result_order(set(counts))},
        )


def _int(value: object, null: int = 0) -> int:
    return null if pd.isna(value) else int(value)  # type: ignore[call-overload]


def _classes(pages: Counter[tuple[str, int]]) -> Iterator[ClassRow]:
    levels = sorted({level for _, level in pages})
    for name in PAGE_CLASSES:
        for level in levels:
            if pages[name, level]:
                yield ClassRow(name, level, pages[name, level])


def _counts(counts: Counter[tuple[str, int, int]]) -> Iterator[CountRow]:
    order = sorted(counts.items(), key=lambda item: (OUTCOMES.index(item[0][0]), -item[1], item[0]))
    for (outcome, before, after), faults in order:
        many = before == MANY
        yield CountRow(outcome, None if many else before, after if many else after - before, faults)


def _sptes(sptes: Counter[tuple[int, str, int, str, str]]) -> Iterator[SpteRow]:
    for key in sorted({key[:4] for key in sptes}):
        yield SpteRow(*key, *(sptes[*key, op] for op in ("install", "change", "zap")))


def _lifetimes(lifetimes: LifeTotals) -> Iterator[LifeRow]:
    groups = sorted(lifetimes.groups.items(), key=lambda item: (item[0][0], -item[1].lives))
    for (level, page_class), group in groups:
        yield LifeRow(
            level=level,
            page_class=page_class,
            lives=group.lives,
            before=group.before,
            after=group.after,
            lost=group.lost,
            times=group.times.percentiles(),
        )


def _failure(failure: Failure, totals: Totals) -> FailureRow:
    block = block_of(failure, totals.blocks)
    head = head_before(failure, totals.heads, block)
    return FailureRow(failure, block, head, totals.destroyed.get(failure.vm))


def _losses(totals: Totals) -> Iterator[LossRow]:
    """Yield the account of every kind that lost or filtered records, or does not add up."""
    summary = totals.info["summary"].get("counts")
    for kind, recorded in totals.info["kinds"].items():
        counts = _kind_counts(summary, kind) or totals.losses.get(kind)
        if counts is None:
            continue
        produced, lost, filtered = counts
        missing = produced - recorded - lost - filtered
        if lost or filtered or missing:
            yield LossRow(kind, produced, recorded, lost, filtered, missing)


def _kind_counts(summary: Any, kind: str) -> tuple[int, int, int] | None:
    """Return (produced, lost, filtered) of a kind from the summary of a trace."""
    counts = summary.get(kind) if isinstance(summary, dict) else None
    if not isinstance(counts, dict):
        return None
    values = [counts.get(name) for name in ("produced", "lost", "filtered")]
    whole = [v if isinstance(v, int) and v >= 0 else 0 for v in values]
    return whole[0], whole[1], whole[2]
