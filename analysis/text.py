"""Plain text of 80 columns: aligned tables, wrapped sentences, numbers as people read them.

Nothing here knows what it prints. May import: `analysis.document`.
"""

import textwrap
from collections.abc import Iterable, Iterator, Sequence

from analysis.document import Block, Document, Entry, Facts, Sentence, Table

__all__ = (
    "ROWS_MAX",
    "WIDTH",
    "aligned",
    "document_lines",
    "duration",
    "labelled",
    "number",
    "plural",
    "size",
    "wrapped",
)

#: Columns of a line, so that a report survives mail.
WIDTH = 80
#: Rows of one table; what is beyond is counted, not shown.
ROWS_MAX = 40


def number(count: int) -> str:
    """Return a count with thousands separators, "-" for 0."""
    return f"{count:,}" if count else "-"


def plural(count: int, noun: str, nouns: str = "") -> str:
    """Return for example "1 fault" or "1,204 faults"."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def duration(ns: int, digits: int = 3) -> str:
    """Return a duration of so many digits and its unit, for example "39.1 us" or "4.09 ms"."""
    value, unit = float(ns), "ns"
    for longer in ("us", "ms", "s"):
        if value < 999.5:
            break
        value, unit = value / 1000, longer
    value = float(f"{value:.{digits}g}") if value < 1000 else value
    decimals = 0 if unit == "ns" else max(0, digits - len(str(int(value))))
    return f"{value:,.{decimals}f} {unit}"


def size(pages: int) -> str:
    """Return the size of so many 4K pages, for example "512 KiB"."""
    amount = pages * 4.0
    for unit in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:,.4g} {unit}" if amount < 10**4 else f"{amount:,.0f} {unit}"


def document_lines(document: Document) -> Iterator[str]:
    """Yield a document in lines of at most 80 columns, its verdict first."""
    yield from wrapped(document.verdict, "", "  ")
    for reservation in document.reservations:
        yield from wrapped(reservation, "", "  ")
    for section in document.sections:
        yield ""
        yield from wrapped(section.title, "", "  ")
        entries = 0
        for block in section.blocks:
            if isinstance(block, Entry):
                if entries and (block.facts or block.records):
                    yield ""
                entries += 1
            yield from _block_lines(block)


def _block_lines(block: Block) -> Iterator[str]:
    if isinstance(block, Table):
        yield from aligned(block.header, block.rows, block.sides)
    elif isinstance(block, Sentence):
        yield from wrapped(block.text, "  ", "    " if block.hanging else "  ")
    elif isinstance(block, Facts):
        for label, text in block.items:
            yield from labelled(label, text)
    else:
        yield from wrapped(block.lead, "  ", "    ")
        width = max((len(label) for label, _ in block.facts), default=0) + 2
        for label, text in block.facts:
            yield from wrapped(text, f"    {label:<{width}}", " " * (4 + width))
        for sentence in block.sentences:
            yield from wrapped(sentence, "    ")
        for record in block.records:
            yield from wrapped(record, "    ", " " * 12)


def wrapped(text: str, indent: str = "  ", hanging: str | None = None) -> Iterator[str]:
    """Yield a text as lines, the first after `indent`, the others after `hanging`."""
    yield from textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent if hanging is None else hanging,
        break_on_hyphens=False,
    )


def labelled(label: str, text: str, width: int = 12) -> Iterator[str]:
    """Yield a text as lines with a label before it."""
    yield from wrapped(text, f"  {label:<{width}}", " " * (width + 2))


def aligned(header: Sequence[str], rows: Iterable[Sequence[str]], sides: str) -> Iterator[str]:
    """Yield a table: `sides` has l or r for each column, the last one for all that follow.

    What does not fit into a line goes on in the next; of many rows the first are shown.
    """
    table = [list(header), *map(list, rows)]
    hidden = len(table) - 1 - ROWS_MAX
    table = table[: ROWS_MAX + 1]
    sides = sides.ljust(len(header), sides[-1])
    widths = [max(len(row[at]) for row in table) for at in range(len(header))]
    for row in table:
        cells = [
            f"{cell:<{width}}" if side == "l" else f"{cell:>{width}}"
            for cell, width, side in zip(row, widths, sides, strict=True)
        ]
        line = f"  {'  '.join(cells)}".rstrip()
        yield from [line] if len(line) <= WIDTH else wrapped(line.strip(), "  ", "      ")
    if hidden > 0:
        yield f"  ... and {plural(hidden, 'row')} more"
