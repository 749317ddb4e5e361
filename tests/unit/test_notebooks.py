"""Every notebook's cells run, in order, on recorded traces: a healthy one and one with a bug."""

import json
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TRACES = ("ttm-7.3", "map-zap-skipped-6.12")


def test_there_is_a_notebook() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("name", TRACES)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_its_first_cell_to_its_last(
    path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Given a trace named in the environment
    monkeypatch.setenv("PFNTRACE_TRACE", str(ROOT / f"tests/unit/traces/{name}.pfnt"))
    cells = json.loads(path.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]

    # When all cells run, then none fails
    names: dict[str, Any] = {}
    for number, text in enumerate(code):
        exec(compile(text, f"{path.name}[{number}]", "exec"), names)

    # and the planted bug is among the anomalies, while a healthy kernel has none
    assert len(names["anomalies"]) == (0 if name == "ttm-7.3" else 2)
    assert len(names["history"].events)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_carries_no_output_of_somebodys_machine(path: Path) -> None:
    for cell in json.loads(path.read_text())["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
