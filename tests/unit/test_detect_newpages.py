"""References that faults keep where no record shows a put: new pages tell, mapped or not."""

from pathlib import Path

import pytest
from unit.simkit import Made, make
from unit.tracekit import Copy

from analysis.check import check_trace
from analysis.findings import Finding

#: A guest that goes on when the recording ends: nothing is zapped, nothing is freed.
GOES_ON = """title = "a guest that outlives the recording"
exit = false
[[memory]]
name = "ram"
kind = "{kind}"
gfn = 0x100
share = 1.0
[[phase]]
touch = {{ memory = "ram", order = "sequential", write = 1.0 }}
"""


def story(folder: Path, kernel: str, mmu: str, kind: str = "anon", **knobs: object) -> Made:
    """Simulate a guest that touches each of its pages once, and goes on."""
    scenario = folder / "goes_on.toml"
    scenario.write_text(GOES_ON.format(kind=kind))
    return make(folder, kernel=kernel, scenario=str(scenario), mmu=mmu, mem_bytes=2 << 20, **knobs)


def findings(made: Made) -> list[Finding]:
    return list(check_trace(made.path).findings)


#: All but v8 without TDP, which leaks: the next test.
SOUND = [
    *((kernel, "tdp") for kernel in ("v7", "v8", "v9", "v10", "v11")),
    *((kernel, "shadow") for kernel in ("v7", "v9", "v10", "v11")),
]


@pytest.mark.parametrize(("kernel", "mmu"), SOUND)
def test_a_version_that_keeps_no_reference_is_accused_of_nothing(tmp_path, kernel, mmu):
    assert findings(story(tmp_path, kernel, mmu)) == []


def test_version_8_without_tdp_is_found_before_its_guest_gives_anything_back(tmp_path):
    # Given version 8 of the series, whose faults of the shadow MMU keep what they took, and a
    # recording that ends while the guest maps everything yet
    made = story(tmp_path, "v8", "shadow")
    leaked = made.outcome.planted["missing_put_shadow"]
    assert leaked == 512 and not made.rows("PAGE_FREE")

    # When it is checked, then its new pages tell
    (one,) = findings(made)
    assert (one.detector, one.verdict) == ("growth", "definite")
    assert "all faults of the shadow MMU leave new pages with one reference more" in one.title
    assert 0.9 * leaked < one.pages <= leaked
    assert {pfn for first, last in one.pfns for pfn in range(first, last + 1)} <= {
        row["pfn"] for row in made.truth("bugs")
    }


def test_version_9_as_mailed_is_found_before_its_guest_gives_anything_back(tmp_path):
    # Given version 9, whose structures say that a fault puts at its end, and which never does
    made = story(tmp_path, "v9-mailed", "tdp")

    # Then no count is needed: each fault lacks its put
    (one,) = findings(made)
    assert (one.detector, one.verdict, one.pages) == ("balance", "definite", 512)
    assert one.title.startswith("every fault on this kernel keeps one reference")


def test_some_new_pages_with_one_reference_more_prove_nothing(tmp_path):
    # Given a leak in some faults only, which another's get_user_pages() at that moment may be
    made = story(tmp_path, "v10", "tdp", bugs=("missing_put=0.2",))

    # Then that is told, and accuses nobody
    (one,) = findings(made)
    assert (one.detector, one.verdict) == ("growth", "inconclusive")
    assert "not ruled out" in str(one.innocent)


def test_memory_of_a_file_is_held_by_its_page_cache_and_that_is_said(tmp_path):
    # Given the same leak, but memory that its page cache holds too
    result = check_trace(story(tmp_path, "v8", "shadow", kind="shared").path)

    # Then nobody is accused, nor told that all is well
    assert result.findings == ()
    told = {one.detector: one.reason for one in result.unanswerable}
    assert "none of 512 faults was of a new page of anonymous memory" in told["growth"]


def without_mappings(made: Made, folder: Path) -> Path:
    """Return the recording as if the process had ended before its mappings were read."""
    copy = Copy.of(made.path)
    copy.notes = [(ts, note | {"vmas": []} if "slot" in note else note) for ts, note in copy.notes]
    return copy.write(folder / f"without-{made.path.name}")


def test_memory_that_could_not_be_read_clears_a_kernel_and_accuses_none(tmp_path):
    # Found in the lab: a guest of half a second was gone before the recorder read its mappings
    sound = check_trace(without_mappings(story(tmp_path, "v8", "tdp"), tmp_path))
    leaky = check_trace(without_mappings(story(tmp_path, "v8", "shadow"), tmp_path))

    # Then new pages that nobody holds are an answer, and held ones, which a file's may be, are none
    assert sound.findings == leaky.findings == ()
    assert "growth" not in {one.detector for one in sound.unanswerable}
    assert "growth" in {one.detector for one in leaky.unanswerable}
