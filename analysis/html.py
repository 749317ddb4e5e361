"""A report as one HTML page: no other file, no script, nothing fetched.

Every string goes through `_text`, which escapes it; figures come as <svg> that matplotlib escaped.
The policy in its head forbids scripts and connections even so: a trace may come from anyone.
May import: `analysis.document`, `analysis.pagestyle`, `analysis.text`.
"""

import html
from collections.abc import Iterator, Mapping

from analysis.document import Block, Document, Entry, Facts, Section, Sentence, Table
from analysis.pagestyle import CSS
from analysis.text import plural

__all__ = ("FIGURE_PLACES", "ROWS_MAX", "page")

#: Section -> the figures that stand in it, if there are such.
FIGURE_PLACES: dict[str, tuple[str, ...]] = {
    "stages": ("latency",),
    "lifetimes": ("mapped", "timeline", "lifetimes"),
    "counts": ("refcount",),
}
#: Rows of one table; what is beyond is counted, not shown.
ROWS_MAX = 500
#: Rows of a table that is not divided on paper.
_SHORT_ROWS = 25

_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'"
)


def page(document: Document, figures: Mapping[str, tuple[str, str]]) -> str:
    """Return a document as a page; `figures` are kind -> (what it shows, <svg>)."""
    sections = [section for section in document.sections if section.blocks]
    body = [*_head(document), *_contents(sections)]
    for section in sections:
        body += _section(section, figures)
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en">',
        "<head>",
        '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        '<meta name="color-scheme" content="light dark">',
        '<meta name="referrer" content="no-referrer">',
        f"<title>{_text(document.title)}</title>",
        f"<style>\n{CSS}</style>",
        "</head>",
        "<body>",
        *body,
        "</body>",
        "</html>",
    ]
    return "\n".join(lines) + "\n"


def _text(text: str) -> str:
    return html.escape(text, quote=True)


def _head(document: Document) -> Iterator[str]:
    yield "<header>"
    yield f"<h1>{_text(document.title)}</h1>"
    tone = document.verdict_tone or document.tone
    yield f'<p class="verdict {_text(tone)}">{_text(document.verdict)}</p>'
    if document.found:
        yield f'<p class="verdict {_text(document.tone)}">{_text(document.found)}</p>'
    if document.reservations:
        yield '<ul class="reservations">'
        yield from (f"<li>{_text(reservation)}</li>" for reservation in document.reservations)
        yield "</ul>"
    yield '<dl class="numbers">'
    for label, value in document.numbers:
        yield f"<div><dt>{_text(label)}</dt><dd>{_text(value)}</dd></div>"
    yield "</dl>"
    yield "</header>"


def _contents(sections: list[Section]) -> Iterator[str]:
    yield '<nav aria-label="Contents"><ul>'
    for section in sections:
        # What stands in brackets explains; the contents have no room for it.
        title = section.title.partition(" (")[0].partition(", ")[0]
        yield f'<li><a href="#{_text(section.key)}">{_text(title)}</a></li>'
    yield "</ul></nav>"


def _section(section: Section, figures: Mapping[str, tuple[str, str]]) -> Iterator[str]:
    yield f'<section id="{_text(section.key)}">'
    yield f"<h2>{_text(section.title)}</h2>"
    for block in section.blocks:
        yield from _block(block)
    for kind in FIGURE_PLACES.get(section.key, ()):
        if kind in figures:
            alt, svg = figures[kind]
            yield f'<figure id="figure-{_text(kind)}"><div class="scroll">'
            yield svg.replace("<svg ", f'<svg role="img" aria-label="{_text(alt)}" ', 1)
            yield "</div></figure>"
    yield "</section>"


def _block(block: Block) -> Iterator[str]:
    if isinstance(block, Table):
        yield from _table(block)
    elif isinstance(block, Sentence):
        yield f"<p>{_text(block.text)}</p>"
    elif isinstance(block, Facts):
        yield from _facts(block.items)
    else:
        yield from _entry(block)


def _table(table: Table) -> Iterator[str]:
    sides = table.sides.ljust(len(table.header), table.sides[-1])
    # On paper a table that fits on a page stands on one.
    short = " short" if len(table.rows) <= _SHORT_ROWS else ""
    yield f'<div class="scroll{short}"><table>'
    cells = zip(table.header, sides, strict=True)
    yield "<thead><tr>" + "".join(_cell("th", *cell, ' scope="col"') for cell in cells)
    yield "</tr></thead><tbody>"
    for row in table.rows[:ROWS_MAX]:
        yield f"<tr>{''.join(_cell('td', *cell) for cell in zip(row, sides, strict=True))}</tr>"
    yield "</tbody></table></div>"
    hidden = len(table.rows) - ROWS_MAX
    if hidden > 0:
        yield f"<p>… and {_text(plural(hidden, 'row'))} more</p>"


def _cell(tag: str, text: str, side: str, more: str = "") -> str:
    return f'<{tag} class="{"n" if side == "r" else "t"}"{more}>{_text(text)}</{tag}>'


def _facts(items: tuple[tuple[str, str], ...]) -> Iterator[str]:
    yield '<dl class="facts">'
    for label, text in items:
        yield f"<dt>{_text(label)}</dt><dd>{_text(text)}</dd>"
    yield "</dl>"


def _entry(entry: Entry) -> Iterator[str]:
    yield f'<article class="entry {_text(entry.tone)}">'
    yield f'<p class="lead">{_text(entry.lead)}</p>'
    if entry.facts:
        yield from _facts(entry.facts)
    for sentence in entry.sentences:
        yield f"<p>{_text(sentence)}</p>"
    if entry.records:
        records = "\n".join(_text(record) for record in entry.records)
        yield f'<div class="scroll"><pre>{records}</pre></div>'
    yield "</article>"
