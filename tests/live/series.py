"""docs/SERIES.md: what each version of the series did to page counts.

    series.py KEEP FILE

KEEP is what `bugs.py --keep` kept. Every figure and every line of output on the page comes from
those recordings, or from the simulator where the lab has no such kernel; each part says which.
"""

import re
import sys
import tempfile
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from live.bugs import Row, ask, rows  # noqa: E402
from tracer.simulator.kernels import KERNELS, REFCOUNTED_BIT  # noqa: E402
from tracer.simulator.simulate import Knobs, simulate  # noqa: E402
from tracer.tracefile import TraceReader  # noqa: E402

__all__ = ("Counts", "counts_of", "main", "page")

PRIME, DEMAND = "prime-guest --repeat 3", "demand_paging_test -v 1 -b 4M"
#: (name in the table, kernel, KVM, workload, npt)
FAULTS = (
    ("6.12 as shipped", "6.12", "unchanged", PRIME, None),
    ("v7", "6.12", "series-v7-late-touch", PRIME, None),
    ("v8", "6.12", "series-v8-notdp-leak", PRIME, None),
    ("v8", "6.12", "series-v8-notdp-leak", DEMAND, "off"),
    ("v9 as mailed", "6.12", "series-v9-as-mailed", PRIME, None),
    ("v9 corrected", "6.12", "series-v9", PRIME, None),
    ("v9 corrected", "6.12", "series-v9", DEMAND, "off"),
    ("v10", "6.12", "series-v10-bit", PRIME, None),
    ("v10", "6.12", "series-v10-bit", DEMAND, "off"),
    ("v11", "6.12", "series-v11-underflow", PRIME, None),
    ("7.3 as shipped", "7.3", "unchanged", PRIME, None),
)
TTM = (
    ("6.12 as shipped", "6.12", "unchanged", "ttm-guest"),
    ("v9 corrected", "6.12", "series-v9", "ttm-guest"),
    ("v9 as mailed", "6.12", "series-v9-as-mailed", "ttm-guest --rounds 5"),
    ("7.3 as shipped", "7.3", "unchanged", "ttm-guest"),
)
#: The guest frames of the TTM buffer: BUFFER_GPA of ttm_guest.c.
BUFFER = range(0x10000, 0x10080)
#: What went wrong: version, workload, what the version did, the detector whose words are shown.
WRONG = (
    (
        "v7: the page is touched when its reference is gone",
        "series-v7-late-touch",
        "race-guest --gap 20",
        "The reference is put inside fault-in already, and the page is marked accessed at the "
        "fault's end, outside of mmu_lock. In a race the host drops the page in between, and it is "
        "free, or somebody else's, when KVM touches it.",
        "dead-mark",
    ),
    (
        "v8: without TDP every fault keeps its reference",
        "series-v8-notdp-leak",
        DEMAND,
        "The mark moved under mmu_lock. Without TDP the fault asks for a reference (FOLL_GET) that "
        "nobody puts.",
        "growth",
    ),
    (
        "v9 as mailed: every fault keeps its reference",
        "series-v9-as-mailed",
        PRIME,
        "A reference is always taken, and the fault only marks the page accessed. Reviewers found "
        "it by reading.",
        "growth",
    ),
    (
        "v11 on 6.8 and later: a put of what was never got",
        "series-v11-underflow",
        "race-guest --pages 211 --rounds 60 --pause 5",
        "v10 and v11 put the reference inside fault-in. Linux d02c357e5bfa came after them: where "
        "an invalidation is in progress it retries without mmu_lock, and puts the reference that "
        "is no longer held.",
        "balance",
    ),
)


@dataclass(slots=True)
class Counts:
    """What a recording says of the counts of the pages that faults mapped."""

    steps: Counter[tuple[int, int]] = field(default_factory=Counter)
    """(count after fault-in, count at the fault's end) of fixed faults -> times."""
    puts: Counter[str] = field(default_factory=Counter)
    """Calls of faults that put or mark -> times."""
    bits: Counter[bool] = field(default_factory=Counter)
    """Has a leaf bit 59? -> installs."""
    mapped: set[int] = field(default_factory=set)
    freed: set[int] = field(default_factory=set)

    def cells(self) -> list[str]:
        """Return the cells of a table."""
        bits = f"{self.bits[True]:,} of {self.bits.total():,}"
        freed = f"{len(self.mapped & self.freed):,} of {len(self.mapped):,}"
        puts = ", ".join(f"{call} {n:,}" for call, n in self.puts.most_common()) or "nothing seen"
        return [f"{self.steps.total():,}", _steps(self.steps), puts, bits, freed]


def counts_of(trace: Path, gfns: Sequence[int] = ()) -> Counts:
    """Read a trace; of faults only those of some guest frames, if any are given."""
    found = Counts()
    for row in _records(trace, "FAULT", "SPTE", "RELEASE", "PAGE_FREE"):
        if gfns and row["kind"] != "PAGE_FREE" and row["gfn"] not in gfns:
            continue
        if row["kind"] == "FAULT" and row["result"] == "fixed" and row["refcount"] is not None:
            found.steps[row["refcount"], row["refcount_end"]] += 1
            found.mapped.add(row["pfn"])
        elif row["kind"] == "RELEASE" and row["fault_ts"] is not None:
            found.puts[row["call"]] += 1
        elif row["kind"] == "SPTE" and row["op"] == "install":
            found.bits[bool(row["new"] & REFCOUNTED_BIT)] += 1
        elif row["kind"] == "PAGE_FREE":
            found.freed |= set(range(row["pfn"], row["pfn"] + (1 << row["order"])))
    return found


def _records(trace: Path, *kinds: str) -> Iterator[dict[str, Any]]:
    with TraceReader(trace) as reader:
        for batch in reader.records(list(kinds)):
            yield from batch.to_pylist()


def _steps(steps: Counter[tuple[int, int]]) -> str:
    shown = [f"{a}→{b} ({n:,})" for (a, b), n in steps.most_common(4)]
    rest = len(steps) - len(shown)
    return ", ".join(shown) + (f" and {rest} more" if rest > 0 else "")


def _row(kernel: str, kvm: str, workload: str, npt: str | None) -> Row:
    (row,) = [
        row
        for row in rows([kernel], [kvm])
        if (row.workload, row.npt == "off", row.every) == (workload, npt == "off", 1)
    ]
    return row


def _trace(keep: Path, kernel: str, kvm: str, workload: str, npt: str | None = None) -> Path:
    return keep / _row(kernel, kvm, workload, npt).name / "x.pfnt"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    every = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in every)


def _verdict(trace: Path) -> str:
    """Return the last sentence of a check."""
    return ask("check", str(trace)).strip().splitlines()[-1].partition(";")[0]


def _brief(trace: Path, detector: str) -> str:
    """Return what a check says, without the rule and the innocent explanations."""
    kept, part = [], ""
    for line in ask("check", "--detector", detector, str(trace)).splitlines():
        labelled = re.match(r"  (\w+)(\s|$)", line)
        part = labelled[1] if labelled and len(line) - len(line.lstrip()) == 2 else part
        part = "" if not line.startswith("  ") else part
        if part not in ("rule", "innocent", "functions"):
            kept.append(line)
    return "\n".join(kept).strip()


def _faults(keep: Path) -> str:
    lines = []
    for name, kernel, kvm, workload, npt in FAULTS:
        trace = _trace(keep, kernel, kvm, workload, npt)
        mmu = "shadow" if npt == "off" else "TDP"
        lines.append([name, mmu, *counts_of(trace).cells(), _verdict(trace)])
    head = ["KVM", "MMU", "faults", "count after fault-in → at the end", "calls of the faults",
            "leaves with bit 59", "pages freed later", "check"]  # fmt: skip
    return _table(head, lines)


def _ttm(keep: Path) -> str:
    lines = []
    for name, kernel, kvm, workload in TTM:
        trace = _trace(keep, kernel, kvm, workload)
        faults = [
            row for row in _records(trace, "FAULT")
            if row["gfn"] in BUFFER
        ]  # fmt: skip
        mapped = {row["gfn"] for row in faults if row["result"] == "fixed"}
        failed = [row for row in faults if row["result"] == "error"]
        ran = f"{len(mapped)} of {len(BUFFER)} pages run"
        ran += f", EFAULT at gfn {failed[0]['gfn']:#x}" if failed else ""
        head, tails = (counts_of(trace, gfns) for gfns in ([BUFFER[0]], BUFFER[1:]))
        lines.append([
            name, ran, _in_turn(faults), _steps(tails.steps) or "none mapped",
            f"{head.bits[True]} of {head.bits.total()}; {tails.bits[True]} of {tails.bits.total()}",
            _verdict(trace),
        ])  # fmt: skip
    head_line = ["KVM", "guest", "count of the head page, fault by fault", "of the tail pages",
                 "bit 59: head; tails", "check"]  # fmt: skip
    return _table(head_line, lines)


def _in_turn(faults: Sequence[dict[str, Any]]) -> str:
    """Return the counts of the block's first page, fault by fault."""
    first = [row for row in faults if row["gfn"] == BUFFER[0] and row["refcount"] is not None]
    return ", ".join(f"{row['refcount']}→{row['refcount_end']}" for row in first)


def _simulated() -> str:
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("v7", "v8", "v9-mailed", "v9", "v10", "v11"):
            for mmu in ("tdp", "shadow"):
                knobs = Knobs(kernel=name, scenario="demand", mmu=mmu, vcpus=1, mem_bytes=1 << 20)
                trace = simulate(knobs, Path(folder) / f"{name}-{mmu}.pfnt", version="docs").trace
                lines.append([name, mmu.replace("tdp", "TDP"), *counts_of(trace).cells()])
    head = ["KVM", "MMU", "faults", "count after fault-in → at the end", "calls of the faults",
            "leaves with bit 59", "pages freed later"]  # fmt: skip
    return _table(head, lines)


def _went_wrong(keep: Path, title: str, kvm: str, workload: str, why: str, detector: str) -> str:
    npt = _npt(kvm, workload)
    source = f"*Live recording*: 6.12, `--kvm {kvm}`, `{workload}`{', npt off' if npt else ''}."
    said = f"Said by `pfntrace check --detector {detector}`, without rule, functions and innocent"
    words = textwrap.fill(f"{why} {source} {said} explanations:", 100, break_on_hyphens=False)
    shown = _brief(_trace(keep, "6.12", kvm, workload, npt), detector)
    return f"### {title}\n\n{words}\n\n```text\n{shown}\n```\n"


def page(keep: Path) -> str:
    """Return docs/SERIES.md."""
    wrong = "\n".join(_went_wrong(keep, *what) for what in WRONG)
    kernels = "; ".join(
        f"{name}: {KERNELS[name].title.partition(': ')[2]}"
        for name in KERNELS
        if name.startswith("v")
    )
    kernels = textwrap.fill(
        f"*Simulator*: the lab has none of Linux 6.4 to 6.8. {kernels}.",
        100,
        break_on_hyphens=False,
    )
    refused = _brief(_trace(keep, *TTM[0][1:]), "refused")
    leaked = _brief(_trace(keep, *TTM[2][1:]), "growth")
    return f"""# What each version of the series did to page counts

Made by `make lab-bugs` (`tests/live/series.py`). The series is "KVM: allow mapping non-refcounted
pages", v7 of July 2023 to v11 of February 2024: KVM may map pages that nobody counts, as a TTM
driver's, if it marks in its SPTEs (bit 59) which pages are counted. It was dropped for another
approach, which is Linux 6.13. The lab has all versions restated on Linux 6.12
([`--kvm series-…`](../tests/lab/README.md)). A part marked *live recording* is real: a guest under
real KVM, emulated processor. A part marked *simulator* is the model of `pfntrace simulate`.

## One fault

*Live recording* of each. The host's mapping of a page is one reference, a batch on its way to the
LRU lists mostly another, and fault-in takes one more until the fault puts it: 3→2, or 2→1 without
the batch. Pages are host pages; what is freed may be handed out again in the same recording.

{_faults(keep)}

6.12 and v9 as corrected do the same to each page. v7, v8, v10 and v11 have put the reference before
fault-in returns: no put shows, and the count is the same at both ends, and it is right. It is the
same at both ends also where the reference is never put: then the pages are not freed.

## What went wrong

{wrong}
## The TTM guest

*Live recording* of each: a buffer of the qxl driver, evicted to system memory, is given to a guest.
Its pages come from blocks that are not compound: the first has count 1, the tails 0.

{_ttm(keep)}

6.12 as shipped refuses the tail, and `pfntrace check` explains it:

```text
{refused}
```

v9 as mailed maps all pages, and keeps a reference of the head each time:

```text
{leaked}
```

## On the kernels that the versions were written for

{kernels}

{_simulated()}
"""


def _npt(kvm: str, workload: str) -> str | None:
    return "off" if kvm == "series-v8-notdp-leak" and workload == DEMAND else None


def main(keep: str, output: str) -> int:
    Path(output).write_text(page(Path(keep)))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
