"""Order restored: from the rings' records to groups that are sorted by (ts, cpu, seq).

A `Taken` covers what the rings held that was older than a watermark: one array per kind. What is
younger waits in the rings, since another cpu may still write something older. Nothing is copied
before sorting needs it: a ring that is in order already is handed on as a view, so the ring's
memory is given back by `release`, after the group was written.
May import: numpy, `probes.wire`, `tracer.ring`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from probes.wire import KINDS
from tracer.ring import Records, Ring, take_until

__all__ = ("TAKE_MAX", "Group", "Taken", "order", "split_kinds", "take")

#: (kind, records of that kind in order)
Group = list[tuple[str, Records]]
#: Records taken from one ring at once: bounds the memory of a group.
TAKE_MAX = 65536


@dataclasses.dataclass(frozen=True, slots=True)
class Taken:
    """One group and the ring slots it came from; `more`: some ring held more than one take."""

    group: Group
    slots: tuple[tuple[Ring, int], ...]
    more: bool

    def release(self) -> None:
        """Give the slots back to the rings; the group's arrays are stale from here on."""
        for ring, count in self.slots:
            ring.advance(count)


def order(records: Records) -> Records:
    """Return records sorted by (ts, cpu, seq); the same array if they are in order already."""
    header = records["h"]
    ts = header["ts"]
    if len(ts) < 2 or bool((ts[1:] > ts[:-1]).all()):
        return records
    index = np.argsort(ts, kind="stable")
    times = ts[index]
    if bool((times[1:] == times[:-1]).any()):
        index = np.lexsort((header["seq"], header["cpu"], ts))
    # Bytes are moved record by record; of a structure numpy moves each field by itself.
    raw = records.view(np.dtype((np.void, records.dtype.itemsize)))
    ordered: Records = np.take(raw, index).view(records.dtype)
    return ordered


def split_kinds(records: Records) -> Group:
    """Return (kind, records) for every kind among the records, order kept."""
    kinds = records["h"]["kind"]
    if not len(kinds):
        return []
    if (kinds == kinds[0]).all():
        return [(KINDS[kinds[0]], records)]
    counts = np.bincount(kinds, minlength=len(KINDS))
    return [(KINDS[k], records[kinds == k]) for k in np.flatnonzero(counts)]


def take(rings: Sequence[Ring], watermark: int, most: int = TAKE_MAX) -> Taken:
    """Take from all rings what is older than the watermark (ns, CLOCK_MONOTONIC).

    At most `most` records a ring.
    """
    parts: dict[str, list[Records]] = {}
    taken: list[tuple[Ring, int]] = []
    more = False
    for ring in rings:
        ready = ring.peek()
        slots = ready[:most]
        count = take_until(slots, watermark)
        # Young records that wait are no reason to come back at once: only the bound is.
        more |= count == len(slots) < len(ready)
        if count:
            parts.setdefault(ring.kind, []).append(ring.records(slots[:count]))
            taken.append((ring, count))
    group: Group = []
    for arrays in parts.values():
        merged = arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
        group += split_kinds(order(merged))
    return Taken(group, tuple(taken), more)
