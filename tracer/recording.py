"""From a command line to a finished trace: the order in which `record` does things.

Refusals come first and cheapest: no such command, output not writable, host not able, all before
anything is compiled. May import: `probes`, `tracer`.
"""

import contextlib
import dataclasses
import os
import platform
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from probes.errors import CommandError, HostError, OutputError, UsageError
from probes.facts import KernelFacts
from probes.profile import KernelProfile, choose_profile
from tracer.command import Command
from tracer.doctor import examine
from tracer.kernel import Settings
from tracer.observe import observe
from tracer.schema import SCHEMA_VERSION
from tracer.session import Outcome, Progress, Recorder, RecordOptions, ring_settings
from tracer.tracemeta import TraceMeta
from tracer.tracewriter import TraceWriter

__all__ = ("check_output", "default_output", "process_start", "record_to")


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
    version: str,
    argv: Sequence[str],
    say: Callable[[str], None],
    show: Callable[[Progress], None] | None,
) -> tuple[Path, Outcome, int]:
    """Record; return the trace's path, how it went, and the command's exit status (0 without one).

    Raises PfntraceError for everything that keeps a recording from starting; then no file is
    left behind.
    """
    started = process_start()
    for pid in options.pids:
        if not Path(f"/proc/{pid}").exists():
            raise UsageError(f"--vm {pid}: no such process")
    facts = observe()
    examination = examine(facts)
    if not examination.can_record:
        raise HostError(f"cannot record on this host: {examination.first_problem}")
    profile = choose_profile(facts, attach=attach)
    child = Command(command) if command else None
    settings = ring_settings(options, facts.cpus)
    recorder = Recorder(profile, settings, options)
    try:
        path = output or _named_after(options, command, child)
        check_output(path, overwrite=overwrite)
        recorder.prepare()
        # Created last, so that the trace's clock starts with the recording.
        profile_facts = _profile_facts(profile, recorder.failed)
        meta = _meta(facts, profile_facts, settings, options, argv, version)
        writer = TraceWriter(path, meta, overwrite=overwrite)
        _give_to_invoker(writer.fileno())
    except BaseException:
        recorder.abandon()
        if child is not None:
            child.abandon()
        raise

    def armed(after_s: float) -> None:
        hint = "" if command else "; Ctrl-C ends it"
        say(f"pfntrace: recording to {path} (armed after {after_s:.1f} s){hint}")

    try:
        outcome = recorder.run(writer, child, started, armed, show)
    except BaseException as err:
        recorder.abandon()
        if isinstance(err, CommandError):
            writer.abandon()
            path.unlink(missing_ok=True)
        raise
    status = (child.status or 0) if child is not None and outcome.why == "command" else 0
    return path, outcome, status


def process_start() -> float:
    """Return when this process began, on time.monotonic()'s clock (s)."""
    ticks = int(Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()[19])
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.monotonic() - age


def boot_id(proc: Path = Path("/proc")) -> str:
    """Return the kernel's name of this boot, "" if it tells none.

    Traces of one boot share CLOCK_MONOTONIC and page frames; `tracer.merge` must know.
    """
    try:
        return (proc / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def check_output(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError if the trace could not be created, before anything slow is done."""
    folder = path.parent
    try:
        exists = path.exists()
    except OSError as err:
        raise OutputError(f"{path}: {err.strerror}; choose another name with -o") from err
    if exists and not overwrite:
        raise OutputError(f"{path} exists: choose another name with -o, or overwrite with --force")
    if not folder.is_dir():
        raise OutputError(f"{folder} is not a folder: choose another place with -o")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"{folder} is not writable: choose another place with -o")


def _named_after(options: RecordOptions, command: Sequence[str], child: Command | None) -> Path:
    if child is not None:
        return default_output(Path(command[0]).name, child.pid)
    if len(options.pids) == 1:
        try:
            comm = Path(f"/proc/{options.pids[0]}/comm").read_text(errors="replace").strip()
        except OSError:
            raise UsageError(f"--vm {options.pids[0]}: no such process") from None
        return default_output(comm, options.pids[0])
    return default_output("host", os.getpid())


def _meta(
    facts: KernelFacts,
    profile: dict[str, Any],
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
        profile=profile,
        settings={
            **settings._asdict(),
            **dataclasses.asdict(options),
            "boot_id": boot_id(),
        },
    )


def _profile_facts(
    profile: KernelProfile, failed: Sequence[tuple[str, str, str]]
) -> dict[str, Any]:
    """Return what a reader must know of the hooks: chosen, missing, refused by the kernel."""
    return {
        "generation": profile.generation,
        "hooks": [dataclasses.asdict(h) for h in profile.hooks],
        "missing": [dataclasses.asdict(m) for m in profile.missing],
        "failed": [{"hook": h, "symbol": s, "why": w} for h, s, w in failed],
        "results": {str(k): v for k, v in profile.results.items()},
    }


def _give_to_invoker(fd: int) -> None:
    """Under sudo the trace belongs to who called sudo."""
    uid, gid = os.environ.get("SUDO_UID"), os.environ.get("SUDO_GID")
    if os.geteuid() == 0 and uid and gid and uid.isdigit() and gid.isdigit():
        # Some file systems have no owners: then the file stays root's.
        with contextlib.suppress(OSError):
            os.fchown(fd, int(uid), int(gid))
