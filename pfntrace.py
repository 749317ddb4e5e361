"""The front door: the `pfntrace` command.

Parses, calls one function of one room, prints. Rooms are imported inside the command that needs
them, so that `record` pays for nothing it does not use. Exit status: 0 ok, 1 error, 2 usage,
3 recorded with loss (--fail-on-loss), 127 command not found, 130 interrupted with a valid file;
with `record -- COMMAND` a failing command's own status.
"""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from probes.arguments import parse_frames, parse_number
from probes.errors import PfntraceError, UsageError
from tracer.terminal import progress as progress_bar
from tracer.terminal import status_line

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


def _argument(metavar: str, about: str) -> Any:
    """Return a trace to name; one that cannot be read is refused where it is opened, in a line."""
    return typer.Argument(metavar=metavar, help=about, readable=False)


_Trace = Annotated[Path, _argument("TRACE", "A trace.")]


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


def _out_all(lines: Iterable[str]) -> None:
    for line in lines:
        _out(line)


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
        _out_all(as_lines(examination))
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
        gfns=parse_frames(gfn) if gfn is not None else None,
        stacks=stacks,
        buffer_bytes=int(buffer_size * (1 << 20)),
        max_bytes=int(max_size * (1 << 20)) if max_size is not None else None,
    )
    from tracer.closing import closing_lines, exit_status
    from tracer.recording import record_to

    with status_line() as show:
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
    for line in closing_lines(path, outcome, options, status, told_to_end=told_to_end):
        _say(f"pfntrace: {line}")
    raise typer.Exit(exit_status(outcome, status, fail_on_loss=fail_on_loss))


@app.command()
def info(
    file: _Trace,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what a trace holds: records, losses, kernel, hooks, and whether it is complete."""
    from tracer.tracefile import TraceReader

    facts = TraceReader(file).info()
    if as_json:
        _out(json.dumps(facts, indent=2))
        return
    from tracer.describe import info_lines

    _out_all(info_lines(facts))


@app.command()
def dump(
    file: _Trace,
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
    gfns = parse_frames(gfn) if gfn is not None else None
    kinds = [name.upper() for name in kind or ()] or None
    _out_all(printer(TraceReader(file), kinds, gfns, limit))


@app.command()
def check(
    file: Annotated[Path | None, _argument("TRACE", "A trace.")] = None,
    detector: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this one; repeatable.")
    ] = None,
    list_all: Annotated[bool, typer.Option("--list", help="Name the detectors, and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look for broken reference counting, stale mappings and livelocks in a trace.

    Exit status 0 if nothing definite or probable was found, 4 if something was.
    """
    from analysis.check import check_trace
    from analysis.checktext import check_lines, detector_lines

    if list_all:
        _out_all(detector_lines())
        return
    if file is None:
        raise UsageError("check: name a trace, or --list")
    with progress_bar("checking") as progress:
        result = check_trace(file, detector or None, progress)
    if as_json:
        # json leaves DEL as it is.
        _out(json.dumps(result.to_json(), indent=2).replace("\x7f", "\\u007f"))
    else:
        _out_all(check_lines(result))
    raise typer.Exit(4 if result.anomalies else 0)


@app.command()
def report(
    file: _Trace,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write one page with figures.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
) -> None:
    """Summarise a trace: faults, lifetimes, anomalies, memory that nobody counts.

    What is lost or cannot be seen is said first.
    """
    from analysis.report import write_report

    with progress_bar("reading") as progress:
        lines = write_report(file, html, as_data=as_json, overwrite=force, progress=progress)
    _out_all(lines)
    if html is not None:
        _say(f"pfntrace: wrote {html}")


@app.command()
def plot(
    file: _Trace,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="The folder.")],
    kind: Annotated[
        list[str] | None,
        typer.Option(
            "--kind", metavar="K", help="timeline, refcount, mapped, lifetimes, latency. [all]"
        ),
    ] = None,
    gfn: Annotated[
        str | None, typer.Option(metavar="A-B", help="Guest frames of the timeline.")
    ] = None,
    pfn: Annotated[
        str | None, typer.Option(metavar="N", help="Page of refcount. [the first finding's]")
    ] = None,
    form: Annotated[str, typer.Option("--format", metavar="F", help="png or svg.")] = "png",
    force: Annotated[bool, typer.Option("--force", help="Overwrite files.")] = False,
) -> None:
    """Draw figures of a trace into a folder, KIND.png each."""
    from analysis.plot import plot_trace

    with progress_bar("reading") as progress:
        paths = plot_trace(
            file,
            output,
            kind or (),
            gfns=parse_frames(gfn) if gfn is not None else None,
            pfn=parse_number("--pfn", pfn) if pfn is not None else None,
            form=form,
            overwrite=force,
            progress=progress,
        )
    for path in paths:
        _say(f"pfntrace: wrote {path}")


@app.command()
def lifetimes(
    file: _Trace,
    vm: Annotated[int | None, typer.Option(metavar="N", min=0, help="Only VM N.")] = None,
    gfn: Annotated[str | None, typer.Option(metavar="A-B", help="Only these guest frames.")] = None,
    pfn: Annotated[
        str | None, typer.Option(metavar="A-B", help="Host frames: history too.")
    ] = None,
    slot: Annotated[int | None, typer.Option(metavar="N", help="Only memslot N.")] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=0, help="Show N at most.")] = 40,
    csv: Annotated[Path | None, typer.Option("--csv", metavar="FILE", help="Write all.")] = None,
    parquet: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
) -> None:
    """List mappings: born when and why, of which page, ended when and by what.

    Files have the columns of docs/TABLES.md.
    """
    from analysis.lifelist import Selection, lifetime_lines, write_lifetimes

    gfns = parse_frames(gfn) if gfn is not None else None
    chosen = Selection(vm, gfns, parse_frames(pfn, "--pfn") if pfn is not None else None, slot)
    files = {form: path for form, path in (("csv", csv), ("parquet", parquet)) if path}
    with progress_bar("pairing") as show:
        made = write_lifetimes(file, chosen, files, overwrite=force, progress=show)
        lines = [] if files else list(lifetime_lines(file, chosen, limit, show))
    for line in made:
        _say(f"pfntrace: {line}")
    _out_all(lines)


@app.command()
def diff(
    before: Annotated[Path, _argument("A", "A trace, say before a patch.")],
    after: Annotated[Path, _argument("B", "Another, say after it.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compare two traces: faults, page classes, mappings, anomalies, latency."""
    from analysis.diff import compare, diff_json
    from analysis.diffwords import diff_lines

    with progress_bar("comparing") as progress:
        found = compare(before, after, progress)
    if as_json:
        _out(json.dumps(diff_json(found), indent=2))
        return
    _out_all(diff_lines(found))


@app.command()
def export(
    file: _Trace,
    form: Annotated[str, typer.Option("--format", metavar="F", help="parquet, csv or perfetto.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="PATH", help="See above.")],
    table: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Only this table; repeatable.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite what is there.")] = False,
) -> None:
    """Write a trace as tables or for Perfetto's UI (ui.perfetto.dev).

    parquet and csv: with one --table PATH is its file, else a folder that gets a file for each
    table (docs/TABLES.md). perfetto: PATH is the file.
    """
    from analysis.export import export as export_trace
    from tracer.describe import verdict_line

    with progress_bar("exporting") as progress:
        files, facts = export_trace(
            file, form, output, table or (), overwrite=force, progress=progress
        )
    _say(f"pfntrace: {verdict_line(facts)}")
    for made in files:
        left = f" ({made.left_out:,} of impossible times left out)" if made.left_out else ""
        _say(f"pfntrace: wrote {made.path}: {made.rows:,} rows{left}")


@app.command()
def merge(
    parts: Annotated[list[Path], _argument("PART…", "Traces.")],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The new trace.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
) -> None:
    """Make one trace of several: parts of a recording, recordings of one host or of several.

    VM numbers of different recordings are kept apart, losses are added up, every note and the
    description say which part they are of (pfntrace info).
    """
    from tracer.merge import merge as merge_traces
    from tracer.merge import merged_lines

    with progress_bar("merging") as progress:
        told = merge_traces(
            parts,
            output,
            version=VERSION,
            argv=sys.argv[1:],
            overwrite=force,
            progress=progress,
        )
    for line in merged_lines(told, output):
        _say(f"pfntrace: {line}")


@app.command()
def simulate(
    kernel: Annotated[str, typer.Option(metavar="GEN", help="A generation of --list.")] = "6.12",
    scenario: Annotated[
        str, typer.Option(metavar="NAME|FILE", help="A scenario of --list, or a TOML file.")
    ] = "demand",
    bug: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=RATE]", help="Plant this bug; repeatable.")
    ] = None,
    vcpus: Annotated[int, typer.Option(metavar="N", min=1, help="vCPUs.")] = 2,
    mem: Annotated[str, typer.Option(metavar="SIZE", help="Guest memory, 64M or 1G.")] = "16M",
    faults: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Accesses  [default: one a page]")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="S", min=0, help="One seed, one trace.")] = 1,
    mmu: Annotated[str, typer.Option(help="tdp or shadow  [default: the scenario's]")] = "",
    hostile: Annotated[
        list[str] | None, typer.Option(metavar="HOW[=AMOUNT]", help="loss, skew, …; repeatable.")
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite FILE.")] = False,
    listed: Annotated[bool, typer.Option("--list", help="Say what there is, and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Make the trace of a kernel without a kernel, and the truth beside it (Parquet)."""
    from tracer.simulator import wording

    if listed:
        _out_all(wording.catalogue_lines(as_json=as_json))
        return
    knobs = wording.knobs_of(kernel, scenario, bug, vcpus, mem, faults, seed, mmu, hostile, output)
    for line in wording.knob_lines(knobs):
        _say(f"pfntrace: {line}")
    with progress_bar("simulating") as show:
        outcome = wording.run(knobs, output, VERSION, force, show)
    for line in wording.outcome_lines(outcome, knobs.bugs) if not as_json else ():
        _say(f"pfntrace: {line}")
    _out_all([wording.outcome_json(knobs, outcome)] if as_json else ())


@app.command()
def replay(
    file: _Trace,
    other: Annotated[
        str, typer.Option("--as", metavar="GEN", help="What would this kernel have done?")
    ] = "",
    model: Annotated[
        str,
        typer.Option("--model", metavar="GEN", help="The model  [default: the trace's kernel]"),
    ] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Ask whether a recording does what the model of its kernel does, record by record.

    Exit status 1 at the first record that it does not explain, or if the recording has no end. v9
    as mailed and v8 without TDP are held against the right put; --model v9-mailed explains its bug.
    """
    from tracer.simulator.replay import conform, replay_lines

    with progress_bar("replaying") as show:
        answer = conform(file, model=model, other=other, progress=show)
    _out_all([json.dumps(answer.to_json(), indent=2)] if as_json else replay_lines(answer))
    raise typer.Exit(0 if answer.conforms else 1)


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
