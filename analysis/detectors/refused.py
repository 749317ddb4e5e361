"""Faults that KVM refuses because nobody counts the page: the seed of the whole series.

`analysis.failures` finds out why a fault failed; here it becomes a verdict. On Linux 6.12 and
older a page with count 0 that is no part of a compound page, the tail of a block as drm/ttm
allocates them, is refused by design: `explained`, since the guest dies of it and the kernel kept
its rule. A kernel that promises to map such pages and refuses is an anomaly.
May import: `analysis`, `tracer.describe`, numpy, pandas.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from analysis.columns import Records
from analysis.detector import Chunk
from analysis.detectors.common import vcpu_keys
from analysis.explain import errno_name
from analysis.failures import FAILED_COLUMNS, Failure, failed_faults, failures
from analysis.findings import Chain, Finding, Innocent
from analysis.lifearrays import LifeArrays
from analysis.pages import page_class
from analysis.recording import Recording

__all__ = ("Refused",)

#: Reasons of `analysis.failures` that are about a page which KVM looked at and did not take.
_REASONS = ("uncounted", "count 0", "free page", "refused")
_COLUMNS = tuple(dict.fromkeys([*(c for c in FAILED_COLUMNS if c != "page"), "mapcount",
                                "page_bits", "cpu", "seq", "fault_ts", "tid"]))  # fmt: skip
#: What a kernel does with pages to which it cannot take a reference: it refuses them, it maps them,
#: or it has nowhere to note that it did.
_REFUSES, _MAPS, _NO_BIT = "refuses", "maps", "no bit"
_RULES = {
    _REFUSES: "KVM of this kernel takes a reference to the page of every fault and refuses pages "
    'to which it cannot take one: Linux f8be156be163 ("KVM: do not allow mapping valid but '
    'non-reference-counted pages") (v5.13). Linux 6.13 maps them without a reference: Linux '
    '8dd861cc07e2 ("KVM: x86/mmu: Put refcounted pages instead of blindly releasing pfns").',
    _MAPS: "KVM of this kernel maps pages that nobody counts, without a reference: "
    "hva_to_pfn_remapped() (virt/kvm/kvm_main.c).",
    _NO_BIT: "KVM of this kernel maps pages with count 0 only where the SPTE can say that nobody "
    "counts them. SPTE_MMU_PAGE_REFCOUNTED is there with TDP only: without it every SPTE is taken "
    "for one of a counted page, and other pages are refused by hva_to_pfn_remapped() (series "
    "'KVM: allow mapping non-refcounted pages', v10 and v11; v8 takes a reference instead).",
}
_FUNCTIONS = {
    _REFUSES: ("hva_to_pfn_remapped", "kvm_try_get_pfn"),
    _MAPS: ("hva_to_pfn_remapped",),
    _NO_BIT: ("hva_to_pfn_remapped",),
}
#: Those of `_REASONS` that are about the count.
_BY_COUNT = ("uncounted", "count 0")
#: Failed faults of different kinds that are told apart.
_ROWS_MAX = 1 << 18


class Refused:
    """Detector 15: a fault failed because KVM could not count the page."""

    name = "refused"
    title = "faults that KVM refused because the page has no reference count"
    rule = _RULES[_REFUSES]
    columns: Mapping[str, Sequence[str]] = {"FAULT": _COLUMNS}
    wants_lives = False
    joins_faults = False

    def __init__(self) -> None:
        self._failed = pd.DataFrame()
        self._alive: dict[tuple[int, int], int] = {}
        #: (vm, gfn) -> the first fault that failed there.
        self._first: dict[tuple[int, int], tuple[tuple[str, int, int, int], int, int]] = {}

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; return "" or why no answer is possible."""
        self._recording = recording
        semantics = recording.semantics
        self._does = _REFUSES if semantics.refuses_uncounted else _MAPS
        if semantics.generation == "G1" and not recording.mask("tdp_enabled"):
            self._does = _NO_BIT
        if semantics.put == "unknown":
            return f"what generation {recording.generation or '(none)'} refuses is not known"
        if "walk" not in recording.hooks:
            return "hook walk not attached in this recording: pages that KVM refused have no name"
        return ""

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        faults = chunk["FAULT"]
        bad = faults["ret"] < 0
        if bad.any() and len(self._failed) < _ROWS_MAX:
            table = faults.frame(_COLUMNS, bad)
            table["page"] = page_class(table)
            self._failed = failed_faults([self._failed, table[FAILED_COLUMNS]])
            self._remember(faults, np.flatnonzero(bad))
        if len(self._failed):
            self._note_alive(faults, ~bad)

    def _remember(self, faults: Records, rows: "np.ndarray[Any, np.dtype[np.int64]]") -> None:
        gfns = faults["gfn"][rows]
        _, first = np.unique(gfns, return_index=True)
        for at in rows[first][: _ROWS_MAX >> 4]:
            key = (int(faults["vm"][at]), int(faults["gfn"][at]))
            fault = (int(faults["fault_ts"][at]), int(faults["tid"][at]))
            self._first.setdefault(key, (faults.key(int(at)), *fault))

    def _note_alive(self, faults: Records, well: "np.ndarray[Any, np.dtype[np.bool_]]") -> None:
        rows = np.flatnonzero(well)[::-1]
        _, last = np.unique(vcpu_keys(faults, rows), return_index=True)
        for at in rows[last]:
            self._alive[int(faults["vm"][at]), int(faults["vcpu"][at])] = int(faults["ts"][at])

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found, a finding for each VM, slot, mapping and reason."""
        if not len(self._failed):
            return []
        grouped = failures(
            self._failed,
            self._recording.mappings,
            self._alive,
            takes_reference=self._does != _MAPS,
            hooks=self._recording.hooks,
        )
        return [self._finding(one) for one in grouped if one.reason in _REASONS]

    def _finding(self, one: Failure) -> Finding:
        verdict, told = _judge(one, self._does)
        fault = self._first.get((one.vm, one.gfn))
        frames = () if one.frame is None else (one.frame, max(0, one.frame - 1))
        return Finding(
            detector=self.name,
            verdict=verdict,
            title=_title(one),
            rule=_RULES[self._does],
            count=one.faults,
            pages=one.gfns,
            vms=(one.vm,),
            slots=() if one.slot is None else (one.slot,),
            gfns=((one.gfn, one.gfn_last if one.gfns > 1 else one.gfn),),
            pfns=() if one.frame is None else ((one.frame, one.frame),),
            first_ts=one.first_ts,
            last_ts=one.last_ts,
            where="" if one.mapping is None else str(one.mapping),
            functions=_FUNCTIONS[self._does],
            innocent=told,
            chain=Chain(
                records=() if fault is None else (fault[0],),
                pfns=frames,
                faults=() if fault is None else (fault[1:],),
                ts_from=one.first_ts - min(one.first_ts, 10**9),
            ),
            detail={
                "reason": one.reason,
                "died": one.died,
                "errno": one.errno,
                "vcpus": one.vcpus,
                "shape": one.reason,
            },
        )


def _title(one: Failure) -> str:
    hurt = "the guest died" if one.died else "KVM_RUN failed"
    if one.prefetch:
        hurt = "a prefetch failed"
    page = f"the page behind gfn {one.gfn:#x}" if one.gfns <= 1 else f"{one.gfns:,} pages"
    reason = {
        "uncounted": "has count 0 and is no part of a compound page",
        "count 0": "has count 0 (frozen or half freed)",
        "free page": "is free: its owner gave it back while it is mapped",
        "refused": "was refused",
    }[one.reason]
    if one.gfns > 1:
        reason = reason.replace("has ", "have ").replace("is ", "are ").replace("was ", "were ")
    return f"{hurt} with {errno_name(one.errno)}: {page} {reason}"


def _judge(one: Failure, does: str) -> tuple[str, tuple[Innocent, ...]]:
    if does != _MAPS and one.reason in _BY_COUNT:
        remedy = "load kvm with TDP" if does == _NO_BIT else "run Linux 6.13"
        return "explained", (
            Innocent(
                "the kernel promises to refuse such pages",
                f"yes: nothing of this kernel is broken; map other memory, or {remedy}",
            ),
        )
    if one.reason == "free page":
        return "probable", (
            Innocent(
                "the owner was about to unmap the page",
                "not ruled out: the page was looked at a moment after the walk",
            ),
        )
    if one.reason == "refused" and does != _MAPS:
        return "inconclusive", (
            Innocent("the mapping forbids the access", "not ruled out: its page table is not seen"),
        )
    return "probable", (
        Innocent(
            "the kernel promises to refuse such pages", "no: it maps them without a reference"
        ),
    )
