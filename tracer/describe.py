"""`pfntrace info` for people: a trace's own description as lines.

May import: `probes` only; takes what `TraceReader.info` returns.
"""

import textwrap
from collections.abc import Iterator
from typing import Any

__all__ = ("info_lines", "printable", "verdict_line")

_WIDTH = 80


def printable(text: object) -> str:
    """Return text from a trace with control characters made visible: it may be hostile."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


def verdict_line(info: dict[str, Any]) -> str:
    """Return the line that says what a trace is worth: loss and completeness, before all else."""
    lost, produced = info["lost"], info["records"] + info["lost"] + info["filtered"]
    if not info["complete"]:
        # The last counts of what was lost stand at the end, which is not there.
        loss, end = "no loss known", f"INCOMPLETE: {printable(info['reason'])}"
    else:
        loss, end = "nothing lost", "otherwise complete" if lost else "complete"
    if lost:
        loss = f"LOST {lost:,} of {produced:,} records ({100 * lost / produced:.1f} %)"
    return f"{loss}; {end}"


def info_lines(info: dict[str, Any]) -> Iterator[str]:
    """Yield the description, loss first, at most 80 columns but for words that are longer."""
    yield from _wrapped(verdict_line(info), "  ")
    yield f"records     {info['records']:,} (filtered {info['filtered']:,})"
    for kind, count in info["kinds"].items():
        if count:
            yield f"  {kind:<10}{count:>12,}"
    yield f"duration    {info['duration_s']:.3f} s, from {printable(info['start'])}"
    yield f"kernel      {printable(info['kernel'])}, generation {printable(info['generation'])}"
    yield from _wrapped(f"command     {printable(' '.join(info['command']))}", " " * 12)
    yield f"file        {info['bytes']:,} bytes, schema {info['schema_version']}"
    yield from _part_lines(info["merged"])
    yield "hooks"
    for hook in info["hooks"]:
        symbols = ", ".join(printable(s) for s in hook["symbols"])
        yield from _wrapped(
            f"  {printable(hook['hook']):<19}{printable(hook['how']):<15}{symbols}", " " * 36
        )
    for missing in info["missing"]:
        without = printable(missing["without"] or "not of this kernel generation")
        yield from _wrapped(f"  {printable(missing['hook']):<19}{'missing':<15}{without}", " " * 36)


def _wrapped(line: str, indent: str) -> Iterator[str]:
    """Yield a line in pieces of at most 80 columns, the further ones indented."""
    if len(line) <= _WIDTH:
        yield line
        return
    # What stands in columns stays so: only what follows them is put on further lines.
    head = line[: len(indent)]
    yield from textwrap.wrap(
        line[len(head) :], _WIDTH, initial_indent=head, subsequent_indent=indent,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


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
        line = f"  {file:<24}{host:<14}{which}, from {printable(part.get('start', ''))}"
        yield from _wrapped(line, " " * 40)
