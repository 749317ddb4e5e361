"""Rules for all tests: nothing is skipped silently, and the lab runs only when asked for.

`PFNTRACE_REQUIRE` names, separated by commas, what this run must have: `lab` (the tests marked
`lab`), `cc` (a C compiler). A skip for want of something required is a failure; so is, always, a
skip that gives no reason.
"""

import os
import shutil
from collections.abc import Generator
from typing import Any

import pytest

#: What pytest says when nobody said why.
_NO_REASON = ("", "unconditional skip")


def required() -> set[str]:
    """Return what PFNTRACE_REQUIRE names."""
    words = os.environ.get("PFNTRACE_REQUIRE", "").split(",")
    return {word.strip() for word in words if word.strip()}


def _objection(reason: str, keywords: Any) -> str:
    # Why this skip is not acceptable; "" if it is.
    if reason.strip() in _NO_REASON:
        return "skipped without a reason: say which condition is not met"
    for need in sorted(required() & {"lab", "cc"}):
        if need in keywords:
            return f"skipped, but PFNTRACE_REQUIRE has {need!r}: {reason}"
    return ""


def _refuse_skip(report: Any, keywords: Any) -> None:
    if not report.skipped or hasattr(report, "wasxfail"):
        return
    # A skip's longrepr is (path, line, "Skipped: reason"), or "Skipped" alone.
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    objection = _objection(text.removeprefix("Skipped").removeprefix(":"), keywords)
    if objection:
        report.outcome = "failed"
        report.longrepr = f"{report.nodeid}: {objection}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    """Turn a skip that is not acceptable into a failure."""
    report = yield
    _refuse_skip(report, item.keywords)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """The same for a module that is skipped as a whole."""
    report = yield
    _refuse_skip(report, collector.keywords)
    return report


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers that these rules give a meaning to."""
    config.addinivalue_line("markers", "cc: needs a C compiler")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip, with the reason, what was not asked for or cannot run here."""
    asked = "lab" in required() or "lab" in config.getoption("markexpr", default="")
    compiler = shutil.which("cc") or shutil.which("gcc")
    for item in items:
        if "lab" in item.keywords and not asked:
            item.add_marker(pytest.mark.skip(reason="needs the lab: make test, or pytest -m lab"))
        if "cc" in item.keywords and not compiler:
            item.add_marker(pytest.mark.skip(reason="no C compiler: apt install gcc"))
