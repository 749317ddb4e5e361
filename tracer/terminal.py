"""What moves on a terminal while something runs; nothing if stderr is none.

May import: `tracer.closing`.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from tracer.closing import size

if TYPE_CHECKING:
    from tracer.session import Progress

__all__ = ("progress", "status_line")


@contextlib.contextmanager
def status_line() -> Iterator[Callable[["Progress"], None] | None]:
    """Give a function that shows progress on one line of a terminal; none if stderr is not one."""
    if not sys.stderr.isatty():
        yield None
        return
    last = [0.0, 0]

    def show(now: "Progress") -> None:
        if now.seconds - last[0] < 0.25:
            return
        rate = (now.records - last[1]) / (now.seconds - last[0])
        last[:] = [now.seconds, now.records]
        sys.stderr.write(
            f"\r{now.seconds:7.1f} s  {rate:9,.0f} records/s  lost {now.lost:,}  "
            f"faults {now.faults:,}  {size(now.bytes)}\x1b[K"
        )
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Give a function that shows (done, to do) on one line of a terminal; none if it is not one."""
    if not sys.stderr.isatty():
        yield None
        return
    began = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        # What takes less than a second needs no bar.
        if now - began < 1 or now - last < 0.25:
            return
        last = now
        share = min(1.0, done / max(1, total))
        bar = "#" * int(30 * share)
        sys.stderr.write(f"\r{what} [{bar:<30}] {share:4.0%}  {done:,} of {total:,}\x1b[K")
        sys.stderr.flush()

    try:
        yield show
    finally:
        sys.stderr.write("\r\x1b[K")
