"""`pfntrace report`: what it says of real traces, of made ones, and of files from strangers."""

import json
from pathlib import Path

import numpy as np
import pytest
from unit.made import ERR_FAULT, KINDS, events, faults, sptes, write

from analysis.report import report_lines, write_report
from analysis.totals import add_up
from probes import wire
from probes.errors import TraceFormatError

TRACES = Path(__file__).parent / "traces"


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


# --- paths, stages, memslots, lifetimes -----------------------------------------------------------


def staged(count, **fields):
    """Return faults that went through every stage, at 1, 2, 10, 12, 15 and 40 us."""
    made = faults(count, **fields)
    made["h"]["fault_ts"] = made["h"]["ts"] + np.arange(count) * 1_000_000
    made["h"]["ts"] = made["h"]["fault_ts"] + 40_000
    for name, us in (("faultin", 1), ("gup", 2), ("gup_end", 10), ("faultin_end", 12), ("map", 15)):
        made[f"t_{name}"] = us * 1000
    return made


def test_faults_are_told_apart_by_the_hooks_they_reached(tmp_path):
    # GIVEN a fault of each path
    made = staged(8)
    for name in ("t_faultin", "t_gup", "t_gup_end", "t_faultin_end"):
        made[name][:3] = wire.NEVER_REACHED
    made["ret"][1:3], made["mmu"][1] = (1, 2), 2
    made["walk_pfn"][3] = made["pfn"][3]
    made["t_gup"][5:7], made["t_gup_end"][5:7] = wire.NEVER_REACHED, wire.NEVER_REACHED
    made["slot"][5], made["ret"][5:7] = -1, (2, 1)
    made["prefetch"][7] = 1
    # WHEN
    lines = report(write(tmp_path / "t.pfnt", made))
    # THEN
    at = lines.index("Faults by path")
    assert lines[at + 1 : at + 9] == [
        "  path         fixed  retry  emulate  all  prefetch",
        "  lockless         1      -        -    1         -",
        "  guest's own      -      1        -    1         -",
        "  early            -      -        1    1         -",
        "  PFNMAP           1      -        -    1         -",
        "  GUP              2      -        -    2         1",
        "  MMIO             -      -        1    1         -",
        "  no GUP           -      1        -    1         -",
    ]
    assert "GUP: the page came by get_user_pages, fast or slow: the records cannot tell" in (
        spoken(lines)
    )


def test_without_the_gup_hook_nobody_knows_the_path(tmp_path):
    made = staged(2)
    made["t_gup"], made["t_gup_end"] = wire.NEVER_REACHED, wire.NEVER_REACHED
    failed = {"failed": {"hook": "gup", "symbol": "hva_to_pfn", "why": "busy"}}
    text = spoken(report(write(tmp_path / "t.pfnt", made, notes=[failed])))
    assert "not known 2 2 not known: fault-in, but by which way was not seen" in text
    assert "no GUP" not in text


def test_the_stages_of_a_fault_add_up_to_it(tmp_path):
    # GIVEN 10 faults of 40 us, one of them twice as long, and one that gave up after fault-in
    made = staged(11)
    made["h"]["ts"][9] += 40_000
    made["t_map"][10], made["ret"][10] = wire.NEVER_REACHED, 1
    path = write(tmp_path / "t.pfnt", made)
    # WHEN
    data = json.loads(write_report(path, as_data=True)[0])
    # THEN every stage is what the hooks measured; of fewer than 100 faults there is no 99 %
    stages = {row["stage"]: row["times"] for row in data["stages"]}
    whole = stages["all"]
    assert (whole["n"], whole["p99"], whole["max"]) == (11, None, 80_000)
    medians = {name: times["p50"] for name, times in stages.items()}
    assert list(medians) == [
        *("all", "entry", "before hva_to_pfn", "hva_to_pfn", "after hva_to_pfn", "lock", "map"),
        "give up",
    ]
    exact = [40_000, 1000, 1000, 8000, 2000, 3000, 25_000, 28_000]
    assert list(medians.values()) == pytest.approx(exact, rel=0.004)
    assert stages["give up"] == {"n": 1, "p50": 28000, "p90": None, "p99": None, "max": 28000}


def test_times_are_told_by_level_vm_and_memslot(tmp_path):
    # GIVEN two VMs; in the first one a 2M leaf of 80 us, a fault in slot 3, one that mapped nothing
    made = staged(6)
    made["h"]["vm"] = (1, 1, 1, 1, 2, 2)
    made["h"]["ts"][0] += 40_000
    made["level"] = (2, 1, 1, 1, 1, 1)
    made["slot"] = (0, 0, 3, -1, 0, 0)
    made["ret"][3] = 2
    path = write(tmp_path / "t.pfnt", made)
    # WHEN
    lines, data = report(path), json.loads(write_report(path, as_data=True)[0])
    # THEN of a level are faults that mapped something, of a memslot those that found one;
    # percentiles are within 0.4 %
    at = lines.index("Fault latency by level mapped, VM and memslot")
    assert lines[at + 1 : at + 9] == [
        "  whole faults of  faults   median  90 %  99 %  longest",
        "  4K                    4  40.0 us     -     -  40.0 us",
        "  2M                    1  80.0 us     -     -  80.0 us",
        "  VM 1                  4  40.1 us     -     -  80.0 us",
        "  VM 2                  2  40.0 us     -     -  40.0 us",
        "  VM 1 slot 0           2  40.1 us     -     -  80.0 us",
        "  VM 1 slot 3           1  40.0 us     -     -  40.0 us",
        "  VM 2 slot 0           2  40.0 us     -     -  40.0 us",
    ]
    row = next(row for row in data["latency"] if row["name"] == "VM 1 slot 3")
    assert (row["by"], row["vm"], row["slot"], row["level"]) == ("memslot", 1, 3, None)
    assert row["times"]["max"] == 40_000


def test_of_one_vm_and_one_memslot_only_the_level_is_told(tmp_path):
    lines = report(write(tmp_path / "t.pfnt", staged(3)))
    at = lines.index("Fault latency by level mapped, VM and memslot")
    assert lines[at + 2].split()[:2] == ["4K", "3"] and not lines[at + 3]


def test_a_million_vms_do_not_cost_a_histogram_each(tmp_path, monkeypatch):
    monkeypatch.setattr("analysis.latency.WHERE_MAX", 8)
    made = staged(50)
    made["h"]["vm"] = 1 + np.arange(50)
    data = json.loads(write_report(write(tmp_path / "t.pfnt", made), as_data=True)[0])
    assert len(data["latency"]) == 8 and len(data["vms"]) == 50


def test_faults_of_a_memslot_say_where_it_is_and_what_is_behind_it(tmp_path):
    # GIVEN a slot that moved, one that nobody touched, MMIO, and a fault that never asked for one
    moved = events("SLOT", 2, "create", a=16, b=0x7000_0000, d=1)
    moved["gfn"] = (0x0, 0x1000)
    other = events("SLOT", 1, "create", a=1, b=0x9000_0000, d=7)
    made = staged(4)
    made["ret"][1], made["slot"][2] = 1, -1
    made["t_faultin"][3], made["slot"][3] = wire.NEVER_REACHED, -1
    slot = {"vm": 1, "slot": 1}
    vma = {"start": 0x7000_0000, "end": 0x7001_0000, "path": "/dev/shm/ram", "flags": []}
    path = write(tmp_path / "t.pfnt", moved, other, made, notes=[{"slot": slot, "vmas": [vma]}])
    # WHEN
    lines = report(path)
    at = lines.index("Faults by memslot")
    # THEN
    assert spoken(lines[at + 1 : at + 8]) == (
        "VM slot fixed retry where, and what is behind it "
        "1 1 1 1 gfn 0x1000-0x100f (64 KiB), last of 2 places, /dev/shm/ram "
        "1 7 - - gfn 0x0-0x0 (4 KiB), a mapping whose file is not known "
        "1 ? 1 - ended before fault-in, which would name the slot "
        "1 none 1 - MMIO"
    )


def test_lifetimes_in_short(tmp_path):
    # GIVEN a VM with mappings of which some end, and one that was there before
    vm = events("VM", 1, "create")
    born, died = sptes(5, "install"), sptes(3, "zap", "notifier")
    vm["h"]["ts"], died["h"]["ts"] = 1, died["h"]["ts"] + 50_000
    before = sptes(1, "zap", level=2)
    before["h"]["vm"], before["gfn"] = 2, 1 << 20
    # WHEN
    lines = report(write(tmp_path / "t.pfnt", vm, born, died, before))
    # THEN
    assert "  4K     counted       5       -      2  50.0 us     -     -  50.0 us" in lines
    assert "  2M     counted       1       1      -        -     -     -        -" in lines
    text = spoken(lines)
    assert "of those the length is not known" in text
    assert "Ended by: zap (notifier) 3, not seen 2, zap (fault) 1." in text


def test_a_merged_trace_names_its_parts(tmp_path):
    parts = [{"file": "a.pfnt"}, {"file": EVIL}, 3, {}]
    path = write(tmp_path / "t.pfnt", settings={"merged": {"parts": parts}})
    assert "merged of 3 parts: a.pfnt, \\x1b[2J" in spoken(report(path))
    assert len(json.loads(write_report(path, as_data=True)[0])["parts"]) == 3


# --- the same as JSON -----------------------------------------------------------------------------


def test_json_has_the_same_facts(tmp_path):
    # GIVEN a real trace
    path = TRACES / "ttm-6.12.pfnt"
    # WHEN
    text = spoken(report(path))
    printed = "\n".join(write_report(path, as_data=True))
    data = json.loads(printed)
    # THEN what the text says is there, as numbers
    assert data["verdict"] == "nothing lost; complete" and data["generation"] == "G0b"
    assert data["results"] == [
        {"vm": 1, "result": "fixed", "faults": 2},
        {"vm": 1, "result": "error", "faults": 1},
    ]
    assert f"all {sum(data['records'].values())}" in text
    (row,) = data["failures"]
    assert (row["failure"]["reason"], row["failure"]["errno"]) == ("uncounted", 14)
    assert row["failure"]["mapping"]["path"] == "/dev/dri/card0"
    assert row["block"]["order"] == 7 and row["head"]["count"] == 1
    assert [life["lives"] for life in data["lifetimes"]] == [2]
    assert {finding["verdict"] for finding in data["findings"]} <= {"explained"}
    assert data["detectors"]


def test_json_of_a_hostile_trace_is_plain_ascii(tmp_path):
    path = write(tmp_path / "t.pfnt", faults(1), command=("pfntrace", EVIL), generation=EVIL)
    printed = "\n".join(write_report(path, as_data=True))
    assert not [c for c in printed if not (" " <= c <= "~" or c == "\n")]
    assert json.loads(printed)["generation"] == EVIL


def test_json_of_a_cut_trace_says_so(tmp_path):
    path = write(tmp_path / "t.pfnt", faults(9), complete=False)
    data = json.loads(write_report(path, as_data=True)[0])
    assert not data["complete"] and "no end mark" in data["reason"]
    assert data["records"]["FAULT"] == 9


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


def test_a_hundred_thousand_records_are_told_in_a_few_lines(tmp_path):
    half = faults(50_000, refcounted=0)
    for name in ("page", "page_end"):
        half[name]["refcount"] = 0
    parts = [part for i in range(0, 50_000, 5_000) for part in (half[i : i + 5_000],)]
    path = write(tmp_path / "t.pfnt", *parts, sptes(25_000, "install"), sptes(25_000, "zap"))
    lines = list(report(path))
    assert len(lines) < 200
    text = spoken(lines)
    assert "50,000 pages gfn 0x0-0xc34f slot 1" in text
