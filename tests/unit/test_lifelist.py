"""`pfntrace lifetimes`: what it prints, what it writes, and what it says about bad input."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner
from unit.records import START_NS, records, write_trace

import pfntrace
from analysis import schema
from analysis.lifelist import Selection, lifetime_lines, write_lifetimes
from probes import wire
from probes.errors import OutputError, PfntraceError, TraceFormatError, UsageError

TRACES = Path(__file__).parent / "traces"
TTM = TRACES / "ttm-7.3.pfnt"
ANY = Selection()


def lines(path, chosen=ANY, limit=40):
    return list(lifetime_lines(path, chosen, limit))


def run(*arguments):
    return CliRunner().invoke(pfntrace.app, ["lifetimes", *map(str, arguments)])


# --- bad input first ------------------------------------------------------------------------------


def test_a_file_that_is_no_trace_is_refused(tmp_path):
    (tmp_path / "x").write_text("no")
    with pytest.raises(TraceFormatError):
        lines(tmp_path / "x")


def test_a_file_that_exists_is_not_overwritten_unasked(tmp_path):
    there = tmp_path / "lives.csv"
    there.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        write_lifetimes(TTM, ANY, {"csv": there})
    assert there.read_text() == "mine"
    write_lifetimes(TTM, ANY, {"csv": there}, overwrite=True)
    assert there.read_text().startswith('"life_id"')


def test_ranges_that_are_none_name_their_option():
    result = run(TTM, "--pfn", "9-3")
    assert isinstance(result.exception, UsageError)
    assert str(result.exception).startswith("--pfn 9-3: A must not be above B")


def test_a_trace_without_mappings_says_so(tmp_path):
    path = write_trace(tmp_path / "t.pfnt", [[("VM", records("VM", 1))]])
    assert lines(path)[-1] == "No mapping lived in this trace."


def test_a_choice_that_leaves_nothing_says_that_it_is_one():
    # No guest frame is so high.
    assert lines(TTM, Selection(gfns=(1 << 50, 1 << 50)))[-1] == (
        "No mapping lived in this trace, of those asked for."
    )


def test_a_vm_that_is_not_there_is_said_so_with_those_that_are(tmp_path):
    path = write_trace(tmp_path / "t.pfnt", [[("FAULT", records("FAULT", 1, h__vm=7))]])
    with pytest.raises(PfntraceError, match=r"no VM 9 in .*; it has VM 7$") as caught:
        lines(path, Selection(vm=9))
    assert caught.value.exit_code == 1
    with pytest.raises(PfntraceError, match="it has VM 7"):
        write_lifetimes(path, Selection(vm=9), {"csv": tmp_path / "x.csv"})
    assert [file.name for file in tmp_path.iterdir()] == ["t.pfnt"]
    # one that mapped nothing is there all the same
    assert lines(path, Selection(vm=7))[-1].startswith("No mapping lived")
    assert run(path, "--vm", "-1").exit_code == 2


def test_the_history_of_a_page_is_of_the_vm_that_is_chosen(tmp_path):
    # GIVEN a page that VM 1 maps, and that is freed when no VM is known
    made = [
        ("SPTE", records("SPTE", 1, h__vm=1, h__op=wire.OPS.index("install"), pfn=5, level=1)),
        ("PAGE_FREE", records("PAGE_FREE", 1, h__vm=0, pfn=5, d=0)),
        ("FAULT", records("FAULT", 1, h__vm=2, pfn=9)),
    ]
    path = write_trace(tmp_path / "t.pfnt", [made])
    mine, others = ("\n".join(lines(path, Selection(vm=vm, pfns=(5, 5)))) for vm in (1, 2))
    assert "What happened to pfn 0x5: 2 records" in mine and "mapped" in mine
    assert "What happened to pfn 0x5: 1 record, and 1 of other VMs" in others
    assert "mapped" not in others and "freed" in others


def test_a_truncated_trace_is_listed_up_to_its_end_and_says_so(tmp_path):
    path = tmp_path / "cut.pfnt"
    path.write_bytes(TTM.read_bytes()[:-200])
    assert "INCOMPLETE" in lines(path)[0]
    assert "129 lives" in " ".join(lines(path))


# --- what is printed ------------------------------------------------------------------------------


def test_the_verdict_comes_first_then_the_sum_then_lives_in_order_of_birth():
    # GIVEN 129 pages of a TTM buffer, two of them with a count
    told = lines(TTM, limit=3)
    # THEN
    assert told[0] == "nothing lost; complete"
    assert " ".join(told[1:3]).startswith("129 lives of 1 VM; 4K 129; pages uncounted 127, counted")
    born = [line for line in told if re.match(r" +\d+\.\d{6} ", line)]
    assert len(born) == 3 and born == sorted(born)
    assert told[-1] == "... and 126 lives more (--limit, --csv, --parquet)"


@pytest.mark.parametrize("path", sorted(TRACES.glob("*.pfnt")), ids=lambda path: path.stem)
def test_no_line_is_longer_than_80_columns_and_all_of_it_can_be_printed(path):
    told = lines(path, Selection(pfns=(0, 1 << 40)), limit=400)
    assert told and all(len(line) <= 80 and line.isprintable() for line in told)


def test_lives_are_chosen_by_vm_guest_page_host_page_and_slot(tmp_path):
    rows = [(1, 5, 0x105), (1, 6, 0x106), (2, 5, 0x207)]
    sptes = [
        records("SPTE", 1, h__ts=START_NS + at, h__vm=vm, gfn=gfn, pfn=pfn)
        for at, (vm, gfn, pfn) in enumerate(rows, 1)
    ]
    slot = records("SLOT", 1, h__ts=START_NS, h__vm=1, gfn=6, a=1, d=9)

    def found(path, **chosen):
        pattern = r" open +(\d) +0x(\d)"
        told = "\n".join(lines(path, Selection(**chosen)))
        return [(int(vm), int(gfn)) for vm, gfn in re.findall(pattern, told)]

    path = write_trace(tmp_path / "t.pfnt", [[("SPTE", np.concatenate(sptes)), ("SLOT", slot)]])
    assert found(path) == [(1, 5), (1, 6), (2, 5)]
    assert found(path, vm=2) == [(2, 5)]
    assert found(path, gfns=(6, 9)) == [(1, 6)]
    assert found(path, pfns=(0x200, 0x300)) == [(2, 5)]
    assert found(path, slot=9) == [(1, 6)]


def test_a_page_s_history_follows_if_one_asks_for_host_pages():
    # GIVEN the first page of the buffer
    told = lines(TTM, Selection(pfns=(0x22B00, 0x22B00)))
    # THEN its records are told in order of time
    at = told.index("What happened to pfn 0x22b00: 4 records")
    words = [line.split()[1] for line in told[at + 1 :]]
    assert words[0] == "mapped" and "unmapped" in words
    times = [float(line.split()[0]) for line in told[at + 1 :]]
    assert times == sorted(times)


def test_what_is_strange_about_a_life_stands_below_it(tmp_path):
    # GIVEN a life in the shadow MMU, one that was never seen to begin, one of an uncounted page
    rows = [
        records("SPTE", 1, h__ts=START_NS + 1, mmu=2, c=8),
        records("SPTE", 1, h__ts=START_NS + 2, h__op=wire.OPS.index("zap"), gfn=1),
        records("SPTE", 1, h__ts=START_NS + 3, gfn=2, page__refcount=0, page__mapcount=-1),
    ]
    told = lines(write_trace(tmp_path / "t.pfnt", [[("SPTE", np.concatenate(rows))]]))
    text = "\n".join(told)
    assert "shadow MMU" in text and "uncounted" in text
    assert re.search(r"before +\? .*-→2  , zap", text)
    assert "1 began before the trace or unseen" in " ".join(text.split())


# --- what is written ------------------------------------------------------------------------------


def test_parquet_and_csv_hold_the_table_of_lives(tmp_path):
    files = {"parquet": tmp_path / "lives.parquet", "csv": tmp_path / "lives.csv"}
    said = write_lifetimes(TTM, ANY, files)
    assert said[0] == "nothing lost; complete" and said[1].endswith("lives.parquet: 129 rows")
    table = pd.read_parquet(files["parquet"])
    assert tuple(table) == schema.TABLES["lives"].names
    assert set(table["page_class"]) == {"uncounted", "counted"}
    assert len(pd.read_csv(files["csv"])) == 129


def test_the_command_prints_or_writes(tmp_path):
    printed = run(TTM, "--limit", "1")
    assert printed.exit_code == 0 and "... and 128 lives more" in printed.output
    output = tmp_path / "x.csv"
    written = run(TTM, "--gfn", "0x10000-0x10003", "--csv", output)
    assert written.exit_code == 0 and "4 rows" in written.output
    assert len(pd.read_csv(output)) == 4
