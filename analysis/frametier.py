"""Rows of frames with the numbers of their last event: the memory of `analysis.framelog`.

A unit is a frame of 4K, 2M or 1G with the number of its space above. Rows of 512 units are found
through a hash table, since a binary search misses the cache at each of its steps.
May import: numpy, `analysis.lifestore`.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from analysis.lifestore import hashed

__all__ = ("I64", "ROW_BITS", "U64", "Tier")

U64 = npt.NDArray[np.uint64]
I64 = npt.NDArray[np.int64]

#: Units in a row.
ROW_BITS = 9
_ROW = 1 << ROW_BITS
#: Rows of one tier, 2 GiB of them with two tags: all frames of a 256 GiB host. What is beyond is
#: not remembered, and `Tier.forgotten` says so.
_ROWS_MAX = 1 << 17
#: Lives whose rows are looked through at a time.
_ROWS_AT_ONCE = 1 << 10
_NOTHING = np.zeros(1, np.uint64)


class Tier:
    """Units in rows of 512, each with the numbers of its last event; since is 0 where none was."""

    def __init__(self, fields: int) -> None:
        self.forgotten = 0
        self._fields = fields
        self._rows = _Rows()
        # The numbers of one unit lie together: they are written and read together.
        self._data = np.zeros((0, fields), np.uint64)
        self._latest = np.zeros(0, np.uint64)

    def __len__(self) -> int:
        return len(self._rows)

    def put(self, units: U64, values: Sequence[U64]) -> None:
        """Set the last event of units; of a unit named twice the later one stays."""
        keys = units >> np.uint64(ROW_BITS)
        rows = self._rows.find(keys)
        fresh = rows < 0
        if fresh.any():
            self._grow(np.unique(keys[fresh]))
            rows = self._rows.find(keys)
            known = rows >= 0
            if not known.all():
                self.forgotten += int((~known).sum())
                units, rows, values = units[known], rows[known], [v[known] for v in values]
        self._data[_cell(units, rows)] = np.stack(values, axis=1)
        since = values[0]
        if (since[1:] >= since[:-1]).all():  # mostly; then the last one of each row is its latest
            self._latest[rows] = np.maximum(self._latest.take(rows), since)
        else:
            np.maximum.at(self._latest, rows, since)

    def last(self, full: U64, tier: int, depth: int, birth: U64) -> tuple[I64, U64, list[U64]]:
        """Return (positions, units, numbers) of the last event in each life since its birth.

        `depth` is the level of the lives less one.
        """
        if tier >= depth:
            units = full >> np.uint64(ROW_BITS * tier)
            rows = self._rows.find(units >> np.uint64(ROW_BITS))
            at = np.flatnonzero(rows >= 0)
            cells = _cell(units.take(at), rows.take(at))
            # Not of a column, which numpy would copy first.
            since = self._data.reshape(-1).take(cells * self._fields)
            some = since > birth.take(at)
            at, cells = at[some], cells[some]
            return at, units[at], self._values(cells)
        if tier == depth - 1:
            rows = self._rows.find(full >> np.uint64(ROW_BITS * (tier + 1)))
            at = np.flatnonzero(rows >= 0)
            return self._whole_rows(at, rows[at], birth)
        span = np.uint64(ROW_BITS * (depth - tier - 1))
        first = full >> np.uint64(ROW_BITS * (tier + 1))
        keys, places = self._rows.in_order()
        low = np.searchsorted(keys, first)
        high = np.searchsorted(keys, first + (np.uint64(1) << span))
        at = np.repeat(np.arange(len(full)), high - low)
        starts = np.cumsum(high - low) - (high - low)
        rows = np.repeat(low - starts, high - low) + np.arange(len(at))
        return self._whole_rows(at, places[rows], birth)

    def _whole_rows(self, at: I64, rows: I64, birth: U64) -> tuple[I64, U64, list[U64]]:
        some = self._latest[rows] > birth[at]
        at, rows = at[some], rows[some]
        columns = np.zeros(len(rows), np.int64)
        whole = self._data.reshape(-1, _ROW, self._fields)
        for start in range(0, len(rows), _ROWS_AT_ONCE):
            part = slice(start, start + _ROWS_AT_ONCE)
            columns[part] = whole[rows[part], :, 0].argmax(axis=1)
        units = self._rows.keys[rows] << np.uint64(ROW_BITS) | columns.astype(np.uint64)
        return at, units, self._values(rows * _ROW + columns)

    def _values(self, cells: I64) -> list[U64]:
        found = self._data.take(cells, axis=0)
        return [found[:, field] for field in range(self._fields)]

    def _grow(self, keys: U64) -> None:
        used = len(self)
        self._rows.add(keys[: max(0, _ROWS_MAX - used)])
        need, have = len(self), len(self._latest)
        if need > have:
            # Pages of zeros that nothing was written to take no memory.
            rows = max(need, have * 2, 64)
            data = np.zeros((rows * _ROW, self._fields), np.uint64)
            data[: used * _ROW] = self._data[: used * _ROW]
            latest = np.zeros(rows, np.uint64)
            latest[:used] = self._latest[:used]
            self._data, self._latest = data, latest


def _cell(units: U64, rows: I64) -> I64:
    return rows << ROW_BITS | (units & np.uint64(_ROW - 1)).astype(np.int64)


class _Rows:
    """Numbers keys in the order in which they come, from 0; found through a hash table."""

    def __init__(self) -> None:
        #: key of each number.
        self.keys = np.zeros(0, np.uint64)
        # Open addressing with linear probing, a quarter full at most; number + 1, 0 is free.
        self._table = np.zeros(64, np.int32)
        self._sorted: tuple[U64, I64] | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def find(self, keys: U64) -> I64:
        """Return the number of each key, -1 if it has none."""
        if not len(self.keys):
            return np.full(len(keys), -1, np.int64)
        at = self._places(keys)
        found = self._table.take(at).astype(np.int64) - 1
        # A free place has number -1, for which the last key stands in: not there either way.
        wrong = np.flatnonzero((self.keys.take(found, mode="wrap") != keys) & (found >= 0))
        while len(wrong):
            at[wrong] = (at[wrong] + 1) & (len(self._table) - 1)
            found[wrong] = self._table.take(at[wrong]).astype(np.int64) - 1
            still = self.keys.take(found[wrong], mode="wrap") != keys[wrong]
            wrong = wrong[still & (found[wrong] >= 0)]
        return found

    def add(self, keys: U64) -> None:
        """Number keys that have none yet, each once."""
        self.keys = np.concatenate([self.keys, keys])
        self._sorted = None
        size = len(self._table)
        if 4 * len(self.keys) <= size:
            self._enter(len(self.keys) - len(keys))
            return
        while size < 8 * len(self.keys):
            size *= 2
        self._table = np.zeros(size, np.int32)
        self._enter(0)

    def in_order(self) -> tuple[U64, I64]:
        """Return the keys in order, and their numbers."""
        if self._sorted is None:
            order = np.argsort(self.keys, kind="stable")
            self._sorted = self.keys[order], order
        return self._sorted

    def _enter(self, first: int) -> None:
        numbers = np.arange(first, len(self.keys), dtype=np.int64)
        at = self._places(self.keys[first:])
        while len(at):
            free = np.flatnonzero(self._table.take(at) == 0)
            # Of several for one place the last is in; those see that they are not.
            self._table[at[free]] = numbers[free] + 1
            out = self._table.take(at) != numbers + 1
            numbers, at = numbers[out], (at[out] + 1) & (len(self._table) - 1)

    def _places(self, keys: U64) -> I64:
        shift = np.uint64(64 - (len(self._table) - 1).bit_length())
        return np.asarray((hashed(keys, _NOTHING) >> shift).astype(np.int64))
