"""Planted bugs, found in live recordings: one for each kernel; `make lab-bugs` does them all."""

from pathlib import Path

import pytest
from lab.kvmbuild import KERNELS_WITH_SOURCE

from live.bugs import answer, rows


@pytest.mark.lab
@pytest.mark.parametrize("kernel", KERNELS_WITH_SOURCE)
def test_a_rare_leak_is_found_on_exactly_its_pages(kernel: str, tmp_path: Path) -> None:
    # Given a KVM that keeps the reference of one fault in a thousand
    (row,) = [row for row in rows([kernel], ["leak-per-fault"]) if row.every == 1000]

    # When it runs a guest under the recorder
    said = answer(row, tmp_path)

    # Then the leak is found, on as many pages as KVM itself counted
    assert said.truth and said.truth.hits == 8
    assert said.right, said.why
    # And the model leaves the recording
    assert said.replayed_right, said.replay
