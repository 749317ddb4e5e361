"""`pfntrace report` and `pfntrace plot` as commands: options, streams, exit status."""

import json
from pathlib import Path

import pytest
from unit.test_front_door import assert_refused, run

TRACE = Path(__file__).parent / "traces" / "ttm-7.3.pfnt"


@pytest.mark.parametrize(
    "said, arguments",
    [
        ("no figure 'pie'; there are", ("plot", str(TRACE), "-o", "out", "--kind", "pie")),
        ("say png or svg", ("plot", str(TRACE), "-o", "out", "--format", "gif")),
        ("--pfn x: write a number", ("plot", str(TRACE), "-o", "out", "--pfn", "x")),
        ("below 2\\^52", ("plot", str(TRACE), "-o", "out", "--pfn=-1")),
        ("--gfn 9-1", ("plot", str(TRACE), "-o", "out", "--gfn", "9-1")),
    ],
)
def test_what_makes_no_sense_is_a_usage_error_of_one_line(tmp_path, said, arguments):
    assert_refused(2, said, *arguments, cwd=tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("more", [("plot", "-o", "out"), ("report", "--html", "page.html")])
def test_what_is_no_trace_leaves_no_file(tmp_path, more):
    (tmp_path / "garbage").write_bytes(b"\xff" * 3000)
    command, *options = more
    assert_refused(1, "not a pfntrace trace", command, "garbage", *options, cwd=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["garbage"]


def test_a_file_is_overwritten_only_by_force(tmp_path):
    (tmp_path / "page.html").write_text("mine")
    arguments = ("report", str(TRACE), "--html", "page.html")
    assert_refused(1, "exists already; name another", *arguments, cwd=tmp_path)
    assert (tmp_path / "page.html").read_text() == "mine"
    status, out, err = run(*arguments, "--force", cwd=tmp_path)
    assert (status, out, err) == (0, "", "pfntrace: wrote page.html\n")
    assert (tmp_path / "page.html").read_text().startswith("<!DOCTYPE html>")


def test_json_goes_to_stdout_with_a_page_beside_it(tmp_path):
    status, out, err = run("report", str(TRACE), "--json", "--html", "p.html", cwd=tmp_path)
    assert (status, err) == (0, "pfntrace: wrote p.html\n")
    assert json.loads(out)["kernel"].startswith("7.3")


def test_plot_says_what_it_wrote(tmp_path):
    status, out, err = run(
        "plot", str(TRACE), "-o", "figures", "--kind", "timeline", "--gfn", "0x10000-0x1000f",
        "--kind", "refcount", "--pfn", "0x22b01", "--format", "svg", cwd=tmp_path,
    )  # fmt: skip
    assert (status, out) == (0, "")
    assert err.splitlines() == [
        f"pfntrace: wrote figures/{kind}.svg" for kind in ("timeline", "refcount")
    ]
    assert (
        "gfn 0x10000 to 0x1000f (64 KiB): 16 mappings"
        in (tmp_path / "figures" / "timeline.svg").read_text()
    )
    assert "pfn 0x22b01" in (tmp_path / "figures" / "refcount.svg").read_text()
