"""The files of a simulation: beside the trace the truth as Parquet, one for each table of it.

May import: `probes.errors`, `tracer.simulator.ledger`, pyarrow, standard library.
"""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from probes.errors import OutputError
from tracer.simulator.ledger import LIVES, PLANTED, REFERENCES, Ledger

__all__ = ("TruthFiles", "check_new_files", "new_files", "truth_paths")

_TABLES = {"lives": LIVES, "references": REFERENCES, "bugs": PLANTED}
#: Rows of one row group.
_ROWS = 1 << 15


def truth_paths(trace: Path) -> dict[str, Path]:
    """Return where the truth of a trace lies: table -> file beside it, named after all of it."""
    whole = trace.name.removesuffix(".pfnt")
    return {name: trace.parent / f"{whole}.truth-{name}.parquet" for name in _TABLES}


def check_new_files(trace: Path, *, overwrite: bool) -> tuple[Path, ...]:
    """Return the paths of a trace and its truth, if they can be new files.

    Raises OutputError if one is there already (unless `overwrite`) or is no ordinary file.
    """
    paths = (trace, *truth_paths(trace).values())
    for path in paths:
        _check_new(path, overwrite)
    return paths


@contextlib.contextmanager
def new_files(trace: Path, *, overwrite: bool) -> Iterator[list[Path]]:
    """Take care of a trace and its truth: whoever makes a file of them adds it to the list.

    Raises OutputError before anything is made if one is there already (unless `overwrite`) or is
    no ordinary file. If the block fails, what was made is removed, since half a truth beside half a
    trace would look like a whole story, and what was to be overwritten is there again.
    """
    paths = check_new_files(trace, overwrite=overwrite)
    made: list[Path] = []
    aside: dict[Path, Path] = {}
    try:
        for path in paths:
            if path.exists():
                aside[path] = _put_aside(path)
        yield made
    except BaseException:
        for path in made:
            path.unlink(missing_ok=True)
        for path, other in aside.items():
            other.replace(path)
        raise
    for other in aside.values():
        other.unlink(missing_ok=True)


def _put_aside(path: Path) -> Path:
    other = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        return path.replace(other)
    except OSError as err:
        raise _cannot(path, err) from None


def _check_new(path: Path, overwrite: bool) -> None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return
    except OSError as err:
        raise _cannot(path, err) from None
    if not stat.S_ISREG(mode):
        raise OutputError(f"{path} is not an ordinary file; name another with -o")
    if not overwrite:
        raise OutputError(f"{path} exists already; name another with -o, or add --force")


def _cannot(path: Path, err: OSError) -> OutputError:
    why = err.strerror or str(err)
    return OutputError(f"{path} cannot be written: {why}; name another place with -o")


class TruthFiles:
    """Takes rows out of a ledger a row group at a time, so that memory stays bounded.

    Everything may raise OutputError; the files that it made are in `made`.
    """

    def __init__(self, ledger: Ledger, trace: Path, made: list[Path]) -> None:
        self._waiting = {
            "lives": ledger.lives, "references": ledger.references, "bugs": ledger.bugs,
        }  # fmt: skip
        self.rows = dict.fromkeys(_TABLES, 0)
        self._paths = truth_paths(trace)
        self._files: list[BinaryIO] = []
        self._writers = {}
        try:
            for name, path in self._paths.items():
                table = _TABLES[name]
                self._writers[name] = pq.ParquetWriter(
                    self._create(path, made), table.schema, compression="zstd",
                    use_dictionary=table.coded,
                    store_schema=False,  # whoever reads it gets names as text
                )  # fmt: skip
        except BaseException:
            self.abandon()
            raise

    def _create(self, path: Path, made: list[Path]) -> BinaryIO:
        """Make the file for its owner only, like the trace; what was there is to be overwritten."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            path.unlink(missing_ok=True)
            fd = os.open(path, flags, 0o600)
            made.append(path)
            self._files.append(os.fdopen(fd, "wb"))
            os.fchmod(fd, 0o600)  # whatever the umask took away
        except OSError as err:
            raise _cannot(path, err) from err
        return self._files[-1]

    def flush(self, most: int = _ROWS) -> None:
        """Write every table that has so many rows waiting."""
        for name, rows in self._waiting.items():
            if rows and len(rows) >= most:
                try:
                    self._writers[name].write_table(_TABLES[name].batch(rows))
                except OSError as err:
                    raise _cannot(self._paths[name], err) from err
                self.rows[name] += len(rows)
                rows.clear()

    def close(self) -> None:
        """Write the rest and close the files."""
        self.flush(1)
        for (name, writer), file in zip(self._writers.items(), self._files, strict=True):
            try:
                writer.close()
                file.close()
            except OSError as err:
                raise _cannot(self._paths[name], err) from err

    def abandon(self) -> None:
        """Close the files as they are, for who removes them."""
        for closes in (*self._writers.values(), *self._files):
            with contextlib.suppress(OSError, ValueError, pa.ArrowException):
                closes.close()
