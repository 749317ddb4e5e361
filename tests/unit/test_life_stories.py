"""What becomes a life, and how it ends: one small story for each way in which KVM maps and unmaps.

`unit.test_lives` holds the fast way to a slow one; here one can read what both must say.
"""

import pandas as pd
import pyarrow as pa
import pytest
from unit.life_rows import LATE, SEEN, change, install, lives_of, lives_of_batch, one, zap
from unit.mmu_model import ACCESSED, DIRTY, FROZEN, HUGE, NOT_PRESENT, TABLE, leaf
from unit.mmu_model import record as spte
from unit.spte_rows import as_batch, slot_changes

from analysis import lifestore
from analysis.columns import Records
from analysis.lifecontext import LifeContext
from analysis.lifewalk import LATE_NS
from analysis.lives import LifeBuilder
from probes.errors import PfntraceError
from probes.wire import CAUSES

# --- records that do not fit ----------------------------------------------------------------------


def test_a_zap_of_nothing_is_an_orphan_where_nothing_can_have_been_missed():
    table, builder = lives_of([zap(1)])
    assert not len(table)
    assert builder.accounted == {"orphan zap": 1}
    assert builder.orphans["orphan"].tolist() == ["orphan zap"]
    assert builder.orphans["ts"].tolist() == [1] and builder.orphans["pfn"].tolist() == [0x1000]


def test_a_second_zap_is_an_orphan_too():
    table, builder = lives_of([install(1), zap(2), zap(3)])
    assert table["death_ts"].tolist() == [2]
    assert builder.orphans["ts"].tolist() == [3]


def test_a_zap_of_another_page_ends_nothing():
    table, builder = lives_of([install(1), zap(2, pfn=0x2000)])
    assert table["ended_by"].tolist() == ["censored"]
    assert builder.accounted == {"life": 1, "orphan zap": 1}


def test_a_change_of_nothing_is_an_orphan():
    table, builder = lives_of([change(1, leaf(5), leaf(5) | DIRTY), install(2)])
    assert table["changes"].tolist() == [0]
    assert builder.accounted == {"life": 1, "orphan change": 1}


def test_a_record_that_does_nothing_known_is_named():
    _, builder = lives_of([spte("map", 1), install(2)])
    assert builder.accounted == {"life": 1, "unknown op": 1}


def test_orphans_are_those_of_the_last_chunk_and_counts_those_of_all():
    # GIVEN a zap of nothing in one chunk, and a chunk long after it
    builder = LifeBuilder(SEEN)
    builder.feed(as_batch([zap(1)]))
    # THEN it is told once no install can explain it any more, and only once
    assert not len(builder.orphans) and not builder.accounted
    builder.feed(as_batch([install(2 + LATE_NS)]))
    assert builder.orphans["ts"].tolist() == [1] and len(builder.orphan_records) == 1
    assert builder.accounted == {"orphan zap": 1, "life": 1}
    builder.feed(as_batch([install(3 + LATE_NS)]))
    assert not len(builder.orphans)
    assert builder.accounted == {"orphan zap": 1, "life": 2}


def test_no_records_make_no_lives():
    assert not len(LifeBuilder(SEEN).feed(as_batch([install(1)])[:0]))
    assert not len(LifeBuilder(SEEN).feed(Records("SPTE")))
    assert not len(LifeBuilder(SEEN).finish())


def test_more_mappings_than_any_host_has_are_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(lifestore, "OPEN_MAX", 100)
    with pytest.raises(PfntraceError, match="more than 100 mappings open at once"):
        lives_of([install(ts, gfn=ts) for ts in range(101)])


def test_causes_that_only_another_writer_knows_are_other():
    # GIVEN a dictionary of causes with more names than ours
    batch = as_batch([install(1), zap(2)])
    at = batch.schema.get_field_index("cause")
    names = [*CAUSES, "of tomorrow", "of next week"]
    for strange in (len(CAUSES), len(CAUSES) + 1):
        causes = pa.DictionaryArray.from_arrays(pa.array([strange] * 2, pa.int8()), names)
        table, _ = lives_of_batch(batch.set_column(at, "cause", causes))
        # THEN neither is taken for one of ours
        assert (table["birth_cause"][0], table["death_cause"][0]) == ("other", "other")


# --- an ordinary life -----------------------------------------------------------------------------


def test_a_life_is_born_of_a_fault_and_ends_with_a_zap():
    # GIVEN a fault of vCPU 2 that maps a page, an ageing, a write, a zap by the notifier
    old = leaf(0x1000) | ACCESSED
    rows = [
        install(100, tid=44, cpu=1, vcpu=2, fault_ts=90, gfn=7, refcount=3, mapcount=1),
        change(150, old, old ^ ACCESSED, gfn=7, refcount=1, cause="aging"),
        zap(200, gfn=7, tid=55, cpu=3, refcount=2, old=leaf(0x1000) | DIRTY),
    ]
    # WHEN
    life = one(rows)
    # THEN
    assert (life["birth_ts"], life["fault_ts"], life["vcpu"], life["birth_tid"]) == (100, 90, 2, 44)
    assert (life["birth_cause"], life["birth_cpu"], life["birth_seq"]) == ("fault", 1, 0)
    assert (life["death_ts"], life["death_cause"], life["death_tid"]) == (200, "notifier", 55)
    assert (life["gfn"], life["pfn"], life["level"], life["pages"]) == (7, 0x1000, 1, 1)
    assert (life["refcount_birth"], life["refcount_death"]) == (3, 2)
    assert (life["refcount_min"], life["refcount_max"], life["mapcount_birth"]) == (1, 3, 1)
    assert (life["changes"], life["ended_by"]) == (1, "zap")
    # bits that the CPU set between the records show in the next one
    assert life["accessed"] and life["dirty"] and life["writable_birth"]
    assert life["spte_last"] == leaf(0x1000) | DIRTY
    assert not (life["censored_start"] or life["censored_end"] or life["lost"])
    assert life["page_class"] == "counted" and life["life_id"] == 1


def test_write_protection_and_its_end_show_as_history():
    plain, protected = leaf(0x1000), leaf(0x1000, bits=0)
    life = one([install(1), change(2, plain, protected), zap(3, old=protected)])
    assert life["writable_birth"] and life["ever_writable"] and not life["writable_last"]


def test_a_prefetch_bears_lives_too():
    life = one([install(1, cause="prefetch", mmu="shadow", sptep=8, fault_ts=0)])
    assert (life["birth_cause"], life["mmu"], life["sptep"]) == ("prefetch", "shadow", 8)
    assert pd.isna(life["fault_ts"]) and pd.isna(life["vcpu"])


@pytest.mark.parametrize(
    ("cause", "ended_by"),
    [("notifier", "zap"), ("slot", "zap"), ("root", "invalid_root"), ("teardown", "teardown"),
     ("recovery", "collapse")],
)  # fmt: skip
def test_the_cause_of_the_zap_tells_what_ended_it(cause, ended_by):
    life = one([install(1), zap(2, cause=cause)])
    assert (life["ended_by"], life["death_cause"]) == (ended_by, cause)


def test_lives_of_a_frame_follow_one_another():
    table, _ = lives_of([install(1), zap(2), install(3, pfn=0x2000), zap(4, pfn=0x2000)])
    assert table["pfn"].tolist() == [0x1000, 0x2000]
    assert table["death_ts"].tolist() == [2, 4]


def test_vms_address_spaces_and_levels_do_not_mix():
    rows = [install(1, vm=1), install(2, vm=2), install(3, as_id=1), install(4, level=2),
            zap(5, vm=2), zap(6, as_id=1)]  # fmt: skip
    table, builder = lives_of(rows)
    assert table["death_ts"].fillna(0).tolist() == [0, 5, 6, 0]
    assert builder.accounted == {"life": 6}


# --- several roots --------------------------------------------------------------------------------


def test_two_roots_map_a_frame_and_the_older_mapping_ends_first():
    # GIVEN a fast zap-all: the new root maps the page before the old one lets go
    rows = [install(1), install(2), zap(3, cause="root", new=FROZEN), zap(4)]
    table, _ = lives_of(rows)
    assert table["death_ts"].tolist() == [3, 4]
    assert table["ended_by"].tolist() == ["invalid_root", "zap"]


def test_two_roots_with_different_pages_are_told_apart_by_the_page():
    rows = [install(1), install(2, pfn=0x2000), zap(3, pfn=0x2000), zap(4)]
    table, _ = lives_of(rows)
    assert table["death_ts"].tolist() == [4, 3]


def test_in_the_shadow_mmu_an_entry_holds_one_page():
    # GIVEN a second install at the same entry, the zap between having been missed
    place = {"mmu": "shadow", "sptep": 64}
    table, _ = lives_of([install(1, **place), install(2, pfn=0x2000, **place)])
    assert table["ended_by"].tolist() == ["superseded", "censored"]
    assert table["death_ts"].fillna(0).tolist() == [2, 0]
    # its last value is its own, its count at the end is not known
    assert table["spte_last"].iloc[0] == leaf(0x1000)
    assert table["refcount_death"].isna().all()


# --- large leaves ---------------------------------------------------------------------------------


def test_a_split_ends_the_large_leaf_and_bears_512_small_ones():
    # GIVEN a 2M leaf that gave way to a table, of whose entries no record speaks
    rows = [
        install(1, level=2, gfn=512, pfn=0x8000, bits=5),
        zap(2, level=2, gfn=512, pfn=0x8000, new=TABLE, cause="dirty_log", bits=5),
        zap(3, gfn=515, pfn=0x8003),
    ]
    # WHEN
    table, builder = lives_of(rows)
    # THEN the small leaves live, with the pages and bits that the kernel gave them
    assert len(table) == 1 + HUGE and builder.accounted == {"life": 3}
    assert table["ended_by"].iloc[0] == "split" and table["pages"].iloc[0] == 512
    small = table[table["birth_cause"] == "split"]
    assert small["gfn"].tolist() == list(range(512, 1024))
    assert (small["pfn"] - small["gfn"]).unique().tolist() == [0x8000 - 512]
    assert set(small["level"]) == {1} and set(small["birth_ts"]) == {2}
    assert small["spte_birth"].iloc[3] == leaf(0x8003)
    assert small["refcount_birth"].isna().all()
    assert set(small["page_class"]) == {"counted, compound"}
    assert small["death_ts"].fillna(0).tolist() == [0, 0, 0, 3] + [0] * 508


def test_a_split_of_1g_bears_2m_leaves():
    rows = [install(1, level=3, pfn=1 << 18), zap(2, level=3, pfn=1 << 18, new=TABLE)]
    table, _ = lives_of(rows)
    small = table.iloc[1:]
    assert set(small["level"]) == {2} and small["gfn"].tolist()[:2] == [0, 512]
    assert small["spte_birth"].iloc[1] == leaf((1 << 18) + 512, 2)


def test_a_filter_by_guest_frames_bears_only_the_children_whose_records_pass_it():
    context = LifeContext(created=frozenset({1}), gfns=(510, 514))
    table, _ = lives_of([install(1, level=2), zap(2, level=2, new=TABLE)], context)
    assert table[table["birth_cause"] == "split"]["gfn"].tolist() == [510, 511]


def test_a_large_leaf_over_a_table_ends_the_table_s_leaves():
    # GIVEN a thread that puts a 2M leaf over a table: the table's leaves change to frozen after it
    rows = [
        install(1, gfn=5, pfn=0x8005),
        install(2, level=2, pfn=0x8000, old=TABLE, tid=9),
        zap(3, gfn=5, pfn=0x8005, new=FROZEN, cause="fault", tid=9),
    ]
    table, _ = lives_of(rows)
    assert table["ended_by"].tolist() == ["collapse", "censored"]
    # what the same thread zaps elsewhere, or as it zaps leaves, what another one zaps is no part
    other = [
        install(4, gfn=600), zap(5, gfn=600, tid=9, new=FROZEN),
        install(6, gfn=7), zap(7, gfn=7, tid=9),
        install(8, gfn=7), zap(9, gfn=7, tid=8, new=FROZEN),
        zap(10, level=2, pfn=0x8000, tid=9, new=FROZEN),
    ]  # fmt: skip
    table, _ = lives_of(rows + other)
    assert table["ended_by"].tolist() == ["collapse", "zap", "zap", "zap", "zap"]


def test_a_split_of_a_leaf_that_was_never_seen_bears_its_children_once():
    # GIVEN such a zap at the end of a chunk: it does not wait for an install
    builder = LifeBuilder(SEEN)
    builder.feed(as_batch([zap(1, level=2, new=TABLE)]))
    assert builder.accounted == {"orphan zap": 1}
    builder.feed(as_batch([install(2, gfn=900)]))
    assert len(builder.finish()) == HUGE + 1


@pytest.mark.parametrize(
    ("slot_op", "new", "ended_by"),
    [("flags", FROZEN, "collapse"), ("flags", NOT_PRESENT, "zap"), ("flags", 0, "zap"),
     ("flags", 0x5A0, "zap"), ("delete", FROZEN, "zap")],
)  # fmt: skip
def test_the_end_of_dirty_logging_takes_tables_out(slot_op, new, ended_by):
    # GIVEN a change of a slot, and a zap that it causes
    slot = {"op": slot_op, "ts": 5, "vm": 1, "as_id": 0, "slot": 1, "gfn": 0, "npages": 9}
    context = LifeContext(created=frozenset({1}), slots=slot_changes([slot]))
    life = one([install(1), zap(7, cause="slot", new=new)], context)
    assert life["ended_by"] == ended_by


def test_another_page_in_place_is_an_end_and_a_beginning():
    rows = [install(1, refcount=3), change(2, leaf(0x1000), leaf(0x2000), refcount=7)]
    table, builder = lives_of(rows)
    assert table["ended_by"].tolist() == ["pfn_change", "censored"]
    assert table["death_ts"].iloc[0] == table["birth_ts"].iloc[1] == 2
    assert table["pfn"].tolist() == [0x1000, 0x2000]
    # the record's count is that of the new page
    assert table["refcount_death"].isna().all() and table["refcount_birth"].tolist() == [3, 7]
    assert table["changes"].sum() == 0 and builder.accounted == {"life": 2}


# --- what was not seen ----------------------------------------------------------------------------


def test_in_a_vm_older_than_the_trace_a_zap_ends_a_life_whose_start_is_censored():
    life = one([zap(5, refcount=4)], LATE)
    assert life["censored_start"] and pd.isna(life["birth_ts"]) and pd.isna(life["birth_cause"])
    assert life["death_ts"] == 5 and life["refcount_death"] == 4
    assert pd.isna(life["refcount_birth"]) and life["spte_birth"] == leaf(0x1000)
    assert not life["lost"]


def test_there_a_change_shows_a_life_that_goes_on():
    life = one([change(5, leaf(9), leaf(9) | DIRTY), zap(8, pfn=9)], LATE)
    assert life["censored_start"] and life["changes"] == 1 and life["death_ts"] == 8
    assert life["dirty"]


def test_a_page_changed_in_place_that_was_never_seen_has_no_class():
    table, _ = lives_of([change(5, leaf(9), leaf(10))], LATE)
    assert table["page_class"].isna().tolist() == [True, False]


def test_what_is_open_at_the_end_is_censored_there():
    life = one([install(1)])
    assert life["censored_end"] and life["ended_by"] == "censored"
    assert pd.isna(life["death_ts"]) and pd.isna(life["death_cause"])
    assert pd.isna(life["refcount_death"])


def test_a_loss_marks_what_lived_during_it_and_excuses_what_comes_after():
    # GIVEN records lost between 15 and 20
    context = LifeContext(created=frozenset({1}), losses=((15, 20),))
    rows = [
        install(1, gfn=1), zap(10, gfn=1),  # over before
        install(11, gfn=2), zap(30, gfn=2),  # lived during it
        install(40, gfn=3),  # began after it
        zap(50, gfn=4),  # its install may be among the lost
    ]  # fmt: skip
    table, builder = lives_of(rows, context)
    assert table["lost"].tolist() == [False, True, False, True]
    assert table["censored_start"].tolist() == [False, False, False, True]
    assert not builder.orphans["orphan"].tolist()


def test_before_any_loss_a_zap_of_nothing_has_no_excuse():
    context = LifeContext(created=frozenset({1}), losses=((15, 20),))
    _, builder = lives_of([zap(15)], context)
    assert builder.accounted == {"orphan zap": 1}


# --- chunks and slots -----------------------------------------------------------------------------


def test_a_life_may_begin_in_one_chunk_and_end_in_another():
    builder = LifeBuilder(SEEN)
    assert not len(builder.feed(as_batch([install(1)])))
    assert builder.open()["life_id"].tolist() == [1]
    closed = builder.feed(pa.Table.from_batches([as_batch([zap(2)])]))
    assert closed[["birth_ts", "death_ts"]].to_numpy().tolist() == [[1, 2]]
    assert not len(builder.open()) and not len(builder.finish())


def test_only_the_columns_asked_for_are_made():
    builder = LifeBuilder(SEEN, columns=("pfn", "death_ts"))
    assert list(builder.feed(as_batch([install(1), zap(2)]))) == ["pfn", "death_ts"]


def test_the_slot_is_the_one_that_held_the_frame_at_birth():
    def slot(op, ts, number, gfn, npages=10):
        return {"op": op, "ts": ts, "vm": 1, "as_id": 0, "slot": number, "gfn": gfn,
                "npages": npages}  # fmt: skip

    slots = slot_changes([
        slot("create", 5, 1, 0), slot("create", 6, 2, 100), slot("delete", 20, 1, 0),
        slot("create", 30, 1, 5), slot("seen", 90, 3, 500),
    ])  # fmt: skip
    context = LifeContext(created=frozenset({1}), slots=slots)
    rows = [install(4, gfn=1), install(7, gfn=2), install(8, gfn=105), install(21, gfn=3),
            install(31, gfn=14), install(32, gfn=15), install(33, gfn=505)]  # fmt: skip
    table, _ = lives_of(rows, context)
    # one that was there before the trace is seen late, at its first fault
    assert table["slot"].fillna(-1).tolist() == [-1, 1, 2, -1, 1, -1, 3]
