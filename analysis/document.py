"""A report in words but without a form: sections of tables, sentences and entries.

`analysis.wording` makes it once; `analysis.text` prints it and `analysis.html` makes a page of it,
so that both say the same. Every string here is printable: what came from a trace has been through
`printable`. May import: standard library only.
"""

import dataclasses

__all__ = ("Block", "Document", "Entry", "Facts", "Section", "Sentence", "Table")


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """Rows under a header; `sides` has l or r for each column, the last one for all that follow."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sides: str


@dataclasses.dataclass(frozen=True, slots=True)
class Sentence:
    """Running text; `hanging` is whether its further lines stand back, as those of a list."""

    text: str
    hanging: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """Labels, each with what it is."""

    items: tuple[tuple[str, str], ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Entry:
    """One thing of a list: a sentence that leads, then facts about it, sentences, and evidence.

    `tone` is "bad", "warn" or "" for how much it should be noticed; `records` are lines of
    evidence, in the order of time.
    """

    lead: str
    facts: tuple[tuple[str, str], ...] = ()
    sentences: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    tone: str = ""


Block = Table | Sentence | Facts | Entry


@dataclasses.dataclass(frozen=True, slots=True)
class Section:
    """A title and what stands below it; `key` is a short name that never changes."""

    key: str
    title: str
    blocks: tuple[Block, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Document:
    """What a report says: the verdict on the trace first, then what could not be seen in it."""

    title: str
    verdict: str
    #: "bad", "warn" or "good": what the verdict and the findings come to.
    tone: str
    reservations: tuple[str, ...]
    #: A few numbers that say how large all this is, with what they are.
    numbers: tuple[tuple[str, str], ...]
    sections: tuple[Section, ...]
    #: What the verdict alone comes to; "" if it is what all comes to.
    verdict_tone: str = ""
    #: What was found, in a line; "" if nothing.
    found: str = ""
