"""Figures: what is handed to them, and what stands in them; not a pixel is compared."""

import re
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from unit.made import events, faults, sptes, write

from analysis.figures import grid, latency, lifetimes, mapped, refcount, style, timeline
from analysis.lifecolumns import NEVER, LifeColumns
from analysis.pagehistory import HAPPENINGS, PageHistory
from analysis.pages import PAGE_CLASSES
from analysis.plot import KINDS, figures, plot_trace
from analysis.reading import read
from analysis.reportdata import report_of
from probes.errors import OutputError, TraceFormatError, UsageError

TRACES = Path(__file__).parent / "traces"
START = 1_000_000_000
CONTEXT = style.Context(START, START + 10_000_000_000, "Linux 6.12: a command")
COUNTED, UNCOUNTED = PAGE_CLASSES.index("counted"), PAGE_CLASSES.index("uncounted")
EVIL = "\x1b[2J\u202e</text><script>alert(1)</script>$\\frac{1}{2}$ \U0001f600\n" + "x" * 500


def lives(*rows, **columns):
    """Return lives of VM 1: (gfn, birth, death) in s after the start, None for not seen."""
    count = len(rows)
    defaults = {"vm": 1, "as_id": 0, "level": 1, "page_class": COUNTED, "pages": 1, "pfn": None}
    made = {name: columns.get(name, default) for name, default in defaults.items()}
    gfn = np.array([row[0] for row in rows], np.uint64)
    birth = [0 if row[1] is None else START + int(row[1] * 1e9) for row in rows]
    death = [NEVER if row[2] is None else START + int(row[2] * 1e9) for row in rows]
    types = {"vm": "u4", "as_id": "u1", "level": "u1", "page_class": "u1", "pages": "u4"}
    arrays = {
        name: np.broadcast_to(np.array(made[name], kind), count).copy()
        for name, kind in types.items()
    }
    pfn = gfn + np.uint64(0x1000) if made["pfn"] is None else np.array(made["pfn"], np.uint64)
    return LifeColumns(
        **arrays, gfn=gfn, pfn=pfn, birth=np.array(birth, np.uint64),
        death=np.array(death, np.uint64),
    )  # fmt: skip


def words(figure):
    """Return all text of a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(Text))


def drawn(module, data, context=CONTEXT):
    with style.style():
        return module.draw(data, context)


# --- what is mapped -------------------------------------------------------------------------------


def test_curves_have_every_change_if_there_are_few():
    # GIVEN a page from 1 to 3 s, one from 2 to 4 s, a large one that stays
    some = lives((1, 1, 3), (2, 2, 4), (0x200, 2, None), level=[1, 1, 2], pages=[1, 1, 512])
    # WHEN
    data = mapped.mapped_data(some, CONTEXT)
    # THEN
    assert [(ts - START) // 10**9 for ts in data.moments.tolist()] == [1, 2, 3, 4, 10]
    curves = {one.label: (one.lives.tolist(), one.pages.tolist()) for one in data.series}
    assert curves == {
        "2M counted": ([0, 1, 1, 1, 1], [0, 512, 512, 512, 512]),
        "4K counted": ([1, 2, 1, 0, 0], [1, 2, 1, 0, 0]),
    }
    assert (data.peak_lives, data.peak_pages, data.sampled) == (3, 514, False)


def test_the_peak_is_exact_even_between_the_moments_that_are_shown():
    # GIVEN 5000 pages, each gone a microsecond after it came, and two at once for a nanosecond
    rows = [(gfn, 1 + gfn * 1e-3, 1 + gfn * 1e-3 + 1e-6) for gfn in range(5000)]
    rows.append((9999, 3.0000001, 3.0000002))
    # WHEN
    data = mapped.mapped_data(lives(*rows), CONTEXT)
    # THEN
    assert data.sampled and len(data.moments) == mapped.MOMENTS_MAX
    assert data.peak_lives == 2
    figure = drawn(mapped, data)
    assert "at most 2 at once" in words(figure)
    assert re.search(r"800 moments, \S+ ms apart", words(figure))


def test_what_was_mapped_before_is_shown_from_the_beginning_and_said():
    data = mapped.mapped_data(lives((1, None, 2), (2, 1, None)), CONTEXT)
    assert data.series[0].lives.tolist() == [1, 2, 1, 1]
    assert "1 were mapped before their first record" in words(drawn(mapped, data))


def test_a_page_that_moves_does_not_count_twice_at_that_moment():
    # GIVEN a page change in place: one life ends when the next begins
    data = mapped.mapped_data(lives((1, 1, 2), (1, 2, 3)), CONTEXT)
    assert data.peak_lives == 1


# --- guest frames through time --------------------------------------------------------------------


def test_parts_of_guest_memory_have_a_panel_each():
    # GIVEN memory at 0 and far above, and a second VM
    some = lives((1, 1, 2), (0x100000, 1, 2), (1, 1, 2), vm=[1, 1, 2])
    data = timeline.timeline_data(some, CONTEXT)
    assert [(p.vm, p.first, p.last) for p in data.panels] == [
        (1, 1, 1),
        (1, 0x100000, 0x100000),
        (2, 1, 1),
    ]
    text = words(drawn(timeline, data))
    assert "VM 2, gfn 0x1 to 0x1 (4 KiB): 1 mapping" in text
    assert "seconds since the recording began" in text


def test_uncounted_memory_has_a_panel_before_larger_parts():
    # GIVEN five parts of which the smallest has a page that nobody counts
    rows = [(at << 20, 1, 2) for at in range(5) for _ in range(9 - at)]
    classes = [UNCOUNTED if gfn == 4 << 20 else COUNTED for gfn, _, _ in rows]
    data = timeline.timeline_data(lives(*rows, page_class=classes), CONTEXT)
    # THEN
    assert [p.first >> 20 for p in data.panels] == [0, 1, 4]
    assert (data.left_out, data.parts) == (7 + 6, 5)
    assert "13 mappings in 2 other parts" in words(drawn(timeline, data))


def test_a_range_that_is_asked_for_is_shown_alone():
    some = lives((1, 1, 2), (5, 1, 2), (0x200, 1, 2), pages=[1, 1, 512], level=[1, 1, 2])
    data = timeline.timeline_data(some, CONTEXT, (4, 0x2FF))
    (panel,) = data.panels
    assert (panel.first, panel.last, len(panel.lives)) == (5, 0x2FF, 2)
    assert timeline.timeline_data(some, CONTEXT, (0x900, 0x9FF)).panels == ()


def test_few_lives_are_bars_with_their_own_corners():
    data = timeline.timeline_data(lives((7, 1, 2.5)), CONTEXT)
    (axes,) = drawn(timeline, data).axes
    (bars,) = axes.collections
    corners = bars.get_paths()[0].vertices
    assert corners[:, 0].min() == pytest.approx(1.0) and corners[:, 0].max() == pytest.approx(2.5)
    assert 6.5 < corners[:, 1].min() < 7 < corners[:, 1].max() < 7.5


def test_many_lives_are_cells_and_the_exception_is_seen():
    # GIVEN 4096 pages that live from 1 to 9 s, one of which nobody counts
    rows = [(gfn, 1, 9) for gfn in range(4096)]
    classes = [UNCOUNTED if gfn == 1000 else COUNTED for gfn in range(4096)]
    data = timeline.timeline_data(lives(*rows, page_class=classes), CONTEXT)
    # THEN its cell shows that
    (panel,) = data.panels
    assert panel.cells is not None and panel.row_pages == 16
    assert (panel.cells == COUNTED).sum() > 200_000
    assert set(panel.cells[1000 // 16].tolist()) == {UNCOUNTED}
    assert (panel.cells == UNCOUNTED).sum() == grid.COLUMNS_MAX
    text = words(drawn(timeline, data))
    assert "16 guest frames high" in text and "uncounted" in text and "guest frame\n" in text


def test_cells_are_painted_when_and_where_the_page_was_mapped():
    # GIVEN one large leaf in the first half and a small one in the last quarter
    rows = [(0, 0, 5), (4095, 7.5, 10)]
    some = lives(*rows, pages=[512, 1], level=[2, 1])
    cells, _ = grid.paint(some, (0, 4095), 16, (START, START + 10_000_000_000))
    painted = cells != grid.EMPTY
    rows_of_leaf = 512 // 16
    assert painted[:rows_of_leaf, :399].all() and not painted[:rows_of_leaf, 402:].any()
    assert painted[-1, 602:].all() and not painted[-1, :598].any()
    assert not painted[rows_of_leaf:-1].any()


def test_a_cell_is_as_dark_as_it_was_mapped():
    # GIVEN a grid of rows of 10 frames, and 5 of the first row mapped for the first half
    some = lives(*[(gfn, 0, 5) for gfn in range(5)])
    cells, share = grid.paint(some, (0, 99), 10, (START, START + 10_000_000_000))
    # THEN
    assert share[0, :400].tolist() == pytest.approx([0.5] * 400)
    assert not share[0, 400:].any() and not share[1:].any()
    assert (cells[0, :400] == COUNTED).all() and (cells[1:] == grid.EMPTY).all()


def test_large_leaves_are_painted_in_pieces_as_at_once(monkeypatch):
    # GIVEN leaves that each meet every row
    rows = [(0, at, at + 3) for at in range(7)]
    some = lives(*rows, pages=512, level=2)
    at_once = grid.paint(some, (0, 511), 2, (START, START + 10_000_000_000))
    # WHEN no more than one of them is painted at a time
    monkeypatch.setattr(grid, "_STEP", 1)
    pieces = grid.paint(some, (0, 511), 2, (START, START + 10_000_000_000))
    # THEN
    assert (at_once[0] == pieces[0]).all() and at_once[1] == pytest.approx(pieces[1])
    assert (at_once[0] == COUNTED)[:, :719].all()


# --- how long mappings live -----------------------------------------------------------------------


def test_lifetimes_are_counted_by_length_and_class():
    # GIVEN lives of 1 ms, 1 s and 1 s, and two that were seen in part
    some = lives(
        (1, 1, 1.001), (2, 1, 2), (3, 1, 2), (4, None, 3), (5, 4, None),
        page_class=[COUNTED, COUNTED, UNCOUNTED, COUNTED, COUNTED],
    )  # fmt: skip
    data = lifetimes.lifetimes_data(some, CONTEXT)
    # THEN
    assert [(g.label, g.count) for g in data.groups] == [("4K counted", 2), ("4K uncounted", 1)]
    assert int(data.open_ended.sum()) == 2
    assert data.groups[1].median_ns == 10**9
    text = words(drawn(lifetimes, data))
    assert "4K uncounted: 1, median 1.00 s" in text
    assert "seen in part: 2, at least so long" in text and "logarithmic" in text


def test_a_life_of_no_length_is_still_a_life():
    data = lifetimes.lifetimes_data(lives((1, 2, 2)), CONTEXT)
    assert data.groups[0].count == 1
    assert "4K counted: 1" in words(drawn(lifetimes, data))


# --- reference count ------------------------------------------------------------------------------


def history(*records, pfn=0x1001):
    """Return the history of a page: (what, second, count)."""
    return PageHistory(
        pfn=pfn,
        ts=np.array([START + int(s * 1e9) for _, s, _ in records], np.uint64),
        what=np.array([HAPPENINGS.index(what) for what, _, _ in records], np.int8),
        count=np.array([count for _, _, count in records], np.int64),
        gfn=np.zeros(len(records), np.uint64),
        other=np.zeros(len(records), bool),
    )


def test_a_page_s_records_are_marked_and_its_mappings_shaded():
    # GIVEN a page that was mapped twice, at once at two places, then freed
    told = history(
        ("fault-in", 1, 3), ("install", 1.1, 3), ("fault end", 1.2, 2), ("zap", 3, 1),
        ("freed", 4, 0),
    )  # fmt: skip
    some = lives((1, 1.1, 3), (9, 2, 2.5), (5, 5, 6), pfn=[0x1001, 0x1001, 0x7777])
    # WHEN
    data = refcount.refcount_data(told, some, CONTEXT)
    figure = drawn(refcount, data)
    # THEN
    assert data.spans == ((START + 1_100_000_000, START + 3_000_000_000),)
    assert (data.gfns, data.mappings) == ((1, 9), 2)
    above, below = figure.axes
    labels = {line.get_label(): line.get_ydata().tolist() for line in above.lines}
    assert labels["installed"] == [3] and labels["zapped"] == [1] and labels["freed"] == [0]
    text = words(figure)
    assert "mapped 2 times, at gfn 0x1, 0x9" in text and "_refcount" in text
    assert [t.get_text() for t in below.get_xticklabels()][-1] == "4.000000 freed"


def test_the_line_breaks_where_the_page_was_free():
    told = history(("install", 1, 2), ("freed", 2, 0), ("allocated", 3, 1), ("install", 4, 2))
    figure = drawn(refcount, refcount.refcount_data(told, lives(), CONTEXT))
    steps = [line for line in figure.axes[0].lines if line.get_drawstyle() == "steps-post"]
    assert [line.get_ydata().tolist() for line in steps] == [[2, 0], [1, 2]]


def test_too_many_records_become_a_band_of_least_and_greatest():
    many = [("fault-in", 1 + at * 1e-4, 1 + (at == 12_345) * 40) for at in range(30_000)]
    figure = drawn(refcount, refcount.refcount_data(history(*many), lives(), CONTEXT))
    (axes,) = figure.axes
    band = np.concatenate([path.vertices for c in axes.collections for path in c.get_paths()])
    assert (band[:, 1].min(), band[:, 1].max()) == (1, 41)
    assert "least and the greatest count in each of 1,200 moments" in words(figure)


def test_the_page_to_show_is_one_that_nobody_counts_else_the_most_mapped():
    assert refcount.interesting_page(lives()) is None
    some = lives((1, 1, 2), (2, 1, 2), (3, 1, 2), pfn=[7, 7, 8])
    assert refcount.interesting_page(some) == (
        7,
        "chosen because no page was mapped more often (mapped 2 times)",
    )
    some = lives((1, 1, 2), (2, 1, 2), (3, 1, 2), pfn=[7, 7, 8], page_class=[6, 6, UNCOUNTED])
    assert refcount.interesting_page(some) == (
        8,
        "chosen because nobody counts it (mapped once)",
    )


def test_on_6_12_the_page_that_made_the_fault_fail_is_shown():
    reading = read(TRACES / "ttm-6.12.pfnt", lives=True, check=False)
    with style.style():
        ((_, figure),) = figures(reading, report_of(reading), ["refcount"])
    text = words(figure)
    assert "Reference count of pfn 0x1981" in text
    assert "never mapped into a guest" in text and "chosen because faults failed on it" in text


# --- how long faults take -------------------------------------------------------------------------


def test_latencies_are_those_of_the_report():
    reading = read(TRACES / "ttm-7.3.pfnt", lives=True, check=False)
    report = report_of(reading)
    data = latency.latency_data(report.stages)
    assert data.rows == report.stages
    text = words(drawn(latency, data))
    assert "PFNMAP, whole fault (128)" in text and "hva_to_pfn (128)" in text
    assert "GUP, whole fault (1)" in text


# --- all of them, from files ----------------------------------------------------------------------


def test_every_kind_is_drawn_of_real_traces(tmp_path):
    for name in ("ttm-6.1", "ttm-6.12", "ttm-7.3"):
        paths = plot_trace(TRACES / f"{name}.pfnt", tmp_path / name)
        assert [path.name for path in paths] == [f"{kind}.png" for kind in KINDS]
        assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


def test_of_an_empty_trace_every_figure_says_that_there_is_nothing(tmp_path):
    reading = read(write(tmp_path / "t.pfnt"), lives=True, check=False)
    with style.style():
        said = {kind: words(f) for kind, f in figures(reading, report_of(reading), list(KINDS))}
    for kind in ("mapped", "timeline", "lifetimes"):
        assert "nothing was mapped" in said[kind]
    # no page of a number that nobody chose
    assert "pfn 0x" not in said["refcount"] and "nothing was mapped" in said["refcount"]
    assert "no faults" in said["latency"]


def test_an_empty_figure_has_no_axes_that_would_mean_nothing(tmp_path):
    path = write(tmp_path / "t.pfnt", sptes(3, "install"))
    reading = read(path, lives=True, check=False)
    with style.style():
        report = report_of(reading)
        drawn_ = figures(reading, report, ["timeline", "refcount"], gfns=(900, 901), pfn=0x99)
        for _, figure in drawn_:
            assert not figure.axes
            assert "nothing to draw: " in words(figure)


def test_a_line_at_the_lowest_guest_frame_is_not_hidden_by_the_axis():
    # GIVEN two pages that are far apart in a panel of 1500 guest frames
    data = timeline.timeline_data(lives((100, 1, 2), (1600, 1, 2)), CONTEXT)
    low, high = drawn(timeline, data).axes[0].get_ylim()
    # THEN both have room for a line of 1.5 points
    assert low < 100 - 15 and high > 1600 + 15


def test_an_option_of_a_figure_that_is_not_drawn_is_refused(tmp_path):
    path = write(tmp_path / "t.pfnt", sptes(3, "install"))
    with pytest.raises(UsageError, match="--pfn is for the figure refcount; add --kind refcount"):
        plot_trace(path, tmp_path / "d", ["timeline"], pfn=0x1000)
    with pytest.raises(UsageError, match="--gfn is for the figure timeline"):
        plot_trace(path, tmp_path / "d", ["refcount"], gfns=(1, 2))
    assert not (tmp_path / "d").exists()


def test_a_cut_trace_and_a_lossy_one_say_so_in_every_figure(tmp_path):
    made = (faults(9), sptes(9, "install"))
    cut = write(tmp_path / "cut.pfnt", *made, complete=False)
    lossy = write(tmp_path / "lossy.pfnt", *made, losses={"FAULT": [(12, 3, 0, 0)]})
    for path, said in ((cut, "INCOMPLETE: no end mark"), (lossy, "LOST 3 of 21 records")):
        reading = read(path, lives=True, check=False)
        with style.style():
            for kind, figure in figures(reading, report_of(reading), list(KINDS)):
                assert said in words(figure), (path, kind)


def test_the_same_trace_gives_the_same_bytes(tmp_path):
    trace = TRACES / "ttm-7.3.pfnt"
    for form in ("png", "svg"):
        kinds = ("timeline", "refcount")
        first = plot_trace(trace, tmp_path / "a", kinds, form=form)
        second = plot_trace(trace, tmp_path / "b", kinds, form=form)
        for one, other in zip(first, second, strict=True):
            assert one.read_bytes() == other.read_bytes(), one.name


def test_hostile_words_stay_words(tmp_path):
    # GIVEN a command and a kernel that want to be markup, mathematics and a terminal's commands
    path = write(
        tmp_path / "t.pfnt", faults(3), sptes(3, "install"), command=("pfntrace", EVIL),
        facts='{"release": "</svg><img src=x>"}',
    )  # fmt: skip
    # WHEN THEN nothing warns (that would be an error here), and all is escaped
    for file in plot_trace(path, tmp_path / "out", form="svg"):
        text = file.read_text()
        assert "<script" not in text and "<img" not in text and "\x1b" not in text
        assert "&lt;/svg&gt;" in text and "\\x1b[2J" in text


def test_impossible_values_break_nothing(tmp_path):
    random = np.random.default_rng(11)
    noise = sptes(300, "install")
    for name in ("gfn", "pfn", "a", "b", "c"):
        noise[name] = random.integers(0, 1 << 64, 300, np.uint64)
    noise["level"] = random.integers(0, 256, 300)
    noise["h"]["op"] = random.integers(0, 16, 300)
    noise["h"]["ts"] = np.sort(random.integers(0, 1 << 64, 300, np.uint64))
    path = write(tmp_path / "t.pfnt", noise)
    assert len(plot_trace(path, tmp_path / "out")) == len(KINDS)


def test_what_does_not_exist_is_a_usage_error_before_anything_is_read(tmp_path):
    none = tmp_path / "no such trace"
    with pytest.raises(UsageError, match="no figure 'pie'; there are mapped timeline"):
        plot_trace(none, tmp_path, ["pie"])
    with pytest.raises(UsageError, match="say png or svg"):
        plot_trace(none, tmp_path, form="gif")
    with pytest.raises(UsageError, match="below 2\\^52"):
        plot_trace(none, tmp_path, pfn=1 << 60)


def test_files_are_not_overwritten_unasked(tmp_path):
    trace = TRACES / "ttm-7.3.pfnt"
    (tmp_path / "mapped.png").write_text("mine")
    with pytest.raises(OutputError, match=r"mapped\.png exists already"):
        plot_trace(trace, tmp_path, ["lifetimes", "mapped"])
    assert not (tmp_path / "lifetimes.png").exists()
    plot_trace(trace, tmp_path, ["mapped"], overwrite=True)
    assert (tmp_path / "mapped.png").read_bytes().startswith(b"\x89PNG")


def test_a_place_that_cannot_be_a_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(OutputError) as caught:
            plot_trace(TRACES / "ttm-7.3.pfnt", place)
        assert "\n" not in str(caught.value)


def test_a_file_that_is_no_trace_leaves_nothing_behind(tmp_path):
    (tmp_path / "no.pfnt").write_bytes(b"\xff" * 100)
    with pytest.raises(TraceFormatError):
        plot_trace(tmp_path / "no.pfnt", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_two_vms_and_large_leaves_are_named(tmp_path):
    made = sptes(4, "install", level=2)
    made["h"]["vm"] = (1, 1, 2, 2)
    path = write(tmp_path / "t.pfnt", events("VM", 1, "create"), made)
    reading = read(path, lives=True, check=False)
    with style.style():
        said = {kind: words(f) for kind, f in figures(reading, report_of(reading), list(KINDS))}
    assert "2M counted" in said["mapped"] and "8 MiB" in said["mapped"]
    assert "VM 1, gfn 0x0 to 0x3ff (4 MiB)" in said["timeline"]
    assert "VM 2, gfn 0x400 to 0x7ff (4 MiB)" in said["timeline"]
