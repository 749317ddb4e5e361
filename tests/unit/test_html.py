"""The page of a report: one file, well formed, nothing fetched, nothing of a trace unescaped."""

import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from unit.made import ERR_FAULT, faults, sptes, write

from analysis.document import Document, Entry, Facts, Section, Sentence, Table
from analysis.findings import Finding, Innocent, Unanswerable
from analysis.html import FIGURE_PLACES, ROWS_MAX, page
from analysis.plot import KINDS
from analysis.reading import read
from analysis.report import as_json, write_report
from analysis.reportdata import report_of
from analysis.text import document_lines
from analysis.wording import document
from probes.errors import OutputError, TraceFormatError

TRACES = Path(__file__).parent / "traces"
EVIL = "\x1b[2J\u202e</style></title><script>alert(1)</script><img src=x onerror=y>\"'&\n\ud800"
#: Elements without an end.
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Checked(HTMLParser):
    """Reads a page; fails if elements do not nest."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.ids: list[str | None] = []
        self.feed(text)
        self.close()
        assert self.open == [], "elements without an end"

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style",):
            self.words.append(data)

    def text(self):
        return " ".join(" ".join(self.words).split())


def checked(text):
    """Read a page, and make sure that it fetches and runs nothing."""
    found = Checked(text)
    assert text.startswith("<!DOCTYPE html>")
    for tag, attributes in found.elements:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form", "img")
        assert not [name for name in attributes if name.startswith("on")], tag
        for name in ("href", "xlink:href", "src"):
            where = attributes.get(name) or "#"
            assert where.startswith(("#", "data:image/png;base64,")), where
    assert not re.search(r"url\((?!#)", text) and "@import" not in text
    assert len(found.ids) == len(set(found.ids)), "an id names one element"
    links = [(a["href"] or "#")[1:] for tag, a in found.elements if tag == "a"]
    assert set(links) <= set(found.ids)
    return found


def written(trace, tmp_path):
    """Return the page of a trace."""
    out = tmp_path / "page.html"
    assert write_report(trace, out, overwrite=True) == []
    return out.read_text(encoding="utf-8")


def some_document(*blocks, **changes):
    values = {"title": "t", "verdict": "v", "tone": "good", "reservations": (), "numbers": ()}
    return Document(**(values | changes), sections=(Section("one", "One", blocks),))


# --- what must not get through --------------------------------------------------------------------


def test_every_string_of_a_document_is_escaped():
    evil = "<script>\"'&"
    blocks = (
        Table((evil,), ((evil,),), "l"),
        Sentence(evil),
        Facts(((evil, evil),)),
        Entry(evil, ((evil, evil),), (evil,), (evil,), "bad"),
    )
    made = some_document(
        *blocks, title=evil, verdict=evil, reservations=(evil,), numbers=((evil, evil),)
    )
    # WHEN
    text = page(made, {})
    # THEN
    assert "<script" not in text
    found = checked(text)
    # all of them are there, as text: title (twice), verdict, reservation, number, and the blocks
    assert found.text().count(evil) == 2 + 1 + 1 + 2 + (2 + 1 + 2 + 5)


def test_a_hostile_trace_makes_a_tame_page(tmp_path):
    # GIVEN markup, control characters and what is no Unicode wherever a trace has text
    made = faults(3, refcounted=0)
    made["ret"][0], made["pfn"][0] = -14, ERR_FAULT
    vma = {"start": 0, "end": 1 << 62, "path": EVIL, "flags": ["pf"]}
    path = write(
        tmp_path / "t.pfnt",
        made,
        sptes(3, "install"),
        notes=[{"slot": {"vm": 1, "slot": 1}, "vmas": [vma]}, {"failed": {"hook": EVIL}}],
        command=("pfntrace", EVIL),
        facts=json.dumps({"release": EVIL}),
        generation=EVIL,
        missing=[{"hook": EVIL, "why": EVIL, "without": EVIL}],
        summary={"why": EVIL, "problem": EVIL},
    )
    # WHEN
    text = written(path, tmp_path)
    # THEN
    found = checked(text)
    assert not [c for c in text if not (c.isprintable() or c == "\n")]
    assert "\\x1b[2J\\u202e</style></title><script>alert(1)</script>" in found.text()


def test_a_policy_forbids_what_should_not_be_there_anyway(tmp_path):
    found = checked(written(TRACES / "ttm-7.3.pfnt", tmp_path))
    metas = [a for tag, a in found.elements if tag == "meta"]
    (policy,) = [m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ") and "script-src" not in policy
    assert {"name": "referrer", "content": "no-referrer"} in metas


# --- what must be there ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ttm-6.1", "ttm-6.12", "ttm-7.3"])
def test_the_page_says_what_the_text_says(tmp_path, name):
    reading = read(TRACES / f"{name}.pfnt")
    made = document(report_of(reading))
    # WHEN
    on_page = checked(written(TRACES / f"{name}.pfnt", tmp_path)).text()
    # THEN every word of the text is there, in that order within a block
    for section in made.sections:
        assert " ".join(section.title.split()) in on_page
        for block in section.blocks:
            if isinstance(block, Sentence):
                assert " ".join(block.text.split()) in on_page
            elif isinstance(block, Entry):
                assert " ".join(block.lead.split()) in on_page
            elif isinstance(block, Table):
                for row in block.rows:
                    assert " ".join(" ".join(row).split()) in on_page


def test_the_colour_of_a_line_is_of_what_it_says(tmp_path):
    # GIVEN a trace that is whole, and a finding in it
    whole = document(with_findings(tmp_path, LEAK))
    lines = re.findall('<p class="verdict ([a-z]+)">([^<]*)<', page(whole, {}))
    # THEN what it is worth and what was found are two lines
    assert lines == [("good", "nothing lost; complete"), ("bad", "1 definite finding")]
    # and of a trace without there is one
    (tmp_path / "other").mkdir()
    nothing = page(document(with_findings(tmp_path / "other")), {})
    assert re.findall('<p class="verdict ([a-z]+)">', nothing) == ["good"]


def test_the_verdict_and_what_cannot_be_seen_come_first(tmp_path):
    path = write(
        tmp_path / "t.pfnt", faults(9), complete=False, losses={"FAULT": [(12, 3, 0, 0)]},
        missing=[{"hook": "walk", "why": "gone", "without": "PFNMAP pages stay unnamed"}],
    )  # fmt: skip
    text = checked(written(path, tmp_path)).text()
    first = ["pfntrace report of t.pfnt", "LOST 3 of 12 records", "INCOMPLETE", "lower bounds",
             "PFNMAP pages stay unnamed", "What ran"]  # fmt: skip
    places = [text.index(words, text.index("pfntrace report of t.pfnt")) for words in first]
    assert places == sorted(places)


def test_every_figure_has_its_place_and_says_what_it_shows(tmp_path):
    assert sorted(kind for kinds in FIGURE_PLACES.values() for kind in kinds) == sorted(KINDS)
    found = checked(written(TRACES / "ttm-7.3.pfnt", tmp_path))
    labels = [a["aria-label"] for tag, a in found.elements if tag == "svg"]
    assert sorted(labels) == sorted(KINDS.values())
    assert {f"figure-{kind}" for kind in KINDS} <= set(found.ids)


def test_the_page_of_an_empty_trace_is_whole(tmp_path):
    text = checked(written(write(tmp_path / "t.pfnt"), tmp_path)).text()
    assert "No guest page fault is in this trace" in text


def test_phones_paper_and_the_dark_are_thought_of(tmp_path):
    text = written(TRACES / "ttm-7.3.pfnt", tmp_path)
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    for rule in ("@media print", "prefers-color-scheme: dark", "@media (max-width:"):
        assert rule in text
    # Figures take the colours of the page, so that they can be read in the dark.
    svgs = "".join(re.findall(r"<svg.*?</svg>", text, re.S))
    assert "var(--ink)" in svgs and "#1a1b1c" not in svgs
    assert set(re.findall(r"var\((--\w+)\)", text)) <= set(re.findall(r"(--\w+):", text))


def test_a_long_table_is_cut_and_the_rest_counted():
    rows = tuple((str(at),) for at in range(ROWS_MAX + 7))
    text = page(some_document(Table(("n",), rows, "r")), {})
    assert text.count("<tr>") == ROWS_MAX + 1
    assert "… and 7 rows more" in checked(text).text()


# --- findings -------------------------------------------------------------------------------------


def with_findings(tmp_path, *findings, unanswerable=()):
    """Return a report of a small trace with findings of our own."""
    reading = read(write(tmp_path / "t.pfnt", faults(3), sptes(3, "install")))
    assert reading.checked is not None
    checked_ = dataclasses.replace(
        reading.checked, findings=findings, unanswerable=unanswerable, detectors=("leak", "uaf")
    )
    return report_of(dataclasses.replace(reading, checked=checked_))


LEAK = Finding(
    detector="leak",
    verdict="definite",
    title="every fault keeps one reference",
    rule="kvm_release_pfn_clean() gives it back",
    count=16384,
    pages=16384,
    vms=(1,),
    slots=(1, 7),
    gfns=((0x100, 0x40FF),),
    pfns=((0x1000, 0x1000), (0x2000, 0x2FFF)),
    more=True,
    first_ts=1_000_000,
    last_ts=3_500_000,
    where="/dev/dri/card0 (VM_PFNMAP)",
    functions=("kvm_faultin_pfn",),
    innocent=(Innocent("the page is in an LRU batch", "no: it stays for 3 s"),),
    evidence=(
        {"kind": "FAULT", "ts": 1_000_000, "vm": 1, "gfn": 0x100, "ret": 5, "result": "fixed"},
        {"kind": "SPTE", "ts": 1_200_000, "vm": 1, "op": "install", "gfn": 0x100, "level": 1},
    ),
    detail={"kept_per_fault": 1},
)


def test_a_finding_has_its_evidence_in_text_and_page(tmp_path):
    report = with_findings(tmp_path, LEAK)
    lines = list(document_lines(document(report)))
    on_page = checked(page(document(report), {})).text()
    for text in (" ".join(" ".join(lines).split()), on_page):
        for said in (
            "DEFINITE leak: every fault keeps one reference",
            "seen 16,384 times on 16,384 pages, from 0.001000 s to 0.003500 s",
            "in VM 1; slot 1, 7; gfn 0x100-0x40ff and more; pfn 0x1000, 0x2000-0x2fff and more",
            "behind /dev/dri/card0 (VM_PFNMAP)",
            "kvm_release_pfn_clean() gives it back",
            "the page is in an LRU batch? no: it stays for 3 s",
            "FAULT gfn=0x100",
            "SPTE install",
        ):
            assert said in text, said
    assert not [line for line in lines if len(line) > 80]
    assert document(report).tone == "bad"


def test_detectors_that_cannot_answer_are_named(tmp_path):
    report = with_findings(
        tmp_path, unanswerable=(Unanswerable("uaf", "hook page_free is missing"),)
    )
    text = " ".join(" ".join(document_lines(document(report))).split())
    assert "Anomalies none, by 1 detector that could answer" in text
    assert "What cannot be answered detector why it cannot answer uaf hook page_free" in text
    data = json.loads(as_json(report))
    assert data["unanswerable"] == [{"detector": "uaf", "reason": "hook page_free is missing"}]


def test_findings_are_the_same_in_json(tmp_path):
    data = json.loads(as_json(with_findings(tmp_path, LEAK)))
    (found,) = data["findings"]
    assert (found["detector"], found["verdict"], found["count"]) == ("leak", "definite", 16384)
    assert found["evidence"][0]["gfn"] == 0x100 and found["gfns"] == [[0x100, 0x40FF]]


def test_a_hostile_finding_is_as_tame_as_the_rest(tmp_path):
    evil = dataclasses.replace(
        LEAK, title=EVIL, where=EVIL, functions=(EVIL,), rule=EVIL, detail={EVIL: EVIL},
        innocent=(Innocent(EVIL, EVIL),),
        evidence=({"kind": "NOTE", "ts": 1, "note": EVIL}, {"kind": EVIL, "ts": None}),
    )  # fmt: skip
    report = with_findings(tmp_path, evil, unanswerable=(Unanswerable(EVIL, EVIL),))
    checked(page(document(report), {}))
    lines = list(document_lines(document(report)))
    assert not [c for line in lines for c in line if not c.isprintable()]


# --- the file -------------------------------------------------------------------------------------


def test_a_page_that_exists_is_not_overwritten_unasked(tmp_path):
    out = tmp_path / "page.html"
    out.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        write_report(TRACES / "ttm-7.3.pfnt", out)
    assert out.read_text() == "mine"
    write_report(TRACES / "ttm-7.3.pfnt", out, overwrite=True)
    assert out.read_text().startswith("<!DOCTYPE html>")


def test_page_and_json_can_be_had_at_once(tmp_path):
    out = tmp_path / "page.html"
    (printed,) = write_report(TRACES / "ttm-7.3.pfnt", out, as_data=True)
    assert json.loads(printed)["complete"] and out.exists()


def test_no_page_is_made_of_what_is_no_trace(tmp_path):
    (tmp_path / "no.pfnt").write_bytes(b"\xff" * 100)
    with pytest.raises(TraceFormatError):
        write_report(tmp_path / "no.pfnt", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()
