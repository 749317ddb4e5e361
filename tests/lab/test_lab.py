"""Tests of the lab itself: what is pure, fast; and with the marker ``lab``, some real boots."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from . import KERNELS, GuestLost, LabError, RunOptions, cache, cli, run_in_lab, sum_stats
from .kernels import kernel
from .rootfs import HERE, ROOT_PACKAGES
from .vm import Disk, Qemu, console_tail, why_lost
from .workloads import OUR_PROGRAMS, SELFTESTS

PANIC = """\
[    4.7] systemd-free, quiet boot
[    4.8] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI
[    4.8] RIP: 0010:__schedule+0x3d4/0xac0
[    4.9] Kernel panic - not syncing: Fatal exception
[    4.9] Kernel Offset: disabled
"""


@pytest.fixture
def pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the lab an empty cache folder."""
    monkeypatch.setenv("PFNTRACE_LAB_DIR", str(tmp_path / "cache"))
    return cache.cache_dir()


# The command line


def test_all_after_the_dashes_is_the_command() -> None:
    # GIVEN a command that has options of the lab's own names, and dashes
    words = ["run", "--kernel", "6.12", "--out", "o", "--", "prog", "--kernel", "x", "--", "y"]
    # WHEN
    parsed = cli.parse(words)
    # THEN
    assert parsed.command == ["prog", "--kernel", "x", "--", "y"]
    assert (parsed.kernel, parsed.out, parsed.smp, parsed.npt) == ("6.12", Path("o"), 2, None)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["run", "--kernel", "6.12", "--out", "o"],
        ["run", "--kernel", "5.4", "--out", "o", "--", "true"],
        ["run", "--kernel", "6.12", "--", "true"],
        ["build", "--", "true"],
    ],
)
def test_a_wrong_command_line_is_a_usage_error(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parse(words)
    assert stopped.value.code == 2
    assert "usage: lab" in capsys.readouterr().err


def test_an_unknown_changed_kvm_is_an_error_that_says_where_the_known_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["run", "--kernel", "6.12", "--kvm", "nosuch", "--out", str(tmp_path), "--", "true"]
    assert cli.main(words) == LabError.exit_status
    said = capsys.readouterr().err
    assert "'nosuch'" in said and "README.md lists them" in said and said.count("\n") == 1
    assert len(said) < 120


# The tables


def test_each_kernel_has_its_sentence_in_the_readme() -> None:
    readme = (HERE / "README.md").read_text()
    for entry in KERNELS.values():
        assert f"| {entry.key} | {entry.suite} | {entry.about} |" in readme


def test_each_workload_has_its_line_in_the_readme() -> None:
    readme = (HERE / "README.md").read_text()
    for name in (*OUR_PROGRAMS, *(name.rpartition("/")[2] for name in SELFTESTS)):
        assert f"`{name}" in readme


def test_an_unknown_kernel_is_an_error_with_the_known_ones() -> None:
    with pytest.raises(LabError, match=r"'5\.4'.*6\.1, 6\.12, 7\.3"):
        kernel("5.4")


def test_the_guest_asks_for_no_kernel_headers() -> None:
    assert not [name for name in ROOT_PACKAGES if "header" in name or name in ("gcc", "make")]


@pytest.mark.parametrize("script", sorted([*HERE.glob("guest/*.sh"), *HERE.glob("guest/bin/*")]))
def test_guest_scripts_are_sound_shell(script: Path) -> None:
    subprocess.run(["sh", "-n", str(script)], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", str(script)], check=True)


# The cache


def test_a_recipe_has_one_name_whatever_the_order_and_another_when_changed() -> None:
    assert cache.recipe_hash({"a": 1, "b": [2]}) == cache.recipe_hash({"b": [2], "a": 1})
    assert cache.recipe_hash({"a": 1}) != cache.recipe_hash({"a": 2})
    assert cache.recipe_hash({"code": cache.sources(cache.ensure)}) != cache.recipe_hash(
        {"code": cache.sources(cache.locked)}
    )


def test_a_piece_is_built_once_per_recipe(pieces: Path) -> None:
    built: list[Path] = []
    first = cache.ensure("piece", {"v": 1}, built.append)
    assert cache.ensure("piece", {"v": 1}, built.append) == first
    second = cache.ensure("piece", {"v": 2}, built.append)
    assert first != second and len(built) == 2
    assert first.is_dir() and second.is_dir()


def test_a_failed_build_leaves_no_piece_and_the_next_one_works(pieces: Path) -> None:
    # GIVEN a build that fails halfway, and one that was killed earlier
    (pieces / ".piece.tmp-dead").mkdir()

    def fail(work: Path) -> None:
        (work / "half").touch()
        raise LabError("no network")

    # WHEN
    with pytest.raises(LabError):
        cache.ensure("piece", {}, fail)
    # THEN
    assert not [path for path in pieces.iterdir() if path.is_dir()]
    whole = cache.ensure("piece", {}, lambda work: (work / "whole").touch())
    assert [path.name for path in whole.iterdir()] == ["whole"]


def test_only_the_newest_old_pieces_are_kept(pieces: Path) -> None:
    for version in range(5):
        cache.ensure("piece", {"v": version}, lambda work: None)
    cache.ensure("piece-other", {}, lambda work: None)
    kept = [path.name for path in pieces.iterdir() if path.is_dir()]
    assert len([name for name in kept if name.startswith("piece-")]) == (
        1 + cache.OLD_PIECES_KEPT + 1
    )


def test_two_builds_at_once_build_once(pieces: Path) -> None:
    built: list[Path] = []
    with ThreadPoolExecutor(max_workers=4) as pool:
        paths = set(pool.map(lambda _: cache.ensure("piece", {}, built.append), range(4)))
    assert len(paths) == len(built) == 1


# QEMU and the end of a guest


def _qemu(device: str | None = None) -> Qemu:
    disks = (Disk("root", Path("/c/a,b.ext4")), Disk("out", Path("/c/out.ext4"), keep=True))
    return Qemu(Path("/c/vmlinuz"), Path("/c/initrd"), disks, 2, "3G", "quiet", device)


def test_qemu_gets_one_thread_and_disks_that_stay_as_they_are() -> None:
    words = _qemu().command(Path("/c/console"), {"control": 7})
    line = " ".join(words)
    assert "tcg,thread=single" in line and "-no-reboot" in line
    assert "file=/c/a,,b.ext4,format=raw,if=none,id=root,cache=unsafe,snapshot=on" in line
    assert "file=/c/out.ext4,format=raw,if=none,id=out,cache=unsafe,snapshot=off" in line
    assert "socket,id=control,fd=7" in line and "name=lab.control" in line


def test_a_device_is_the_only_graphics_card() -> None:
    line = " ".join(_qemu("qxl").command(Path("/c/console"), {}))
    assert "-vga none -device qxl" in line


@pytest.mark.parametrize(
    ("console", "why"),
    [
        (PANIC, "Kernel panic - not syncing: Fatal exception (QEMU ended)"),
        ("[ 1.0] BUG: kernel NULL pointer dereference", "BUG: kernel NULL pointer dereference"),
        ("lab: initramfs: cannot mount the disks", "lab: initramfs: cannot mount the disks"),
        ("[ 1.0] all is well", "QEMU ended"),
        ("", "QEMU ended"),
    ],
)
def test_the_console_says_why_a_guest_was_lost(console: str, why: str) -> None:
    assert why_lost(console, "QEMU ended").startswith(why)


def test_the_tail_of_a_console_begins_with_its_last_words() -> None:
    assert (
        console_tail(PANIC).splitlines()[0] == "[    4.8] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI"
    )
    assert console_tail("\x1bc\x1b[2Ja\r\n\r\nb\r\nc\r\n", lines=2) == "b\nc"


def test_statistics_of_all_vcpus_and_vms_are_added_up() -> None:
    lines = """\
{"fd_kind":"vcpu","pid":9,"fd":6,"stats":{"pf_fixed":3,"exits":5}}
{"fd_kind":"vcpu","pid":9,"fd":7,"stats":{"pf_fixed":4,"exits":1}}
{"fd_kind":"vm","pid":9,"fd":4,"stats":null}
"""
    assert sum_stats(lines) == {"pf_fixed": 7, "exits": 6}


# Real boots


@pytest.mark.lab
def test_status_streams_and_files_come_back(tmp_path: Path) -> None:
    command = (
        "echo said; echo complained >&2; pwd >place; id -u >user; mkdir d; echo x >d/f; exit 7"
    )
    result = run_in_lab(["sh", "-c", command], kernel="6.12", out=tmp_path)
    assert result.status == 7
    assert (result.stdout, result.stderr) == ("said\n", "complained\n")
    left = {
        str(path.relative_to(tmp_path)): path.read_text()
        for path in tmp_path.rglob("*")
        if path.is_file() and path.name != "lab-console.log"
    }
    assert left == {"place": "/out\n", "user": "0\n", "d/f": "x\n"}


@pytest.mark.lab
@pytest.mark.parametrize("npt", ["on", "off"])
@pytest.mark.parametrize("key", KERNELS)
def test_each_page_of_the_prime_guest_costs_one_fault(tmp_path: Path, key: str, npt: str) -> None:
    script = "uname -r; cat /sys/module/kvm_amd/parameters/npt; prime-guest --print-stats"
    options = RunOptions(npt=npt)
    result = run_in_lab(["sh", "-c", script], kernel=key, out=tmp_path, options=options)
    release, nested, witness = result.stdout.splitlines()
    assert release.startswith(f"{key}.")
    assert nested == {"on": "Y", "off": "N"}[npt]
    assert '"pages":239,' in witness
    assert '"pf_taken":239,' in witness and '"pf_fixed":239,' in witness


@pytest.mark.lab
def test_a_panic_is_a_lost_guest_whose_synced_files_come_back(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo x >kept; sync; echo c >/proc/sysrq-trigger; sleep 60"]
    with pytest.raises(GuestLost, match="sysrq triggered crash") as lost:
        run_in_lab(command, kernel="6.12", out=tmp_path)
    assert "Kernel panic" in lost.value.console
    assert (tmp_path / "kept").read_text() == "x\n"


@pytest.mark.lab
def test_a_hang_is_a_lost_guest_whose_files_come_back(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo x >kept; sleep 600"]
    options = RunOptions(timeout_s=2)
    with pytest.raises(GuestLost, match="still running after 2 s"):
        run_in_lab(command, kernel="6.12", out=tmp_path, options=options)
    assert (tmp_path / "kept").read_text() == "x\n"


@pytest.mark.lab
def test_two_guests_at_once_do_not_meet(tmp_path: Path) -> None:
    def boot(name: str) -> str:
        command = ["sh", "-c", f"cat /etc/mine; echo {name} >/etc/mine; sleep 2; cat /etc/mine"]
        return run_in_lab(command, kernel="6.12", out=tmp_path / name).stdout

    with ThreadPoolExecutor(max_workers=2) as pool:
        assert list(pool.map(boot, ("a", "b"))) == ["a\n", "b\n"]
