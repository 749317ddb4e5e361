"""What a trace holds and what it lacks, from the heads of its batches and a few rows.

May import: `tracer.schema`, `tracer.tracemeta`, `tracer.tracescan`, standard library.
"""

import datetime
from collections.abc import Callable, Sequence
from typing import Any

from tracer import schema
from tracer.tracemeta import TraceMeta, parse_json
from tracer.tracescan import Block

__all__ = ("describe",)

_COUNTS = ("produced", "lost", "filtered", "torn")

#: Longest reason that is taken from a file.
_REASON_MAX = 1000

#: Keys of one hook, of one missing hook, and what stands where a file does not say.
_HOOK = {"hook": "", "symbols": [], "how": "", "note": ""}
_MISSING = {"hook": "", "tried": [], "why": "", "without": "", "required": False}

#: Reads some columns of some blocks.
Rows = Callable[[Sequence[Block], Sequence[str]], list[dict[str, Any]]]


def describe(
    meta: TraceMeta, blocks: Sequence[Block], problem: str, size: int, rows: Rows
) -> dict[str, Any]:
    """Return the description of a trace as plain JSON.

    records             rows that the kernel wrote; kinds: the same by kind, zeros included
    produced, lost, filtered, torn
                        the kernel's counters, summed: of the end mark's summary if it names them,
                        else of the newest LOSS rows
    complete, reason    does the file end with its end mark, and if not, why; of a merged trace
                        also, do all of its parts
    kernel, generation, hooks, missing, command, hostname, pfntrace_version, schema_version
                        from the head of the file
    start, start_unix_ns, duration_s
                        when the recording began (ISO 8601, UTC) and how long it was
    vms                 {vm, tgid} of each VM record
    summary             what the recorder said at the end, {} if it did not
    bytes               size of the file
    merged              of a merged trace its parts, see `tracer.mergeplan.provenance`; else {}
    """
    end = _end_mark(blocks, rows)
    if end is None and not problem:
        problem = "no end mark before the end of the stream"
    summary = _dict(end or {}, "end")
    problem = problem or str(summary.get("incomplete") or "")[:_REASON_MAX]
    totals = _dict(end, "losses") if end is not None else _newest_losses(blocks, rows)
    kinds = dict.fromkeys(schema.RECORD_KINDS, 0)
    for block in blocks:
        if block.kind in kinds:
            kinds[block.kind] += block.rows
    last = max((block.ts_max for block in blocks), default=meta.start_monotonic_ns)
    return {
        "records": sum(kinds.values()),
        **{name: _count(summary, name, _count(totals, name, 0)) for name in _COUNTS},
        "complete": not problem,
        "reason": problem,
        "kinds": kinds,
        "kernel": _release(meta),
        "generation": str(meta.profile.get("generation", "")),
        "hooks": _shaped(meta.profile, "hooks", _HOOK),
        "missing": _shaped(meta.profile, "missing", _MISSING),
        "schema_version": meta.schema_version,
        "pfntrace_version": meta.pfntrace_version,
        "command": list(meta.command),
        "hostname": meta.hostname,
        "start": _iso(meta.start_unix_ns),
        "start_unix_ns": meta.start_unix_ns,
        "duration_s": max(0, last - meta.start_monotonic_ns) / 1e9,
        "bytes": size,
        "vms": _vms(blocks, rows),
        "summary": summary,
        "merged": _dict(meta.settings, "merged"),
    }


def _end_mark(blocks: Sequence[Block], rows: Rows) -> dict[str, Any] | None:
    """Return the note that ends a complete file: the last row of the last batch."""
    if not blocks or blocks[-1].kind != "NOTE":
        return None
    notes = rows(blocks[-1:], ["note"])
    try:
        note = parse_json(notes[-1]["note"]) if notes else None
    except (TypeError, ValueError):
        return None
    return note if isinstance(note, dict) and isinstance(note.get("end"), dict) else None


def _newest_losses(blocks: Sequence[Block], rows: Rows) -> dict[str, int]:
    """Sum the newest LOSS row of each kind and cpu."""
    newest: dict[tuple[Any, Any], dict[str, Any]] = {}
    for row in rows([b for b in blocks if b.kind == "LOSS"], ["loss_kind", "cpu", *_COUNTS]):
        newest[row["loss_kind"], row["cpu"]] = row
    return {name: sum(row[name] or 0 for row in newest.values()) for name in _COUNTS}


def _vms(blocks: Sequence[Block], rows: Rows) -> list[dict[str, Any]]:
    seen: dict[int, Any] = {}
    for row in rows([b for b in blocks if b.kind == "VM"], ["vm", "vm_tgid"]):
        seen[row["vm"] or 0] = row["vm_tgid"]
    return [{"vm": vm, "tgid": seen[vm]} for vm in sorted(seen)]


def _release(meta: TraceMeta) -> str:
    try:
        return str(parse_json(meta.facts)["release"])
    except (KeyError, TypeError, ValueError):
        return ""


def _iso(unix_ns: int) -> str:
    try:
        moment = datetime.datetime.fromtimestamp(unix_ns // 10**9, datetime.UTC)
    except (OverflowError, ValueError, OSError):
        return ""
    return moment.isoformat()


# The head and the notes of a file from strangers are JSON of any shape.
def _dict(data: Any, key: str) -> dict[str, Any]:
    value = data.get(key)
    return value if isinstance(value, dict) else {}


def _shaped(data: Any, key: str, shape: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a list of objects with exactly the keys and the types of `shape`."""
    value = data.get(key)
    items = value if isinstance(value, list) else []
    return [
        {name: _like(item.get(name), default) for name, default in shape.items()}
        for item in items
        if isinstance(item, dict)
    ]


def _like(value: Any, default: Any) -> Any:
    if isinstance(default, list):
        return [str(part) for part in value] if isinstance(value, list) else []
    return value if type(value) is type(default) else default


def _count(data: dict[str, Any], key: str, default: int) -> int:
    value = data.get(key)
    return value if type(value) is int and 0 <= value < 1 << 64 else default
