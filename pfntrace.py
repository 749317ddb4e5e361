"""The front door: the `pfntrace` command.

Parses, calls one function of one room, prints. Rooms are imported inside the command that needs
them, so that `record` pays for nothing it does not use. Exit status: 0 ok, 1 error, 2 usage,
3 recorded with loss (--fail-on-loss), 127 command not found, 130 interrupted with a valid file;
with `record -- COMMAND` a failing command's own status.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from probes.errors import PfntraceError, UsageError

if TYPE_CHECKING:
    from tracer.session import Outcome, Progress, RecordOptions

__all__ = ("app", "main")

VERSION = "0.1.0"
#: A ring buffer holds less than 4 GiB (BPF_MAP_TYPE_RINGBUF, max_entries is 32 bits wide), and a
#: file of a tebibyte is a mistake.
_BUFFER_MAX_MIB, _FILE_MAX_MIB = 4096, 1 << 20

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Record and analyse how KVM faults in, maps and releases the pages of live guests.",
)


def _say(line: str) -> None:
    """Print for a person: stderr, since stdout carries data."""
    print(line, file=sys.stderr)


def _out(line: str) -> None:
    try:
        print(line)
    except BrokenPipeError:
        # Not an error: the reader has seen enough (`| head`). Click would make it one.
        _drop_stdout()
        raise SystemExit(0) from None


def _drop_stdout() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.callback(invoke_without_command=True)
def _front(
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    if version:
        _out(f"pfntrace {VERSION}")
        raise typer.Exit


@app.command()
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what this host offers for recording, what it lacks, and the remedy.

    Exit status 0 if recording works here, 1 if not.
    """
    from tracer.doctor import as_json as to_json
    from tracer.doctor import as_lines, examine
    from tracer.observe import observe

    facts = observe()
    examination = examine(facts)
    if as_json:
        _out(json.dumps(to_json(examination, facts), indent=2))
    else:
        for line in as_lines(examination):
            _out(line)
    raise typer.Exit(0 if examination.can_record else 1)


@app.command(context_settings={"allow_interspersed_args": False})
def record(
    command: Annotated[
        list[str] | None,
        typer.Argument(metavar="[-- COMMAND…]", help="Run COMMAND and record while it runs."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="[default: pfntrace-COMM.PID.pfnt]"),
    ] = None,
    vm: Annotated[
        list[int] | None,
        typer.Option("--vm", metavar="PID", help="Only the VMs of process PID; may be repeated."),
    ] = None,
    duration: Annotated[
        float | None, typer.Option(metavar="S", min=0.0, help="Stop after S seconds.")
    ] = None,
    gfn: Annotated[
        str | None, typer.Option(metavar="A-B", help="Only guest frames A to B, 0x for hex.")
    ] = None,
    attach: Annotated[
        str, typer.Option(metavar="HOW", help="auto, kprobe or fentry (cheaper).")
    ] = "auto",
    stacks: Annotated[
        bool, typer.Option("--stacks", help="Kernel stacks too: ten times the cost of a probe.")
    ] = False,
    buffer_size: Annotated[
        float, typer.Option(metavar="MIB", min=0.01, help="Kernel ring buffers in all.")
    ] = 64,
    max_size: Annotated[
        float | None, typer.Option(metavar="MIB", min=0.0, help="Stop when the file is this big.")
    ] = None,
    fail_on_loss: Annotated[
        bool, typer.Option("--fail-on-loss", help="Exit 3 if any record was lost.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
) -> None:
    """Record KVM's fault path: a command's VMs, one process's, or all.

    Ends when COMMAND ends, on Ctrl-C, after --duration or at --max-size; the file is valid
    however it ends.

    Examples:  pfntrace record -- ./my-vmm disk.img
               pfntrace record --vm 4711 --duration 10 -o vm.pfnt
               pfntrace record --gfn 0x100-0x1ff
    """
    from tracer.session import RecordOptions

    if attach not in ("auto", "kprobe", "fentry"):
        raise UsageError(f"--attach {attach}: say auto, kprobe or fentry")
    for flag, size, most in (
        ("--buffer-size", buffer_size, _BUFFER_MAX_MIB),
        ("--max-size", max_size or 0, _FILE_MAX_MIB),
    ):
        if not size <= most:
            raise UsageError(f"{flag} {size:g}: at most {most} MiB")
    options = RecordOptions(
        pids=tuple(vm or ()),
        duration_s=duration,
        gfns=_parse_gfns(gfn) if gfn is not None else None,
        stacks=stacks,
        buffer_bytes=int(buffer_size * (1 << 20)),
        max_bytes=int(max_size * (1 << 20)) if max_size is not None else None,
    )
    from tracer.recording import record_to

    with _status_line() as show:
        path, outcome, status = record_to(
            options,
            command or [],
            output=output,
            attach=attach,
            overwrite=force,
            version=VERSION,
            argv=sys.argv[1:],
            say=_say,
            show=show,
        )
    told_to_end = bool(command) and outcome.why != "command"
    for line in _summary(path, outcome, options, status, told_to_end=told_to_end):
        _say(f"pfntrace: {line}")
    raise typer.Exit(_exit_status(outcome, status, fail_on_loss=fail_on_loss))


def _parse_gfns(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    try:
        low, high = int(first, 0), int(last or first, 0)
    except ValueError:
        raise UsageError(f"--gfn {text}: write A-B, for example 0x100-0x1ff") from None
    if not 0 <= low <= high < 1 << 52:
        raise UsageError(f"--gfn {text}: A must not be above B, and B below 2^52")
    return low, high


def _exit_status(outcome: "Outcome", status: int, *, fail_on_loss: bool) -> int:
    if outcome.problem:
        return 1
    if fail_on_loss and outcome.lost:
        return 3
    return 130 if outcome.why == "interrupted" else status


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def _summary(
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
        size = options.buffer_bytes / (1 << 20)
        share = 100 * outcome.lost / max(1, outcome.produced)
        yield (
            f"LOST {outcome.lost:,} of {outcome.produced:,} records ({share:.1f} %)"
            + ("" if outcome.why == "output" else f": raise --buffer-size (now {size:.3g})")
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
        yield "no guest page fault was seen: was a VM running, and was it this one (--vm)?"
    yield f"wrote {path} ({_size(outcome.bytes)}); see: pfntrace report {path}"


@contextlib.contextmanager
def _status_line() -> "Iterator[Callable[[Progress], None] | None]":
    """Give a function that shows progress on one line of a terminal; none if stderr is not one."""
    if not sys.stderr.isatty():
        yield None
        return
    last = [0.0, 0]

    def show(now: "Progress") -> None:
        if now.seconds - last[0] < 0.25:
            return
        rate = (now.records - last[1]) / (now.seconds - last[0])
        last[:] = [now.seconds, now.records]
        sys.stderr.write(
            f"\r{now.seconds:7.1f} s  {rate:9,.0f} records/s  lost {now.lost:,}  "
            f"faults {now.faults:,}  {_size(now.bytes)}\x1b[K"
        )
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")


@app.command()
def info(
    file: Annotated[Path, typer.Argument(help="A trace.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a trace holds: records, losses, kernel, hooks, and whether it is complete."""
    from tracer.tracefile import TraceReader

    facts = TraceReader(file).info()
    if as_json:
        _out(json.dumps(facts, indent=2))
        return
    from tracer.describe import info_lines

    for line in info_lines(facts):
        _out(line)


@app.command()
def dump(
    file: Annotated[Path, typer.Argument(help="A trace.")],
    kind: Annotated[
        list[str] | None, typer.Option("--kind", metavar="K", help="Only this kind; repeatable.")
    ] = None,
    gfn: Annotated[str | None, typer.Option(metavar="A-B", help="Only these guest frames.")] = None,
    limit: Annotated[int | None, typer.Option(metavar="N", min=0, help="Stop after N.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Print records in the order of time, one a line."""
    from tracer.dump import dump_json, dump_lines
    from tracer.tracefile import TraceReader

    printer = dump_json if as_json else dump_lines
    gfns = _parse_gfns(gfn) if gfn is not None else None
    kinds = [name.upper() for name in kind or ()] or None
    for line in printer(TraceReader(file), kinds, gfns, limit):
        _out(line)


@app.command()
def report(file: Annotated[Path, typer.Argument(help="A trace.")]) -> None:
    """Summarise a trace: totals, faults that failed and why, memory that nobody counts."""
    from analysis.report import report_lines

    for line in report_lines(file):
        _out(line)


def main() -> None:
    """Run the command line; errors become one line and an exit status."""
    try:
        app(standalone_mode=True)
    except PfntraceError as err:
        _say(f"pfntrace: {err}")
        raise SystemExit(err.exit_code) from None
    except KeyboardInterrupt:
        _say("pfntrace: interrupted before recording began; nothing was written")
        raise SystemExit(130) from None
    finally:
        # Python's own last flush would complain of a reader that left.
        try:
            sys.stdout.flush()
        except BrokenPipeError:
            _drop_stdout()


if __name__ == "__main__":
    main()
