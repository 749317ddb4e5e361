"""New files that appear whole or not at all, and never in place of another unasked.

Nor in place of the trace that they are made from, not even with --force. A file gets the rights
of the user's umask: it is made to be shared, while a trace itself is its owner's alone (0600), so
who must hide an analysis sets the umask. May import: `probes.errors`, standard library.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from probes.errors import OutputError

__all__ = ("check_new", "new_file")


def check_new(path: Path, source: Path, *, overwrite: bool) -> None:
    """Raise OutputError if `new_file` would refuse this path, before anything slow is done."""
    try:
        if _same(path, source):
            raise OutputError(f"{path} is the trace that is read; name another with -o")
        if path.is_dir():
            raise OutputError(f"{path} is a folder; name a file with -o")
        if os.path.lexists(path) and not overwrite:
            raise OutputError(f"{path} exists already; name another with -o, or add --force")
        if path.exists() and not path.is_file():
            raise OutputError(f"{path} is not an ordinary file; name another with -o")
        if not path.parent.is_dir():
            raise OutputError(f"{path.parent} is not a folder; name another place with -o")
    except OSError as err:
        raise OutputError(f"{path} cannot be created: {err.strerror}; name another") from err


def _same(path: Path, source: Path) -> bool:
    """Tell whether both are one file, by whatever names: then writing one destroys the other."""
    try:
        return path.samefile(source)
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextlib.contextmanager
def new_file(path: Path, source: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give the path of a file to write, in the same folder; afterwards it is the one at `path`.

    If the block fails nothing is left behind, and what was at `path` stays. Raises OutputError
    for a path that exists, unless `overwrite`, for the trace `source` that the file is made from,
    and for whatever the system refuses.
    """
    check_new(path, source, overwrite=overwrite)
    unfinished = path.with_name(f".{path.name[:200]}.{os.getpid()}.part")
    try:
        # Only who makes a file may write it: not through a link that somebody laid there.
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()
        os.close(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        yield unfinished
        if not overwrite:
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        os.replace(unfinished, path)
    except FileExistsError:
        raise OutputError(f"{path} exists already; name another with -o, or add --force") from None
    except OSError as err:
        raise OutputError(
            f"{path} cannot be written: {err.strerror or err}; name another place with -o"
        ) from err
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
