"""`pfntrace report`: what a trace says, as text of 80 columns, as JSON, or as a page.

Composes: `analysis.reading` reads, `analysis.reportdata` draws the conclusions, `analysis.wording`
words them; `analysis.text` and `analysis.html` give them a form. May import: `analysis`.
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

from analysis.outfile import check_new, new_file
from analysis.reading import Progress, Reading, read
from analysis.reportdata import report_of
from analysis.reportrows import Report
from analysis.text import document_lines
from analysis.wording import document

__all__ = ("as_json", "report_lines", "write_report")

#: Inches of a figure in a page: what it says can be read on a phone then.
_WIDTH = 5.6


def report_lines(path: Path) -> Iterator[str]:
    """Yield the report of a trace in lines of at most 80 columns.

    Raises TraceFormatError if the file is not a trace; one that is cut or damaged is reported as
    far as it is intact, and its first line says so.
    """
    yield from document_lines(document(report_of(read(path))))


def write_report(
    path: Path,
    html: Path | None = None,
    *,
    as_data: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> list[str]:
    """Return the lines to print: the report, as JSON if `as_data`, none if only a page is wanted.

    `html` is where to write the page. Raises OutputError for a file that exists, unless
    `overwrite`, or cannot be written; else see `report_lines`.
    """
    if html is not None:
        check_new(html, path, overwrite=overwrite)
    reading = read(path, lives=html is not None, progress=progress)
    report = report_of(reading)
    if html is not None:
        with new_file(html, path, overwrite=overwrite) as unfinished:
            # What is no Unicode (a lone surrogate in a path) must not end the writing.
            text = _page(reading, report)
            unfinished.write_text(text, encoding="utf-8", errors="backslashreplace")
    if as_data:
        return [as_json(report)]
    return [] if html is not None else list(document_lines(document(report)))


def as_json(report: Report) -> str:
    """Return a report as JSON of printable ASCII: the fields of `analysis.reportrows.Report`."""
    data = dataclasses.asdict(report)
    data["findings"] = [finding.to_json() for finding in report.findings]
    # json leaves DEL as it is.
    return json.dumps(data, indent=2, allow_nan=False).replace("\x7f", "\\u007f")


def _page(reading: Reading, report: Report) -> str:
    # Drawing loads matplotlib, which the text has no use for.
    from analysis.figures.style import as_svg, style
    from analysis.html import page
    from analysis.plot import KINDS, figures

    with style():
        drawn = {
            kind: (KINDS[kind], as_svg(figure, kind))
            for kind, figure in figures(reading, report, list(KINDS), width=_WIDTH)
        }
    return page(document(report), drawn)
