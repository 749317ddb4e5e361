"""How fast lifetimes are made of SPTE records in memory, beside DuckDB, which only pairs them.

    python tests/bench/lifetimes.py [--records 20000000] [--trace FILE] [--rounds 5]

Every measurement runs in a process of its own and on one thread, and counts its own CPU time from
columns in memory to the result, since other work on the machine must not show. DuckDB has the
columns in a table of its own and gives back two sums, not rows. The best round counts.

    pairing alone           which records belong together, in arrays: what DuckDB does
    lives, 7 columns        a table of these; `LifeBuilder(context, columns)` makes no others
    lives, all columns      the whole table of docs/TABLES.md, all records at once
    the same, in chunks     as `pfntrace lifetimes` does: open lives are kept between chunks
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 5

# What is measured; each prints [SPTE records, lives, CPU seconds of the best round, peak MiB].
HEAD = """
import json, resource, sys, time
from pathlib import Path
from analysis.columns import Records
from analysis.lives import SPTE_COLUMNS, LifeBuilder, LifeContext
from tracer.tracefile import TraceReader

path, rounds = Path(sys.argv[1]), int(sys.argv[2])
with TraceReader(path) as reader:
    context = LifeContext.of(reader)
    batches = list(reader.records(["SPTE"], SPTE_COLUMNS))
records = Records("SPTE", batches)

def best(work):
    times = []
    for _ in range(rounds):
        began = time.process_time()
        found = work()
        times.append(time.process_time() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps([len(records), found, min(times), peak]))
"""
OURS = """
del batches
for name in SPTE_COLUMNS:
    records[name]
"""
BUILD = """
def work():
    builder = LifeBuilder(context, {columns})
    return len(builder.feed(records)) + len(builder.finish())
best(work)
"""
CHUNKED = """
import pyarrow as pa
rows = 1 << 19  # as iter_lives() does
chunks, held = [], []
for batch in batches:
    held.append(batch)
    if sum(map(len, held)) >= rows:
        chunks.append(Records("SPTE", held))
        held = []
chunks.append(Records("SPTE", held))
for chunk in chunks:
    for name in SPTE_COLUMNS:
        chunk[name]
def work():
    builder = LifeBuilder(context)
    return sum(len(builder.feed(chunk)) for chunk in chunks) + len(builder.finish())
best(work)
"""
PAIR = """
import numpy as np
from analysis.lifeevents import events_of
from analysis.lifepairs import pair
from analysis.lifestore import OpenLives

def work():
    events = events_of(records, slice(0, len(records)), context)
    ts, vm = events.columns["ts"], events.columns["vm"]
    lives = pair(events.keys, OpenLives(), lambda at: context.missable(vm[at], ts[at]))
    return int(np.count_nonzero(lives.orphan == 0))
best(work)
"""
DUCKDB = """
import duckdb, pyarrow as pa
from probes.wire import OPS
names = ("ts", "op", "vm", "as_id", "level", "gfn", "pfn")
columns = pa.table({name: records[name] for name in names})
db = duckdb.connect()
db.execute("SET threads = 1; SET enable_progress_bar = false")
db.execute("CREATE TABLE sptes AS SELECT * FROM columns")
del columns, batches
install, change = OPS.index("install"), OPS.index("change")
query = f'''
    SELECT count(*), sum(death - ts) FROM (
        SELECT ts, op, lead(ts) OVER w AS death
        FROM sptes WHERE op <> {change}
        WINDOW w AS (PARTITION BY vm, as_id, level, gfn ORDER BY ts)
    ) WHERE op = {install}'''
best(lambda: db.execute(query).fetchone()[0])
"""
NEEDED = '("vm", "gfn", "pfn", "level", "birth_ts", "death_ts", "ended_by")'
VARIANTS = {
    "pairing alone": OURS + PAIR,
    "lives, 7 columns": OURS + BUILD.format(columns=NEEDED),
    "lives, all columns": OURS + BUILD.format(columns=None),
    "the same, in chunks": CHUNKED,
    "DuckDB, pairing alone": DUCKDB,
}


def measure(code: str, trace: Path, rounds: int) -> list[Any]:
    """Run one variant; return SPTE records, lives, CPU seconds, peak MiB."""
    command = [sys.executable, "-c", HEAD + code, str(trace), str(rounds)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return list(json.loads(done.stdout))


def machine() -> str:
    """Return what this runs on."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    models = [line.partition(":")[2].strip() for line in info.splitlines() if "model name" in line]
    return f"{models[0] if models else platform.machine()}, Python {platform.python_version()}"


def lines(trace: Path, rounds: int) -> list[str]:
    """Measure all variants and return a table."""
    found = {name: measure(code, trace, rounds) for name, code in VARIANTS.items()}
    other = found["DuckDB, pairing alone"][2]
    table = [f"{'what':<23}{'million records/s':>18}{'ns/record':>11}{'DuckDB':>9}{'peak MiB':>10}"]
    for name, (records, _, seconds, peak) in found.items():
        speed = records / max(seconds, 1e-9)
        ratio = f"{other / seconds:.1f}x"
        table.append(f"{name:<23}{speed / 1e6:>18.2f}{1e9 / speed:>11.0f}{ratio:>9}{peak:>10.0f}")
    records, lives = found["lives, all columns"][:2]
    table.append(f"{records:,} SPTE records, {lives:,} lives, one thread, best of {rounds}")
    table.append(f"{machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    if len({lives for _, lives, *_ in found.values()}) != 1:
        table.append(f"NOT THE SAME: { ({name: row[1] for name, row in found.items()}) }")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--records", type=int, default=20_000_000, help="of the trace that is made")
    parser.add_argument("--trace", type=Path, help="measure this one instead")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    args = parser.parse_args()
    if args.trace:
        print("\n".join(lines(args.trace, args.rounds)))
        return
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "big.pfnt"
        made = [
            sys.executable,
            str(ROOT / "tests/bench/bigtrace.py"),
            str(args.records),
            str(trace),
        ]
        subprocess.run(made, check=True, stdout=subprocess.DEVNULL)
        print("\n".join(lines(trace, args.rounds)))


if __name__ == "__main__":
    main()
