"""What faults put: which faults owe a put, whose page each put is of, and what that left.

May import: `analysis`, `probes.wire`, numpy.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.columns import Records, code, codes
from analysis.detectors.common import FRAMES, NEVER, folio_of, is_put, refcountable
from analysis.faultjoin import FaultJoin
from analysis.recording import Recording
from probes.wire import CALLS, PAGE_BITS

__all__ = (
    "called_twice",
    "fell",
    "fewer_than_mapped",
    "judged_faults",
    "only_strangers",
    "own_puts",
    "page_of_fault",
    "prefetched_own",
    "untold",
)

_COMPOUND = PAGE_BITS["head"] | PAGE_BITS["tail"]


def judged_faults(records: Records, recording: Recording) -> npt.NDArray[np.bool_]:
    """Tell which faults got a page that KVM counts, so that a balance is due.

    Left out are faults outside of --gfn, whose RELEASE may be filtered; and on 6.13 and later
    those that fault-in itself retried, since it puts the page inline, where nothing shows.
    """
    frame = (records["pfn"] < FRAMES) & (records["t_faultin_end"] != NEVER)
    judged = frame & refcountable(records["page_bits"])
    semantics = recording.semantics
    if semantics.says_refcounted:
        judged &= records["refcounted"] == 1
    if semantics.generation == "G2":
        judged &= records["faultin_ret"] == 0
    if recording.gfns is not None:
        low, high = recording.gfns
        judged &= (records["gfn"] >= low) & (records["gfn"] <= high)
    return np.asarray(judged, np.bool_)


def own_puts(join: FaultJoin) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Tell which releases in faults are puts of the fault's own folio, and which of another.

    The fault's large page may be put by another of its frames. But what was prefetched around the
    fault is put for itself, though it may be a tail of the same folio (FNAME(prefetch_gpte),
    arch/x86/kvm/mmu/paging_tmpl.h: kvm_release_pfn_clean()).
    """
    releases, faults = join.releases, join.records
    put = is_put(releases["call"])
    if not len(releases):
        return put, put
    columns = [faults[name][releases.fault] for name in ("pfn", "page_bits", "page_order")]
    same = releases["pfn"] == columns[0]
    if not same.all():
        mine = folio_of(columns[0], columns[1], columns[2])
        put_on = folio_of(releases["pfn"], releases["page_bits"], releases["page_order"])
        tail = mine == put_on
        if (tail & ~same).any():
            around = page_of_fault(releases.fault, releases["pfn"])
            tail &= ~np.isin(around, _prefetched(join))
        same |= tail
    return put & same, put & ~same


def _prefetched(join: FaultJoin) -> npt.NDArray[np.uint64]:
    sptes = join.sptes
    rows = sptes["cause"] == code("cause", "prefetch")
    return page_of_fault(sptes.fault[rows], sptes["pfn"][rows])


def prefetched_own(join: FaultJoin) -> npt.NDArray[np.int64]:
    """Count for each fault how often its own page was prefetched around it too, as a zero page."""
    sptes, pfns = join.sptes, join.records["pfn"]
    rows = sptes["cause"] == code("cause", "prefetch")
    return sptes.per_fault(rows & (sptes["pfn"] == pfns[sptes.fault]), len(join))


def untold(join: FaultJoin) -> npt.NDArray[np.bool_]:
    """Tell which faults mapped more than records show: what they prefetched is not known.

    A fault counts the leaves that it installs or changes (at most 255, which is more than one can
    prefetch). Where a record of them is missing, a put may be of a page that was prefetched: of a
    tail of the fault's own folio, or of the same zero page.
    """
    sptes = join.sptes
    if not len(join):
        return np.zeros(0, np.bool_)
    seen = sptes.per_fault(np.isin(sptes["op"], codes("op", "install", "change")), len(join))
    return np.asarray(seen < join.records["sptes"], np.bool_)


def called_twice(join: FaultJoin, own: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Tell which faults put their own page twice, calls from within calls left out.

    Puts of the same page prefetched around them are left out too.
    """
    calls = join.releases.fault[own] * len(CALLS) + join.releases["call"][own]
    times = np.bincount(calls, minlength=len(join) * len(CALLS)).reshape(-1, len(CALLS))
    pfn_clean, pfn_dirty, clean, dirty, finish = (
        times[:, CALLS.index(name)]
        for name in ("pfn_clean", "pfn_dirty", "page_clean", "page_dirty", "finish_fault")
    )
    # kvm_release_faultin_page(), include/linux/kvm_host.h: dirty if the page is writable.
    inner = np.where(join.records["writable"], dirty, clean)
    inside = np.minimum(pfn_clean, clean) + np.minimum(pfn_dirty, dirty)
    inside += np.minimum(finish, inner)
    return np.asarray(times.sum(axis=1) - inside > 1 + prefetched_own(join), np.bool_)


def fell(faults: Records) -> Any:
    """Tell where a reference went between fault-in's return and the end, mappings taken off."""
    before = faults["refcount"] - np.maximum(faults["mapcount"], -1)
    after = faults["refcount_end"] - np.maximum(faults["mapcount_end"], -1)
    return (faults["page_bits_end"] > 0) & (after < before)


def fewer_than_mapped(faults: Records) -> Any:
    """Tell whose page has fewer references than mappings; only of pages that are alone."""
    bits = faults["page_bits_end"]
    alone = (bits > 0) & ((bits & _COMPOUND) == 0) & refcountable(bits)
    mapped = faults["mapcount_end"]
    return alone & (mapped >= 0) & (faults["refcount_end"] <= mapped)


def only_strangers(join: FaultJoin, other: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Tell which faults put a page that neither is theirs nor was prefetched around them."""
    releases = join.releases
    answer = np.zeros(len(join), np.bool_)
    at = np.flatnonzero(other)
    if not len(at):
        return answer
    page = page_of_fault(releases.fault[at], releases["pfn"][at])
    strange = ~np.isin(page, _prefetched(join))
    answer[releases.fault[at[strange]]] = True
    return answer


def page_of_fault(fault: npt.NDArray[np.int64], pfn: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Return one number for a fault of the chunk and a frame."""
    return np.asarray(fault.astype(np.uint64) << np.uint64(40) | pfn, np.uint64)
