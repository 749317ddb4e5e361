"""The fixture `evidence`: what one boot of a real kernel left behind."""

from collections.abc import Iterator

import pytest

from live.boots import Boots, Evidence


@pytest.fixture(scope="session")
def boots(request: pytest.FixtureRequest) -> Iterator[Boots]:
    wanted = [
        item.callspec.params["evidence"]
        for item in request.session.items
        if hasattr(item, "callspec") and "evidence" in item.callspec.params
    ]
    running = Boots(wanted)
    yield running
    running.close()


@pytest.fixture(scope="session")
def evidence(request: pytest.FixtureRequest, boots: Boots) -> Evidence:
    """Wait for the boot named by the parameter."""
    return boots.evidence(request.param)
