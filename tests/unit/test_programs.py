"""What the BPF programs promise one another, read from their C."""

import re
from collections import Counter

from probes.profile import BPF_SOURCE
from tracer.kernel import RAW_TAILS

PROGRAMS = BPF_SOURCE.read_text()
STATE = (BPF_SOURCE.parent / "state.h").read_text()
ENTRIES = {name: int(number) for name, number in re.findall(r"#define (RAW_TAIL_\w+) (\d+)", STATE)}


def test_every_program_that_tracepoints_call_has_one_caller() -> None:
    # Given programs whose stack may be one area per cpu, and which only their callers' guards keep
    # from running inside themselves: frees with VM 0 and frame 0 were recorded on 7.3 when the two
    # programs of a tracepoint shared one
    calls = re.findall(r"raw_tails\.call\(ctx, ([^;]+)\);", PROGRAMS)
    called = Counter(re.findall(r"RAW_TAIL_\w+", " ".join(calls)))

    # Then no entry is called from two places
    assert called == dict.fromkeys(ENTRIES, 1)


def test_the_recorder_fills_every_entry_with_a_program_that_exists() -> None:
    assert sorted(ENTRIES.values()) == list(range(len(RAW_TAILS)))
    assert f"#define RAW_TAILS {len(RAW_TAILS)}" in STATE
    for name in RAW_TAILS:
        assert f"int {name}(struct bpf_raw_tracepoint_args *ctx)" in PROGRAMS


def test_tracepoints_do_not_build_events_where_kprobes_do() -> None:
    # Given tracepoints, whose programs may be preempted since 7.0
    for body in re.findall(r"\nint raw_t\w+\([^)]*\)\n{(.*?)\n}\n", PROGRAMS, re.S):
        assert "scratch()" not in body
