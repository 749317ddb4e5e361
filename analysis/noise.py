"""How far two medians are apart, and whether that is more than traces differ anyway.

Faults that follow one another are alike, so a test that counts each as a draw of its own finds
everything significant. What is drawn here are stretches of a trace: with replacement, the ratio of
medians taken each time (block bootstrap, Künsch 1989), the middle 95 % of the ratios is the
interval. If the stretches are parts of one recording, the interval says how much that recording
drifts, and no more: recordings of one unchanged kernel differ by more (see `analysis.diffwords`).
Only if the stretches are whole recordings can a difference be judged; then the medians of the
recordings are compared by rank (Wilcoxon, Mann and Whitney), by drawing which of them are A's.
May import: `analysis.histogram`, numpy.
"""

import dataclasses

import numpy as np
import numpy.typing as npt

from analysis.histogram import bin_edges

__all__ = ("DRAWS", "FAULTS_MIN", "P_MAX", "Shift", "median_shift", "rank_p")

DRAWS = 1000
#: Of fewer faults, or in fewer stretches, no interval is given.
FAULTS_MIN = 200
_FILLED_MIN = 5
#: A difference is one if by chance it were seen more rarely than this.
P_MAX = 0.05
_PERMUTATIONS = 20_000
_EDGES = bin_edges()
_MIDDLES = (_EDGES[:-1] + _EDGES[1:] - 1) / 2
#: The same traces give the same figures.
_SEED = 20240229


@dataclasses.dataclass(frozen=True, slots=True)
class Shift:
    """The median of B divided by that of A, and the interval of that ratio; None: too few faults.

    `p` is how often chance alone, dealing the recordings to A and B anew, makes a difference as
    large; None if the stretches were no recordings.
    """

    ratio: float | None
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def verdict(self) -> str:
        """Return what B is compared with A: slower, faster or same; "" if nobody can tell."""
        if self.p is None or self.ratio is None:
            return ""
        if self.p > P_MAX or self.ratio == 1:
            return "same"
        return "slower" if self.ratio > 1 else "faster"


def median_shift(
    a: npt.NDArray[np.int32], b: npt.NDArray[np.int32], *, recordings: bool = False
) -> Shift:
    """Compare durations given as histograms, one row for each stretch.

    `recordings` is whether the stretches of both are recordings.
    """
    if not a.any() or not b.any():
        return Shift(None)
    before, after = _medians(a.sum(axis=0)[np.newaxis])[0], _medians(b.sum(axis=0)[np.newaxis])[0]
    if not before:
        return Shift(None)
    ratio = float(after / before)
    for side in (a, b):
        if side.sum() < FAULTS_MIN or (side.sum(axis=1) > 0).sum() < _FILLED_MIN:
            return Shift(ratio)
    draw = np.random.default_rng(_SEED)
    ratios = _drawn(b, draw) / np.maximum(_drawn(a, draw), 1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    p = rank_p(_medians(_filled(a)), _medians(_filled(b))) if recordings else None
    return Shift(ratio, float(low), float(high), p)


def rank_p(a: npt.NDArray[np.float64], b: npt.NDArray[np.float64]) -> float:
    """Return the two-sided p of a rank-sum test, from random permutations; ties share a rank."""
    both = np.concatenate((a, b))
    _, group, sizes = np.unique(both, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(sizes) - (sizes - 1) / 2)[group]
    expected = len(a) * (len(both) + 1) / 2
    seen = abs(ranks[: len(a)].sum() - expected)
    draw = np.random.default_rng(_SEED)
    dealt = draw.permuted(np.broadcast_to(ranks, (_PERMUTATIONS, len(both))), axis=1)
    sums = dealt[:, : len(a)].sum(axis=1)
    as_far = int((np.abs(sums - expected) >= seen - 1e-9).sum())
    return (1 + as_far) / (1 + _PERMUTATIONS)


def _filled(counts: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    return np.asarray(counts[counts.sum(axis=1) > 0], np.int32)


def _drawn(counts: npt.NDArray[np.int32], draw: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return the medians of DRAWS traces made of stretches that were drawn with replacement."""
    filled = _filled(counts)
    used = np.flatnonzero(filled.any(axis=0))
    weights = draw.multinomial(len(filled), np.full(len(filled), 1 / len(filled)), DRAWS)
    return _medians(weights @ filled[:, used].astype(np.int64), _MIDDLES[used])


def _medians(
    counts: npt.NDArray[np.int64] | npt.NDArray[np.int32],
    middles: npt.NDArray[np.float64] = _MIDDLES,
) -> npt.NDArray[np.float64]:
    """Return the median of each row of counts; a row has at least one count."""
    sums = np.cumsum(counts, axis=1, dtype=np.int64)
    half = (sums[:, -1:] + 1) // 2
    return np.asarray(middles[(sums < half).sum(axis=1)], np.float64)
