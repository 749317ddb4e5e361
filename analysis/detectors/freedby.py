"""Who freed a page: KVM's own put, a drain of LRU batches, or somebody else.

That a free happened in a guest page fault says little: the host's half of a fault drains LRU
batches (folio_add_lru(), mm/swap.c), and a drain drops the last reference to pages of anybody. Two
witnesses name KVM: a stack on which KVM's function called what gives references back, with nothing
between; or KVM's put of that very page at count 1, as the last put of the same thread, in a fault
that had not ended. May import: `analysis`, `analysis.detectors.common`, numpy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.columns import Records
from analysis.detectors.common import is_put

__all__ = (
    "DRAIN",
    "OTHER",
    "PUT",
    "LastPuts",
    "Stacks",
    "drain_function",
    "frames_of",
    "kvm_function",
)

#: How a page was freed.
OTHER, PUT, DRAIN = range(3)
#: The tracer's own frames, which are innermost, and where it enters a function it traces.
_TRACING = ("bpf_prog_", "bpf_trace_run", "bpf_trampoline_", "__traceiter_", "__bpf_trace_")
#: What gives one reference back and frees that page, 6.1 to 7.3: mm/swap.c, mm/page_alloc.c.
_ONE = frozenset(
    (
        *("__put_page", "__put_single_page", "__put_compound_page", "put_page", "folio_put"),
        *("__folio_put", "__folio_put_small", "__folio_put_large", "destroy_large_folio"),
        *("free_compound_page", "free_transhuge_page", "free_unref_page", "free_frozen_pages"),
        *("__free_frozen_pages", "__free_pages", "__free_pages_ok", "free_pages_prepare"),
        *("__free_pages_prepare", "free_unref_page_prepare"),
    )
)
#: What gives back references to a batch of pages for its caller.
_BATCH = frozenset(
    ("free_unref_folios", "free_unref_page_list", "folios_put_refs", "release_pages")
)
#: What moves pages from a CPU's batch to the LRU lists, and drops the batch's references.
_DRAINS = (
    *("folio_batch_move_lru", "folio_batch_add_and_move", "__folio_batch_add_and_move"),
    *("lru_add_drain", "__lru_add_drain", "pagevec_lru_move_fn", "__pagevec_lru_add"),
    *("folio_add_lru", "mlock_folio_batch", "mlock_drain"),
)
_FRAMES_MAX = 128
#: Which of what a thread does is a free, see `LastPuts`.
_FREE = 2
#: Largest order that is believed: 1G, above MAX_PAGE_ORDER.
_ORDER_MAX = 18

U64 = npt.NDArray[np.uint64]


def frames_of(note: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the frames of a stack's note, innermost first, without the tracer's own."""
    frames = note.get("frames")
    if not isinstance(frames, list):
        return ()
    named = [str(frame) for frame in frames[:_FRAMES_MAX]]
    return tuple(frame for frame in named if not frame.startswith(_TRACING))


def _function(frame: str) -> str:
    """Return the function of a frame, without offset, module and what the compiler appended."""
    return frame.split("+", 1)[0].split(" ", 1)[0].split(".", 1)[0]


def _is_kvm(frame: str) -> bool:
    return _function(frame).startswith("kvm_") or frame.endswith(("[kvm]", "[kvm_amd]"))


def _is_intel(frame: str) -> bool:
    return frame.endswith("[kvm_intel]")


def _way(frames: Sequence[str]) -> int:
    batch = False
    for frame in frames:
        name = _function(frame)
        if name.startswith(_DRAINS):
            return DRAIN
        if _is_kvm(frame) or _is_intel(frame):
            return OTHER if batch else PUT
        if name in _BATCH:
            batch = True
        elif name not in _ONE:
            return OTHER
    return OTHER


def kvm_function(frames: Sequence[str]) -> str:
    """Return KVM's function that is innermost on a stack, "" if none is."""
    for frame in frames:
        if _is_kvm(frame) or _is_intel(frame):
            return _function(frame)
    return ""


def drain_function(frames: Sequence[str]) -> str:
    """Return the function on a stack that drains an LRU batch, "" if none does."""
    names = map(_function, frames)
    return next((name for name in names if name.startswith(_DRAINS)), "")


class Stacks:
    """The stacks of a recording by number, and how each freed."""

    def __init__(self, notes: Sequence[Mapping[str, Any]]) -> None:
        """Take the notes of a recording; those of stacks are among them."""
        self.frames = {
            note["stack"]: frames_of(note)
            for note in notes
            if isinstance(note.get("stack"), int) and 0 <= note["stack"] < 1 << 31
        }
        self._numbers = np.array(sorted(self.frames), np.int64)
        self._ways = np.array([_way(self.frames[n]) for n in self._numbers.tolist()], np.uint64)

    def ways(self, stack: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
        """Return PUT, DRAIN or OTHER for the number of each stack, OTHER if it is not known."""
        found = np.full(len(stack), OTHER, np.uint64)
        if len(self._numbers):
            wanted = stack.astype(np.int64)
            at = np.minimum(np.searchsorted(self._numbers, wanted), len(self._numbers) - 1)
            known = self._numbers[at] == wanted
            found[known] = self._ways[at[known]]
        return found


class LastPuts:
    """KVM's last put in each thread, while the fault that made it has not ended."""

    def __init__(self) -> None:
        #: (tid, pfn, call) of puts at count 1, in faults that are open at a piece's end.
        self._open = np.zeros((3, 0), np.uint64)

    def calls(
        self, frees: Records, at: npt.NDArray[np.int64], releases: Records, faults: Records
    ) -> npt.NDArray[np.uint64]:
        """Return for the frees `at` of a piece the number of the call that freed, 0 if none did."""
        found = np.zeros(len(at), np.uint64)
        carried = self._open.shape[1]
        put = np.flatnonzero(is_put(releases["call"]) & (releases["fault_ts"] > 0))
        last = releases["refcount"][put] <= 1
        if not last.any() and not carried:
            return found
        ended = np.zeros(len(faults), np.uint64)
        calls = np.where(last, releases["call"][put], 0).astype(np.uint64)
        # Of one moment: a put, what it frees, the end of the fault.
        parts = (
            (self._open[0], np.zeros_like(self._open[0]), self._open[1], self._open[2]),
            (releases["tid"][put], releases["ts"][put], releases["pfn"][put], calls),
            (frees["tid"][at], frees["ts"][at], frees["pfn"][at], np.zeros_like(found)),
            (faults["tid"], faults["ts"], ended, ended),
        )
        kinds = np.repeat(np.arange(4), [len(part[0]) for part in parts])
        tid, ts, pfn, call = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.lexsort((kinds, ts, tid))
        tid, pfn, call = (column[order].astype(np.uint64) for column in (tid, pfn, call))
        free = kinds[order] == _FREE
        before = np.maximum.accumulate(np.where(free, -1, np.arange(len(order))))
        self._keep(tid, pfn, call, before)
        rows = np.flatnonzero(free & (before >= 0))
        rows = rows[tid[before[rows]] == tid[rows]]
        place = order[rows] - (carried + len(put))
        size = np.minimum(frees["order"][at][place], _ORDER_MAX).astype(np.uint64)
        same = pfn[before[rows]] >> size == pfn[rows] >> size
        found[place[same]] = call[before[rows[same]]]
        return found

    def _keep(self, tid: U64, pfn: U64, call: U64, before: npt.NDArray[np.int64]) -> None:
        """Remember the last put of each thread for the next piece."""
        ends = before[np.flatnonzero(np.r_[tid[1:] != tid[:-1], True])]
        newest = np.unique(ends[ends >= 0])
        newest = newest[call[newest] > 0]
        self._open = np.stack([tid[newest], pfn[newest], call[newest]])
