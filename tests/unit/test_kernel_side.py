"""What the kernel's side of a recording counts as missed, with programs that are made up here."""

from types import SimpleNamespace
from typing import Any

from tracer.kernel import KernelSide, Settings


class Skipping(KernelSide):
    """Programs that the kernel has skipped `skips` times each, and that it is told are armed."""

    def __init__(self) -> None:
        profile: Any = SimpleNamespace(attachments=())
        super().__init__(profile, Settings(1, 4096, 4096))
        self.skips: dict[str, int] = {}
        self.rescued: dict[str, int] = {}
        self._bpf = {"config": [SimpleNamespace(armed=0)]}

    def _skips(self) -> dict[str, int]:
        return dict(self.skips)

    def _rescued(self, program: str) -> int:
        return self.rescued.get(program, 0)


def test_a_program_skipped_before_it_was_armed_or_after_has_missed_nothing():
    # GIVEN a host that is slow to attach: a tracepoint's program meets itself meanwhile
    kernel = Skipping()
    kernel.skips = {"raw_tracepoint__mm_page_alloc": 1}
    # WHEN it is armed, stopped, and skipped once more while it is taken away
    kernel.arm()
    kernel.arm(armed=False)
    kernel.skips = {"raw_tracepoint__mm_page_alloc": 2}
    # THEN no record is missing
    assert kernel.missed() == {}


def test_what_is_skipped_between_is_missed_unless_the_second_program_took_it_over():
    kernel = Skipping()
    kernel.skips = {"kp_spte": 2}
    kernel.arm()
    kernel.skips = {"kp_spte": 5, "raw_tracepoint__mm_page_alloc": 4}
    kernel.rescued = {"raw_tracepoint__mm_page_alloc": 3}
    kernel.arm(armed=False)
    assert kernel.missed() == {"kp_spte": 3, "raw_tracepoint__mm_page_alloc": 1}
