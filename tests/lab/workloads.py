"""The programs that give the tracer something to see: KVM selftests and guests of our own.

The selftests are the kernel's, from Debian's source of 6.12, and run on all lab kernels; they are
linked with ``close_stats.c``, which writes KVM's own statistics when a VM ends. Everything is
static, so that the guest's root needs neither compiler nor headers.
Imports ``cache``, ``host`` and ``rootfs``.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

from . import host
from .cache import ensure, sources
from .rootfs import HERE, make_image

__all__ = ("HOST_TOOLS", "OUR_PROGRAMS", "SELFTESTS", "sum_stats", "workloads")

HOST_TOOLS = {
    "gcc": "gcc",
    "make": "make",
    "rsync": "rsync",
    "xz": "xz-utils",
    "/usr/lib/x86_64-linux-gnu/libc.a": "libc6-dev",
}

SOURCE_PACKAGE = "linux-source-6.12"
SOURCE_PARTS = ("arch/x86", "include", "scripts", "tools", "Makefile")

SELFTESTS = {
    "access_tracking_perf_test": "ages pages by idle tracking: skips on Debian, use `reclaim`",
    "demand_paging_test": "each page of a known number faulted in once: the exact oracle",
    "dirty_log_perf_test": "dirty logging on and off: splits, write protection, recovery",
    "dirty_log_test": "dirty logging, checked page by page",
    "guest_memfd_test": "guest_memfd: memory that the host never maps (from 6.8; fails on 7.3)",
    "kvm_binary_stats_test": "checks the statistics that the others rely on",
    "memslot_modification_stress_test": "slots come and go under running vCPUs",
    "pre_fault_memory_test": "KVM_PRE_FAULT_MEMORY: faults with no guest running (from 6.11, npt)",
    "set_memory_region_test": "slots moved and deleted, MMIO in between",
    "x86_64/dirty_log_page_splitting_test": "huge pages split and restored (needs nr_hugepages)",
    "x86_64/hyperv_svm_test": "a nested guest with Hyper-V's paravirtual flushes (not on 6.1)",
    "x86_64/smm_test": "two address spaces: as_id 1 while in system management mode",
    "x86_64/state_test": "state of a (nested) guest saved and restored",
    "x86_64/svm_int_ctl_test": "a nested guest with virtual interrupts",
    "x86_64/svm_nested_shutdown_test": "a nested guest that dies",
    "x86_64/svm_vmcall_test": "the smallest nested guest",
}
OUR_PROGRAMS = {
    "pages-guest": "pages_guest.c",
    "prime-guest": "prime_guest.c",
    "race-guest": "race_guest.c",
    "ttm-guest": "ttm_guest.c",
}
OUR_FLAGS = "-static -pthread -O2 -g0 -std=gnu11 -Wall -Wextra -Werror".split()


def workloads() -> Path:
    """Return the piece with ``workloads.ext4``, mounted at /opt/lab in the guest."""
    recipe = {
        "source": SOURCE_PACKAGE,
        "selftests": SELFTESTS,
        "ours": OUR_PROGRAMS,
        "flags": OUR_FLAGS,
        "files": {path.name: path.read_text() for path in (HERE / "workloads").glob("*.[ch]")},
        "code": sources(_build_workloads, _build_selftests, make_image),
    }
    return ensure("workloads", recipe, _build_workloads)


def kernel_source() -> Path:
    """Return the piece with ``linux/``: what user space needs of the kernel's source."""
    recipe = {"package": SOURCE_PACKAGE, "parts": SOURCE_PARTS, "code": sources(_unpack_source)}
    return ensure("source", recipe, _unpack_source)


def _unpack_source(work: Path) -> None:
    (package,) = host.download([SOURCE_PACKAGE], work / "debs")
    name = f"usr/src/{SOURCE_PACKAGE}.tar.xz"
    host.run(["dpkg-deb", "-x", str(package), str(work / "debs")])
    wanted = [f"{SOURCE_PACKAGE}/{part}" for part in SOURCE_PARTS]
    host.run(
        ["tar", "-x", "-I", "xz -T0", "-f", str(work / "debs" / name), "-C", str(work), *wanted]
    )
    (work / SOURCE_PACKAGE).rename(work / "linux")
    shutil.rmtree(work / "debs")
    host.run(["make", "-s", "-j2", "headers_install"], cwd=work / "linux")


def _build_workloads(work: Path) -> None:
    linux = kernel_source() / "linux"
    binaries, selftests = work / "tree/bin", work / "tree/selftests"
    binaries.mkdir(parents=True)
    selftests.mkdir()
    for program, source in OUR_PROGRAMS.items():
        host.run(
            ["gcc", *OUR_FLAGS, "-isystem", str(linux / "usr/include")]
            + ["-o", str(binaries / program), str(HERE / "workloads" / source)]
        )
    _build_selftests(linux, work / "build", selftests)
    shutil.rmtree(work / "build")
    host.run(["strip", *binaries.iterdir(), *selftests.iterdir()])
    # A selftest loads itself into its guest, by the name it was called with: that must be a path.
    for selftest in selftests.iterdir():
        wrapper = binaries / selftest.name
        wrapper.write_text(f'#!/bin/sh\nexec /opt/lab/selftests/{selftest.name} "$@"\n')
        wrapper.chmod(0o755)
    make_image(work / "tree", work / "workloads.ext4", slack_mib=4)


def _build_selftests(linux: Path, output: Path, target_dir: Path) -> None:
    output.mkdir()
    stats = output / "close_stats.o"
    host.run(
        ["gcc", "-O2", "-Wall", "-isystem", str(linux / "usr/include"), "-c"]
        + ["-o", str(stats), str(HERE / "workloads/close_stats.c")]
    )
    targets = [str(output / name) for name in SELFTESTS]
    host.run(
        ["make", "-s", "-j2", f"OUTPUT={output}"]
        + [f"LDFLAGS=-static -pthread -no-pie -Wl,--wrap=close,--wrap=ioctl {stats}", *targets],
        cwd=linux / "tools/testing/selftests/kvm",
    )
    for target in targets:
        shutil.copy2(target, target_dir)


def sum_stats(lines: str) -> dict[str, int]:
    """Add up the statistics that a selftest wrote to its KVM_STATS_JSON file.

    >>> sum_stats('{"fd_kind":"vcpu","stats":{"pf_fixed":3}}\\n'
    ...           '{"fd_kind":"vcpu","stats":{"pf_fixed":4}}')
    {'pf_fixed': 7}
    """
    total: Counter[str] = Counter()
    for line in lines.splitlines():
        total.update(json.loads(line)["stats"] or {})
    return dict(total)
