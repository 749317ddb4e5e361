"""Time, chance and turns: the simulator's clock, dice and scheduler.

Everything is drawn from `random.Random(seed).random()`, whose sequence Python promises to keep
("Notes on Reproducibility" of its documentation); no other generator, no hash order and no wall
clock is used, so that one seed is one story everywhere.
May import: standard library.
"""

import heapq
import random
from collections.abc import Generator, Iterator
from typing import Final

__all__ = ("FOREVER", "START_NS", "Dice", "Story", "Task", "Turns")

#: CLOCK_MONOTONIC at the beginning of every simulated recording.
START_NS: Final = 1_000_000_000_000
FOREVER: Final = 1 << 62

#: Turns between two looks.
_TURNS: Final = 64

#: What a task runs: it yields the time (ns) at which it wants to go on.
Story = Generator[int, None, None]

#: Times are drawn from a ring of so many tuples, made once: a draw is one list access.
_JITTERS: Final = 1 << 11
_PER_FAULT: Final = 6


class Dice:
    """The only source of chance of one simulation."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.random = self._random.random
        draw = self.random
        numbers = [int(draw() * 1024) for _ in range(_JITTERS * _PER_FAULT)]
        self._jitters = list(zip(*[iter(numbers)] * _PER_FAULT, strict=True))
        self._at = 0

    def below(self, limit: int) -> int:
        """Return an integer of [0, limit)."""
        return int(self.random() * limit)

    def chance(self, probability: float) -> bool:
        """Return True with the probability given."""
        return self.random() < probability

    def jitters(self) -> tuple[int, ...]:
        """Return six numbers of [0, 1024): the cheap draw, for the times of one fault only."""
        at = self._at = (self._at + 1) & _JITTERS - 1
        return self._jitters[at]

    def shuffle(self, items: list[int]) -> None:
        """Shuffle in place (Fisher and Yates)."""
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]


class Task:
    """A thread, on a cpu of its own; `now` is its own clock, ahead of the turns' at most a step.

    A cpu has the LRU batches of the kernel (mm/swap.c, lru_pvecs): they hold references to pages.
    """

    __slots__ = ("activate_batch", "cpu", "fault_ts", "heads", "heads_inside", "lru_batch", "now",
                 "seq", "tgid", "tid", "vcpu", "vm")  # fmt: skip

    def __init__(self, cpu: int, tid: int, tgid: int, vm: int, vcpu: int = -1) -> None:
        self.cpu, self.tid, self.tgid, self.vm, self.vcpu = cpu, tid, tgid, vm, vcpu
        self.now = START_NS
        self.fault_ts = 0
        self.seq = 0
        #: constant parts of its records' headers, outside and inside of faults
        self.heads: dict[int, bytes] = {}
        self.heads_inside: dict[int, bytes] = {}
        self.lru_batch: list[object] = []
        self.activate_batch: list[object] = []


class Turns:
    """Runs stories one step at a time, always the one whose time is next.

    A story whose own time is not past `next` may go on without yielding: nobody could have come
    between. That keeps a lonely vCPU fast and changes nothing.
    """

    def __init__(self) -> None:
        self.now = START_NS
        self.next = FOREVER
        self._heap: list[tuple[int, int, Story]] = []
        self._number = 0

    def start(self, story: Story, at: int) -> None:
        """Let a story begin at a time (ns)."""
        self._number += 1
        heapq.heappush(self._heap, (at, self._number, story))
        self.next = min(self.next, at)

    def run(self) -> Iterator[None]:
        """Run until no story is left; yields now and then between turns, for a look at things."""
        heap, push, pop = self._heap, heapq.heappush, heapq.heappop
        while heap:
            for _ in range(_TURNS):
                if not heap:
                    break
                self.now, number, story = pop(heap)
                self.next = heap[0][0] if heap else FOREVER
                for then in story:
                    push(heap, (then, number, story))
                    break
            yield
