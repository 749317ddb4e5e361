"""What stands behind a memslot in the VM's process: the VMAs, their files and VmFlags.

Read from /proc/PID/smaps while the process lives; a process that is gone before is said so in the
note. May import: standard library.
"""

import re
from pathlib import Path
from typing import Any

__all__ = ("device_path", "parse_smaps", "read_vmas")

_HEAD = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) ([0-9a-f]+) \S+ \d+\s*(.*)$")


def parse_smaps(text: str, ranges: list[tuple[int, int]]) -> list[dict[str, Any]]:
    """Return the VMAs that meet any of the ranges [start, end) of addresses.

    Each is {start, end, perms, offset, path, flags}; `flags` are VmFlags' two-letter codes
    (fs/proc/task_mmu.c, show_smap_vma_flags()).
    """
    found: list[dict[str, Any]] = []
    wanted: dict[str, Any] | None = None
    # The kernel escapes a line feed in a path, and nothing else that splitlines() splits at.
    for line in text.split("\n"):
        head = _HEAD.match(line)
        if head:
            start, end = int(head[1], 16), int(head[2], 16)
            wanted = None
            if any(start < high and low < end for low, high in ranges):
                wanted = {
                    "start": start,
                    "end": end,
                    "perms": head[3],
                    "offset": int(head[4], 16),
                    "path": head[5],
                    "flags": [],
                }
                found.append(wanted)
        elif wanted is not None and line.startswith("VmFlags:"):
            wanted["flags"] = line.split()[1:]
    return found


def read_vmas(
    pid: int, ranges: list[tuple[int, int]], proc: Path = Path("/proc")
) -> tuple[list[dict[str, Any]], str]:
    """Return (VMAs, why there are none) of a process; never raises."""
    try:
        text = (proc / str(pid) / "smaps").read_bytes().decode(errors="replace")
    except ProcessLookupError:
        return [], "the process ended before its mappings could be read"
    except FileNotFoundError:
        return [], "the process ended before its mappings could be read"
    except OSError as err:
        return [], f"/proc/{pid}/smaps: {err.strerror}"
    if not text:
        return [], "the process was ending when its mappings were read"
    return parse_smaps(text, ranges), ""


def device_path(rdev: int, sys: Path = Path("/sys/dev/char")) -> str:
    """Return the path of a character device by its number (major << 20 | minor), "" if unknown."""
    name = f"{rdev >> 20}:{rdev & 0xFFFFF}"
    try:
        text = (sys / name / "uevent").read_text(errors="replace")
    except OSError:
        return ""
    match = re.search(r"^DEVNAME=(.*)$", text, re.M)
    return f"/dev/{match[1]}" if match else ""
