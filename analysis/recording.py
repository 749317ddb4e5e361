"""What one recording can and cannot say: hooks, losses, filters, the kernel's promises.

Read once before the records, so that a detector can refuse or lower its verdict instead of
mistaking what was not recorded for what did not happen.
May import: `analysis.columns`, `analysis.mappings`, `analysis.readonly`, `analysis.semantics`,
`analysis.tables`, `probes.errors`, `probes.facts`, `tracer.schema`, `tracer.tracefile`, numpy,
pandas.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import pandas as pd

from analysis.columns import numbers
from analysis.mappings import Mappings
from analysis.readonly import ReadOnlyMapping, read_only_mappings
from analysis.semantics import Semantics, semantics_of
from analysis.tables import parse_notes
from probes.errors import TraceFormatError
from probes.facts import KernelFacts
from tracer.schema import RECORD_KINDS
from tracer.tracefile import TraceMeta, TraceReader

__all__ = ("Recording", "open_recording", "recording_name")

#: Kinds that share rings; FAULT records have rings of their own, and run ahead of them.
_EVENT_KINDS = tuple(kind for kind in RECORD_KINDS if kind != "FAULT")
#: Ends of a recording that leave records in the rings.
_CUT_SHORT = ("size", "output")
#: A ring without a record for so long before the end was idle, not behind. ns
_IDLE_NS = 10 * 10**9
#: Different mappings that are told apart; a process has fewer than vm.max_map_count.
_VMAS_MAX = 1 << 16
_WORD_MAX = (1 << 64) - 1
#: NR_CPUS of the largest x86 configuration.
_CPUS_MAX = 8192

_VMA_COLUMNS = ("vm", "hva", "hva_end", "vm_flags", "rdev")
_LOSS_COLUMNS = ("cpu", "loss_kind", "lost", "filtered")


@dataclasses.dataclass(frozen=True)
class Recording:
    """Everything about a trace that is not in its records.

    `info` is `TraceReader.info`; `losses` is kind -> (lost, filtered) records; `hooks` were
    attached, by name of `probes.hooks`; `gfns` is the range of --gfn, None without.
    """

    info: dict[str, Any]
    meta: TraceMeta
    facts: KernelFacts
    hooks: frozenset[str]
    losses: dict[str, tuple[int, int]]
    mappings: Mappings
    notes: list[dict[str, Any]]
    semantics: Semantics
    #: what its notes say of mappings that the host may only read.
    read_only: tuple[ReadOnlyMapping, ...] = ()
    #: from here on some kinds are missing that others are there of (ns); None: never.
    sound_until: int | None = None

    @property
    def generation(self) -> str:
        """G0a, G0b, G1, G2 or what else the profile said."""
        return str(self.info["generation"])

    def lost(self, *kinds: str) -> int:
        """Return how many records of some kinds were lost."""
        return sum(self.losses.get(kind, (0, 0))[0] for kind in kinds)

    def filtered(self, *kinds: str) -> int:
        """Return how many records of some kinds a filter left out."""
        return sum(self.losses.get(kind, (0, 0))[1] for kind in kinds)

    def without(self, *hooks: str) -> tuple[str, ...]:
        """Return those of some hooks that were not attached."""
        return tuple(hook for hook in hooks if hook not in self.hooks)

    @property
    def ended_by(self) -> str:
        """Why the recording ended: "command", "interrupted", …; "" if its end is not known."""
        return str(self.info["summary"].get("why", "")) if self.info["complete"] else ""

    @functools.cached_property
    def gfns(self) -> tuple[int, int] | None:
        """The range of guest frames of --gfn (both included), None if all were recorded."""
        found = self.meta.settings.get("gfns")
        if isinstance(found, list) and len(found) == 2:
            low, high = found
            if isinstance(low, int) and isinstance(high, int):
                return max(low, 0), min(max(high, 0), _WORD_MAX)
        return None

    def ret(self, name: str) -> int:
        """Return the RET_PF_* value of a name as this kernel numbers them; -1000 if it has none."""
        for value, known in self.meta.results.items():
            if known == name:
                return value
        return -1000

    def mask(self, symbol: str) -> int:
        """Return a value of the kernel's data symbols, say shadow_accessed_mask; 0 if unknown."""
        return self.facts.values.get(symbol, 0)


def recording_name(reader: TraceReader) -> str:
    """Return what tells a recording of a merged trace from the others: where and when it began."""
    return f"recording on {reader.meta.hostname or '?'} from {reader.info()['start'] or '?'}"


def _sane(facts: KernelFacts) -> KernelFacts:
    """Return facts of which the numbers are numbers: those of a file may be anything."""
    values = facts.values if isinstance(facts.values, dict) else {}
    params = facts.params if isinstance(facts.params, dict) else {}
    known = {k: v for k, v in values.items() if type(v) is int and 0 <= v <= _WORD_MAX}
    cpus = facts.cpus if type(facts.cpus) is int else 1
    return dataclasses.replace(
        facts,
        values=known,
        enums={
            str(name): value
            for name, value in (facts.enums if isinstance(facts.enums, dict) else {}).items()
            if type(value) is int
        },
        params={str(name): str(value) for name, value in params.items()},
        cpus=min(max(cpus, 1), _CPUS_MAX),
    )


def open_recording(reader: TraceReader) -> Recording:
    """Read what a trace says about itself. Raises TraceFormatError if the facts are none."""
    info = reader.info()
    try:
        facts = _sane(KernelFacts.from_json(reader.meta.facts))
    except TraceFormatError:
        # Made by a test or a stranger: everything that needs a fact is then unanswerable.
        facts = KernelFacts()
    hooks = frozenset(str(hook["hook"]) for hook in info["hooks"])
    noted = _notes(reader)
    notes = [note for _, note in noted]
    failed = {_hook_of(note.get("failed")) for note in notes}
    return Recording(
        info=info,
        meta=reader.meta,
        facts=facts,
        hooks=hooks - failed,
        losses=_losses(reader, info),
        mappings=Mappings(_vmas(reader), notes),
        notes=notes,
        semantics=semantics_of(str(info["generation"]), hooks - failed, facts),
        read_only=read_only_mappings(reader, noted),
        sound_until=_sound_until(reader, info),
    )


def _sound_until(reader: TraceReader, info: dict[str, Any]) -> int | None:
    """Return from when on a recording that was cut short lacks some kinds, None if never.

    The recorder takes equally many records of every ring, and rings fill unequally fast: when it
    is killed, some have been read farther than others. A ring's own records are in order, so all
    is there up to the last record of the ring that is furthest behind. It writes a flush kind by
    kind: of the last one, kinds may be missing if there is no end mark.
    """
    if info["complete"] and info["summary"].get("why") not in _CUT_SHORT:
        return None
    rings = reader.meta.settings.get("rings")
    rings = rings if isinstance(rings, int) and 1 <= rings <= 64 else 1
    last = np.zeros(rings, np.uint64)
    blocks = reader.blocks()
    flush = -1 if info["complete"] else max((block.group for block in blocks), default=0)
    load = reader.loader(("ts", "cpu"))
    for block in blocks:
        batch = load(block) if block.kind in _EVENT_KINDS and block.group != flush else None
        if batch is None:
            continue
        cpu = numbers(batch.column("cpu")).astype(np.int64)
        np.maximum.at(last, cpu % rings, numbers(batch.column("ts")))
    end = int(last.max())
    return min((int(ts) for ts in last if int(ts) + _IDLE_NS >= end), default=end)


def _hook_of(failed: Any) -> str:
    return str(failed.get("hook", "")) if isinstance(failed, dict) else ""


def _notes(reader: TraceReader) -> list[tuple[int, dict[str, Any]]]:
    """Return (ts, note) of the notes that are JSON objects."""
    found: list[tuple[int, dict[str, Any]]] = []
    for batch in reader.batches(["NOTE"], ["ts", "note"]):
        rows = zip(*(batch.column(name).to_pylist() for name in ("ts", "note")), strict=True)
        found += [(int(ts), note) for ts, text in rows for note in parse_notes([text])]
    return found


def _vmas(reader: TraceReader) -> pd.DataFrame:
    # A thread that faults in two mappings by turns writes a record each time.
    seen: dict[tuple[Any, ...], None] = {}
    for batch in reader.batches(["VMA"], list(_VMA_COLUMNS)):
        rows = zip(*(batch.column(name).to_pylist() for name in _VMA_COLUMNS), strict=True)
        for row in rows:
            seen.pop(row, None)
            if len(seen) < _VMAS_MAX:
                seen[row] = None
    if not seen:
        return pd.DataFrame()
    return pd.DataFrame(list(seen), columns=list(_VMA_COLUMNS)).astype("UInt64")


def _losses(reader: TraceReader, info: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """Return kind -> (lost, filtered): of the end mark, else of the newest LOSS rows."""
    counts = info["summary"].get("counts")
    if isinstance(counts, dict):
        return {kind: _pair(counts.get(kind)) for kind in RECORD_KINDS}
    newest: dict[tuple[str, int], tuple[int, int]] = {}
    for batch in reader.batches(["LOSS"], list(_LOSS_COLUMNS)):
        rows = zip(*(batch.column(name).to_pylist() for name in _LOSS_COLUMNS), strict=True)
        for cpu, kind, lost, filtered in rows:
            newest[str(kind), cpu or 0] = (lost or 0, filtered or 0)
    found: dict[str, tuple[int, int]] = {}
    for (kind, _), (lost, filtered) in newest.items():
        before = found.get(kind, (0, 0))
        found[kind] = (before[0] + lost, before[1] + filtered)
    return found


def _pair(counts: Any) -> tuple[int, int]:
    if not isinstance(counts, dict):
        return 0, 0
    values = [counts.get(name) for name in ("lost", "filtered")]
    lost, filtered = (v if isinstance(v, int) and v >= 0 else 0 for v in values)
    return lost, filtered
