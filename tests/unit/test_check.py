"""`pfntrace check`: what it asks, what it prints, and with which exit status."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from unit.records import group, write_trace
from unit.tracekit import SHIPPED, shipped, told

from analysis import detectors
from analysis.chains import fetch
from analysis.check import check_trace, chosen
from analysis.checktext import check_lines, detector_lines
from analysis.findings import EVIDENCE_MAX, VERDICTS, Chain, Finding
from probes.errors import TraceFormatError, UsageError
from tracer.merge import merge
from tracer.schema import RECORD_KINDS, columns_of_kind
from tracer.tracefile import TraceReader

ROOT = Path(__file__).resolve().parents[2]
SANE, SICK = SHIPPED / "ttm-6.12.pfnt", SHIPPED / "double-put-7.3.pfnt"


def run(*arguments):
    """Run the command as a user does; return its status, stdout and stderr."""
    command = [sys.executable, str(ROOT / "pfntrace.py"), "check", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout, done.stderr


# --- the detectors --------------------------------------------------------------------------------


def test_every_detector_has_a_name_of_its_own_a_title_and_columns_that_exist():
    names = [detector.name for detector in detectors.DETECTORS]
    assert len(set(names)) == len(names) >= 9
    for detector in chosen(None):
        assert re.fullmatch(r"[a-z][a-z0-9-]+", detector.name)
        assert detector.title and not detector.title.endswith(".")
        for kind, columns in detector.columns.items():
            assert kind in RECORD_KINDS
            assert not set(columns) - set(columns_of_kind(kind)), detector.name


def test_an_object_of_a_detector_answers_for_one_trace_only():
    # GIVEN two checks in one process WHEN THEN the second is not told of the first one's findings
    first, second = check_trace(SICK), check_trace(SHIPPED / "prime-7.3.pfnt")
    assert first.anomalies and not second.anomalies


def test_detectors_are_asked_in_their_order_and_once():
    assert [d.name for d in chosen(None)] == [d.name for d in detectors.DETECTORS]
    assert [d.name for d in chosen(["pins", "balance", "pins"])] == ["pins", "balance"]


def test_an_unknown_detector_is_a_usage_error_that_names_those_there_are():
    with pytest.raises(UsageError, match=r"no detector 'leeks'; there are .*balance"):
        chosen(["balance", "leeks"])


def test_the_list_says_what_each_looks_for():
    lines = list(detector_lines())
    assert all(len(line) <= 80 for line in lines)
    assert {line.split()[0] for line in lines if not line.startswith(" ")} == {
        detector.name for detector in detectors.DETECTORS
    }


def test_progress_is_told_up_to_all_records():
    seen = []
    check_trace(SANE, progress=lambda done, total: seen.append((done, total)), rows_max=5)
    assert seen == sorted(seen) and seen[-1][0] == seen[-1][1] > 0


# --- evidence -------------------------------------------------------------------------------------


def with_chain(chain):
    return Finding("balance", "definite", "t", "r", 1, chain=chain)


def test_evidence_is_what_was_named_then_the_fault_s_then_the_page_s_nearest_in_time():
    # GIVEN a page that has a long history, and a chain that names one of its last records
    path = SHIPPED / "nested-6.12.pfnt"
    with TraceReader(path) as reader:
        rows = [row for batch in reader.records(["RELEASE"]) for row in batch.to_pylist()]
        row = [row for row in rows if row["fault_ts"] is not None][-1]
        chain = Chain(
            records=(("RELEASE", row["ts"], row["cpu"], row["seq"]),),
            pfns=(row["pfn"],),
            faults=((row["fault_ts"], row["tid"]),),
        )
        # WHEN
        evidence = fetch(reader, [with_chain(chain)])[0].evidence
    # THEN
    assert (row["ts"], row["seq"]) in [(found["ts"], found["seq"]) for found in evidence]
    inside = [found for found in evidence if found["fault_ts"] == row["fault_ts"]]
    assert {"FAULT", "SPTE", "RELEASE"} <= {found["kind"] for found in inside}
    assert all(found["pfn"] == row["pfn"] for found in evidence if found not in inside)
    assert 3 < len(evidence) <= EVIDENCE_MAX
    assert [found["ts"] for found in evidence] == sorted(found["ts"] for found in evidence)


def test_of_a_page_of_millions_the_nearest_records_are_kept(tmp_path):
    copy = shipped("prime-6.12")
    for kind in ("SPTE", "RELEASE", "FAULT"):
        copy[kind]["pfn"] = 0x1234
    ts = int(copy["RELEASE"]["h"]["ts"][300])
    with TraceReader(copy.write(tmp_path / "t.pfnt")) as reader:
        chain = Chain(records=(), pfns=(0x1234,), ts_from=ts)
        evidence = fetch(reader, [with_chain(chain)])[0].evidence
    assert len(evidence) == EVIDENCE_MAX
    assert evidence[0]["ts"] == ts


def test_a_finding_that_asks_for_nothing_gets_nothing():
    with TraceReader(SANE) as reader:
        assert fetch(reader, [with_chain(None)])[0].evidence == ()


def test_a_record_that_is_not_there_leaves_the_rest_of_the_chain():
    with TraceReader(SANE) as reader:
        chain = Chain(records=(("FAULT", 1, 2, 3), ("NONSENSE", 1, 2, 3)), pfns=(0x1980,))
        assert fetch(reader, [with_chain(chain)])[0].evidence


# --- what is printed ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [SANE, SICK], ids=["explained", "definite"])
def test_the_text_has_lines_of_80_columns_and_the_chain_as_a_dump_has_it(path):
    result = check_trace(path)
    lines = list(check_lines(result))
    assert all(len(line) <= 80 and line.isprintable() for line in lines)
    assert lines[0] == "nothing lost; complete"
    text = "\n".join(lines)
    for finding in result.findings:
        assert f"{finding.verdict.upper()} {finding.detector}: " in text
    assert re.search(r"^  \d+\.\d{6} \[\d{3}\] vm1/0  FAULT gfn=", text, re.M)
    assert "  rule      " in text and "  innocent  " in text and "  seen      " in text


def test_loss_and_missing_hooks_come_before_all_findings(tmp_path):
    copy = shipped("ttm-6.12")
    copy.lose("RELEASE", 500)
    copy.unhook("walk")
    lines = list(check_lines(check_trace(copy.write(tmp_path / "t.pfnt"))))
    head = lines[: next(at for at, line in enumerate(lines) if not line)]
    assert head[0].startswith("LOST 500 of ")
    assert any(line.startswith("Hook walk is missing") for line in head)
    # AND who cannot answer therefore says so
    assert any(line.startswith("  refused: ") for line in lines[lines.index("Not answered") :])


def test_a_hostile_name_is_shown_harmlessly(tmp_path):
    copy = shipped("ttm-6.12")
    evil = "/dev/\x1b[2Jevil\r\n\u202e"
    for _, note in copy.notes:
        for vma in note.get("vmas", []):
            vma["path"] = evil
        if "device" in note:
            note["device"]["path"] = evil
    path = copy.write(tmp_path / "t.pfnt")
    lines = list(check_lines(check_trace(path)))
    assert all(line.isprintable() for line in lines)
    assert any("\\x1b[2Jevil\\r\\n" in line for line in lines)
    # AND as JSON too
    status, out, _ = run("--json", path)
    assert status == 0 and "\x1b" not in out and "\u202e" not in out and json.loads(out)


def test_a_healthy_trace_says_that_nothing_was_found():
    lines = list(check_lines(check_trace(SHIPPED / "prime-7.3.pfnt")))
    assert lines[-1].startswith("nothing found; ")
    assert re.search(r"\d+ of \d+ detectors answered$", lines[-1])


# --- the command ----------------------------------------------------------------------------------


def test_anomalies_make_it_end_with_status_4():
    status, out, err = run(SICK)
    assert (status, err) == (4, "")
    assert "DEFINITE balance: KVM put the same page twice" in out


@pytest.mark.parametrize("path", [SANE, SHIPPED / "prime-6.1.pfnt"], ids=["explained", "healthy"])
def test_what_is_explained_or_nothing_ends_with_status_0(path):
    status, _, err = run(path)
    assert (status, err) == (0, "")


def test_only_the_named_detectors_are_asked():
    status, out, _ = run(SICK, "--detector", "pins", "--detector", "livelock", "--json")
    assert status == 0
    assert json.loads(out)["detectors"] == ["pins", "livelock"]


def test_json_carries_the_same_facts():
    status, out, _ = run(SICK, "--json")
    data = json.loads(out)
    assert status == 4
    assert {"trace", "kernel", "generation", "lost", "complete", "findings", "unanswerable",
            "detectors"} <= set(data)  # fmt: skip
    assert data["generation"] == "G2" and data["lost"] == 0 and data["complete"] is True
    for finding in data["findings"]:
        assert {"detector", "verdict", "count", "pages", "evidence"} <= set(finding)
        assert finding["verdict"] in VERDICTS and finding["count"] >= 1
        assert 0 < len(finding["evidence"]) <= EVIDENCE_MAX
    assert data["anomalies"] == sum(
        finding["verdict"] in ("definite", "probable") for finding in data["findings"]
    )


def test_a_detector_that_does_not_exist_is_one_line_and_status_2():
    status, out, err = run(SANE, "--detector", "leeks")
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("pfntrace: no detector 'leeks'; there are ")


def test_the_detectors_can_be_listed_without_a_trace():
    status, out, err = run("--list")
    assert (status, err) == (0, "") and "balance" in out


def test_without_a_trace_there_is_nothing_to_check():
    status, out, err = run()
    assert (status, out) == (2, "") and "name a trace" in err


@pytest.mark.parametrize("content", [b"", b"no trace", b"ARROW1\0\0" * 100])
def test_what_is_no_trace_is_one_line_and_status_1(tmp_path, content):
    (tmp_path / "t.pfnt").write_bytes(content)
    status, out, err = run(tmp_path / "t.pfnt")
    assert (status, out) == (1, "") and err.count("\n") == 1 and "t.pfnt" in err


def test_a_trace_that_is_not_there_is_an_error():
    with pytest.raises(TraceFormatError, match="cannot be read"):
        check_trace(Path("no-such.pfnt"))


# --- traces that are not as they should be --------------------------------------------------------


def test_a_cut_trace_is_checked_up_to_its_end_and_says_so(tmp_path):
    data = SICK.read_bytes()
    path = tmp_path / "t.pfnt"
    path.write_bytes(data[: len(data) * 2 // 3])
    result = check_trace(path)
    assert not result.info["complete"]
    assert next(iter(check_lines(result))).startswith("no loss known; INCOMPLETE: ")


def test_a_trace_without_a_record_says_that_nothing_can_be_said(tmp_path):
    # given: a recording that was cut within its first batch
    path = tmp_path / "t.pfnt"
    path.write_bytes(SICK.read_bytes()[:20000])
    # when
    result = check_trace(path)
    # then
    assert result.info["records"] == 0 and not result.findings
    assert {item.detector for item in result.unanswerable} == set(result.detectors)
    assert {item.reason for item in result.unanswerable} == {"the trace holds no record"}
    assert list(check_lines(result))[-1].startswith("nothing can be said: 0 of ")


def test_every_kind_can_be_missing(tmp_path):
    for kind in RECORD_KINDS:
        copy = shipped("nested-6.12")
        copy[kind] = copy[kind][:0]
        check_trace(copy.write(tmp_path / f"{kind}.pfnt"))


def test_made_up_records_of_no_kernel_are_answered(tmp_path):
    groups = [group(number, 40, RECORD_KINDS) for number in range(3)]
    result = check_trace(write_trace(tmp_path / "t.pfnt", groups))
    # Without hooks and generation nearly nothing can be said.
    assert len(result.unanswerable) >= 5


def test_random_numbers_in_every_field_are_answered(tmp_path):
    # GIVEN the hooks of a real kernel and nonsense in place of its records
    draw = np.random.default_rng(5)
    copy = shipped("nested-6.12")
    for kind, rows in copy.records.items():
        ts, kinds, ops = (rows["h"][n].copy() for n in ("ts", "kind", "op"))
        noise = draw.bytes(rows.nbytes)
        copy[kind] = np.frombuffer(noise, rows.dtype).copy()
        copy[kind]["h"]["ts"], copy[kind]["h"]["kind"], copy[kind]["h"]["op"] = ts, kinds, ops
        for name in {"cause", "mmu"} & set(rows.dtype.names or ()):
            copy[kind][name] = rows[name]
    result = check_trace(copy.write(tmp_path / "t.pfnt"))
    assert list(check_lines(result)) and json.dumps(result.to_json())


# --- merged traces --------------------------------------------------------------------------------


def test_kinds_that_a_killed_recorder_had_not_written_yet_accuse_nobody(tmp_path):
    # GIVEN a recorder that was killed within its first flush: faults and SPTEs, no memslots yet
    cut = shipped("prime-6.12")
    cut.summary, cut.losses = None, {}
    for kind in ("SLOT", "VM", "INVALIDATE", "PAGE_FREE", "PAGE_ALLOC"):
        cut[kind] = cut[kind][:0]
    # THEN no fault is blamed for a slot that nobody saw
    assert not [finding for finding in told(cut.write(tmp_path / "x.pfnt")) if finding.is_anomaly]


def test_each_recording_of_a_merged_trace_is_judged_alone(tmp_path):
    # GIVEN a sound and a sick recording of two hosts, whose pages have the same numbers
    parts = []
    model = shipped("prime-7.3").meta
    for at, (host, name) in enumerate((("sound", "prime-7.3"), ("sick", "double-put-7.3"))):
        copy = shipped(name)
        copy.setting(boot_id=host)
        start = copy.meta.start_unix_ns + at * 10**9
        copy.meta = dataclasses.replace(
            copy.meta, hostname=host, start_unix_ns=start, facts=model.facts, profile=model.profile
        )
        parts.append(copy.write(tmp_path / f"{host}.pfnt"))
    out = tmp_path / "merged.pfnt"
    merge(parts, out, version="0.1.0", argv=["merge"])
    # WHEN
    result, alone = check_trace(out), check_trace(SICK)
    # THEN the sick one is accused of what it is accused of alone, by name, and nobody else
    titles = [(f.title.replace("VM 2", "VM 1"), f.count) for f in result.findings]
    assert titles == [(f.title, f.count) for f in alone.findings]
    for finding, expected in zip(result.findings, alone.findings, strict=True):
        assert finding.recording.startswith("recording on sick from ")
        assert len(finding.evidence) == len(expected.evidence)
    assert any("in        recording on sick from" in line for line in check_lines(result))


def test_a_trace_that_is_one_recording_names_none():
    assert {finding.recording for finding in check_trace(SICK).findings} == {""}
