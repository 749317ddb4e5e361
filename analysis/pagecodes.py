"""The class of pages as numbers, from plain arrays: `analysis.pages` for many rows at a time.

May import: numpy, pandas, `analysis.lifestore`, `analysis.pages`.
"""

import numpy as np
import pandas as pd

from analysis.lifestore import Array
from analysis.pages import PAGE_CLASSES, page_class

__all__ = ("page_codes",)


def _codes_of(bits: Array, count: Array, mapcount: Array, pfn: Array) -> Array:
    table = pd.DataFrame(
        {
            "pfn": pd.array(pfn, "UInt64"),
            "page_bits": pd.array(bits, "UInt32"),
            "refcount": pd.array(count, "Int32"),
            "mapcount": pd.array(mapcount, "Int32"),
        }
    )
    return np.asarray(page_class(table).cat.codes, np.int8)


#: Class of a page by its bits, if it has a count; if not, the mapcount matters too.
_BITS = 64
_ONES = np.ones(_BITS, np.int64)
_COUNTED_CLASS = _codes_of(np.arange(_BITS), _ONES, -_ONES, _ONES)
_NO_STRUCT, _NO_PAGE = PAGE_CLASSES.index("no struct page"), PAGE_CLASSES.index("no page")
_FRAMES = np.uint64(1 << 40)


def page_codes(bits: Array, refcount: Array, mapcount: Array, pfn: Array) -> Array:
    """Return the number in PAGE_CLASSES of each page; bits are 0 where nothing is known of it.

    The same as `analysis.pages.page_class`.
    """
    codes: Array = _COUNTED_CLASS.take(bits & np.uint32(_BITS - 1))
    rest = np.flatnonzero((refcount <= 0) & (bits != 0))
    if len(rest):
        codes[rest] = _codes_of(bits[rest], refcount[rest], mapcount[rest], pfn[rest])
    unknown = np.flatnonzero(bits == 0)
    if len(unknown):
        codes[unknown] = np.where(pfn[unknown] < _FRAMES, _NO_STRUCT, _NO_PAGE)
    return codes
