"""One QEMU guest: its command line, its ports, its end.

All that is peculiar to QEMU is in ``Qemu``; ``Guest`` runs one, pumps its output and says how it
ended. A guest that ends in any other way than its own `done` raises GuestLost.
Imports ``cache`` and ``errors``.
"""

from __future__ import annotations

import contextlib
import re
import selectors
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import GuestLost, LabError

__all__ = ("Disk", "Guest", "Qemu", "console_tail", "why_lost")

BOOT_TIMEOUT_S = 180.0
# What a guest gets, after its time is over, to stop the command and write /out.
STOP_TIMEOUT_S = 30.0
CONSOLE_TAIL_LINES = 40
READ_BYTES = 65536

# How a dying kernel says it, the most telling first.
_LAST_WORDS = (
    re.compile(r"Kernel panic - not syncing: .*"),
    re.compile(r"(?:BUG: |Oops: |general protection fault).*"),
    re.compile(r"watchdog: .*"),
    re.compile(r"lab: initramfs: .*"),
    re.compile(r"lab: no (?:port|disk) .*"),
)


def console_tail(console: str, lines: int = CONSOLE_TAIL_LINES) -> str:
    """Return what of a *console* tells most about its end: *lines* lines at most.

    They begin with the kernel's last words, if it spoke any, else they are the last ones. Terminal
    control sequences are left out.
    """
    clean = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1bc|\r", "", console)
    kept = [line for line in clean.splitlines() if line.strip()]
    for number, line in enumerate(kept):
        if any(pattern.search(line) for pattern in _LAST_WORDS):
            return "\n".join(kept[number : number + lines])
    return "\n".join(kept[-lines:])


def why_lost(console: str, fallback: str) -> str:
    """Return the reason that a *console* gives for the guest's end, or *fallback*."""
    for pattern in _LAST_WORDS:
        found = pattern.search(console)
        if found:
            return f"{found.group().strip()} ({fallback})"
    return fallback


@dataclass(frozen=True, slots=True)
class Disk:
    """A raw disk image; the guest knows it by its *serial*."""

    serial: str
    image: Path
    keep: bool = False
    """Whether what the guest writes stays in the image (else it goes with the guest)."""


@dataclass(frozen=True, slots=True)
class Qemu:
    """What a guest is made of, and how QEMU wants to hear it."""

    vmlinuz: Path
    initrd: Path
    disks: tuple[Disk, ...]
    smp: int
    mem: str
    append: str
    device: str | None = None

    def command(self, console: Path, ports: dict[str, int]) -> list[str]:
        """Return QEMU's command line; *ports* maps port names to inherited socket fds."""
        # thread=single: with more threads QEMU 7.2 loses a race when the kernel patches its own
        # text, and the guest dies with "Oops: int3".
        words = ["qemu-system-x86_64", "-accel", "tcg,thread=single", "-cpu", "max"]
        words += ["-smp", str(self.smp), "-m", self.mem, "-nodefaults", "-no-user-config"]
        words += ["-display", "none", "-no-reboot", "-nic", "none"]
        words += ["-vga", "none"]
        if self.device:
            words += ["-device", self.device]
        words += ["-kernel", str(self.vmlinuz), "-initrd", str(self.initrd)]
        words += ["-append", self.append]
        words += ["-chardev", f"file,id=console,path={_escape(console)}"]
        words += ["-serial", "chardev:console"]
        for disk in self.disks:
            snapshot = "off" if disk.keep else "on"
            words += ["-drive", f"file={_escape(disk.image)},format=raw,if=none,id={disk.serial},"]
            words[-1] += f"cache=unsafe,snapshot={snapshot}"
            words += ["-device", f"virtio-blk-pci,drive={disk.serial},serial={disk.serial}"]
        words += ["-device", "virtio-serial-pci"]
        for name, fd in ports.items():
            words += ["-chardev", f"socket,id={name},fd={fd}"]
            words += ["-device", f"virtserialport,chardev={name},name=lab.{name}"]
        return words


# QEMU separates options by commas, and takes a doubled one as itself.
def _escape(path: Path) -> str:
    return str(path).replace(",", ",,")


class Guest:
    """A running guest: ``Guest(qemu, console)``, then ``run`` once, inside ``with``."""

    def __init__(self, qemu: Qemu, console: Path) -> None:
        self._qemu = qemu
        self._console = console
        self._errors = console.with_name(f"{console.name}.qemu")
        self._sockets: dict[str, socket.socket] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._messages = b""
        self._phase, self._deadline = "boot", 0.0
        self.boot_s = 0.0

    def __enter__(self) -> Guest:
        """Start QEMU."""
        if not shutil.which("qemu-system-x86_64"):
            raise LabError("qemu-system-x86_64 is not installed: run `tests/lab/lab build`")
        theirs: list[socket.socket] = []
        try:
            ports = {}
            for name in ("control", "stdout", "stderr"):
                ours, other = socket.socketpair()
                self._sockets[name] = ours
                theirs.append(other)
                ports[name] = other.fileno()
            self._console.touch()
            with self._errors.open("wb") as errors:
                self._process = subprocess.Popen(
                    self._qemu.command(self._console, ports),
                    pass_fds=list(ports.values()),
                    stdin=subprocess.DEVNULL,
                    stdout=errors,
                    stderr=errors,
                    start_new_session=True,
                )
        finally:
            for other in theirs:
                other.close()
        return self

    def __exit__(self, *_: object) -> None:
        """End QEMU, whatever it does: its disks are snapshots, or already written."""
        if self._process:
            self._process.kill()
            self._process.wait()
        for ours in self._sockets.values():
            ours.close()

    def run(self, sink: Callable[[str, bytes], None], timeout_s: float) -> int:
        """Pump the guest's output into *sink* (``stdout`` or ``stderr``, bytes) to its end.

        Returns the command's exit status. Raises GuestLost when the guest dies, does not come up
        in time, or is still at it after *timeout_s* (then the command is stopped first, so that
        /out is whole).
        """
        begun = time.monotonic()
        self._enter("boot", BOOT_TIMEOUT_S)
        status: int | None = None
        for name, data in self._events():
            if name in ("stdout", "stderr"):
                sink(name, data)
            elif name == "timeout" and self._phase == "command":
                self._enter("stop", STOP_TIMEOUT_S)
                self._send(b"stop\n")
            elif name in ("timeout", "gone"):
                raise self._lost(name, timeout_s)
            for message in self._split(data) if name == "control" else ():
                if message == "ready":
                    self.boot_s = time.monotonic() - begun
                    self._enter("command", timeout_s)
                elif message.startswith("exit ") and self._phase == "command":
                    status = int(message[5:])
                    self._enter("end", STOP_TIMEOUT_S)
                elif message == "done":
                    self._drain(sink)
                    if status is None:
                        raise self._lost("timeout", timeout_s)
                    return status
        raise AssertionError("the events of a guest have no end")

    def _enter(self, phase: str, limit_s: float) -> None:
        self._phase, self._deadline = phase, time.monotonic() + limit_s

    # Yield (port, data) as they come, ("timeout", b"") after the deadline, ("gone", b"") when QEMU
    # is: only then has everything it wrote been read.
    def _events(self) -> Iterator[tuple[str, bytes]]:
        with contextlib.closing(selectors.DefaultSelector()) as selector:
            for name, ours in self._sockets.items():
                selector.register(ours, selectors.EVENT_READ, name)
            while selector.get_map():
                left = self._deadline - time.monotonic()
                if left <= 0:
                    yield "timeout", b""
                    continue
                for key, _ in selector.select(left):
                    data = _receive(self._sockets[key.data])
                    if data:
                        yield key.data, data
                    else:
                        selector.unregister(key.fileobj)
        yield "gone", b""

    def _split(self, data: bytes) -> list[str]:
        *lines, self._messages = (self._messages + data).split(b"\n")
        return [line.decode(errors="replace").strip() for line in lines]

    # What is still in the sockets when the guest has said `done`.
    def _drain(self, sink: Callable[[str, bytes], None]) -> None:
        for name in ("stdout", "stderr"):
            self._sockets[name].setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while data := _receive(self._sockets[name]):
                    sink(name, data)

    def _send(self, message: bytes) -> None:
        with contextlib.suppress(OSError):
            self._sockets["control"].sendall(message)

    def _lost(self, event: str, timeout_s: float) -> GuestLost:
        console = self._console.read_text(errors="replace")
        if event == "gone":
            assert self._process is not None
            said = self._errors.read_text(errors="replace").strip().splitlines()[-1:]
            why = f"QEMU ended with status {self._process.wait()} in phase {self._phase!r}"
            why += f": {said[0]}" if said else ""
        elif self._phase == "boot":
            why = f"no sign of life {BOOT_TIMEOUT_S:.0f} s after the start"
        elif self._phase == "end":
            why = f"the command ended, the guest did not within {STOP_TIMEOUT_S:.0f} s"
        else:
            why = f"the command was still running after {timeout_s:g} s"
        return GuestLost(why_lost(console, why), console_tail(console))


# b"" when the other end is gone.
def _receive(port: socket.socket) -> bytes:
    try:
        return port.recv(READ_BYTES)
    except ConnectionResetError:
        return b""
