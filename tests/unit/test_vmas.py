"""What stands behind a memslot: /proc/PID/smaps and device numbers, however odd they are."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tracer.vmas import device_path, parse_smaps, read_vmas

EVERYTHING = [(0, 1 << 64)]

#: As Linux 6.12 prints it; of each VMA's lines of numbers only some.
SMAPS = """\
55d0c8a00000-55d0c8a21000 rw-p 00000000 00:00 0                          [heap]
Size:                132 kB
KernelPageSize:        4 kB
Rss:                  96 kB
THPeligible:           0
ProtectionKey:         0
VmFlags: rd wr mr mw me ac sd
7f1a00000000-7f1a00080000 rw-s 10037a000 00:06 412                       /dev/dri/card0
Size:                512 kB
Rss:                   0 kB
VmFlags: rd wr sh mr mw me ms pf io de dd sd
7f1a10000000-7f1a30000000 rw-p 00000000 00:00 0\x20
Size:             524288 kB
AnonHugePages:    520192 kB
VmFlags: rd wr mr mw me ac sd hg
7f1a40000000-7f1a40200000 rw-s 00000000 00:01 2051                       /memfd:guest ram (deleted)
Size:               2048 kB
VmFlags: rd wr sh mr mw me ms sd
7f1a50000000-7f1a50001000 r--p 00003000 fe:01 786444                     /srv/VM images/disk 1.img
Size:                  4 kB
VmFlags: rd mr mw me sd
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
Size:                  4 kB
VmFlags: ex
"""


def vma(path: str, flags: str = "rd wr", span: str = "1000-3000") -> str:
    return f"{span} rw-p 00000000 00:00 0    {path}\nSize: 8 kB\nVmFlags: {flags}\n"


def process(tmp_path: Path, text: str | bytes) -> Path:
    """Make a /proc with process 42; return it."""
    folder = tmp_path / "proc" / "42"
    folder.mkdir(parents=True)
    (folder / "smaps").write_bytes(text.encode() if isinstance(text, str) else text)
    return tmp_path / "proc"


# --- text that is not smaps, or not all of it -----------------------------------------------------


@given(text=st.text())
def test_no_text_breaks_the_parser(text):
    parse_smaps(text, EVERYTHING)


@given(cut=st.integers(0, len(SMAPS)))
def test_a_text_that_ends_early_gives_the_vmas_before(cut):
    whole = parse_smaps(SMAPS, EVERYTHING)
    found = parse_smaps(SMAPS[:cut], EVERYTHING)
    assert found[:-1] == whole[: max(0, len(found) - 1)]


def test_flags_without_a_vma_belong_to_none():
    assert parse_smaps("VmFlags: rd wr pf\n", EVERYTHING) == []


def test_flags_of_a_vma_that_was_not_asked_for_are_not_given_to_another():
    text = vma("/a", "rd", "1000-2000").replace("VmFlags: rd\n", "") + vma("/b", "pf", "8000-9000")
    assert [v["flags"] for v in parse_smaps(text, [(0x1000, 0x2000)])] == [[]]


@pytest.mark.parametrize("odd", ["\x0b", "\x0c", "\x1c", "\x85", "\u2028", "\r"])
def test_a_path_cannot_make_up_a_vma_or_flags(tmp_path, odd):
    # GIVEN a file whose name holds what other line ends look like: the kernel escapes \n only
    forged = f"/x{odd}1000-3000 rw-p 00000000 00:00 0 /dev/forged{odd}VmFlags: pf io"
    # THEN it is one VMA with that path and its own flags
    vmas, why = read_vmas(42, EVERYTHING, process(tmp_path, vma(forged)))
    assert [(v["path"], v["flags"], why) for v in vmas] == [(forged, ["rd", "wr"], "")]


def test_a_path_that_is_not_utf8_is_shown_with_replacements(tmp_path):
    text = vma("/srv/@.img").encode().replace(b"@", b"\xff\xfe")
    ((found,), _) = read_vmas(42, EVERYTHING, process(tmp_path, text))
    assert found["path"] == "/srv/\ufffd\ufffd.img"


# --- what it says ---------------------------------------------------------------------------------


def test_every_vma_is_found_with_path_and_flags():
    found = parse_smaps(SMAPS, EVERYTHING)
    assert [v["path"] for v in found] == [
        "[heap]",
        "/dev/dri/card0",
        "",
        "/memfd:guest ram (deleted)",
        "/srv/VM images/disk 1.img",
        "[vsyscall]",
    ]
    assert found[1] == {
        "start": 0x7F1A00000000,
        "end": 0x7F1A00080000,
        "perms": "rw-s",
        "offset": 0x10037A000,
        "path": "/dev/dri/card0",
        "flags": "rd wr sh mr mw me ms pf io de dd sd".split(),
    }


@pytest.mark.parametrize(
    ("ranges", "paths"),
    [
        ([], []),
        ([(0x1000, 0x1000)], []),
        ([(0x7F1A00080000, 0x7F1A10000000)], []),  # the gap between two
        ([(0x7F1A00080000 - 1, 0x7F1A10000000)], ["/dev/dri/card0"]),
        ([(0x7F1A00000000, 0x7F1A00000001)], ["/dev/dri/card0"]),
        ([(0x7F1A00001000, 0x7F1A00002000)], ["/dev/dri/card0"]),  # within it
        ([(0x7F1A0007F000, 0x7F1A10001000)], ["/dev/dri/card0", ""]),  # across two
        (
            [(0x7F1A50000000, 0x7F1A50001000), (0x55D0C8A00000, 0x55D0C8A01000)],
            ["[heap]", "/srv/VM images/disk 1.img"],
        ),
        ([(0x55D0C8A00000, 0x55D0C8A01000)] * 2, ["[heap]"]),  # once, however often it is met
    ],
)
def test_only_vmas_that_meet_a_range_are_given(ranges, paths):
    assert [v["path"] for v in parse_smaps(SMAPS, ranges)] == paths


# --- processes ------------------------------------------------------------------------------------


def test_the_mappings_of_this_very_process_are_read():
    own = parse_smaps(Path("/proc/self/smaps").read_text(), EVERYTHING)
    stack = next(v for v in own if v["path"] == "[stack]")
    vmas, why = read_vmas(os.getpid(), [(stack["end"] - 1, stack["end"])])
    assert ([v["path"] for v in vmas], why) == (["[stack]"], "")
    assert {"rd", "wr", "gd"} <= set(vmas[0]["flags"])


def test_a_process_that_is_gone_is_said_so(tmp_path):
    assert read_vmas(42, EVERYTHING, tmp_path) == (
        [],
        "the process ended before its mappings could be read",
    )


def test_a_process_that_is_ending_has_no_mappings_left(tmp_path):
    vmas, why = read_vmas(42, EVERYTHING, process(tmp_path, ""))
    assert (vmas, why) == ([], "the process was ending when its mappings were read")


@pytest.mark.parametrize(
    ("number", "why"),
    [
        (errno.ESRCH, "the process ended before its mappings could be read"),
        (errno.EACCES, "/proc/42/smaps: Permission denied"),
        (errno.EIO, "/proc/42/smaps: Input/output error"),
    ],
)
def test_what_keeps_us_from_reading_is_said(tmp_path, monkeypatch, number, why):
    def refuse(_path: Path) -> bytes:
        raise OSError(number, os.strerror(number))

    proc = process(tmp_path, SMAPS)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert read_vmas(42, EVERYTHING, proc) == ([], why)


# --- devices --------------------------------------------------------------------------------------


def device(sys: Path, name: str, uevent: str) -> Path:
    (sys / name).mkdir(parents=True)
    (sys / name / "uevent").write_text(uevent)
    return sys


@pytest.mark.parametrize("rdev", [0, 1, 226 << 20, (1 << 32) - 1])
def test_a_device_that_nobody_knows_has_no_path(tmp_path, rdev):
    assert device_path(rdev, tmp_path) == ""


def test_a_device_without_a_name_has_no_path(tmp_path):
    assert device_path(226 << 20, device(tmp_path, "226:0", "MAJOR=226\nMINOR=0\n")) == ""


def test_a_device_is_named_by_the_kernel_s_number(tmp_path):
    sys = device(tmp_path, "226:128", "MAJOR=226\nMINOR=128\nDEVNAME=dri/renderD128\n")
    assert device_path(226 << 20 | 128, sys) == "/dev/dri/renderD128"


def test_dev_null_is_found_on_this_host():
    if not Path("/sys/dev/char/1:3/uevent").exists():
        pytest.skip("no /sys/dev/char here")
    assert device_path(1 << 20 | 3) == "/dev/null"
