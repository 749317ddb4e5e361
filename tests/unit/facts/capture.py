#!/usr/bin/env python3
"""Capture the fixtures of this folder: facts of the lab's kernels, as `tracer.observe` sees them.

    tests/unit/facts/capture.py             all of them (`make facts`; three minutes)
    tests/unit/facts/capture.py 6.12 …      only these
    tests/unit/facts/capture.py --here NAME facts of this very host, as NAME.json

`6.18-no-kprobes` is such a host: a virtual machine whose kernel has kvm built in and no kprobes.
Nothing that names a machine is kept: neither the interpreter's path nor who built the kernel.
"""

import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path

FACTS = Path(__file__).resolve().parent
PROJECT = FACTS.parent.parent.parent
sys.path[:0] = [str(PROJECT), str(PROJECT / "tests")]

from lab import RunOptions, run_in_lab  # noqa: E402  (the path has to be set first)

from probes.facts import KernelFacts  # noqa: E402
from tracer.observe import observe  # noqa: E402

_OBSERVE = (
    "export PYTHONPATH=/project:/opt/pfntrace/py; "
    "exec {}python3 -P -c 'from tracer.observe import observe; print(observe().to_json())'"
)
#: Without any privilege: what a user sees who forgot sudo.
_NOBODY = "setpriv --reuid=65534 --regid=65534 --clear-groups "

#: fixture -> lab kernel, how it is booted, how the observer is run.
FIXTURES = {
    "6.1": ("6.1", RunOptions(), ""),
    "6.12": ("6.12", RunOptions(), ""),
    "7.3": ("7.3", RunOptions(), ""),
    "6.12-shadow": ("6.12", RunOptions(npt="off"), ""),
    "7.3-shadow": ("7.3", RunOptions(npt="off"), ""),
    "6.12-nobody": ("6.12", RunOptions(), _NOBODY),
    "6.12-no-kvm": ("6.12", RunOptions(load_kvm=False), ""),
    "6.12-lockdown": ("6.12", RunOptions(append="lockdown=confidentiality"), ""),
    "6.12-integrity": ("6.12", RunOptions(append="lockdown=integrity"), ""),
}


def capture(name: str) -> KernelFacts:
    """Boot the lab for one fixture and return what was observed there."""
    kernel, options, prefix = FIXTURES[name]
    with tempfile.TemporaryDirectory() as out:
        command = ["sh", "-c", _OBSERVE.format(prefix)]
        result = run_in_lab(command, kernel=kernel, out=Path(out), options=options)
    if result.status:
        raise SystemExit(f"{name}: status {result.status}\n{result.stderr}")
    return KernelFacts.from_json(result.stdout)


def write(name: str, facts: KernelFacts) -> None:
    """Write a fixture, one fact a line, so that a change reads well as a diff."""
    version = re.sub(r"\(\S+@\S+\)", "(builder)", facts.version)
    facts = dataclasses.replace(facts, python=facts.python.split(" ")[0], version=version)
    data = json.loads(facts.to_json())
    lines = (f"{json.dumps(key)}: {json.dumps(value)}" for key, value in data.items())
    (FACTS / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def main(arguments: list[str]) -> None:
    """Capture what the command line names."""
    if arguments[:1] == ["--here"]:
        facts = observe()
        release = facts.release.split("-")[0]
        version = facts.version.replace(facts.release, release)
        write(arguments[1], dataclasses.replace(facts, release=release, version=version))
        return
    for name in arguments or FIXTURES:
        write(name, capture(name))


if __name__ == "__main__":
    main(sys.argv[1:])
