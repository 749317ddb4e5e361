"""use-after-free: a page freed or reused while a guest still maps it, on all three kernels."""

import numpy as np
import pytest
from unit.mapkit import GENERATIONS, MAPS, SANE, ask, only, page, reclaim
from unit.tracekit import SHIPPED

from analysis.check import check_trace
from probes import wire

NAME = "use-after-free"
LATER = 1_000_000


def zap_late(copy, one, by=LATER):
    """Let the kernel zap a page only after it was freed."""
    copy["SPTE"]["h"]["ts"][one.zap] = one.freed + by


@pytest.mark.parametrize("path", SANE, ids=lambda path: path.stem)
def test_unchanged_kernels_are_not_accused(path):
    assert check_trace(path, [NAME]).findings == ()


@pytest.mark.parametrize("kernel", ["6.12", "7.3"])
def test_a_kvm_that_forgets_zaps_is_found_out(kernel):
    # Given a real KVM that skipped the zap of four pages, and says which
    skipped = [(0x13C, 0x13C), (0x163, 0x163), (0x1A0, 0x1A0), (0x1C7, 0x1C7)]
    # When it is asked about
    finding = only(check_trace(SHIPPED / f"map-zap-skipped-{kernel}.pfnt", [NAME]))
    # Then these four are found, and no other
    assert (finding.verdict, finding.count, finding.pages) == ("definite", 4, 4)
    assert list(finding.gfns) == skipped


@pytest.mark.parametrize(("kernel", "mmu"), MAPS)
def test_a_page_freed_before_its_zap(kernel, mmu, tmp_path):
    # Given a recording in which one page is zapped only after it was freed
    copy = reclaim(kernel, mmu)
    one = page(copy)
    zap_late(copy, one)
    # When it is checked
    finding = only(ask(copy, tmp_path, NAME))
    # Then that page is named, with its mapping, and the chain that proves it
    assert (finding.verdict, finding.count, finding.pages) == ("definite", 1, 1)
    assert finding.gfns == ((one.gfn, one.gfn),) and finding.pfns == ((one.pfn, one.pfn),)
    assert finding.first_ts == one.freed
    assert finding.where == "anonymous memory"
    chain = [(row["kind"], row.get("op")) for row in finding.evidence]
    wanted = [("SPTE", "install"), ("FAULT", None), ("PAGE_FREE", None), ("SPTE", "zap")]
    assert [step for step in chain if step in wanted] == wanted
    assert [row["ts"] for row in finding.evidence] == sorted(row["ts"] for row in finding.evidence)
    assert finding.detail["mapped_after_ns"] == LATER
    assert finding.detail["gfn"] == one.gfn and int(finding.detail["spte"], 16) >> 12 == one.pfn
    # What could excuse KVM is ruled out, but for what another detector answers.
    assert [i.ruled_out[:3] for i in finding.innocent] == ["no:", "no:", "no:", "not"]
    assert "invalidation names" in finding.innocent[-1].ruled_out


@pytest.mark.parametrize(("kernel", "mmu"), MAPS)
def test_a_page_that_is_never_zapped(kernel, mmu, tmp_path):
    copy = reclaim(kernel, mmu)
    one = page(copy)
    copy.drop("SPTE", np.arange(len(copy["SPTE"])) == one.zap)
    finding = only(ask(copy, tmp_path, NAME))
    assert (finding.verdict, finding.pages) == ("definite", 1)
    assert finding.gfns == ((one.gfn, one.gfn),)
    assert finding.detail["mapped_after_ns"] is None


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_loss_leaves_it_open(kernel, tmp_path):
    # Given the same, but SPTE records were lost: the zap may be among them
    copy = reclaim(kernel)
    one = page(copy)
    copy.drop("SPTE", np.arange(len(copy["SPTE"])) == one.zap)
    copy.lose("SPTE", 1)
    finding = only(ask(copy, tmp_path, NAME))
    assert (finding.verdict, finding.count) == ("inconclusive", 1)
    assert "not ruled out" in finding.innocent[0].ruled_out


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_birth_before_the_recording_leaves_it_open(kernel, tmp_path):
    # Given a recorder that came later than the VM and the mapping
    copy = reclaim(kernel)
    one = page(copy)
    zap_late(copy, one)
    copy.drop("SPTE", np.arange(len(copy["SPTE"])) == one.install)
    copy.drop("VM", copy.ops("VM", "create"))
    assert only(ask(copy, tmp_path, NAME)).verdict == "inconclusive"


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_every_page_is_one_finding(kernel, tmp_path):
    # Given a kernel that zaps every page a millisecond late
    copy = reclaim(kernel)
    pages = [page(copy, number) for number in range(23)]
    for one in pages:
        zap_late(copy, one)
    finding = only(ask(copy, tmp_path, NAME))
    assert (finding.count, finding.pages) == (23, 23)
    assert finding.gfns == ((pages[0].gfn, pages[-1].gfn),)
    assert len(finding.evidence) <= 12


@pytest.mark.parametrize("rows_max", [1, 7, 50])
def test_the_answer_does_not_depend_on_the_size_of_pieces(rows_max, tmp_path):
    copy = reclaim("6.12")
    for number in (3, 9):
        zap_late(copy, page(copy, number), by=40_000_000)
    whole, cut = ask(copy, tmp_path, NAME), ask(copy, tmp_path, NAME, rows_max=rows_max)
    assert [f.to_json() for f in whole.findings] == [f.to_json() for f in cut.findings]
    assert only(cut).count == 2


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_cve_2021_22543_freed_by_kvm_in_the_fault_that_maps_it(kernel, tmp_path):
    # Given a fault that maps a page and then drops its last reference: count 0, 1, 0
    copy = reclaim(kernel)
    one = page(copy)
    fault = copy["FAULT"][one.fault]
    copy.notes.append(
        (one.born, {"stack": 7, "frames": ["__free_pages_ok", "kvm_release_page_clean+0x10 [kvm]"]})
    )
    copy.add(
        "PAGE_FREE", h__ts=one.born + 500, h__tid=fault["h"]["tid"], h__vm=1, h__stack=7,
        h__cpu=fault["h"]["cpu"], pfn=one.pfn, page__bits=1,
    )  # fmt: skip
    # When it is checked
    finding = only(ask(copy, tmp_path, NAME))
    # Then KVM's own put is named, the stack that freed, the SPTE and the guest's page
    assert finding.verdict == "definite" and "by KVM's own put" in finding.title
    assert finding.functions[0].startswith(("kvm_release_", "kvm_mmu_finish_"))
    assert finding.detail["freed_by_stack"][1].startswith("kvm_release_page_clean")
    assert finding.functions[-1] == (
        "called by __free_pages_ok < kvm_release_page_clean+0x10 [kvm]"
    )
    assert finding.title.endswith(f"first gfn {one.gfn:#x} by SPTE {finding.detail['spte']}")
    assert int(finding.detail["spte"], 16) >> 12 & (1 << 40) - 1 == one.pfn
    assert finding.detail["freed_by_tid"] == int(fault["h"]["tid"])
    assert finding.gfns == ((one.gfn, one.gfn),)


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_block_of_any_order_frees_the_page_in_it(kernel, tmp_path):
    # Given the page in the middle of a block of 16 that is freed as one while it is mapped
    copy = reclaim(kernel)
    one = page(copy)
    first = one.pfn & ~15
    copy.add("PAGE_FREE", h__ts=one.born + LATER, h__vm=1, pfn=first, d=4, page__bits=1)
    finding = only(ask(copy, tmp_path, NAME))
    # Then it is found, with those of its neighbours that were mapped then
    sptes = copy["SPTE"][copy.ops("SPTE", "install")]
    inside = (sptes["pfn"] >> 4 == first >> 4) & (sptes["h"]["ts"] < one.born + LATER)
    assert finding.pages == inside.sum() >= 1
    assert finding.pfns[0][0] >= first and finding.pfns[-1][1] < first + 16


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_one_page_of_a_large_leaf(kernel, tmp_path):
    # Given a 2M leaf that lives as long as one page of the recording, and a free in its middle
    copy = reclaim(kernel)
    one = page(copy)
    gfn, pfn = 1 << 20, 1 << 18
    for row in (one.install, one.zap):
        spte = copy["SPTE"][row].copy()
        copy["SPTE"] = np.append(copy["SPTE"], spte)
        side = "b" if row == one.install else "a"
        copy["SPTE"][side][-1] = (int(spte[side]) & 0xFFF) | 1 << 7 | pfn << 12
        # A record of its own: with the same number it would be the same one, come twice.
        copy["SPTE"]["h"]["seq"][-1] |= np.uint32(1 << 31)
        for name, value in (("gfn", gfn), ("pfn", pfn), ("level", 2)):
            copy["SPTE"][name][-1] = value
    copy.add("PAGE_FREE", h__ts=one.died - 1, h__vm=1, h__cpu=99, pfn=pfn + 77, page__bits=1)
    copy["SPTE"]["h"]["ts"][-1] += 10_000
    finding = only(ask(copy, tmp_path, NAME))
    assert (finding.gfns, finding.pfns) == (((gfn + 77, gfn + 77),), ((pfn + 77, pfn + 77),))


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_page_handed_out_anew_tells_of_a_free_that_was_missed(kernel, tmp_path):
    copy = reclaim(kernel)
    one = page(copy)
    copy.add("PAGE_ALLOC", h__ts=one.born + LATER, h__vm=1, pfn=one.pfn, page__bits=1)
    finding = only(ask(copy, tmp_path, NAME))
    assert finding.verdict == "definite" and "handed out anew" in finding.title
    assert "PAGE_ALLOC" in [row["kind"] for row in finding.evidence]


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_leaves_of_an_invalid_root_prove_nothing(kernel, tmp_path):
    # Given a fast zap-all of a memslot's removal that begins before a page is freed, and ends after
    copy = reclaim(kernel)
    first, one = page(copy, 3), page(copy, 7)
    assert first.died < one.freed
    zap_late(copy, one)
    for each in (first, one):
        copy["SPTE"]["cause"][each.zap] = wire.CAUSES.index("slot")
    finding = only(ask(copy, tmp_path, NAME))
    assert finding.verdict == "inconclusive"
    assert [i.ruled_out[:3] for i in finding.innocent][:3] == ["no:", "not", "no:"]


@pytest.mark.parametrize("kernel", GENERATIONS)
def test_a_zap_all_that_began_after_the_free_is_no_excuse(kernel, tmp_path):
    copy = reclaim(kernel)
    one = page(copy)
    zap_late(copy, one)
    copy["SPTE"]["cause"][one.zap] = wire.CAUSES.index("slot")
    assert only(ask(copy, tmp_path, NAME)).verdict == "definite"


@pytest.mark.parametrize(("other_cpu", "verdict"), [(True, "inconclusive"), (False, "definite")])
def test_clocks_of_two_cpus_may_differ_a_little(other_cpu, verdict, tmp_path):
    copy = reclaim("7.3")
    one = page(copy)
    zap_late(copy, one, by=400)
    copy["SPTE"]["h"]["cpu"][one.zap] = copy["PAGE_FREE"]["h"]["cpu"][one.free] + other_cpu
    assert only(ask(copy, tmp_path, NAME)).verdict == verdict


def test_frees_at_the_moment_of_the_zap_are_after_it(tmp_path):
    copy = reclaim("6.1")
    one = page(copy)
    copy["PAGE_FREE"]["h"]["ts"][one.free] = one.died
    assert ask(copy, tmp_path, NAME).findings == ()


def test_records_of_no_page_are_passed_over(tmp_path):
    # Given what an early recorder wrote of pages that it could not name
    copy = reclaim("7.3")
    one = page(copy)
    copy.add("PAGE_FREE", h__ts=one.born + LATER, pfn=0, h__vm=0)
    assert ask(copy, tmp_path, NAME).findings == ()


def test_without_frees_there_is_no_answer(tmp_path):
    copy = reclaim("6.12")
    copy.unhook("page_free")
    result = ask(copy, tmp_path, NAME)
    assert result.findings == () and "page_free" in result.unanswerable[0].reason
