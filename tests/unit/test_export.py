"""Export: tables say the same as the trace, and nothing is overwritten unasked."""

import csv
import json
import os
from pathlib import Path

import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from unit.records import group, meta, records, rows_of, write_trace

from analysis import export as exporting
from analysis.export import arrow_table_schema, export
from analysis.lifelist import Selection, write_lifetimes
from analysis.lives import lives_of
from analysis.outfile import new_file
from analysis.plot import plot_trace
from analysis.report import write_report
from analysis.schema import KINDS_OF_TABLE, TABLES
from probes.errors import OutputError, TraceFormatError, UsageError
from tracer import schema
from tracer.tracefile import TraceReader, TraceWriter

TRACES = Path(__file__).parent / "traces"
TTM = TRACES / "ttm-6.12.pfnt"


def trace_of_everything(tmp_path):
    path = tmp_path / "x.pfnt"
    writer = TraceWriter(path, meta())
    writer.write_note({"slot": {"vm": 1}, "path": 'a,"b"\nc'})
    writer.write_losses({"FAULT": [(7, 2, 0, 0)]})
    writer.write_group(group(0, kinds=schema.RECORD_KINDS))
    writer.write_group(group(1, kinds=schema.RECORD_KINDS))
    writer.close({"lost": 2, "produced": 102})
    return path


# --- what is refused ------------------------------------------------------------------------------


def test_a_format_or_a_table_that_does_not_exist_is_refused_with_those_that_do(tmp_path):
    with pytest.raises(UsageError, match="parquet, csv, perfetto"):
        export(TTM, "json", tmp_path / "x")
    with pytest.raises(UsageError, match="faults sptes"):
        export(TTM, "csv", tmp_path / "x", ["fault"])
    with pytest.raises(UsageError, match="one file"):
        export(TTM, "perfetto", tmp_path / "x", ["faults"])
    assert not list(tmp_path.iterdir())


def test_what_is_no_trace_is_refused_and_leaves_nothing(tmp_path):
    bad = tmp_path / "bad.pfnt"
    bad.write_bytes(b"ARROW1")
    for form in exporting.FORMATS:
        with pytest.raises(TraceFormatError):
            export(bad, form, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [bad]


def test_nothing_is_overwritten_unless_asked(tmp_path):
    out = tmp_path / "faults.csv"
    out.write_text("precious")
    with pytest.raises(OutputError, match="--force"):
        export(TTM, "csv", out, ["faults"])
    assert out.read_text() == "precious"
    export(TTM, "csv", out, ["faults"], overwrite=True)
    assert out.read_text().startswith('"ts"')


def test_a_folder_with_one_of_the_files_is_refused_before_any_is_made(tmp_path):
    folder = tmp_path / "tables"
    folder.mkdir()
    (folder / "vms.csv").write_text("precious")
    with pytest.raises(OutputError, match=r"vms\.csv"):
        export(TTM, "csv", folder, ["faults", "vms"])
    assert [p.name for p in folder.iterdir()] == ["vms.csv"]


def test_places_that_cannot_be_are_said_so(tmp_path):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OutputError, match="name a folder"):
        export(TTM, "csv", file, ["faults", "vms"])
    with pytest.raises(OutputError, match="is a folder"):
        export(TTM, "csv", tmp_path, ["faults"], overwrite=True)
    with pytest.raises(OutputError, match="is not a folder"):
        export(TTM, "csv", tmp_path / "no" / "x.csv", ["faults"])
    with pytest.raises(OutputError, match="cannot be made"):
        export(TTM, "csv", tmp_path / "no" / "x", ["faults", "vms"])
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OutputError, match="not an ordinary file"):
        export(TTM, "csv", tmp_path / "fifo", ["faults"], overwrite=True)


def test_a_failure_in_the_middle_leaves_what_was_there(tmp_path, monkeypatch):
    out = tmp_path / "faults.parquet"
    out.write_text("precious")

    def fails(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "_gathered", fails)
    with pytest.raises(OutputError, match="No space left"):
        export(TTM, "parquet", out, ["faults"], overwrite=True)
    assert out.read_text() == "precious" and len(list(tmp_path.iterdir())) == 1


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path):
    out = tmp_path / "x.csv"
    with pytest.raises(OutputError, match="exists already"), new_file(out, TTM) as unfinished:
        unfinished.write_text("ours")
        out.write_text("theirs")
    assert out.read_text() == "theirs" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("link", [None, os.symlink, os.link])
def test_force_never_writes_over_the_trace_that_is_read(tmp_path, link):
    # GIVEN a trace, and a name for it
    path = trace_of_everything(tmp_path)
    name = path if link is None else tmp_path / "other"
    if link is not None:
        link(path, name)
    before = path.read_bytes()
    # WHEN each command that writes a file is told to write there
    writers = [
        lambda: export(path, "csv", name, ["lives"], overwrite=True),
        lambda: export(path, "parquet", name, ["faults"], overwrite=True),
        lambda: export(path, "perfetto", name, overwrite=True),
        lambda: write_lifetimes(path, Selection(), {"csv": name}, overwrite=True),
        lambda: write_report(path, name, overwrite=True),
    ]
    # THEN it says what that is, and the trace stays
    for write in writers:
        with pytest.raises(OutputError, match=f"{name} is the trace that is read; name another"):
            write()
    assert path.read_bytes() == before and name.samefile(path)


def test_a_figure_is_not_drawn_over_the_trace_that_is_read(tmp_path):
    path = trace_of_everything(tmp_path).rename(tmp_path / "mapped.png")
    with pytest.raises(OutputError, match=r"mapped\.png is the trace that is read"):
        plot_trace(path, tmp_path, ["mapped"], overwrite=True)
    assert export(path, "csv", tmp_path / "x.csv", ["vms"])[0][0].rows


def test_a_link_laid_in_the_way_is_not_followed(tmp_path):
    out, victim = tmp_path / "x.csv", tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / f".x.csv.{os.getpid()}.part").symlink_to(victim)
    with new_file(out, TTM) as unfinished:
        unfinished.write_text("ours")
    assert (out.read_text(), victim.read_text()) == ("ours", "precious")


# --- the tables -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS_OF_TABLE)
def test_a_table_of_records_has_what_the_reader_gives(tmp_path, name):
    path = trace_of_everything(tmp_path)
    out = tmp_path / f"{name}.parquet"
    (made,), info = export(path, "parquet", out, [name])
    with TraceReader(path) as reader:
        expected = rows_of(reader.records(KINDS_OF_TABLE[name], TABLES[name].names))
    table = pq.read_table(out)
    assert table.to_pylist() == expected and made.rows == len(expected)
    assert tuple(table.column_names) == TABLES[name].names
    assert len(expected) or name == "vmas", "a table without rows shows nothing"
    assert info["lost"] == 2


def test_a_parquet_file_says_what_the_trace_lost(tmp_path):
    out = tmp_path / "faults.parquet"
    export(trace_of_everything(tmp_path), "parquet", out, ["faults"])
    said = json.loads(pq.read_schema(out).metadata[b"pfntrace"])
    assert (said["lost"], said["complete"], said["generation"]) == (2, True, "G0b")


def test_csv_has_the_same_cells_quoted_as_they_must_be(tmp_path):
    path = trace_of_everything(tmp_path)
    for name in ("faults", "notes"):
        out = tmp_path / f"{name}.csv"
        export(path, "csv", out, [name])
        with TraceReader(path) as reader:
            expected = rows_of(reader.records(KINDS_OF_TABLE[name], TABLES[name].names))
        with out.open(newline="") as file:
            found = list(csv.DictReader(file))
        as_text = [{k: _cell(v) for k, v in row.items()} for row in expected]
        assert found == as_text


def _cell(value):
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)


def test_without_names_all_tables_go_into_a_folder(tmp_path):
    folder = tmp_path / "tables"
    made, _ = export(TTM, "parquet", folder)
    assert {file.path.name for file in made} == {f"{name}.parquet" for name in TABLES}
    for file in made:
        table = pq.read_table(file.path)
        name = file.path.stem
        assert len(table) == file.rows
        assert table.schema.equals(arrow_table_schema(name)), name


def test_lives_are_those_of_the_analysis(tmp_path):
    path = write_trace(tmp_path / "x.pfnt", [group(n, 200, ["SPTE"]) for n in range(3)])
    out = tmp_path / "lives.parquet"
    export(path, "parquet", out, ["lives"])
    expected = lives_of(path)
    found = pd.read_parquet(out, dtype_backend="numpy_nullable").sort_values("life_id")
    assert len(found) == len(expected) > 100
    for name in ("life_id", "gfn", "pfn", "birth_ts", "death_ts", "spte_last"):
        assert found[name].tolist() == expected[name].tolist(), name
    assert found["ended_by"].tolist() == expected["ended_by"].tolist()


def test_other_programs_open_it_with_64_bits_whole(tmp_path):
    out = tmp_path / "faults.parquet"
    big = 2**64 - 1
    path = write_trace(tmp_path / "x.pfnt", [[("FAULT", records("FAULT", 3, gfn=big, addr=big))]])
    export(path, "parquet", out, ["faults"])
    assert pl.read_parquet(out)["gfn"].to_list() == [big] * 3
    export(path, "csv", tmp_path / "f.csv", ["faults"])
    assert pl.read_csv(tmp_path / "f.csv", infer_schema=False)["gfn"].to_list() == [str(big)] * 3


def test_pieces_are_gathered_and_nothing_is_held_longer(tmp_path, monkeypatch):
    # GIVEN 40 flushes of 50 faults, and row groups of about 200
    monkeypatch.setattr(exporting, "_ROWS_AT_ONCE", 200)
    monkeypatch.setattr("tracer.timeorder._ROWS_WANTED", 50)
    path = write_trace(tmp_path / "x.pfnt", [group(n, 50, ["FAULT"]) for n in range(40)])
    out = tmp_path / "faults.parquet"
    export(path, "parquet", out, ["faults"])
    groups = pq.ParquetFile(out).metadata
    sizes = [groups.row_group(at).num_rows for at in range(groups.num_row_groups)]
    assert sum(sizes) == 2000 and max(sizes) <= 300 and len(sizes) >= 6


def test_progress_ends_at_the_end(tmp_path):
    seen = []
    export(TTM, "csv", tmp_path / "t", ["faults", "sptes"], progress=lambda *at: seen.append(at))
    assert seen[-1][0] == seen[-1][1] > 0
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_a_cut_trace_is_exported_to_its_end_and_says_so(tmp_path):
    path = write_trace(tmp_path / "x.pfnt", [group(n) for n in range(8)])
    os.truncate(path, path.stat().st_size // 2)
    (made,), info = export(path, "parquet", tmp_path / "f.parquet", ["faults"])
    assert 0 < made.rows < 40 and not info["complete"]
    said = json.loads(pq.read_schema(made.path).metadata[b"pfntrace"])
    assert said["reason"].startswith("truncated")


def test_a_trace_damaged_inside_says_so_in_the_first_table_too(tmp_path):
    path = write_trace(tmp_path / "x.pfnt", [group(n) for n in range(8)])
    with TraceReader(path) as reader:
        block = reader.blocks()[6]
    data = bytearray(path.read_bytes())
    data[block.end - 9] ^= 0xFF
    path.write_bytes(data)
    export(path, "parquet", tmp_path / "v.parquet", ["vms"])
    said = json.loads(pq.read_schema(tmp_path / "v.parquet").metadata[b"pfntrace"])
    assert said["reason"].startswith(f"damaged at byte {block.offset}")
