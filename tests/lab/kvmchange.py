"""What a change of KVM is: a few edits of KVM's source, and why they are there.

A change is a Python file in ``kvm/`` with one ``CHANGE``; its docstring is its header. An edit
names a file, a function of it and the shortest text in there that it replaces; text that is not
there, or more often than said, is an error: a change that no longer applies must not pass for one
that finds nothing. Imports only ``errors``.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import LabError

__all__ = ("WHOLE", "Change", "Edit", "apply_edits", "change_names", "digest", "load_change")

FOLDER = Path(__file__).resolve().parent / "kvm"
WHOLE = ""
"""For ``Edit.find``: the whole function."""


@dataclass(frozen=True, slots=True)
class Edit:
    """Replace *find*, a text of the function *function* in *path*, by *replace*."""

    path: str
    """Below the kernel's tree."""
    function: str
    """Name of the function that has the text; empty: anywhere in the file."""
    find: str
    """Any run of blanks in it stands for any other."""
    replace: str
    """``\\g<0>`` in it is the text found."""
    times: int = 1
    was: str = ""
    """Of a whole function: `digest` of it. Another body may mend what ours would bring back."""


@dataclass(frozen=True, slots=True)
class Change:
    """A change of KVM: a bug that is planted, or a patch set that was proposed."""

    name: str
    """What ``--kvm`` takes."""
    title: str
    stands_for: str
    """The real bug or patch behind it."""
    shows: str
    """What a trace of it must show."""
    workload: str
    """A command of the lab that makes it happen."""
    found_by: Sequence[str]
    """Detectors of `pfntrace check`; one of them at least must find it. Empty: nothing is wrong."""
    edits: Mapping[str, Sequence[Edit]]
    """By the lab's kernel."""
    leads_to: Sequence[str] = ()
    """Other detectors that may find what it leads to."""
    npt: str | None = None
    """The MMU that has the changed code; None: both."""
    every: int = 1
    """It happens each time that it can, or each so many times."""
    window_ms: int = 0
    """How long a race's window is held open."""
    module: str | None = None
    """A module of the lab that the workload needs."""
    repeats: bool = False
    """Whether one time makes many faults go wrong."""
    leaves: str = ""
    """The wrong record, kind and what it says, if that is one without a page."""
    status: Sequence[int] = (0,)
    """What the workload may end with: others than 0 if it is meant to fail or to be stopped."""
    planted: bool = True
    """Whether the edits call ``lab_planted()``, which counts."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Files of ours that the edits include: place in the kernel's tree -> name in ``kvm/``."""

    def file_texts(self) -> dict[str, str]:
        """Return the files of ours: place in the kernel's tree -> text."""
        return {place: (FOLDER / name).read_text() for place, name in self.files.items()}

    def edits_for(self, kernel: str) -> Sequence[Edit]:
        """Return the edits for a kernel of the lab."""
        if kernel not in self.edits:
            known = ", ".join(self.edits)
            raise LabError(
                f"--kvm {self.name} is not written for kernel {kernel}, only for {known}"
            )
        return self.edits[kernel]


def change_names() -> list[str]:
    """Return the names of all changes."""
    files = (path for path in FOLDER.glob("*.py") if not path.name.startswith("_"))
    return sorted(path.stem.replace("_", "-") for path in files)


def load_change(name: str) -> Change:
    """Return the change called *name*."""
    if name not in change_names():
        near = difflib.get_close_matches(name, change_names(), 1)
        which = f"did you mean {near[0]}?" if near else "tests/lab/README.md lists them"
        raise LabError(f"no changed KVM {name[:40]!r} in tests/lab/kvm: {which}")
    module = importlib.import_module(f"{__package__}.kvm.{name.replace('-', '_')}")
    change: Change = module.CHANGE
    if change.name != name:
        raise LabError(
            f"tests/lab/kvm: the change in the file of {name} calls itself {change.name}"
        )
    return change


def apply_edits(name: str, edits: Sequence[Edit], tree: Path) -> None:
    """Apply *edits* of the change *name* to the kernel's *tree*."""
    for edit in edits:
        path = tree / edit.path
        try:
            text = path.read_text()
        except FileNotFoundError:
            raise LabError(f"--kvm {name}: this kernel has no {edit.path}") from None
        start, end = _span(name, edit, text)
        changed, count = _pattern(edit.find).subn(edit.replace, text[start:end])
        if count != edit.times:
            place = f"{edit.path}, {edit.function}" if edit.function else edit.path
            raise LabError(
                f"--kvm {name} does not apply: {place} has {_brief(edit.find)} {count} times,"
                f" not {edit.times}"
            )
        path.write_text(text[:start] + changed + text[end:])


# A definition starts in column 0 with its name before a "(", and ends with a "}" in column 0; a
# declaration ends with ";" first.
def _span(name: str, edit: Edit, text: str) -> tuple[int, int]:
    if not edit.function:
        return 0, len(text)
    head = re.compile(
        rf"^[A-Za-z_][^;{{}}\n]*\b{re.escape(edit.function)}\([^;{{}}]*\)\n\{{.*?^\}}",
        re.MULTILINE | re.DOTALL,
    )
    found = list(head.finditer(text))
    if len(found) != 1:
        raise LabError(
            f"--kvm {name} does not apply: {edit.path} defines {edit.function}() {len(found)} times"
        )
    if edit.find == WHOLE and digest(found[0][0]) != edit.was:
        raise LabError(
            f"--kvm {name} does not apply: {edit.path} has another {edit.function}() than the one"
            f" replaced, {digest(found[0][0])}, not {edit.was or 'said which'}: see what was mended"
        )
    return found[0].span()


def digest(text: str) -> str:
    """Return a short hash of a function's text, whatever its blanks."""
    return hashlib.sha256(" ".join(text.split()).encode()).hexdigest()[:12]


def _pattern(find: str) -> re.Pattern[str]:
    if find == WHOLE:
        return re.compile(r"\A.*\Z", re.DOTALL)
    return re.compile(r"\s+".join(re.escape(word) for word in find.split()))


def _brief(text: str) -> str:
    return repr(" ".join(text.split())[:60])
