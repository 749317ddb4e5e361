"""Scenario files: what a guest and its host do, in TOML that fits on a screen.

    title = "..."                       one line, for --list
    [[memory]]                          memslots: name, kind (host.KINDS), gfn, and how much
    [[phase]]                           one after another; all that is in one runs at once
    touch = { memory, order, … }        what each vCPU does
    host = [ { do, memory, ... } ]      what other threads do meanwhile: a verb of `ops` each
    after = [ ... ]                     what is done when the vCPUs have stopped
    passes = true                       repeat the phase until --faults are done

`grammar` has every key, what it takes and its default. May import: `probes.errors`, standard
library, `tracer.simulator`.
"""

import contextlib
import dataclasses
import functools
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from probes.errors import UsageError
from tracer.simulator import grammar
from tracer.simulator.grammar import Problem, Step
from tracer.simulator.host import KINDS

__all__ = ("Memory", "Phase", "Scenario", "load", "names")

_FOLDER = Path(__file__).parent / "scenarios"
#: A file of more is none that a person wrote.
_BYTES_MAX = 1 << 16


@dataclasses.dataclass(frozen=True, slots=True)
class Memory:
    """One memslot of a scenario (`grammar.MEMORY`)."""

    name: str
    kind: str
    gfn: int
    share: float
    pages: int
    flags: int

    def npages(self, all_pages: int) -> int:
        """Return how many pages it has in a VM of so many: whole ones of its kind."""
        npages = self.pages or max(64, int(all_pages * self.share))
        kind = KINDS[self.kind]
        if kind.order or kind.level > 1:
            whole = max(1 << kind.order, 512)
            npages = max(whole, npages & -whole)
        return npages


@dataclasses.dataclass(frozen=True, slots=True)
class Phase:
    """What runs at the same time (`grammar.PHASE`); `touch` is empty if vCPUs do nothing."""

    touch: dict[str, Any]
    host: tuple[Step, ...]
    after: tuple[Step, ...]
    passes: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Scenario:
    """One scenario file (`grammar.FILE`)."""

    name: str
    title: str
    memory: tuple[Memory, ...]
    phases: tuple[Phase, ...]
    mmu: str
    exit: bool
    sequence: int
    aliases: int

    def sizes(self, all_pages: int) -> dict[str, int]:
        """Return name -> pages of each memory, in a VM of so many. Raises UsageError.

        Each has its own guest frames, as KVM_SET_USER_MEMORY_REGION wants it, also where a step
        moves it to.
        """
        steps = [step for phase in self.phases for step in (*phase.host, *phase.after)]
        moved = {step["memory"] for step in steps if step["do"] == "move"}
        sizes = {memory.name: memory.npages(all_pages) for memory in self.memory}
        last, behind = "", 0
        for memory in sorted(self.memory, key=lambda one: one.gfn):
            where = f"scenario {self.name}: memory {memory.name!a}"
            if memory.gfn < behind:
                raise UsageError(
                    f"{where}: gfn {memory.gfn:#x} is within memory {last!a}, which ends before "
                    f"{behind:#x}; move one of them, or lower pages or --mem"
                )
            pages = sizes[memory.name]
            last, behind = memory.name, memory.gfn + pages
            if memory.name in moved:
                behind += pages + grammar.MOVE_GAP
            if behind > 1 << grammar.GFN_BITS:
                raise UsageError(
                    f"{where}: gfn {memory.gfn:#x} and {behind - memory.gfn:,} pages are beyond "
                    f"guest frame {(1 << grammar.GFN_BITS) - 1:#x}; lower one of them"
                )
        return sizes


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
        with path.open("rb") as file:
            data = file.read(_BYTES_MAX + 1)
    except (OSError, ValueError) as err:  # a name with a zero byte is a ValueError
        why = (isinstance(err, OSError) and err.strerror) or "cannot be opened"
        raise UsageError(f"{path}: {why}; name a TOML file, or see --list") from None
    if len(data) > _BYTES_MAX:
        raise UsageError(f"{path}: too long for a scenario; {_BYTES_MAX >> 10} KiB at most")
    try:
        return _scenario(path.stem, tomllib.loads(data.decode()))
    except Problem as err:
        raise UsageError(f"{path}: {err}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path}: not a scenario: no text in UTF-8; write TOML") from None
    except RecursionError:
        raise UsageError(f"{path}: not a scenario: nested too deeply; write less of it") from None
    except ValueError as err:  # tomllib's; says where
        raise UsageError(f"{path}: not a scenario: {err}; write TOML") from None


@contextlib.contextmanager
def _at(where: str) -> Iterator[None]:
    """Say of a problem in which table it is."""
    try:
        yield
    except Problem as err:
        raise Problem(f"{where}: {err}") from None


def _scenario(name: str, data: dict[str, Any]) -> Scenario:
    file = grammar.read(grammar.FILE, data)
    memory: dict[str, Memory] = {}
    for number, given in enumerate(file.pop("memory"), 1):
        with _at(f"memory {number}"):
            one = Memory(**grammar.read(grammar.MEMORY, given))
            if one.pages and "share" in given:
                raise Problem("pages and share; keep one of them")
            if one.name in memory:
                raise Problem(f"there is a memory {one.name!a} already; name it otherwise")
            memory[one.name] = one
    phases = []
    for number, given in enumerate(file.pop("phase"), 1):
        with _at(f"phase {number}"):
            phases.append(_phase(given, memory))
    return Scenario(name=name, memory=tuple(memory.values()), phases=tuple(phases), **file)


def _phase(given: dict[str, Any], memory: Mapping[str, Memory]) -> Phase:
    phase = grammar.read(grammar.PHASE, given)
    touch: dict[str, Any] = {}
    if phase["touch"]:
        with _at("touch"):
            touch = _known(grammar.read(grammar.TOUCH, phase["touch"]), memory)
    elif phase["passes"]:
        raise Problem("passes without touch has no end; write what vCPUs touch")
    steps: dict[str, tuple[Step, ...]] = {}
    for name in ("host", "after"):
        read = []
        for number, step in enumerate(phase[name], 1):
            do = step.get("do")
            verb = f" ({do})" if isinstance(do, str) and do in grammar.VERBS else ""
            with _at(f"{name} {number}{verb}"):
                read.append(_known(grammar.read_step(step), memory))
        steps[name] = tuple(read)
    busy = [step["do"] for step in steps["host"] if step["do"] in grammar.CHANGES_SLOTS]
    if len(busy) > 1:
        raise Problem(
            f"host: {' and '.join(busy)} wait for each other (kvm->slots_lock); "
            "write them into phases of their own"
        )
    return Phase(touch=touch, passes=phase["passes"], **steps)


def _known(table: dict[str, Any], memory: Mapping[str, Memory]) -> dict[str, Any]:
    if table["memory"] not in memory:
        known = ", ".join(memory)
        raise Problem(f"no memory {table['memory']!a}; there is {known}")
    return table
