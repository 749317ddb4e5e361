"""How fast the commands are that read a whole trace and how much memory they take.

    python tests/bench/check.py [--records 5000000] [--trace FILE] [--each]

The trace is a large one of a sound kernel (`bigtrace.py`), made for the occasion if none is named.
Every measurement runs in a process of its own and counts its own CPU time, since other work on the
machine must not show; the peak is that of the process. `--each` asks every detector alone too.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Runs of one measurement; the best one counts, as the least disturbed. Of long traces one.
ROUNDS = 3
LONG = 20_000_000
#: Commands that are run as a user does; T is the trace, O a folder.
COMMANDS = (
    ("--help",),
    ("info", "T"),
    ("check", "T"),
    ("lifetimes", "T", "--parquet", "O/lives.parquet", "--force"),
    ("report", "T"),
)

# The program that is measured: "read" for the reading alone, else names of detectors, "" for all.
CODE = """
import json, resource, sys, time
from pathlib import Path
from analysis.check import _columns, check_trace, chosen
from analysis.stream import pieces
from tracer.tracefile import TraceReader

what, path = sys.argv[1], Path(sys.argv[2])
began = time.process_time()
if what == "read":
    with TraceReader(path) as reader:
        records = sum(map(len, pieces(reader, _columns([kind() for kind in chosen(None)]))))
    found = 0
else:
    result = check_trace(path, what.split() or None)
    records, found = result.info["records"], result.anomalies
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(json.dumps([records, time.process_time() - began, peak / 1024, found]))
"""


def measure(what: str, trace: Path, rounds: int) -> tuple[int, float, float, int]:
    """Return records, CPU seconds of the best round, peak MiB, anomalies."""
    best: tuple[int, float, float, int] | None = None
    for _ in range(rounds):
        command = [sys.executable, "-c", CODE, what, str(trace)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        records, seconds, peak, found = json.loads(done.stdout)
        if best is None or seconds < best[1]:
            best = records, seconds, peak, found
    assert best is not None
    return best


def lines(trace: Path, each: bool, rounds: int) -> list[str]:
    """Measure and return a table, one line a measurement."""
    alone = []
    if each:
        # Not before: a child's peak counts what its parent had when it forked.
        sys.path[:0] = [str(ROOT)]
        from analysis.detectors import DETECTORS

        alone = [(detector.name, detector.name) for detector in DETECTORS]
    table = [f"{'what':<22}{'million records/s':>18}{'ns/record':>11}{'peak MiB':>10}{'found':>7}"]
    for label, what in (("reading alone", "read"), *alone, ("full check", "")):
        records, seconds, peak, found = measure(what, trace, rounds)
        speed = records / max(seconds, 1e-9)
        table.append(f"{label:<22}{speed / 1e6:>18.2f}{1e9 / speed:>11.0f}{peak:>10.0f}{found:>7}")
    table.append(f"{records:,} records, {trace.stat().st_size / 1e6:,.0f} MB, best of {rounds}")
    return table


def command_lines(trace: Path, rounds: int) -> list[str]:
    """Run commands and return a table, one line a command."""
    table = [f"{'pfntrace':<22}{'seconds':>18}{'CPU seconds':>13}{'peak MiB':>10}"]
    with tempfile.TemporaryDirectory() as folder:
        for words in COMMANDS:
            arguments = [w.replace("O/", f"{folder}/") if w != "T" else str(trace) for w in words]
            wall, cpu, peak = min(_run(arguments) for _ in range(rounds))
            name = " ".join(w for w in words if w[0].islower() or w in ("--help", "--parquet"))
            table.append(f"{name:<22}{wall:>18.2f}{cpu:>13.2f}{peak:>10.0f}")
    return table


def _run(arguments: Sequence[str]) -> tuple[float, float, float]:
    """Run pfntrace; return seconds, CPU seconds, peak MiB."""
    command = [sys.executable, str(ROOT / "pfntrace.py"), *arguments]
    began = time.monotonic()
    # Not waited for by subprocess: wait4() tells of this child alone what it used.
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(child.pid, 0)
    wall = time.monotonic() - began
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"pfntrace {' '.join(arguments)}: exit status {child.returncode}")
    return wall, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


def show(trace: Path, *, each: bool, rounds: int) -> None:
    """Measure everything on a trace and print it."""
    for table in (lines(trace, each, rounds), command_lines(trace, rounds)):
        print("\n".join(table), flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the trace if none is named, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=5_000_000, help="of the trace that is made")
    parser.add_argument("--trace", type=Path, help="measure this one instead")
    parser.add_argument("--each", action="store_true", help="every detector alone too")
    parser.add_argument("--rounds", type=int, help="runs of each measurement [3, of long ones 1]")
    asked = parser.parse_args(arguments)
    if asked.trace is not None:
        show(asked.trace, each=asked.each, rounds=asked.rounds or ROUNDS)
        return
    rounds = asked.rounds or (ROUNDS if asked.records < LONG else 1)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "big.pfnt"
        maker = str(Path(__file__).with_name("bigtrace.py"))
        subprocess.run([sys.executable, maker, str(asked.records), str(trace)], check=True)
        show(trace, each=asked.each, rounds=rounds)


if __name__ == "__main__":
    main()
