"""SPTE records and the lives that they make, for stories of a few lines."""

import pandas as pd
from unit.mmu_model import ACCESSED, DIRTY, NOT_PRESENT, leaf
from unit.mmu_model import record as spte
from unit.spte_rows import as_batch

from analysis.lifecontext import LifeContext
from analysis.lives import LifeBuilder

__all__ = ("LATE", "SEEN", "change", "chunks", "install", "lives_of", "lives_of_batch", "one",
           "zap")  # fmt: skip

#: All VMs were created in the trace, nothing was lost.
SEEN = LifeContext(created=frozenset({0, 1, 2, 3}), accessed_mask=ACCESSED, dirty_mask=DIRTY)
#: They are older than it.
LATE = LifeContext(accessed_mask=ACCESSED, dirty_mask=DIRTY)


def install(ts, pfn=0x1000, level=1, **fields):
    return spte("install", ts, pfn=pfn, level=level, new=leaf(pfn, level), **fields)


def zap(ts, pfn=0x1000, level=1, cause="notifier", new=NOT_PRESENT, **fields):
    old = leaf(pfn, level)
    return spte("zap", ts, pfn=pfn, level=level, cause=cause, **{"old": old, "new": new} | fields)


def change(ts, old, new, **fields):
    return spte("change", ts, old=old, new=new, pfn=new >> 12 & 0xFFFFFFFFFF, **fields)


def lives_of(rows, context=SEEN):
    return lives_of_batch(as_batch(rows), context)


def lives_of_batch(batch, context=SEEN):
    builder = LifeBuilder(context)
    parts = [builder.feed(batch), builder.finish()]
    table = pd.concat([part for part in parts if len(part)] or parts[:1])
    return table.sort_values("life_id", ignore_index=True), builder


def one(rows, context=SEEN):
    table, _ = lives_of(rows, context)
    (life,) = table.to_dict("records")
    return life


def chunks(*parts, context=SEEN):
    """Feed records in chunks; return all lives."""
    builder = LifeBuilder(context)
    tables = [builder.feed(as_batch(rows)) for rows in parts] + [builder.finish()]
    table = pd.concat([part for part in tables if len(part)])
    return table.sort_values("life_id", ignore_index=True), builder
