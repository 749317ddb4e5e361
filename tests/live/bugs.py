"""`make lab-bugs`: every changed KVM of the lab, recorded, and what pfntrace says of it.

    bugs.py [--kernel V] [--only NAME]... [--jobs N] [--keep DIR [--recheck]] [--write FILE]

A row is a kernel, a change of its KVM (`tests/lab/kvm/`) and a workload: one boot, one recording.
The change itself counts how often it happened and on which pages: what `pfntrace check` says is
held against that, and `pfntrace replay` must follow a kernel that is right and stop at one that is
not. Rows are in `bugrows`, what is right of an answer in `bugjudge`. `--recheck` boots nothing and
asks again what an earlier run kept. `--write` makes the page of the docs. Exit status 1 if a row is
not as it must be.
"""

import argparse
import datetime
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from lab import GuestLost, RunOptions, run_in_lab

from live.bugjudge import Truth, judge, judge_recording, judge_replay, truth_between, truth_of
from live.bugrows import FREES, Row, rows
from tracer.tracefile import TraceReader

__all__ = ("Answer", "Row", "Truth", "answer", "page", "record", "rows", "table")

PROJECT = Path(__file__).resolve().parent.parent.parent
HEADER = (
    "| kernel | KVM | MMU | workload | happened, pages | found: detector, verdict, times, pages"
    " | check | replay |"
)
#: Seconds for one `check` or `replay`.
PATIENCE_S = 600
#: Seconds of a recording that ends before its guest does, and for its guest to end then.
EARLY_S, LATE_S = 2, 120
#: A kernel that skips a program, since an interrupt came amid it, loses a record, as the recorder
#: says; a row of which that happened is recorded anew, so often at most in all.
SKIPPED, TRIES = "the kernel skipped programs", 3
#: Of a recording that ends before its guest: how often it has happened, each 50 ms, and between
#: which times (s of the same clock as the trace's, within 10 ms).
SAMPLES = """while [ ! -e /out/status ]; do
    read before _ </proc/uptime; hits=$(cat /sys/module/kvm/parameters/lab_hits)
    read after _ </proc/uptime; echo "$before $hits $after"; sleep 0.05
done >/out/samples &"""
CLOCK_S = 0.02


@dataclass(frozen=True, slots=True)
class Answer:
    """A row of the table."""

    row: Row
    truth: Truth | None
    findings: tuple[dict[str, Any], ...] = ()
    why: str = ""
    """What is not as it must be."""
    replay: str = ""
    """What `pfntrace replay` said, in a few words."""
    replayed_right: bool = True

    @property
    def right(self) -> bool:
        """Is what check said as it must be?"""
        return not self.why


def script_of(row: Row) -> str:
    """Return what the guest's shell does for a row."""
    run = row.workload
    if row.counted:
        run = f"planted /out/truth {row.every} {row.window_ms} {run}"
    record = "pfntrace record --stacks -o /out/x.pfnt"
    if row.early:
        # The recorder tells its command to end and does not wait for it.
        samples = SAMPLES if row.counted else ""
        run = f"trap '' TERM; {samples}\n{run}; echo $? >/out/status"
        record += f" --duration {EARLY_S} -- sh -c {shlex.quote(run)} >/out/said 2>&1; ended=$?\n"
        record += f"for i in $(seq {LATE_S}); do [ -e /out/status ] && break; sleep 1; done"
    else:
        record += f" -- {run} >/out/said 2>&1; ended=$?"
    return f"{record}\nsync; exit $ended"


def record(row: Row, folder: Path) -> Path:
    """Boot, record, and leave `x.pfnt`, the truth and `row.json` in *folder*; raises GuestLost."""
    said, tries, lost = folder / "said", 0, True
    while lost and tries < TRIES:
        made, tries = _record_once(row, folder), tries + 1
        lost = said.exists() and SKIPPED in said.read_text()
    (folder / "row.json").write_text(json.dumps(made | {"tries": tries}))
    return folder / "x.pfnt"


def _record_once(row: Row, folder: Path) -> dict[str, Any]:
    # Whatever is in the folder goes first: what an earlier run left must not pass for this one's.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    options = RunOptions(
        kvm=row.kvm,
        npt=row.npt,
        module=row.module,
        device=row.device,
        append=row.append,
        timeout_s=600,
    )
    begun = time.time()
    script = script_of(row)
    ran = run_in_lab(["sh", "-c", script], kernel=row.kernel, out=folder, options=options)
    made = {"begun": begun, "ended": time.time(), "load": os.getloadavg()[0]}
    return made | {"cpus": os.cpu_count() or 0, "status": ran.status}


def truth_in(row: Row, folder: Path) -> Truth | None:
    """Return what happened, by what the change or the workload left; None: not known."""
    if row.told:
        told = re.search(r'^\{"workload".*$', (folder / "said").read_text(), re.MULTILINE)
        said = json.loads(told[0]) if told else {}
        if not said.get("pfn"):
            return None
        pages = range(said["pfn"], said["pfn"] + said["ran"])
        return Truth(len(pages), frozenset(pages), first_pfn=said["pfn"])
    if not row.counted or not (folder / "truth").exists():
        return None
    text = (folder / "truth").read_text()
    if not row.early:
        return truth_of(text)
    samples = [line.split() for line in (folder / "samples").read_text().splitlines()]
    return truth_between(text, *_bounds(samples, *_span(folder / "x.pfnt")))


def _span(trace: Path) -> tuple[float, float]:
    """Return when a recording began and when its last fault ended (s, CLOCK_MONOTONIC).

    After that the probes go, one by one, and the file is closed.
    """
    with TraceReader(trace) as reader:
        ended = max(max(batch["ts"].to_pylist()) for batch in reader.records(["FAULT"]))
        return reader.meta.start_monotonic_ns / 1e9, ended / 1e9


def _bounds(samples: Sequence[Sequence[str]], begun: float, ended: float) -> tuple[int, int]:
    """Return the least and the most that had happened when a recording ended.

    >>> _bounds([("1.00", "3", "1.00"), ("1.50", "8", "1.55"), ("2.10", "9", "2.10")], 0.5, 1.9)
    (8, 9)
    """
    whole = [(float(a), int(hits), float(b)) for a, hits, b in samples if begun <= float(b)]
    least = max((hits for _, hits, after in whole if after + CLOCK_S <= ended), default=0)
    most = [hits for before, hits, _ in whole if before >= ended]
    if not most:
        raise RuntimeError("nobody looked after the recording's end")
    return least, min(most)


def table(answers: Sequence[Answer]) -> str:
    """Return the Markdown table."""
    lines = [HEADER, "|---|---|---|---|---|---|---|---|"]
    for said in answers:
        row = said.row
        mmu = "shadow" if row.npt == "off" else "TDP"
        rare = f", 1 in {row.every:,}" if row.every > 1 else ""
        early = f", recorded for {EARLY_S} s of it" if row.early else ""
        check = f"**{said.why}**" if said.why else "right"
        replay = said.replay if said.replayed_right else f"**{said.replay}**"
        workload = f"`{row.workload}`{rare}{early}{f', `{row.append}`' if row.append else ''}"
        cells = [row.kernel, row.kvm, mmu, workload, _happened(said.truth)]
        cells += ["; ".join(_found(said.findings)) or "nothing"]
        cells += [f"{check}: {row.note}" if row.note else check, replay]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _happened(truth: Truth | None) -> str:
    if truth is None:
        return "-"
    words = f"{truth.hits:,}, {len(truth.pfns):,}"
    if truth.sure_pfns is not None:
        words = f"{truth.sure_hits:,} to {truth.hits:,}, {len(truth.sure_pfns):,} to "
        words += f"{len(truth.pfns):,}"
    if truth.freed[0]:
        words += f"; {truth.freed[0]:,} of them, {len(truth.freed[1]):,} when free"
    return words


def _found(findings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield findings in a few words; where a detector has several of a kind, what each is about."""
    kinds = Counter((item["detector"], item["verdict"]) for item in findings)
    for item in findings:
        words = f"{item['detector']} {item['verdict']} {item['count']:,}, {item['pages']:,}"
        if kinds[item["detector"], item["verdict"]] > 1:
            words += f" ({item['title'].replace('|', '/')})"
        yield words


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
        return Answer(row, None, why=f"guest lost: {_last_line(str(error))}")
    said = (folder / "said").read_text() if (folder / "said").exists() else "not recorded"
    if not trace.exists() or not (folder / "row.json").exists():
        return Answer(row, None, why=f"no trace: {_last_line(said)}")
    try:
        return _judged(row, folder, said)
    except (RuntimeError, OSError, ValueError) as error:
        return Answer(row, None, why=str(error).replace(str(folder), "its folder"))


def _judged(row: Row, folder: Path, said: str) -> Answer:
    trace = str(folder / "x.pfnt")
    made = json.loads((folder / "row.json").read_text())
    if row.early and (folder / "status").exists():
        made["workload"] = int((folder / "status").read_text())
    truth = truth_in(row, folder)
    checked = json.loads(ask("check", "--json", trace))
    why = judge_recording(row, made, json.loads(ask("info", "--json", trace)), said)
    why = why or judge(row, truth, checked)
    replay, right = judge_replay(row, truth, json.loads(ask("replay", "--json", trace)))
    return Answer(row, truth, tuple(checked["findings"]), why, replay, right)


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
    text = f"""# Planted bugs, and what pfntrace says of them

Made by `make lab-bugs` (`tests/live/bugs.py`).

{_made(answers, keep)}

Each KVM, what is wrong with it and what a trace must show: [the lab](../tests/lab/README.md). A
planted bug counts itself how often it happened and on which host pages: `happened, pages` (of pages
that a driver frees, the driver's user tells). Where the guest goes on after the recording's end,
the counts shortly before and after it are the bounds.

Right is a row only if the recording is of this boot, complete, without loss, not empty, and its
workload ended as it must; if all detectors answered that can; and

- where something is wrong, if a detector that must find it names exactly those pages, as definite
  or probable, as often as it happened (a livelock: the guest's pages, and as often as faults were
  retried if that is what is counted); if no detector names any other page, but those that a put in
  the wrong place hurts; and if only detectors speak up of which that is expected, with records as
  evidence;
- where KVM is right, if no detector had anything to say but to explain: on 6.12 the refusal of
  memory that nobody counts, with the series' `allow_unsafe_mappings` its use. (In a race on few
  processors a host's thread may have to wait amid its invalidation, while a guest faults in vain:
  that may be explained too.)

`replay` holds the recording against the model of its kernel. Models are named after the first
kernel that does so: that of 7.3 is `6.13`, that of a version of the series its number, and it puts
what that version should have put. A recording must conform where KVM is right. Where it is not,
the model must leave it at a record of a planted page (or one that has no page and is what was
planted), unless no record is wrong: the row says so. That it is the *first* wrong record is not
proven but where it is of the page of the first time.

What is not as it must be is **bold**: {len(wrong)} of {len(answers)} answers of check, and
{len(strayed)} of replay.

{table(answers)}
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


def _made(answers: Sequence[Answer], keep: Path) -> str:
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
    again = sum(m.get("tries", 1) - 1 for m in made)
    if again:
        words += f" {again} more had lost records to skipped programs and were made anew."
    return textwrap.fill(words, 100)


def _utc(seconds: float) -> str:
    return f"{datetime.datetime.fromtimestamp(seconds, datetime.UTC):%Y-%m-%d %H:%M}"


def main() -> int:
    parser = argparse.ArgumentParser(description="What pfntrace says of changed KVMs.")
    parser.add_argument("--kernel", action="append", default=[], help="only this kernel")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="this change")
    parser.add_argument(
        "--row", default="", metavar="TEXT", help="only rows with this in their name"
    )
    parser.add_argument("--jobs", type=int, default=2, help="recordings at a time (2)")
    parser.add_argument("--keep", type=Path, help="keep traces and truths there")
    parser.add_argument("--recheck", action="store_true", help="ask again about what is kept")
    parser.add_argument("--write", type=Path, help="write the page of the docs there")
    asked = parser.parse_args()
    if asked.recheck and not asked.keep:
        parser.error("--recheck needs --keep")
    if asked.write and (asked.kernel or asked.only or asked.row):
        parser.error("--write is for the whole table")
    answers = []
    keep = asked.keep or Path(tempfile.mkdtemp(prefix="pfntrace-bugs-"))
    chosen = [row for row in rows(asked.kernel, asked.only) if asked.row in row.name]
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
