"""Hostile mode: what can happen to records between the kernel and the file.

Loss is counted, as the kernel's programs count it; everything else is silent. The truth stays what
happened. May import: `probes`, standard library, `tracer`, numpy.
"""

import functools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from probes.errors import UsageError
from tracer.batch import Group, order
from tracer.simulator.clock import FOREVER, START_NS, Dice

__all__ = ("HOSTILE", "Hostile", "parse_hostile")

#: Ways to be hostile: name -> one line. `NAME=AMOUNT` sets how much.
HOSTILE: Mapping[str, str] = {
    "loss": "records are lost in bursts (0.02 of them), counted",
    "drop": "single records are lost (0.01 of them), counted",
    "duplicate": "records come twice (0.005 of them)",
    "reorder": "records of one cpu are written in another order than they happened (0.01 of them)",
    "skew": "the clocks of cpus differ by up to so many ns (5000, at most 10000)",
    "late": "the recording begins late: this share of the story is missing (0.3)",
    "truncate": "the recorder is killed: this share of the story is missing (0.3)",
}
_DEFAULTS = {"loss": 0.02, "drop": 0.01, "duplicate": 0.005, "reorder": 0.01, "skew": 5000.0,
             "late": 0.3, "truncate": 0.3}  # fmt: skip
#: Largest difference of clocks: hosts whose clocks differ by more have no such clock at all
#: (arch/x86/kernel/tsc_sync.c), and the order of records means nothing.
_SKEW_MAX_NS = 10_000
#: Records lost in one burst: a ring that was full for a moment.
_BURST = 40
#: How far a record that is out of order is moved (ns).
_MOVED_NS = 3000

Records = npt.NDArray[np.void]


def parse_hostile(texts: Sequence[str], seed: int) -> "Hostile":
    """Return what is done to the records, from `NAME` or `NAME=AMOUNT`. Raises UsageError."""
    amounts: dict[str, float] = {}
    for text in texts:
        name, _, amount = text.partition("=")
        if name not in HOSTILE:
            raise UsageError(f"--hostile {name}: no such thing; there are {', '.join(HOSTILE)}")
        try:
            value = float(amount) if amount else _DEFAULTS[name]
        except ValueError:
            value = -1.0
        if name == "skew" and not 1 <= value <= _SKEW_MAX_NS:
            raise UsageError(f"--hostile {text}: the amount is 1 to {_SKEW_MAX_NS} ns")
        if name != "skew" and not 0 < value <= 1:
            raise UsageError(f"--hostile {text}: the amount is a share above 0, at most 1")
        amounts[name] = value
    return Hostile(amounts, seed)


class Hostile:
    """What happens to groups of records; called with one, it returns what is not lost of it, and
    that as it gets into the file."""

    def __init__(self, amounts: dict[str, float], seed: int) -> None:
        self._amounts, self._seed = amounts, seed ^ 0x5EED
        self._skew: dict[int, int] = {}

    @functools.cached_property
    def _dice(self) -> Dice:
        return Dice(self._seed)

    @property
    def tampers(self) -> bool:
        """Does anything happen to single records?"""
        return bool(set(self._amounts) - {"late", "truncate"})

    @property
    def cuts(self) -> bool:
        """Is a part of the story missing?"""
        return "late" in self._amounts or "truncate" in self._amounts

    def span(self, length_ns: int) -> tuple[int, int]:
        """Return from when until when is recorded (ns), of a story of this length."""
        late, killed = self._amounts.get("late", 0.0), self._amounts.get("truncate", 0.0)
        end = START_NS + int(length_ns * (1 - killed)) if killed else FOREVER
        return (START_NS + int(length_ns * late) if late else 0), end

    def __call__(self, group: Group) -> tuple[Group, Group]:
        left: Group = []
        written: Group = []
        for kind, records in group:
            kept = self._left(records.copy())
            if len(kept):
                left.append((kind, kept))
                written.append((kind, self._garbled(kept.copy())))
        return left, written

    def _left(self, records: Records) -> Records:
        amounts = self._amounts
        if "skew" in amounts:
            records = self._skewed(records, int(amounts["skew"]))
        if "loss" in amounts:
            records = records[self._kept(len(records), amounts["loss"], _BURST)]
        if "drop" in amounts:
            records = records[self._kept(len(records), amounts["drop"], 1)]
        return records

    def _garbled(self, records: Records) -> Records:
        amounts = self._amounts
        if "reorder" in amounts:
            moved = ~self._kept(len(records), amounts["reorder"], 1)
            records["h"]["ts"][moved] += np.uint64(_MOVED_NS)
            records = order(records)
        # After that: the two have one time, since it was taken once.
        if "duplicate" in amounts:
            twice = ~self._kept(len(records), amounts["duplicate"], 1)
            records = order(np.concatenate([records, records[twice]]))
        return records

    def _kept(self, count: int, share: float, burst: int) -> npt.NDArray[np.bool_]:
        kept = np.ones(count, bool)
        for at in range(0, count, burst):
            if self._dice.random() < share:
                kept[at : at + burst] = False
        return kept

    def _skewed(self, records: Records, most: int) -> Records:
        for cpu in np.unique(records["h"]["cpu"]):
            if int(cpu) not in self._skew:
                self._skew[int(cpu)] = self._dice.below(most + 1)
            at = records["h"]["cpu"] == cpu
            shift = np.uint64(self._skew[int(cpu)])
            for name in ("ts", "fault_ts"):
                column = records["h"][name]
                column[at & (column > 0)] += shift
        return order(records)
