"""Lives painted into a grid of guest frames and time, however many they are.

May import: numpy, `analysis.lifecolumns`, `analysis.pages`.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from analysis.lifecolumns import LifeColumns
from analysis.pages import PAGE_CLASSES

__all__ = ("COLUMNS_MAX", "EMPTY", "commonest_first", "paint")

#: Columns of a grid.
COLUMNS_MAX = 800
#: What a cell has where nothing was mapped.
EMPTY = 255
#: A class with less than one in so many of the mappings is an exception, shown before others.
EXCEPTION = 10

#: Rows of lives that are painted at a time: a 1G leaf may meet every row of a grid.
_STEP = 1 << 21

Cells = npt.NDArray[np.float64]


def paint(
    lives: LifeColumns, gfns: tuple[int, int], row_pages: int, times: tuple[int, int]
) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float64]]:
    """Return which class each cell shows, EMPTY for none, and how much of it was mapped, 0 to 1.

    Rows are `row_pages` guest frames from `gfns`, columns equal parts of `times` (ns); both bounds
    are included. A cell shows the class that was mapped most in it, but an exception before others.
    """
    first, last = gfns
    shape = ((last - first) // row_pages + 1, COLUMNS_MAX)
    cells = np.full(shape, EMPTY, np.uint8)
    share, most = np.zeros(shape), np.zeros(shape)
    for page_class in commonest_first(lives.page_class):
        mine = lives.where(lives.page_class == page_class)
        area, met = _painted(mine, gfns, row_pages, times, shape)
        exception = len(mine) * EXCEPTION < len(lives)
        cells[met if exception else met & ((area > most) | (cells == EMPTY))] = page_class
        most = np.maximum(most, area)
        share += area
    return cells, np.minimum(share, 1)


def commonest_first(page_class: npt.NDArray[np.uint8]) -> list[int]:
    """Return the classes that there are, as indices of PAGE_CLASSES."""
    counts = np.bincount(page_class, minlength=len(PAGE_CLASSES))
    return [int(c) for c in np.argsort(-counts, kind="stable") if counts[c]]


def _painted(
    lives: LifeColumns,
    gfns: tuple[int, int],
    row_pages: int,
    times: tuple[int, int],
    shape: tuple[int, int],
) -> tuple[Cells, npt.NDArray[np.bool_]]:
    """Return how much of each cell some lives cover, and which cells they meet.

    What a span [left, right) covers of column j is what [0, right) does less what [0, left) does,
    and that is 1 before the column of its end, a part in it, and 0 after.
    """
    rows, columns = shape
    whole, part, met = (np.zeros(rows * (columns + 1)) for _ in range(3))
    begin, end = times
    for some, row, weight in _rows(lives, gfns, row_pages):
        for ts, sign in ((some.death, 1), (some.birth, -1)):
            edge = (np.clip(ts, begin, end) - np.uint64(begin)) * (columns / (end - begin))
            column = np.minimum(edge.astype(np.int64), columns)
            at = row * (columns + 1) + column
            whole += np.bincount(at, sign * weight, len(whole))
            part += np.bincount(at, sign * weight * (edge - column), len(whole))
            # A life of no length still meets the cell that it is in.
            met += np.bincount(at, minlength=len(whole))
    after = np.cumsum(whole.reshape(rows, -1)[:, ::-1], axis=1)[:, ::-1]
    area = after[:, 1:] + part.reshape(rows, -1)[:, :-1]
    edges = met.reshape(rows, -1)
    edges[:, columns - 1] += edges[:, columns]
    return area, (area > 1e-6) | (edges[:, :columns] > 0)


def _rows(
    lives: LifeColumns, gfns: tuple[int, int], row_pages: int
) -> Iterator[tuple[LifeColumns, npt.NDArray[np.int64], Cells]]:
    """Yield lives, one for each row that they meet, with that row and how much of it they fill."""
    first, last = np.uint64(gfns[0]), np.uint64(gfns[1])
    low = np.maximum(lives.gfn, first) - first
    high = np.minimum(lives.gfn + (lives.pages - 1).astype(np.uint64), last) - first
    top = (low // row_pages).astype(np.int64)
    tall = (high // row_pages).astype(np.int64) - top + 1
    ends = np.cumsum(tall)
    at = 0
    while at < len(lives):
        done = int(ends[at - 1]) if at else 0
        after = max(at + 1, int(np.searchsorted(ends, done + _STEP)))
        owner = np.repeat(np.arange(at, after), tall[at:after])
        row = np.arange(len(owner)) - (ends - tall)[owner] + done + top[owner]
        inside = np.minimum(high[owner], (row + 1) * row_pages - 1) + 1
        weight = (inside - np.maximum(low[owner], row * row_pages)) / row_pages
        yield lives.where(owner), row, weight
        at = after
