"""`pfntrace check` for people: findings as plain text of 80 columns, loss before all else.

A finding is put into words by `analysis.findingwords`, here as in the report. Whatever else comes
from a trace passes through `printable`. May import: `analysis`, `tracer.describe`.
"""

from collections import Counter
from collections.abc import Iterator

from analysis import detectors, text
from analysis.check import CheckResult
from analysis.document import Entry
from analysis.findings import VERDICTS
from analysis.findingwords import finding_entry
from tracer.describe import printable, verdict_line

__all__ = ("check_lines", "detector_lines")

_LABEL = 10
#: A space where no line ends; `printable` leaves none in what comes from a trace.
_JOINT = "\u00a0"


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
        yield from _finding(finding_entry(finding, result.start_ns))
    if result.unanswerable:
        yield ""
        yield "Not answered"
        reasons: dict[str, list[str]] = {}
        for item in result.unanswerable:
            reasons.setdefault(item.reason, []).append(item.detector)
        for reason, names in reasons.items():
            yield from text.wrapped(f"{', '.join(names)}: {printable(reason)}", "  ", "    ")
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
    if not answered:
        return f"nothing can be said: {asked}"
    return f"{', '.join(told) or 'nothing found'}; {asked}"


def _finding(entry: Entry) -> Iterator[str]:
    yield from text.wrapped(entry.lead, "", "  ")
    for label, words in entry.facts:
        yield from text.labelled(label, words, _LABEL)
    if entry.records:
        yield "  evidence"
        for line in entry.records:
            # A label and its number stay together.
            joined = line.replace(" ref ", f" ref{_JOINT}")
            for part in text.wrapped(joined, "  ", " " * 34):
                yield part.replace(_JOINT, " ")
