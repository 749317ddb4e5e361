"""Lives as a few plain arrays, for figures: ten million of them fit into half a gigabyte.

May import: numpy, pandas, `analysis.pages`.
"""

import dataclasses
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.pages import PAGE_CLASSES

__all__ = ("NEVER", "LifeCollector", "LifeColumns")


@dataclasses.dataclass(frozen=True, slots=True)
class LifeColumns:
    """One element for each life, in no order. Times are ns.

    `birth` is 0 if the start is censored, `death` 2^64 - 1 if the end is: so a life is mapped at t
    if birth <= t < death. `page_class` is an index of PAGE_CLASSES.
    """

    vm: npt.NDArray[np.uint32]
    as_id: npt.NDArray[np.uint8]
    level: npt.NDArray[np.uint8]
    page_class: npt.NDArray[np.uint8]
    gfn: npt.NDArray[np.uint64]
    pages: npt.NDArray[np.uint32]
    pfn: npt.NDArray[np.uint64]
    birth: npt.NDArray[np.uint64]
    death: npt.NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.birth)

    @property
    def censored_start(self) -> npt.NDArray[np.bool_]:
        """Which were mapped before the recording began, or their birth was lost."""
        return np.asarray(self.birth == 0)

    @property
    def censored_end(self) -> npt.NDArray[np.bool_]:
        """Which were still mapped at its end, or their end was lost."""
        return np.asarray(self.death == NEVER)

    def where(self, chosen: npt.NDArray[np.bool_ | np.integer[Any]]) -> "LifeColumns":
        """Return those of a mask, or at some positions."""
        fields = dataclasses.fields(self)
        return LifeColumns(*(getattr(self, field.name)[chosen] for field in fields))


#: The death of a life that did not end.
NEVER = (1 << 64) - 1

_DTYPES = {
    "vm": "u4",
    "as_id": "u1",
    "level": "u1",
    "page_class": "u1",
    "gfn": "u8",
    "pages": "u4",
    "pfn": "u8",
    "birth": "u8",
    "death": "u8",
}
_SAME = ("vm", "as_id", "level", "gfn", "pages", "pfn")


class LifeCollector:
    """Takes what figures need of tables `lives`, one after the other."""

    def __init__(self) -> None:
        """Begin with none."""
        self._parts: list[dict[str, npt.NDArray[np.generic]]] = []

    def feed(self, lives: pd.DataFrame) -> None:
        """Take a table `lives`."""
        if len(lives):
            self._parts.append(_columns(lives))

    def columns(self) -> LifeColumns:
        """Return all that were taken."""
        return LifeColumns(
            *(
                np.concatenate([np.zeros(0, dtype), *(part[name] for part in self._parts)])
                for name, dtype in _DTYPES.items()
            )
        )


def _columns(lives: pd.DataFrame) -> dict[str, npt.NDArray[np.generic]]:
    codes = lives["page_class"].cat.codes.to_numpy()
    return {
        **{name: lives[name].to_numpy(_DTYPES[name]) for name in _SAME},
        # A life without a class has code -1.
        "page_class": np.where(codes < 0, PAGE_CLASSES.index("no page"), codes).astype("u1"),
        "birth": lives["birth_ts"].to_numpy("u8", na_value=0),
        "death": lives["death_ts"].to_numpy("u8", na_value=NEVER),
    }
