"""The seed's own case on stock kernels: a TTM buffer, evicted, given to a guest as memory."""

import polars as pl
import pytest

from analysis.report import report_lines
from live.boots import Evidence

pytestmark = pytest.mark.lab


def report_of(evidence: Evidence) -> str:
    return " ".join(" ".join(report_lines(evidence.path("ttm"))).split())


@pytest.mark.parametrize("evidence", ["6.12-ttm"], indirect=True)
def test_6_12_refuses_the_uncounted_tail_and_the_report_says_why(evidence: Evidence) -> None:
    # Given a guest that died at the second page of the buffer
    assert '"outcome":"efault"' in evidence.step("ttm")["stdout"]
    failed = evidence.records("ttm").filter((pl.col("kind") == "FAULT") & (pl.col("ret") == -14))
    assert failed.height == 1

    # Then the report names page, kind of page and driver
    gfn = failed["gfn"][0]
    assert (
        f"the guest died with EFAULT because the page behind gfn {gfn:#x} is the uncounted tail "
        "of a non-compound block mapped by /dev/dri/card0 (VM_PFNMAP, VM_IO)"
    ) in report_of(evidence)


@pytest.mark.parametrize("evidence", ["7.3-ttm"], indirect=True)
def test_7_3_maps_all_128_pages_and_the_report_lists_them_as_not_counted(
    evidence: Evidence,
) -> None:
    assert '"outcome":"runs"' in evidence.step("ttm")["stdout"]
    said = report_of(evidence)

    assert "Memory that KVM maps but does not reference-count" in said
    assert "128 pages gfn 0x10000-0x1007f slot 1 /dev/dri/card0 (VM_PFNMAP, VM_IO)" in said
