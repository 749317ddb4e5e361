"""Small simulations for tests: one call makes a trace and hands back its tables and its truth."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tracer.simulator.simulate import Knobs, Outcome, simulate
from tracer.tracefile import TraceReader

__all__ = ("Made", "make")


@dataclasses.dataclass(frozen=True, slots=True)
class Made:
    """One simulation: its outcome, its records in the order of time, its truth."""

    outcome: Outcome

    @property
    def path(self) -> Path:
        return self.outcome.trace

    def rows(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the records of some kinds (all without names), in the order of time."""
        batches = TraceReader(self.path).records(list(kinds) or None)
        return [row for batch in batches for row in batch.to_pylist()]

    def notes(self) -> list[dict[str, Any]]:
        return [json.loads(row["note"]) for row in self.rows("NOTE")]

    def truth(self, table: str) -> list[dict[str, Any]]:
        rows = pq.read_table(self.outcome.truth[table])
        assert isinstance(rows, pa.Table)
        return list(rows.to_pylist())

    def faults(self) -> list[dict[str, Any]]:
        return self.rows("FAULT")

    def chain(self, fault: dict[str, Any]) -> list[dict[str, Any]]:
        """Return the records of one fault, itself the last."""
        return [
            row
            for row in self.rows()
            if row["fault_ts"] == fault["fault_ts"] and row["tid"] == fault["tid"]
        ]


def make(folder: Path, **knobs: Any) -> Made:
    """Simulate 2 MiB of a guest with two vCPUs, unless `knobs` say otherwise."""
    defaults = {"mem_bytes": 2 << 20, "vcpus": 2, "seed": 1}
    path = folder / f"{len(list(folder.iterdir()))}.pfnt"
    return Made(simulate(Knobs(**(defaults | knobs)), path, version="0.1.0"))
