"""What a simulated record costs on one core: the compiled model beside its own source.

    python tests/bench/simulate.py [--rounds N]

Rounds are interleaved, each a process of its own that runs every story once; told is the best of
each, since other tasks on the machine only ever add to a time.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from unit.compiled import compiled, stale  # noqa: E402

#: Kernel, scenario, MiB of guest memory: some hundred thousand records each.
STORIES = (
    ("6.12", "demand", 128), ("6.13", "demand", 128), ("v9", "demand", 128),
    ("6.12", "virtio_gpu", 128), ("6.13", "virtio_gpu", 128), ("6.13", "migration", 256),
    ("6.12", "balloon", 64), ("6.13", "balloon", 64), ("6.12", "nested", 64),
    ("6.13", "nested", 64), ("6.13", "storm", 64), ("6.13", "snapshot", 128),
)  # fmt: skip
#: Runs in a tree of its own: reads the stories, prints records and seconds of each.
RUN = """
import json, sys, tempfile, time
from pathlib import Path
from tracer.simulator.simulate import Knobs, simulate
told = []
for kernel, scenario, mib in json.load(sys.stdin):
    with tempfile.TemporaryDirectory() as folder:
        knobs = Knobs(kernel=kernel, scenario=scenario, mem_bytes=mib << 20)
        begin = time.perf_counter()
        outcome = simulate(knobs, Path(folder) / "story.pfnt", version="bench")
        told.append([outcome.records, time.perf_counter() - begin])
print(json.dumps(told))
"""


def run(tree: Path) -> list[tuple[int, float]]:
    """Return (records, seconds) of each story, as the model in `tree` runs it."""
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=tree, input=json.dumps(STORIES), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    return [(records, seconds) for records, seconds in json.loads(done.stdout)]


def main() -> int:
    """Measure, and print a table; exit status 1 if there is nothing compiled to measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    if why := stale() or ("" if compiled() else "the simulator is not compiled: make install"):
        print(why, file=sys.stderr)
        return 1
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        for room in ("probes", "tracer"):
            shutil.copytree(ROOT / room, source / room, ignore=shutil.ignore_patterns("*.so"))
        runs = [(run(ROOT), run(source)) for _ in range(rounds)]
    print(f"{'kernel':8}{'scenario':12}{'records':>9}  {'compiled':>9}{'source':>9}  ratio")
    print(f"{'':29}  {'records a second':>18}")
    for at, (kernel, scenario, _) in enumerate(STORIES):
        records = runs[0][0][at][0]
        fast, slow = (records / min(one[form][at][1] for one in runs) for form in (0, 1))
        print(f"{kernel:8}{scenario:12}{records:9,}  {fast:9,.0f}{slow:9,.0f}  {fast / slow:5.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
