"""Guest pages that KVM maps for itself: kvm_vcpu_map() with its end, and what it may map.

May import: `analysis`, numpy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.columns import Records, code
from analysis.detector import Chunk
from analysis.detectors.common import (
    FRAMES,
    Occurrences,
    loss_verdict,
    missing_hooks,
    refcountable,
    surely_before,
)
from analysis.findings import Finding, Innocent
from analysis.lifearrays import LifeArrays
from analysis.recording import Recording
from analysis.text import plural

__all__ = ("Pins",)

#: (vm, vcpu, gfn, pfn): what kvm_vcpu_map() and kvm_vcpu_unmap() agree on.
_Key = tuple[int, int, int, int]
#: When it was (ns), and the records of the map and the free: (kind, ts, cpu, seq).
_Free = tuple[int, tuple[str, int, int, int], tuple[str, int, int, int]]
#: Maps that are open at once; a nested guest needs about five a vCPU.
_OPEN_MAX = 1 << 20
#: Pfn caches that are followed; a vCPU has a few.
_CACHES_MAX = 1 << 16
#: Refreshes of one cache from which on its growth is told.
_REFRESHES = 16


class Pins:
    """Detector 12: maps without unmap, and maps of pages to which nobody holds a reference."""

    name = "pins"
    title = "kvm_vcpu_map() without kvm_vcpu_unmap(), or of pages that KVM cannot hold"
    rule = (
        "What kvm_vcpu_map() maps has no MMU notifier: it stays valid only by the reference (6.12 "
        "and older) or the pin (later) that it takes, and kvm_vcpu_unmap() gives that back "
        "(virt/kvm/kvm_main.c)."
    )
    columns: Mapping[str, Sequence[str]] = {
        "PIN": (
            "vm",
            "vcpu",
            "op",
            "gfn",
            "pfn",
            "hva",
            "ret",
            "refcount",
            "page_bits",
            "mapcount",
        ),
        "VM": ("vm", "op"),
        "PAGE_FREE": ("pfn", "order"),
    }
    wants_lives = False
    joins_faults = False

    def __init__(self) -> None:
        self._open: dict[_Key, list[tuple[str, int, int, int]]] = {}
        self._leaked = Occurrences()
        self._uncounted = Occurrences()
        self._freed = Occurrences()
        #: frees of pages that were mapped, until their map has ended: (when, map, free)
        self._frees_seen: dict[_Key, list[_Free]] = {}
        #: (vm, gfn, pfn) of a pfn cache -> its count at the first and the newest refresh, how many
        #: there were, the first record.
        self._caches: dict[tuple[int, int, int], list[Any]] = {}

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; return "" or why no answer is possible."""
        self._recording = recording
        unsafe = recording.facts.params.get("kvm.allow_unsafe_mappings", "")
        self._unsafe = unsafe in ("Y", "1")
        return missing_hooks(recording, "vcpu_map", "vcpu_unmap")

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        pins, vms = chunk["PIN"], chunk["VM"]
        if not len(pins) and not self._open:
            return
        maps = (pins["op"] == code("op", "map")) & (pins["ret"] == 0)
        self._look(pins, maps)
        self._refreshed(pins)
        # In order of time: maps and unmaps, VMs that end, pages that are freed.
        rows = np.flatnonzero(maps | (pins["op"] == code("op", "unmap")))
        todo = [(ts, 0, at) for ts, at in zip(pins["ts"][rows].tolist(), rows, strict=True)]
        ends = np.flatnonzero(vms["op"] == code("op", "delete"))
        todo += [(ts, 2, at) for ts, at in zip(vms["ts"][ends].tolist(), ends, strict=True)]
        frees = self._frees(chunk["PAGE_FREE"], pins["pfn"][maps])
        when = chunk["PAGE_FREE"]["ts"][frees]
        todo += [(ts, 1, at) for ts, at in zip(when.tolist(), frees, strict=True)]
        for _, what, at in sorted(todo):
            if what == 0:
                self._take(pins, int(at), is_map=bool(maps[at]))
            elif what == 1:
                self._freed_at(chunk["PAGE_FREE"], int(at))
            else:
                self._forget(int(vms["vm"][at]))

    def _look(self, pins: Records, maps: npt.NDArray[np.bool_]) -> None:
        """Find maps of pages that can be given back while KVM uses them."""
        held = maps & (pins["pfn"] < FRAMES) & refcountable(pins["page_bits"])
        self._uncounted.add(pins, np.flatnonzero(held & (pins["refcount"] <= 0)))

    def _refreshed(self, pins: Records) -> None:
        """Follow the count of what pfn caches hold, from refresh to refresh."""
        done = (pins["op"] == code("op", "refresh")) & (pins["ret"] == 0)
        for at in np.flatnonzero(done & (pins["page_bits"] > 0)):
            key = (int(pins["vm"][at]), int(pins["gfn"][at]), int(pins["pfn"][at]))
            count = int(pins["refcount"][at])
            seen = self._caches.get(key)
            if seen is not None:
                seen[1], seen[2] = count, seen[2] + 1
            elif len(self._caches) < _CACHES_MAX:
                self._caches[key] = [count, count, 1, pins.key(int(at))]

    def _take(self, pins: Records, at: int, *, is_map: bool) -> None:
        key = (
            int(pins["vm"][at]),
            int(pins["vcpu"][at]),
            int(pins["gfn"][at]),
            int(pins["pfn"][at]),
        )
        if is_map:
            if len(self._open) < _OPEN_MAX:
                self._open.setdefault(key, []).append(pins.key(at))
        elif self._open.get(key):
            self._open[key].pop()
            self._tell_frees(key, pins.key(at))
            if not self._open[key]:
                del self._open[key]

    def _forget(self, vm: int) -> None:
        """A VM is gone: what it still maps is mapped for ever."""
        for key in [key for key in self._open if key[0] == vm]:
            self._tell_frees(key)
            for name in self._open.pop(key):
                self._leaked.add_plain(vm=vm, gfn=key[2], pfn=key[3], keys=[name])

    def _frees(self, frees: Records, pfns: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Return the rows of frees that hold a page which is mapped now or in this chunk."""
        mapped = np.unique(np.array([*pfns.tolist(), *(key[3] for key in self._open)], np.uint64))
        if not len(mapped) or not len(frees):
            return np.zeros(0, np.int64)
        order = np.minimum(frees["order"], 40).astype(np.uint64)
        last = frees["pfn"] + (np.uint64(1) << order) - np.uint64(1)
        inside = np.searchsorted(mapped, frees["pfn"]) < np.searchsorted(mapped, last, "right")
        return np.flatnonzero(inside)

    def _freed_at(self, frees: Records, at: int) -> None:
        first, order = int(frees["pfn"][at]), min(int(frees["order"][at]), 40)
        for key, keys in self._open.items():
            if first <= key[3] < first + (1 << order):
                opened, freed = keys[-1], frees.key(at)
                seen = self._frees_seen.setdefault(key, [])
                # Once freed it is another's page: one lost unmap explains all frees that follow.
                if _apart(opened, freed) and all(one[1] != opened for one in seen):
                    seen.append((freed[1], opened, freed))

    def _tell_frees(self, key: _Key, end: tuple[str, int, int, int] | None = None) -> None:
        """Count the frees within a map that has ended, by which record, or has not."""
        for _, opened, freed in self._frees_seen.pop(key, ()):
            if end is None or _apart(freed, end):
                self._freed.add_plain(vm=key[0], gfn=key[2], pfn=key[3], keys=[opened, freed])

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found."""
        for key in list(self._frees_seen):
            self._tell_frees(key)
        found = []
        if self._leaked:
            found.append(self._leak())
        if self._freed:
            found.append(self._free())
        if self._uncounted:
            found.append(self._unheld())
        grown = Occurrences()
        for (vm, gfn, pfn), (first, last, times, key) in self._caches.items():
            if times >= _REFRESHES and last - first >= 0.9 * (times - 1):
                grown.add_plain(vm=vm, gfn=gfn, pfn=pfn, keys=[key])
        if grown:
            found.append(self._growing(grown))
        return found

    def _growing(self, grown: Occurrences) -> Finding:
        return grown.finding(
            self,
            self._recording,
            "probable",
            f"every refresh of a pfn cache keeps a reference: {plural(grown.pages, 'page')}",
            functions=("__kvm_gpc_refresh", "hva_to_pfn_retry"),
            rule="A pfn cache holds no reference between refreshes: it is guarded by the MMU "
            'notifier (virt/kvm/pfncache.c; Linux 3dddf65b4f4c ("KVM: Put the extra pfn reference '
            'when reusing a pfn in the gpc cache") (v5.19)).',
            innocent=(
                Innocent(
                    "somebody else took references meanwhile",
                    "unlikely: the count rose with each refresh",
                ),
            ),
            detail={"shape": "refreshed"},
        )

    def _leak(self) -> Finding:
        verdict, loss = loss_verdict("definite", self._recording, self._leaked.count, "PIN")
        count = self._leaked.count
        return self._leaked.finding(
            self,
            self._recording,
            verdict,
            f"{plural(count, 'map')} of kvm_vcpu_map() outlived the VM, on "
            f"{plural(self._leaked.pages, 'page')}",
            functions=("kvm_vcpu_map", "kvm_vcpu_unmap"),
            innocent=(
                loss,
                Innocent("the VM is still alive", "no: its end is in the trace"),
            ),
            detail={"shape": "leaked"},
        )

    def _free(self) -> Finding:
        verdict, loss = loss_verdict("definite", self._recording, self._freed.count, "PIN")
        return self._freed.finding(
            self,
            self._recording,
            verdict,
            f"{plural(self._freed.pages, 'page')} freed while kvm_vcpu_map() had them mapped",
            functions=("kvm_vcpu_map",),
            innocent=(loss,),
            detail={"shape": "freed"},
        )

    def _unheld(self) -> Finding:
        verdict, told = "definite", "no: kvm.allow_unsafe_mappings is off or does not exist"
        if self._unsafe:
            verdict, told = "explained", "yes: kvm.allow_unsafe_mappings is on"
        return self._uncounted.finding(
            self,
            self._recording,
            verdict,
            f"kvm_vcpu_map() mapped {plural(self._uncounted.pages, 'page')} that nobody holds",
            functions=("kvm_vcpu_map",),
            innocent=(Innocent("the host's administrator allowed it", told),),
            detail={"shape": "unheld"},
        )


def _apart(first: tuple[str, int, int, int], then: tuple[str, int, int, int]) -> bool:
    """Tell whether a record, (kind, ts, cpu, seq), surely came before another."""
    one, other = ([np.array([part], np.uint64) for part in key[1:]] for key in (first, then))
    return bool(surely_before(one, other)[0])
