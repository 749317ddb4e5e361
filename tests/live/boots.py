"""One boot per row: which kernel runs which scenario of guest/scenario.py.

Boots are made two at a time, in the order in which tests need them; a test waits for its own.
"""

import concurrent.futures
import dataclasses
import functools
import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import polars as pl
from lab import LabResult, RunOptions, run_in_lab

from tracer.tracefile import TraceReader

__all__ = ("BOOTS", "Boot", "Boots", "Evidence")


@dataclasses.dataclass(frozen=True)
class Boot:
    """A kernel and what to do in it."""

    kernel: str
    scenario: str
    npt: bool = True
    device: str | None = None
    append: str = ""


#: Boots for one row, of which each but the last has measured its clock wrongly.
_BOOTS_MAX = 3
_KERNELS = ("6.1", "6.12", "7.3")
BOOTS: dict[str, Boot] = {
    **{
        f"{kernel}-{'npt' if npt else 'shadow'}": Boot(kernel, "basic", npt=npt)
        for kernel in _KERNELS
        for npt in (True, False)
    },
    **{f"{kernel}-large": Boot(kernel, "large") for kernel in _KERNELS},
    "6.12-ttm": Boot("6.12", "ttm", device="qxl"),
    "7.3-ttm": Boot("7.3", "ttm", device="qxl"),
    "7.3-attach": Boot("7.3", "attach"),
    "6.12-attach": Boot("6.12", "attach"),
    "6.1-attach": Boot("6.1", "attach"),
    "6.12-ends": Boot("6.12", "ends"),
    "6.12-killed": Boot("6.12", "killed"),
    "6.12-confidential": Boot("6.12", "confidential", append="lockdown=confidentiality"),
}


@dataclasses.dataclass(frozen=True)
class Evidence:
    """What a boot left: the steps' words and their traces."""

    boot: Boot
    out: Path

    def step(self, name: str) -> dict[str, Any]:
        """Return status, stdout, stderr and seconds of one step."""
        return dict(json.loads((self.out / f"{name}.json").read_text()))

    def path(self, name: str) -> Path:
        """Return the path of a step's trace."""
        return self.out / f"{name}.pfnt"

    @functools.lru_cache(maxsize=4)  # noqa: B019 - lives as long as the test run
    def records(self, name: str) -> pl.DataFrame:
        """Return a step's trace, read by polars alone."""
        table = pl.read_ipc_stream(self.path(name))
        names = [c for c, t in table.schema.items() if isinstance(t, pl.Categorical | pl.Enum)]
        return table.with_columns(pl.col(names).cast(pl.String))

    def info(self, name: str) -> dict[str, Any]:
        """Return what `pfntrace info --json` says of a step's trace."""
        return TraceReader(self.path(name)).info()

    def stats(self, name: str, fd_kind: str) -> dict[str, int]:
        """Return KVM's own statistics of a step, summed over its VMs or vCPUs."""
        total: dict[str, int] = {}
        for line in (self.out / f"{name}.stats").read_text().splitlines():
            entry = json.loads(line)
            if entry["fd_kind"] == fd_kind:
                for key, value in entry["stats"].items():
                    if isinstance(value, int):
                        total[key] = total.get(key, 0) + value
        return total

    def witness(self, name: str, what: str) -> dict[int, int]:
        """Return ftrace's own counts of a step: key -> hits."""
        text = json.loads((self.out / f"{name}.witness").read_text())[what]
        hits = {}
        for line in text.splitlines():
            if line.startswith("{"):
                key, _, count = line.partition("}")
                hits[int(key.split(":")[1])] = int(count.split(":")[1])
        return hits


class Boots:
    """Runs the boots in the background and hands out their evidence."""

    def __init__(self, names: Iterable[str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="pfntrace-live-"))
        self._pool = concurrent.futures.ThreadPoolExecutor(2)
        self._runs = {name: self._pool.submit(self._run, name) for name in dict.fromkeys(names)}

    def _run(self, name: str) -> Evidence:
        boot = BOOTS[name]
        out = self._folder / name
        for _ in range(_BOOTS_MAX):
            result = self._boot(boot, out, name)
            if result.status != os.EX_TEMPFAIL:
                break
            _say(name, b"its clock runs wrong: booted anew")
        if result.status:
            raise RuntimeError(f"scenario {boot.scenario} on {boot.kernel}: {result.stderr}")
        return Evidence(boot, out)

    @staticmethod
    def _boot(boot: Boot, out: Path, name: str) -> LabResult:
        return run_in_lab(
            ["python3", "/project/tests/live/guest/scenario.py", boot.scenario],
            kernel=boot.kernel,
            out=out,
            options=RunOptions(
                npt="on" if boot.npt else "off",
                device=boot.device,
                append=boot.append,
                timeout_s=1800,
            ),
            stdout=lambda data: _say(name, data),
        )

    def evidence(self, name: str) -> Evidence:
        """Wait for a boot; raises GuestLost or RuntimeError if it did not go through."""
        return self._runs[name].result()

    def close(self) -> None:
        """Let go of boots that nobody waits for."""
        self._pool.shutdown(cancel_futures=True)


def _say(name: str, data: bytes) -> None:
    # Past pytest's capture: a run of many minutes must show that it moves.
    for line in data.decode(errors="replace").splitlines():
        print(f"   {name}: {line}", file=sys.__stderr__, flush=True)
