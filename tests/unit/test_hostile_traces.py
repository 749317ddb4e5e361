"""Every command that reads a trace, asked about traces that no recorder wrote.

The answer is one line and exit status 1, or what the trace holds as far as it makes sense; never a
traceback, never memory that a file merely claims. Traces come from `unit.hostile`, truncated and
damaged ones from here; commands run many at a time in one process, whose memory is limited.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from unit.hostile import MAKERS
from unit.hostilerun import COMMANDS, EVERYWHERE, SOMEWHERE
from unit.records import group, write_trace

from tracer import schema

ROOT = Path(__file__).resolve().parents[2]
#: What the commands may need beyond what they have after one small trace each. The largest of these
#: traces has half a million rows, of 300 bytes each when all columns are read.
LIMIT = 900 << 20
#: Those that do the reading of the others, for damage at many places.
QUICK = ("info-json", "report", "check", "lifetimes")


Job = tuple[list[str], list[str]]


def asked(folder: Path, *jobs: list[Job]) -> list[dict[str, str]]:
    """Ask about traces, each list of jobs in a process of its own; return all answers."""
    processes = []
    for number, job in enumerate(jobs):
        own = folder / str(number)
        own.mkdir(parents=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "unit.hostilerun", str(own), str(LIMIT)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        process.stdin = None
        processes.append(process)
    answers = []
    for process in processes:
        out, err = process.communicate(timeout=300)
        assert process.returncode == 0, err[-3000:]
        answers += [json.loads(line) for line in out.splitlines()]
    expected = sum(len(c) * len(n) for job in jobs for c, n in job)
    assert len(answers) == expected, "every command answered about every trace"
    return answers


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of a trace with all kinds of records in several flushes."""
    path = tmp_path_factory.mktemp("sound") / "sound.pfnt"
    write_trace(path, [group(n, 4, schema.RECORD_KINDS) for n in range(3)])
    return path.read_bytes()


@pytest.fixture(scope="module")
def answers(tmp_path_factory, sound):
    """All answers: to start a process and to import everything costs seconds, so it is done twice.

    Most machines have two cores.
    """
    folder = tmp_path_factory.mktemp("hostile")
    others = [name for name in COMMANDS if name not in EVERYWHERE]
    no_traces = other_files(folder, sound)
    broken = damaged_files(folder, sound)
    return asked(
        folder,
        [(list(EVERYWHERE), list(MAKERS)), (list(QUICK), broken)],
        [(others, list(SOMEWHERE)), (list(COMMANDS), no_traces)],
    )


def other_files(folder: Path, sound: bytes) -> list[str]:
    """Make files of other kinds, and of another version."""
    contents = {
        "empty": b"",
        "text": b"hello\n",
        "ones": b"\xff" * 5000,
        "arrow": b"ARROW1\0\0" + bytes(200),
        "head": sound[:1000],
        "tail": sound[1000:],
        "doubled": sound * 2,
    }
    paths = [folder / f"other-{name}.pfnt" for name in contents]
    for path, content in zip(paths, contents.values(), strict=True):
        path.write_bytes(content)
    paths.append(write_trace(folder / "other-version.pfnt", [group(0)], schema_version=2))
    paths.append(folder / "other-gone.pfnt")
    return list(map(str, paths))


def damaged_files(folder: Path, sound: bytes) -> list[str]:
    """Cut a trace, and change one bit of it, at places spread over all of it."""
    paths = []
    for at in range(1, 11):
        data = bytearray(sound)
        data[len(data) * at // 11 + 7 * at] ^= 1 << at % 8
        for name, content in (("cut", sound[: len(sound) * at // 11 + at]), ("flipped", data)):
            path = folder / f"{name}-{at}.pfnt"
            path.write_bytes(content)
            paths.append(str(path))
    return paths


def wrong(answers: list[dict[str, str]], of: Callable[[str], bool]) -> str:
    found = [a for a in answers if of(Path(a["trace"]).name)]
    assert found, "nothing was asked"
    bad = [f"{a['trace']} {a['command']}: {a['wrong'][-1500:]}" for a in found if a["wrong"]]
    return "\n\n".join(bad)


def test_absurd_traces_get_an_answer_and_no_traceback(answers):
    assert not wrong(answers, lambda name: name in MAKERS)


def test_files_that_are_no_traces_get_one_line(answers):
    assert not wrong(answers, lambda name: name.startswith("other-"))


def test_cut_or_damaged_anywhere_a_trace_is_analysed_up_to_there(answers):
    assert not wrong(answers, lambda name: name.startswith(("cut-", "flipped-")))


@pytest.mark.parametrize("command", ["report", "check", "diff", "info"])
def test_what_is_cut_is_said_on_the_first_line(sound, tmp_path, command):
    path = tmp_path / "cut.pfnt"
    path.write_bytes(sound[: len(sound) * 2 // 3])
    arguments = [a.replace("T", str(path), 1) if a == "T" else a for a in COMMANDS[command]]
    done = subprocess.run(
        [sys.executable, str(ROOT / "pfntrace.py"), *arguments],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "INCOMPLETE: truncated at byte" in " ".join(done.stdout.splitlines()[:3])


def test_every_command_that_reads_a_trace_is_asked():
    # A new command is to be added to unit.hostilerun.
    import pfntrace

    found = pfntrace.app.registered_commands
    known = {words[0] for words in COMMANDS.values()}
    offered = {c.name or getattr(c.callback, "__name__", "") for c in found}
    assert offered - known == {"doctor", "record", "simulate"}
