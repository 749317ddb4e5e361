"""The ring consumer: BPF ring buffers, mapped and read as numpy arrays.

A ring holds records of one size, so what is between the two positions is one strided array over
the mapped pages: no copy, no callback, no Python per record. The kernel maps the data pages twice
in a row, so a batch that wraps is still contiguous.

Layout of a mapped ring (kernel/bpf/ringbuf.c, bpf_ringbuf_area_alloc()):

    page 0            consumer position (u64), writable by us
    page 1            producer position (u64)
    page 2 …          data, then the same data again

May import: numpy, `probes.wire`.
"""

import mmap
from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from probes.wire import EVENT, FAULT, ring_dtype

__all__ = (
    "MappedRing",
    "Records",
    "Ring",
    "RingSource",
    "map_rings",
    "ready_records",
    "take_until",
)

_BUSY = np.uint32(1 << 31)
_DISCARD = np.uint32(1 << 30)
_PAGE = mmap.PAGESIZE
_DTYPES = {"faults": ring_dtype(FAULT), "events": ring_dtype(EVENT)}

Records = NDArray[np.void]


def ready_records(slots: Records) -> Records:
    """Return the slots up to the first that a producer still writes (busy bit set)."""
    busy = slots["ring"]["len"] >= _BUSY
    first = int(busy.argmax()) if busy.size else 0
    return slots[:first] if busy.size and busy[first] else slots


def take_until(slots: Records, watermark: int) -> int:
    """Return how many leading slots are older than the watermark (ns).

    Slots are in the order of reservation, time stamps nearly so: everything from the first
    younger one on stays in the ring for the next time.
    """
    young = slots["rec"]["h"]["ts"] >= watermark
    return int(young.argmax()) if young.any() else len(slots)


def _written(slots: Records) -> Records:
    """Return the records of the slots that were not discarded, still in place."""
    discarded = slots["ring"]["len"] & _DISCARD
    return slots["rec"][discarded == 0] if discarded.any() else slots["rec"]


class Ring:
    """One ring over any memory laid out as above (`buffer`: header pages and doubled data)."""

    def __init__(self, kind: str, header: NDArray[np.uint64], produced: NDArray[np.uint64],
                 data: NDArray[np.uint8], size: int) -> None:  # fmt: skip
        """Use `data` of 2 x `size` bytes; `kind` is "faults" or "events"."""
        if size <= 0 or size & (size - 1) or len(data) != 2 * size:
            raise ValueError("a ring's size is a power of two, its data mapped twice")
        self.kind = kind
        self.size = size
        self.peak = 0
        self._consumer = header
        self._producer = produced
        self._data = data
        self._dtype = _DTYPES[kind]

    def peek(self) -> Records:
        """Return the slots that are complete now: a view, valid until `advance`."""
        # x86 does not reorder loads; the position is read before the records it covers.
        produced, consumed = int(self._producer[0]), int(self._consumer[0])
        used = produced - consumed
        self.peak = max(self.peak, used)
        count = used // self._dtype.itemsize
        at = consumed & (self.size - 1)
        slots = self._data[at : at + count * self._dtype.itemsize].view(self._dtype)
        return ready_records(slots)

    def position(self) -> int:
        """Return the consumer position: bytes given back since the ring was made."""
        return int(self._consumer[0])

    def used(self) -> int:
        """Return how many bytes wait, those still being written included."""
        return int(self._producer[0]) - int(self._consumer[0])

    def records(self, slots: Records) -> Records:
        """Return the records of these slots, discarded ones left out."""
        return _written(slots)

    def advance(self, count: int) -> None:
        """Give `count` slots back to the producers; views of them are stale from here on."""
        self._consumer[0] = int(self._consumer[0]) + count * self._dtype.itemsize


class MappedRing(Ring):
    """A ring of the running kernel, by map file descriptor."""

    def __init__(self, kind: str, fd: int, size: int) -> None:
        """Map the ring's pages; `size` is the data size in bytes."""
        self.fd = fd
        self._head = mmap.mmap(fd, _PAGE, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        self._tail = mmap.mmap(fd, _PAGE + 2 * size, mmap.MAP_SHARED, mmap.PROT_READ, offset=_PAGE)
        tail = np.frombuffer(self._tail, dtype=np.uint8)
        super().__init__(
            kind,
            np.frombuffer(self._head, dtype=np.uint64),
            tail[:8].view(np.uint64),
            tail[_PAGE:],
            size,
        )

    def close(self) -> None:
        """Drop the mappings once no view of them is left."""
        del self._consumer, self._producer, self._data
        self._head.close()
        self._tail.close()


class RingSource(Protocol):
    """The seam behind which the kernel, the simulator and a replay stand."""

    def rings(self) -> Sequence[Ring]:
        """Return the rings to drain."""

    def wait(self, timeout_s: float) -> None:
        """Return when something urgent was written, or after the timeout."""


def map_rings(fds: Sequence[tuple[str, int]], sizes: dict[str, int]) -> list[MappedRing]:
    """Map every ring of a loaded program; `sizes` are bytes by kind."""
    return [MappedRing(kind, fd, sizes[kind]) for kind, fd in fds]
