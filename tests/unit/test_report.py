"""`pfntrace report`: what it says of real traces, of made ones, and of files from strangers."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from analysis.report import report_lines
from analysis.totals import add_up
from probes import wire
from probes.errors import TraceFormatError
from tracer.schema import SCHEMA_VERSION
from tracer.tracefile import TraceMeta, TraceWriter

TRACES = Path(__file__).parent / "traces"
KINDS = wire.KINDS
ALL_ONES = (1 << 64) - 1
ERR_FAULT = 0x7FF << 52
RESULTS = {"1": "retry", "2": "emulate", "4": "invalid", "5": "fixed", "6": "spurious"}


def spoken(lines):
    """Return lines as one running text."""
    return " ".join(" ".join(lines).split())


def report(path):
    """Return the report of a trace, none of whose lines may be longer than a mail's."""
    lines = list(report_lines(path))
    assert not [line for line in lines if len(line) > 80 or line != line.rstrip()]
    assert not [c for line in lines for c in line if not c.isprintable()]
    return lines


# --- traces of real kernels -----------------------------------------------------------------------


def test_on_6_12_the_ttm_guest_died_of_an_uncounted_tail():
    lines = report(TRACES / "ttm-6.12.pfnt")
    text = spoken(lines)
    assert lines[0] == "nothing lost; complete"
    assert (
        "VM 1 (process 219): the guest died with EFAULT because the page behind gfn 0x10001 is the "
        "uncounted tail of a non-compound block mapped by /dev/dri/card0 (VM_PFNMAP, VM_IO)."
    ) in text
    assert "slot 1, hva 0x7fee1d2fe000, pfn 0x1981, vCPU 0, write access, once" in text
    assert "KVM of this kernel (G0b) takes a reference to the page of every fault" in text
    assert "pfn 0x1980, right before it, has count 1 and was mapped at gfn 0x10000" in text
    assert "freed as one: 128 pages (order 7) from pfn 0x1980" in text
    assert "no later fault of vCPU 0 succeeded; the VM was destroyed 92 ms later" in text
    assert "does not reference-count none" in text


def test_on_6_1_the_slot_s_note_alone_names_the_mapping():
    # GIVEN a kernel whose walk shows no VMA, and a process that lived to have its smaps read
    lines = report(TRACES / "ttm-6.1.pfnt")
    text = spoken(lines)
    assert (
        "VM 1 (process 171): the guest died with EFAULT because the page behind gfn 0x10001 is the "
        "uncounted tail of a non-compound block mapped by /dev/dri/card0 (VM_PFNMAP, VM_IO)."
    ) in text
    assert "the VM was destroyed 1.1 s later" in text
    assert lines[1].startswith("Hook recovery is missing")


def test_on_7_3_the_ttm_guest_has_128_pages_that_nobody_counts():
    text = spoken(report(TRACES / "ttm-7.3.pfnt"))
    assert "128 pages gfn 0x10000-0x1007f slot 1 /dev/dri/card0 (VM_PFNMAP, VM_IO)" in text
    assert "VM 1 (process 183)" in text and "pfn 0x22b00-0x22b7f" in text
    assert "Not reference-counted, says KVM: count 0 on 127; above 0 by accident on 1" in text
    assert "Faults that failed, and why none" in text
    assert "129 installed - 129 zapped = 0 mapped at the end (VM destroyed)" in text
    assert "Losses" not in text


@pytest.mark.parametrize("name", ["ttm-6.1", "ttm-6.12", "ttm-7.3"])
def test_short_chunks_add_up_to_the_same(name):
    # GIVEN a trace read as one piece, and batch by batch
    whole, pieces = add_up(TRACES / f"{name}.pfnt"), add_up(TRACES / f"{name}.pfnt", rows_max=1)
    # THEN all sums are the same
    assert whole.faults == pieces.faults and sum(whole.faults.values()) in (3, 129)
    assert (whole.sptes, whole.pages, whole.counts) == (pieces.sptes, pieces.pages, pieces.counts)
    assert (whole.alive, whole.processes) == (pieces.alive, pieces.processes)
    assert len(whole.uncounted) == len(pieces.uncounted)
    assert whole.failed.equals(pieces.failed)


# --- whole traces ---------------------------------------------------------------------------------


def faults(count, **fields):
    """Return FAULT records of VM 1 that fixed one page each; `fields` overrides."""
    records = np.zeros(count, wire.FAULT)
    records["h"]["kind"] = KINDS.index("FAULT")
    records["h"]["ts"] = np.arange(count) + 1000
    records["h"]["tgid"], records["h"]["vm"], records["h"]["stack"] = 219, 1, -1
    records["gfn"] = np.arange(count)
    records["hva"] = 0x7000_0000 + np.arange(count) * 4096
    records["pfn"] = 0x1000 + np.arange(count)
    records["walk_pfn"] = ALL_ONES
    records["level"], records["mmu"], records["slot"], records["ret"] = 1, 1, 1, 5
    records["refcounted"] = 2
    for page, refcount in (("page", 3), ("page_end", 2)):
        records[page]["bits"], records[page]["refcount"] = 1, refcount
    for name, value in fields.items():
        records[name] = value
    return records


def events(kind, count, op=None, **fields):
    """Return records of another kind of VM 1."""
    records = np.zeros(count, wire.EVENT)
    records["h"]["kind"], records["h"]["vcpu"] = KINDS.index(kind), -1
    records["h"]["op"] = wire.OPS.index(op) if op else 0
    records["h"]["ts"] = np.arange(count) + 2000
    records["h"]["vm"] = 1
    for name, value in fields.items():
        records[name] = value
    return records


def sptes(count, op, cause="fault", level=1):
    found = events("SPTE", count, op, level=level, mmu=1, cause=wire.CAUSES.index(cause))
    found["gfn"], found["pfn"] = np.arange(count), 0x1000 + np.arange(count)
    found["page"]["bits"], found["page"]["refcount"] = 1, 3
    return found


def write(path, *groups, notes=(), summary=None, losses=None, complete=True, **meta):
    """Write a trace of groups of records."""
    profile = {
        "generation": meta.pop("generation", "G0b"),
        "hooks": [{"hook": "gup"}, {"hook": "walk"}],
        "missing": meta.pop("missing", []),
        "results": RESULTS,
    }
    known: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "pfntrace_version": "0",
        "command": ("pfntrace", "record"),
        "start_unix_ns": 0,
        "start_monotonic_ns": 0,
        "hostname": "",
        "facts": '{"release": "6.12.0"}',
        "profile": profile,
    }
    writer = TraceWriter(path, TraceMeta(**(known | meta)))
    for records in groups:
        writer.write_group([(KINDS[records["h"]["kind"][0]], records)])
    for note in notes:
        writer.write_note(note, ts=1)
    if losses:
        writer.write_losses(losses, ts=1)
    if complete:
        writer.close(summary or {}, ts=1)
    else:
        writer.flush()
        writer.abandon()
    return path


def test_a_trace_without_faults_says_what_to_look_at(tmp_path):
    text = spoken(report(write(tmp_path / "t.pfnt")))
    assert text.startswith("nothing lost; complete")
    assert "No guest page fault is in this trace Was a VM running, and was it this one" in text


def test_the_sums_are_those_of_the_records(tmp_path):
    # GIVEN five pages fixed, one retried, one with a count too high to print
    made = faults(7)
    made["ret"][1], made["page"]["refcount"][2], made["page_end"]["refcount"][2] = 1, 1000, 999
    made["h"]["vcpu"][3] = 1
    # and VM 1 from birth to death, one SPTE of 2M
    path = write(
        tmp_path / "t.pfnt",
        events("VM", 1, "create", d=219),
        made,
        sptes(5, "install"),
        sptes(1, "install", "prefetch", level=2),
        sptes(6, "zap", "notifier"),
        events("VM", 1, "delete", d=219),
    )
    # WHEN
    lines = report(path)
    # THEN
    assert "  1       219      2       7  created, destroyed" in lines
    assert "  VM  fixed  retry  all" in lines and "  1       6      1    7" in lines
    assert "  1   tdp  4K     notifier          -        -       6" in lines
    assert "  1   tdp  2M     prefetch          1        -       -" in lines
    assert "  VM 1: 6 installed - 6 zapped = 0 mapped at the end (VM destroyed)" in lines
    assert "  counted            7             5             1" in lines
    assert "  mapped      3 -> 2         5" in lines and "  mapped      n -> n-1       1" in lines
    assert "  not mapped  3 -> 2         1" in lines and "  n: counts above 16" in lines


def test_sptes_that_outlive_their_vm_are_said_aloud(tmp_path):
    vm = (events("VM", 1, "create"), events("VM", 1, "delete"))
    text = spoken(report(write(tmp_path / "a", *vm, sptes(6, "install"), sptes(4, "zap"))))
    assert "6 installed - 4 zapped = 2 mapped at the end: 2 SPTEs OUTLIVED the VM" in text
    text = spoken(report(write(tmp_path / "b", *vm, sptes(6, "zap"))))
    assert "-6 mapped at the end: some zapped SPTEs were never seen installed" in text
    text = spoken(report(write(tmp_path / "c", vm[1], sptes(6, "zap"))))
    assert "(VM destroyed); SPTEs from before the trace may be among the zapped" in text
    text = spoken(report(write(tmp_path / "d", vm[0], sptes(6, "install"))))
    assert "6 mapped at the end (VM not destroyed)" in text and "OUTLIVED" not in text


def test_a_count_that_stays_is_explained(tmp_path):
    made = faults(2)
    made["page_end"]["refcount"] = 3
    text = spoken(report(write(tmp_path / "t.pfnt", made)))
    assert "3 -> 3" in text and "A count that does not fall is not by itself a leak" in text


def test_a_vm_that_only_a_note_tells_of_has_its_process(tmp_path):
    vms = [{"vm": 3, "tgid": 77, "traced": True}, {"vm": 4, "tgid": 78, "traced": False}]
    lines = report(write(tmp_path / "t.pfnt", notes=[{"vms": vms}]))
    assert "  3        77      0       0  creation not recorded, end not recorded" in lines
    assert not [line for line in lines if "78" in line]


def test_a_cut_trace_is_reported_up_to_its_end(tmp_path):
    path = write(tmp_path / "t.pfnt", faults(9), complete=False)
    lines = report(path)
    assert "INCOMPLETE" in lines[0] and "  all          9" in lines
    assert "its end is not in the trace" in spoken(lines)


def test_missing_hooks_say_what_cannot_be_seen(tmp_path):
    gone = {"hook": "walk", "why": "no such symbol", "without": "a PFNMAP page stays unnamed"}
    other = {"hook": "root_work", "why": "no such symbol", "without": ""}
    failed = {"failed": {"hook": "gup", "symbol": "hva_to_pfn", "why": "busy"}}
    lines = report(write(tmp_path / "t.pfnt", faults(1), missing=[gone, other], notes=[failed]))
    assert lines[1:3] == [
        "Hook walk is missing (no such symbol): a PFNMAP page stays unnamed.",
        "Hook gup is not attached to hva_to_pfn: busy.",
    ]
    assert "root_work" not in spoken(lines)


# --- losses ---------------------------------------------------------------------------------------


def counts(**kinds):
    names = ("produced", "lost", "filtered", "torn")
    made = {kind: dict(zip(names, values, strict=True)) for kind, values in kinds.items()}
    sums = {name: sum(count[name] for count in made.values()) for name in names}
    return {"counts": made, **sums}


def test_losses_are_first_and_add_up_at_the_end(tmp_path):
    summary = counts(FAULT=(15, 4, 1, 2), SPTE=(3, 0, 0, 0))
    lines = report(write(tmp_path / "t.pfnt", faults(10), sptes(3, "install"), summary=summary))
    assert lines[0].startswith("LOST 4 of 18 records (22.2 %)")
    assert lines[1] == "The figures below are lower bounds: lost records are not among them."
    assert lines[2] == "Without 1 record that --vm or --gfn kept out."
    assert "  FAULT        15        10     4         1        -" in lines
    assert not [line for line in lines[-6:] if line.startswith("  SPTE")]
    assert "2 of the lost faults are torn" in spoken(lines)
    assert lines[-1] == "  recorded + lost + filtered = produced, for every kind."


def test_losses_that_do_not_add_up_are_said_aloud(tmp_path):
    summary = counts(FAULT=(15, 0, 0, 0)) | {"unread": 5}
    lines = report(write(tmp_path / "t.pfnt", faults(10), summary=summary))
    assert "  FAULT        15        10     -         -        5" in lines
    assert "does NOT add up to produced: 5 were left in the rings." in spoken(lines)


def test_a_cut_trace_counts_its_losses_from_its_last_counters(tmp_path):
    losses = {"FAULT": [(6, 1, 0, 0), (6, 2, 0, 0)]}
    lines = report(write(tmp_path / "t.pfnt", faults(8), losses=losses, complete=False))
    assert lines[0].startswith("LOST 3 of 11 records")
    assert "  FAULT        12         8     3         -        1" in lines
    assert "The trace has no end, so its last counters may be older" in spoken(lines)


# --- files from strangers -------------------------------------------------------------------------


EVIL = "\x1b[2J\u202e\n" + "x" * 200 + "\t\ud800"


def test_hostile_strings_stay_on_their_line(tmp_path):
    # GIVEN control characters wherever the trace has text
    slot = {"vm": 1, "slot": 1}
    vma = {"start": 0, "end": 1 << 62, "path": EVIL, "flags": ["pf"]}
    made = faults(3, refcounted=0)
    made["ret"][0], made["pfn"][0] = -14, ERR_FAULT
    path = write(
        tmp_path / "t.pfnt",
        made,
        notes=[{"slot": slot, "vmas": [vma]}, {"failed": {"hook": EVIL}}],
        command=("pfntrace", EVIL),
        facts='{"release": "\\u001b[1m"}',
        generation=EVIL,
        missing=[{"hook": EVIL, "why": 3, "without": [EVIL]}],
        summary={"why": EVIL, "problem": EVIL, "seconds": "long", "counts": [EVIL]},
    )
    # WHEN THEN (`report` looks at every character)
    text = spoken(report(path))
    assert "\\x1b[2J\\u202e" in text and "VM_PFNMAP" in text


@pytest.mark.parametrize(
    "summary",
    [
        {"seconds": float("1e300")},
        {"seconds": -1, "why": None},
        {"seconds": True, "unread": "x", "counts": {"FAULT": 3}},
        {"counts": {"FAULT": {"produced": -5, "lost": "2"}}},
    ],
)
def test_a_strange_summary_breaks_nothing(tmp_path, summary):
    assert "fixed" in spoken(report(write(tmp_path / "t.pfnt", faults(3), summary=summary)))


def test_impossible_values_break_nothing(tmp_path):
    # GIVEN records whose every field has all bits set, and random ones
    random = np.random.default_rng(7)
    groups = []
    for kind in KINDS[1:]:
        dtype = wire.FAULT if kind == "FAULT" else wire.EVENT
        ones = np.frombuffer(b"\xff" * dtype.itemsize, dtype).copy()
        noise = np.frombuffer(random.bytes(dtype.itemsize * 50), dtype).copy()
        for records in (ones, noise):
            records["h"]["kind"] = KINDS.index(kind)
            groups.append(np.sort(records, order=["h"]))
    # WHEN THEN
    assert "Faults by result" in report(write(tmp_path / "t.pfnt", *groups))


def test_a_file_that_is_no_trace_is_refused_in_one_line(tmp_path):
    path = tmp_path / "no.pfnt"
    path.write_bytes(b"\xff" * 100)
    with pytest.raises(TraceFormatError) as caught:
        report(path)
    assert "\n" not in str(caught.value)


def test_many_kinds_of_failure_are_cut_short_and_counted(tmp_path):
    made = faults(50, ret=-14, pfn=ERR_FAULT)
    made["slot"] = np.arange(50)
    lines = report(write(tmp_path / "t.pfnt", made))
    assert "  ... and 30 faults of other kinds" in lines


# --- cost -----------------------------------------------------------------------------------------


def test_a_hundred_thousand_records_take_less_than_three_seconds(tmp_path):
    half = faults(50_000, refcounted=0)
    for name in ("page", "page_end"):
        half[name]["refcount"] = 0
    parts = [part for i in range(0, 50_000, 5_000) for part in (half[i : i + 5_000],)]
    path = write(tmp_path / "t.pfnt", *parts, sptes(25_000, "install"), sptes(25_000, "zap"))
    begin = time.perf_counter()
    text = spoken(report(path))
    assert time.perf_counter() - begin < 3
    assert "50,000 pages gfn 0x0-0xc34f slot 1" in text
