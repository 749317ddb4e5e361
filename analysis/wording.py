"""The words of a report: `document` turns the facts of a `Report` into sentences.

Computes nothing but shares. Whatever comes from the trace passes through `printable`.
May import: `analysis`, `tracer.describe`.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from analysis.document import Block, Document, Entry, Facts, Section, Sentence, Table
from analysis.explain import explained, owner
from analysis.findings import VERDICTS
from analysis.findingwords import anomalies
from analysis.histogram import Percentiles
from analysis.latency import BY, LEVELS
from analysis.mappings import UNKNOWN_FILE
from analysis.pages import PAGE_CLASSES
from analysis.reportdata import result_order
from analysis.reportrows import CountRow, Report, SlotRow, VmRow
from analysis.text import duration, number, plural, size
from analysis.totals import COUNT_EXACT_MAX, OUTCOMES
from analysis.uncounted import UncountedMemory
from tracer.describe import printable

__all__ = ("LEVELS", "document")

_GENERATIONS = {
    "G0a": "like Linux 6.1: KVM takes a reference to the page of each fault for as long as it "
    "lasts, and refuses PFNMAP pages whose count is 0",
    "G0b": "like Linux 6.12: KVM takes a reference to the page of each fault for as long as it "
    "lasts, and refuses PFNMAP pages whose count is 0",
    "G1": "out of tree, 'KVM: allow mapping non-refcounted pages' v7 to v11",
    "G2": "Linux 6.13 and later: KVM maps PFNMAP pages without a reference",
}
_ENDS = {
    "command": "until the command ended",
    "interrupted": "until interrupted",
    "duration": "until --duration was over",
    "size": "until --max-size was reached",
    "vm": "until the VM's process ended",
    "kvm": "until the kvm module was unloaded",
    "output": "until the file could not be written",
    "merged": "in parts that were merged",
}
#: Ranges of one group of pages, and parts of a merged trace, that are shown.
_RANGES_MAX, _PARTS_MAX = 4, 8
#: VMs and memslots whose times are shown.
_PLACES_MAX = 10


def document(report: Report) -> Document:
    """Return a report in words."""
    sections = (
        _what_ran(report),
        *anomalies(report),
        _vms(report),
        _records(report),
        *(_faults(report) if report.results else [_no_faults(report)]),
        _sptes(report),
        _lifetimes(report),
        _classes(report),
        _counts(report),
        _failures(report),
        _uncounted(report),
        _losses(report),
    )
    return Document(
        # The folder is of no use to who is sent the report.
        title=f"pfntrace report of {printable(Path(report.trace).name)}",
        verdict=report.verdict,
        tone=_tone(report),
        verdict_tone="warn" if report.lost or not report.complete else "good",
        found=_found(report),
        reservations=tuple(_reservations(report)),
        numbers=tuple(_numbers(report)),
        sections=tuple(section for section in sections if section.blocks),
    )


def _found(report: Report) -> str:
    """Return what was found in the trace, in a line; "" if nothing."""
    counts = Counter(finding.verdict for finding in report.findings)
    told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    found = f"{told} finding{'s' * (len(report.findings) != 1)}" if told else ""
    died = any(row.failure.died for row in report.failures)
    ended = "faults that failed ended a guest" if died else ""
    return "; ".join(filter(None, (found, ended)))


def _tone(report: Report) -> str:
    if any(finding.is_anomaly for finding in report.findings):
        return "bad"
    return "warn" if report.lost or not report.complete or _found(report) else "good"


def _reservations(report: Report) -> Iterator[str]:
    """Yield what cannot be seen in this trace, a sentence each."""
    if report.lost:
        yield "The figures below are lower bounds: lost records are not among them."
    if report.filtered:
        yield f"Without {plural(report.filtered, 'record')} that --vm or --gfn kept out."
    for hook in report.without:
        name, why, without = (printable(hook[k]) for k in ("hook", "why", "without"))
        yield f"Hook {name} is missing ({why}): {without}."
    for hook in report.failed_hooks:
        name, symbol, why = (printable(hook[k]) for k in ("hook", "symbol", "why"))
        yield f"Hook {name} is not attached to {symbol}: {why}."


def _numbers(report: Report) -> Iterator[tuple[str, str]]:
    yield "records", f"{sum(report.records.values()):,}"
    yield "VMs", f"{sum(1 for vm in report.vms if vm.vm):,}"
    yield "faults", f"{sum(row.faults for row in report.results):,}"
    yield "mappings", f"{sum(row.lives for row in report.lifetimes):,}"
    failed = sum(row.failure.faults for row in report.failures) + report.failures_more
    if failed:
        yield "failed faults", f"{failed:,}"
    if report.detectors is not None:
        yield "anomalies", f"{sum(finding.is_anomaly for finding in report.findings):,}"


def _what_ran(report: Report) -> Section:
    generation = report.generation or "not known"
    words = _GENERATIONS.get(generation)
    end = _ENDS.get(report.ended_by, printable(report.ended_by)) or "its end is not in the trace"
    items = [
        ("command", printable(report.command) or "-"),
        ("kernel", printable(report.kernel) or "not known"),
        ("generation", printable(generation) + (f", {words}" if words else "")),
        ("recorded", f"{report.seconds:,.3f} s from {printable(report.start)}, {end}"),
    ]
    if report.parts:
        named = ", ".join(printable(part) for part in report.parts[:_PARTS_MAX])
        more = ", ..." if len(report.parts) > _PARTS_MAX else ""
        items.append(("merged of", f"{plural(len(report.parts), 'part')}: {named}{more}"))
    if report.problem:
        items.append(("problem", printable(report.problem)))
    return Section("what-ran", "What ran", (Facts(tuple(items)),))


def _vms(report: Report) -> Section:
    rows = tuple(
        (_vm(vm.vm), "?" if vm.process is None else str(vm.process), f"{vm.vcpus:,}",
         f"{vm.faults:,}", _life(vm))
        for vm in report.vms
        if vm.process is not None or vm.created or vm.destroyed or vm.faults
    )  # fmt: skip
    table = Table(("VM", "process", "vCPUs", "faults", "life"), rows, "lrrrl")
    return Section("vms", "VMs", (table,) if rows else ())


def _life(vm: VmRow) -> str:
    begin = "created" if vm.created else "creation not recorded"
    return f"{begin}, {'destroyed' if vm.destroyed else 'end not recorded'}"


def _vm(vm: int) -> str:
    return str(vm) if vm else "?"


def _records(report: Report) -> Section:
    rows = [(printable(kind), f"{count:,}") for kind, count in report.records.items() if count]
    rows.append(("all", f"{sum(report.records.values()):,}"))
    return Section("records", "Records", (Table(("kind", "records"), tuple(rows), "lr"),))


def _no_faults(report: Report) -> Section:
    why = (
        "Was a VM running, and was it this one (record --vm)? A guest faults when it touches new "
        "memory."
    )
    if report.filtered:
        why = "The filter kept records out: was record told the right VM and range (--vm, --gfn)?"
    return Section("faults", "No guest page fault is in this trace", (Sentence(why),))


def _faults(report: Report) -> Iterator[Section]:
    names = result_order({row.result for row in report.results})
    counts = {(row.vm, row.result): row.faults for row in report.results}
    rows = tuple(
        (_vm(vm), *(number(counts.get((vm, r), 0)) for r in names),
         f"{sum(counts.get((vm, r), 0) for r in names):,}")
        for vm in sorted({vm for vm, _ in counts})
    )  # fmt: skip
    header = ("VM", *map(printable, names), "all")
    yield Section("faults", "Faults by result", (Table(header, rows, "lr"),))
    yield _paths(report)
    yield _stages(report)
    yield _latency(report)
    yield _slots(report)


def _paths(report: Report) -> Section:
    names = result_order({name for row in report.paths for name in row.results})
    ahead = any(row.prefetches for row in report.paths)
    rows = tuple(
        (row.path, *(number(row.results.get(name, 0)) for name in names), f"{row.faults:,}",
         *([number(row.prefetches)] if ahead else []))
        for row in report.paths
    )  # fmt: skip
    header = ("path", *map(printable, names), "all", *(["prefetch"] if ahead else []))
    meanings = tuple(Sentence(f"{row.path}: {row.meaning}.", True) for row in report.paths)
    return Section("paths", "Faults by path", (Table(header, rows, "lr"), *meanings))


def _stages(report: Report) -> Section:
    rows = tuple(
        (row.path, row.stage, f"{row.times.n:,}",
         *percentiles(row.times))
        for row in report.stages
    )  # fmt: skip
    header = ("path", "stage", "faults", "median", "90 %", "99 %", "longest")
    note = Sentence("Times are of the host's clock, probes included; percentiles within 0.4 %.")
    return Section("stages", "How long faults took", (Table(header, rows, "llr"), note))


def _latency(report: Report) -> Section:
    """Word how long faults took by level, VM and memslot; one of a kind says nothing new."""
    rows = []
    for by in BY:
        mine = [row for row in report.latency if row.by == by]
        if len(mine) > 1 or by == "level":
            # Of many memslots those matter in which the guest faults.
            most = sorted(mine, key=lambda row: -row.times.n)[:_PLACES_MAX]
            rows += [row for row in mine if row in most]
    cells = tuple((row.name, f"{row.times.n:,}", *percentiles(row.times)) for row in rows)
    header = ("whole faults of", "faults", "median", "90 %", "99 %", "longest")
    title = "Fault latency by level mapped, VM and memslot"
    return Section("latency", title, (Table(header, cells, "lr"),) if cells else ())


def percentiles(times: Percentiles) -> tuple[str, str, str, str]:
    """Return the cells of a table: median, 90 %, 99 %, longest."""
    p50, p90, p99, longest = (
        "-" if ns is None else duration(ns) for ns in (times.p50, times.p90, times.p99, times.max)
    )
    return p50, p90, p99, longest


def _slots(report: Report) -> Section:
    names = result_order({name for row in report.slots for name in row.results})
    rows = tuple(
        (_vm(row.vm), _slot(row), *(number(row.results.get(name, 0)) for name in names),
         _place(row))
        for row in report.slots
    )  # fmt: skip
    header = ("VM", "slot", *map(printable, names), "where, and what is behind it")
    sides = "ll" + "r" * len(names) + "l"
    return Section("slots", "Faults by memslot", (Table(header, rows, sides),) if rows else ())


def _slot(row: SlotRow) -> str:
    if row.slot is None:
        return "none" if row.asked else "?"
    return f"{row.slot}" + (f" (space {row.as_id})" if row.as_id else "")


def _place(row: SlotRow) -> str:
    if row.slot is None:
        return "MMIO" if row.asked else "ended before fault-in, which would name the slot"
    if row.gfn is None:
        return "not recorded"
    last = row.gfn + max(row.pages, 1) - 1
    words = f"gfn {row.gfn:#x}-{last:#x} ({size(row.pages)})"
    if row.places > 1:
        words += f", last of {row.places:,} places"
    return f"{words}, {printable(row.behind or UNKNOWN_FILE)}"


def _sptes(report: Report) -> Section:
    rows = tuple(
        (_vm(row.vm), printable(row.mmu), _level(row.level), printable(row.cause),
         *map(number, (row.installed, row.changed, row.zapped)))
        for row in report.sptes
    )  # fmt: skip
    if not rows:
        return Section("sptes", "Leaf SPTEs", ())
    header = ("VM", "MMU", "level", "cause", "installed", "changed", "zapped")
    touched = {row.vm for row in report.sptes}
    balances = [Sentence(_balance(vm, report), True) for vm in report.vms if vm.vm in touched]
    return Section("sptes", "Leaf SPTEs", (Table(header, rows, "llllr"), *balances[:40]))


def _balance(vm: VmRow, report: Report) -> str:
    """Say what is still mapped at the end: nothing may be, once the VM is gone."""
    left = vm.installed - vm.zapped
    line = (
        f"VM {_vm(vm.vm)}: {vm.installed:,} installed - {vm.zapped:,} zapped = "
        f"{left:,} mapped at the end"
    )
    if not vm.destroyed:
        line += " (VM not destroyed)"
    elif left == 0 or not vm.created:
        line += " (VM destroyed)"
    elif left < 0:
        line += ": some zapped SPTEs were never seen installed"
    else:
        why = ", or their zaps were lost" if report.lost else ""
        line += f": {plural(left, 'SPTE')} OUTLIVED the VM{why}"
    if not vm.created and vm.zapped:
        line += "; SPTEs from before the trace may be among the zapped"
    return line


def _lifetimes(report: Report) -> Section:
    if not report.lifetimes:
        return Section("lifetimes", "Lifetimes of mappings", ())
    rows = tuple(
        (_level(row.level), row.page_class, f"{row.lives:,}",
         *map(number, (row.before, row.after)), *percentiles(row.times))
        for row in report.lifetimes
    )  # fmt: skip
    header = (
        *("level", "class", "mapped", "before", "after", "median", "90 %", "99 %", "longest"),
    )
    blocks: list[Block] = [Table(header, rows, "llr")]
    if any(row.before or row.after for row in report.lifetimes):
        blocks.append(
            Sentence(
                "before, after: mapped before the first record that tells of it, or still mapped "
                "after the last; of those the length is not known."
            )
        )
    ends = ", ".join(_end(row.ended_by, row.cause, row.lives) for row in report.lifetime_ends)
    blocks.append(Sentence(f"Ended by: {ends}.", True))
    lost = sum(row.lost for row in report.lifetimes)
    if lost:
        blocks.append(Sentence(f"Records were lost while {plural(lost, 'mapping')} lived."))
    for name, count in report.orphans.items():
        blocks.append(Sentence(f"{plural(count, f'{name} record')} belong to no mapping."))
    return Section("lifetimes", "Lifetimes of mappings", tuple(blocks))


def _end(ended_by: str, cause: str, lives: int) -> str:
    if ended_by == "censored":
        return f"not seen {lives:,}"
    name = ended_by.replace("_", " ")
    return f"{name} ({printable(cause)}) {lives:,}" if cause else f"{name} {lives:,}"


def _level(level: int) -> str:
    return LEVELS.get(level, f"level {level}")


def _classes(report: Report) -> Section:
    title = "Pages by class (uncounted: count 0, not compound, not free)"
    pages = {(row.page_class, row.level): row.pages for row in report.classes}
    levels = sorted({level for _, level in pages if level} | {1})
    rows = tuple(
        (name, *(number(pages.get((name, level), 0)) for level in (0, *levels)))
        for name in PAGE_CLASSES
        if any((name, level) in pages for level in (0, *levels))
    )
    header = ("", "at fault-in", *(f"installed {_level(level)}" for level in levels))
    return Section("classes", title, (Table(header, rows, "lr"),) if rows else ())


def _counts(report: Report) -> Section:
    title = "Reference count of the page, after fault-in -> at the end of the fault"
    if not report.counts:
        return Section("counts", title, ())
    rows = tuple((row.outcome, _change(row), f"{row.faults:,}") for row in report.counts)
    blocks: list[Block] = [Table(("page", "count", "faults"), rows, "llr")]
    if any(row.before is None for row in report.counts):
        blocks.append(Sentence(f"n: counts above {COUNT_EXACT_MAX}"))
    if any(row.outcome == OUTCOMES[0] and row.change >= 0 for row in report.counts):
        blocks.append(
            Sentence(
                "A count that does not fall is not by itself a leak: mark_page_accessed() queues "
                "some pages for activation, and the queue has a reference of its own."
            )
        )
    return Section("counts", title, tuple(blocks))


def _change(row: CountRow) -> str:
    if row.before is None:
        return f"n -> n{row.change:+d}" if row.change else "n -> n"
    return f"{row.before} -> {row.before + row.change}"


def _failures(report: Report) -> Section:
    blocks: list[Block] = [
        explained(
            row.failure,
            generation=report.generation,
            block=row.block,
            head=row.head,
            destroyed=row.destroyed_ts,
        )
        for row in report.failures
    ]
    if report.failures_more:
        blocks.append(Sentence(f"... and {plural(report.failures_more, 'fault')} of other kinds"))
    title = "Faults that failed, and why"
    return Section("failures", title, tuple(blocks) or (Sentence("none"),))


def _uncounted(report: Report) -> Section:
    blocks: list[Block] = []
    if report.uncounted:
        blocks.append(_by_driver(report.uncounted))
    blocks += [_memory(part) for part in report.uncounted]
    if report.uncounted_more:
        blocks.append(
            Sentence(f"... and {plural(report.uncounted_more, 'page')} or more elsewhere")
        )
    title = "Memory that KVM maps but does not reference-count"
    return Section("uncounted", title, tuple(blocks) or (Sentence("none"),))


def _by_driver(memory: tuple[UncountedMemory, ...]) -> Table:
    """Add up by what is behind the mappings: the device's file names the driver."""
    sums: dict[str, Counter[str]] = {}
    for part in memory:
        behind = printable(part.mapping or UNKNOWN_FILE)
        counts = {"pages": part.pages, "zero": part.zero, "above": part.above, "bare": part.bare}
        sums.setdefault(behind, Counter()).update(counts)
    rows = tuple(
        (size(c["pages"]), *(number(c[name]) for name in ("pages", "zero", "above", "bare")), name)
        for name, c in sums.items()
    )
    header = ("memory", "pages", "count 0", "above 0", "no struct page", "driver behind it")
    return Table(header, rows, "rrrrrl")


def _memory(part: UncountedMemory) -> Entry:
    behind = printable(part.mapping or UNKNOWN_FILE)
    slot = f"slot {part.slot}" if part.slot is not None else "no slot"
    lead = f"{plural(part.pages, 'page')}  gfn {_ranges(part.gfns)}  {slot}  {behind}"
    where = f"{owner(part.vm, part.tgid)}, from hva {part.hva:#x}; pfn {_ranges(part.frames)}."
    return Entry(lead, sentences=(where, _how_counted(part)))


def _how_counted(part: UncountedMemory) -> str:
    counts = []
    if part.zero:
        counts.append(f"count 0 on {part.zero:,}")
    if part.above:
        counts.append(f"above 0 by accident on {part.above:,}, such as a block's head")
    if part.bare:
        counts.append(f"no struct page on {part.bare:,}")
    who = "Not reference-counted, says KVM" if part.said else "They cannot be counted"
    return f"{who}: {'; '.join(counts)}."


def _ranges(ranges: tuple[tuple[int, int], ...]) -> str:
    every = [f"{a:#x}-{b:#x}" if a != b else f"{a:#x}" for a, b in ranges]
    more = len(every) - _RANGES_MAX
    return ", ".join(every[:_RANGES_MAX]) + (f" and {more:,} more ranges" if more > 0 else "")


def _losses(report: Report) -> Section:
    """Word the account of every kind that lost or filtered records, or does not add up."""
    if not report.losses:
        return Section("losses", "Losses", ())
    rows = tuple(
        (row.kind, f"{row.produced:,}", f"{row.recorded:,}",
         *map(number, (row.lost, row.filtered, row.missing)))
        for row in report.losses
    )  # fmt: skip
    header = ("kind", "produced", "recorded", "lost", "filtered", "missing")
    blocks: list[Block] = [Table(header, rows, "lr")]
    if report.torn:
        blocks.append(
            Sentence(
                f"{report.torn:,} of the lost faults are torn, their end was missed: more "
                "vCPUs slept in a fault than there are kretprobes."
            )
        )
    blocks.append(Sentence(_account(report)))
    return Section("losses", "Losses", tuple(blocks))


def _account(report: Report) -> str:
    if not any(row.missing for row in report.losses):
        return "recorded + lost + filtered = produced, for every kind."
    if not report.complete:
        return "The trace has no end, so its last counters may be older or newer than its records."
    why = f": {report.unread:,} were left in the rings" if report.unread else ""
    return f"recorded + lost + filtered does NOT add up to produced{why}."
