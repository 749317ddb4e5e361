"""BPF ring buffers in plain memory, laid out and written as the kernel does, for tests.

fake = FakeRing("events", 4096)       a memfd: consumer page, producer page, data, data again
fake.produce(records("SPTE", 3))      reserve, copy and commit; what does not fit is refused
at = fake.reserve(record)             busy until fake.commit(at) or fake.discard(at)
FakeKernel()                          all of a session's kernel side, over two such rings
"""

import mmap
import os
from collections.abc import Callable

import numpy as np

from probes import wire
from tracer.kernel import Counts, KernelSide, VmEntry
from tracer.ring import Ring

__all__ = ("BUSY", "DISCARD", "FakeKernel", "FakeRing", "slot_bytes")

#: kernel: BPF_RINGBUF_BUSY_BIT, BPF_RINGBUF_DISCARD_BIT (include/uapi/linux/bpf.h)
BUSY, DISCARD = 1 << 31, 1 << 30

_PAGE = mmap.PAGESIZE
_RECORD = {"faults": wire.FAULT, "events": wire.EVENT}


def slot_bytes(kind: str) -> int:
    """Return the bytes that one record takes in a ring of "faults" or "events"."""
    return wire.ring_dtype(_RECORD[kind]).itemsize


class FakeRing:
    """The producer's side of one ring; `fd` can be mapped, `ring()` reads it without that."""

    def __init__(self, kind: str, size: int = 1 << 16, start: int = 0) -> None:
        """Begin at position `start`, as if so many bytes had gone through already."""
        self.kind, self.size = kind, size
        self.slot = slot_bytes(kind)
        self.fd = os.memfd_create(kind)
        os.ftruncate(self.fd, 2 * _PAGE + 2 * size)
        memory = np.frombuffer(mmap.mmap(self.fd, 0), np.uint8)
        self.consumer = memory[:8].view(np.uint64)
        self.producer = memory[_PAGE : _PAGE + 8].view(np.uint64)
        self.data = memory[2 * _PAGE :]
        self.consumer[0] = self.producer[0] = start

    def __del__(self) -> None:
        os.close(self.fd)

    def ring(self) -> Ring:
        """Return the consumer's side."""
        return Ring(self.kind, self.consumer, self.producer, self.data, self.size)

    def fits(self) -> int:
        """Return how many records there is room for."""
        free = self.size - 1 - int(self.producer[0] - self.consumer[0])
        return free // self.slot

    def produce(self, records: np.ndarray) -> int:
        """Write records, committed; return how many found room."""
        records = records[: self.fits()]
        slots = np.zeros(len(records), wire.ring_dtype(_RECORD[self.kind]))
        slots["ring"]["len"] = records.dtype.itemsize
        slots["rec"] = records
        self._put(int(self.producer[0]), slots.view(np.uint8))
        self.producer[0] += np.uint64(slots.nbytes)
        return len(records)

    def reserve(self, record: np.ndarray) -> int:
        """Write one record (an array of one), busy still; return where, -1 if it is full."""
        at = int(self.producer[0])
        if not self.produce(record):
            return -1
        self._set_len(at, BUSY)
        return at

    def commit(self, at: int) -> None:
        """Finish a reserved record."""
        self._set_len(at, 0)

    def discard(self, at: int) -> None:
        """Give up a reserved record: it keeps its place and is to be left out."""
        self._set_len(at, DISCARD)

    def _set_len(self, at: int, bits: int) -> None:
        size = self.slot - wire.RING_HEADER.itemsize
        self._put(at, np.array([size | bits], "<u4").view(np.uint8))

    # One write to both mappings: the kernel's pages are the same, here they are kept so.
    def _put(self, position: int, raw: np.ndarray) -> None:
        size, at = self.size, position % self.size
        end = at + len(raw)
        self.data[at:end] = raw
        self.data[size + at : size + min(end, size)] = self.data[at : min(end, size)]
        if end > size:
            self.data[: end - size] = self.data[size:end]


class FakeKernel(KernelSide):
    """Counts as the programs do; `write` is a hook that fires, `calls` the verbs in order."""

    def __init__(self, size: int = 1 << 16) -> None:
        self.fakes = {kind: FakeRing(kind, size) for kind in ("faults", "events")}
        self.totals = {kind: [Counts()] * 2 for kind in wire.KINDS[1:]}
        self.calls: list[str] = []
        self.armed = False
        self.skipped: dict[str, int] = {}
        self.known: list[VmEntry] = []
        self.failed = [("gup", "hva_to_pfn", "refused")]
        self.on_arm: Callable[[], None] = lambda: None
        #: readable once, as a ring of the kernel is when somebody asked for a wake-up.
        self.wake = os.eventfd(0, os.EFD_NONBLOCK)

    def __del__(self) -> None:
        os.close(self.wake)

    def load(self) -> None:
        self.calls.append("load")

    def attach(self) -> None:
        self.calls.append("attach")

    def arm(self, *, armed: bool = True) -> None:
        self.calls.append("arm" if armed else "disarm")
        self.armed = armed
        if armed:
            self.on_arm()

    def close(self) -> None:
        self.calls.append("close")

    def ring_fds(self) -> list[tuple[str, int]]:
        return [(kind, fake.fd) for kind, fake in self.fakes.items()]

    def counts(self) -> dict[str, list[Counts]]:
        return self.totals

    def missed(self) -> dict[str, int]:
        return self.skipped

    def open_faults(self) -> int:
        return 0

    def vms(self) -> list[VmEntry]:
        return self.known

    def stack(self, stack_id: int) -> list[str]:
        return [f"frame{stack_id}", "asm_exc_page_fault"]

    def count(self, kind: str, **more: int) -> None:
        """Add to the counters of one kind, on the last cpu."""
        last = self.totals[kind][-1]
        changed = {name: getattr(last, name) + value for name, value in more.items()}
        self.totals[kind] = [*self.totals[kind][:-1], last._replace(**changed)]

    def write(self, made: np.ndarray, filtered: int = 0) -> None:
        """Produce records: those filtered, those written, and the rest, for which no room is."""
        if not self.armed:
            return
        kind = wire.KINDS[made["h"]["kind"][0]]
        fake = self.fakes["faults" if kind == "FAULT" else "events"]
        lost = len(made) - fake.produce(made)
        self.count(kind, produced=len(made) + filtered, lost=lost, filtered=filtered)
