"""Tests of changed KVMs: edits that apply or fail loudly; with the marker ``lab``, real boots."""

from __future__ import annotations

import ast
import re
import shutil
from pathlib import Path

import pytest

from . import LabError, RunOptions, kernels, kvmchange, run_in_lab
from .kvmbuild import KERNELS_WITH_SOURCE, driver_names, source
from .kvmchange import WHOLE, Edit, apply_edits, change_names, digest, load_change
from .rootfs import HERE
from .workloads import OUR_PROGRAMS, SELFTESTS

SOURCE = """\
static int put(struct page *page);

static int take(struct page *page,
		bool now)
{
	get_page(page);
	return  now ? 1 :
		0;
}

static int put(struct page *page)
{
	put_page(page);
	return 0;
}
"""


PUT = SOURCE[SOURCE.rindex("static int put") :].strip()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "virt").mkdir()
    (tmp_path / "virt/main.c").write_text(SOURCE)
    return tmp_path


def _text(tree: Path) -> str:
    return (tree / "virt/main.c").read_text()


# A change that no longer applies fails loudly


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (Edit("virt/gone.c", "put", "x", "y"), "has no virt/gone.c"),
        (Edit("virt/main.c", "gone", "x", "y"), "defines gone() 0 times"),
        (Edit("virt/main.c", "put", "get_page(page);", ""), "put has 'get_page(page);' 0 times"),
        (Edit("virt/main.c", "", "struct page *page", ""), "3 times, not 1"),
        # Another body, or no word of which it was: what was mended there would be lost
        (Edit("virt/main.c", "put", WHOLE, "", was="0123456789ab"), "another put() than the one"),
        (Edit("virt/main.c", "put", WHOLE, ""), "not said which"),
    ],
)
def test_an_edit_that_does_not_apply_is_an_error_of_one_line(
    tree: Path, edit: Edit, complaint: str
) -> None:
    with pytest.raises(LabError) as raised:
        apply_edits("a-bug", [edit], tree)
    assert complaint in str(raised.value) and "\n" not in str(raised.value)
    assert "--kvm a-bug" in str(raised.value)
    assert _text(tree) == SOURCE


def test_a_change_for_another_kernel_is_an_error() -> None:
    with pytest.raises(LabError, match=r"not written for kernel 7\.3, only for 6\.12"):
        load_change("series-v9").edits_for("7.3")


@pytest.mark.parametrize(
    ("name", "advice"),
    [("series-v99", "did you mean series-v9?"), ("x" * 200, "README.md lists them")],
)
def test_an_unknown_change_is_a_short_error(name: str, advice: str) -> None:
    with pytest.raises(LabError) as raised:
        load_change(name)
    assert str(raised.value).endswith(advice) and len(str(raised.value)) < 120


# Edits


def test_an_edit_reaches_its_function_only_whatever_the_blanks(tree: Path) -> None:
    edits = [
        Edit("virt/main.c", "take", "return now ? 1 : 0;", r"/* was: \g<0> */ return 2;"),
        Edit("virt/main.c", "put", "return 0;", "return 3;"),
    ]
    apply_edits("a-bug", edits, tree)
    assert "/* was: return  now ? 1 :\n\t\t0; */ return 2;" in _text(tree)
    assert "put_page(page);\n\treturn 3;" in _text(tree)


def test_a_whole_function_goes_and_its_declaration_stays(tree: Path) -> None:
    put = Edit(
        "virt/main.c", "put", WHOLE, '#include "ours.c"', was=digest(PUT.replace("\t", "  "))
    )
    apply_edits("a-bug", [put], tree)
    assert _text(tree).endswith('}\n\n#include "ours.c"\n')
    assert _text(tree).startswith("static int put(struct page *page);")


# The changes in kvm/


def test_names_are_those_of_the_files_and_all_load() -> None:
    for name in change_names():
        change = load_change(name)
        assert set(change.edits) <= set(KERNELS_WITH_SOURCE)
        assert change.module in (None, *driver_names())
        assert all(text for text in change.file_texts().values())


@pytest.mark.parametrize("name", change_names())
def test_a_change_says_where_why_and_what_a_trace_must_show(name: str) -> None:
    path = kvmchange.FOLDER / f"{name.replace('-', '_')}.py"
    header = " ".join((ast.get_docstring(ast.parse(path.read_text())) or "").split())
    for words in ("In which generation: ", "It stands for", "A trace must show"):
        assert words in header, words
    # A real bug has its number among the facts; what stands for none says so.
    real = re.search(r"KVM-FACTS 7, bugs? \d", header)
    if load_change(name).found_by:
        assert real or "It stands for: none recorded; the shape of " in header
        stands_for = load_change(name).stands_for
        assert re.search(r"KVM-FACTS 7: \d", stands_for) or "none recorded; " in stands_for


@pytest.mark.parametrize("name", change_names())
def test_a_change_s_workload_is_one_of_the_lab_s(name: str) -> None:
    programs = {*OUR_PROGRAMS, *(path.rpartition("/")[2] for path in SELFTESTS)}
    words = load_change(name).workload.split()
    assert words[2 if words[0] == "timeout" else 0] in programs


def test_a_change_that_counts_calls_the_counter_and_no_other_does() -> None:
    for name in change_names():
        change = load_change(name)
        text = "".join(edit.replace for edits in change.edits.values() for edit in edits)
        text += "".join(change.file_texts().values())
        assert change.planted == ("lab_planted(" in text or "lab_happened(" in text), name


def test_each_change_and_module_has_its_line_in_the_readme() -> None:
    readme = (HERE / "README.md").read_text()
    for name in (*change_names(), *driver_names()):
        assert f"| `{name}` |" in readme, name


# Real source, and real boots


@pytest.mark.lab
@pytest.mark.parametrize("kernel", KERNELS_WITH_SOURCE)
def test_every_change_applies_to_its_kernel_s_source_once(tmp_path: Path, kernel: str) -> None:
    tree, applied = source(kernels.kernel(kernel)), 0
    for name in change_names():
        # Given the files that the change edits, as Debian ships them
        edits = load_change(name).edits.get(kernel, ())
        for path in {edit.path for edit in edits}:
            (tmp_path / name / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tree / path, tmp_path / name / path)
        # When it is applied
        apply_edits(name, edits, tmp_path / name)
        applied += bool(edits)
        # Then a second time is one too many: what it replaced is gone, or there twice
        if edits and name.startswith("series-"):
            with pytest.raises(LabError, match=f"--kvm {name} does not apply"):
                apply_edits(name, edits, tmp_path / name)
    assert applied >= 10


@pytest.mark.lab
def test_a_function_that_debian_mended_is_not_replaced_in_silence(tmp_path: Path) -> None:
    # Given 6.12's source with another body of a function that the series replaces whole
    edits = load_change("series-v9").edits_for("6.12")
    for path in {edit.path for edit in edits}:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source(kernels.kernel("6.12")) / path, tmp_path / path)
    main = tmp_path / "virt/kvm/kvm_main.c"
    head = "int kvm_vcpu_map(struct kvm_vcpu *vcpu, gfn_t gfn, struct kvm_host_map *map)\n{\n"
    assert main.read_text().count(head) == 1
    main.write_text(main.read_text().replace(head, f"{head}\tif (mended(vcpu)) return -EINVAL;\n"))

    # Then the series does not apply
    with pytest.raises(LabError, match=r"has another kvm_vcpu_map\(\) than the one replaced"):
        apply_edits("series-v9", edits, tmp_path)


@pytest.mark.lab
@pytest.mark.parametrize("kernel", KERNELS_WITH_SOURCE)
def test_an_unchanged_kvm_rebuilt_is_loaded_and_works(tmp_path: Path, kernel: str) -> None:
    script = "cat /sys/module/kvm/taint /sys/module/kvm_amd/taint; prime-guest --print-stats"
    result = run_in_lab(
        ["sh", "-c", script], kernel=kernel, out=tmp_path, options=RunOptions(kvm="unchanged")
    )
    kvm, kvm_amd, witness = result.stdout.splitlines()
    # Out of the kernel's tree: ours, not Debian's.
    assert "O" in kvm and "O" in kvm_amd
    assert '"pf_taken":239,' in witness and '"pf_fixed":239,' in witness
