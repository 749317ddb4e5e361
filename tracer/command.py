"""The command to record: forked early, started when the probes are armed.

Forking first gives the trace its name (`pfntrace-<comm>.<pid>.pfnt`) and keeps the command from
running a moment before it can be seen. May import: standard library, `probes`.
"""

import contextlib
import errno
import os
import shutil
import signal
from collections.abc import Sequence

from probes.errors import CommandError

__all__ = ("Command",)


class Command:
    """A child process that waits for `start` before it becomes the command."""

    def __init__(self, argv: Sequence[str]) -> None:
        """Fork. Raises CommandError if there is no such command."""
        self.argv = tuple(argv)
        self.status: int | None = None
        if shutil.which(argv[0]) is None:
            raise CommandError(f"{argv[0]}: command not found; nothing was recorded")
        go_read, self._go = os.pipe()
        self._failed, failed_write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._go)
            _become(self.argv, go_read, failed_write)
        os.close(go_read)
        os.close(failed_write)

    def start(self) -> None:
        """Let the command run. Raises CommandError if it cannot be executed."""
        # Killed while it waited: `poll` will say how.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._go, b"g")
        os.close(self._go)
        code = os.read(self._failed, 16)
        os.close(self._failed)
        if code:
            self.status = 127
            os.waitpid(self.pid, 0)
            raise CommandError(f"{self.argv[0]}: {os.strerror(int(code))}; nothing was recorded")

    def poll(self) -> int | None:
        """Return the exit status once the command has ended (128 + N after signal N)."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self.status = code if code >= 0 else 128 - code
        return self.status

    def stop(self) -> None:
        """End a command that still runs: SIGTERM, as perf does; never waits."""
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)

    def abandon(self) -> None:
        """Give up a command that was never started."""
        with contextlib.suppress(OSError):
            os.close(self._go)
            os.close(self._failed)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _become(argv: tuple[str, ...], go: int, failed: int) -> None:
    """The child: wait for the word, then exec; never returns."""
    try:
        # An interrupt while the probes load is the recorder's, who then closes the pipe.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        word = os.read(go, 1)
        if not word:
            os._exit(0)
        # Python ignores the last two, and what is ignored stays so across exec.
        for number in (signal.SIGINT, signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        os.execvp(argv[0], argv)
    except OSError as err:
        os.write(failed, str(err.errno or errno.EIO).encode())
    finally:
        os._exit(127)
