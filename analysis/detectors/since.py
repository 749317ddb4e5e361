"""Pages that were freed within a piece of the trace: what of the piece comes after.

May import: numpy.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ("Since", "those")


class Since:
    """Pages that were freed in a chunk, and when last."""

    def __init__(self, at: npt.NDArray[np.int64], ts: npt.NDArray[Any]) -> None:
        # Frees are in order of time, so that the last of a page comes first backwards.
        self._at, first = np.unique(at[::-1], return_index=True)
        self._ts = ts[::-1][first]

    def __call__(self, at: npt.NDArray[np.int64], ts: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
        """Tell which of some moments of pages are after their free."""
        place = np.minimum(np.searchsorted(self._at, at), len(self._at) - 1)
        return np.asarray((self._at[place] == at) & (ts > self._ts[place]), np.bool_)


def those(
    rows: npt.NDArray[np.int64],
    at: npt.NDArray[np.int64],
    ts: npt.NDArray[Any],
    since: Since | None,
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the rows whose page is kept, and their pages; with `since` those after its free."""
    kept = at >= 0
    if since is not None:
        kept &= since(at, ts[rows])
    return rows[kept], at[kept]
