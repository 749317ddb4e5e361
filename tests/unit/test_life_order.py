"""SPTE records that were written in another order than what they tell happened.

A thread writes its record after it has changed the SPTE, and another may be quicker. What waits for
a record that comes late must not wait too long, end what came after, or be too much.
"""

import pandas as pd
import pytest
from unit.life_rows import LATE, SEEN, change, chunks, install, lives_of, one, zap
from unit.mmu_model import ACCESSED, DIRTY, FROZEN, HUGE, TABLE, leaf
from unit.spte_rows import as_batch

from analysis import lifewalk, lives
from analysis.lifewalk import LATE_NS, PLACE_MAX, WAITING_MAX
from analysis.lives import LifeBuilder

#: Installs at 60 that cannot have been done when thread 9 zapped their page at 50.
not_done_by_then = pytest.mark.parametrize(
    "install_later",
    [{"fault_ts": 55, "tid": 8}, {"fault_ts": 40, "tid": 9}, {"fault_ts": 0, "tid": 8},
     {"fault_ts": 40, "tid": 8, "pfn": 0x2000}],
    ids=["its fault began later", "the same thread", "no fault", "another page"],
)  # fmt: skip


def test_a_change_written_down_before_its_install_belongs_to_it():
    # GIVEN another vCPU's change while the fault that installs is still at work (seen on 6.12)
    rows = [
        change(50, leaf(0x1000, bits=0), leaf(0x1000), tid=9, cause="fault"),
        install(60, fault_ts=40, tid=8),
        zap(70),
    ]
    # WHEN
    table, builder = lives_of(rows)
    # THEN it is one life, from the first record on
    (life,) = table.to_dict("records")
    assert (life["birth_ts"], life["birth_tid"], life["death_ts"]) == (50, 8, 70)
    assert life["changes"] == 1 and builder.accounted == {"life": 3}


def test_so_does_a_zap():
    life = one([zap(50, tid=9), install(60, fault_ts=40, tid=8)])
    assert (life["birth_ts"], life["death_ts"], life["ended_by"]) == (50, 50, "zap")


@not_done_by_then
def test_an_install_that_cannot_have_been_done_by_then_explains_nothing(install_later):
    _, builder = lives_of([zap(50, tid=9), install(60, **install_later)])
    assert builder.accounted == {"orphan zap": 1, "life": 1}


def test_an_install_that_comes_too_late_explains_nothing():
    rows = [zap(50, tid=9), install(51 + LATE_NS, fault_ts=40, tid=8)]
    _, builder = lives_of(rows)
    assert builder.accounted == {"orphan zap": 1, "life": 1}


def test_the_install_may_come_in_the_next_chunk():
    builder = LifeBuilder(SEEN)
    builder.feed(as_batch([install(1, gfn=7), change(50, leaf(0x1000), leaf(0x1000) | 8, tid=9)]))
    assert builder.accounted == {"life": 1}
    builder.feed(as_batch([install(60, fault_ts=40, tid=8)]))
    assert builder.accounted == {"life": 3} and not len(builder.orphans)
    rest = builder.finish()
    assert rest["birth_ts"].tolist() == [1, 50] and rest["changes"].tolist() == [0, 1]


def test_all_that_was_written_before_the_install_belongs_to_it():
    # GIVEN two changes, and a zap, all by others, before the record of what they found
    before = leaf(0x1000, bits=0)
    rows = [
        change(50, before, before | ACCESSED, tid=9),
        change(52, before | ACCESSED, before | DIRTY, tid=10),
        zap(54, tid=9, old=before | DIRTY),
        install(60, fault_ts=40, tid=8),
    ]
    # WHEN
    table, builder = lives_of(rows)
    # THEN
    (life,) = table.to_dict("records")
    assert (life["birth_ts"], life["death_ts"], life["changes"]) == (50, 54, 2)
    assert life["spte_last"] == before | DIRTY and builder.accounted == {"life": 4}


def test_of_two_zaps_that_wait_an_install_takes_the_first():
    rows = [zap(50, tid=9), zap(52, tid=9), install(60, fault_ts=40, tid=8)]
    table, builder = lives_of(rows)
    assert table["death_ts"].tolist() == [50]
    assert builder.accounted == {"life": 2, "orphan zap": 1}
    # AND a second late install the other
    table, builder = lives_of([*rows, install(61, fault_ts=41, tid=10)])
    assert table["death_ts"].tolist() == [50, 52] and builder.accounted == {"life": 4}


@pytest.mark.parametrize("place", [{}, {"mmu": "shadow", "sptep": 8}], ids=["tdp", "shadow"])
def test_a_zap_that_waits_does_not_end_what_was_mapped_after_it(place):
    # GIVEN a zap of nothing, and then an install that cannot be the one it waits for
    rows = [zap(50, tid=9, **place), install(60, fault_ts=55, tid=8, **place)]
    # WHEN both wait for the next chunk THEN the mapping is still there
    table, builder = chunks(rows, [install(70, gfn=7)])
    assert table["ended_by"].tolist() == ["censored", "censored"]
    assert builder.accounted == {"orphan zap": 1, "life": 2}


def test_a_zap_that_waits_does_not_end_another_page_of_a_shadow_spte():
    place = {"mmu": "shadow", "sptep": 8}
    rows = [zap(50, tid=9, **place), install(60, pfn=0x2000, **place)]
    table, _ = chunks(rows, [install(70, gfn=7)], [install(80, gfn=8)])
    assert table["ended_by"].tolist() == ["censored"] * 3


def test_a_life_that_was_over_when_it_was_written_takes_nobody_s_place():
    place = {"mmu": "shadow", "sptep": 8}
    rows = [zap(50, tid=9, **place), install(60, pfn=0x2000, **place)]
    table, _ = lives_of([*rows, install(70, fault_ts=40, tid=8, **place)])
    assert table["pfn"].tolist() == [0x2000, 0x1000]
    assert table["ended_by"].tolist() == ["censored", "zap"]


def test_a_zap_that_waits_keeps_its_reason():
    # GIVEN a large leaf over a table, a leaf of that table zapped by the same thread, its install
    # unwritten; then that thread's next large leaf, elsewhere
    large = {"level": 2, "tid": 9, "old": TABLE}
    rows = [
        install(40, pfn=HUGE, **large),
        zap(50, pfn=0x1000, tid=9, new=FROZEN),
        install(55, pfn=3 * HUGE, gfn=HUGE, **large),
    ]
    # WHEN
    table, _ = chunks(rows, [install(60, fault_ts=35, tid=8)])
    # THEN the first one replaced it
    small = table[table["level"] == 1]
    assert small["ended_by"].tolist() == ["collapse"]


def test_only_so_many_records_wait_and_the_oldest_are_told(monkeypatch):
    monkeypatch.setattr(lives, "_HELD_MAX", 2)
    builder = LifeBuilder(SEEN)
    builder.feed(as_batch([zap(ts, gfn=ts) for ts in range(5)]))
    assert builder.orphans["gfn"].tolist() == [0, 1, 2]
    builder.finish()
    assert builder.orphans["gfn"].tolist() == [3, 4] and builder.accounted == {"orphan zap": 5}


def test_at_one_place_only_so_many_wait():
    rows = [zap(ts, tid=9) for ts in range(50, 50 + WAITING_MAX + 1)]
    late = [install(99, fault_ts=40, tid=8) for _ in rows]
    table, builder = lives_of(rows + late)
    assert builder.accounted["orphan zap"] == 1 and 50 not in table["death_ts"].fillna(0).tolist()
    assert (table["ended_by"] == "zap").sum() == WAITING_MAX


def test_a_place_holds_only_so_many_lives_since_no_vm_has_so_many_roots():
    rows = [install(ts, pfn=0x1000 + ts) for ts in range(1, PLACE_MAX + 3)]
    table, _ = lives_of(rows)
    assert table["ended_by"].tolist() == ["superseded"] * 2 + ["censored"] * PLACE_MAX
    assert table["death_ts"].tolist()[:2] == [PLACE_MAX + 1, PLACE_MAX + 2]


def test_the_leaf_of_a_split_may_be_what_is_too_much(monkeypatch):
    # The end has the cause of the record, "split" is how a life begins.
    monkeypatch.setattr(lifewalk, "PLACE_MAX", 1)
    rows = [install(1), install(2, pfn=HUGE, level=2), zap(3, pfn=HUGE, level=2, new=TABLE)]
    table, _ = lives_of(rows)
    assert (table["ended_by"].iloc[0], table["death_cause"].iloc[0]) == ("superseded", "notifier")
    assert (table["birth_cause"] == "split").sum() == HUGE


def test_in_an_older_vm_the_life_that_the_change_showed_gets_its_beginning():
    builder = LifeBuilder(LATE)
    before = leaf(0x1000, bits=0)
    builder.feed(as_batch([change(50, before, before | DIRTY, tid=9, refcount=2)]))
    assert builder.open()["censored_start"].tolist() == [True]
    builder.feed(as_batch([install(60, fault_ts=40, tid=8, refcount=5)]))
    (life,) = builder.finish().to_dict("records")
    assert not life["censored_start"] and (life["birth_ts"], life["birth_tid"]) == (50, 8)
    assert (life["refcount_birth"], life["refcount_min"], life["refcount_max"]) == (5, 2, 5)
    assert life["spte_birth"] == leaf(0x1000) and life["spte_last"] == before | DIRTY


def cut_anywhere(rows):
    """Make the lives of an older VM from records cut in two at each place, all the same."""
    batch, tables = as_batch(rows), []
    for at in range(len(rows) + 1):
        builder = LifeBuilder(LATE)
        parts = [builder.feed(batch.slice(0, at)), builder.feed(batch.slice(at)), builder.finish()]
        table = pd.concat([part for part in parts if len(part)])
        tables.append(table.sort_values("life_id", ignore_index=True))
        pd.testing.assert_frame_equal(tables[-1], tables[0])
    return tables[0]


def test_in_an_older_vm_an_install_after_a_zap_may_be_that_of_the_zap():
    # GIVEN a zap of what nobody saw mapped, and an install whose fault had begun by then
    rows = [zap(50, tid=9), install(60, fault_ts=40, tid=8)]
    # THEN there are two lives, and of the second nobody is sure: it accuses nobody
    table = cut_anywhere(rows)
    assert table["censored_start"].tolist() == [True, False]
    assert table["lost"].tolist() == [False, True]


@not_done_by_then
def test_an_install_in_an_older_vm_that_cannot_have_been_done_by_then_is_sure(install_later):
    table = cut_anywhere([zap(50, tid=9), install(60, **install_later)])
    assert not table["lost"].any()


def test_nobody_is_sure_of_what_begins_while_such_a_life_is_open():
    # GIVEN such a life, and another install in its place: the zap that follows ends one of the two
    rows = [
        zap(50, tid=9),
        install(60, fault_ts=40, tid=8),
        install(200, fault_ts=190, tid=8),
        zap(210, tid=9),
        install(900, fault_ts=890, tid=8),
    ]
    # THEN neither is sure, nor what begins while one of them is left
    assert cut_anywhere(rows)["lost"].tolist() == [False, True, True, True]


def test_nor_of_what_begins_after_such_a_life_if_its_install_may_be_late_again():
    # GIVEN a cpu whose clock is ahead: each install is written after its own zap (the simulator's
    # hostile skew, 6.12, seed 27)
    rows = [
        zap(50, tid=9),
        install(51, fault_ts=40, tid=8),
        zap(150, tid=9),
        install(151, fault_ts=140, tid=8),
        zap(250, tid=9),
        install(251, fault_ts=240, tid=8),
    ]
    assert cut_anywhere(rows)["lost"].tolist() == [False, True, True, True]
    # BUT of one whose fault began after the last zap everybody is
    table = cut_anywhere([*rows, zap(350, tid=9), install(400, fault_ts=390, tid=8)])
    assert table["lost"].tolist()[-1] is False


def test_zaps_are_remembered_in_order_of_time_whatever_they_ended():
    # GIVEN a zap that ended a life in doubt, and after it one of what nobody saw mapped
    rows = [
        zap(50, tid=9),
        install(60, fault_ts=40, tid=8),
        zap(100, tid=9),
        zap(200, tid=9),
        install(300, fault_ts=150, tid=8),
    ]
    # THEN an install that may be the second one's is not sure, wherever the records are cut
    assert cut_anywhere(rows)["lost"].tolist() == [False, True, False, True]
