"""`make lab-bugs`: every changed KVM of the lab, recorded, and what `pfntrace check` says of it.

    bugs.py [--kernel V] [--only NAME]... [--keep DIR [--recheck]] [--write FILE]

A row is a kernel, a change of its KVM (`tests/lab/kvm/`) and a workload. The change itself counts
how often it happened and on which pages: the answer is held against that. `--recheck` boots nothing
and checks again what an earlier run kept. `--write` puts the table
into a Markdown file between two marks. Exit status 1 if a row is not as it must be.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import GuestLost, RunOptions, run_in_lab
from lab.kvmchange import change_names, load_change

__all__ = ("Answer", "Row", "Truth", "answer", "judge", "record", "rows", "table", "truth_of")

PROJECT = Path(__file__).resolve().parent.parent.parent
MARKS = ("<!-- lab-bugs: begin -->", "<!-- lab-bugs: end -->")
PAGE = f"""# Planted bugs, and what `pfntrace check` says of them

Made by `make lab-bugs` from live recordings in the lab. Each KVM, what is wrong with it and what a
trace must show: [tests/lab/README.md](../tests/lab/README.md).

{MARKS[0]}
{MARKS[1]}
"""
HEADER = (
    "| kernel | KVM | MMU | workload | happened, pages | found: detector, verdict, times, pages | |"
)
ANOMALIES = ("definite", "probable")


@dataclass(frozen=True, slots=True)
class Row:
    """One recording: what is booted, what runs, and who must find something."""

    kernel: str
    kvm: str
    workload: str
    found_by: tuple[str, ...]
    npt: str | None = None
    every: int = 1
    window_ms: int = 0
    module: str | None = None
    device: str | None = None
    counted: bool = True
    """Whether the change counts how often it happens."""

    @property
    def name(self) -> str:
        """A name for files, of its own among all rows."""
        words = (self.kernel, self.kvm, self.workload, f"npt-{self.npt or 'on'}", str(self.every))
        return re.sub(r"[^\w.]+", "-", " ".join(words))


@dataclass(frozen=True, slots=True)
class Truth:
    """What the changed KVM says of itself: how often, and on which pfns."""

    hits: int
    pfns: frozenset[int]


@dataclass(frozen=True, slots=True)
class Answer:
    """A row of the table."""

    row: Row
    truth: Truth | None
    findings: tuple[dict[str, Any], ...]
    right: bool
    why: str = ""


def rows(kernels: Iterable[str] = (), names: Iterable[str] = ()) -> list[Row]:
    """Return the table's rows, all or those of some kernels and changes."""
    wanted_kernels, wanted = tuple(kernels), tuple(names)
    return [
        row
        for row in (*_each_change(), *_more())
        if (not wanted_kernels or row.kernel in wanted_kernels)
        and (not wanted or row.kvm in wanted)
    ]


def _each_change() -> Iterable[Row]:
    for name in change_names():
        change = load_change(name)
        for kernel in change.edits:
            yield Row(
                kernel=kernel,
                kvm=name,
                workload=change.workload,
                found_by=tuple(change.found_by),
                npt=change.npt,
                every=change.every,
                window_ms=change.window_ms,
                module=change.module,
                counted=change.planted,
            )


# The same changes elsewhere: rare, on the other MMU, with drivers' pages.
def _more() -> Iterable[Row]:
    leak = ("balance", "growth")
    for kernel in ("6.12", "7.3"):
        rare = "prime-guest --pages 4001 --repeat 2"
        yield Row(kernel, "leak-per-fault", rare, leak, every=1000)
        yield Row(kernel, "leak-per-fault", "prime-guest --repeat 3", leak, npt="off")
        skip = "prime-guest --read --prefault --repeat 3"
        stale = ("invalidation", "use-after-free")
        yield Row(kernel, "zap-skipped", skip, stale, npt="off", every=100)
        yield Row(kernel, "unchanged", "race-guest", (), counted=False)
        held = "pages-guest --hold --pages 101"
        yield Row(kernel, "unchanged", held, (), module="lab_pages", counted=False)
        yield Row(kernel, "unchanged", "ttm-guest", (), device="qxl", counted=False)
    freed = "pages-guest --free"
    after_free = ("use-after-free",)
    yield Row("7.3", "unchanged", freed, after_free, module="lab_pages", counted=False)
    yield Row("6.12", "series-v9", freed, after_free, module="lab_pages", counted=False)
    yield Row("6.12", "series-v9", "ttm-guest", (), device="qxl", counted=False)
    yield Row("6.12", "series-v9-as-mailed", "ttm-guest --rounds 5", leak, device="qxl")
    yield Row("6.12", "series-v10-bit", "prime-guest --repeat 3", (), npt="off", counted=False)


def record(row: Row, folder: Path) -> Path:
    """Boot, record, and leave `x.pfnt` and the truth in *folder*; raises GuestLost."""
    run = row.workload
    if row.counted:
        run = f"planted /out/truth {row.every} {row.window_ms} {run}"
    script = f"pfntrace record --stacks -o /out/x.pfnt -- {run} >/out/said 2>&1; sync"
    options = RunOptions(
        kvm=row.kvm, npt=row.npt, module=row.module, device=row.device, timeout_s=150
    )
    run_in_lab(["sh", "-c", script], kernel=row.kernel, out=folder, options=options)
    return folder / "x.pfnt"


def truth_of(text: str) -> Truth:
    """Read what `planted` wrote.

    >>> truth_of("hits: 2\\ngfn=0x1 pfn=0x10\\ngfn=0x2 pfn=0x10\\n")
    Truth(hits=2, pfns=frozenset({16}))
    """
    hits = re.search(r"^hits: (\d+)$", text, re.MULTILINE)
    pfns = re.findall(r"^gfn=\S+ pfn=(0x[0-9a-f]+)$", text, re.MULTILINE)
    return Truth(int(hits[1]) if hits else 0, frozenset(int(pfn, 16) for pfn in pfns))


def judge(row: Row, truth: Truth | None, checked: dict[str, Any]) -> Answer:
    """Hold what `pfntrace check --json` said against the truth."""
    found = tuple(item for item in checked["findings"] if item["verdict"] in ANOMALIES)
    named = [item for item in found if item["detector"] in row.found_by]
    why = ""
    if not row.found_by and found:
        why = "nothing is wrong, and something was found"
    elif row.counted and truth is not None and not truth.hits:
        why = "it did not happen"
    elif row.found_by and not named:
        why = f"not found by {' or '.join(row.found_by)}"
    elif truth and named and not {0, len(truth.pfns)} & {item["pages"] for item in named}:
        # 0: a finding that is about no page, like a livelock.
        why = "another number of pages"
    return Answer(row, truth, found, not why, why)


def table(answers: Sequence[Answer]) -> str:
    """Return the Markdown table."""
    lines = [HEADER, "|---|---|---|---|---|---|---|"]
    for said in answers:
        row, truth = said.row, said.truth
        happened = f"{truth.hits}, {len(truth.pfns)}" if truth else "-"
        found = "; ".join(
            f"{item['detector']} {item['verdict']} {item['count']}, {item['pages']}"
            for item in said.findings
        )
        mmu = "shadow" if row.npt == "off" else "TDP"
        cells = [row.kernel, row.kvm, mmu, f"`{row.workload}`", happened]
        cells += [found or "nothing", said.why or "right"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _checked(trace: Path) -> dict[str, Any]:
    command = [sys.executable, str(PROJECT / "pfntrace.py"), "check", "--json", str(trace)]
    done = subprocess.run(command, capture_output=True, text=True)
    if not done.stdout.startswith("{"):
        raise RuntimeError(f"check failed: {done.stderr.strip().rpartition(chr(10))[2]}")
    return dict(json.loads(done.stdout))


def answer(row: Row, folder: Path, *, recheck: bool = False) -> Answer:
    """Record a row in *folder*, or take what is there; check it, and judge."""
    try:
        trace = folder / "x.pfnt" if recheck else record(row, folder)
    except GuestLost as error:
        return Answer(row, None, (), False, str(error))
    if not trace.exists():
        return Answer(row, None, (), False, f"no trace: {_said(folder)}")
    told = folder / "truth"
    truth = truth_of(told.read_text()) if told.exists() else None
    try:
        checked = _checked(trace)
    except RuntimeError as error:
        return Answer(row, truth, (), False, str(error))
    return judge(row, truth, checked)


def _said(folder: Path) -> str:
    said = folder / "said"
    return said.read_text().strip().rpartition("\n")[2] if said.exists() else "not recorded"


def _write(path: Path, text: str) -> None:
    begin, end = MARKS
    path.parent.mkdir(exist_ok=True)
    page = path.read_text() if path.exists() else PAGE
    head, tail = page.partition(begin)[0], page.partition(end)[2]
    path.write_text(f"{head}{begin}\n{text}\n{end}{tail}")


def main() -> int:
    parser = argparse.ArgumentParser(description="What `pfntrace check` says of changed KVMs.")
    parser.add_argument("--kernel", action="append", default=[], help="only this kernel")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this change")
    parser.add_argument("--keep", type=Path, help="keep traces and truths there")
    parser.add_argument("--recheck", action="store_true", help="check again what is kept")
    parser.add_argument("--write", type=Path, help="put the table into this Markdown file")
    asked = parser.parse_args()
    if asked.recheck and not asked.keep:
        parser.error("--recheck needs --keep")
    answers = []
    keep = asked.keep or Path(tempfile.mkdtemp(prefix="pfntrace-bugs-"))
    try:
        for row in rows(asked.kernel, asked.only):
            answers.append(answer(row, keep / row.name, recheck=asked.recheck))
            print(table(answers[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    finally:
        if not asked.keep:
            shutil.rmtree(keep, ignore_errors=True)
    print(table(answers))
    if asked.write:
        _write(asked.write, table(answers))
    return 0 if all(said.right for said in answers) else 1


if __name__ == "__main__":
    sys.exit(main())
