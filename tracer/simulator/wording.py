"""What `pfntrace simulate` reads from its command line and says on the terminal.

May import: `probes.errors`, standard library, `tracer.simulator`.
"""

import contextlib
import dataclasses
import json
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from probes.errors import PfntraceError, UsageError
from tracer.simulator.bugs import BUGS
from tracer.simulator.kernels import KERNELS
from tracer.simulator.scenario import load
from tracer.simulator.simulate import Knobs, Outcome, Progress, catalogue, check_knobs, simulate

__all__ = (
    "Interrupted",
    "catalogue_lines",
    "default_output",
    "knob_lines",
    "knobs_of",
    "outcome_json",
    "outcome_lines",
    "parse_size",
    "run",
)

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_UNITS = {"": 20, "k": 10, "m": 20, "g": 30, "t": 40}
#: More than this is a mistake: every mapped page is kept in memory.
_MEM_MAX = 1 << 40


def parse_size(text: str) -> int:
    """Return bytes from `64M`, `1G` or a number of MiB. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,9})([kmgt]?)(?:i?b)?", text.strip().lower())
    size = int(match[1]) << _UNITS[match[2]] if match else 0
    if not 1 << 20 <= size <= _MEM_MAX:
        raise UsageError(f"--mem {text}: write a size from 1M to 1T, for example 64M")
    return size


def default_output(knobs: Knobs) -> Path:
    """Return the name of a trace that was not given one."""
    return Path(f"pfntrace-sim-{knobs.kernel}-{Path(knobs.scenario).stem}-{knobs.seed}.pfnt")


def knob_lines(knobs: Knobs) -> Iterator[str]:
    """Yield the seed, then every knob, one a line: they make the same trace again."""
    kernel, scenario = KERNELS.get(knobs.kernel), load(knobs.scenario)
    yield f"seed      {knobs.seed}"
    yield f"kernel    {knobs.kernel}" + (f": {kernel.title}" if kernel else "")
    yield f"scenario  {knobs.scenario}: {scenario.title}"
    yield f"mmu       {knobs.mmu or scenario.mmu}"
    yield f"vcpus     {knobs.vcpus}"
    yield f"mem       {knobs.mem_bytes >> 20} MiB"
    yield f"faults    {knobs.faults or knobs.pages:,}"
    yield "bugs      " + (", ".join(knobs.bugs) or "none")
    yield "hostile   " + (", ".join(knobs.hostile) or "no")


def outcome_lines(outcome: Outcome, bugs: Sequence[str] = ()) -> Iterator[str]:
    """Yield what was made: records, truth, and of the `bugs` asked for how often each struck."""
    yield (
        f"simulated {outcome.records:,} records ({outcome.faults:,} faults, {outcome.lives:,} "
        f"lives) of {outcome.seconds:.3f} s"
    )
    for name, count in outcome.planted.items():
        yield f"planted {name} {count:,} times: {BUGS[name].title}"
    for name in (text.partition("=")[0] for text in bugs):
        if name not in outcome.planted:
            own = BUGS[name]
            mmu = f" --mmu {own.mmu}" if own.mmu else ""
            yield f"planted {name} 0 times: it had no chance; try --scenario {own.scenario}{mmu}"
    for table, path in outcome.truth.items():
        yield f"truth {table}: {path}"
    yield f"wrote {outcome.trace}; see: pfntrace report {outcome.trace}"


def outcome_json(knobs: Knobs, outcome: Outcome) -> str:
    """Return what was made, and from what, as one JSON text."""
    files = {"trace": outcome.trace, **outcome.truth}
    told = {
        "records": outcome.records, "faults": outcome.faults, "lives": outcome.lives,
        "seconds": outcome.seconds, "planted": outcome.planted, "seed": knobs.seed,
        "files": {name: str(path) for name, path in files.items()},
        "knobs": dataclasses.asdict(knobs),
    }  # fmt: skip
    return json.dumps(told, indent=2)


def catalogue_lines(*, as_json: bool = False) -> Iterator[str]:
    """Yield what can be asked for, a line each, or as one JSON text."""
    if as_json:
        yield json.dumps(catalogue(), indent=2)
        return
    for section, entries in catalogue().items():
        yield section
        width = max(len(entry["name"]) for entry in entries)
        for entry in entries:
            more = f" [{', '.join(entry['kernels'])}]" if "kernels" in entry else ""
            yield f"  {entry['name']:<{width}}  {entry['title']}{more}"


def knobs_of(
    kernel: str, scenario: str, bugs: Sequence[str] | None, vcpus: int, mem: str,
    faults: int | None, seed: int, mmu: str, hostile: Sequence[str] | None, output: Path | None,
) -> Knobs:  # fmt: skip
    """Return the knobs of a command line, if there can be that simulation and output.

    Raises UsageError, before anything is said.
    """
    if output == Path("-"):
        raise UsageError("-o -: a trace is no stream; name a file, its truth goes beside it")
    knobs = Knobs(
        kernel=kernel, scenario=scenario, bugs=tuple(bugs or ()), vcpus=vcpus,
        mem_bytes=parse_size(mem), faults=faults, seed=seed, mmu=mmu, hostile=tuple(hostile or ()),
    )  # fmt: skip
    check_knobs(knobs)
    return knobs


class Interrupted(PfntraceError):
    """A signal ended the simulation; its files are gone."""

    def __init__(self, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"interrupted by {name}; the unfinished trace and truth were removed")
        self.exit_code = 128 + number


class _Signal(BaseException):
    """What a handler raises: nothing on the way to the files takes it for an error of its own."""


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let a signal end the block as an exception, once, so that it can clean up."""
    # One that is ignored stays so (nohup); signals reach the main thread only.
    numbers = [n for n in _SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
    before: dict[signal.Signals, Any] = {}

    def end(number: int, _frame: object) -> None:
        for one in numbers:
            signal.signal(one, signal.SIG_IGN)
        raise _Signal(number)

    try:
        if threading.current_thread() is threading.main_thread():
            for one in numbers:
                before[one] = signal.signal(one, end)
        yield
    except _Signal as err:
        raise Interrupted(err.args[0]) from None
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def run(
    knobs: Knobs, output: Path | None, version: str, overwrite: bool, progress: Progress | None
) -> Outcome:
    """Simulate into `output`, or into a file named after the knobs.

    Raises Interrupted after a signal, when nothing is left.
    """
    path = output or default_output(knobs)
    with _ended_by_signals():
        return simulate(knobs, path, version=version, overwrite=overwrite, progress=progress)
