"""The guest's disks: one root file system for all kernels, and per kernel its modules and initrd.

The root is Debian trixie with what pfntrace needs and *no kernel headers*: that pfntrace works
without them is one of the things that the lab shows. Python is slow under emulation, so everything
importable is byte-compiled here, at native speed, by the guest's own Python run from the tree.
Imports ``cache``, ``host``, ``kernels`` and ``errors``.
"""

from __future__ import annotations

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from . import host
from .cache import ensure, sources
from .errors import LabError
from .kernels import LabKernel

__all__ = ("HERE", "HOST_TOOLS", "byte_compile", "initrd", "kernel_files", "make_image", "root")

HERE = Path(__file__).resolve().parent
HOST_TOOLS = {
    "mmdebstrap": "mmdebstrap",
    "mke2fs": "e2fsprogs",
    "depmod": "kmod",
    "cpio": "cpio",
    "xz": "xz-utils",
}

ROOT_SUITE = "trixie"
ROOT_PACKAGES = (
    "bpftool bpftrace iproute2 kmod mount procps python3 python3-bpfcc trace-cmd util-linux"
).split()
ROOT_WITHOUT = ("/usr/share/man/*", "/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/info/*")
HEADER_PACKAGES = ("linux-headers-", "linux-kbuild-", "linux-libc-dev")

# What `pip` installs for the guest: record needs numpy and pyarrow, reports need pandas.
PYTHON_PACKAGES = ("numpy", "pandas", "pyarrow", "rich", "typer")
PYTHON_VERSION = "3.13"
PYTHON_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
COMPILERS = 2
PYTHON_PLACE = "opt/pfntrace/py"

# What reaches the disks. modprobe adds what these need.
INITRD_MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "ext4")


def make_image(tree: Path, image: Path, *, slack_mib: int = 16, label: str = "lab") -> None:
    """Write the folder *tree* into a new ext4 *image* with *slack_mib* of free space."""
    entries = list(tree.rglob("*"))
    size = sum(
        -(-path.lstat().st_size // 4096) * 4096
        for path in entries
        if path.is_file() and not path.is_symlink()
    )
    size += len(entries) * 768
    mib = int(size / 1024**2 * 1.06) + slack_mib
    host.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-O", "^has_journal,^metadata_csum", "-m", "0", "-N"]
        + [str(len(entries) + 64 * slack_mib), "-L", label, "-E", "lazy_itable_init=1", "-d"]
        + [str(tree), str(image), f"{mib}M"]
    )


def byte_compile(tree: Path, folder: Path, place: str) -> None:
    """Byte-compile *folder* with the Python of the root *tree*; *place* is its path in the guest.

    The compiled files are never checked against the sources again, so a read-only disk will do.
    """
    libraries = tree / "usr/lib/x86_64-linux-gnu"
    command = [str(libraries / "ld-linux-x86-64.so.2"), "--library-path", str(libraries)]
    command += [str(tree / f"usr/bin/python{PYTHON_VERSION}"), "-S", "-s", "-m", "compileall"]
    command += ["-qq", "--invalidation-mode", "unchecked-hash", "-s", str(folder), "-p", place]
    files = sorted(str(path) for path in folder.rglob("*.py"))
    shares = [files[start::COMPILERS] for start in range(COMPILERS)]

    def compile_share(share: list[str]) -> None:
        text = "".join(f"{name}\n" for name in share)
        # Status 1 is a file that does not compile: test data of some package, or a file that the
        # run is going to complain about better than we can.
        run = [*command, "-i", "-"]
        host.run(run, env={"PYTHONHOME": str(tree / "usr")}, stdin=text, allowed=(0, 1))

    with ThreadPoolExecutor(max_workers=COMPILERS) as pool:
        list(pool.map(compile_share, filter(None, shares)))


def root() -> Path:
    """Return the piece with ``tree/`` and ``root.ext4``, building it if it is missing."""
    recipe = {
        "suite": ROOT_SUITE,
        "packages": ROOT_PACKAGES,
        "without": ROOT_WITHOUT,
        "python": (PYTHON_PACKAGES, PYTHON_VERSION, PYTHON_PLATFORMS, PYTHON_PLACE),
        "code": sources(_build_root, _debian_tree, _python_packages, make_image, byte_compile),
    }
    return ensure("root", recipe, _build_root)


def _build_root(work: Path) -> None:
    tree, wheels = work / "tree", work / "wheels"
    failures: list[BaseException] = []

    def install_python() -> None:
        try:
            _python_packages(wheels)
        except BaseException as error:  # handed to the caller's thread below
            failures.append(error)

    second = threading.Thread(target=install_python)
    second.start()
    try:
        _debian_tree(tree)
    finally:
        second.join()
    if failures:
        raise failures[0]
    target = tree / PYTHON_PLACE
    target.parent.mkdir(parents=True)
    wheels.rename(target)
    for folder in (target, tree / "usr/lib/python3/dist-packages"):
        byte_compile(tree, folder, f"/{folder.relative_to(tree)}")
    for place in ("lab", "out", "project", "opt/lab"):
        (tree / place).mkdir(parents=True)
    (tree / "etc/hostname").write_text("lab\n")
    (tree / "usr/local/bin/pfntrace").symlink_to("/lab/bin/pfntrace")
    make_image(tree, work / "root.ext4", slack_mib=512)


def _debian_tree(tree: Path) -> None:
    archive = tree.parent / "root.tar"
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(ROOT_PACKAGES)}"]
    command += ['--aptopt=Acquire::Languages "none"']
    command += [f"--dpkgopt=path-exclude={pattern}" for pattern in ROOT_WITHOUT]
    host.run([*command, ROOT_SUITE, str(archive), "-"], stdin=host.apt_sources(ROOT_SUITE))
    tree.mkdir()
    host.run(["tar", "-xf", str(archive), "-C", str(tree), "--exclude=./dev/*"])
    archive.unlink()
    status = (tree / "var/lib/dpkg/status").read_text()
    for name in HEADER_PACKAGES:
        if f"\nPackage: {name}" in status:
            raise LabError(f"the guest's root got {name}: take out of ROOT_PACKAGES what wants it")


def _python_packages(target: Path) -> None:
    command = [*host.pip_command(), "install", "--quiet", "--target", str(target)]
    command += ["--python-version", PYTHON_VERSION, "--implementation", "cp"]
    command += ["--only-binary=:all:", "--no-compile", "--root-user-action=ignore"]
    for platform in PYTHON_PLATFORMS:
        command += ["--platform", platform]
    host.run([*command, *PYTHON_PACKAGES])
    for tests in [path for path in target.rglob("tests") if path.is_dir()]:
        shutil.rmtree(tests, ignore_errors=True)


def kernel_files(kernel: LabKernel) -> Path:
    """Return the piece with ``vmlinuz`` and ``modules.ext4`` of a kernel."""
    recipe = {
        "kernel": (kernel.suite, kernel.package),
        "initrd": INITRD_MODULES,
        "code": sources(_build_kernel, _initrd_modules, make_image),
    }
    return ensure(f"kernel-{kernel.key}", recipe, lambda work: _build_kernel(kernel, work))


def _build_kernel(kernel: LabKernel, work: Path) -> None:
    packages = host.kernel_packages(kernel.package, kernel.suite)
    unpacked = work / "unpacked"
    for package in host.download(packages, work / "debs"):
        host.run(["dpkg-deb", "-x", str(package), str(unpacked)])
    found = [*unpacked.glob("lib/modules/*"), *unpacked.glob("usr/lib/modules/*")]
    if len(found) != 1 or not found[0].name.startswith(f"{kernel.key}."):
        names = ", ".join(path.name for path in found) or "none"
        raise LabError(
            f"{kernel.suite} has kernel {names}, not {kernel.key}: update KERNELS in kernels.py"
        )
    release = found[0].name
    images = [*unpacked.glob(f"boot/vmlinuz-{release}"), found[0] / "vmlinuz"]
    shutil.move(images[0], work / "vmlinuz")
    # depmod and modprobe of Debian 12 look below lib/, newer ones below usr/lib/: offer both.
    modules = work / "tree/lib/modules" / release
    modules.parent.mkdir(parents=True)
    found[0].rename(modules)
    (work / "tree/usr").mkdir()
    (work / "tree/usr/lib").symlink_to("../lib")
    for link in ("build", "source"):
        (modules / link).unlink(missing_ok=True)
    base = str(work / "tree")
    # The guest would take seconds to unpack kvm.ko, and depmod here more for all of them.
    packed = "".join(f"{path}\0" for path in modules.rglob("*.ko.xz"))
    host.run(["xargs", "-0r", "-P", "2", "-n", "100", "xz", "-d"], stdin=packed)
    host.run(["depmod", "-b", base, release])
    for config in unpacked.glob(f"boot/config-{release}"):
        shutil.move(config, modules / "config")
    _initrd_modules(work / "tree", release, work / "initrd-modules")
    make_image(modules, work / "modules.ext4", slack_mib=64)
    (work / "release").write_text(release)
    for leftover in ("unpacked", "debs", "tree"):
        shutil.rmtree(work / leftover)


# Copy what INITRD_MODULES need, and write the order in which to load them.
def _initrd_modules(tree: Path, release: str, target: Path) -> None:
    target.mkdir()
    order: list[str] = []
    for module in INITRD_MODULES:
        shown = host.run(["modprobe", "-d", str(tree), "-S", release, "--show-depends", module])
        for line in shown.splitlines():
            kind, _, rest = line.partition(" ")
            path = Path(rest.strip())
            if kind == "insmod" and path.name not in order:
                order.append(path.name)
                shutil.copy2(path, target / path.name)
    (target / "order").write_text("".join(f"{name}\n" for name in order))


def initrd(kernel: LabKernel) -> Path:
    """Return the piece with the ``initrd`` of a kernel: busybox, a script and four modules."""
    script = (HERE / "guest/initramfs.sh").read_text()
    files = kernel_files(kernel)
    recipe = {
        "kernel": files.name,
        "script": script,
        "code": sources(_build_initrd),
    }
    name = f"initrd-{kernel.key}"
    return ensure(name, recipe, lambda work: _build_initrd(files, script, work))


def _build_initrd(files: Path, script: str, work: Path) -> None:
    tree = work / "tree"
    for folder in ("bin", "new", "proc", "sys", "dev"):
        (tree / folder).mkdir(parents=True)
    shutil.copytree(files / "initrd-modules", tree / "modules")
    (package,) = host.download(["busybox-static"], work / "debs")
    host.run(["dpkg-deb", "-x", str(package), str(work / "debs/x")])
    shutil.copy2(next((work / "debs/x").rglob("bin/busybox")), tree / "bin/busybox")
    (tree / "init").write_text(script)
    (tree / "init").chmod(0o755)
    names = "".join(f"{path.relative_to(tree)}\n" for path in sorted(tree.rglob("*")))
    host.run(
        ["cpio", "--quiet", "-o", "-H", "newc", "-O", str(work / "initrd")], cwd=tree, stdin=names
    )
    shutil.rmtree(tree)
    shutil.rmtree(work / "debs")
