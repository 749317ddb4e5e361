"""`pfntrace check` for people: findings as plain text of 80 columns, loss before all else.

Whatever comes from a trace passes through `printable`. May import: `analysis`, `tracer.describe`,
`tracer.dump`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from analysis import detectors, text
from analysis.check import CheckResult
from analysis.findings import VERDICTS, Finding
from tracer.describe import printable, verdict_line
from tracer.dump import record_line

__all__ = ("check_lines", "detector_lines")

_LABEL = 10
#: Slots or VMs of one finding that are named.
_NAMED_MAX = 8


def check_lines(result: CheckResult) -> Iterator[str]:
    """Yield the answer in lines of at most 80 columns: what was not seen, then what was found."""
    info = result.info
    yield from text.wrapped(verdict_line(info), "", "  ")
    if info["lost"]:
        yield from text.wrapped("What loss could explain is told as inconclusive.", "")
    if info["filtered"]:
        kept_out = text.plural(info["filtered"], "record")
        yield from text.wrapped(f"Without {kept_out} that --vm, --gfn or --max-size kept out.", "")
    if result.duplicates:
        twice = text.plural(result.duplicates, "record")
        yield from text.wrapped(f"The trace holds {twice} twice: each was taken once.", "")
    for hook in info["missing"]:
        if hook.get("without"):
            name, why, without = (printable(hook.get(k)) for k in ("hook", "why", "without"))
            yield from text.wrapped(f"Hook {name} is missing ({why}): {without}.", "", "  ")
    yield from text.wrapped(
        f"{text.plural(info['records'], 'record')} of Linux {printable(info['kernel']) or '?'}, "
        f"generation {printable(info['generation']) or 'not known'}",
        "",
        "  ",
    )
    for finding in result.findings:
        yield ""
        yield from _finding(finding, result.start_ns)
    if result.unanswerable:
        yield ""
        yield "Not answered"
        for item in result.unanswerable:
            line = f"{item.detector}: {printable(item.reason)}"
            yield from text.wrapped(line, "  ", "    ")
    yield ""
    yield from text.wrapped(_summary(result), "", "  ")


def detector_lines() -> Iterator[str]:
    """Yield the detectors with what they look for."""
    for detector in detectors.DETECTORS:
        yield from text.wrapped(f"{detector.name:<22}{detector.title}", "", " " * 22)


def _summary(result: CheckResult) -> str:
    counts = Counter(finding.verdict for finding in result.findings)
    told = [f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict]]
    # Of a merged trace there is an answer for each recording.
    silent = {item.detector for item in result.unanswerable}
    answered = len(result.detectors) - len(silent)
    asked = f"{answered} of {text.plural(len(result.detectors), 'detector')} answered"
    return f"{', '.join(told) or 'nothing found'}; {asked}"


def _finding(finding: Finding, start_ns: int) -> Iterator[str]:
    head = f"{finding.verdict.upper()} {finding.detector}: {printable(finding.title)}"
    yield from text.wrapped(head, "", "  ")
    yield from _part("seen", _seen(finding, start_ns))
    yield from _part("in", _place(finding))
    yield from _part("behind", printable(finding.where))
    yield from _part("functions", ", ".join(map(printable, finding.functions)))
    yield from _part("rule", finding.rule)
    for innocent in finding.innocent:
        yield from _part("innocent", f"{innocent.explanation}? {innocent.ruled_out}")
    if finding.evidence:
        yield "  evidence"
        for row in finding.evidence:
            yield from text.wrapped(_record(row, start_ns), "  ", " " * 34)


def _part(label: str, words: str) -> Iterator[str]:
    if words:
        yield from text.labelled(label, words, _LABEL)


def _record(row: dict[str, Any], start_ns: int) -> str:
    line = record_line(row, start_ns)
    # Lines of a dump begin with room for longer times than a line of 80 columns has.
    return line.strip()


def _seen(finding: Finding, start_ns: int) -> str:
    times = "once" if finding.count == 1 else f"{finding.count:,} times"
    pages = f" on {text.plural(finding.pages, 'page')}" if finding.pages else ""
    first, last = ((ts - start_ns) / 1e9 for ts in (finding.first_ts, finding.last_ts))
    span = (
        f"at {first:.6f} s"
        if finding.first_ts == finding.last_ts
        else (f"from {first:.6f} s to {last:.6f} s")
    )
    return f"{times}{pages}, {span}"


def _place(finding: Finding) -> str:
    more = " and more" if finding.more else ""
    parts = [
        printable(finding.recording),
        f"VM {_names(finding.vms)}" if finding.vms else "",
        f"slot {_names(finding.slots)}" if finding.slots else "",
        f"gfn {_ranges(finding.gfns)}{more}" if finding.gfns else "",
        f"pfn {_ranges(finding.pfns)}{more}" if finding.pfns else "",
    ]
    return "; ".join(part for part in parts if part)


def _names(numbers: Sequence[int]) -> str:
    rest = len(numbers) - _NAMED_MAX
    return ", ".join(map(str, numbers[:_NAMED_MAX])) + (f" and {rest:,} more" if rest > 0 else "")


def _ranges(ranges: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{a:#x}-{b:#x}" if a != b else f"{a:#x}" for a, b in ranges)
