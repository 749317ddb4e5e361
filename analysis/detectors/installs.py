"""Installs that no fault-in stands behind, or whose place is not that of the fault.

Every install by a fault is followed by its FAULT record, in the same VM; there the fault-in
function returned RET_PF_CONTINUE with the page that the install maps, and the guest frame of the
fault lies in the leaf. On 6.1, 6.12 and 7.3 this holds for every install of every recording. What
is no exception:

- A fault that is still open when the recording ends has no FAULT record yet.
- A fault that was under way when the recording began never has one: what it sets is its thread's
  first leaf, in a VM older than the recording, and in shadow paging the prefetched ones beside it.
- On 7.3, with more vCPUs asleep in fault-in than there are kretprobe instances, the return of
  fault-in was missed in 123 of 1589 faults, and is not counted as loss: t_faultin is there,
  t_faultin_end is not. Such faults say nothing about the page.
- A compiler may inline the fault handler where it is called most, so that its hook never fires
  though it is attached: seen with a 6.12 built anew, 82 installs and no FAULT record.
- The shadow MMU's prefetch maps neighbours of the fault, with pages of its own.
- Leaves that replace a page table (collapse) need no fault: they map what the table mapped. Leaves
  that come of splitting a larger one have no record at all.

May import: `analysis`, numpy.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.columns import Records, code, codes
from analysis.detector import Chunk
from analysis.detectors.common import FRAMES, NEVER, Occurrences
from analysis.faultjoin import FaultJoin
from analysis.findings import Finding, Innocent
from analysis.lifearrays import LifeArrays
from analysis.recording import Recording

__all__ = ("NO_FAULTS", "GfnOutside", "InstallWithoutFaultIn", "misplaced")

_INSTALL, _CHANGE = code("op", "install"), code("op", "change")
_CREATE = code("op", "create")
_FAULT = code("cause", "fault")
_SHADOW = code("mmu", "shadow")
_IN_FAULT = codes("cause", "fault", "prefetch")
#: SPTE_MMU_PRESENT_MASK, arch/x86/kvm/mmu/spte.h.
_PRESENT = np.uint64(1 << 11)
#: PTE_PREFETCH_NUM of arch/x86/kvm/mmu/mmu.c: so many leaves are prefetched together, as 1 << this.
_PREFETCHED = np.uint64(3)
#: Later than every record (ns).
_EVER = np.uint64(0xFFFF_FFFF_FFFF_FFFF)
#: Installs that wait for their FAULT record: a thread has one fault at a time.
_WAITING_MAX = 1 << 16
_WAITING = ("ts", "cpu", "seq", "fault_ts", "tid", "vm", "gfn", "pfn")

#: If more than this part of all installs is in no fault, it is the hook that misses them.
_NOBODY_MAX = 0.1

#: Why installs cannot be compared with anything.
NO_FAULTS = "no fault was recorded: the hook of the fault handler never fired"
#: What can be wrong with an install, and how the finding says it.
_WRONG = {
    "nobody": "leaves were installed by nobody: in no fault, and not over a page table",
    "no record": "leaves were installed in faults that left no FAULT record",
    "not entered": "leaves were installed in faults that never asked for a page (fault-in was not "
    "entered)",
    "refused": "leaves were installed in faults whose fault-in gave no page",
    "other page": "leaves map other pages than fault-in gave",
    "other VM": "leaves were installed in another VM than that of the fault",
}


def _pages(level: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    depth = np.clip(level.astype(np.int64) - 1, 0, 2).astype(np.uint64)
    return np.asarray(np.uint64(1) << np.uint64(9) * depth, np.uint64)


class _Waiting:
    """Installs in faults, until the fault's record comes; those for which it never will."""

    def __init__(self) -> None:
        self._rows = {name: np.zeros(0, np.uint64) for name in _WAITING}

    def step(self, sptes: Records, at: npt.NDArray[np.int64], join: FaultJoin) -> "_Rows":
        """Take the installs `at`; return those whose thread has ended a later fault since."""
        fresh = {name: sptes[name][at].astype(np.uint64) for name in _WAITING}
        rows = {name: np.concatenate([self._rows[name], fresh[name]]) for name in _WAITING}
        waits = ~_among(rows, join)
        rows = {name: column[waits] for name, column in rows.items()}
        if not len(rows["ts"]):
            self._rows = rows
            return _Rows(rows)
        over = self._overtaken(rows, join.records)
        self._rows = {name: column[~over][-_WAITING_MAX:] for name, column in rows.items()}
        return _Rows({name: column[over] for name, column in rows.items()})

    def _overtaken(
        self, rows: Mapping[str, npt.NDArray[Any]], faults: Records
    ) -> npt.NDArray[np.bool_]:
        threads, which = np.unique(rows["tid"], return_inverse=True)
        at = np.searchsorted(threads, faults["tid"])
        at[at == len(threads)] = 0
        mine = threads[at] == faults["tid"]
        latest = np.zeros(len(threads), np.uint64)
        np.maximum.at(latest, at[mine], faults["fault_ts"][mine])
        return np.asarray(rows["fault_ts"] < latest[which], np.bool_)


class _UnderWay:
    """Installs of faults that had begun before the recording did, and so are in none."""

    def __init__(self) -> None:
        self._created = np.zeros(0, np.uint64)
        self._threads = np.zeros(0, np.uint64)  # those of which a fault was recorded
        self._beside: dict[int, int] = {}  # thread -> where its fault under way set leaves

    def step(
        self, vms: Records, faults: Records, sptes: Records, at: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        """Tell which installs `at`, all in no fault, may be of one that was under way.

        A thread has one fault at a time: each that it began after arming and before an install in
        no fault has ended, and its record came before.
        """
        created = vms["vm"][vms["op"] == _CREATE].astype(np.uint64)
        self._created = np.union1d(self._created, created)
        maybe = ~np.isin(sptes["vm"][at], self._created)
        maybe &= ~np.isin(sptes["tid"][at], self._threads)
        maybe[maybe] &= self._before(faults, sptes, at[maybe])
        self._threads = np.union1d(self._threads, faults["tid"].astype(np.uint64))
        if maybe.any():
            maybe[maybe] &= self._together(sptes, at[maybe])
        return maybe

    @staticmethod
    def _before(
        faults: Records, sptes: Records, at: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.bool_]:
        # Tell which installs came before all faults of their thread in these records.
        threads, which = np.unique(sptes["tid"][at], return_inverse=True)
        first = np.full(len(threads), _EVER, np.uint64)
        mine = np.isin(faults["tid"], threads)
        place = np.searchsorted(threads, faults["tid"][mine])
        np.minimum.at(first, place, faults["fault_ts"][mine].astype(np.uint64))
        return np.asarray(sptes["ts"][at] < first[which], np.bool_)

    def _together(self, sptes: Records, at: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        threads, first, which = np.unique(sptes["tid"][at], return_index=True, return_inverse=True)
        near = sptes["gfn"][at].astype(np.uint64) >> _PREFETCHED
        place = [
            self._beside.setdefault(int(tid), int(near[row]))
            for tid, row in zip(threads, first, strict=True)
        ]
        return np.asarray(near == np.array(place, np.uint64)[which], np.bool_)


class _Rows:
    """Rows that look like records to `Occurrences`."""

    kind = "SPTE"

    def __init__(self, columns: dict[str, npt.NDArray[Any]]) -> None:
        self._columns = columns

    def __len__(self) -> int:
        return len(self._columns["ts"])

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self._columns[name]

    def key(self, at: int) -> tuple[str, int, int, int]:
        ts, cpu, seq = (int(self[name][at]) for name in ("ts", "cpu", "seq"))
        return self.kind, ts, cpu, seq

    def rows(self, at: Sequence[int]) -> list[dict[str, Any]]:
        return [{name: int(column[one]) for name, column in self._columns.items()} for one in at]


def _among(rows: Mapping[str, npt.NDArray[Any]], join: FaultJoin) -> npt.NDArray[np.bool_]:
    """Tell which rows are joined with their fault; both are in order of time."""
    ts, cpu = join.sptes["ts"], join.sptes["cpu"]
    if not len(ts):
        return np.zeros(len(rows["ts"]), np.bool_)
    # Many cpus may write in the same nanosecond: each moment has a number, each cpu a place in it.
    new = np.concatenate([[True], ts[1:] != ts[:-1]])
    moments = ts[new]
    at = np.minimum(np.searchsorted(moments, rows["ts"]), len(moments) - 1)
    joined = (np.cumsum(new) - 1 << 16) + cpu.astype(np.int64)
    found = np.isin((at << 16) + rows["cpu"].astype(np.int64), joined)
    return np.asarray(found & (moments[at] == rows["ts"]), np.bool_)


class InstallWithoutFaultIn:
    """Detector 1: an install that no fault-in, prefetch or split in the same VM stands behind."""

    name = "install"
    title = "leaves installed without a fault-in of their page"
    rule = (
        "A leaf maps the page that fault-in gave to the same fault: kvm_faultin_pfn() (since 6.13 "
        "kvm_mmu_faultin_pfn()), then kvm_tdp_mmu_map() or mmu_set_spte() with fault->pfn "
        "(arch/x86/kvm/mmu/mmu.c)."
    )
    columns: Mapping[str, Sequence[str]] = {
        "SPTE": ("op", "cause", "fault_ts", "tid", "vm", "gfn", "pfn", "level", "old", "mmu"),
        "VM": ("op", "vm"),
    }
    wants_lives = False
    joins_faults = True

    def __init__(self) -> None:
        self._waiting = _Waiting()
        self._under_way = _UnderWay()
        self._found = {what: Occurrences() for what in _WRONG}

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; return "" or why no answer is possible."""
        self._recording = recording
        self._installs = 0
        return _no_faults(recording)

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        sptes, join = chunk["SPTE"], chunk.faults
        installs = np.flatnonzero(sptes["op"] == _INSTALL)
        cause, inside = sptes["cause"][installs], sptes["fault_ts"][installs] != 0
        collapse = (sptes["level"][installs] > 1) & ((sptes["old"][installs] & _PRESENT) != 0)
        collapse &= sptes["mmu"][installs] != _SHADOW
        self._installs += len(installs)
        nobody = installs[~inside & ~collapse]
        early = self._under_way.step(chunk["VM"], join.records, sptes, nobody)
        self._found["nobody"].add(sptes, nobody[~early])
        # With --gfn a prefetched neighbour may be wanted and the fault itself not.
        named = inside & (np.isin(cause, _IN_FAULT) if self._recording.gfns is None
                          else cause == _FAULT)  # fmt: skip
        over = self._waiting.step(sptes, installs[named], join)
        rows: Any = over
        self._found["no record"].add(rows, np.arange(len(over)))
        self._compare(join)

    def _compare(self, join: FaultJoin) -> None:
        sptes, faults = join.sptes, join.records
        install = sptes["op"] == _INSTALL
        own = np.flatnonzero(install & (sptes["cause"] == _FAULT))
        fault = sptes.fault[own]
        entered, left = faults["t_faultin"][fault], faults["t_faultin_end"][fault]
        given = left != NEVER
        pfn = faults["pfn"][fault]
        refused = given & ((faults["faultin_ret"][fault] != 0) | (pfn >= FRAMES))
        apart = pfn - faults["gfn"][fault] != sptes["pfn"][own] - sptes["gfn"][own]
        self._add("not entered", join, own[(entered == NEVER) & ~given])
        self._add("refused", join, own[refused])
        # Both numbers wrap around alike; a fault in another place is `gfn-outside`'s.
        inside = _holds(sptes, own, faults["gfn"][fault])
        self._add("other page", join, own[given & ~refused & apart & inside])
        elsewhere = install & (sptes["vm"] != faults["vm"][sptes.fault])
        self._add("other VM", join, np.flatnonzero(elsewhere))

    def _add(self, what: str, join: FaultJoin, at: npt.NDArray[np.int64]) -> None:
        if len(at):
            fault = join.sptes.fault[at]
            self._found[what].add(
                join.records, fault, pfns=join.sptes["pfn"][at], faults=True,
                more=(join.sptes.key(int(at[0])),),
            )  # fmt: skip

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found."""
        return [self._finding(what, found) for what, found in self._found.items() if found]

    def _finding(self, what: str, found: Occurrences) -> Finding:
        lost = self._recording.lost("FAULT", "SPTE")
        verdict = "probable" if what in ("nobody", "no record") else "definite"
        verdict, innocent = "inconclusive" if lost else verdict, [_loss(lost)]
        if what == "nobody":
            many = found.count > self._installs * _NOBODY_MAX
            verdict = "inconclusive" if many else verdict
            innocent += [
                Innocent(
                    "the fault handler was inlined where it was called, so that its hook did not "
                    "fire",
                    f"not ruled out: {found.count:,} of {self._installs:,} installs are like that"
                    if many
                    else f"unlikely: {self._installs - found.count:,} other installs have faults",
                ),
                Innocent(
                    "a leaf took the place of a page table (huge page recovery)",
                    "no: the SPTE was not present before",
                ),
                Innocent(
                    "KSM's change_pte notifier set it",
                    "no: it never gets that far, every call is inside an invalidation (removed in "
                    "6.10)",
                ),
            ]
        if what == "no record":
            innocent.append(
                Innocent(
                    "the fault had not ended when the recording did",
                    "no: the same thread has ended a later fault",
                )
            )
        return found.finding(
            self,
            self._recording,
            verdict,
            _WRONG[what],
            functions=("kvm_tdp_mmu_map", "mmu_set_spte"),
            innocent=innocent,
        )


def _loss(lost: int) -> Innocent:
    """Say whether loss explains an install whose fault looks wrong."""
    explanation = "the record of the fault was lost, or torn and mixed up with another's"
    if lost:
        return Innocent(explanation, f"not ruled out: {lost:,} FAULT and SPTE records were lost")
    return Innocent(explanation, "no: no FAULT or SPTE record was lost")


def _holds(
    sptes: Any, at: npt.NDArray[np.int64], gfn: npt.NDArray[np.uint64]
) -> npt.NDArray[np.bool_]:
    """Tell which leaves hold a guest frame."""
    # Below the first frame the difference wraps around and is large.
    return np.asarray(gfn - sptes["gfn"][at] < _pages(sptes["level"][at]), np.bool_)


def _no_faults(recording: Recording) -> str:
    """Return a sentence if there is nothing to compare installs with, else ""."""
    kinds = recording.info["kinds"]
    if kinds.get("FAULT") or not kinds.get("SPTE"):
        return ""
    return NO_FAULTS


def misplaced(join: FaultJoin) -> npt.NDArray[np.int64]:
    """Return which SPTE rows of faults are leaves that do not hold their fault's guest frame."""
    sptes, faults = join.sptes, join.records
    own = (sptes["cause"] == _FAULT) & np.isin(sptes["op"], (_INSTALL, _CHANGE))
    at = np.flatnonzero(own)
    return at[~_holds(sptes, at, faults["gfn"][sptes.fault[at]])]


class GfnOutside:
    """Row 16 of the known bugs: a leaf set in a page table that stands for other guest frames."""

    name = "gfn-outside"
    title = "leaves in a page table that stands for other guest frames than the fault's"
    rule = (
        "The guest frame of a fault lies in the leaf that it sets: the shadow page that holds the "
        "entry was looked up by gfn and role (kvm_mmu_get_child_sp(), arch/x86/kvm/mmu/mmu.c). "
        "Else rmap keeps the leaf under another frame, and a memslot's end does not find it: Linux "
        "0cb2af2ea66a, CVE-2026-46113."
    )
    columns: Mapping[str, Sequence[str]] = {"FAULT": ("gfn",)}
    wants_lives = False
    joins_faults = True

    def __init__(self) -> None:
        self._found = Occurrences()

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; return "" or why no answer is possible."""
        self._recording = recording
        return _no_faults(recording)

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        join = chunk.faults
        sptes, faults = join.sptes, join.records
        at = misplaced(join)
        if len(at):
            self._found.add(
                faults, sptes.fault[at], pfns=sptes["pfn"][at], faults=True,
                more=(sptes.key(int(at[0])),),
            )  # fmt: skip

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found."""
        if not self._found:
            return []
        lost = self._recording.lost("FAULT", "SPTE")
        return [
            self._found.finding(
                self,
                self._recording,
                "inconclusive" if lost else "definite",
                "faults set leaves whose page table stands for other guest frames",
                functions=("mmu_set_spte", "kvm_mmu_get_child_sp"),
                innocent=(_loss(lost),),
            )
        ]
