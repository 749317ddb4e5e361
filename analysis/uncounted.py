"""Memory that KVM maps without counting it: pages mapped to which it holds no reference.

May import: numpy, pandas, `analysis.mappings`, `analysis.pages`, `analysis.tables`.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.mappings import Mappings, VmaMapping, numbered
from analysis.pages import frame_of
from analysis.tables import largest_groups, stack

__all__ = ("UNCOUNTED_COLUMNS", "UncountedMemory", "uncounted_memory", "uncounted_pages")

#: Columns of a FAULT table that `uncounted_pages` takes.
UNCOUNTED_COLUMNS = [
    *("vm", "tgid", "slot", "as_id", "level", "gfn", "hva", "pfn", "walk_pfn", "refcounted"),
    "refcount",
]
_SAME = ["vm", "as_id", "slot", "level", "gfn", "frame"]


@dataclasses.dataclass(frozen=True, slots=True)
class UncountedMemory:
    """Mapped pages of one VM, slot and mapping that KVM has no reference to; units are 4K pages.

    `gfns` and `frames` are ranges, last one included; `leaves` is how many SPTEs map them. Of the
    `pages`, `zero` have a reference count of 0, `above` a greater one, `bare` no struct page; all
    pages of a 2M or 1G leaf go by the one that the fault looked at. `said` is whether the kernel
    said that they are not reference-counted, rather than that they cannot be.
    """

    vm: int
    tgid: int
    slot: int | None
    mapping: VmaMapping | None
    gfns: tuple[tuple[int, int], ...]
    frames: tuple[tuple[int, int], ...]
    hva: int
    leaves: int
    pages: int
    zero: int
    above: int
    bare: int
    said: bool


def uncounted_pages(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Collect pages: the table so far (may be empty), then FAULT rows that mapped uncounted ones.

    Returns vm, tgid, as_id, slot, level, gfn, frame, hva (of the leaf's first page), refcount
    (null without a struct page), said; one row for each leaf.
    """
    *before, fresh = parts
    if not len(fresh):
        return before[0] if before else fresh
    level = fresh["level"].fillna(1).clip(1, 3)
    # How far the access was into its leaf: KVM rounds gfn and pfn down when it maps.
    pages = _leaf_pages(level)
    into = fresh["gfn"].to_numpy(dtype=np.uint64, na_value=0) & (pages - np.uint64(1))
    leaves = pd.DataFrame(
        {
            "vm": fresh["vm"],
            "tgid": fresh["tgid"],
            "as_id": fresh["as_id"],
            "slot": fresh["slot"],
            "level": level,
            "gfn": fresh["gfn"].to_numpy(dtype=np.uint64, na_value=0) - into,
            "frame": frame_of(fresh).to_numpy(dtype=np.uint64, na_value=0)
            & ~(pages - np.uint64(1)),
            "hva": fresh["hva"].to_numpy(dtype=np.uint64, na_value=0) - (into << np.uint64(12)),
            "refcount": fresh["refcount"],
            "said": fresh["refcounted"].notna(),
        }
    )
    return stack([*before, leaves]).drop_duplicates(_SAME, keep="last")


def _leaf_pages(level: pd.Series) -> npt.NDArray[np.uint64]:
    shift = (level.to_numpy(dtype=np.uint64) - np.uint64(1)) * np.uint64(9)
    return np.asarray(np.left_shift(np.uint64(1), shift), np.uint64)


def uncounted_memory(
    leaves: pd.DataFrame, mappings: Mappings, limit: int = 20
) -> list[UncountedMemory]:
    """Group what `uncounted_pages` returned: the `limit` largest groups, those first."""
    if not len(leaves):
        return []
    table = leaves.assign(
        mapping=pd.Series(mappings.find_all(leaves), index=leaves.index, dtype=object),
        pages=_leaf_pages(leaves["level"]).astype(np.int64),
    )
    table["place"] = numbered(table["mapping"])
    return [
        _memory(rows) for rows in largest_groups(table, ["vm", "slot", "place"], "pages", limit)
    ]


def _memory(rows: pd.DataFrame) -> UncountedMemory:
    first = rows.iloc[0]
    # A page that stands behind two guest pages is one page.
    once = rows.drop_duplicates(["level", "frame"])
    pages = once["pages"].to_numpy(dtype=np.int64)
    bare = once["refcount"].isna().to_numpy()
    zero = (once["refcount"] == 0).fillna(False).to_numpy(dtype=bool)
    return UncountedMemory(
        vm=int(first["vm"]),
        tgid=0 if pd.isna(first["tgid"]) else int(first["tgid"]),
        slot=None if pd.isna(first["slot"]) else int(first["slot"]),
        mapping=first["mapping"],
        gfns=_ranges(rows["gfn"], rows["level"]),
        frames=_ranges(rows["frame"], rows["level"]),
        hva=int(rows["hva"].min()),
        leaves=len(rows),
        pages=int(pages.sum()),
        zero=int(pages[zero].sum()),
        above=int(pages[~zero & ~bare].sum()),
        bare=int(pages[bare].sum()),
        said=bool(first["said"]),
    )


def _ranges(first: pd.Series, level: pd.Series) -> tuple[tuple[int, int], ...]:
    """Join leaves to ranges [first, last] of pages."""
    starts = first.to_numpy(dtype=np.uint64)
    order = np.argsort(starts, kind="stable")
    starts = starts[order]
    ends = np.maximum.accumulate(starts + _leaf_pages(level)[order])
    breaks = np.flatnonzero(starts[1:] > ends[:-1]) + 1
    firsts = starts[np.concatenate([[0], breaks])]
    lasts = ends[np.concatenate([breaks - 1, [len(ends) - 1]])] - np.uint64(1)
    return tuple((int(a), int(b)) for a, b in zip(firsts, lasts, strict=True))
