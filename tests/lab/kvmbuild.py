"""A changed KVM for a stock kernel: kvm.ko and kvm-amd.ko rebuilt from Debian's own source.

KVM is a module in Debian, so one file of KVM can be changed without building a kernel. The
builder of a kernel is a Debian root with the compiler, the kernel's headers and the part of its
source that is KVM, compiled once without a change (that gives ``.text`` byte for byte as Debian
ships it); a changed KVM is a copy of that part, edited, with only what the edits touch compiled
again.
Imports ``cache``, ``host``, ``kernels``, ``kvmchange``, ``rootfs`` and ``errors``.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

from . import host
from .cache import ensure, sources
from .errors import LabError
from .kernels import LabKernel
from .kvmchange import Change, apply_edits
from .rootfs import HERE, ROOT_SUITE, kernel_files

__all__ = ("KERNELS_WITH_SOURCE", "MODULES", "changed_kvm", "driver", "driver_names", "source")

# 6.1 needs the compiler of another suite: add it here when a bug asks for it.
KERNELS_WITH_SOURCE = ("6.12", "7.3")
MODULES = ("kvm.ko", "kvm-amd.ko")
TOOLS = ("gcc-14", "libc6-dev", "libelf1t64", "libssl3t64", "make", "pahole", "zlib1g")
KVM = "arch/x86/kvm"
SOURCE_PARTS = (
    KVM,
    "virt/kvm",
    "include/linux/kvm_*.h",
    "arch/x86/include/asm/kvm*.h",
)
# Where the source is inside the builder. The path is part of every compile command that kbuild
# remembers: it stays the same so that a copy is not compiled anew.
PLACE = "build"
# Without these the module's BTF is based on a distilled copy of vmlinux's, and bpftool and the
# tracer read types like `bool___2`. Which of the two a kernel knows is its own business.
BTF_FLAGS = ("MODULE_PAHOLE_FLAGS=", "RESOLVE_BTFIDS_FLAGS=")
# The guest only ever loads kvm-amd.
CONFIG = ("CONFIG_KVM_INTEL=",)
PLANTED = HERE / "kvm/planted"
DRIVERS = HERE / "modules"


def changed_kvm(kernel: LabKernel, change: Change) -> Path:
    """Return the piece with ``kvm.ko`` and ``kvm-amd.ko`` of *kernel*, changed by *change*."""
    edits = change.edits_for(kernel.key)
    builder = _builder(kernel)
    tree = _planted_tree(kernel, builder) if change.planted else builder / PLACE
    recipe = {
        "tree": str(tree.relative_to(tree.parent.parent)),
        "edits": [
            [edit.path, edit.function, edit.find, edit.replace, edit.times] for edit in edits
        ],
        "files": change.file_texts(),
        "code": sources(_build_changed, _make, apply_edits),
    }
    name = f"kvm-{kernel.key}-{change.name}"
    return ensure(name, recipe, lambda work: _build_changed(builder, tree, kernel, change, work))


def source(kernel: LabKernel) -> Path:
    """Return the folder with KVM's source of *kernel*, unchanged, as in the kernel's tree."""
    return _builder(kernel) / PLACE


def _build_changed(
    builder: Path, tree: Path, kernel: LabKernel, change: Change, work: Path
) -> None:
    copy = work / "tree"
    shutil.copytree(tree, copy, symlinks=True)
    for place, text in change.file_texts().items():
        (copy / place).write_text(text)
    apply_edits(change.name, change.edits_for(kernel.key), copy)
    _make(builder, copy)
    for module in MODULES:
        shutil.copy2(copy / KVM / module, work / module)
        # Debug sections only: .BTF stays.
        host.run(["strip", "--strip-debug", str(work / module)])
    shutil.rmtree(copy)


# KVM's source with the counter, compiled: every planted bug begins with a copy of it.
def _planted_tree(kernel: LabKernel, builder: Path) -> Path:
    files = {path.name: path.read_text() for path in sorted(PLANTED.glob("lab_planted.[ch]"))}
    recipe = {
        "builder": builder.name,
        "files": files,
        "code": sources(_build_planted_tree, _add_planted, _make),
    }
    name = f"kvm-planted-{kernel.key}"
    return ensure(name, recipe, lambda work: _build_planted_tree(builder, files, work)) / PLACE


def _build_planted_tree(builder: Path, files: dict[str, str], work: Path) -> None:
    shutil.copytree(builder / PLACE, work / PLACE, symlinks=True)
    _add_planted(work / PLACE, files)
    _make(builder, work / PLACE)


def driver_names() -> list[str]:
    """Return the names of the lab's own kernel modules."""
    return sorted(path.stem for path in DRIVERS.glob("*.c"))


def driver(kernel: LabKernel, name: str) -> Path:
    """Return the piece with ``NAME.ko``, a module of the lab's own, for *kernel*."""
    builder = _builder(kernel)
    text = (DRIVERS / f"{name}.c").read_text()
    recipe = {"builder": builder.name, "text": text, "code": sources(_build_driver, _make)}
    piece = f"driver-{kernel.key}-{name}"
    return ensure(piece, recipe, lambda work: _build_driver(builder, name, text, work))


def _build_driver(builder: Path, name: str, text: str, work: Path) -> None:
    tree = work / "tree"
    tree.mkdir()
    (tree / f"{name}.c").write_text(text)
    (tree / "Makefile").write_text(f"obj-m := {name}.o\n")
    _make(builder, tree, ".")
    shutil.copy2(tree / f"{name}.ko", work / f"{name}.ko")
    shutil.rmtree(tree)


# The counter of planted bugs becomes a part of kvm.ko, known to every file of it.
def _add_planted(tree: Path, files: dict[str, str]) -> None:
    folder = tree / KVM
    for name, text in files.items():
        (folder / name).write_text(text)
    with open(folder / "Makefile", "a", encoding="utf-8") as makefile:
        makefile.write("\nkvm-y += lab_planted.o\n")
        makefile.write(f"ccflags-y += -include /{PLACE}/{KVM}/lab_planted.h\n")


def _builder(kernel: LabKernel) -> Path:
    if kernel.key not in KERNELS_WITH_SOURCE:
        known = ", ".join(KERNELS_WITH_SOURCE)
        raise LabError(
            f"no changed KVM for kernel {kernel.key}: the lab can rebuild that of {known}"
        )
    release = (kernel_files(kernel) / "release").read_text()
    recipe = {
        "release": release,
        "suite": (ROOT_SUITE, kernel.suite),
        "tools": TOOLS,
        "parts": SOURCE_PARTS,
        "make": (BTF_FLAGS, CONFIG, PLACE),
        "code": sources(_build_builder, _headers, _kvm_source, _own_makefile),
    }
    name = f"kvm-builder-{kernel.key}"
    return ensure(name, recipe, lambda work: _build_builder(kernel, release, work))


def _build_builder(kernel: LabKernel, release: str, work: Path) -> None:
    archive = work / "root.tar"
    command = ["mmdebstrap", "--quiet", "--variant=minbase", f"--include={','.join(TOOLS)}"]
    command += ['--aptopt=Acquire::Languages "none"', '--dpkgopt=path-exclude="/usr/share/doc/*"']
    host.run([*command, ROOT_SUITE, str(archive), "-"], stdin=host.apt_sources(ROOT_SUITE))
    root = work / "root"
    root.mkdir()
    host.run(["tar", "-xf", str(archive), "-C", str(root), "--exclude=./dev/*"])
    archive.unlink()
    _headers(release, work, root)
    _kvm_source(kernel, release, work)
    _own_makefile(work / PLACE)
    (root / PLACE).mkdir()
    _make(work, work / PLACE)


def _headers(release: str, work: Path, root: Path) -> None:
    version, _, _ = release.rpartition("-")
    packages = [f"linux-headers-{release}", f"linux-headers-{version}-common"]
    try:
        debs = host.download([*packages, f"linux-kbuild-{version}"], work / "debs")
    except LabError as error:
        raise LabError(
            f"no headers for {release}: the archive has moved on, remove the lab's piece of that"
            f" kernel to get the newer one ({error})"
        ) from None
    for package in debs:
        host.run(["dpkg-deb", "-x", str(package), str(work / "headers")])
    # Into the root without replacing its links (/lib is one).
    host.run(["cp", "-a", "--no-target-directory", str(work / "headers/usr"), str(root / "usr")])
    (work / "release").write_text(release)
    shutil.rmtree(work / "headers")
    shutil.rmtree(work / "debs")


def _kvm_source(kernel: LabKernel, release: str, work: Path) -> None:
    name = f"linux-source-{kernel.key}"
    (package,) = host.download([f"{name}/{kernel.suite}"], work / "debs")
    version = host.run(["dpkg-deb", "-f", str(package), "Version"]).strip()
    if not version.startswith(f"{release.partition('+')[0]}-"):
        raise LabError(
            f"{name} is of version {version}, the lab's kernel is {release}: remove the lab's piece"
            " of that kernel"
        )
    host.run(["dpkg-deb", "-x", str(package), str(work / "debs")])
    host.run(
        ["tar", "-x", "-I", "xz -T0", "-f", str(work / f"debs/usr/src/{name}.tar.xz")]
        + ["-C", str(work), "--wildcards", *(f"{name}/{part}" for part in SOURCE_PARTS)]
    )
    (work / name).rename(work / PLACE)
    shutil.rmtree(work / "debs")


# The copied Makefile is made to find its own copies: kbuild expects KVM in the kernel's tree.
def _own_makefile(tree: Path) -> None:
    # trace.h includes itself by a path from include/trace.
    (tree / "include/trace").mkdir()
    path = tree / KVM / "Makefile"
    text = re.sub(r"\$\(srctree\)/(virt|arch/x86)/kvm", rf"/{PLACE}/\1/kvm", path.read_text())
    includes = " ".join(
        f"-I/{PLACE}/{folder}" for folder in ("arch/x86/include", "include", "include/trace")
    )
    path.write_text(f"LINUXINCLUDE := {includes} $(LINUXINCLUDE)\n\n{text}")


def _make(builder: Path, tree: Path, folder: str = KVM) -> None:
    root, release = builder / "root", (builder / "release").read_text()
    make = ["make", "-s", "-j2", "-C", f"/usr/src/linux-headers-{release}"]
    make += [f"M=/{PLACE}/{folder}", *BTF_FLAGS, *CONFIG, "modules"]
    # The tree is bound into the builder's root for as long as the compiler runs, and for it alone.
    # objtool of 7.3 wants to know its stack's limit from /proc.
    binds = {"/dev": root / "dev", "/proc": root / "proc", str(tree): root / PLACE}
    script = "".join(f"mount --rbind {shlex.join([a, str(b)])} && " for a, b in binds.items())
    script += f"exec chroot {shlex.quote(str(root))} {shlex.join(make)}"
    alone = ["unshare", "--mount", *([] if os.geteuid() == 0 else ["--map-root-user"])]
    host.run(
        [*alone, "sh", "-c", script],
        env={"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"},
    )
