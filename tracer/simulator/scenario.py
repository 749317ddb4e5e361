"""Scenario files: what a guest and its host do, in TOML that fits on a screen.

    title = "..."                       one line, for --list
    mmu = "tdp"                         or "shadow"; --mmu overrides it
    exit = true                         does the VM end before the recording does?
    sequence = 0                        mmu_invalidate_seq at the beginning
    [[memory]]                          memslots: name, kind (host.KINDS), gfn, and how much:
    share = 1.0 | pages = 512           of --mem, or a number of pages
    [[phase]]                           one after another; all that is in one runs at once
    touch = { memory, order, write, fetch, share }   what each vCPU does: order is sequential or
                                        random, write and fetch are fractions, share is of --faults
    host = [ { do, memory, ... } ]      what another thread does meanwhile: a verb of `ops`
    after = [ ... ]                     what is done when the vCPUs have stopped
    passes = true                       repeat the phase until --faults are done

May import: `probes.errors`, standard library, `tracer.simulator`.
"""

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from probes.errors import UsageError
from tracer.simulator.host import KINDS
from tracer.simulator.ops import VERBS

__all__ = ("Memory", "Phase", "Scenario", "load", "names")

_FOLDER = Path(__file__).parent / "scenarios"
#: A file of more is none that a person wrote.
_BYTES_MAX = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """One memslot of a scenario."""

    name: str
    kind: str
    gfn: int
    share: float = 0.0
    pages: int = 0
    flags: int = 0

    def npages(self, all_pages: int) -> int:
        """Return how many pages it has in a VM of so many."""
        return self.pages or max(64, int(all_pages * self.share))


@dataclasses.dataclass(frozen=True, slots=True)
class Phase:
    """What runs at the same time."""

    touch: dict[str, Any]
    host: tuple[dict[str, Any], ...] = ()
    after: tuple[dict[str, Any], ...] = ()
    passes: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario file."""

    name: str
    title: str
    memory: tuple[Memory, ...]
    phases: tuple[Phase, ...]
    mmu: str = "tdp"
    exit: bool = True
    sequence: int = 0
    aliases: int = 1


@functools.cache
def names() -> Mapping[str, str]:
    """Return the scenarios that come with pfntrace: name -> title."""
    return {path.stem: load(path.stem).title for path in sorted(_FOLDER.glob("*.toml"))}


def load(name_or_file: str) -> Scenario:
    """Return a scenario by its name, or from a file. Raises UsageError with what is wrong."""
    path = Path(name_or_file)
    if "/" not in name_or_file and path.suffix != ".toml":
        path = _FOLDER / f"{name_or_file}.toml"
        if not path.exists():
            known = ", ".join(sorted(p.stem for p in _FOLDER.glob("*.toml")))
            raise UsageError(f"--scenario {name_or_file}: no such scenario; there are {known}")
    try:
        data = path.read_bytes()
        if len(data) > _BYTES_MAX:
            raise UsageError(f"{path}: too long for a scenario")
        return _parse(path.stem, tomllib.loads(data.decode()))
    except (KeyError, TypeError, ValueError) as err:
        # str() of a KeyError is the key alone
        what = f"lacks {err}" if isinstance(err, KeyError) else str(err)
        raise UsageError(f"{path}: not a scenario: {what}") from None
    except OSError as err:
        raise UsageError(f"{path}: {err.strerror}") from None


def _parse(name: str, data: dict[str, Any]) -> Scenario:
    memory = tuple(Memory(**entry) for entry in data.pop("memory"))
    known = {m.name for m in memory}
    phases = []
    for entry in data.pop("phase"):
        phase = Phase(
            touch=entry.pop("touch", {}),
            host=tuple(entry.pop("host", ())),
            after=tuple(entry.pop("after", ())),
            **entry,
        )
        for step in (*phase.host, *phase.after):
            if step["do"] not in VERBS:
                raise ValueError(f"no verb {step['do']!r}; there are {', '.join(VERBS)}")
        for step in (phase.touch, *phase.host, *phase.after):
            if step and step["memory"] not in known:
                raise ValueError(f"no memory {step['memory']!r}")
        phases.append(phase)
    for entry in memory:
        if entry.kind not in KINDS:
            raise ValueError(f"no kind of memory {entry.kind!r}; there are {', '.join(KINDS)}")
    return Scenario(name=name, memory=memory, phases=tuple(phases), **data)
