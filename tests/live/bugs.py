"""`make lab-bugs`: every changed KVM of the lab, recorded, and what pfntrace says of it.

    bugs.py [--kernel V] [--only NAME]... [--jobs N] [--keep DIR [--recheck]] [--write FILE]

A row is a kernel, a change of its KVM (`tests/lab/kvm/`) and a workload: one boot, one recording.
The change itself counts how often it happened and on which pages: what `pfntrace check` says is
held against that, and `pfntrace replay` must follow a kernel that is right and stop at one that is
not. `--recheck` boots nothing and asks again what an earlier run kept. `--write` makes the page of
the docs. Exit status 1 if a row is not as it must be.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lab import GuestLost, RunOptions, run_in_lab
from lab.kvmchange import change_names, load_change

from tracer.tracefile import TraceReader

__all__ = ("Answer", "Row", "Truth", "answer", "judge", "page", "record", "rows", "table")

PROJECT = Path(__file__).resolve().parent.parent.parent
HEADER = (
    "| kernel | KVM | MMU | workload | happened, pages | found: detector, verdict, times, pages"
    " | check | replay |"
)
ANOMALIES = ("definite", "probable")
#: Seconds for one `check` or `replay`.
PATIENCE_S = 600

#: (kernel, change) -> why no record of it is wrong, so that only all of them together tell of it.
UNRECORDED = {
    ("6.12", "leak-prefetch"): "the put is an inlined put_page(), which leaves no record",
}


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
    explained_by: str = ""
    """The detector that must explain what the kernel rightly refused."""
    note: str = ""
    """What a reader must know of the row."""

    @property
    def name(self) -> str:
        """A name for files, of its own among all rows."""
        words = (self.kernel, self.kvm, self.workload, f"npt-{self.npt or 'on'}", str(self.every))
        return re.sub(r"[^\w.]+", "-", " ".join(words))

    @property
    def replays(self) -> bool | None:
        """Must the model follow this recording to its end? None: no record of KVM's is wrong."""
        if not self.found_by:
            return True
        return False if self.counted and (self.kernel, self.kvm) not in UNRECORDED else None


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
    replay: str = ""
    """What `pfntrace replay` said, in a few words."""
    replayed_right: bool = True


def rows(kernels: Iterable[str] = (), names: Iterable[str] = ()) -> list[Row]:
    """Return the table's rows, all or those of some kernels and changes."""
    wanted_kernels, wanted = tuple(kernels), tuple(names)
    return [
        row
        for row in (*_each_change(), *_more(), *_series())
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
                note=UNRECORDED.get((kernel, name), ""),
            )


LEAK = ("balance", "growth")
FREES = "pages-guest --free"
#: For a workload in which KVM does as it should and a driver does not.
DRIVER = "the driver breaks the rule, not KVM"


# The same changes elsewhere: rare, on the other MMU, with drivers' pages.
def _more() -> Iterable[Row]:
    for kernel in ("6.12", "7.3"):
        rare = "prime-guest --pages 4001 --repeat 2"
        yield Row(kernel, "leak-per-fault", rare, LEAK, every=1000)
        yield Row(kernel, "leak-per-fault", "prime-guest --repeat 3", LEAK, npt="off")
        skip = "prime-guest --read --prefault --repeat 3"
        stale = ("invalidation", "use-after-free")
        yield Row(kernel, "zap-skipped", skip, stale, npt="off", every=100)
        yield Row(kernel, "unchanged", "race-guest", (), counted=False)
        yield Row(kernel, "unchanged", "svm_vmcall_test", (), counted=False)
        held = "pages-guest --hold --pages 101"
        yield Row(kernel, "unchanged", held, (), module="lab_pages", counted=False)
        # Up to 6.12 the guest dies of such memory, as that kernel promises.
        refused = "refused" if kernel == "6.12" else ""
        yield Row(
            kernel, "unchanged", "ttm-guest", (), device="qxl", counted=False, explained_by=refused
        )
        yield Row(
            kernel, "unchanged", FREES, ("use-after-free",), module="lab_pages", counted=False,
            note=DRIVER,
        )  # fmt: skip


# Versions of the series: what they do to counts, and the seed's own case.
def _series() -> Iterable[Row]:
    prime, demand = "prime-guest --repeat 3", "demand_paging_test -v 1 -b 4M"
    for version in ("v7-late-touch", "v8-notdp-leak", "v11-underflow"):
        yield Row("6.12", f"series-{version}", prime, (), counted=False)
    for version in ("v9", "v10-bit"):
        yield Row("6.12", f"series-{version}", demand, (), npt="off", counted=False)
    yield Row("6.12", "series-v10-bit", prime, (), npt="off", counted=False)
    yield Row("6.12", "series-v9", "svm_vmcall_test", (), counted=False)
    yield Row("6.12", "series-v9", "ttm-guest", (), device="qxl", counted=False)
    yield Row("6.12", "series-v9-as-mailed", "ttm-guest --rounds 5", LEAK, device="qxl")
    yield Row(
        "6.12", "series-v9", FREES, ("use-after-free",), module="lab_pages", counted=False,
        note=DRIVER,
    )  # fmt: skip


def record(row: Row, folder: Path) -> Path:
    """Boot, record, and leave `x.pfnt`, the truth and `row.json` in *folder*; raises GuestLost."""
    run = row.workload
    if row.counted:
        run = f"planted /out/truth {row.every} {row.window_ms} {run}"
    script = f"pfntrace record --stacks -o /out/x.pfnt -- {run} >/out/said 2>&1; sync"
    options = RunOptions(
        kvm=row.kvm, npt=row.npt, module=row.module, device=row.device, timeout_s=600
    )
    begun = time.time()
    run_in_lab(["sh", "-c", script], kernel=row.kernel, out=folder, options=options)
    made = {"begun": begun, "ended": time.time(), "load": os.getloadavg()[0]}
    (folder / "row.json").write_text(json.dumps(made | {"cpus": os.cpu_count()}))
    return folder / "x.pfnt"


def truth_of(text: str) -> Truth:
    """Read what `planted` wrote; a pfn of 0 is one that the change did not know.

    >>> truth_of("hits: 2\\ngfn=0x1 pfn=0x10\\ngfn=0x2 pfn=0x10\\n")
    Truth(hits=2, pfns=frozenset({16}))
    """
    hits = re.search(r"^hits: (\d+)$", text, re.MULTILINE)
    pfns = re.findall(r"^gfn=\S+ pfn=(0x[0-9a-f]+)$", text, re.MULTILINE)
    return Truth(int(hits[1]) if hits else 0, frozenset(int(pfn, 16) for pfn in pfns) - {0})


def judge(row: Row, truth: Truth | None, checked: dict[str, Any]) -> Answer:
    """Hold what `pfntrace check --json` said against the truth."""
    findings = tuple(checked["findings"])
    found = tuple(item for item in findings if item["verdict"] in ANOMALIES)
    why = _nothing(row, findings) if not row.found_by else _something(row, truth, found)
    return Answer(row, truth, findings, not why, why)


def _nothing(row: Row, findings: Sequence[dict[str, Any]]) -> str:
    """Return what is not as it must be where KVM is right."""
    if any(item["verdict"] in ANOMALIES for item in findings):
        return "nothing is wrong, and something was found"
    others = [item for item in findings if item["detector"] != row.explained_by]
    if others:
        return f"nothing is wrong, and {others[0]['detector']} has something to say"
    if row.explained_by and not findings:
        return f"not explained by {row.explained_by}"
    return ""


def _something(row: Row, truth: Truth | None, found: Sequence[dict[str, Any]]) -> str:
    """Return what is not as it must be where something is wrong."""
    named = [item for item in found if item["detector"] in row.found_by]
    if row.counted and truth is not None and not truth.hits:
        return "it did not happen"
    if not named:
        return f"not found by {' or '.join(row.found_by)}"
    if not all(item["evidence"] for item in named):
        return "no evidence"
    if truth is None:
        return ""
    # 0: a finding that is about no page, like a livelock.
    whole = [item for item in named if item["pages"] in (0, len(truth.pfns))]
    if not whole:
        return "another number of pages"
    return "" if any(_names_only(item, truth) for item in whole) else "other pages"


def _names_only(item: dict[str, Any], truth: Truth) -> bool:
    named = {pfn for first, last in item["pfns"] for pfn in range(first, last + 1)}
    return not item["pages"] or named <= truth.pfns


def table(answers: Sequence[Answer], earlier: Collection[str] = ()) -> str:
    """Return the Markdown table; recordings named in `earlier` get a mark."""
    lines = [HEADER, "|---|---|---|---|---|---|---|---|"]
    for said in answers:
        row, truth = said.row, said.truth
        happened = f"{truth.hits:,}, {len(truth.pfns):,}" if truth else "-"
        found = "; ".join(
            f"{item['detector']} {item['verdict']} {item['count']:,}, {item['pages']:,}"
            for item in said.findings
        )
        mmu = "shadow" if row.npt == "off" else "TDP"
        rare = f", 1 in {row.every:,}" if row.every > 1 else ""
        check = f"**{said.why}**" if said.why else "right"
        replay = said.replay if said.replayed_right else f"**{said.replay}**"
        mark = " ¹" if row.name in earlier else ""
        workload = f"`{row.workload}`{rare}{mark}"
        cells = [row.kernel, row.kvm, mmu, workload, happened, found or "nothing"]
        cells += [f"{check}: {row.note}" if row.note else check, replay]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def ask(*words: str) -> str:
    """Return what `pfntrace WORDS` prints; raises RuntimeError with its last line if nothing."""
    command = [sys.executable, str(PROJECT / "pfntrace.py"), *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{words[0]} took more than {PATIENCE_S} s") from None
    if not done.stdout:
        raise RuntimeError(f"{words[0]} failed: {_last_line(done.stderr)}")
    return done.stdout


def answer(row: Row, folder: Path, *, recheck: bool = False) -> Answer:
    """Record a row in *folder*, or take what is there; check it, replay it, and judge."""
    try:
        trace = folder / "x.pfnt" if recheck else record(row, folder)
    except GuestLost as error:
        return Answer(row, None, (), False, f"guest lost: {_last_line(str(error))}")
    if not trace.exists():
        said = folder / "said"
        words = _last_line(said.read_text()) if said.exists() else "not recorded"
        return Answer(row, None, (), False, f"no trace: {words}")
    told = folder / "truth"
    truth = truth_of(told.read_text()) if told.exists() else None
    try:
        judged = judge(row, truth, json.loads(ask("check", "--json", str(trace))))
    except RuntimeError as error:
        judged = Answer(row, truth, (), False, str(error))
    words, right = _replayed(row, truth, trace)
    return Answer(
        row, truth, judged.findings, judged.right, judged.why, replay=words, replayed_right=right
    )


def _replayed(row: Row, truth: Truth | None, trace: Path) -> tuple[str, bool]:
    """Return in a few words what the model makes of a recording, and whether it must."""
    try:
        said = json.loads(ask("replay", "--json", str(trace)))
    except RuntimeError as error:
        return str(error).replace(str(trace), "the trace"), row.replays is None
    if said["conforms"]:
        return f"conforms to {said['kernel']}", row.replays is not False
    first = said["first_divergence"]["record"]
    what = first.get("op") or first.get("call") or first.get("result") or ""
    planted = truth is not None and first.get("pfn") in truth.pfns
    words = f"leaves {said['kernel']} at record {said['explained'] + 1:,} of {said['records']:,}: "
    words += f"{first['kind']} {what}".strip() + (" of a planted page" if planted else "")
    return words, row.replays is not True


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2]


def answers_of(chosen: Sequence[Row], keep: Path, *, recheck: bool, jobs: int) -> Iterator[Answer]:
    """Yield the rows' answers in their order; `jobs` are at work at a time."""
    with ThreadPoolExecutor(jobs) as pool:
        yield from pool.map(lambda row: answer(row, keep / row.name, recheck=recheck), chosen)


def page(answers: Sequence[Answer], keep: Path) -> str:
    """Return docs/BUGS.md: how it was made, the table, and one answer in full."""
    wrong = [said for said in answers if not said.right]
    strayed = [said for said in answers if not said.replayed_right]
    earlier = {
        said.row.name: _begun(keep / said.row.name / "x.pfnt")
        for said in answers
        if _is_earlier(keep / said.row.name)
    }
    text = f"""# Planted bugs, and what pfntrace says of them

Made by `make lab-bugs` (`tests/live/bugs.py`).

{_made(answers, keep, earlier)}

Each KVM, what is wrong with it and what a trace must show: [the lab](../tests/lab/README.md). A
planted bug counts itself how often it happened and on which host pages: `happened, pages`. A row is
`right` if a detector that must find it did, as definite or probable, with that number of pages, no
other pages and records as evidence; where KVM is right, if no detector had anything to say (on
6.12, which refuses memory that nobody counts: if that was explained). `replay` holds the recording
against the model of its kernel: it must conform where KVM is right, and leave the model at the
first wrong record where it is not (unless none is: the row says so); of the series' versions the
model puts what they should have put. What is not as it must be is **bold**: {len(wrong)} of
{len(answers)} answers of check, and {len(strayed)} of replay.

{table(answers, earlier)}
"""
    freed = next((s for s in answers if s.row.workload == FREES and s.row.kernel == "7.3"), None)
    if freed is not None and freed.findings:
        trace = str(keep / freed.row.name / "x.pfnt")
        shown = ask("check", "--detector", "use-after-free", trace)
        text += f"""
## A page freed under a live mapping

The shape of CVE-2021-22543: a driver hands pages out by mmap and frees them while a guest maps
them, on an unchanged {freed.row.kernel}. `pfntrace check --detector use-after-free`:

```text
{shown.rstrip()}
```
"""
    return text


# What `record` left has row.json; what was put there by hand has not.
def _is_earlier(folder: Path) -> bool:
    return (folder / "x.pfnt").exists() and not (folder / "row.json").exists()


def _begun(trace: Path) -> float:
    with TraceReader(trace) as reader:
        return reader.meta.start_unix_ns / 1e9


def _made(answers: Sequence[Answer], keep: Path, earlier: Mapping[str, float]) -> str:
    paths = [keep / said.row.name / "row.json" for said in answers]
    made = [json.loads(path.read_text()) for path in paths if path.exists()]
    if not made:
        return "When and how these recordings were made is not known."
    begun, ended = min(m["begun"] for m in made), max(m["ended"] for m in made)
    busy, load = sum(m["ended"] - m["begun"] for m in made), [m["load"] for m in made]
    words = (
        f"{len(made)} live recordings in the lab, each in a boot of its own, made from "
        f"{_utc(begun)} to {_utc(ended)} UTC: {(ended - begun) / 60:.0f} minutes, "
        f"{busy / (ended - begun):.1f} at a time, {busy / len(made):.0f} s each with its boot and "
        f"what of its KVM had to be built, at a load average of {min(load):.0f} to "
        f"{max(load):.0f} on {made[0]['cpus']} processors (the recordings' own load is in it). "
        f"`pfntrace check` and `replay` were asked about them at {_utc(time.time())} UTC."
    )
    if earlier:
        first, last = _utc(min(earlier.values())), _utc(max(earlier.values()))
        words += (
            f" {len(earlier)} more, marked ¹, were made from {first} to {last} UTC with an earlier "
            "build of the same changes and taken over: this page is not of one whole run."
        )
    return textwrap.fill(words, 100)


def _utc(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M}"


def main() -> int:
    parser = argparse.ArgumentParser(description="What pfntrace says of changed KVMs.")
    parser.add_argument("--kernel", action="append", default=[], help="only this kernel")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this change")
    parser.add_argument("--jobs", type=int, default=2, help="recordings at a time (2)")
    parser.add_argument("--keep", type=Path, help="keep traces and truths there")
    parser.add_argument("--recheck", action="store_true", help="ask again about what is kept")
    parser.add_argument("--write", type=Path, help="write the page of the docs there")
    asked = parser.parse_args()
    if asked.recheck and not asked.keep:
        parser.error("--recheck needs --keep")
    if asked.write and (asked.kernel or asked.only):
        parser.error("--write is for the whole table")
    answers = []
    keep = asked.keep or Path(tempfile.mkdtemp(prefix="pfntrace-bugs-"))
    chosen = rows(asked.kernel, asked.only)
    try:
        for said in answers_of(chosen, keep, recheck=asked.recheck, jobs=asked.jobs):
            answers.append(said)
            print(table(answers[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
        print(table(answers))
        if asked.write:
            asked.write.write_text(page(answers, keep))
    finally:
        if not asked.keep:
            shutil.rmtree(keep, ignore_errors=True)
    return 0 if all(said.right and said.replayed_right for said in answers) else 1


if __name__ == "__main__":
    sys.exit(main())
