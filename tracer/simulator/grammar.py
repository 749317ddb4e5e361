"""What a scenario file may say: each table, each key, which values it takes, and its default.

The only place with defaults and bounds: `read` turns one table of a file into values that have
every key, and verbs (`ops`) take their arguments from those. A key without a default must be there.

May import: `probes.wire`, standard library, `tracer.simulator.host`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

from probes.wire import INVALIDATE_EVENTS
from tracer.simulator.host import KINDS

__all__ = (
    "CHANGES_SLOTS", "FILE", "GFN_BITS", "HELPERS", "MEMORY", "MOVE_GAP", "PHASE", "TOUCH", "VERBS",
    "Key", "Problem", "Step", "read", "read_step", "step_of",
)  # fmt: skip

#: Threads beside the vCPUs that can be busy while these run.
HELPERS = 3
#: A guest physical address has 52 bits at most, as a page table entry has room for it.
GFN_BITS = 40
#: A slot is moved behind its end and so many frames more.
MOVE_GAP = 1024
#: 1 TiB in 4K pages, as much as --mem takes.
_PAGES = 1 << 28
_HOUR_US = 3_600_000_000
#: Verbs that hold kvm->slots_lock: one thread at a time.
CHANGES_SLOTS = frozenset({"churn", "move", "dirty_log"})

#: What another thread does, with each argument: `do`, `memory` and those of the verb.
Step = dict[str, Any]


class Problem(ValueError):
    """What is wrong with a value of a file; where it stands is said by who reads the file."""


# --- kinds of values ------------------------------------------------------------------------------


class _Takes(Protocol):
    """What a key takes: is this value one, and what is one (the words behind "write")?"""

    def has(self, value: object) -> bool: ...

    def __str__(self) -> str: ...


@dataclasses.dataclass(frozen=True, slots=True)
class Whole:
    """A whole number, or a word in its place."""

    low: int
    high: int
    word: str = ""

    def has(self, value: object) -> bool:
        """Tell whether this is one; true and 5.0 are none."""
        if isinstance(value, str):
            return bool(self.word) and value == self.word
        return type(value) is int and self.low <= value <= self.high

    def __str__(self) -> str:
        """Return what to write."""
        return f"a whole number from {self.low} to {self.high:,}" + (
            f', or "{self.word}"' if self.word else ""
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Fraction:
    """A number from 0 to 1."""

    def has(self, value: object) -> bool:
        """Tell whether this is one; nan is none."""
        return isinstance(value, int | float) and type(value) is not bool and 0 <= value <= 1

    def __str__(self) -> str:
        """Return what to write."""
        return "a number from 0 to 1"


@dataclasses.dataclass(frozen=True, slots=True)
class OneOf:
    """One of a few values."""

    values: tuple[object, ...]

    def has(self, value: object) -> bool:
        """Tell whether this is one, of the same type."""
        return any(type(value) is type(one) and value == one for one in self.values)

    def __str__(self) -> str:
        """Return what to write."""
        return "one of " + ", ".join(
            str(v).lower() if type(v) is bool else str(v) for v in self.values
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Text:
    """Some characters on one line."""

    most: int

    def has(self, value: object) -> bool:
        """Tell whether this is one; nothing in it moves a terminal's cursor."""
        return isinstance(value, str) and 0 < len(value) <= self.most and value.isprintable()

    def __str__(self) -> str:
        """Return what to write."""
        return f"one line of text, at most {self.most} characters"


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """A table of its own, whose keys are declared below."""

    def has(self, value: object) -> bool:
        """Tell whether this is one."""
        return isinstance(value, dict)

    def __str__(self) -> str:
        """Return what to write."""
        return "a table, { … }"


@dataclasses.dataclass(frozen=True, slots=True)
class Tables:
    """An array of tables: so many."""

    low: int
    high: int

    def has(self, value: object) -> bool:
        """Tell whether this is one."""
        return (
            isinstance(value, list)
            and self.low <= len(value) <= self.high
            and all(isinstance(entry, dict) for entry in value)
        )

    def __str__(self) -> str:
        """Return what to write."""
        return f"an array of {self.low} to {self.high} tables"


@dataclasses.dataclass(frozen=True, slots=True)
class Key:
    """One key: what it takes, what it is if it is left out (None: it must be there), and why."""

    takes: _Takes
    default: Any
    about: str


_MUST = None
_YES_NO = OneOf((False, True))
_NAME = Text(64)
_SHARE = Fraction()


# --- the file -------------------------------------------------------------------------------------

#: The file itself.
FILE = {
    "title": Key(Text(200), _MUST, "what --list says of it"),
    "mmu": Key(OneOf(("tdp", "shadow")), "tdp", "--mmu overrides it"),
    "exit": Key(_YES_NO, True, "does the VM end before the recording does?"),
    "sequence": Key(Whole(0, (1 << 63) - 1), 0, "mmu_invalidate_seq at the beginning"),
    "aliases": Key(Whole(1, 64), 1, "guest addresses of one frame, with the shadow MMU"),
    "memory": Key(Tables(1, 64), _MUST, "the memslots"),
    "phase": Key(Tables(1, 64), _MUST, "one after another; all that is in one runs at once"),
}
#: [[memory]]: one memslot. How much: a share of --mem (64 pages at least), or a number of pages.
MEMORY = {
    "name": Key(_NAME, _MUST, "how phases call it"),
    "kind": Key(OneOf(tuple(KINDS)), _MUST, "what the host has behind it"),
    "gfn": Key(Whole(0, (1 << GFN_BITS) - 1), _MUST, "its first guest frame"),
    "share": Key(_SHARE, 0.0, "of --mem"),
    "pages": Key(Whole(0, _PAGES), 0, "in place of a share; 0 is the share"),
    "flags": Key(OneOf((0, 2)), 0, "2 is KVM_MEM_READONLY; dirty_log is a verb"),
}
#: [[phase]]
PHASE = {
    "touch": Key(Table(), {}, "what each vCPU does; {} is nothing"),
    "host": Key(Tables(0, HELPERS), [], "what other threads do meanwhile: a verb each"),
    "after": Key(Tables(0, 64), [], "verbs, one after another, when the vCPUs have stopped"),
    "passes": Key(_YES_NO, False, "repeat the phase until --faults are done"),
}
#: touch = { … }
TOUCH = {
    "memory": Key(_NAME, _MUST, "which"),
    "order": Key(OneOf(("sequential", "random")), "sequential", "of the pages"),
    "write": Key(_SHARE, 1.0, "of the accesses"),
    "fetch": Key(_SHARE, 0.0, "of those that do not write"),
    "share": Key(_SHARE, 1.0, "of --faults"),
}


# --- verbs ----------------------------------------------------------------------------------------

_TIMES = Whole(0, 100_000, "busy")
_ABOUT_TIMES = "how often; busy: as long as vCPUs have something to do"
_ABOUT_EVERY = "how long it waits in between"


def _again(times: int, every_us: int) -> dict[str, Key]:
    return {"times": Key(_TIMES, times, _ABOUT_TIMES), **_waits(every_us)}


def _waits(every_us: int) -> dict[str, Key]:
    return {"every_us": Key(Whole(1, 10_000_000), every_us, _ABOUT_EVERY)}


def _pages(default: int | str) -> dict[str, Key]:
    return {"pages": Key(Whole(1, _PAGES, "all"), default, "how many, at most all of the memory")}


#: Verb -> its arguments beside `do` and `memory`.
VERBS: Mapping[str, Mapping[str, Key]] = {
    "discard": {
        **_pages(64), **_again(1, 200),
        "event": Key(OneOf(INVALIDATE_EVENTS), "clear", "why, as the mmu notifier says it"),
    },
    "merge": _again(32, 100),
    "storm": _again(100, 40),
    "age": {**_pages("all"), **_again(1, 1000)},
    "dirty_log": {"rounds": Key(Whole(0, 1000), 3, "after the first"), **_waits(3000)},
    "pin": _again(8, 500),
    "pfncache": _again(32, 200),
    "churn": _again(4, 2000),
    "move": {"times": Key(Whole(0, 100_000), 1, "there and back"), **_waits(2000)},
    "sleep": {"us": Key(Whole(0, _HOUR_US), 1000, "how long")},
}  # fmt: skip

_STEP = {
    "do": Key(OneOf(tuple(VERBS)), _MUST, "the verb"),
    "memory": Key(_NAME, _MUST, "to which"),
}


# --- reading --------------------------------------------------------------------------------------


def read(keys: Mapping[str, Key], given: Mapping[str, object]) -> dict[str, Any]:
    """Return the values of a table, each key with its default. Raises Problem."""
    for name in given:
        if name not in keys:
            raise Problem(f"there is no key {name!a:.40}; it takes {', '.join(keys)}")
    for name, key in keys.items():
        if name not in given and key.default is _MUST:
            raise Problem(f"lacks {name!r}; write {key.takes}")
        if name in given and not key.takes.has(given[name]):
            raise Problem(f"{name} = {_shown(given[name])}; write {key.takes}")
    return {name: given.get(name, key.default) for name, key in keys.items()}


def read_step(given: Mapping[str, object]) -> Step:
    """Return what another thread does, with all arguments of its verb. Raises Problem."""
    do = read({"do": _STEP["do"]}, {"do": given["do"]} if "do" in given else {})["do"]
    step = read({**_STEP, **VERBS[do]}, given)
    if do == "discard" and step["pages"] == "all":
        for name in ("times", "every_us", "event"):
            if name in given:
                raise Problem(f'{name} says nothing of pages = "all"; take {name} away')
    return step


def step_of(verb: str, **arguments: object) -> Step:
    """Return a step with the defaults of its verb, for who has no file; `memory` is "" then."""
    return {"do": verb, "memory": "", **read(VERBS[verb], arguments)}


def _shown(value: object) -> str:
    if type(value) is bool:
        return str(value).lower()
    if isinstance(value, int) and abs(value) > 1 << 64:
        return "a number of more than 64 bits"  # Python refuses to print very long ones
    return f"{value!a:.40}"
