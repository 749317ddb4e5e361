"""Ask the commands that read a trace about hostile ones, in a process of limited memory.

    python -m unit.hostilerun FOLDER LIMIT < jobs.json     one JSON line for each answer

A job is [commands, names], LIMIT is in bytes, a name is one of `unit.hostile.MAKERS` or a path;
`[["all"], ["all"]]` asks everything about all of them, which takes minutes. From the folder tests,
with the project in PYTHONPATH.
"""

import contextlib
import io
import json
import os
import resource
import shutil
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from unit.hostile import MAKERS
from unit.records import group, write_trace

import pfntrace

__all__ = ("COMMANDS", "EVERYWHERE", "SOMEWHERE", "run")

#: What is asked about each trace: T is its path, O a folder of its own.
COMMANDS: dict[str, tuple[str, ...]] = {
    "info": ("info", "T"),
    "info-json": ("info", "T", "--json"),
    "dump": ("dump", "T", "--limit", "200"),
    "dump-json": ("dump", "T", "--limit", "200", "--json"),
    "report": ("report", "T"),
    "report-json": ("report", "T", "--json"),
    "report-html": ("report", "T", "--html", "O/r.html"),
    "check": ("check", "T"),
    "check-json": ("check", "T", "--json"),
    "lifetimes": ("lifetimes", "T"),
    "plot": ("plot", "T", "-o", "O/figures", "--kind", "refcount"),
    "diff": ("diff", "T", "T"),
    "diff-json": ("diff", "T", "T", "--json"),
    "export-parquet": ("export", "T", "--format", "parquet", "-o", "O/parquet"),
    "export-csv": ("export", "T", "--format", "csv", "-o", "O/csv"),
    "export-perfetto": ("export", "T", "--format", "perfetto", "-o", "O/x.pftrace"),
    "merge": ("merge", "T", "-o", "O/merged.pfnt"),
    "replay": ("replay", "T"),
    "replay-as": ("replay", "T", "--as", "6.13", "--json"),
}
#: Commands that are asked about every trace, and traces about which every command is asked: the
#: others have few ways of their own to read, and more would cost minutes.
EVERYWHERE = ("info-json", "dump", "report", "check", "lifetimes", "merge", "replay")
SOMEWHERE = (
    *("times-absurd", "gfns-beyond-memory", "levels-absurd", "words-with-escapes"),
    *("small-numbers-random", "notes-of-other-shapes"),
)
#: Exit statuses that are answers: ok, one line of error, anomalies found.
_STATUSES = (0, 1, 4)


def run(path: Path, command: str, folder: Path) -> str:
    """Ask one command about a trace; return what is wrong with its answer, "" if nothing."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    words = {"T": str(path)}
    arguments = [words.get(w, w.replace("O/", f"{folder}/")) for w in COMMANDS[command]]
    out, err = io.StringIO(), io.StringIO()
    status: Any = 0
    sys.argv = ["pfntrace", *arguments]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            pfntrace.main()
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        return traceback.format_exc()
    return _wrong(status, out.getvalue(), err.getvalue(), folder, command)


def _wrong(status: Any, out: str, err: str, folder: Path, command: str) -> str:
    if status not in _STATUSES:
        return f"exit status {status}: {err[-300:]}"
    # What the model does not explain is an answer too, and no error.
    answered = command.startswith("replay") and out and not err
    if status == 1 and not answered and (err.count("\n") != 1 or not err.startswith("pfntrace: ")):
        return f"an error that is not one line: {err[:600]!r}"
    if status == 1 and any(folder.rglob("*.*")) and command != "merge":
        # Of several tables those before the error are whole and stay.
        if any(file.name.endswith(".part") for file in folder.rglob("*")):
            return "an unfinished file is left"
    if status != 1 and command.endswith("-json") and command != "dump-json":
        json.loads(out)
    for line in (out + err).split("\n"):
        if not line.isprintable():
            return f"what is not printable: {line!r:.300}"
    page = folder / "r.html"
    if page.exists() and "<script>alert" in page.read_text():
        return "a script of the trace's in the page"
    return ""


def main(folder: Path, limit: int, jobs: list[tuple[list[str], list[str]]]) -> None:
    """Make the traces named, ask the commands, print a JSON line for each answer."""
    warnings.simplefilter("error")
    made = write_trace(folder / "made.pfnt", [group(0)])
    # Everything is imported and warm before memory is limited.
    for command in dict.fromkeys(c for commands, _ in jobs for c in _all(commands, COMMANDS)):
        run(made, command, folder / "out")
    used = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (used + limit, resource.RLIM_INFINITY))
    for commands, names in jobs:
        for name in _all(names, MAKERS):
            path = Path(name)
            if name in MAKERS:
                path = folder / f"{name}.pfnt"
                MAKERS[name](path)
                assert path.stat().st_size > 1000, f"{name} holds nothing"
            for command in _all(commands, COMMANDS):
                wrong = run(path, command, folder / "out")
                print(json.dumps({"trace": name, "command": command, "wrong": wrong}), flush=True)
            if name in MAKERS:
                path.unlink()


def _all(words: list[str], known: Iterable[str]) -> Iterable[str]:
    return known if words == ["all"] else words


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), json.load(sys.stdin))
