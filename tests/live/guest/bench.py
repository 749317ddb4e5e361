#!/usr/bin/env python3
"""Runs inside the lab: one workload under several tracers, interleaved in one boot.

bench.py ROUNDS         writes /out/bench.json: variant -> seconds of each round, and notes
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

OUT = Path("/out")
WORKLOAD = ["demand_paging_test", "-v", "1", "-b", "128M"]


def _timed() -> tuple[float, float]:
    """Run the workload; return its wall time and the guest's own time, in seconds."""
    began = time.monotonic()
    done = subprocess.run(WORKLOAD, capture_output=True, text=True, check=True)
    wall = time.monotonic() - began
    guest = re.search(r"Total guest execution time:\s*([\d.]+)s", done.stdout)
    assert guest
    return wall, float(guest[1])


def alone() -> tuple[float, float, str]:
    return (*_timed(), "")


def pfntrace(*options: str) -> Callable[[], tuple[float, float, str]]:
    def run() -> tuple[float, float, str]:
        trace, said = OUT / "bench.pfnt", OUT / "bench.stderr"
        with said.open("w") as errors:
            recorder = subprocess.Popen(
                ["pfntrace", "record", "--force", "-o", str(trace), *options], stderr=errors
            )
            while "armed after" not in said.read_text():
                assert recorder.poll() is None, said.read_text()
                time.sleep(0.1)
            wall, guest = _timed()
            recorder.send_signal(2)
            recorder.wait()
        words = said.read_text().splitlines()
        return wall, guest, " | ".join(line for line in words if "armed" in line or "lost" in line)

    return run


def trace_cmd() -> tuple[float, float, str]:
    recorder = subprocess.Popen(
        ["trace-cmd", "record", "-e", "kvm", "-e", "kvmmmu", "-o", "/tmp/bench.dat"],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    time.sleep(3)
    wall, guest = _timed()
    recorder.send_signal(2)
    said, _ = recorder.communicate()
    overruns = sum(int(n) for n in re.findall(r"^overrun: (\d+)", said, re.M))
    return wall, guest, f"overrun {overruns}"


VARIANTS: dict[str, Callable[[], tuple[float, float, str]]] = {
    "alone": alone,
    "pfntrace": pfntrace(),
    "pfntrace --attach kprobe": pfntrace("--attach", "kprobe"),
    "trace-cmd -e kvm -e kvmmmu": trace_cmd,
}

if __name__ == "__main__":
    os.chdir("/out")
    results: dict[str, list[tuple[float, float, str]]] = {name: [] for name in VARIANTS}
    _timed()  # warm-up
    for _ in range(int(sys.argv[1])):
        for name, run in VARIANTS.items():
            results[name].append(run())
            print(name, results[name][-1], flush=True)
    (OUT / "bench.json").write_text(json.dumps(results))
