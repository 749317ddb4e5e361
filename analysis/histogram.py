"""Durations added up in bounded memory, and percentiles of them that are known to within 0.4 %.

A bin of `Histogram` is exact below 256 and less than 1/128 of its value wide above, whatever the
unit: so a trace of any length costs 60 KiB for each kind of duration. May import: numpy.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

__all__ = ("BINS", "Histogram", "Percentiles", "bin_edges", "bin_of")

#: Bins of one octave, as bits: 128.
_BITS = 7
#: Values below this have a bin each.
_EXACT = 1 << (_BITS + 1)
#: One more than the bin of 2^64 - 1.
BINS = _EXACT + (64 - _BITS - 1) * (1 << _BITS)


def bin_of(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return the number of the bin that each value falls into."""
    # A double has 53 bits, and 2^54 - 1 would count as 2^54: so the last 11 are left out, where
    # that changes no bin.
    exact = np.where(values >> np.uint64(53), values & ~np.uint64(0x7FF), values)
    length = np.frexp(exact.astype(np.float64))[1].astype(np.int64)
    shift = np.maximum(length - (_BITS + 1), 0)
    top = (values >> shift.astype(np.uint64)).astype(np.int64)
    return np.asarray(top + shift * (1 << _BITS), np.int64)


def bin_edges() -> npt.NDArray[np.float64]:
    """Return the BINS + 1 bounds of the bins, lower ones included in a bin."""
    number = np.arange(BINS + 1, dtype=np.int64)
    shift = np.maximum(number // (1 << _BITS) - 1, 0)
    top = (number - shift * (1 << _BITS)).astype(np.float64)
    return np.asarray(np.ldexp(top, shift), np.float64)


@dataclasses.dataclass(frozen=True, slots=True)
class Percentiles:
    """What a table shows of durations: how many there are, and some of them, ns.

    Of fewer than 10 there is no 90th percentile, of fewer than 100 no 99th, and of none nothing.
    """

    n: int = 0
    p50: int | None = None
    p90: int | None = None
    p99: int | None = None
    max: int | None = None


class Histogram:
    """Values from 0 to 2^64 - 1 that were added up: `counts` has one number for each bin."""

    __slots__ = ("counts", "max", "min", "n")

    def __init__(self) -> None:
        """Begin with no values."""
        self.counts = np.zeros(BINS, np.int64)
        self.n = 0
        self.min = 0
        self.max = 0

    def add(self, values: npt.NDArray[np.uint64]) -> None:
        """Add values, in any order."""
        if not len(values):
            return
        least, most = int(values.min()), int(values.max())
        self.min = least if not self.n else min(self.min, least)
        self.max = max(self.max, most)
        self.n += len(values)
        self.counts += np.bincount(bin_of(values), minlength=BINS)

    def percentile(self, share: float) -> int:
        """Return the value that this share (0 to 1) of all values does not exceed, 0 of none.

        It is the middle of a bin, so up to 0.4 % off; never outside of what was added.
        """
        if not self.n or share >= 1:
            return self.max
        rank = max(1, int(np.ceil(share * self.n)))
        at = int(np.searchsorted(np.cumsum(self.counts), rank))
        low, high = _EDGES[at], _EDGES[at + 1] - 1
        return min(max(int((low + high) // 2), self.min), self.max)

    def percentiles(self) -> Percentiles:
        """Return n, the median, 90 and 99 %, and the greatest value, as far as n bears them."""
        shares = ((0.5, 1), (0.9, 10), (0.99, 100), (1, 1))
        found = (self.percentile(share) if self.n >= n else None for share, n in shares)
        return Percentiles(self.n, *found)


_EDGES = bin_edges()
