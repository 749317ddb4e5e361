"""Parts to merge, as recorders of several boots leave them, and the reading of what comes out."""

import json

import pytest
from unit.records import START_NS, records, rows_of, write_trace

from probes.errors import MergeError
from tracer import schema
from tracer.merge import merge
from tracer.tracefile import TraceReader

__all__ = ("KEYS", "SECOND", "everything", "merged", "notes", "of_vm", "part", "refused")

KEYS = ["ts", "cpu", "seq"]
SECOND = 1_000_000_000


def merged(tmp_path, *parts, **options):
    out = tmp_path / "merged.pfnt"
    told = merge(list(parts), out, version="0.1.0", argv=["merge"], **options)
    return out, told


def part(tmp_path, name, groups, boot="boot-1", start=0, wall=0, **changes):
    """Write a part that began `start` ns later on its boot's clock, `wall` ns later by the wall."""
    changes.setdefault("settings", {"gfns": None, "boot_id": boot})
    return write_trace(
        tmp_path / f"{name}.pfnt",
        groups,
        start_monotonic_ns=START_NS + start,
        start_unix_ns=1_700_000_000_000_000_000 + start + wall,
        **changes,
    )


def of_vm(vm, number=0, **fields):
    """One flush of a VM's faults and SPTEs."""
    start = START_NS + number * 1_000_000
    return [
        (kind, records(kind, 5, seed=number + 1, start_ns=start, h__vm=vm, **fields))
        for kind in ("FAULT", "SPTE")
    ]


def everything(path, columns=None):
    with TraceReader(path) as reader:
        rows = rows_of(reader.records(schema.RECORD_KINDS, columns))
        return rows, reader.info(verify=True)


def notes(path):
    with TraceReader(path) as reader:
        texts = [row["note"] for row in rows_of(reader.records(["NOTE"], ["note"]))]
    return [json.loads(text) for text in texts]


def refused(tmp_path, *parts, error=MergeError):
    with pytest.raises(error) as caught:
        merged(tmp_path, *parts)
    assert "\n" not in str(caught.value)
    assert not [p for p in tmp_path.iterdir() if "merged" in p.name], "nothing is left behind"
    return str(caught.value)
