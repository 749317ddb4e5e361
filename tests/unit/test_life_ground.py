"""What lives rest on: classes of pages, the store of open lives, and the tests' own MMU."""

import numpy as np
import pandas as pd
from unit.mmu_model import WRITABLE, Model

from analysis.lifestore import LIFE, NONE, OpenLives, hashed
from analysis.pagecodes import page_codes
from analysis.pages import PAGE_CLASSES, page_class


def test_classes_of_pages_are_those_of_the_reports():
    # GIVEN all bits, counts of every sort, and what stands in place of the mapcount
    bits, count, kind, pfn = (
        column.ravel()
        for column in np.meshgrid(
            np.arange(64), [-1, 0, 1, 5], [-1, 0, 3, -129, -200, 0xF0 << 24], [7, 1 << 60]
        )
    )
    kind = kind.astype(np.uint32).view(np.int32)
    table = pd.DataFrame({
        "pfn": pd.array(pfn.astype(np.uint64), "UInt64"),
        "page_bits": pd.array(np.where(bits == 0, 0, bits), "UInt32"),
        "refcount": pd.array(count, "Int32"), "mapcount": pd.array(kind, "Int32"),
    })  # fmt: skip
    table.loc[bits == 0, ["page_bits", "refcount", "mapcount"]] = pd.NA
    # WHEN
    codes = page_codes(
        bits.astype(np.uint32), count.astype(np.int32), kind, pfn.astype(np.uint64)
    )  # fmt: skip
    # THEN
    assert [PAGE_CLASSES[code] for code in codes] == page_class(table).tolist()


def test_the_table_of_open_lives_finds_what_was_put_there_and_nothing_else():
    # GIVEN a store through which more keys pass than it ever holds at once
    store, draw = OpenLives(), np.random.default_rng(1)
    held: dict[tuple[int, int], int] = {}
    for _ in range(200):
        # WHEN some keys go and others come
        gone = [key for key in held if draw.random() < 0.3]
        if gone:
            place, meta = np.array(gone, np.uint64).T
            slot, where, *_ = store.find(hashed(place, meta), place, meta)
            assert slot.tolist() == [held.pop(key) for key in gone]
            store.remove(where)
            store.drop(slot)
        fresh = {(int(a), int(b)) for a, b in draw.integers(0, 60, (40, 2))} - set(held)
        place, meta = np.array(sorted(fresh), np.uint64).T
        rows = np.zeros(len(fresh), LIFE)
        rows["place"], rows["meta"], rows["next"] = place, meta, NONE
        slots = store.put(rows)
        store.insert(hashed(place, meta), slots)
        held.update(zip(sorted(fresh), slots.tolist(), strict=True))
        # THEN all that are held are found, the others not
        place, meta = np.array([(a, b) for a in range(60) for b in range(60)], np.uint64).T
        slot, *_ = store.find(hashed(place, meta), place, meta)
        expected = [held.get((int(a), int(b)), NONE) for a, b in zip(place, meta, strict=True)]
        assert slot.tolist() == expected
        assert len(store) == len(held)


def test_the_model_of_the_mmu_does_what_the_tests_rely_on():
    model = Model()
    model.map_huge(1, 0)
    model.map(1, 3)
    model.map(1, 513)
    assert len(model.alive()) == 513
    assert [row["op"] for row in model.rows] == ["install", "zap", "install"]
    model.change(1, 3, WRITABLE)
    model.destroy(1)
    assert not model.alive()
