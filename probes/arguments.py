"""What people write on the command line, as numbers. May import: `probes.errors`."""

from probes.errors import UsageError

__all__ = ("parse_frames", "parse_number")


def parse_frames(text: str, flag: str = "--gfn") -> tuple[int, int]:
    """Return the range of frames A-B, or A alone, both included; decimal, or hex with 0x.

    Raises UsageError naming `flag`.
    """
    first, range_, last = text.partition("-")
    try:
        low, high = int(first, 0), int(last if range_ else first, 0)
    except ValueError:
        raise UsageError(f"{flag} {text}: write A-B, for example 0x100-0x1ff") from None
    if not 0 <= low <= high < 1 << 52:
        raise UsageError(f"{flag} {text}: A must not be above B, and B below 2^52")
    return low, high


def parse_number(flag: str, text: str) -> int:
    """Return a number, decimal or hex with 0x; raises UsageError naming `flag`."""
    try:
        return int(text, 0)
    except ValueError:
        raise UsageError(f"{flag} {text}: write a number, 0x for hex") from None
