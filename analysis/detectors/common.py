"""What detectors share: adding up occurrences, and wording what loss does to a verdict.

May import: `analysis`, `probes.wire`, numpy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.columns import Records
from analysis.findings import Chain, Finding, Innocent, ranges_of
from analysis.recording import Recording
from analysis.semantics import MARK_CALLS, PUT_CALLS
from probes.wire import CALLS, PAGE_BITS

__all__ = (
    "CLOCKS_NS",
    "FRAMES",
    "NEVER",
    "Occurrences",
    "folio_of",
    "function_of",
    "is_mark",
    "is_put",
    "loss_verdict",
    "missing_hooks",
    "refcountable",
    "surely_before",
    "vcpu_keys",
    "where_of",
    "where_of_gfn",
)

#: Frame numbers are below this; KVM's error values are above.
FRAMES = 1 << 40
#: A stage time that the fault never reached, see `analysis.columns.NULLS`.
NEVER = (1 << 32) - 1
#: Clocks of different cpus differ by less: Linux takes the TSC for no clock if it sees one warp
#: against another (arch/x86/kernel/tsc_sync.c). ns
CLOCKS_NS = 20_000
#: Numbers of a cpu's records that are farther apart have wrapped around, at 2^32.
_WRAPPED = 3 << 30

_PUTS = np.isin(np.array(CALLS), PUT_CALLS)
_MARKS = np.isin(np.array(CALLS), MARK_CALLS)
#: RELEASE call -> the hooks that may have seen it: where both are attached, the first is the
#: function that KVM's MMU calls, the second a wrapper for others.
_HOOKS = {
    **{
        call: (f"release_{call}",)
        for call in ("pfn_clean", "pfn_dirty", "page_clean", "page_dirty")
    },
    "finish_fault": ("finish_fault",),
    "mark_accessed": ("mark_page_accessed", "mark_pfn_accessed"),
    "mark_dirty": ("mark_page_dirty", "mark_pfn_dirty"),
}
_COMPOUND = PAGE_BITS["head"] | PAGE_BITS["tail"]
#: Frames kept to name ranges and count pages; 8 bytes each.
_KEPT_MAX = 1 << 24


def is_put(call: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Tell which RELEASE calls drop a reference."""
    return np.asarray(_PUTS[call], np.bool_)


def is_mark(call: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Tell which RELEASE calls only mark the page accessed or dirty."""
    return np.asarray(_MARKS[call], np.bool_)


def refcountable(page_bits: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Tell which pages KVM counts: kvm_pfn_to_refcounted_page(), virt/kvm/kvm_main.c (6.1).

    Those with a struct page that is not reserved; zero pages and device memory are counted though
    reserved.
    """
    bits = page_bits.astype(np.int64, copy=False)
    struct = (bits & PAGE_BITS["has_struct"]) != 0
    reserved = (bits & PAGE_BITS["reserved"]) != 0
    counted = (bits & (PAGE_BITS["zero"] | PAGE_BITS["zone_device"])) != 0
    return np.asarray(struct & (~reserved | counted), np.bool_)


def folio_of(
    pfn: npt.NDArray[Any], page_bits: npt.NDArray[Any], page_order: npt.NDArray[Any]
) -> npt.NDArray[np.uint64]:
    """Return the first frame of the compound page that each frame is part of, else itself."""
    order = np.where(page_bits.astype(np.int64) & _COMPOUND, page_order, 0).astype(np.uint64)
    order = np.minimum(order, np.uint64(40))
    return np.asarray(pfn.astype(np.uint64) >> order << order, np.uint64)


def vcpu_keys(records: Records, at: npt.NDArray[np.int64] | slice) -> npt.NDArray[np.int64]:
    """Return a number for the VM and vCPU of each row `at`."""
    vcpu = records["vcpu"][at].astype(np.int64) & 0xFFFFFFFF
    return np.asarray(records["vm"][at].astype(np.int64) << 32 | vcpu, np.int64)


def function_of(recording: Recording, call: str) -> str:
    """Return the kernel's function that a RELEASE call is, as this recording's kernel names it.

    "" for a call that is none, or whose hook was not attached. In the series "allow mapping
    non-refcounted pages" zaps and faults mark by kvm_set_page_*() (arch/x86/kvm/mmu), which other
    kernels have inline in kvm_set_pfn_*() (virt/kvm/kvm_main.c).
    """
    attached = {str(hook["hook"]): hook.get("symbols") for hook in recording.info["hooks"]}
    for hook in _HOOKS.get(call, ()):
        symbols = attached.get(hook) if hook in recording.hooks else None
        if isinstance(symbols, list) and symbols:
            # The compiler's own copies: kvm_mmu_finish_page_fault.isra.0.
            return str(symbols[0]).split(".", 1)[0]
    return ""


def surely_before(
    first: Sequence[npt.NDArray[Any]], then: Sequence[npt.NDArray[Any]]
) -> npt.NDArray[np.bool_]:
    """Tell which of some records, (ts, cpu, seq), surely were made before others.

    A cpu numbers its records: of one cpu the number tells, and where the times contradict it
    nothing is sure. The clocks of two cpus differ by less than `CLOCKS_NS`.
    """
    number, other = (one[2].astype(np.int64) for one in (first, then))
    ahead = other - number
    ahead = np.where(np.abs(ahead) > _WRAPPED, -ahead, ahead)
    apart = first[0] + np.uint64(CLOCKS_NS) <= then[0]
    same = np.where(ahead == 0, first[0] < then[0], (ahead > 0) & (first[0] <= then[0]))
    return np.asarray(np.where(first[1] == then[1], same, apart), np.bool_)


def missing_hooks(recording: Recording, *hooks: str) -> str:
    """Return a sentence if some hooks were not attached, else ""."""
    gone = recording.without(*hooks)
    if not gone:
        return ""
    return f"hook{'s' if len(gone) > 1 else ''} {', '.join(gone)} not attached in this recording"


def loss_verdict(
    verdict: str, recording: Recording, count: int, *kinds: str
) -> tuple[str, Innocent | None]:
    """Lower the verdict on `count` absent records if the ones lost of their kinds explain it.

    More absent than lost ones prove that the rest never was; then the verdict stays.
    """
    lost = recording.lost(*kinds)
    if not lost:
        return verdict, None
    name = " and ".join(kinds)
    explanation = f"{lost:,} {name} records were lost, the missing ones may be among them"
    if count > lost:
        ruled_out = f"no: {count:,} are missing, {count - lost:,} more than were lost"
        return verdict, Innocent(explanation, ruled_out)
    return "inconclusive", Innocent(explanation, "not ruled out")


def where_of(recording: Recording, vm: int, hva: int) -> str:
    """Return the mapping behind an address of a VM's process, for example its file; "" if none."""
    if not hva:
        return ""
    found = recording.mappings.find(vm, hva)
    return "" if found is None else str(found)


def where_of_gfn(recording: Recording, vm: int, gfn: int) -> str:
    """Return the mapping behind a guest frame, by the newest slot note that has it; "" if none."""
    for note in reversed(recording.notes):
        slot = note.get("slot")
        if not isinstance(slot, dict) or slot.get("vm") != vm:
            continue
        first, pages, hva = (slot.get(name) for name in ("gfn", "npages", "hva"))
        if not (isinstance(first, int) and isinstance(pages, int) and isinstance(hva, int)):
            continue
        address = hva + ((gfn - first) << 12)
        if first <= gfn < first + pages and 0 < address < 1 << 64:
            return where_of(recording, vm, address)
    return ""


class Occurrences:
    """Adds up where one thing was seen, and remembers the first one for the evidence."""

    def __init__(self) -> None:
        self.count = 0
        self.first: dict[str, Any] = {}
        self.chain: Chain | None = None
        self._pfns: list[npt.NDArray[np.uint64]] = []
        self._gfns: list[npt.NDArray[np.uint64]] = []
        self._kept = 0
        self._vms: set[int] = set()
        self._slots: set[int] = set()
        self._span = [0, 0]

    def __bool__(self) -> bool:
        return self.count > 0

    def add(
        self,
        records: Records,
        at: npt.NDArray[np.int64],
        *,
        pfns: npt.NDArray[Any] | None = None,
        faults: bool = False,
        more: Sequence[tuple[str, int, int, int]] = (),
    ) -> None:
        """Take the rows `at` of some records; their own `pfn` unless `pfns` (of these) are given.

        The first row ever becomes the evidence, with its page's history, the rest of its fault if
        `faults`, and the records that `more` names.
        """
        if not len(at):
            return
        ts = records["ts"][at]
        frames = records["pfn"][at] if pfns is None else pfns
        if not self.count:
            self._begin(records, int(at[0]), int(frames[0]), faults, more)
            self._span = [int(ts.min()), int(ts.max())]
        self._span = [min(self._span[0], int(ts.min())), max(self._span[1], int(ts.max()))]
        self.count += len(at)
        self._vms |= {int(vm) for vm in np.unique(records["vm"][at]) if vm}
        if records.kind == "FAULT":
            self._slots |= {int(slot) for slot in np.unique(records["slot"][at]) if slot >= 0}
        if self._kept < _KEPT_MAX:
            kept = np.unique(frames[frames < FRAMES]).astype(np.uint64)
            self._pfns.append(kept)
            self._kept += len(kept)
            if records.kind in ("FAULT", "SPTE", "PIN"):
                self._gfns.append(np.unique(records["gfn"][at]))

    def add_plain(
        self, *, vm: int, gfn: int, pfn: int, keys: Sequence[tuple[str, int, int, int]]
    ) -> None:
        """Take one occurrence that is not a row at hand: the records that name it are `keys`."""
        if not self.count:
            self.first = {"vm": vm, "gfn": gfn, "pfn": pfn}
            self.chain = Chain(records=tuple(keys), pfns=(pfn,) if pfn < FRAMES else ())
            self._span = [keys[0][1], keys[-1][1]]
        self.count += 1
        self._vms.add(vm)
        self._span = [min(self._span[0], keys[0][1]), max(self._span[1], keys[-1][1])]
        if self._kept < _KEPT_MAX:
            self._kept += 1
            self._pfns.append(np.array([pfn], np.uint64))
            self._gfns.append(np.array([gfn], np.uint64))

    def _begin(
        self,
        records: Records,
        at: int,
        frame: int,
        faults: bool,
        more: Sequence[tuple[str, int, int, int]],
    ) -> None:
        self.first = records.rows([at])[0]
        inside: tuple[tuple[int, int], ...] = ()
        if faults and self.first.get("fault_ts") is not None:
            inside = ((int(self.first["fault_ts"]), int(self.first.get("tid") or 0)),)
        self.chain = Chain(
            records=(records.key(at), *more),
            pfns=(frame,) if frame < FRAMES else (),
            faults=inside,
        )

    @property
    def pages(self) -> int:
        """Return how many distinct host pages there were."""
        return len(np.unique(np.concatenate(self._pfns))) if self._pfns else 0

    def _where(self, recording: Recording) -> str:
        vm, hva, gfn = (self.first.get(name) for name in ("vm", "hva", "gfn"))
        if hva is None and gfn is not None:
            return where_of_gfn(recording, int(vm or 0), int(gfn))
        return where_of(recording, int(vm or 0), int(hva or 0))

    def finding(
        self,
        detector: Any,
        recording: Recording,
        verdict: str,
        title: str,
        *,
        functions: Sequence[str] = (),
        innocent: Sequence[Innocent | None] = (),
        detail: Mapping[str, Any] | None = None,
        rule: str = "",
        count: int = 0,
    ) -> Finding:
        """Return all that was added up as one finding of a detector."""
        pfns, more_pfns = _joined(self._pfns)
        gfns, more_gfns = _joined(self._gfns)
        return Finding(
            detector=detector.name,
            verdict=verdict,
            title=title,
            rule=rule or detector.rule,
            count=count or self.count,
            pages=self.pages,
            vms=tuple(sorted(self._vms)),
            slots=tuple(sorted(self._slots)),
            gfns=gfns,
            pfns=pfns,
            more=more_pfns or more_gfns,
            first_ts=self._span[0],
            last_ts=self._span[1],
            where=self._where(recording),
            functions=tuple(functions),
            innocent=tuple(one for one in innocent if one is not None),
            chain=self.chain,
            detail=dict(detail or {}),
        )


def _joined(parts: list[npt.NDArray[np.uint64]]) -> tuple[tuple[tuple[int, int], ...], bool]:
    return ranges_of(np.concatenate(parts)) if parts else ((), False)
