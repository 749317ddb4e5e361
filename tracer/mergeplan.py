"""What goes where when traces are merged: whose clock, which VM and cpu numbers, or why not at all.

Three things are told apart. Files of one *recording* have the same start: their VM numbers, stacks
and counters belong together. Recordings of one *boot* share CLOCK_MONOTONIC, cpus and page frames,
but each numbers its VMs anew, and what happened between them nobody saw. Of another boot or host
also cpus and frames are others, and the clocks are laid over each other by the wall clock.

    recording r, VM 3   →  VM 3 + vm_base(r)         boot b, cpu 2  →  cpu 2 + cpu_base(b)
    recording r, stack  →  stack + stack_base(r)     boot b, ts     →  ts + shift_ns(b)

So a cpu number says which boot a record is of, and a VM number which recording. May import:
`probes.errors`, `tracer.schema`, `tracer.timeorder`, `tracer.tracefile`, `tracer.tracemeta`,
`tracer.tracescan`, numpy.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from probes.errors import MergeError
from tracer import schema
from tracer.timeorder import values
from tracer.tracefile import TraceMeta, TraceReader
from tracer.tracemeta import parse_json
from tracer.tracescan import Block

__all__ = ("COUNTS", "MERGED", "PARTS_MAX", "Part", "Place", "agree", "look", "place", "provenance")

#: Key of the settings of a merged trace.
MERGED = "merged"
#: Each is an open file and some lines of the head.
PARTS_MAX = 500
COUNTS = ("produced", "lost", "filtered", "torn")

#: One past the highest number that a column can hold.
_VMS, _CPUS, _STACKS, _TIMES = 1 << 32, 1 << 16, 1 << 31, 1 << 64
#: VMs of one recording that are compared with another's.
_VMS_COMPARED = 1 << 16
#: The wall clock of one boot, seen twice, may differ by what NTP did meanwhile.
_WALL_DRIFT_NS = 10 * 10**9
#: Values of a kernel that differ from boot to boot and mean nothing to a reader end like this.
_PLACES = ("_base", "_pfn")


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """One file, as a look through all of it found it. Times are ns of its own clock."""

    path: Path
    meta: TraceMeta
    info: dict[str, Any]
    facts: dict[str, Any]
    #: the intact batches, and the times of the first and the last record of the kernel.
    blocks: tuple[Block, ...]
    span: tuple[int, int]
    vm_max: int
    cpu_max: int
    stack_max: int
    #: (struct kvm, process) of its VMs.
    vms: frozenset[tuple[int, int]]
    #: kind -> COUNTS, since the start of the recording.
    counts: dict[str, tuple[int, ...]]

    @property
    def recording(self) -> tuple[Any, ...]:
        """Return what only files of one recording have in common."""
        meta = self.meta
        return meta.start_unix_ns, meta.start_monotonic_ns, meta.hostname, meta.command

    @property
    def wall_ns(self) -> int:
        """Return the wall clock (ns since 1970) at 0 of the part's clock."""
        return self.meta.start_unix_ns - self.meta.start_monotonic_ns


@dataclasses.dataclass(frozen=True, slots=True)
class Place:
    """Where a part goes: numbers to add to its own, and which recording and boot it is of."""

    part: Part
    recording: int
    boot: int
    vm_base: int = 0
    stack_base: int = 0
    cpu_base: int = 0
    cpus: int = 0
    shift_ns: int = 0


def look(reader: TraceReader, step: Callable[[int], None]) -> Part:
    """Read all of a trace once and return what merging must know of it.

    `step` is called with the rows of each batch. Raises MergeError for a trace that is itself
    merged.
    """
    path, meta = reader.path, reader.meta
    if MERGED in meta.settings:
        raise MergeError(f"{path} was itself made by merge: name the parts it was made of")
    read = reader.loader(("vm", "cpu", "stack", "kvm", "vm_tgid"))
    highest = {"vm": 0, "cpu": 0, "stack": -1}
    vms: set[tuple[int, int]] = set()
    blocks: list[Block] = []
    for block in reader.blocks():
        batch = read(block)
        if batch is None:
            break
        blocks.append(block)
        for name, least in highest.items():
            highest[name] = max(least, int(values(batch, name).max()))
        if block.kind == "VM" and len(vms) < _VMS_COMPARED:
            vms.update(zip(*(values(batch, n).tolist() for n in ("kvm", "vm_tgid")), strict=True))
        step(block.rows)
    info = reader.info()
    return Part(
        path,
        meta,
        info,
        _facts(meta),
        tuple(blocks),
        _span(blocks),
        highest["vm"],
        highest["cpu"],
        highest["stack"],
        frozenset(vms),
        _counts(reader, info, blocks),
    )


def _span(blocks: Sequence[Block]) -> tuple[int, int]:
    seen = [block for block in blocks if block.kind in schema.RECORD_KINDS]
    low = min((block.ts_min for block in seen), default=0)
    return low, max((block.ts_max for block in seen), default=0)


def _facts(meta: TraceMeta) -> dict[str, Any]:
    try:
        facts = parse_json(meta.facts)
    except ValueError:
        return {}
    return facts if isinstance(facts, dict) else {}


def _counts(
    reader: TraceReader, info: dict[str, Any], blocks: Iterable[Block]
) -> dict[str, tuple[int, ...]]:
    """Return kind -> COUNTS: what the recorder said at the end, else its newest LOSS rows."""
    said = info["summary"].get("counts")
    if isinstance(said, dict):
        return {k: _whole(said[k]) for k in schema.RECORD_KINDS if isinstance(said.get(k), dict)}
    newest: dict[tuple[str, int], dict[str, Any]] = {}
    read = reader.loader(("loss_kind", "cpu", *COUNTS))
    for block in blocks:
        if block.kind == "LOSS" and (batch := read(block)) is not None:
            for row in batch.to_pylist():
                newest[row["loss_kind"], row["cpu"]] = row
    sums: dict[str, tuple[int, ...]] = {}
    for (kind, _), row in newest.items():
        before = sums.get(kind, (0,) * len(COUNTS))
        sums[kind] = tuple(a + b for a, b in zip(before, _whole(row), strict=True))
    return {kind: sums[kind] for kind in schema.RECORD_KINDS if kind in sums}


def _whole(counts: dict[str, Any]) -> tuple[int, ...]:
    numbers = (counts.get(name) for name in COUNTS)
    return tuple(n if type(n) is int and 0 <= n < _TIMES else 0 for n in numbers)


# --- may they become one? -------------------------------------------------------------------------


def agree(parts: Sequence[Part]) -> None:
    """Raise MergeError unless all parts can be read by the same rules and none repeats another.

    A trace has one description of its kernel. Two kernels may differ in name as long as all that
    a reader takes from the description is the same: generation, hooks, RET_PF_*, PG_*, SPTE bits.
    """
    first = parts[0]
    rules = _rules(first)
    for part in parts[1:]:
        for name, value in _rules(part).items():
            if value != rules[name]:
                raise MergeError(
                    f"{part.path} ({_kernel(part)}) and {first.path} ({_kernel(first)}) differ in "
                    f"{name}: records of one trace are read by one set of rules; see them side by "
                    "side with pfntrace diff"
                )
    _refuse_repeated(parts)


def _kernel(part: Part) -> str:
    return f"{part.info['kernel'] or 'unknown kernel'}, {part.info['generation'] or '?'}"[:80]


def _rules(part: Part) -> dict[str, Any]:
    """Return what a reader of the records takes from the description of the kernel."""
    profile, facts = part.meta.profile, part.facts
    found = facts.get("values")
    values_ = found.items() if isinstance(found, dict) else ()
    bits = {name: value for name, value in values_ if not name.endswith(_PLACES)}
    return {
        "generation": part.info["generation"],
        "hooks": sorted((h["hook"], sorted(h["symbols"])) for h in part.info["hooks"]),
        "missing hooks": sorted(m["hook"] for m in part.info["missing"]),
        "refused hooks": profile.get("failed"),
        "names of results": part.meta.results,
        "constants": facts.get("enums"),
        "SPTE bits and MMU": bits,
        "--gfn": part.meta.settings.get("gfns"),
    }


def _refuse_repeated(parts: Sequence[Part]) -> None:
    """Raise MergeError if records would be there twice."""
    owner: dict[tuple[str, int, int, bytes], Part] = {}
    for part in parts:
        for block in part.blocks:
            if block.kind in schema.RECORD_KINDS:
                key = (block.kind, block.ts_min, block.ts_max, block.body_crc)
                other = owner.setdefault(key, part)
                if other is not part:
                    raise MergeError(
                        f"{other.path} and {part.path} hold the same records: name each part once"
                    )
    # Each pair once; parts are few, and most are apart in time.
    for at, part in enumerate(parts):
        for other in parts[:at]:
            low, high = max(part.span[0], other.span[0]), min(part.span[1], other.span[1])
            shared = low <= high and part.vms & other.vms
            if shared and part.recording != other.recording and _same_boot(part, other):
                raise MergeError(
                    f"{other.path} and {part.path} recorded the same VM at the same time: merged, "
                    "each of its records would be there twice"
                )


def _same_boot(a: Part, b: Part) -> bool:
    """Tell whether two parts were recorded between the same two boots of one host.

    Traces of before `boot_id` was recorded show it by the host's name and kernel, the bases that
    KASLR draws anew at each boot, and a wall clock that agrees. In doubt they are of two boots:
    then nothing is concluded from one to the other.
    """
    ids = a.meta.settings.get("boot_id"), b.meta.settings.get("boot_id")
    if all(isinstance(name, str) and name for name in ids):
        return bool(ids[0] == ids[1])
    same = a.meta.hostname == b.meta.hostname and a.facts.get("version") == b.facts.get("version")
    bases = [
        {name: value for name, value in found.items() if name.endswith(_PLACES)}
        if isinstance(found, dict)
        else {}
        for found in (a.facts.get("values"), b.facts.get("values"))
    ]
    return same and bases[0] == bases[1] and abs(a.wall_ns - b.wall_ns) <= _WALL_DRIFT_NS


# --- where each goes ------------------------------------------------------------------------------


def place(parts: Sequence[Part]) -> list[Place]:
    """Return where each part goes, in order of time; raises MergeError if the numbers run out."""
    boots: list[list[Part]] = []
    for part in sorted(parts, key=lambda p: (p.meta.start_unix_ns, p.span)):
        mates = next((boot for boot in boots if _same_boot(boot[0], part)), None)
        if mates is None:
            boots.append(mates := [])
        mates.append(part)
    # The earliest boot keeps its clock, so that no time becomes negative.
    epoch = min(boot[0].wall_ns for boot in boots)
    places: list[Place] = []
    recordings: dict[tuple[Any, ...], int] = {}
    vm_base = stack_base = cpu_base = 0
    for number, boot in enumerate(boots):
        cpus = 1 + max(part.cpu_max for part in boot)
        shift = boot[0].wall_ns - epoch
        for key in dict.fromkeys(part.recording for part in boot):
            files = [part for part in boot if part.recording == key]
            at = recordings.setdefault((number, *key), len(recordings))
            for part in files:
                where = Place(part, at, number, vm_base, stack_base, cpu_base, cpus, shift)
                places.append(_checked(where))
            vm_base += max(part.vm_max for part in files)
            stack_base += 1 + max(part.stack_max for part in files)
        cpu_base += cpus
    return sorted(places, key=lambda p: (p.part.span[0] + p.shift_ns, p.recording))


def _checked(where: Place) -> Place:
    """Return a place whose numbers fit their columns."""
    part = where.part
    last = max((block.ts_max for block in part.blocks), default=0)
    for name, number, end in (
        ("VM", part.vm_max + where.vm_base, _VMS),
        ("stack", part.stack_max + where.stack_base, _STACKS),
        ("cpu", part.cpu_max + where.cpu_base, _CPUS),
        ("time", last + where.shift_ns, _TIMES),
    ):
        if number >= end:
            raise MergeError(f"{part.path}: no room for its {name} numbers beside those of others")
    return where


def provenance(places: Sequence[Place]) -> dict[str, Any]:
    """Return what a merged trace says of its parts; names in `_ts` are times of the merged clock.

    `tracer.traceview` makes of it what each recording alone would say of itself.
    """
    boots = len({where.boot for where in places})
    return {
        "clock": "monotonic" if boots == 1 else "wall",
        "boots": boots,
        "parts": [_origin(where) for where in places],
    }


def _origin(where: Place) -> dict[str, Any]:
    part, meta = where.part, where.part.meta
    first, last = part.span
    end = part.info["summary"]
    return {
        "file": part.path.name[:255],
        "hostname": meta.hostname[:255],
        "kernel": str(part.info["kernel"])[:255],
        "command": " ".join(map(str, meta.command))[:1000],
        "start": part.info["start"],
        "boot_id": str(meta.settings.get("boot_id", ""))[:64],
        "recording": where.recording,
        "boot": where.boot,
        "vms": [where.vm_base + 1, where.vm_base + part.vm_max] if part.vm_max else [],
        "vm_base": where.vm_base,
        "cpus": [where.cpu_base, where.cpu_base + where.cpus - 1],
        "cpu_base": where.cpu_base,
        "stack_base": where.stack_base,
        "shift_ns": where.shift_ns,
        "first_ts": first + where.shift_ns,
        "last_ts": last + where.shift_ns,
        "start_ts": meta.start_monotonic_ns + where.shift_ns,
        "end_ts": max((b.ts_max for b in part.blocks), default=0) + where.shift_ns,
        **{name: part.info[name] for name in ("records", "kinds", *COUNTS, "complete")},
        "counts": {k: dict(zip(COUNTS, n, strict=True)) for k, n in part.counts.items()},
        "reason": str(part.info["reason"])[:200],
        "why": str(end.get("why", ""))[:40],
        "problem": str(end.get("problem", ""))[:200],
        "settings": _small(meta.settings),
    }


def _small(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recorder's settings, which are a few words each."""
    return {k: v for k, v in settings.items() if len(k) < 40 and len(json.dumps(v)) < 400}
