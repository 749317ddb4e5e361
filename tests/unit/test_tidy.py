"""The house rules, as tests: sizes, layers, names, what may be imported and what may be written.

CONTRIBUTING.md lists them for people. A rule that nothing checks is a wish.
"""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MODULE_LINES_MAX = 500
FUNCTION_LINES_MAX = 70

#: What analysis may know of the rooms below it: the trace's reader, and names on the wire.
ANALYSIS_MAY_IMPORT = {
    "probes.errors",
    "probes.facts",
    "probes.wire",
    "tracer.describe",
    "tracer.dump",
    "tracer.schema",
    "tracer.tracefile",
}
#: A room may import itself and the rooms below it; pfntrace.py, the front door, all of them.
ROOMS = {"probes": {"probes"}, "tracer": {"probes", "tracer"}}


def project_files() -> list[Path]:
    """Return the files that belong to the project: git's if there is one, else all but builds."""
    command = ["git", "-c", "safe.directory=*", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        paths = [ROOT / name for name in listed.stdout.splitlines()]
    else:
        paths = [p for p in ROOT.rglob("*") if not set(p.parts) & {".venv", "build", "__pycache__"}]
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


FILES = project_files()
PYTHON = [path for path in FILES if path.suffix == ".py" and "scratch" not in path.parts]
ROOM_FILES = [path for path in PYTHON if path.relative_to(ROOT).parts[0] != "tests"]


def name_of(path: Path) -> str:
    """Return the dotted name of a module of the packages."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def short(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports_of(path: Path) -> Iterator[str]:
    """Yield what a module imports, anywhere in it: `a.b` for `import a.b` and `from a import b`."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = ROOT / node.module.replace(".", "/") / f"{alias.name}.py"
                yield f"{node.module}.{alias.name}" if inner.exists() else node.module


def test_the_project_s_files_are_found():
    assert {"pyproject.toml", "probes/hooks.py", "tracer/kernel.py"} <= set(map(short, FILES))


# --- sizes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PYTHON, ids=short)
def test_a_module_fits_in_the_head(path):
    assert len(path.read_text().splitlines()) <= MODULE_LINES_MAX


@pytest.mark.parametrize("path", PYTHON, ids=short)
def test_a_function_fits_on_a_screen(path):
    lengths = {}
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
            # The signature of a command is its table of options: there the body counts.
            first = node.body[0].lineno if path.name == "pfntrace.py" else node.lineno
            lengths[node.name] = node.end_lineno - first + 1
    assert not {name: n for name, n in lengths.items() if n > FUNCTION_LINES_MAX}


@pytest.mark.parametrize("path", ROOM_FILES, ids=short)
def test_a_module_says_what_it_is(path):
    docstring = ast.get_docstring(tree_of(path))
    assert docstring and docstring.splitlines()[0].endswith((".", ":")), "no first sentence"


# --- layers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ROOM_FILES, ids=short)
def test_a_room_imports_only_rooms_below_it(path):
    room = short(path).split("/")[0]
    ours = [n for n in imports_of(path) if n.split(".")[0] in (*ROOMS, "analysis", "pfntrace")]
    if room in ROOMS:
        assert {name.split(".")[0] for name in ours} <= ROOMS[room]
    elif room == "analysis":
        foreign = {name for name in ours if not name.startswith("analysis")}
        assert foreign <= ANALYSIS_MAY_IMPORT
    assert not [name for name in ours if name == "pfntrace"], "the front door is at the top"


@pytest.mark.parametrize("path", ROOM_FILES, ids=short)
def test_only_one_module_imports_bcc_and_that_one_lazily(path):
    tree = tree_of(path)
    if short(path) == "tracer/kernel.py":
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        named = [ast.unparse(node) for node in top]
        assert not [text for text in named if re.search(r"\bbcc\b", text.split(" import ")[0])]
        return
    assert "bcc" not in {name.split(".")[0] for name in imports_of(path)}
    calls = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    assert not [call for call in calls if re.match(r".*import_module\(['\"]bcc", call)]


@pytest.mark.parametrize("path", ROOM_FILES, ids=short)
def test_only_the_front_door_prints(path):
    if path.name != "pfntrace.py":
        calls = (node for node in ast.walk(tree_of(path)) if isinstance(node, ast.Call))
        assert "print" not in {ast.unparse(call.func) for call in calls}


def test_recording_imports_neither_pandas_nor_matplotlib_nor_bcc():
    # Every module of the tracer, and the front door: what `pfntrace record` can possibly load
    # before the kernel's side is made. They cost seconds in the emulated lab.
    modules = sorted(name_of(p) for p in ROOM_FILES if short(p).startswith(("tracer/", "probes/")))
    code = (
        "import importlib, sys\n"
        f"for name in {['pfntrace', *modules]!r}: importlib.import_module(name)\n"
        "print([m for m in ('pandas', 'matplotlib', 'bcc', 'polars') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_the_front_door_alone_loads_none_of_the_rooms_heavy_parts():
    # `pfntrace --help` and completion are asked often; each command imports its room by itself.
    heavy = ("pandas", "matplotlib", "pyarrow", "numpy", "tracer.kernel", "analysis")
    code = f"import pfntrace, sys; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [p for p in ROOM_FILES if p.name != "__init__.py"], ids=short)
def test_a_module_lists_what_it_offers(path):
    module = importlib.import_module(name_of(path))
    offered = getattr(module, "__all__", None)
    assert isinstance(offered, tuple), "__all__ is a tuple"
    assert len(set(offered)) == len(offered)
    assert not [name for name in offered if not hasattr(module, name)]
    assert not [name for name in offered if name.startswith("_")]


# --- dependencies ---------------------------------------------------------------------------------


def requirements() -> list[str]:
    """Return the names of all packages that pyproject.toml asks an index for."""
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = data["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    lists += [data["build-system"]["requires"], *data.get("dependency-groups", {}).values()]
    asked = [re.match(r"[\w.-]+", text) for group in lists for text in group]
    return [re.sub(r"[-_.]+", "-", match[0]).lower() for match in asked if match]


def test_nothing_depends_on_the_unrelated_bcc_of_pypi():
    # iovisor's bcc is python3-bpfcc of the distribution; PyPI's packages of these names are not it.
    assert {"numpy", "pyarrow", "typer"} <= set(requirements())
    assert not {"bcc", "bcc-python", "bpfcc"} & set(requirements())


def test_no_script_installs_bcc_with_pip():
    for path in FILES:
        if path.suffix in (".py", ".sh", ".toml", ".yml", "") and path != Path(__file__):
            text = path.read_text(errors="replace")
            assert not re.search(r"pip3? install[^\n]*\bbcc\b", text), short(path)


def test_the_lab_installs_no_bcc_with_pip_either():
    rootfs = importlib.import_module("lab.rootfs")
    assert not {"bcc", "bcc-python"} & set(rootfs.PYTHON_PACKAGES)
    assert "python3-bpfcc" in rootfs.ROOT_PACKAGES


def test_the_version_is_the_same_wherever_it_is_written():
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert importlib.import_module("pfntrace").VERSION == data["project"]["version"]


def test_the_c_travels_with_the_package():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = patterns["tool"]["setuptools"]["package-data"]["probes"]
    probes = ROOT / "probes"
    packed = {path for pattern in patterns for path in probes.glob(pattern)}
    written = {path for path in FILES if path.is_relative_to(probes / "bpf")}
    assert written and written <= packed


# --- texts ----------------------------------------------------------------------------------------

#: Paths and hosts of the machine that somebody happened to write this on.
MACHINE = re.compile(
    r"/home/\w+|/Users/\w+|/root/\.?\w+|/wor[k]/\w+|/opt/(?:wheels|pypi)"
    r"|\b(?:pypi\.org|pythonhosted\.org|[\w.]*debian\.(?:org|net))\b"
)


@pytest.mark.parametrize("path", FILES, ids=short)
def test_no_file_names_a_machine_or_a_registry(path):
    # A trace carries the words of the kernel that it was recorded on, its build address among them.
    if path not in (Path(__file__), ROOT / "LICENSE") and path.suffix != ".pfnt":
        text = path.read_text(errors="replace")
        found = MACHINE.search(text)
        assert not found, found


def test_every_kernel_of_the_lab_is_in_the_readme_of_the_probes():
    kernels = importlib.import_module("lab.kernels").KERNELS
    readme = (ROOT / "probes" / "README.md").read_text()
    table = re.findall(r"^\| ([\d.]+) \|", readme, re.M)
    assert table == list(kernels)


def test_every_file_of_the_probes_is_in_their_readme():
    readme = (ROOT / "probes" / "README.md").read_text()
    files = [p for p in FILES if p.parent in (ROOT / "probes", ROOT / "probes" / "bpf")]
    missing = [p.name for p in files if p.name not in readme and p.name != "README.md"]
    assert not [name for name in missing if name != "__init__.py"]


def test_every_make_target_says_what_it_does():
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, re.M)
    assert phony
    for target in phony[1].split():
        assert re.search(rf"^{target}:.*## \w", text, re.M), target


def test_contributing_and_ci_use_targets_that_exist():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    for name in ("CONTRIBUTING.md", ".ci/run"):
        used = set(re.findall(r"\bmake ([a-z]+)\b", (ROOT / name).read_text()))
        assert used and used <= targets, name
