"""From a command line to a finished trace: the order in which `record` does things.

Refusals come first and cheapest: no such command, output not writable, host not able, all before
anything is compiled. May import: `probes`, `tracer`.
"""

import dataclasses
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from probes.errors import HostError, PfntraceError, UsageError
from probes.facts import KernelFacts
from probes.profile import KernelProfile, choose_profile
from tracer.command import Command
from tracer.doctor import examine
from tracer.kernel import Settings
from tracer.observe import observe
from tracer.session import Outcome, Progress, Recorder, RecordOptions, ring_settings
from tracer.schema import SCHEMA_VERSION
from tracer.tracemeta import TraceMeta
from tracer.tracewriter import TraceWriter

__all__ = ("default_output", "record_to")


def default_output(comm: str, pid: int) -> Path:
    """Return `pfntrace-<comm>.<pid>.pfnt` in the current folder."""
    safe = "".join(c if c.isalnum() or c in "._-" else "_" for c in comm) or "vm"
    return Path(f"pfntrace-{safe}.{pid}.pfnt")


def record_to(
    options: RecordOptions,
    command: Sequence[str],
    *,
    output: Path | None,
    attach: str,
    overwrite: bool,
    started: float,
    version: str,
    argv: Sequence[str],
    say: Callable[[str], None],
    show: Callable[[Progress], None] | None,
) -> tuple[Path, Outcome, int]:
    """Record; return the trace's path, how it went, and the command's exit status (0 without one).

    Raises PfntraceError for everything that keeps a recording from starting; then no file is
    left behind.
    """
    for pid in options.pids:
        if not Path(f"/proc/{pid}").exists():
            raise UsageError(f"--vm {pid}: no such process")
    facts = observe()
    examination = examine(facts)
    if not examination.can_record:
        raise HostError(f"cannot record on this host: {examination.first_problem}")
    profile = choose_profile(facts, attach=attach)
    child = Command(command) if command else None
    try:
        path = output or _named_after(options, command, child)
        settings = ring_settings(options, facts.cpus)
        meta = _meta(facts, profile, settings, options, argv, version)
        writer = TraceWriter(path, meta, overwrite=overwrite)
    except BaseException:
        if child is not None:
            child.abandon()
        raise
    _give_to_invoker(path)
    recorder = Recorder(profile, settings, options, writer)
    try:
        recorder.prepare()
    except BaseException:
        recorder.abandon()
        if child is not None:
            child.abandon()
        path.unlink(missing_ok=True)
        raise
    for hook, symbol, why in recorder.failed:
        writer.write_note({"failed": {"hook": hook, "symbol": symbol, "why": why}})
    say(f"pfntrace: recording to {path} (armed after {time.monotonic() - started:.1f} s)"
        + ("" if command else "; Ctrl-C ends it"))  # fmt: skip
    try:
        outcome = recorder.run(child, started, show)
    except PfntraceError:
        recorder.abandon()
        raise
    status = (child.status or 0) if child is not None and outcome.why == "command" else 0
    return path, outcome, status


def _named_after(options: RecordOptions, command: Sequence[str], child: Command | None) -> Path:
    if child is not None:
        return default_output(Path(command[0]).name, child.pid)
    if len(options.pids) == 1:
        comm = Path(f"/proc/{options.pids[0]}/comm").read_text().strip()
        return default_output(comm, options.pids[0])
    return default_output("host", os.getpid())


def _meta(
    facts: KernelFacts,
    profile: KernelProfile,
    settings: Settings,
    options: RecordOptions,
    argv: Sequence[str],
    version: str,
) -> TraceMeta:
    return TraceMeta(
        schema_version=SCHEMA_VERSION,
        pfntrace_version=version,
        command=("pfntrace", *argv),
        start_unix_ns=time.time_ns(),
        start_monotonic_ns=time.monotonic_ns(),
        hostname=platform.node(),
        facts=facts.to_json(),
        profile={
            "generation": profile.generation,
            "hooks": [dataclasses.asdict(h) for h in profile.hooks],
            "missing": [dataclasses.asdict(m) for m in profile.missing],
            "results": {str(k): v for k, v in profile.results.items()},
        },
        settings={**settings._asdict(), **dataclasses.asdict(options)},
    )


def _give_to_invoker(path: Path) -> None:
    """Under sudo the trace belongs to who called sudo."""
    uid, gid = os.environ.get("SUDO_UID"), os.environ.get("SUDO_GID")
    if os.geteuid() == 0 and uid and gid and uid.isdigit() and gid.isdigit():
        os.chown(path, int(uid), int(gid))
