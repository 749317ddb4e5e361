"""A BPF ring buffer in plain memory, laid out and written as the kernel does, for tests.

fake = FakeRing("events", 4096)       a memfd: consumer page, producer page, data, data again
fake.produce(records("SPTE", 3))      reserve, copy and commit; what does not fit is refused
at = fake.reserve(record)             busy until fake.commit(at) or fake.discard(at)
"""

import mmap
import os

import numpy as np

from probes import wire
from tracer.ring import Ring

__all__ = ("BUSY", "DISCARD", "FakeRing", "slot_bytes")

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
