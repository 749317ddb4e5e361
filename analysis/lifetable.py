"""The table `lives`, filled some thousand rows at a time, so that what is gathered stays in cache.

May import: numpy, pandas, `analysis`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.lifecontext import LifeContext
from analysis.lifeparts import Deaths
from analysis.lifestore import (
    ACCESSED,
    CENSORED,
    COUNT_KNOWN,
    DIRTY,
    DOUBTED,
    SHADOW_BIT,
    VM_SHIFT,
    WRITABLE_EVER,
    Array,
)
from analysis.schema import ENDED_BY, TABLES

__all__ = ("STEP", "LifeTable")

#: Rows that are made at a time.
STEP = 1 << 13

_WRITABLE = np.uint64(1 << 1)
_PAGES = np.array([1, 1, 1 << 9, *[1 << 18] * 253], np.uint32)  # by level
_CENSORED = ENDED_BY.index("censored")
_MOST, _LEAST = np.int32((1 << 31) - 1), np.int32(-(1 << 31))
_NULL = -1  # of a category

#: Values of a column: an array, or one number for all. Nulls: where, or True, or False.
_Values = Any


class _Part:
    """Some lives as columns of `LIFE`, and what of them is asked for more than once."""

    def __init__(
        self, rows: Mapping[str, Array], deaths: Deaths | None, context: LifeContext
    ) -> None:
        self.rows = rows
        self.context = context
        self.deaths = deaths
        self.flags = rows["flags"]
        self.last = rows["spte_last"] if deaths is None else deaths.old
        if deaths is not None and deaths.own is not None:
            self.last = np.where(deaths.own, self.last, rows["spte_last"])

    def _flagged(self, flag: int) -> _Values:
        """Tell where a flag is set; a plain False if nowhere."""
        found = (self.flags & np.uint8(flag)) != 0
        return found if found.any() else False

    @functools.cached_property
    def censored(self) -> _Values:
        """Which lives were not seen to begin."""
        return self._flagged(CENSORED)

    @functools.cached_property
    def no_count(self) -> Array:
        """Of which lives the count at the beginning is not known."""
        return np.asarray((self.flags & np.uint8(COUNT_KNOWN)) == 0)

    @functools.cached_property
    def shadow(self) -> _Values:
        """Which lives are in the shadow MMU."""
        found = (self.rows["meta"] & np.uint64(1 << SHADOW_BIT)) != 0
        return found if found.any() else False

    @functools.cached_property
    def least(self) -> Array:
        """The least count seen."""
        d, least = self.deaths, self.rows["refcount_min"]
        return least if d is None else np.minimum(least, np.where(d.counted, d.refcount, _MOST))

    @functools.cached_property
    def most(self) -> Array:
        """The greatest count seen."""
        d, most = self.deaths, self.rows["refcount_max"]
        return most if d is None else np.maximum(most, np.where(d.counted, d.refcount, _LEAST))

    @functools.cached_property
    def no_counts(self) -> Array:
        """Of which lives no count was seen."""
        return np.asarray(self.least > self.most)

    def died(self, name: str) -> _Values:
        """Return a column of the last records."""
        return 0 if self.deaths is None else self.deaths.column(name)

    def why(self, name: str, open_life: int) -> _Values:
        """Return what is known of the ends, or a number for lives that are open."""
        return open_life if self.deaths is None else getattr(self.deaths, name)

    def no_last_count(self) -> _Values:
        """Of which lives the count at the end is not known."""
        return True if self.deaths is None else ~self.deaths.counted

    def alive(self) -> bool:
        """Was the end of these lives not seen?"""
        return self.deaths is None

    def sptep(self) -> _Values:
        """Where there is no address of an SPTE."""
        return True if self.shadow is False else ~self.shadow | (self.rows["place"] == 0)

    def birth_cause(self) -> _Values:
        """Return why lives began."""
        causes = self.rows["birth_cause"]
        return causes if self.censored is False else np.where(self.censored, _NULL, causes)

    def ever(self, flag: int, mask: Any) -> _Values:
        """Tell whether a bit of the SPTE was ever seen."""
        seen = (self.flags & np.uint8(flag)) != 0
        return seen | ((self.last & np.uint64(mask)) != 0) if mask else seen

    def lost(self) -> _Values:
        """Tell during which lives records were lost, or whose install may be another's."""
        doubted = self._flagged(DOUBTED)
        if not self.context.losses:
            return doubted
        birth = self.rows["birth_ts"]
        if self.censored is not False:
            birth = np.where(self.censored, np.uint64(0), birth)
        forever = np.full(len(birth), (1 << 64) - 1, np.uint64)
        lost = self.context.lost(birth, forever if self.deaths is None else self.died("ts"))
        return lost | doubted


_Columns = Callable[[_Part], _Values]


def _row(name: str) -> tuple[_Columns, None]:
    return lambda p: p.rows[name], None


def _birth(name: str) -> tuple[_Columns, _Columns]:
    return lambda p: p.rows[f"birth_{name}"], lambda p: p.censored


def _death(name: str) -> tuple[_Columns, _Columns]:
    return lambda p: p.died(name), _Part.alive


#: How each column is made: its values (of a category their numbers), and its nulls.
_MAKERS: dict[str, tuple[_Columns, _Columns | None]] = {
    **{n: _row(n) for n in ("life_id", "as_id", "level", "gfn", "pfn", "page_class", "changes")},
    "vm": (lambda p: p.rows["meta"] >> np.uint64(VM_SHIFT), None),
    "mmu": (lambda p: p.shadow, None),
    "pages": (lambda p: _PAGES.take(p.rows["level"]), None),
    "sptep": (lambda p: p.rows["place"], _Part.sptep),
    "slot": (lambda p: p.rows["slot"], lambda p: p.rows["slot"] < 0),
    **{f"birth_{n}": _birth(n) for n in ("ts", "tid", "tgid", "cpu", "seq")},
    "birth_cause": (_Part.birth_cause, None),
    "fault_ts": (lambda p: p.rows["fault_ts"], lambda p: (p.rows["fault_ts"] == 0) | p.censored),
    "vcpu": (lambda p: p.rows["vcpu"], lambda p: (p.rows["vcpu"] < 0) | p.censored),
    **{f"death_{n}": _death(n) for n in ("ts", "tid", "tgid", "cpu", "seq")},
    "death_cause": (lambda p: p.why("cause", _NULL), None),
    "spte_birth": _row("spte_birth"),
    "spte_last": (lambda p: p.last, None),
    "writable_birth": (lambda p: (p.rows["spte_birth"] & _WRITABLE) != 0, None),
    "writable_last": (lambda p: (p.last & _WRITABLE) != 0, None),
    "ever_writable": (lambda p: p.ever(WRITABLE_EVER, _WRITABLE), None),
    "accessed": (lambda p: p.ever(ACCESSED, p.context.accessed_mask), None),
    "dirty": (lambda p: p.ever(DIRTY, p.context.dirty_mask), None),
    "refcount_birth": (lambda p: p.rows["refcount_birth"], lambda p: p.no_count),
    "refcount_death": (lambda p: p.why("refcount", 0), _Part.no_last_count),
    "refcount_min": (lambda p: p.least, lambda p: p.no_counts),
    "refcount_max": (lambda p: p.most, lambda p: p.no_counts),
    "mapcount_birth": (lambda p: p.rows["mapcount_birth"], lambda p: p.no_count),
    "censored_start": (lambda p: p.censored, None),
    "censored_end": (_Part.alive, None),
    "lost": (_Part.lost, None),
    "ended_by": (lambda p: p.why("ended_by", _CENSORED), None),
}  # fmt: skip
_SPECS = {c.name: c for c in TABLES["lives"].columns}
_TYPES = {n: np.dtype(np.int8 if c.categories else c.dtype.lower()) for n, c in _SPECS.items()}
_CATEGORIES = {n: pd.CategoricalDtype(list(c.categories)) for n, c in _SPECS.items()
               if c.categories}  # fmt: skip


class LifeTable:
    """So many rows of the table `lives`, being filled; `columns` are those wanted, all if None."""

    def __init__(
        self, count: int, context: LifeContext, columns: Sequence[str] | None = None
    ) -> None:
        names = tuple(_SPECS) if columns is None else tuple(c for c in _SPECS if c in columns)
        self._context = context
        self._values = {name: np.empty(count, _TYPES[name]) for name in names}
        self._nulls = {name: np.zeros(count, bool) for name in names if _MAKERS[name][1]}
        self._filled = 0

    def add(self, rows: Mapping[str, Array], deaths: Deaths | None) -> None:
        """Fill the next rows with lives, columns of `LIFE`; without `deaths` they are open."""
        part = _Part(rows, deaths, self._context)
        at = slice(self._filled, self._filled + len(part.flags))
        self._filled = at.stop
        for name, column in self._values.items():
            make_values, make_nulls = _MAKERS[name]
            column[at] = make_values(part)
            if make_nulls is not None:
                nulls = make_nulls(part)
                if nulls is not False:  # as they are already
                    self._nulls[name][at] = nulls

    def __len__(self) -> int:
        return self._filled

    def array(self, name: str, null: int, dtype: Any) -> Array:
        """Return a column: of a category its codes, of a nullable one `dtype`, nulls a number."""
        values, nulls = self._values[name], self._nulls.get(name)
        if name in _CATEGORIES or nulls is None:
            return values
        found = values.astype(dtype)
        found[nulls] = null
        return found

    def frame(self, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """Return the table, or some columns of it."""
        names = self._values if columns is None else columns
        return pd.DataFrame({name: self._column(name) for name in names}, copy=False)

    @classmethod
    def joined(cls, tables: Sequence["LifeTable"]) -> "LifeTable":
        """Return the rows of some tables as one, in order of life_id, which all have."""
        whole = cls(0, tables[0]._context, tuple(tables[0]._values))
        order = np.argsort(np.concatenate([table._values["life_id"] for table in tables]))
        whole._filled = len(order)
        for columns in ("_values", "_nulls"):
            for name in getattr(whole, columns):
                parts = [getattr(table, columns)[name] for table in tables]
                getattr(whole, columns)[name] = np.concatenate(parts).take(order)
        return whole

    def _column(self, name: str) -> Any:
        values = self._values[name]
        if name in _CATEGORIES:
            return pd.Categorical.from_codes(values, dtype=_CATEGORIES[name], validate=False)
        if name in self._nulls:
            return pd.arrays.IntegerArray(values, self._nulls[name])
        return values
