"""The closing lines of a recording: what it got, what it lost, and what to do about that.

May import: standard library.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tracer.session import Outcome, RecordOptions

__all__ = ("closing_lines", "exit_status", "size")


def size(count: float) -> str:
    """Return a number of bytes as people read it."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def exit_status(outcome: "Outcome", status: int, *, fail_on_loss: bool) -> int:
    """Return the exit status of `record`; `status` is the command's own."""
    if outcome.problem:
        return 1
    if fail_on_loss and outcome.lost:
        return 3
    return 130 if outcome.why == "interrupted" else status


def _by_size(outcome: "Outcome") -> bool:
    """Was something lost that a larger buffer would have kept?"""
    torn = sum(c.torn for c in outcome.counts.values())
    return outcome.why != "output" and outcome.lost > torn + sum(outcome.missed.values())


def closing_lines(
    path: Path,
    outcome: "Outcome",
    options: "RecordOptions",
    status: int,
    *,
    told_to_end: bool = False,
) -> Iterator[str]:
    """Yield the closing lines: loss first, since it decides what the rest is worth."""
    if outcome.problem:
        yield outcome.problem
    if outcome.lost:
        buffer = options.buffer_bytes / (1 << 20)
        share = 100 * outcome.lost / max(1, outcome.produced)
        yield (
            f"LOST {outcome.lost:,} of {outcome.produced:,} records ({share:.1f} %)"
            + (f": raise --buffer-size (now {buffer:.3g})" if _by_size(outcome) else "")
        )
    torn = sum(c.torn for c in outcome.counts.values())
    if torn:
        yield f"{torn:,} of them are faults whose end was missed: more vCPUs slept than kretprobes"
    if outcome.missed:
        calls = ", ".join(f"{name} {count:,}" for name, count in outcome.missed.items())
        yield f"the kernel skipped programs that were interrupted by themselves: {calls}"
    yield (
        f"recorded {outcome.records:,} records ({outcome.faults:,} faults) of "
        f"{outcome.vms} VM{'s' if outcome.vms != 1 else ''} in {outcome.seconds:.1f} s; "
        f"ended by {outcome.why}"
    )
    peak = f"buffer peak {100 * outcome.peak:.0f} %"
    if outcome.peak > 0.5 and not outcome.lost:
        peak += " (near full: raise --buffer-size)"
    yield f"lost {outcome.lost:,}, filtered {outcome.filtered:,}; {peak}"
    if told_to_end:
        yield "the command was told to end (SIGTERM): the recording ended before it did"
    if outcome.why == "command" and status:
        yield f"the command exited with status {status}"
    if not outcome.faults and not outcome.problem:
        leaves = outcome.counts["SPTE"].produced if "SPTE" in outcome.counts else 0
        if leaves:
            yield (
                f"no guest page fault was seen, but {leaves:,} SPTE records: either the guest had "
                "faulted before, or this kernel's faults pass the probes by: see pfntrace check"
            )
        else:
            yield "no guest page fault was seen: was a VM running, and was it this one (--vm)?"
    yield f"wrote {path} ({size(outcome.bytes)}); see: pfntrace report {path}"
