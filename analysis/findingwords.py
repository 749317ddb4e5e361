"""The words of what the detectors found, and of what they cannot answer.

Whatever comes from the trace passes through `printable`. May import: `analysis`,
`tracer.describe`, `tracer.dump`, `tracer.schema`.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from analysis.document import Block, Entry, Section, Sentence, Table
from analysis.findingpage import page_words
from analysis.findings import Finding
from analysis.reportrows import Report
from analysis.text import plural
from tracer.describe import printable
from tracer.dump import RECORD_MAX, record_line
from tracer.schema import FILE_KINDS, columns_of_kind

__all__ = ("anomalies", "finding_entry")

#: Slots or VMs of one finding that are named, and ranges of frames; its JSON has them all.
_NAMED_MAX = 8
_RANGES_MAX = 16
_TONES = {"definite": "bad", "probable": "bad", "inconclusive": "warn", "explained": "warn"}


def anomalies(report: Report) -> Iterator[Section]:
    """Yield the sections about findings and about questions without an answer."""
    if report.detectors is None:
        return
    blocks: list[Block] = [finding_entry(finding, report.start_ns) for finding in report.findings]
    if not blocks:
        asked = len(report.detectors) - len(report.unanswerable)
        blocks = [Sentence(f"none, by {plural(asked, 'detector')} that could answer")]
    yield Section("anomalies", "Anomalies", tuple(blocks))
    rows = tuple((printable(u.detector), printable(u.reason)) for u in report.unanswerable)
    if rows:
        table = Table(("detector", "why it cannot answer"), rows, "l")
        yield Section("unanswerable", "What cannot be answered", (table,))


def finding_entry(finding: Finding, start_ns: int) -> Entry:
    """Return a finding in words, for `check` and the report; `start_ns`: when recording began."""
    facts = [
        ("seen", _seen(finding, start_ns)),
        ("in", _place(finding)),
        ("behind", printable(finding.where)),
        ("page", page_words(finding)),
        ("functions", printable(", ".join(finding.functions))),
        ("rule", printable(finding.rule)),
        *(
            ("innocent", f"{printable(one.explanation)}? {printable(one.ruled_out)}")
            for one in finding.innocent
        ),
    ]
    return Entry(
        lead=f"{finding.verdict.upper()} {printable(finding.detector)}: {printable(finding.title)}",
        facts=tuple((label, words) for label, words in facts if words),
        records=tuple(_line(row, start_ns) for row in finding.evidence),
        tone=_TONES.get(finding.verdict, "warn"),
    )


def _seen(finding: Finding, start_ns: int) -> str:
    often = "once" if finding.count == 1 else f"{finding.count:,} times"
    pages = f" on {plural(finding.pages, 'page')}" if finding.pages else ""
    first, last = ((ts - start_ns) / 1e9 for ts in (finding.first_ts, finding.last_ts))
    if finding.first_ts == finding.last_ts:
        return f"{often}{pages}, at {first:,.6f} s"
    return f"{often}{pages}, from {first:,.6f} s to {last:,.6f} s"


def _place(finding: Finding) -> str:
    longest = max(len(finding.gfns), len(finding.pfns))
    more = " and more" if finding.more or longest > _RANGES_MAX else ""
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
    return ", ".join(f"{a:#x}-{b:#x}" if a != b else f"{a:#x}" for a, b in ranges[:_RANGES_MAX])


def _line(row: dict[str, Any], start_ns: int) -> str:
    kind = row.get("kind")
    if kind not in FILE_KINDS:
        return printable(row)
    # Lines of a dump begin with room for longer times than there is here.
    whole = {**dict.fromkeys(columns_of_kind(str(kind))), **row}
    return record_line(whole, start_ns, RECORD_MAX).strip()
