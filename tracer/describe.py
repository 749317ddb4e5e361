"""`pfntrace info` for people: a trace's own description as lines.

May import: `probes` only; takes what `TraceReader.info` returns.
"""

from collections.abc import Iterator
from typing import Any

__all__ = ("info_lines", "printable", "verdict_line")


def printable(text: object) -> str:
    """Return text from a trace with control characters made visible: it may be hostile."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def verdict_line(info: dict[str, Any]) -> str:
    """Return the line that says what a trace is worth: loss and completeness, before all else."""
    lost, produced = info["lost"], info["records"] + info["lost"] + info["filtered"]
    parts = []
    if lost:
        parts.append(f"LOST {lost:,} of {produced:,} records ({100 * lost / produced:.1f} %)")
    else:
        parts.append("nothing lost")
    parts.append("complete" if info["complete"] else f"INCOMPLETE: {printable(info['reason'])}")
    return "; ".join(parts)


def info_lines(info: dict[str, Any]) -> Iterator[str]:
    """Yield the description, loss first, at most 80 columns but for names that are longer."""
    yield verdict_line(info)
    yield f"records     {info['records']:,} (filtered {info['filtered']:,})"
    for kind, count in info["kinds"].items():
        if count:
            yield f"  {kind:<10}{count:>12,}"
    yield f"duration    {info['duration_s']:.3f} s, from {printable(info['start'])}"
    yield f"kernel      {printable(info['kernel'])}, generation {printable(info['generation'])}"
    yield f"command     {printable(' '.join(info['command']))}"
    yield f"file        {info['bytes']:,} bytes, schema {info['schema_version']}"
    yield from _part_lines(info["merged"])
    yield "hooks"
    for hook in info["hooks"]:
        symbols = ", ".join(printable(s) for s in hook["symbols"])
        yield f"  {printable(hook['hook']):<18}{printable(hook['how']):<15}{symbols}"
    for missing in info["missing"]:
        without = printable(missing["without"] or "not of this kernel generation")
        yield f"  {printable(missing['hook']):<18}{'missing':<15}{without}"


def _part_lines(merged: dict[str, Any]) -> Iterator[str]:
    parts = merged.get("parts")
    parts = [p for p in parts if isinstance(p, dict)] if isinstance(parts, list) else []
    if parts:
        wall = "; clocks laid over each other by the wall clock" * (merged.get("clock") == "wall")
        yield f"merged of   {len(parts)} parts{wall}"
    for part in parts:
        vms, file = part.get("vms"), printable(part.get("file", ""))
        named = isinstance(vms, list) and len(vms) == 2
        which = printable(f"VMs {vms[0]}-{vms[1]}") if named else "no VM"
        host = printable(part.get("hostname", ""))
        yield f"  {file:<24}{host:<14}{which}, from {printable(part.get('start', ''))}"
