"""two-leaves and leaf-replaced: one guest frame, two pages; on all three kernels."""

import numpy as np
import pytest
from unit.mapkit import GENERATIONS, MAPS, SANE, ask, only, page, reclaim
from unit.tracekit import SHIPPED, Copy

from analysis.check import check_trace
from probes import wire

FRAME = 0x000F_FFFF_FFFF_F000
OTHER = 0x4321


def install_again(copy, one, ts, pfn, **fields):
    """Install another leaf for a page's guest frame."""
    spte = int(copy["SPTE"]["b"][one.install]) & ~FRAME | pfn << 12
    which = np.arange(len(copy["SPTE"])) == one.install
    copy.again("SPTE", which, h__ts=ts, pfn=pfn, b=spte, **fields)


@pytest.mark.parametrize("name", ["two-leaves", "leaf-replaced"])
@pytest.mark.parametrize("path", SANE, ids=lambda path: path.stem)
def test_unchanged_kernels_are_not_accused(path, name):
    assert check_trace(path, [name]).findings == ()


@pytest.mark.parametrize("kernel", ["6.1", "7.3"])
def test_two_roots_that_map_the_same_page_are_in_order(kernel):
    # Given a recording with leaves of two roots at once, as the check above found silent
    copy = Copy.of(SHIPPED / f"map-slots-tdp-{kernel}.pfnt")
    mapped: dict[int, int] = {}
    twice = 0
    for row in np.sort(copy["SPTE"], order="h"):
        step = {wire.OPS.index("install"): 1, wire.OPS.index("zap"): -1}.get(int(row["h"]["op"]), 0)
        mapped[int(row["gfn"])] = mapped.get(int(row["gfn"]), 0) + step
        twice += mapped[int(row["gfn"])] == 2 and step == 1
    assert twice >= 5


@pytest.mark.parametrize(("kernel", "mmu"), MAPS)
def test_a_leaf_that_a_zap_forgot(kernel, mmu, tmp_path):
    # Given a page mapped anew, to another host page, at another entry, while the old leaf lives
    copy = reclaim(kernel, mmu)
    one = page(copy)
    where = {} if mmu == "tdp" else {"c": int(copy["SPTE"]["c"][one.install]) + (1 << 20)}
    install_again(copy, one, one.born + 1000, OTHER, **where)
    # When it is checked
    finding = only(ask(copy, tmp_path, "two-leaves"))
    # Then the older leaf is the one that is wrong
    assert (finding.verdict, finding.count, finding.pages) == ("definite", 1, 1)
    assert finding.gfns == ((one.gfn, one.gfn),) and finding.pfns == ((one.pfn, one.pfn),)
    installs = [row["pfn"] for row in finding.evidence if row.get("op") == "install"]
    assert installs[:2] == [one.pfn, OTHER]


@pytest.mark.parametrize(("kernel", "mmu"), MAPS)
def test_loss_leaves_it_open(kernel, mmu, tmp_path):
    copy = reclaim(kernel, mmu)
    one = page(copy)
    where = {} if mmu == "tdp" else {"c": int(copy["SPTE"]["c"][one.install]) + (1 << 20)}
    install_again(copy, one, one.born + 1000, OTHER, **where)
    copy.lose("SPTE", 1)
    assert only(ask(copy, tmp_path, "two-leaves")).verdict == "inconclusive"


@pytest.mark.parametrize(("kernel", "mmu"), MAPS)
def test_another_root_may_map_the_same_page(kernel, mmu, tmp_path):
    copy = reclaim(kernel, mmu)
    one = page(copy)
    where = {} if mmu == "tdp" else {"c": int(copy["SPTE"]["c"][one.install]) + (1 << 20)}
    install_again(copy, one, one.born + 1000, one.pfn, **where)
    assert ask(copy, tmp_path, "two-leaves").findings == ()


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_another_address_space_may_map_another_page(kernel, tmp_path):
    copy = reclaim(kernel)
    one = page(copy)
    install_again(copy, one, one.born + 1000, OTHER, as_id=1)
    assert ask(copy, tmp_path, "two-leaves").findings == ()


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_small_leaf_under_a_large_one(kernel, tmp_path):
    # Given a 2M leaf of other pages over the guest frames of the recording
    copy = reclaim(kernel)
    one, mapped = page(copy), [page(copy, number) for number in range(23)]
    gfn, pfn = one.gfn >> 9 << 9, 1 << 18
    install_again(copy, one, one.born + 1000, pfn, gfn=gfn, level=2)
    copy["SPTE"]["b"][-1] |= 1 << 7
    finding = only(ask(copy, tmp_path, "two-leaves"))
    before = [p for p in mapped if p.born < one.born + 1000 < p.died]
    # Then all that it covered and that lived on is found, and itself, for what came after it
    assert 0 < len(before) < 23
    assert finding.count == len(before) + 1 and finding.verdict == "definite"


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_leaves_of_an_invalid_root_prove_nothing(kernel, tmp_path):
    # Given an old leaf that a fast zap-all under way removes a moment later
    copy = reclaim(kernel)
    first, one = page(copy, 3), page(copy, 7)
    install_again(copy, one, (first.died + one.died) // 2, OTHER)
    for each in (first, one):
        copy["SPTE"]["cause"][each.zap] = wire.CAUSES.index("slot")
    assert only(ask(copy, tmp_path, "two-leaves")).verdict == "inconclusive"


@pytest.mark.parametrize("kernel", GENERATIONS)
@pytest.mark.parametrize("lost", [0, 1])
def test_a_shadow_spte_that_is_set_while_it_holds_a_leaf(kernel, lost, tmp_path):
    # Given the entry of a page that is set anew without a zap: CVE-2026-23401
    copy = reclaim(kernel, "shadow")
    one = page(copy)
    install_again(copy, one, one.born + 1000, OTHER)
    if lost:
        copy.lose("SPTE", lost)
    findings = ask(copy, tmp_path, "two-leaves").findings
    over = [f for f in findings if "nobody zapped" in f.title]
    assert [f.verdict for f in over] == ["inconclusive" if lost else "definite"]
    assert over[0].gfns == ((one.gfn, one.gfn),) and "drop_spte" in over[0].functions


@pytest.mark.parametrize("rows_max", [1, 13])
def test_the_answer_does_not_depend_on_the_size_of_pieces(rows_max, tmp_path):
    copy = reclaim("6.12")
    for number in (2, 12):
        one = page(copy, number)
        install_again(copy, one, one.born + 1000, OTHER + number)
    whole = ask(copy, tmp_path, "two-leaves")
    cut = ask(copy, tmp_path, "two-leaves", rows_max=rows_max)
    assert [f.to_json() for f in whole.findings] == [f.to_json() for f in cut.findings]
    assert only(cut).count == 2


# --- leaf-replaced --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kernel", "mmu"), MAPS)
@pytest.mark.parametrize("lost", [0, 5])
def test_a_present_leaf_that_becomes_another(kernel, mmu, lost, tmp_path):
    # Given a leaf that changes its page in place, where the kernel would stop with BUG()
    copy = reclaim(kernel, mmu)
    one = page(copy)
    old = int(copy["SPTE"]["b"][one.install])
    which = np.arange(len(copy["SPTE"])) == one.install
    copy.again("SPTE", which, h__op=wire.OPS.index("change"), a=old, b=old & ~FRAME | OTHER << 12,
               pfn=OTHER)  # fmt: skip
    if lost:
        copy.lose("SPTE", lost)
    # When it is checked, then one record proves it, and loss weakens nothing
    finding = only(ask(copy, tmp_path, "leaf-replaced"))
    assert (finding.verdict, finding.count) == ("definite", 1)
    assert finding.gfns == ((one.gfn, one.gfn),) and finding.pfns == ((OTHER, OTHER),)
    assert int(finding.detail["old"], 16) == old
    assert ("SPTE", "change") in [(row["kind"], row.get("op")) for row in finding.evidence]


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_bits_may_change_in_place(kernel):
    # Aging and access tracking change bits of every page of this recording.
    copy = reclaim(kernel)
    assert copy.ops("SPTE", "change").sum() == 23
