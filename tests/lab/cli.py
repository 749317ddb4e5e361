"""The command line of the lab. Parses, calls one function, maps errors to exit statuses."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from .cache import progress
from .errors import GuestLost, LabError
from .kernels import KERNELS
from .run import DEVICES, RunOptions, build, run_in_lab

__all__ = ("main", "parse")

INTERRUPTED = 130


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the command line; ``command`` is what comes after ``--``."""
    arguments = list(arguments)
    command: list[str] = []
    if "--" in arguments:
        split = arguments.index("--")
        arguments, command = arguments[:split], arguments[split + 1 :]
    parser = argparse.ArgumentParser(
        prog="lab",
        description="Boot real kernels with real KVM under emulation.",
        epilog="exit status of run: the command's; 125 the guest was lost; 123 the lab failed.",
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    builds = verbs.add_parser("build", help="build what is missing")
    builds.add_argument("--kernel", choices=tuple(KERNELS), help="only what this kernel needs")
    runs = verbs.add_parser("run", help="run COMMAND in a guest", usage=_RUN_USAGE)
    runs.add_argument("--kernel", choices=tuple(KERNELS), required=True)
    runs.add_argument("--out", type=Path, required=True, help="gets what COMMAND left in /out")
    runs.add_argument("--kvm", metavar="NAME", help="a changed KVM of tests/lab/kvm")
    runs.add_argument("--module", metavar="NAME", help="a kernel module of tests/lab/modules")
    runs.add_argument("--npt", choices=("on", "off"), help="nested paging; off: the shadow MMU")
    runs.add_argument("--no-kvm", action="store_true", help="do not load kvm_amd")
    runs.add_argument("--device", choices=DEVICES, help="a graphics device and its driver")
    runs.add_argument("--smp", type=int, default=RunOptions().smp, help="processors")
    runs.add_argument("--mem", default=RunOptions().mem, help="memory, as QEMU's -m")
    runs.add_argument("--append", default="", metavar="ARGS", help="more kernel arguments")
    runs.add_argument(
        "--timeout", type=float, default=RunOptions().timeout_s, metavar="S", help="for COMMAND"
    )
    parsed = parser.parse_args(arguments)
    parsed.command = command
    if parsed.verb == "run" and not command:
        runs.error("no command: give it after --")
    if parsed.verb == "build" and command:
        builds.error("build takes no command")
    return parsed


_RUN_USAGE = "lab run --kernel V --out DIR [OPTION…] -- COMMAND…"


def main(arguments: Sequence[str]) -> int:
    """Run the lab's command line and return its exit status."""
    parsed = parse(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if parsed.verb == "build":
            build([parsed.kernel] if parsed.kernel else list(KERNELS))
            progress("everything is built")
            return 0
        return _run(parsed)
    except GuestLost as error:
        if error.console:
            print(f"--- console\n{error.console}\n---", file=sys.stderr)
        print(f"lab: {error}", file=sys.stderr)
        return error.exit_status
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:
        print("lab: nobody reads our output any more: stopped", file=sys.stderr)
        return LabError.exit_status
    except KeyboardInterrupt:
        print("lab: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(parsed: argparse.Namespace) -> int:
    options = RunOptions(
        npt=parsed.npt,
        kvm=parsed.kvm,
        module=parsed.module,
        load_kvm=not parsed.no_kvm,
        device=parsed.device,
        smp=parsed.smp,
        mem=parsed.mem,
        timeout_s=parsed.timeout,
        append=parsed.append,
    )
    result = run_in_lab(
        parsed.command,
        kernel=parsed.kernel,
        out=parsed.out,
        options=options,
        stdout=_writer(1),
        stderr=_writer(2),
    )
    return result.status


# Writes at once and whole, to the file descriptor itself: the guest's output is bytes.
def _writer(fd: int) -> Callable[[bytes], None]:
    def write(data: bytes) -> None:
        while data:
            data = data[os.write(fd, data) :]

    return write
