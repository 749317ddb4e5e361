"""What a detector is, and what it sees of a trace at a time.

A detector sees a `Chunk`: the records of one span of time by kind, the lives that ended in it, and
what several detectors would otherwise compute each for itself (`Chunk.faults`). It keeps what it
must in arrays of its own, never records, so that memory does not grow with the trace.
May import: `analysis`, pandas.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import pandas as pd

from analysis.columns import Records
from analysis.faultjoin import FaultJoin
from analysis.findings import Finding
from analysis.lifearrays import LifeArrays
from analysis.lives import LifeBuilder
from analysis.recording import Recording
from analysis.stream import Piece

__all__ = ("Chunk", "Detector")


class Chunk:
    """What happened between `ts_from` (included) and `ts_to` (not), ns.

    `chunk["SPTE"]` are the records of a kind that some detector needs. `lives` (LIFE_COLUMNS) are
    those that ended here, `orphans` the SPTE records that belong to no life; both are empty unless
    a detector wants lives.
    """

    def __init__(
        self,
        piece: Piece,
        faults: FaultJoin | None,
        lives: LifeArrays,
        builder: LifeBuilder | None,
    ) -> None:
        self.ts_from = piece.ts_from
        self.ts_to = piece.ts_to
        self.lives = lives
        self._piece = piece
        self._faults = faults
        self._builder = builder

    def __getitem__(self, kind: str) -> Records:
        return self._piece[kind]

    @property
    def faults(self) -> FaultJoin:
        """The FAULT records with the RELEASE and SPTE records that happened in each."""
        assert self._faults is not None, "a detector that joins faults says so: joins_faults"
        return self._faults

    @property
    def orphans(self) -> pd.DataFrame:
        """SPTE records of this chunk that belong to no life; see `LifeBuilder.orphans`."""
        return self._builder.orphans if self._builder else pd.DataFrame()

    @property
    def orphan_records(self) -> Records:
        """The same as records; some may be of the chunk before, having waited for an install."""
        return self._builder.orphan_records if self._builder else Records("SPTE")

    def open_lives(self) -> pd.DataFrame:
        """Return the lives still open at `ts_to`; costs what they are many, so ask seldom."""
        return self._builder.open() if self._builder else pd.DataFrame()


class Detector(Protocol):
    """One question about a trace. An object answers for one trace, then it is used up.

    `name` is what --detector takes, `title` what it looks for in one line, `rule` the kernel's
    rule with its source. `columns` are the records it needs: kind -> columns (ts, cpu and seq are
    always there). `wants_lives` and `joins_faults` switch on what costs extra. One that learns only
    from the records that it cannot answer has `unanswered`, the reason, when it has finished.
    """

    name: str
    title: str
    rule: str
    columns: Mapping[str, Sequence[str]]
    wants_lives: bool
    joins_faults: bool

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; return "" or why no answer is possible."""

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found. `open_lives` are those that never ended, if lives are wanted."""
