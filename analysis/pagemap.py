"""Numbers for host pages, found by frame number: a sparse array of some fields.

Memory is taken in blocks of 512 frames as they are met, so it grows with the memory that guests
used, not with the trace. May import: numpy.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ("FRAMES_MAX", "PAGES_MAX", "PageMap")

_SHIFT = 9
#: Frames from here on (32 TiB) are taken for device memory and not kept.
FRAMES_MAX = 1 << 33
#: Pages kept at most (128 GiB of 4K pages); those met later are not.
PAGES_MAX = 1 << 25


class PageMap:
    """Fields of pages, zeros at first.

    `at` gives the positions of some frames in the arrays `pages["field"]`; the arrays are replaced
    when a new block is met, so ask for them after `at`.
    """

    def __init__(self, fields: Mapping[str, Any], most: int = PAGES_MAX) -> None:
        """Take the fields, name -> dtype, and how many pages to keep at most."""
        self._fields = {name: np.zeros(0, dtype) for name, dtype in fields.items()}
        self._directory = np.full(1, -1, np.int32)
        self._blocks = np.zeros(0, np.uint64)
        self._most = most >> _SHIFT
        #: pages that were not kept since there were too many.
        self.refused = 0

    def __getitem__(self, field: str) -> npt.NDArray[Any]:
        return self._fields[field]

    def __len__(self) -> int:
        """Return how many pages there is room for."""
        return len(self._blocks) << _SHIFT

    def at(self, pfns: npt.NDArray[np.uint64], *, add: bool = False) -> npt.NDArray[np.int64]:
        """Return the position of each frame, -1 if it is not kept; with `add` keep it from now."""
        blocks = (pfns >> np.uint64(_SHIFT)).astype(np.int64)
        usable = pfns < FRAMES_MAX
        if add:
            self._reach(blocks, usable)
        usable &= blocks < len(self._directory)
        slots = self._directory[np.where(usable, blocks, 0)]
        if add:
            missing = usable & (slots < 0)
            if missing.any():
                self._add(np.unique(blocks[missing]))
                slots = self._directory[np.where(usable, blocks, 0)]
                self.refused += int((usable & (slots < 0)).sum())
        position = slots.astype(np.int64) << _SHIFT | (pfns & np.uint64(511)).astype(np.int64)
        return np.where(usable & (slots >= 0), position, -1)

    def frames(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
        """Return the frame numbers of some positions."""
        low = (positions & 511).astype(np.uint64)
        high = self._blocks[positions >> _SHIFT] << np.uint64(_SHIFT)
        return np.asarray(high | low, np.uint64)

    def _reach(self, blocks: npt.NDArray[np.int64], usable: npt.NDArray[np.bool_]) -> None:
        last = int(blocks[usable].max(initial=0))
        if last >= len(self._directory):
            longer = np.full(last + 1 + last // 2, -1, np.int32)
            longer[: len(self._directory)] = self._directory
            self._directory = longer

    def _add(self, blocks: npt.NDArray[np.int64]) -> None:
        first = len(self._blocks)
        blocks = blocks[: max(0, self._most - first)]
        self._directory[blocks] = np.arange(first, first + len(blocks), dtype=np.int32)
        self._blocks = np.concatenate([self._blocks, blocks.astype(np.uint64)])
        need = len(self)
        for name, values in self._fields.items():
            if need > len(values):
                longer = np.zeros(max(need, len(values) + len(values) // 2), values.dtype)
                longer[: len(values)] = values
                self._fields[name] = longer
