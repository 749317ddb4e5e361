"""The rules of tests/conftest.py: no skip is silent, and a required thing is never skipped."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parent.parent / "conftest.py"

NEEDS_LAB = "import pytest\n@pytest.mark.lab\ndef test_it(): pass\n"


def run(folder: Path, test: str, *options: str, require: str = "") -> tuple[int, str]:
    """Run one test file under our rules; return pytest's status and what it said."""
    (folder / "conftest.py").write_text(CONFTEST.read_text())
    (folder / "pytest.ini").write_text("[pytest]\nmarkers = lab\n")
    (folder / "test_one.py").write_text(test)
    environment = {**os.environ, "PFNTRACE_REQUIRE": require}
    command = [sys.executable, "-m", "pytest", "-ra", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    return done.returncode, done.stdout


@pytest.mark.parametrize(
    "test",
    [
        "import pytest\n@pytest.mark.skip\ndef test_it(): pass\n",
        "import pytest\n@pytest.mark.skip(reason='')\ndef test_it(): pass\n",
        "import pytest\ndef test_it(): pytest.skip()\n",
        "import pytest\n@pytest.fixture\ndef f(): pytest.skip(' ')\ndef test_it(f): pass\n",
        "import pytest\npytest.skip(allow_module_level=True)\n",
    ],
)
def test_a_skip_without_a_reason_fails(tmp_path, test):
    status, said = run(tmp_path, test)
    assert status != 0
    assert "skipped without a reason" in said


@pytest.mark.parametrize(
    "test",
    [
        "import pytest\n@pytest.mark.skip(reason='too hot')\ndef test_it(): pass\n",
        "import pytest\ndef test_it(): pytest.skip('too hot')\n",
        "import pytest\npytest.skip('too hot', allow_module_level=True)\n",
    ],
)
def test_a_skip_with_a_reason_passes_and_the_reason_is_shown(tmp_path, test):
    status, said = run(tmp_path, test)
    assert status in (0, 5)  # 5: nothing was left to run
    assert "too hot" in said


def test_an_expected_failure_is_not_a_skip(tmp_path):
    test = "import pytest\n@pytest.mark.xfail(reason='x')\ndef test_it(): assert 0\n"
    assert run(tmp_path, test)[0] == 0


def test_the_lab_runs_only_when_asked_for(tmp_path):
    status, said = run(tmp_path, NEEDS_LAB)
    assert (status, "1 skipped" in said, "make test" in said) == (0, True, True)
    assert "1 passed" in run(tmp_path, NEEDS_LAB, "-m", "lab")[1]
    assert "1 passed" in run(tmp_path, NEEDS_LAB, require="lab")[1]


def test_a_required_lab_is_not_skipped(tmp_path):
    test = NEEDS_LAB.replace("pass", "pytest.skip('the lab is not built')")
    assert run(tmp_path, test, "-m", "lab")[0] == 0
    status, said = run(tmp_path, test, "-m", "lab", require="cc, lab")
    assert status == 1
    assert "PFNTRACE_REQUIRE has 'lab': " in said and "the lab is not built" in said
