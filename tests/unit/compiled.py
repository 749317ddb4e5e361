"""Is the model of the simulator compiled, and from the source that is here?"""

import importlib.machinery
from pathlib import Path

from tracer import simulator

__all__ = ("FOLDER", "compiled", "source_of", "stale")

FOLDER = Path(simulator.__file__).parent


def source_of(module: Path) -> Path:
    """Return the source of a module, which may be a compiled one."""
    return module.with_name(module.name.partition(".")[0] + ".py")


def compiled() -> list[Path]:
    """Return the compiled modules that this Python imports instead of their source."""
    endings = tuple(importlib.machinery.EXTENSION_SUFFIXES)
    return [path for path in sorted(FOLDER.iterdir()) if path.name.endswith(endings)]


def stale() -> str:
    """Return what to do if a compiled module is older than its source, "" if none is."""
    old = [path for path in compiled() if path.stat().st_mtime < source_of(path).stat().st_mtime]
    return f"{old[0].name} was compiled from an older source: make install" if old else ""
