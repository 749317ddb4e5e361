"""Events: what SPTE records say about lives, most records being one event each.

A change that puts another page into the SPTE is two, the end of one life and the beginning of
another. A zap that leaves a page table behind has split a large leaf: its children are mapped from
then on, and no record of theirs says so. May import: numpy, `analysis.columns`,
`analysis.lifecontext`, `analysis.lifepairs`, `analysis.lifestore`, `analysis.lifewalk`,
`probes.wire`.
"""

import dataclasses

import numpy as np

from analysis.columns import Records, code
from analysis.lifecontext import LifeContext
from analysis.lifepairs import Keys
from analysis.lifestore import Array, meta_of
from analysis.lifewalk import CHANGE, INSTALL, ZAP
from probes.wire import CAUSES, OPS

__all__ = ("CHILD", "MOVED_FROM", "MOVED_TO", "PARENT", "PRESENT", "SPLIT", "SPTE_COLUMNS",
           "WRITABLE", "Events", "events_of", "expected", "pages_of")  # fmt: skip

#: Columns of SPTE records that lives are made of.
SPTE_COLUMNS = (
    *("ts", "fault_ts", "seq", "cpu", "op", "tid", "tgid", "vm", "vcpu", "gfn", "pfn", "as_id"),
    *("level", "mmu", "refcount", "mapcount", "page_bits", "old", "new", "sptep", "cause"),
)

#: Bits that all generations share, arch/x86/kvm/mmu/spte.h: SPTE_MMU_PRESENT_MASK,
#: PT_WRITABLE_MASK, PT_PAGE_SIZE_MASK.
PRESENT, WRITABLE, _LARGE = np.uint64(1 << 11), np.uint64(1 << 1), np.uint64(1 << 7)
#: Entries of a page table (SPTE_ENT_PER_PAGE).
_CHILDREN = 512

#: What an event is that is not simply a record: the old or the new page of a change that puts
#: another page in place, the child of a large leaf that was split; the zap of that leaf.
MOVED_FROM, MOVED_TO, CHILD, PARENT = 1, 2, 3, 4
#: The number of the birth cause "split", behind those of the wire.
SPLIT = len(CAUSES)

_SHADOW = code("mmu", "shadow")
#: From a number of `op` on the wire to what an event does, 0 if nothing.
_DOES = np.zeros(256, np.uint8)
_DOES[[OPS.index(name) for name in ("install", "change", "zap")]] = INSTALL, CHANGE, ZAP


@dataclasses.dataclass(slots=True)
class Events:
    """Events in order of time: columns of SPTE records, and what they do.

    `record` is the number of an event's record, `part` which part of it the event is, 0 if all.
    Both are None if every record is one event.
    """

    columns: dict[str, Array]
    keys: Keys
    shadow: Array
    record: Array | None = None
    part: Array | None = None

    def __len__(self) -> int:
        return len(self.keys.op)


def pages_of(level: Array) -> Array:
    """Return how many 4K pages a leaf of each level maps."""
    return np.uint64(1) << (np.uint64(9) * (np.clip(level, 1, 3).astype(np.uint64) - np.uint64(1)))


def expected(records: Records) -> int:
    """Return how many events some records may become at most, without making them."""
    tables = (records["level"] > 1) & ((records["new"] & PRESENT) != 0)
    return 2 * len(tables) + _CHILDREN * int(np.count_nonzero(tables))


def events_of(records: Records, rows: slice, context: LifeContext, held: int = 0) -> Events:
    """Return the events of some SPTE records; the first ones wait since a block before (`held`)."""
    columns = {name: records[name][rows] for name in SPTE_COLUMNS}
    does = _DOES[columns["op"].view(np.uint8)]
    shadow = columns["mmu"] == _SHADOW
    changes = np.flatnonzero(does == CHANGE)
    old_frame = (columns["old"][changes] & np.uint64(context.address_mask)) >> np.uint64(12)
    moved = old_frame != columns["pfn"][changes]
    large = columns["level"] > 1
    splits = np.flatnonzero(large & (does == ZAP) & ~shadow & ((columns["new"] & PRESENT) != 0))
    if not moved.any() and not len(splits) and does.all():
        return Events(columns, _keys(columns, does, shadow, held), shadow)
    frame = columns["pfn"].copy()
    frame[changes] = old_frame
    counts = (does != 0).astype(np.int64)
    counts[changes[moved]] = 2
    first, last = _children(columns, splits, context)
    counts[splits] += last - first
    events = _expanded(columns, does, shadow, frame, counts, first, splits)
    events.keys = dataclasses.replace(events.keys, held=held)
    return events


def _keys(columns: dict[str, Array], does: Array, shadow: Array, held: int = 0) -> Keys:
    place = columns["gfn"]
    if shadow.any():
        place = np.where(shadow, columns["sptep"], place)
    meta = meta_of(columns["vm"], columns["as_id"], columns["level"], shadow)
    times = (columns["ts"], columns["fault_ts"], columns["tid"])
    return Keys(does, place, meta, columns["pfn"], *times, held=held)


def _children(
    columns: dict[str, Array], splits: Array, context: LifeContext
) -> tuple[Array, Array]:
    """Return which children of each split leaf are of interest: first, and last + 1."""
    first = np.zeros(len(splits), np.int64)
    last = np.full(len(splits), _CHILDREN, np.int64)
    if context.gfns is not None:
        low, high = context.gfns
        gfn = columns["gfn"][splits].astype(np.float64)
        pages = pages_of(columns["level"][splits] - 1).astype(np.float64)
        first = np.clip((low - gfn) // pages, 0, _CHILDREN).astype(np.int64)
        last = np.clip((high - gfn) // pages + 1, first, _CHILDREN).astype(np.int64)
    return first, last


def _expanded(
    columns: dict[str, Array],
    does: Array,
    shadow: Array,
    frame: Array,
    counts: Array,
    first: Array,
    splits: Array,
) -> Events:
    """Return events where some records are none, two, or one and children."""
    record = np.repeat(np.arange(len(does)), counts)
    nth = np.arange(len(record)) - np.repeat(np.cumsum(counts) - counts, counts)
    is_split = np.zeros(len(does), bool)
    is_split[splits] = True
    part = np.zeros(len(record), np.uint8)
    part[is_split[record]] = np.where(nth[is_split[record]] > 0, CHILD, PARENT)
    two = (counts[record] == 2) & ~is_split[record]
    part[two] = np.where(nth[two] == 0, MOVED_FROM, MOVED_TO)
    columns = {name: column[record] for name, column in columns.items()}
    does, shadow, frame = does[record], shadow[record], frame[record]
    does[part == MOVED_FROM] = ZAP
    does[part == MOVED_TO] = INSTALL
    after = part != MOVED_TO
    columns["pfn"] = np.where(after, frame, columns["pfn"])
    _bear(columns, does, part == CHILD, first, splits, record, nth)
    keys = dataclasses.replace(_keys(columns, does, shadow), plain=part == 0)
    return Events(columns, keys, shadow, record, part)


def _bear(
    columns: dict[str, Array],
    does: Array,
    child: Array,
    first: Array,
    splits: Array,
    record: Array,
    nth: Array,
) -> None:
    """Make of copies of a split leaf's record the installs of its children.

    As make_huge_page_split_spte() does it, arch/x86/kvm/mmu/spte.c; the TDP MMU has filled the
    table with all of them before it is linked, also in a fault (tdp_mmu_split_huge_page()).
    """
    at = np.flatnonzero(child)
    if not len(at):
        return
    level = columns["level"][at] - np.uint8(1)
    index = nth[at] - 1 + first[np.searchsorted(splits, record[at])]
    offset = index.astype(np.uint64) * pages_of(level)
    spte = columns["old"][at] | offset << np.uint64(12)
    spte[level == 1] &= ~_LARGE
    does[at] = INSTALL
    columns["level"][at] = level
    columns["gfn"][at] += offset
    columns["pfn"][at] += offset
    columns["new"][at] = spte
