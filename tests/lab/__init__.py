"""Real kernels with real KVM and real probes, on a machine that has neither to spare.

From Python::

    from lab import GuestLost, run_in_lab

    result = run_in_lab(["pfntrace", "doctor"], kernel="6.12", out=tmp_path)
    assert result.status == 0, result.stderr

``README.md`` beside this file is the manual.
"""

from .errors import GuestLost, LabError
from .kernels import KERNELS
from .run import LabResult, RunOptions, run_in_lab
from .workloads import sum_stats

__all__ = (
    "KERNELS",
    "GuestLost",
    "LabError",
    "LabResult",
    "RunOptions",
    "run_in_lab",
    "sum_stats",
)
