"""Built pieces of the lab, kept under names that contain a hash of their recipe.

A piece is a folder ``<name>-<hash>``. It is built under a temporary name and renamed when complete,
so a piece that exists is whole, an interrupted build leaves nothing behind that counts, and a
changed recipe asks for a new piece without touching the others. A lock per piece makes two builds
at once safe. Imports only ``errors``.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import inspect
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from .errors import LabError

__all__ = ("cache_dir", "ensure", "locked", "progress", "recipe_hash", "sources")

# Pieces of the same name that are kept beside the current one: a run that has just chosen an older
# recipe (another branch, another checkout) may be about to open it.
OLD_PIECES_KEPT = 1

_started = time.monotonic()


def progress(message: str) -> None:
    """Print one progress line with the seconds since the start to stderr."""
    # One write, newline included: builds report from several threads.
    sys.stderr.write(f"lab: [{time.monotonic() - _started:6.1f}s] {message}\n")
    sys.stderr.flush()


def cache_dir() -> Path:
    """Return the lab's cache folder, and create it."""
    configured = os.environ.get("PFNTRACE_LAB_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    path = Path(configured or f"{base}/pfntrace-lab").expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LabError(
            f"cannot create the cache folder {path} ({error.strerror}): set PFNTRACE_LAB_DIR"
        ) from error
    return path


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the lock *name* of the cache folder while the block runs."""
    with open(cache_dir() / f".{name}.lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for {name}, which is at work already")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def sources(*functions: Callable[..., object]) -> list[str]:
    """Return the source text of *functions*: the part of a recipe that is code."""
    return [inspect.getsource(function) for function in functions]


def recipe_hash(recipe: Mapping[str, object]) -> str:
    """Return twelve hex digits that change when anything in *recipe* does."""
    text = json.dumps(recipe, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def ensure(name: str, recipe: Mapping[str, object], build: Callable[[Path], None]) -> Path:
    """Return the folder of the piece *name*, calling *build* on a new folder if it is missing."""
    path = cache_dir() / f"{name}-{recipe_hash(recipe)}"
    if path.is_dir():
        return path
    with locked(name):
        if path.is_dir():
            return path
        progress(f"{name}: building")
        begun = time.monotonic()
        _remove_leftovers(name)
        work = Path(tempfile.mkdtemp(prefix=f".{name}.tmp-", dir=cache_dir()))
        work.chmod(0o755)
        try:
            build(work)
            work.rename(path)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        _prune(name, keep=path)
        progress(f"{name}: built in {time.monotonic() - begun:.1f} s")
    return path


# Only the holder of the lock builds this piece, so any temporary folder of it is a dead build's.
def _remove_leftovers(name: str) -> None:
    for old in cache_dir().glob(f".{name}.tmp-*"):
        shutil.rmtree(old, ignore_errors=True)


def _prune(name: str, keep: Path) -> None:
    hexdigits = "[0-9a-f]" * 12
    pieces = [path for path in cache_dir().glob(f"{name}-{hexdigits}") if path != keep]
    pieces.sort(key=lambda path: path.stat().st_mtime, reverse=True)
    for old in pieces[OLD_PIECES_KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
