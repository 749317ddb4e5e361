"""Lifetimes against independent witnesses: KVM's own counts of leaves, and a slow way to pair.

Given recordings of real kernels without loss, when lives are made of them, then at each moment at
which KVM was asked how much it maps, that is what is alive; and at the end nothing is.
"""

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from unit.naive_lives import Rules, naive_lives
from unit.spte_rows import plain

from analysis import schema
from analysis.lifecontext import LifeContext
from analysis.lives import SPTE_COLUMNS, LifeBuilder, lives_of
from live.boots import BOOTS, Evidence
from tracer.tracefile import TraceReader

pytestmark = pytest.mark.lab

RUNS = {
    "basic": ("demand1", "demand2", "slots", "dirty", "nested", "aging"),
    "large": ("large1", "split", "smm"),
}
#: Runs of which KVM's statistics were read while nothing ran: before each slot was deleted.
SAMPLED = {"basic": ("demand1", "demand2"), "large": ("large1", "split")}
PRESENT = np.uint64(1 << 11)


def runs(chosen: Mapping[str, tuple[str, ...]]) -> pytest.MarkDecorator:
    cases = [(name, run) for name, boot in BOOTS.items() for run in chosen.get(boot.scenario, ())]
    return pytest.mark.parametrize(("evidence", "run"), cases, indirect=["evidence"])


@functools.lru_cache(maxsize=2)
def lives(path: Path) -> pd.DataFrame:
    return schema.check("lives", lives_of(path))


def sptes(path: Path) -> tuple[pd.DataFrame, LifeContext]:
    with TraceReader(path) as reader:
        batches = list(reader.records(["SPTE"], SPTE_COLUMNS))
        return pd.concat([batch.to_pandas() for batch in batches]), LifeContext.of(reader)


def samples(evidence: Evidence, run: str) -> list[dict]:
    text = (evidence.out / f"{run}.stats.mapped").read_text()
    return [json.loads(line) for line in text.splitlines()]


@runs(SAMPLED)
def test_live_leaves_are_as_many_as_kvm_counts_itself(evidence: Evidence, run: str) -> None:
    # Given KVM's numbers of leaves before each slot was deleted, read through the VM's own fd
    table = lives(evidence.path(run))
    asked = samples(evidence, run)

    # When those are counted that were alive at that moment
    counted = []
    for sample in asked:
        alive = (table["birth_ts"] <= sample["ts"]) & (table["death_ts"] > sample["ts"])
        levels = Counter(table["level"][alive].tolist())
        counted.append([levels[level] for level in (1, 2, 3)])

    # Then they are as many, of each size
    names = ("pages_4k", "pages_2m", "pages_1g")
    assert counted == [[sample["stats"][name] for name in names] for sample in asked]
    least = {"demand1": 16384, "demand2": 32768}.get(run, 1)
    assert sum(counted[0]) > least
    if run == "large1":
        assert counted[0][1] == 32


@runs(RUNS)
def test_every_life_is_whole_once_the_vm_is_gone(evidence: Evidence, run: str) -> None:
    table = lives(evidence.path(run))

    assert len(table) > 0
    assert not table["censored_start"].any() and not table["censored_end"].any()
    assert not table["lost"].any()
    assert "superseded" not in set(table["ended_by"])
    assert (table["birth_ts"] <= table["death_ts"]).all()
    assert not table["slot"].isna().any()


@runs(RUNS)
def test_each_record_belongs_to_one_life(evidence: Evidence, run: str) -> None:
    with TraceReader(evidence.path(run)) as reader:
        builder = LifeBuilder(LifeContext.of(reader))
        for batch in reader.records(["SPTE"], SPTE_COLUMNS):
            builder.feed(batch)
        records = reader.info()["kinds"]["SPTE"]

    assert builder.accounted == {"life": records}


@runs(RUNS)
def test_installs_less_zaps_are_alive_at_every_moment(evidence: Evidence, run: str) -> None:
    # Given all records, and that a leaf which gives way to a table leaves 512 behind
    path = evidence.path(run)
    records, _ = sptes(path)
    zaps = (records["op"] == "zap").to_numpy()
    split = zaps & (records["level"] > 1).to_numpy()
    split &= (records["new"].to_numpy(np.uint64) & PRESENT) != 0
    step = (records["op"] == "install").to_numpy().astype(int) - zaps + 512 * split

    # When births and deaths are added up at the times of the records that show them
    table = lives(path)
    written = records.set_index(["cpu", "seq"])["ts"].astype(np.uint64)
    shown = {
        end: written.loc[pd.MultiIndex.from_frame(table[[f"{end}_cpu", f"{end}_seq"]])].to_numpy()
        for end in ("birth", "death")
    }
    times = np.concatenate([shown["birth"], shown["death"]])
    signs = np.repeat([1, -1], len(table))

    # Then both sums are the same after every record
    moments, at = np.unique(records["ts"].to_numpy(np.uint64), return_inverse=True)
    expected = np.cumsum(np.bincount(at, weights=step))
    found = np.cumsum(np.bincount(np.searchsorted(moments, times), weights=signs))
    assert (found == expected).all() and found[-1] == 0 and found.max() > 0

    # And hardly any record was written down after what came after it
    late = table["birth_ts"].to_numpy(np.uint64) != shown["birth"]
    assert (table["birth_ts"].to_numpy(np.uint64) <= shown["birth"]).all()
    assert late.sum() <= 1 + len(table) // 1000


@runs(RUNS)
def test_a_slow_and_obvious_way_makes_the_same_lives(evidence: Evidence, run: str) -> None:
    path = evidence.path(run)
    with TraceReader(path) as reader:
        rows = [plain(row) for b in reader.records(["SPTE"]) for row in b.to_pylist()]
        slots = [row for batch in reader.records(["SLOT"]) for row in batch.to_pylist()]
        context = LifeContext.of(reader)
    rules = Rules(*(getattr(context, field.name) for field in dataclasses.fields(Rules)))

    slow = naive_lives(rows, rules, slots)

    table = lives(path)
    for name in ("vm", "level", "gfn", "pfn", "slot", "birth_ts", "death_ts", "ended_by",
                 "changes", "refcount_birth", "refcount_death", "page_class"):  # fmt: skip
        found = table[name].astype(object).where(table[name].notna(), None).tolist()
        assert found == [life[name] for life in slow.lives], name


@pytest.mark.parametrize("evidence", ["6.1-large", "6.12-large", "7.3-large"], indirect=True)
def test_large_leaves_are_split_by_dirty_logging_and_put_together_again(
    evidence: Evidence,
) -> None:
    table = lives(evidence.path("split"))
    small = table[table["birth_cause"] == "split"]
    ended = set(table["ended_by"])

    assert len(small) and len(small) % 512 == 0 and set(small["level"]) == {1}
    assert "split" in ended
    assert len(small) == 512 * (table["ended_by"] == "split").sum()
    # On 6.1 the end of dirty logging cannot be told from a deleted slot.
    together = {"zap"} if evidence.boot.kernel == "6.1" else {"collapse"}
    assert set(small["ended_by"]) == together


@pytest.mark.parametrize("evidence", ["6.1-large", "6.12-large", "7.3-large"], indirect=True)
def test_system_management_mode_has_lives_of_its_own(evidence: Evidence) -> None:
    assert set(lives(evidence.path("smm"))["as_id"]) == {0, 1}
