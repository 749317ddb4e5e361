"""Mappings of a VM's process that the host may only read, by the notes of slots, and since when.

The recorder reads /proc/PID/smaps when a slot appears; what it read may change: munmap(), mmap()
and mprotect() invalidate the range first (unmap_vmas(), change_protection(), mm/), with an event of
their own. So a note is good from the last such event before it to the first one after it.
May import: `analysis.columns`, `tracer.tracefile`, numpy.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from analysis.columns import codes, numbers
from tracer.tracefile import TraceReader

__all__ = ("ReadOnlyMapping", "read_only_mappings")

#: Events after which a range may be mapped otherwise.
_CHANGES = codes("event", "unmap", "protection_vma")
#: A mapping was read at most so long before its note was written. ns
_READ_NS = 10**9
_COLUMNS = ("vm", "hva", "hva_end", "event")
_WORD = 1 << 64
#: Mappings that are followed.
_KEPT_MAX = 1 << 10


@dataclasses.dataclass(slots=True)
class ReadOnlyMapping:
    """[start, end) of a process, bytes, without PROT_WRITE between `since` and `until`, ns."""

    vm: int
    start: int
    end: int
    since: int
    until: int
    #: as in /proc/PID/maps, for example "r--s".
    perms: str


def read_only_mappings(
    reader: TraceReader, noted: Sequence[tuple[int, dict[str, Any]]]
) -> tuple[ReadOnlyMapping, ...]:
    """Return what notes, (ts, note), say of read-only mappings; reads INVALIDATE if any does."""
    found = [(ts, one) for ts, note in noted for one in _of_note(note)][:_KEPT_MAX]
    if not found:
        return ()
    doubtful: set[int] = set()
    for batch in reader.batches(["INVALIDATE"], ["ts", *_COLUMNS]):
        vm, low, high, event = (numbers(batch.column(name)) for name in _COLUMNS)
        ts = numbers(batch.column("ts"))
        changes = np.isin(event, _CHANGES)
        if not changes.any():
            continue
        for at, (noted_ts, one) in enumerate(found):
            hit = changes & (vm == one.vm) & (low < one.end) & (high > one.start)
            for when in ts[hit].tolist():
                if when > noted_ts:
                    one.until = min(one.until, when)
                elif when < noted_ts - _READ_NS:
                    one.since = max(one.since, when)
                else:
                    doubtful.add(at)
    return tuple(one for at, (_, one) in enumerate(found) if at not in doubtful)


def _of_note(note: dict[str, Any]) -> Iterator[ReadOnlyMapping]:
    slot, vmas = note.get("slot"), note.get("vmas")
    vm = slot.get("vm") if isinstance(slot, dict) else None
    if not isinstance(vm, int):
        return
    for vma in _dicts(vmas):
        start, end, perms = vma.get("start"), vma.get("end"), vma.get("perms")
        if not isinstance(start, int) or not isinstance(end, int) or not isinstance(perms, str):
            continue
        if 0 <= start < end < _WORD and perms[:2] == "r-" and len(perms) == 4:
            yield ReadOnlyMapping(vm, start, end, 0, _WORD - 1, perms)


def _dicts(values: Any) -> Iterable[dict[str, Any]]:
    return (v for v in values if isinstance(v, dict)) if isinstance(values, list) else ()
