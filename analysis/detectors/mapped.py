"""What the detectors of mappings share: lives that went wrong, added up, and named.

May import: `analysis`, numpy.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.columns import Records, code, codes
from analysis.detectors.common import FRAMES, where_of
from analysis.findings import RANGES_MAX, Chain, Finding, Innocent
from analysis.framelog import I64, U64, FrameLog, Hits
from analysis.lifearrays import FOREVER, LifeArrays
from analysis.recording import Recording
from analysis.slotmap import Slot, SlotMap
from probes.wire import CAUSES

__all__ = (
    "FLUSH_CAUSES",
    "Flushes",
    "Key",
    "WrongLives",
    "forgotten",
    "lost_or_seen",
    "merged",
    "sorted_out",
    "unsure",
)

#: (kind, ts, cpu, seq) of a record.
Key = tuple[str, int, int, int]

#: Causes of zaps by a fast zap-all: a memslot that goes, or a root that was made invalid.
FLUSH_CAUSES = np.array([CAUSES.index("slot"), CAUSES.index("root")], np.int64)
#: Zaps of one fast zap-all follow each other closer than this, ns.
_FLUSH_GAP = 10**9
_ZAP = code("op", "zap")
_FLUSHING = codes("cause", "slot", "root")
#: Ranges kept to name them and to count pages, 16 bytes each.
_KEPT_MAX = 1 << 22


def merged(first: U64, count: U64) -> tuple[list[tuple[int, int]], int]:
    """Join ranges of frames that touch; return them as [first, last], and how many frames."""
    if not len(first):
        return [], 0
    order = np.argsort(first, kind="stable")
    begin = first[order].astype(np.int64)
    end = np.maximum.accumulate(begin + np.maximum(count[order], 1).astype(np.int64))
    cut = np.r_[True, begin[1:] > end[:-1]]
    starts = begin[cut]
    ends = end[np.r_[np.flatnonzero(cut)[1:] - 1, len(end) - 1]]
    return list(zip(starts.tolist(), (ends - 1).tolist(), strict=True)), int((ends - starts).sum())


def unsure(lives: LifeArrays, at: I64) -> npt.NDArray[np.bool_]:
    """Tell which lives may be something else: a loss touched them, or their birth was not seen."""
    return np.asarray(lives["lost"][at] | lives["censored_start"][at], np.bool_)


def lost_or_seen(recording: Recording, is_unsure: bool) -> Innocent:
    """Say whether lost SPTE records explain what lives seem to show."""
    lost = recording.lost("SPTE")
    if is_unsure:
        what = f"{lost:,} SPTE records were lost" if lost else "not all of its beginning was seen"
        return Innocent(f"a zap and an install between were missed: {what}", "not ruled out")
    found = "none was lost while they lived" if lost else "no SPTE record was lost"
    return Innocent("a zap and an install between were missed", f"no: {found}")


def forgotten(detector: Any, *logs: FrameLog) -> list[Finding]:
    """Say so if more memory was touched than a check can remember."""
    count = sum(log.forgotten for log in logs)
    if not count:
        return []
    return [
        Finding(
            detector=detector.name,
            verdict="inconclusive",
            title="more memory was touched than a check can watch",
            rule=detector.rule,
            count=count,
            innocent=(
                Innocent(
                    "nothing is wrong with the memory that was not watched",
                    "not ruled out: record fewer VMs, or a range of guest frames (--gfn)",
                ),
            ),
        )
    ]


def sorted_out(lives: LifeArrays, hits: Hits, flushes: "Flushes") -> Iterator[tuple[str, Hits]]:
    """Yield hits by what weakens the proof: "" nothing, "lost", "root" a fast zap-all under way."""
    if not len(hits):
        return
    shaky = unsure(lives, hits.life)
    begins = [flushes.begin(lives, int(at)) for at in hits.life]
    flushed = np.array([ts >= begin for ts, begin in zip(hits.ts.tolist(), begins, strict=True)])
    for why, chosen in (
        ("", ~shaky & ~flushed),
        ("lost", shaky),
        ("root", ~shaky & flushed),
    ):
        if chosen.any():
            yield why, hits.at(chosen)


class Flushes:
    """Remembers when each VM's fast zap-all began, for lives that one of them ended.

    From its begin on the leaves that it zaps belong to roots that no vCPU enters any more:
    kvm_mmu_zap_all_fast(), arch/x86/kvm/mmu/mmu.c.
    """

    def __init__(self) -> None:
        #: VM -> (begin, last zap) of its latest flush.
        self._latest: dict[int, tuple[int, int]] = {}
        self._begins: dict[int, tuple[U64, U64]] = {}

    def feed(self, sptes: Records, ended: Sequence[Slot]) -> None:
        """Take the SPTE records of a piece (op, cause, vm) and the slots that ended in it."""
        self._begins = {}
        zap = np.flatnonzero((sptes["op"] == _ZAP) & np.isin(sptes["cause"], _FLUSHING))
        vms = sptes["vm"][zap]
        for vm in np.unique(vms).tolist():
            ts = sptes["ts"][zap[vms == vm]]
            begin, last = self._latest.get(vm, (int(ts[0]), int(ts[0])))
            fresh = np.r_[int(ts[0]) - last > _FLUSH_GAP, np.diff(ts) > _FLUSH_GAP]
            for slot in ended:
                if slot.vm == vm:
                    after = int(np.searchsorted(ts, slot.ts_end))
                    if after < len(ts) and last < slot.ts_end:
                        fresh[after] = True
            begins = np.where(fresh, ts, np.uint64(0))
            begins = np.maximum(np.maximum.accumulate(begins), np.uint64(begin))
            self._begins[vm] = ts, begins
            self._latest[vm] = int(begins[-1]), int(ts[-1])

    def begin(self, lives: LifeArrays, at: int) -> int:
        """Return when the fast zap-all began that ended a life in this piece; FOREVER if none."""
        if int(lives["death_cause"][at]) not in FLUSH_CAUSES:
            return FOREVER
        ts, begins = self._begins.get(int(lives["vm"][at]), (np.zeros(0, np.uint64),) * 2)
        place = int(np.searchsorted(ts, lives["death_ts"][at]))
        return int(begins[place]) if place < len(begins) else FOREVER


class WrongLives:
    """Adds up lives that show one thing, and remembers the first one for the evidence."""

    def __init__(self) -> None:
        self.count = 0
        #: vm, as_id, gfn, pfn, level, spte of the first one, and its chain.
        self.first: dict[str, int] = {}
        self.chain: Chain | None = None
        self._guest: list[tuple[U64, U64]] = []
        self._host: list[tuple[U64, U64]] = []
        self._kept = 0
        self._vms: set[int] = set()
        self._slots: set[int] = set()
        self._span = (FOREVER, 0)

    def __bool__(self) -> bool:
        return self.count > 0

    def add(
        self,
        lives: LifeArrays,
        at: I64,
        ts: U64,
        *,
        part: tuple[U64, U64] | None = None,
        more: Callable[[int], Sequence[Key]] = lambda _: (),
    ) -> None:
        """Take the lives `at`, in which it happened at `ts` (ns).

        It concerns the whole leaf, or only a `part`: first frame and number of frames. The first
        life ever becomes the evidence, with the records that `more` names for its position in `at`.
        """
        if not len(at):
            return
        pages = lives["pages"][at].astype(np.uint64)
        guest, host = lives["gfn"][at], lives["pfn"][at]
        if part is not None:
            guest, host, pages = guest + part[0], host + part[0], part[1]
        if not self.count:
            one = int(np.argmin(ts))
            self._begin(lives, int(at[one]), int(guest[one]), int(host[one]), more(one))
        self.count += len(at)
        self._span = min(self._span[0], int(ts.min())), max(self._span[1], int(ts.max()))
        self._vms |= set(np.unique(lives["vm"][at]).tolist()) - {0}
        self._slots |= {slot for slot in np.unique(lives["slot"][at]).tolist() if slot >= 0}
        if self._kept < _KEPT_MAX:
            self._guest.append((guest, pages))
            self._host.append((host, pages))
            self._kept += len(at)

    def _begin(self, lives: LifeArrays, at: int, gfn: int, pfn: int, more: Sequence[Key]) -> None:
        names = {"vm": "vm", "as_id": "as_id", "level": "level", "spte": "spte_last"}
        self.first = {name: int(lives[column][at]) for name, column in names.items()}
        self.first |= {"gfn": gfn, "pfn": pfn}
        ends = [key for key in (lives.birth(at), lives.death(at)) if key is not None]
        fault = (int(lives["fault_ts"][at]), int(lives["birth_tid"][at]))
        self.chain = Chain(
            records=(*ends, *more),
            pfns=(pfn,) if pfn < FRAMES else (),
            faults=(fault,) if fault[0] else (),
            ts_from=int(lives["birth_ts"][at]),
            ts_to=int(lives["death_ts"][at]),
        )

    def finding(
        self,
        detector: Any,
        recording: Recording,
        verdict: str,
        title: str,
        *,
        slots: SlotMap | None = None,
        functions: Sequence[str] = (),
        innocent: Sequence[Innocent | None] = (),
        detail: Mapping[str, Any] | None = None,
        rule: str = "",
    ) -> Finding:
        """Return all that was added up as one finding of a detector."""
        gfns, _ = self._ranges(self._guest)
        pfns, pages = self._ranges(self._host)
        one = self.first
        slot = slots.at(one["vm"], one["as_id"], one["gfn"], self._span[0]) if slots else None
        where = where_of(recording, one["vm"], slot.hva_of(one["gfn"])) if slot else ""
        return Finding(
            detector=detector.name,
            verdict=verdict,
            title=title,
            rule=rule or detector.rule,
            count=self.count,
            pages=pages,
            vms=tuple(sorted(self._vms)),
            slots=tuple(sorted(self._slots or ({slot.number} if slot else set()))),
            gfns=tuple(gfns[:RANGES_MAX]),
            pfns=tuple(pfns[:RANGES_MAX]),
            more=max(len(gfns), len(pfns)) > RANGES_MAX,
            first_ts=self._span[0],
            last_ts=self._span[1],
            where=where,
            functions=tuple(functions),
            innocent=tuple(found for found in innocent if found is not None),
            chain=self.chain,
            detail={"gfn": one["gfn"], "pfn": one["pfn"], "level": one["level"],
                    "spte": f"{one['spte']:#x}", **(detail or {})},
        )  # fmt: skip

    def _ranges(self, parts: list[tuple[U64, U64]]) -> tuple[list[tuple[int, int]], int]:
        if not parts:
            return [], 0
        return merged(*(np.concatenate(column) for column in zip(*parts, strict=True)))
