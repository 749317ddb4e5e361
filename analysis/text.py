"""Plain text of 80 columns: aligned tables, wrapped sentences, numbers as people read them.

Nothing here knows what it prints. May import: standard library.
"""

import textwrap
from collections.abc import Iterable, Iterator, Sequence

__all__ = ("WIDTH", "aligned", "labelled", "number", "plural", "wrapped")

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
