"""How fast `pfntrace check` is and how much memory it takes, on a large trace of a sound kernel.

    python tests/bench/check.py [--records 5000000] [--trace FILE] [--each]

Every measurement runs in a process of its own and counts its own CPU time, since other work on the
machine must not show; the peak is that of the process. `--each` asks every detector alone too.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
#: Runs of one measurement; the best one counts, as the least disturbed.
ROUNDS = 3

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
    sys.path[:0] = [str(ROOT)]
    from analysis.detectors import DETECTORS

    alone = [(detector.name, detector.name) for detector in DETECTORS] if each else []
    table = [f"{'what':<22}{'million records/s':>18}{'ns/record':>11}{'peak MiB':>10}{'found':>7}"]
    for label, what in (("reading alone", "read"), *alone, ("full check", "")):
        records, seconds, peak, found = measure(what, trace, rounds)
        speed = records / max(seconds, 1e-9)
        table.append(f"{label:<22}{speed / 1e6:>18.2f}{1e9 / speed:>11.0f}{peak:>10.0f}{found:>7}")
    table.append(f"{records:,} records, {trace.stat().st_size / 1e6:,.0f} MB, best of {rounds}")
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Make the trace if none is named, measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=5_000_000, help="of the trace that is made")
    parser.add_argument("--trace", type=Path, help="measure this one instead")
    parser.add_argument("--each", action="store_true", help="every detector alone too")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    asked = parser.parse_args(arguments)
    if asked.trace is not None:
        print("\n".join(lines(asked.trace, asked.each, asked.rounds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "big.pfnt"
        maker = str(Path(__file__).with_name("bigtrace.py"))
        subprocess.run([sys.executable, maker, str(asked.records), str(trace)], check=True)
        print("\n".join(lines(trace, asked.each, asked.rounds)))


if __name__ == "__main__":
    main()
