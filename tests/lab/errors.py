"""The lab's two errors.

LabError          the lab could not be built or started (exit status 123)
└── GuestLost     a guest died, hung or never came up (exit status 125)

A lost guest is never a failed test: nobody knows what the command would have said.
Imports nothing.
"""

from __future__ import annotations

__all__ = ("GuestLost", "LabError")


class LabError(Exception):
    """Say in one line what the lab could not do, where, and what to do next."""

    exit_status = 123


class GuestLost(LabError):
    """Say why a guest is gone; ``console`` holds the last lines it printed."""

    exit_status = 125

    def __init__(self, why: str, console: str = "") -> None:
        super().__init__(f"guest lost: {why}")
        self.why = why
        self.console = console
