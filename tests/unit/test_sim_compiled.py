"""The compiled model and the interpreted one are one model."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES

import pytest
from unit.compiled import FOLDER, compiled, source_of, stale
from unit.simdigest import STORIES

ROOT = FOLDER.parent.parent
MODEL = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["MODEL"]
#: Tells the SHA-256 of all files of each story, and where the model was imported from.
TELL = """
import hashlib, json, sys, tempfile
from pathlib import Path
import tracer.simulator.mmu
from tracer.simulator.simulate import Knobs, simulate
told = {}
for name, knobs in json.load(sys.stdin).items():
    knobs = {name: tuple(v) if isinstance(v, list) else v for name, v in knobs.items()}
    with tempfile.TemporaryDirectory() as folder:
        outcome = simulate(Knobs(**knobs), Path(folder) / "story.pfnt", version="test")
        files = [outcome.trace, *outcome.truth.values()]
        told[name] = [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]
print(json.dumps([tracer.simulator.mmu.__file__, told]))
"""


def tell(root):
    """Return (file of a module of the model, digests by story) as the tree at `root` tells them."""
    knobs = {name: {"mem_bytes": 1 << 20, "seed": 5, **one} for name, one in STORIES.items()}
    done = subprocess.run(
        [sys.executable, "-c", TELL], cwd=root, input=json.dumps(knobs), capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    file, told = json.loads(done.stdout)
    return file, told


@pytest.fixture
def interpreted(tmp_path):
    """The same source, with nothing compiled."""
    for room in ("probes", "tracer"):
        shutil.copytree(
            ROOT / room, tmp_path / room, ignore=shutil.ignore_patterns("*.so", "*.pyc")
        )
    return tmp_path


def test_what_is_compiled_is_the_source_that_is_here():
    assert stale() == ""


def test_a_compiled_module_that_is_older_than_its_source_is_told(monkeypatch, tmp_path):
    # Given a source that was edited after it was compiled
    monkeypatch.setattr("unit.compiled.FOLDER", tmp_path)
    binary = tmp_path / f"mmu{EXTENSION_SUFFIXES[0]}"
    binary.write_bytes(b"")
    source_of(binary).write_text("edited = True")
    os.utime(binary, (1, 1))
    # Then nobody takes what it says for what the source says
    assert "make install" in stale()


@pytest.mark.cc
def test_each_module_of_the_model_is_compiled():
    if not compiled():
        pytest.skip("the simulator is not compiled: make install, with a C compiler")
    assert [source_of(path).stem for path in compiled()] == sorted(MODEL)


@pytest.mark.cc
def test_the_compiled_model_tells_the_stories_of_its_source(interpreted):
    if not compiled():
        pytest.skip("the simulator is not compiled: make install, with a C compiler")
    # Given both, When each tells the same stories
    (fast, ours), (slow, theirs) = tell(ROOT), tell(interpreted)
    # Then they are the same byte for byte
    assert fast.endswith(".so") and slow.endswith(".py")
    assert ours == theirs and len(ours) == len(STORIES)
