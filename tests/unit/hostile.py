"""Traces that no recorder wrote: true to the format, so that a reader lets them in, and absurd.

`MAKERS` has them by name; `unit.hostilerun` asks every command about them.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from unit.records import START_NS, group, meta, records, write_trace

from probes import wire
from tracer import schema
from tracer.tracefile import TraceWriter

__all__ = ("ESCAPE", "MAKERS", "every_kind", "sptes")

U64 = 2**64 - 1
ESCAPE = "\x1b]0;owned\x07\x1b[2J\u202e\r\n<script>alert(1)</script>\x00"
Maker = Callable[[Path], None]
MAKERS: dict[str, Maker] = {}


def maker(function: Maker) -> Maker:
    MAKERS[function.__name__.removeprefix("_").replace("_", "-")] = function
    return function


def every_kind(count: int = 40, **fields: Any) -> list[tuple[str, np.ndarray]]:
    """Return records of every kind; only fields that a kind has are set."""
    flush = []
    for number, kind in enumerate(schema.RECORD_KINDS):
        dtype = wire.FAULT if kind == "FAULT" else wire.EVENT
        known = {k: v for k, v in fields.items() if _has(dtype, k)}
        flush.append((kind, records(kind, count, seed=number + 1, **known)))
    return flush


def _has(dtype: np.dtype, name: str) -> bool:
    first, _, rest = name.partition("__")
    return first in (dtype.names or ()) and (not rest or _has(dtype[first], rest))


def sptes(count: int = 60, **fields: Any) -> list[tuple[str, np.ndarray]]:
    """Return installs, changes and zaps in turns."""
    made = records("SPTE", count, **fields)
    ops = [wire.OPS.index(op) for op in ("install", "change", "zap")]
    made["h"]["op"] = np.resize(np.array(ops, "u1"), count)
    return [("SPTE", made)]


# --- numbers --------------------------------------------------------------------------------------


@maker
def _times_absurd(path: Path) -> None:
    times = np.resize(np.array([0, 1, START_NS, 2**63 - 1, 2**63, U64 - 1, U64], "u8"), 42)
    times.sort()
    flush = every_kind(42, h__ts=times, h__fault_ts=times[::-1])
    write_trace(path, [flush, sptes(42, h__ts=times)])


@maker
def _all_at_once(path: Path) -> None:
    write_trace(path, [every_kind(300, h__ts=START_NS), sptes(300, h__ts=START_NS)])


@maker
def _vms_and_cpus_at_the_end(path: Path) -> None:
    flush = every_kind(30, h__vm=2**32 - 1, h__cpu=65535, h__vcpu=2**31 - 1, h__tid=2**32 - 1)
    write_trace(path, [flush, sptes(30, h__vm=2**32 - 1, h__vcpu=-(2**31))])


@maker
def _a_vm_for_each_record(path: Path) -> None:
    count = 800
    vms = np.arange(1, count + 1, dtype="u4") * np.uint32(1_000_003)
    flush = every_kind(count, h__vm=vms, h__tgid=vms, h__tid=vms, h__vcpu=np.arange(count))
    write_trace(path, [flush, sptes(count, h__vm=vms)])


@maker
def _gfns_beyond_memory(path: Path) -> None:
    gfns = np.resize(np.array([0, 2**40, 2**52, 2**63, U64 - 511, U64], "u8"), 60)
    flush = every_kind(60, gfn=gfns, pfn=gfns, walk_pfn=gfns, addr=gfns, hva=gfns)
    write_trace(path, [flush, sptes(60, gfn=gfns, pfn=gfns, a=gfns << np.uint64(12), b=gfns)])


@maker
def _frames_far_apart(path: Path) -> None:
    # Whoever keeps a table of frames by number pays for each a page of it.
    frames = np.random.default_rng(4).integers(0, 2**40, 3000, "u8")
    frames.sort()
    flush = every_kind(3000, gfn=frames, pfn=frames, hva=frames << np.uint64(12))
    write_trace(path, [flush, sptes(3000, gfn=frames, pfn=frames)])


@maker
def _levels_absurd(path: Path) -> None:
    levels = np.resize(np.array([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 63, 64, 200, 255], "u1"), 84)
    gfns = np.arange(84, dtype="u8") * np.uint64(512)
    flush = every_kind(84, level=levels, as_id=levels, mmu=levels, cause=levels)
    write_trace(path, [flush, sptes(84, level=levels, gfn=gfns), sptes(84, level=levels, mmu=2)])


@maker
def _orders_absurd(path: Path) -> None:
    orders = np.resize(np.array([0, 9, 10, 11, 30, 52, 63, 64, 200, 255], "u1"), 60)
    flush = [
        (kind, records(kind, 60, d=orders, page__order=orders, pfn=np.arange(60) * 7))
        for kind in ("PAGE_FREE", "PAGE_ALLOC")
    ]
    write_trace(path, [every_kind(60, page__order=orders, page_end__order=orders), flush, sptes()])


@maker
def _ranges_absurd(path: Path) -> None:
    ends = np.resize(np.array([0, 1, 2**40, 2**63, U64], "u8"), 50)
    flush = [
        ("SLOT", records("SLOT", 50, gfn=ends, a=ends[::-1], b=ends, c=ends, d=np.arange(50))),
        ("INVALIDATE", records("INVALIDATE", 50, a=ends, b=ends[::-1])),
        ("VMA", records("VMA", 50, a=ends, b=ends[::-1], c=ends)),
        ("PIN", records("PIN", 50, b=ends, gfn=ends)),
    ]
    write_trace(path, [flush, every_kind(20), sptes()])


@maker
def _one_slot_of_everything(path: Path) -> None:
    slot = records("SLOT", 1, gfn=0, a=U64, b=0)
    write_trace(path, [[("SLOT", slot)], every_kind(50), sptes()])


@maker
def _counts_absurd(path: Path) -> None:
    least = np.resize(np.array([-(2**31), -1, 0, 1, 2**31 - 1], "i4"), 50)
    flush = every_kind(
        50, page__refcount=least, page_end__refcount=least[::-1], page__mapcount=least,
        page__bits=U64 & 0xFFFFFFFF, page__flags=U64, ret=least, faultin_ret=least[::-1],
        sptes=255, error_code=U64, mmu_seq=U64, invalidate_seq=0, in_progress=2**32 - 1,
        slot=least, h__stack=2**31 - 1, vm_flags=U64,
    )  # fmt: skip
    write_trace(path, [flush, sptes(50, page__refcount=least)])


@maker
def _stages_out_of_order(path: Path) -> None:
    never = wire.NEVER_REACHED
    stages = np.random.default_rng(3).integers(0, 2**32, (5, 200), "u8").astype("u4")
    stages[np.random.default_rng(5).random(stages.shape) < 0.3] = never
    names = ("t_faultin", "t_gup", "t_gup_end", "t_faultin_end", "t_map")
    write_trace(path, [[("FAULT", records("FAULT", 200, **dict(zip(names, stages, strict=True))))]])


@maker
def _every_byte_random(path: Path) -> None:
    draw = np.random.default_rng(11)
    flushes = []
    for _ in range(4):
        flush = []
        for kind in schema.RECORD_KINDS:
            dtype = wire.FAULT if kind == "FAULT" else wire.EVENT
            found = np.frombuffer(draw.bytes(200 * dtype.itemsize), dtype)
            h = found["h"]
            flush.append((kind, found[np.lexsort([h["seq"], h["cpu"], h["ts"]])]))
        flushes.append(flush)
    write_trace(path, flushes)


@maker
def _small_numbers_random(path: Path) -> None:
    # Every field one of few values: as many collisions as can be.
    draw = np.random.default_rng(12)
    flush = []
    for kind in schema.RECORD_KINDS:
        dtype = wire.FAULT if kind == "FAULT" else wire.EVENT
        found = np.zeros(400, dtype)
        _fill(found, draw)
        found["h"]["ts"] = START_NS + np.sort(draw.integers(0, 100, 400)).astype("u8")
        flush.append((kind, found[np.lexsort([found["h"][n] for n in ("seq", "cpu", "ts")])]))
    write_trace(path, [flush])


def _fill(array: np.ndarray, draw: np.random.Generator) -> None:
    for name in array.dtype.names or ():
        if array[name].dtype.names:
            _fill(array[name], draw)
        else:
            array[name] = draw.integers(0, 14, array[name].shape)


# --- words ----------------------------------------------------------------------------------------


@maker
def _words_with_escapes(path: Path) -> None:
    hook = {"hook": ESCAPE, "symbols": [ESCAPE], "how": ESCAPE, "note": ESCAPE}
    missing = {"hook": ESCAPE, "tried": [ESCAPE], "why": ESCAPE, "without": ESCAPE}
    description = meta(
        command=(ESCAPE, ESCAPE),
        hostname=ESCAPE,
        pfntrace_version=ESCAPE,
        facts=json.dumps({"release": ESCAPE, "version": ESCAPE, "params": {ESCAPE: ESCAPE}}),
        profile={
            "generation": ESCAPE,
            "hooks": [hook],
            "missing": [missing],
            "failed": [{"hook": ESCAPE, "symbol": ESCAPE, "why": ESCAPE}],
            "results": {"5": ESCAPE, "0": f"{ESCAPE}!"},
        },
        settings={"gfns": ESCAPE, "boot_id": ESCAPE, "pids": [ESCAPE]},
    )
    writer = TraceWriter(path, description)
    _bad_notes(writer)
    writer.write_group(every_kind(60, ret=np.resize(np.array([5, 0, -14], "i4"), 60), walk_pfn=9))
    writer.write_group(sptes())
    end = {"why": ESCAPE, "problem": ESCAPE, "seconds": ESCAPE, "incomplete": ESCAPE}
    writer.close({**end, ESCAPE: 1}, ts=START_NS + 10**9)


def _bad_notes(writer: TraceWriter) -> None:
    vma = {"start": 0, "end": U64, "perms": ESCAPE, "offset": 0, "path": ESCAPE, "flags": [ESCAPE]}
    slot = {"vm": 1, "slot": 3, "as_id": 0, "gfn": 0, "npages": 1 << 40, "hva": 1, "tgid": 4242}
    for note in (
        {"slot": slot, "tgid": 4242, "vmas": [vma], "problem": ESCAPE},
        {"slot": {**slot, "hva": ESCAPE}, "tgid": ESCAPE, "vmas": [{**vma, "start": ESCAPE}]},
        {"device": {"rdev": 1, "path": ESCAPE}},
        {"stack": 1, "frames": [ESCAPE] * 200},
        {"vms": [{"vm": 1, "kvm": 2, "tgid": 3, "traced": True, "created": False}]},
        {"failed": {"hook": ESCAPE, "symbol": ESCAPE, "why": ESCAPE}},
    ):
        writer.write_note(note, ts=START_NS)


@maker
def _notes_of_other_shapes(path: Path) -> None:
    writer = TraceWriter(path, meta())
    odd: list[Any] = [None, 7, -1, 10**400, 1.5, "x", [], {}, [[]], {"a": 1}, True, U64, [None]]
    for key in ("slot", "vmas", "vms", "stack", "frames", "device", "failed", "part", "tgid"):
        for value in odd:
            writer.write_note({key: value}, ts=START_NS)
    keys = ("vm", "slot", "as_id", "gfn", "npages", "hva", "tgid")
    for value in odd:
        slot = dict.fromkeys(keys, value)
        vma = dict.fromkeys(("start", "end", "perms", "offset", "path", "flags"), value)
        writer.write_note({"slot": slot, "tgid": value, "vmas": [vma, value]}, ts=START_NS)
        writer.write_note({"vms": [dict.fromkeys(("vm", "tgid", "traced"), value), value]})
        writer.write_note({"device": {"rdev": value, "path": value}})
        writer.write_note({"failed": {"hook": value, "symbol": value, "why": value}})
    for text in ("", "7", "[1]", "{", "null", '{"a": NaN}', "[" * 3000, '"' + "x" * 9000 + '"'):
        writer._notes.append((START_NS, text))
    writer.write_group(every_kind())
    writer.close({}, ts=START_NS)


@maker
def _a_description_of_other_shapes(path: Path) -> None:
    odd: list[Any] = [None, 7, 10**400, "x", [], {}, [None], {"a": []}]
    profile = {
        "generation": odd,
        "hooks": [*odd, {"hook": 7, "symbols": odd, "how": [], "note": {}}],
        "missing": [*odd, {"hook": [], "tried": 7, "why": {}, "without": 7}],
        "failed": [*odd, {"hook": []}],
        "results": {"5": odd, "-1": "x", "99999999999": "y"},
    }
    facts = {"release": odd, "values": {"shadow_dirty_mask": 10**30, "shadow_accessed_mask": "x"}}
    write_trace(
        path, [every_kind(), sptes()], profile=profile, facts=json.dumps(facts),
        settings={"gfns": odd, "rings": "x", "merged": odd, "pids": 7},
        start_unix_ns=-(2**63), start_monotonic_ns=2**63 - 1,
    )  # fmt: skip


@maker
def _a_beginning_beyond_all_time(path: Path) -> None:
    write_trace(path, [every_kind(), sptes()], start_unix_ns=10**30, start_monotonic_ns=10**30)


@maker
def _facts_of_other_shapes(path: Path) -> None:
    facts = {"facts_version": 1, "release": 7, "structs": {}, "functions": {}, "enums": [1]}
    facts |= {n: [] for n in ("tracepoints", "symbols", "blacklisted", "modules", "capabilities")}
    facts |= {"notes": [], "values": {"shadow_dirty_mask": -1, "shadow_me_mask": 1.5}, "cpus": "x"}
    facts |= {"params": [7], "config": 7}
    write_trace(
        path, [every_kind(), sptes()], facts=json.dumps(facts), settings={"gfns": [1]},
        profile={**meta().profile, "generation": "G2"},
    )  # fmt: skip


@maker
def _an_end_of_other_shapes(path: Path) -> None:
    writer = TraceWriter(path, meta())
    writer.write_group(every_kind())
    odd: list[Any] = [None, "x", [], {}, -1, 10**400]
    counts = dict(zip(schema.RECORD_KINDS, (*odd, {"produced": -1, "lost": []}), strict=False))
    end = {
        "why": [1], "problem": {"a": 1}, "seconds": 10**400, "counts": counts, "unread": U64,
        "lost": U64, "produced": -1, "filtered": 1.5, "torn": "x", "kinds": [], "missed": odd,
    }  # fmt: skip
    writer.close(end, ts=START_NS)


@maker
def _losses_absurd(path: Path) -> None:
    writer = TraceWriter(path, meta())
    for at in range(20):
        row = (U64, U64 - at, U64, U64)
        writer.write_losses({k: [row] * 20 for k in schema.FILE_KINDS}, ts=START_NS + at * 1000)
        writer.write_group(group(at, kinds=("FAULT", "SPTE")))
    writer.abandon()


@maker
def _names_that_no_recorder_has(path: Path) -> None:
    known = dict(schema.NAMES)
    try:
        for key, names in known.items():
            if key != "kind":
                schema.NAMES[key] = tuple(f"{ESCAPE}{x}" if x != "zap" else x for x in names)
        write_trace(path, [every_kind(60), sptes()])
    finally:
        schema.NAMES.update(known)


@maker
def _names_that_repeat(path: Path) -> None:
    results = {**meta().profile["results"], "0": "fixed"}
    write_trace(path, [every_kind(), sptes()], profile={**meta().profile, "results": results})


@maker
def _names_in_another_order(path: Path) -> None:
    known = dict(schema.NAMES)
    try:
        for key, names in known.items():
            if key != "kind":
                schema.NAMES[key] = (*reversed(names), *(f"more {n}" for n in range(20)))
        write_trace(path, [every_kind(60), sptes()])
    finally:
        schema.NAMES.update(known)


# --- how much -------------------------------------------------------------------------------------


@maker
def _many_tiny_batches(path: Path) -> None:
    write_trace(path, [[(kind, array)] for n in range(150) for kind, array in _one_each(n)])


def _one_each(number: int) -> Iterator[tuple[str, np.ndarray]]:
    for kind in ("FAULT", "SPTE", "PAGE_FREE", "RELEASE"):
        yield kind, records(kind, 1, seed=number + 1, start_ns=START_NS + number * 100)


@maker
def _tiny_batches_of_one_moment(path: Path) -> None:
    write_trace(
        path,
        [[("SPTE", records("SPTE", 1, seed=n + 1, h__ts=START_NS))] for n in range(400)],
    )


@maker
def _rows_that_cost_no_bytes(path: Path) -> None:
    # 80,000 rows of zeros are 20 KiB: what is small on disk may be large in memory.
    flush = []
    for kind in ("FAULT", "SPTE", "PAGE_FREE", "RELEASE"):
        dtype = wire.FAULT if kind == "FAULT" else wire.EVENT
        rows = np.zeros(20_000, dtype)
        rows["h"]["kind"] = wire.KINDS.index(kind)
        rows["h"]["ts"] = np.arange(20_000) // 100
        flush.append((kind, rows))
    write_trace(path, [flush])


@maker
def _too_many_of_one_moment(path: Path) -> None:
    rows = np.zeros(1 << 20, wire.EVENT)
    rows["h"]["kind"] = wire.KINDS.index("SPTE")
    rows["h"]["op"] = wire.OPS.index("install")
    rows["gfn"] = np.arange(1 << 20)
    write_trace(path, [[("SPTE", rows)], [("SPTE", rows[:9])]])
