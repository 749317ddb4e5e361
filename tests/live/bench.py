"""`make bench`: what recording costs, as ratios of medians of interleaved runs in one boot."""

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import RunOptions, run_in_lab

__all__ = ("table",)

ROUNDS = 5


def table(results: dict[str, list[tuple[float, float, str]]]) -> list[str]:
    """Return one line per variant: median wall and guest seconds, and both as ratios to alone."""
    base = _medians(results["alone"])
    lines = [f"{'variant':<28}{'wall s':>8}{'ratio':>7}{'guest s':>9}{'ratio':>7}  lost"]
    for name, runs in results.items():
        wall, guest = _medians(runs)
        said = runs[-1][2].rpartition("|")[2].strip().removeprefix("pfntrace: ")
        lines.append(
            f"{name:<28}{wall:8.2f}{wall / base[0]:7.2f}{guest:9.2f}{guest / base[1]:7.2f}  {said}"
        )
    return lines


def _medians(runs: list[tuple[float, float, str]]) -> tuple[float, float]:
    wall = statistics.median(run[0] for run in runs)
    return wall, statistics.median(run[1] for run in runs)


def _show(data: bytes) -> None:
    sys.stderr.write(data.decode())


def main() -> None:
    kernel = sys.argv[1] if len(sys.argv) > 1 else "6.12"
    with tempfile.TemporaryDirectory() as folder:
        run_in_lab(
            ["python3", "/project/tests/live/guest/bench.py", str(ROUNDS)],
            kernel=kernel,
            out=Path(folder),
            options=RunOptions(timeout_s=1500),
            stdout=_show,
        )
        results = json.loads((Path(folder) / "bench.json").read_text())
    print(
        f"demand_paging_test -v 1 -b 128M on Linux {kernel}, {ROUNDS} interleaved rounds in one "
        f"emulated boot,\nall on one host thread of {os.cpu_count()} cores:"
    )
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()
