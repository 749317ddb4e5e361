"""`pfntrace check` of everything that the lab records: unchanged kernels are accused of nothing."""

import pytest

from analysis.check import check_trace
from live.boots import BOOTS, Evidence

pytestmark = pytest.mark.lab

recording = pytest.mark.parametrize(
    "evidence", [name for name in BOOTS if not name.endswith("confidential")], indirect=True
)


@recording
def test_an_unchanged_kernel_is_accused_of_nothing(evidence: Evidence) -> None:
    # Given every trace of a boot, those with loss and those that were cut off included
    # ("taken" is a file that the recorder was told not to overwrite)
    traces = sorted(path for path in evidence.out.glob("*.pfnt") if path.stem != "taken")
    assert traces

    for path in traces:
        # When all detectors are asked
        result = check_trace(path)

        # Then none finds anything definite or probable
        found = [(f.detector, f.verdict, f.title) for f in result.findings if f.is_anomaly]
        assert not found, path.name


@pytest.mark.parametrize("evidence", ["6.12-ttm"], indirect=True)
def test_the_guest_that_died_of_an_uncounted_page_is_explained(evidence: Evidence) -> None:
    # Given a guest that 6.12 refuses to map a TTM block's tail for
    result = check_trace(evidence.path("ttm"))

    # Then the refusal is explained, with the driver's file, and is no fault of the kernel
    told = [f for f in result.findings if f.verdict == "explained"]
    assert told and "/dev/dri/card0" in told[0].where and told[0].evidence
