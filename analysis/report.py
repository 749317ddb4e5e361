"""`pfntrace report`: what a trace says, as plain text of 80 columns, the verdict on it first.

Computes nothing: `analysis.totals` adds up, this module words it. Whatever comes from the trace
passes through `printable`. May import: `analysis`, `tracer.describe`.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from analysis import text
from analysis.explain import explained, owner
from analysis.failures import Failure, block_of, failures, head_before
from analysis.mappings import UNKNOWN_FILE, Mappings
from analysis.pages import PAGE_CLASSES
from analysis.totals import COUNT_EXACT_MAX, MANY, OUTCOMES, Totals, add_up
from analysis.uncounted import UncountedMemory, uncounted_memory
from tracer.describe import printable, verdict_line

__all__ = ("report_lines",)

_GENERATIONS = {
    "G0a": "like Linux 6.1: KVM takes a reference to the page of each fault for as long as it "
    "lasts, and refuses PFNMAP pages whose count is 0",
    "G0b": "like Linux 6.12: KVM takes a reference to the page of each fault for as long as it "
    "lasts, and refuses PFNMAP pages whose count is 0",
    "G1": "out of tree, 'KVM: allow mapping non-refcounted pages' v7 to v11",
    "G2": "Linux 6.13 and later: KVM maps PFNMAP pages without a reference",
}
#: Those in which a fault fails if its page has no count.
_TAKES_REFERENCE = ("G0a", "G0b")
_ENDS = {
    "command": "until the command ended",
    "interrupted": "until interrupted",
    "duration": "until --duration was over",
    "size": "until --max-size was reached",
    "vm": "until the VM's process ended",
    "kvm": "until the kvm module was unloaded",
    "output": "until the file could not be written",
}
_LEVELS = {1: "4K", 2: "2M", 3: "1G"}
#: Results in the order of a report; others follow by name.
_RESULTS = ("fixed", "spurious", "retry", "emulate", "write_protected", "continue", "error")
#: Ranges of one group of pages that are shown.
_RANGES_MAX = 4


def report_lines(path: Path) -> Iterator[str]:
    """Yield the report of a trace in lines of at most 80 columns.

    Raises TraceFormatError if the file is not a trace; one that is cut or damaged is reported as
    far as it is intact, and its first line says so.
    """
    totals = add_up(path)
    mappings = Mappings(totals.vmas, totals.notes)
    failed = failures(
        totals.failed,
        mappings,
        totals.alive,
        takes_reference=totals.info["generation"] in _TAKES_REFERENCE,
        hooks=_hooks(totals),
    )
    memory = uncounted_memory(totals.uncounted, mappings)
    yield from text.wrapped(verdict_line(totals.info), "", "  ")
    yield from _reservations(totals)
    yield from _what_ran(totals.info)
    yield from _vms(totals)
    yield from _records(totals.info)
    if not totals.faults:
        yield from _no_faults(totals.info)
    else:
        yield from _results(totals.faults)
    yield from _sptes(totals)
    yield from _pages(totals.pages)
    yield from _counts(totals.counts)
    yield from _failures(failed, totals)
    yield from _uncounted(memory, len(totals.uncounted))
    yield from _losses(totals)


def _hooks(totals: Totals) -> set[str]:
    """Return the hooks that were attached."""
    hooks = {str(hook.get("hook")) for hook in totals.info["hooks"]}
    return hooks - {str(failed.get("hook")) for failed in _failed_hooks(totals)}


def _failed_hooks(totals: Totals) -> list[dict[str, Any]]:
    notes = (note.get("failed") for note in totals.notes)
    return [failed for failed in notes if isinstance(failed, dict)]


def _section(title: str) -> Iterator[str]:
    yield ""
    yield title


def _reservations(totals: Totals) -> Iterator[str]:
    """Yield what cannot be seen in this trace, a sentence each."""
    info = totals.info
    if info["lost"]:
        yield "The figures below are lower bounds: lost records are not among them."
    if info["filtered"]:
        kept_out = text.plural(info["filtered"], "record")
        yield from text.wrapped(f"Without {kept_out} that --vm or --gfn kept out.", "")
    for hook in info["missing"]:
        if hook.get("without"):
            name, why, without = (printable(hook.get(k)) for k in ("hook", "why", "without"))
            yield from text.wrapped(f"Hook {name} is missing ({why}): {without}.", "", "  ")
    for hook in _failed_hooks(totals):
        name, symbol, why = (printable(hook.get(k)) for k in ("hook", "symbol", "why"))
        yield from text.wrapped(f"Hook {name} is not attached to {symbol}: {why}.", "", "  ")


def _what_ran(info: dict[str, Any]) -> Iterator[str]:
    generation = str(info["generation"]) or "not known"
    words = _GENERATIONS.get(generation)
    summary = info["summary"]
    seconds = summary.get("seconds")
    if not isinstance(seconds, int | float) or not 0 <= seconds < 1e9:
        seconds = info["duration_s"]
    why = str(summary.get("why", ""))
    end = _ENDS.get(why, printable(why)) or "its end is not in the trace"
    yield from _section("What ran")
    yield from text.labelled("command", printable(" ".join(map(str, info["command"]))) or "-")
    yield from text.labelled("kernel", printable(info["kernel"]) or "not known")
    yield from text.labelled("generation", printable(generation) + (f", {words}" if words else ""))
    yield from text.labelled("recorded", f"{seconds:,.3f} s from {printable(info['start'])}, {end}")
    if summary.get("problem"):
        yield from text.labelled("problem", printable(summary["problem"]))


def _vms(totals: Totals) -> Iterator[str]:
    faults: Counter[int] = Counter()
    vcpus: dict[int, set[int]] = {}
    for (vm, vcpu, _), count in totals.faults.items():
        faults[vm] += count
        vcpus.setdefault(vm, set()).add(vcpu)
    rows = [
        (_vm(vm), str(totals.processes.get(vm, "?")), f"{len(vcpus.get(vm, ())):,}",
         f"{faults[vm]:,}", _life(totals, vm))
        for vm in sorted({*totals.processes, *totals.created, *totals.destroyed, *faults})
    ]  # fmt: skip
    if rows:
        yield from _section("VMs")
        header = ("VM", "process", "vCPUs", "faults", "life")
        yield from text.aligned(header, rows, "lrrrl")


def _life(totals: Totals, vm: int) -> str:
    begin = "created" if vm in totals.created else "creation not recorded"
    return f"{begin}, {'destroyed' if vm in totals.destroyed else 'end not recorded'}"


def _vm(vm: int) -> str:
    return str(vm) if vm else "?"


def _records(info: dict[str, Any]) -> Iterator[str]:
    yield from _section("Records")
    rows = [(printable(kind), f"{count:,}") for kind, count in info["kinds"].items() if count]
    yield from text.aligned(("kind", "records"), [*rows, ("all", f"{info['records']:,}")], "lr")


def _no_faults(info: dict[str, Any]) -> Iterator[str]:
    yield from _section("No guest page fault is in this trace")
    why = "Was a VM running, and was it this one (--vm)? A guest faults when it touches new memory."
    if info["filtered"]:
        why = "The filter kept records out: was it the right VM (--vm), the right range (--gfn)?"
    yield from text.wrapped(why)


def _results(faults: Counter[tuple[int, int, str]]) -> Iterator[str]:
    by_vm: Counter[tuple[int, str]] = Counter()
    for (vm, _, result), count in faults.items():
        by_vm[vm, result] += count
    names = {result for _, result in by_vm}
    results = [r for r in _RESULTS if r in names] + sorted(names - set(_RESULTS))
    rows = [
        (_vm(vm), *(text.number(by_vm[vm, r]) for r in results),
         f"{sum(by_vm[vm, r] for r in results):,}")
        for vm in sorted({vm for vm, _ in by_vm})
    ]  # fmt: skip
    yield from _section("Faults by result")
    yield from text.aligned(("VM", *map(printable, results), "all"), rows, "lr")


def _sptes(totals: Totals) -> Iterator[str]:
    if not totals.sptes:
        return
    ops = ("install", "change", "zap")
    keys = sorted({key[:4] for key in totals.sptes})
    rows = [
        (_vm(vm), printable(mmu), _level(level), printable(cause),
         *(text.number(totals.sptes[vm, mmu, level, cause, op]) for op in ops))
        for vm, mmu, level, cause in keys
    ]  # fmt: skip
    yield from _section("Leaf SPTEs")
    header = ("VM", "MMU", "level", "cause", "installed", "changed", "zapped")
    yield from text.aligned(header, rows, "llllr")
    for vm in sorted({key[0] for key in totals.sptes})[: text.ROWS_MAX]:
        yield from text.wrapped(_balance(totals, vm), "  ", "    ")


def _balance(totals: Totals, vm: int) -> str:
    """Say what is still mapped at the end: nothing may be, once the VM is gone."""
    sums: Counter[str] = Counter()
    for (at, _, _, _, op), count in totals.sptes.items():
        if at == vm:
            sums[op] += count
    left = sums["install"] - sums["zap"]
    line = (
        f"VM {_vm(vm)}: {sums['install']:,} installed - {sums['zap']:,} zapped = "
        f"{left:,} mapped at the end"
    )
    if vm not in totals.destroyed:
        line += " (VM not destroyed)"
    elif left == 0 or vm not in totals.created:
        line += " (VM destroyed)"
    elif left < 0:
        line += ": some zapped SPTEs were never seen installed"
    else:
        why = ", or their zaps were lost" if totals.info["lost"] else ""
        line += f": {text.plural(left, 'SPTE')} OUTLIVED the VM{why}"
    if vm not in totals.created and sums["zap"]:
        line += "; SPTEs from before the trace may be among the zapped"
    return line


def _level(level: int) -> str:
    return _LEVELS.get(level, f"level {level}")


def _pages(pages: Counter[tuple[str, int]]) -> Iterator[str]:
    if not pages:
        return
    levels = sorted({level for _, level in pages if level} | {1})
    rows = [
        (name, text.number(pages[name, 0]), *(text.number(pages[name, lv]) for lv in levels))
        for name in PAGE_CLASSES
        if any(pages[name, level] for level in (0, *levels))
    ]
    yield from _section("Pages by class (uncounted: count 0, not compound, not free)")
    header = ("", "at fault-in", *(f"installed {_level(level)}" for level in levels))
    yield from text.aligned(header, rows, "lr")


def _counts(counts: Counter[tuple[str, int, int]]) -> Iterator[str]:
    if not counts:
        return
    yield from _section("Reference count of the page, after fault-in -> at the end of the fault")
    rows = []
    order = sorted(counts.items(), key=lambda item: (OUTCOMES.index(item[0][0]), -item[1], item[0]))
    for (outcome, before, after), count in order:
        rows.append((outcome, _change(before, after), f"{count:,}"))
    yield from text.aligned(("page", "count", "faults"), rows, "llr")
    if any(before == MANY for _, before, _ in counts):
        yield f"  n: counts above {COUNT_EXACT_MAX}"
    if any(outcome == "mapped" and _stays(before, after) for outcome, before, after in counts):
        yield from text.wrapped(
            "A count that does not fall is not by itself a leak: mark_page_accessed() queues some "
            "pages for activation, and the queue has a reference of its own."
        )


def _change(before: int, after: int) -> str:
    if before == MANY:
        return f"n -> n{after:+d}" if after else "n -> n"
    return f"{before} -> {after}"


def _stays(before: int, after: int) -> bool:
    return after >= 0 if before == MANY else after >= before


def _failures(failed: list[Failure], totals: Totals) -> Iterator[str]:
    yield from _section("Faults that failed, and why")
    if not failed:
        yield "  none"
    for at, failure in enumerate(failed):
        block = block_of(failure, totals.blocks)
        head = head_before(failure, totals.heads, block)
        if at:
            yield ""
        yield from explained(
            failure,
            generation=str(totals.info["generation"]),
            block=block,
            head=head,
            destroyed=totals.destroyed.get(failure.vm),
        )
    rest = sum(totals.failed["faults"], 0) if failed else 0
    rest -= sum(failure.faults for failure in failed)
    if rest:
        yield f"  ... and {text.plural(int(rest), 'fault')} of other kinds"


def _uncounted(memory: list[UncountedMemory], leaves: int) -> Iterator[str]:
    yield from _section("Memory that KVM maps but does not reference-count")
    if not memory:
        yield "  none"
    for part in memory:
        behind = printable(part.mapping or UNKNOWN_FILE)
        slot = f"slot {part.slot}" if part.slot is not None else "no slot"
        yield from text.wrapped(
            f"{text.plural(part.pages, 'page')}  gfn {_ranges(part.gfns)}  {slot}  {behind}",
            "  ",
            "      ",
        )
        yield from text.wrapped(
            f"{owner(part.vm, part.tgid)}, from hva {part.hva:#x}; pfn {_ranges(part.frames)}.",
            "      ",
        )
        yield from text.wrapped(_how_counted(part), "      ")
    rest = leaves - sum(part.leaves for part in memory)
    if rest:
        yield f"  ... and {text.plural(rest, 'page')} or more elsewhere"


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


def _ranges(ranges: Iterable[tuple[int, int]]) -> str:
    every = [f"{a:#x}-{b:#x}" if a != b else f"{a:#x}" for a, b in ranges]
    more = len(every) - _RANGES_MAX
    return ", ".join(every[:_RANGES_MAX]) + (f" and {more:,} more ranges" if more > 0 else "")


def _losses(totals: Totals) -> Iterator[str]:
    """Yield the account of every kind that lost or filtered records, or does not add up."""
    rows = []
    odd = 0
    summary = totals.info["summary"].get("counts")
    for kind, written in totals.info["kinds"].items():
        counts = _kind_counts(summary, kind) or totals.losses.get(kind)
        if counts is None:
            continue
        produced, lost, filtered = counts
        missing = produced - written - lost - filtered
        odd += abs(missing)
        if lost or filtered or missing:
            rows.append((kind, f"{produced:,}", f"{written:,}", text.number(lost),
                         text.number(filtered), text.number(missing)))  # fmt: skip
    if not rows:
        return
    yield from _section("Losses")
    header = ("kind", "produced", "recorded", "lost", "filtered", "missing")
    yield from text.aligned(header, rows, "lr")
    if totals.info["torn"]:
        yield from text.wrapped(
            f"{totals.info['torn']:,} of the lost faults are torn, their end was missed: more "
            "vCPUs slept in a fault than there are kretprobes."
        )
    yield from text.wrapped(_account(odd, totals.info))


def _account(odd: int, info: dict[str, Any]) -> str:
    if not odd:
        return "recorded + lost + filtered = produced, for every kind."
    if not info["complete"]:
        return "The trace has no end, so its last counters may be older or newer than its records."
    unread = info["summary"].get("unread")
    why = f": {unread:,} were left in the rings" if isinstance(unread, int) and unread else ""
    return f"recorded + lost + filtered does NOT add up to produced{why}."


def _kind_counts(summary: Any, kind: str) -> tuple[int, int, int] | None:
    """Return (produced, lost, filtered) of a kind from the summary of a trace."""
    counts = summary.get(kind) if isinstance(summary, dict) else None
    if not isinstance(counts, dict):
        return None
    values = [counts.get(name) for name in ("produced", "lost", "filtered")]
    whole = [v if isinstance(v, int) and v >= 0 else 0 for v in values]
    return whole[0], whole[1], whole[2]
