"""unpaired: zaps of what was not mapped, and leaves that outlive their VM; on all three kernels."""

import numpy as np
import pytest
from unit.mapkit import GENERATIONS, MAPS, SANE, ask, only, page, reclaim

from analysis.check import check_trace
from probes import wire

NAME = "unpaired"


def drop(copy, row):
    copy.drop("SPTE", np.arange(len(copy["SPTE"])) == row)


@pytest.mark.parametrize("path", SANE, ids=lambda path: path.stem)
def test_unchanged_kernels_are_not_accused(path):
    assert check_trace(path, [NAME]).findings == ()


@pytest.mark.parametrize(("kernel", "mmu"), MAPS)
def test_a_leaf_that_is_zapped_twice(kernel, mmu, tmp_path):
    # Given a page that is zapped, and zapped again a millisecond later
    copy = reclaim(kernel, mmu)
    one = page(copy)
    copy.again("SPTE", np.arange(len(copy["SPTE"])) == one.zap, h__ts=one.died + 1_000_000)
    finding = only(ask(copy, tmp_path, NAME))
    # Then the second zap closes no life
    assert (finding.verdict, finding.count, finding.pages) == ("probable", 1, 1)
    assert finding.gfns == ((one.gfn, one.gfn),) and finding.pfns == ((one.pfn, one.pfn),)
    assert finding.first_ts == one.died + 1_000_000
    zaps = [row["ts"] for row in finding.evidence if row.get("op") == "zap"]
    assert zaps == [one.died, one.died + 1_000_000]


@pytest.mark.parametrize(("kernel", "mmu"), MAPS)
def test_loss_leaves_it_open(kernel, mmu, tmp_path):
    # Given a zap without an install, and a lost record
    copy = reclaim(kernel, mmu)
    one = page(copy)
    copy.again("SPTE", np.arange(len(copy["SPTE"])) == one.zap, h__ts=one.died + 1_000_000)
    copy.lose("SPTE", 1)
    # Then the lost one may be the install, and nobody is accused
    assert all(f.verdict == "inconclusive" for f in ask(copy, tmp_path, NAME).findings)


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_vm_older_than_the_recording_has_mappings_nobody_saw(kernel, tmp_path):
    copy = reclaim(kernel)
    drop(copy, page(copy).install)
    copy.drop("VM", copy.ops("VM", "create"))
    assert ask(copy, tmp_path, NAME).findings == ()


@pytest.mark.parametrize(("kernel", "mmu"), MAPS)
def test_a_leaf_that_nobody_zaps(kernel, mmu, tmp_path):
    # Given a page whose zap never comes, though its VM goes
    copy = reclaim(kernel, mmu)
    one = page(copy)
    drop(copy, one.zap)
    finding = only(ask(copy, tmp_path, NAME))
    # Then it is said at the VM's end
    assert (finding.verdict, finding.count, finding.pages) == ("probable", 1, 1)
    assert finding.gfns == ((one.gfn, one.gfn),)
    assert [r["op"] for r in finding.evidence if r["kind"] == "VM"] == ["delete"]
    # And with a lost record it is not held against the kernel
    copy.lose("SPTE", 1)
    assert only(ask(copy, tmp_path, NAME)).verdict == "inconclusive"


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_vm_that_lives_on_may_have_mappings(kernel, tmp_path):
    copy = reclaim(kernel)
    drop(copy, page(copy).zap)
    copy.drop("VM", copy.ops("VM", "delete"))
    assert ask(copy, tmp_path, NAME).findings == ()


@pytest.mark.parametrize("kernel", GENERATIONS)
@pytest.mark.parametrize("cause", ["fast", "aging", "dirty_log"])
def test_a_change_without_the_lock_may_be_told_of_after_the_zap(kernel, cause, tmp_path):
    copy = reclaim(kernel)
    one = page(copy)
    changed = np.flatnonzero((copy["SPTE"]["gfn"] == one.gfn) & copy.ops("SPTE", "change"))
    copy["SPTE"]["h"]["ts"][changed] = one.died + 200
    copy["SPTE"]["cause"][changed] = wire.CAUSES.index(cause)
    assert only(ask(copy, tmp_path, NAME)).verdict == "inconclusive"


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_change_under_the_lock_may_not(kernel, tmp_path):
    copy = reclaim(kernel)
    one = page(copy)
    changed = np.flatnonzero((copy["SPTE"]["gfn"] == one.gfn) & copy.ops("SPTE", "change"))
    copy["SPTE"]["h"]["ts"][changed] = one.died + 200
    copy["SPTE"]["cause"][changed] = wire.CAUSES.index("fault")
    finding = only(ask(copy, tmp_path, NAME))
    assert finding.verdict == "probable" and "change, cause fault" in finding.title


@pytest.mark.parametrize(
    ("after", "verdict"), [(200, "inconclusive"), (19_000, "inconclusive"), (21_000, "probable")]
)
@pytest.mark.parametrize("rows_max", [30, 10**6])
def test_clocks_of_two_cpus_may_turn_a_change_and_a_zap_around(after, verdict, rows_max, tmp_path):
    # Given a change that another cpu wrote down soon after the zap
    copy = reclaim("6.12")
    one = page(copy)
    changed = np.flatnonzero((copy["SPTE"]["gfn"] == one.gfn) & copy.ops("SPTE", "change"))
    copy["SPTE"]["h"]["ts"][changed] = one.died + after
    copy["SPTE"]["h"]["cpu"][changed] = copy["SPTE"]["h"]["cpu"][one.zap] + 1
    copy["SPTE"]["cause"][changed] = wire.CAUSES.index("fault")
    path = copy.write(tmp_path / "t.pfnt")
    # Then the clocks explain it if the two are near
    assert only(check_trace(path, [NAME], rows_max=rows_max)).verdict == verdict


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_large_pages_of_the_shadow_mmu_may_have_been_split_unseen(kernel, tmp_path):
    # Given zaps of leaves that nobody installed, in a VM with a large shadow leaf
    copy = reclaim(kernel, "shadow")
    one = page(copy)
    which = np.arange(len(copy["SPTE"])) == one.install
    copy.again("SPTE", which, level=2, gfn=1 << 20, pfn=1 << 18, c=0xFFFF888000000000)
    copy["SPTE"]["b"][-1] = (int(copy["SPTE"]["b"][-1]) & 0xFFF) | 1 << 7 | 1 << 30
    drop(copy, one.install)
    verdicts = {f.verdict for f in ask(copy, tmp_path, NAME).findings if "nobody" in f.title}
    assert verdicts == {"inconclusive"}


@pytest.mark.parametrize("rows_max", [1, 13])
def test_the_answer_does_not_depend_on_the_size_of_pieces(rows_max, tmp_path):
    copy = reclaim("6.12")
    zaps = [page(copy, number).zap for number in (2, 12)]
    copy.again("SPTE", np.isin(np.arange(len(copy["SPTE"])), zaps))
    whole, cut = ask(copy, tmp_path, NAME), ask(copy, tmp_path, NAME, rows_max=rows_max)
    assert [f.to_json() for f in whole.findings] == [f.to_json() for f in cut.findings]
    assert only(cut).count == 2
