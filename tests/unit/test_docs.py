"""The documents say what the code does."""

import re
import tomllib
from pathlib import Path

from tracer.schema import reference

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_of_columns_is_the_schemas_own() -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    _, _, rest = text.partition("<!-- columns: begin -->\n")

    assert rest.partition("<!-- columns: end -->")[0] == reference()


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    front = re.search(r'^VERSION = "(.*)"', (ROOT / "pfntrace.py").read_text(), re.M)

    assert front and front[1] == project["version"]
    assert f"## {front[1]}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_option_that_the_readme_names_exists() -> None:
    options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / "README.md").read_text()))
    front = (ROOT / "pfntrace.py").read_text()

    known = {o for o in options if f'"{o}"' in front or f"    {o[2:].replace('-', '_')}:" in front}
    assert options == known
