"""Run one command in a lab guest: stage the working tree, boot, bring back what it left.

Imports the lab's other modules. Never touches the host kernel: only QEMU runs here.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from . import host, kvmbuild, rootfs, workloads
from .cache import cache_dir
from .errors import LabError
from .kernels import LabKernel, kernel
from .kvmchange import load_change
from .vm import Disk, Guest, Qemu

__all__ = ("DEVICES", "LabResult", "Pieces", "RunOptions", "build", "run_in_lab", "stage_project")

PROJECT = rootfs.HERE.parent.parent
OUT_SIZE = "8G"
KERNEL_ARGUMENTS = (
    "console=ttyS0 quiet panic=-1 oops=panic mitigations=off tsc=reliable "
    "no_timer_check nowatchdog random.trust_cpu=on"
)
BUILD_TOOLS = {**rootfs.HOST_TOOLS, **workloads.HOST_TOOLS, "qemu-system-x86_64": "qemu-system-x86"}
RUN_TOOLS = {"git": "git", "mke2fs": "e2fsprogs", "qemu-system-x86_64": "qemu-system-x86"}
DEVICES = ("qxl",)
NPT_PARAMETER = {"on": "1", "off": "0", None: ""}
# A changed KVM may log a line for each of thousands of times that its bug happened.
CHANGED_KVM_ARGUMENTS = "log_buf_len=16M"


@dataclass(frozen=True, slots=True)
class RunOptions:
    """What a run may change about its guest."""

    npt: str | None = None
    """``on``, ``off`` (the shadow MMU), or None for KVM's own choice, which is on."""
    kvm: str | None = None
    """A changed KVM of tests/lab/kvm/, or None for Debian's."""
    module: str | None = None
    """A kernel module of tests/lab/modules/ to load, or None."""
    load_kvm: bool = True
    device: str | None = None
    smp: int = 2
    mem: str = "3G"
    timeout_s: float = 600.0
    """For the command; booting has its own limit."""
    append: str = ""


@dataclass(frozen=True, slots=True)
class LabResult:
    """What a command did in the lab; what it left in /out is in ``out``."""

    status: int
    stdout: str
    stderr: str
    console: str
    out: Path
    boot_s: float
    total_s: float


@dataclass(frozen=True, slots=True)
class Pieces:
    """The built folders that a guest with one kernel is made of."""

    root: Path
    kernel: Path
    initrd: Path
    workloads: Path


@dataclass(slots=True)
class _Capture:
    sinks: dict[str, Callable[[bytes], None]] = field(default_factory=dict)
    data: dict[str, list[bytes]] = field(default_factory=lambda: {"stdout": [], "stderr": []})

    def take(self, name: str, data: bytes) -> None:
        if name in self.sinks:
            self.sinks[name](data)
        else:
            self.data[name].append(data)

    def text(self, name: str) -> str:
        return b"".join(self.data[name]).decode(errors="replace")


def build(keys: Sequence[str]) -> dict[str, Pieces]:
    """Build what is missing for the kernels *keys*, and return all their pieces."""
    chosen = [kernel(key) for key in keys]
    host.install_missing(BUILD_TOOLS)

    def of_kernel(entry: LabKernel) -> tuple[Path, Path]:
        return rootfs.kernel_files(entry), rootfs.initrd(entry)

    with ThreadPoolExecutor(max_workers=3) as pool:
        root = pool.submit(rootfs.root)
        programs = pool.submit(workloads.workloads)
        kernels = {entry.key: pool.submit(of_kernel, entry) for entry in chosen}
        return {
            key: Pieces(root.result(), *future.result(), programs.result())
            for key, future in kernels.items()
        }


def run_in_lab(
    command: Sequence[str],
    *,
    kernel: str,
    out: Path,
    options: RunOptions | None = None,
    stdout: Callable[[bytes], None] | None = None,
    stderr: Callable[[bytes], None] | None = None,
) -> LabResult:
    """Run *command* as root in a guest with the lab kernel *kernel*.

    What the command leaves in /out, its working directory, is copied to *out*, also when it fails;
    the console goes to ``lab-console.log`` there. Output goes to *stdout* and *stderr* as it
    comes if they are given, else into the result. Raises GuestLost when there is no exit status
    to return, LabError when the lab could not even try.
    """
    options = options or RunOptions()
    _check(options)
    begun = time.monotonic()
    pieces = build([kernel])[kernel]
    changed, driver = _changed_kvm(kernel, options), _driver(kernel, options)
    given = {"stdout": stdout, "stderr": stderr}
    capture = _Capture({name: sink for name, sink in given.items() if sink})
    out.mkdir(parents=True, exist_ok=True)
    with _run_dir() as work:
        project = stage_project(work / "stage/project", pieces.root)
        _write_options(project.parent, command, options)
        if changed:
            shutil.copytree(changed, project.parent / "kvm")
        if driver:
            shutil.copytree(driver, project.parent / "modules")
        rootfs.make_image(project.parent, work / "run.ext4", slack_mib=4)
        host.run(["mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", str(work / "out.ext4"), OUT_SIZE])
        guest = Guest(_qemu(kernel, pieces, work, options), work / "console")
        try:
            with guest:
                status = guest.run(capture.take, options.timeout_s)
        finally:
            _collect(work, out)
        console = (work / "console").read_text(errors="replace")
    total_s = time.monotonic() - begun
    texts = capture.text("stdout"), capture.text("stderr")
    return LabResult(status, *texts, console, out, guest.boot_s, total_s)


def _check(options: RunOptions) -> None:
    if options.kvm is not None:
        load_change(options.kvm)
        if not options.load_kvm:
            raise LabError("a changed KVM that is not loaded changes nothing")
    if options.device not in (None, *DEVICES):
        raise LabError(f"no device {options.device!r}: the lab knows {', '.join(DEVICES)}")
    if options.module not in (None, *kvmbuild.driver_names()):
        known = ", ".join(kvmbuild.driver_names())
        raise LabError(f"no module {options.module!r} in tests/lab/modules; available: {known}")
    if options.npt not in NPT_PARAMETER:
        raise LabError(f"npt is on or off, not {options.npt!r}")


def _changed_kvm(key: str, options: RunOptions) -> Path | None:
    if options.kvm is None:
        return None
    return kvmbuild.changed_kvm(kernel(key), load_change(options.kvm))


def _driver(key: str, options: RunOptions) -> Path | None:
    if options.module is None:
        return None
    return kvmbuild.driver(kernel(key), options.module)


# A run's own folder. Those of runs that were killed are removed by the next one.
@contextlib.contextmanager
def _run_dir() -> Iterator[Path]:
    for old in cache_dir().glob("run-*-*"):
        if not Path("/proc", old.name.split("-")[1]).exists():
            shutil.rmtree(old, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f"run-{os.getpid()}-", dir=cache_dir()))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def stage_project(target: Path, root: Path) -> Path:
    """Copy the working tree, as git sees it, to *target* and byte-compile it for the guest."""
    listed = host.run(
        ["git", "-c", "safe.directory=*", "ls-files", "-z", "--cached", "--others"]
        + ["--exclude-standard"],
        cwd=PROJECT,
    )
    target.mkdir(parents=True)
    for name in filter(None, listed.split("\0")):
        source = PROJECT / name
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        # What is deleted and not committed yet is listed as well; folders are submodules.
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):
            shutil.copy2(source, target / name, follow_symlinks=False)
    rootfs.byte_compile(root / "tree", target, "/project")
    return target


def _write_options(stage: Path, command: Sequence[str], options: RunOptions) -> None:
    lines = [
        f"LAB_KVM={int(options.load_kvm)}",
        f"LAB_NPT={NPT_PARAMETER[options.npt]}",
        f"LAB_DEVICE={options.device or ''}",
    ]
    (stage / "options").write_text("".join(f"{line}\n" for line in lines))
    (stage / "command.sh").write_text(f"exec {shlex.join(command)}\n")
    shutil.copy2(rootfs.HERE / "guest/init.sh", stage / "init.sh")
    shutil.copytree(rootfs.HERE / "guest/bin", stage / "bin")


def _qemu(key: str, pieces: Pieces, work: Path, options: RunOptions) -> Qemu:
    disks = (
        Disk("root", pieces.root / "root.ext4"),
        Disk("modules", pieces.kernel / "modules.ext4"),
        Disk("workloads", pieces.workloads / "workloads.ext4"),
        Disk("run", work / "run.ext4"),
        Disk("out", work / "out.ext4", keep=True),
    )
    changed = [CHANGED_KVM_ARGUMENTS] if options.kvm else []
    append = " ".join([KERNEL_ARGUMENTS, *kernel(key).append, *changed, options.append])
    return Qemu(
        vmlinuz=pieces.kernel / "vmlinuz",
        initrd=pieces.initrd / "initrd",
        disks=disks,
        smp=options.smp,
        mem=options.mem,
        append=append.strip(),
        device=options.device,
    )


# Copy out whatever the guest wrote, from its disk: this works after a panic as well. A disk that
# was not unmounted gets its journal replayed first.
def _collect(work: Path, out: Path) -> None:
    with contextlib.suppress(OSError):
        shutil.copy2(work / "console", out / "lab-console.log")
    image = work / "out.ext4"
    with contextlib.suppress(LabError):
        host.run(["e2fsck", "-p", str(image)])
    host.run(["debugfs", "-R", f'rdump / "{out.absolute()}"', str(image)])
    with contextlib.suppress(OSError):
        (out / "lost+found").rmdir()
