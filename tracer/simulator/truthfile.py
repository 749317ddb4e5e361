"""The truth as Parquet, beside the trace: a file for each table of the ledger.

May import: `tracer.simulator.ledger`, pyarrow, standard library.
"""

import contextlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tracer.simulator.ledger import LIVES, PLANTED, REFERENCES, Ledger

__all__ = ("TruthFiles", "truth_paths")

_TABLES = {"lives": LIVES, "references": REFERENCES, "bugs": PLANTED}
#: Rows of one row group.
_ROWS = 1 << 15


def truth_paths(trace: Path) -> dict[str, Path]:
    """Return where the truth of a trace lies: table -> file beside it."""
    return {name: trace.with_suffix(f".truth-{name}.parquet") for name in _TABLES}


class TruthFiles:
    """Takes rows out of a ledger a row group at a time, so that memory stays bounded."""

    def __init__(self, ledger: Ledger, trace: Path) -> None:
        self._waiting = {
            "lives": ledger.lives, "references": ledger.references, "bugs": ledger.bugs,
        }  # fmt: skip
        self.rows = dict.fromkeys(_TABLES, 0)
        self._writers = {
            name: pq.ParquetWriter(
                path, _TABLES[name].schema, compression="zstd", use_dictionary=_TABLES[name].coded,
                store_schema=False,  # whoever reads it gets names as text
            )
            for name, path in truth_paths(trace).items()
        }  # fmt: skip

    def flush(self, most: int = _ROWS) -> None:
        """Write every table that has so many rows waiting."""
        for name, rows in self._waiting.items():
            if rows and len(rows) >= most:
                self._writers[name].write_table(_TABLES[name].batch(rows))
                self.rows[name] += len(rows)
                rows.clear()

    def close(self) -> None:
        """Write the rest and close the files."""
        self.flush(1)
        for writer in self._writers.values():
            writer.close()

    def abandon(self) -> None:
        """Close the files as they are, for who removes them."""
        for writer in self._writers.values():
            with contextlib.suppress(OSError, pa.ArrowException):
                writer.close()
