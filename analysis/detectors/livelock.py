"""A vCPU that faults at one address again and again and gets nowhere, and whose fault that is.

A round is a fault that installed nothing and is to be retried. Rounds of one vCPU at one address,
one after the other, are a run. What the rounds say tells five stories apart:

    comparison   the sequence stands still and no invalidation is in progress, yet every round is
                 thrown away before it maps: is_page_fault_stale() is wrong, or the root is
                 obsolete for good
    unpaired     an invalidation is in progress all the time, and none ends
    storm        the sequence changes in every round: somebody invalidates as fast as KVM faults
    slot         fault-in gives up before it asks the host: the memslot is being deleted
    contended    the page is there and KVM begins to map it, but another CPU is changing the same
                 entries of the page table
    no page      fault-in asks the host and gets nothing, as with an asynchronous page fault

Only the first is KVM's. The second is somebody's invalidate_range_start() without its end; the
others are hosts at work, and told without blame. May import: `analysis`, numpy.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from analysis.columns import Records, code
from analysis.detector import Chunk
from analysis.detectors.common import FRAMES, NEVER, vcpu_keys, where_of
from analysis.detectors.unended import INVALIDATE_COLUMNS, Miscounted
from analysis.findings import VERDICTS, Chain, Finding, Innocent, ranges_of
from analysis.lifearrays import LifeArrays
from analysis.recording import Recording

__all__ = ("Livelock",)

#: Rounds from which on a run is worth telling; KVM itself never needs more than a few.
ROUNDS = 64
#: Time from which on a run of which KVM is not accused is worth telling. ns
LONG_NS = 10**8
#: Time from which on an invalidation that is still in progress is no longer at work. ns
STUCK_NS = 10**9
#: Invalidations in a row that must end and leave a count that is too high.
ENDS = 8
_SIGN = 1 << 31
_RUNS_MAX = 1 << 12
_KINDS = ("comparison", "unpaired", "slot", "no page", "contended", "storm")


@dataclasses.dataclass(slots=True)
class _Run:
    """Rounds of one vCPU at one address, so far."""

    vm: int
    vcpu: int
    page: int
    #: of the first fault; None where its record has none.
    gfn: int
    hva: int
    slot: int | None
    fault: tuple[int, int] | None
    key: tuple[str, int, int, int]
    last_key: tuple[str, int, int, int]
    first_ts: int
    last_ts: int
    seq: int
    rounds: int = 0
    kinds: dict[str, int] = dataclasses.field(default_factory=lambda: dict.fromkeys(_KINDS, 0))
    same_seq: bool = True
    #: rounds thrown away with bit 31 of the sequence set, though it stood still
    signed: int = 0
    ended: bool = False
    #: rounds since the VM's newest INVALIDATE record, if that is an end that left a count too high,
    #: and that record
    after: int = 0
    since: tuple[str, int, int, int] | None = None
    #: of a run that did not end: how many invalidations ended last and left a count too high
    miscounted: int = 0

    @property
    def kind(self) -> str:
        """The story that most rounds tell."""
        return max(_KINDS, key=lambda name: self.kinds[name])

    def weigh(self, idle_ts: int, *, maps_signed: bool) -> None:
        """Take back what other records of the VM disprove.

        `idle_ts` is when nothing was in progress last (ns, 0 if never): invalidations that do end
        are a storm. A fault that was mapped with bit 31 set (`maps_signed`) was compared rightly.
        """
        stuck = self.last_ts - STUCK_NS
        if self.first_ts <= stuck < idle_ts and not self.ended and not self.miscounted:
            self.kinds["storm"] += self.kinds["unpaired"]
            self.kinds["unpaired"] = 0
        if maps_signed:
            self.signed = 0


class Livelock:
    """Detector 11: a fault that is retried for ever, and its look-alikes."""

    name = "livelock"
    title = "a vCPU that faults at one address for ever"
    rule = (
        "A fault is retried only if mmu_invalidate_seq has changed since it was taken, an "
        "invalidation of its range is in progress, or its root is obsolete: is_page_fault_stale() "
        "(arch/x86/kvm/mmu/mmu.c)."
    )
    columns: Mapping[str, Sequence[str]] = {
        "FAULT": (
            *("fault_ts", "tid", "vm", "vcpu", "addr", "gfn", "hva", "slot", "pfn", "ret"),
            *("faultin_ret", "t_faultin", "t_gup", "t_faultin_end", "t_map", "sptes", "mmu_seq"),
            *("invalidate_seq", "in_progress", "prefetch"),
        ),
        "INVALIDATE": INVALIDATE_COLUMNS,
        "VM": ("vm", "op"),
    }
    wants_lives = False
    joins_faults = False

    def __init__(self) -> None:
        self._running: dict[tuple[int, int], _Run] = {}
        self._done: list[_Run] = []
        self._end = 0
        self._counts = Miscounted()
        self._gone: set[int] = set()
        #: VM -> when nothing was in progress last; VMs with a mapped fault of which bit 31 was set
        self._idle: dict[int, int] = {}
        self._maps_signed: set[int] = set()

    def start(self, recording: Recording) -> str:
        """Take what is known before the records; return "" or why no answer is possible."""
        self._recording = recording
        self._retry = recording.ret("retry")
        self._asks = "gup" in recording.hooks
        # Without that hook faults of the TDP MMU never say that they got as far as mapping.
        self._maps = "map" in recording.hooks
        if self._retry < 0:
            return "the names of KVM's results (RET_PF_RETRY) are not in this trace"
        return ""

    def feed(self, chunk: Chunk) -> None:
        """Take the next span of time."""
        faults = chunk["FAULT"]
        vms = chunk["VM"]
        self._counts.created(vms["vm"][vms["op"] == code("op", "create")].tolist())
        self._counts.feed(chunk["INVALIDATE"])
        self._gone |= set(vms["vm"][vms["op"] == code("op", "delete")].tolist())
        self._end = max(self._end, chunk.ts_to)
        for records in (faults, chunk["INVALIDATE"]):
            self._rests(records)
        good = (faults["mmu_seq"] >= _SIGN) & (faults["sptes"] > 0)
        self._maps_signed |= set(faults["vm"][good].tolist())
        again = (faults["ret"] == self._retry) & (faults["sptes"] == 0) & ~faults["prefetch"]
        if not again.any() and not self._running:
            return
        vcpus = vcpu_keys(faults, slice(None))
        order = np.argsort(vcpus, kind="stable")
        page = faults["addr"] >> np.uint64(12)
        # A run ends where the vCPU, the address or the kind of outcome changes.
        edge = np.ones(len(order), np.bool_)
        edge[1:] = (
            (vcpus[order][1:] != vcpus[order][:-1])
            | (page[order][1:] != page[order][:-1])
            | (again[order][1:] != again[order][:-1])
        )
        begins = np.flatnonzero(edge)
        ends = np.append(begins[1:], len(order))
        stories = self._stories(faults)
        worth = again[order[begins]] | self._of_running(faults, order[begins])
        for begin, end in zip(begins[worth], ends[worth], strict=True):
            self._take(faults, order[begin:end], bool(again[order[begin]]), stories)

    def _rests(self, records: Records) -> None:
        """See when nothing was in progress in a VM."""
        idle = records["in_progress"] == 0
        vms, times = records["vm"][idle], records["ts"][idle]
        for vm in np.unique(vms).tolist():
            self._idle[vm] = max(self._idle.get(vm, 0), int(times[vms == vm].max()))

    def _of_running(self, faults: Records, at: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Tell which faults are of a vCPU that was in a run, and may end it."""
        if not self._running:
            return np.zeros(len(at), np.bool_)
        running = np.array([vm << 32 | vcpu & 0xFFFFFFFF for vm, vcpu in self._running], np.int64)
        return np.isin(vcpu_keys(faults, at), running)

    def _stories(self, faults: Records) -> dict[str, npt.NDArray[np.bool_]]:
        """Tell for each fault which story it would tell as a round."""
        frame = faults["pfn"] < FRAMES
        asked = (faults["t_gup"] != NEVER) | (frame if not self._asks else False)
        changed = faults["mmu_seq"] != faults["invalidate_seq"]
        working = faults["in_progress"] > 0
        maps = faults["t_map"] != NEVER
        return {
            "comparison": frame & ~changed & ~working & ~maps,
            "contended": frame & ~changed & ~working & maps,
            "unpaired": working,
            "storm": changed & ~working,
            "slot": ~asked & ~changed & ~working,
            "no page": asked & ~frame & ~changed & ~working,
        }

    def _take(
        self,
        faults: Records,
        rows: npt.NDArray[np.int64],
        again: bool,
        stories: Mapping[str, npt.NDArray[np.bool_]],
    ) -> None:
        first, last = int(rows[0]), int(rows[-1])
        vm, vcpu = int(faults["vm"][first]), int(faults["vcpu"][first])
        page = int(faults["addr"][first]) >> 12
        run = self._running.get((vm, vcpu))
        if run is not None and (not again or run.page != page):
            del self._running[vm, vcpu]
            self._close(run)
            run = None
        if not again:
            return
        if run is None:
            run = self._running[vm, vcpu] = _Run(
                vm, vcpu, page, *_place(faults, first), faults.key(first), faults.key(first),
                int(faults["ts"][first]), 0, int(faults["mmu_seq"][first]),
            )  # fmt: skip
        run.rounds += len(rows)
        run.last_ts, run.last_key = int(faults["ts"][last]), faults.key(last)
        run.same_seq &= bool((faults["mmu_seq"][rows] == run.seq).all())
        signed = rows[stories["comparison"][rows] & (faults["mmu_seq"][rows] >= _SIGN)]
        if len(signed):
            # A run can begin before the bit was set.
            run.signed, run.seq = run.signed + len(signed), int(faults["mmu_seq"][signed[-1]])
        for name, told in stories.items():
            run.kinds[name] += int(told[rows].sum())
        newest = self._counts.newest.get(vm)
        if newest != run.since:
            run.since, run.after = newest, 0
        if newest is not None:
            run.after += int((stories["unpaired"][rows] & (faults["ts"][rows] > newest[1])).sum())

    def _close(self, run: _Run) -> None:
        run.ended = True
        if run.rounds >= ROUNDS and len(self._done) < _RUNS_MAX:
            self._done.append(run)

    def finish(self, open_lives: LifeArrays) -> list[Finding]:
        """Return what was found: one finding for each story and VM."""
        runs = [*self._done, *(run for run in self._running.values() if run.rounds >= ROUNDS)]
        groups: dict[tuple[int, str, str], list[_Run]] = {}
        for run in runs:
            run.miscounted = self._miscounted(run)
            run.weigh(self._idle.get(run.vm, 0), maps_signed=run.vm in self._maps_signed)
            if self._verdict(run) in VERDICTS[2:] and run.last_ts - run.first_ts < LONG_NS:
                continue
            groups.setdefault((run.vm, run.kind, self._verdict(run)), []).append(run)
        return [self._finding(verdict, kind, group) for (_, kind, verdict), group in groups.items()]

    def _miscounted(self, run: _Run) -> int:
        """Return how many ends left a count that is wrong, 0 if it may be right."""
        if run.ended or run.kinds["unpaired"] < ROUNDS or self._recording.lost("INVALIDATE"):
            return 0
        ends = self._counts.ends.get(run.vm, 0)
        newest = self._counts.newest.get(run.vm)
        # What waits for mmu_lock in its start is counted already, and has no record: only when the
        # VM is gone nothing waits any more.
        if newest is None or run.vm not in self._gone:
            return 0
        # Nothing was begun any more until then, so that the ends cross no start.
        final = run.after >= ROUNDS and newest == run.since
        return ends if final or ends >= ENDS else 0

    def _records(self, run: _Run) -> tuple[tuple[str, int, int, int], ...]:
        """Return the records that tell a run's story: both ends, and what was never counted off."""
        begun = self._counts.begun.get(run.vm)
        if not run.miscounted or run.since is None or begun is None:
            return run.key, run.last_key
        return begun, run.since, run.key, run.last_key

    def _verdict(self, run: _Run) -> str:
        long = run.last_ts - run.first_ts >= STUCK_NS
        if run.kind == "comparison":
            # The root can be obsolete for a moment; then the vCPU gets a new one and goes on.
            if run.signed >= ROUNDS and self._maps:
                return "definite"
            if run.kinds["comparison"] < run.rounds or not run.same_seq or not self._maps:
                return "inconclusive"
            return "probable" if long else "inconclusive"
        if run.kind == "unpaired" and not run.ended and (long or run.miscounted):
            return "probable"
        return "inconclusive" if run.kind == "contended" and long else "explained"

    def _finding(self, verdict: str, kind: str, runs: list[_Run]) -> Finding:
        worst = max(runs, key=lambda run: run.rounds)
        rounds = sum(run.rounds for run in runs)
        seconds = (worst.last_ts - worst.first_ts) / 1e9
        return Finding(
            detector=self.name,
            verdict=verdict,
            title=f"vCPU {worst.vcpu} faulted {worst.rounds:,} times in {seconds:.3f} s at one "
            f"address: {_title(kind, worst)}",
            rule=self.rule,
            count=rounds,
            vms=(worst.vm,),
            slots=(worst.slot,) if worst.slot is not None else (),
            # A wrong count is the VM's: where its vCPUs got stuck is only in the evidence.
            gfns=() if worst.miscounted else ranges_of(run.gfn for run in runs)[0],
            first_ts=min(run.first_ts for run in runs),
            last_ts=max(run.last_ts for run in runs),
            where=where_of(self._recording, worst.vm, worst.hva),
            functions=("kvm_mmu_invalidate_end",) if worst.miscounted else _FUNCTIONS[kind],
            innocent=tuple(_innocent(kind, worst)),
            chain=Chain(records=self._records(worst), faults=(worst.fault,) if worst.fault else ()),
            detail={
                "story": kind,
                "rounds": {name: count for name, count in worst.kinds.items() if count},
                "mmu_seq": worst.seq,
                "signed": worst.signed >= ROUNDS,
                "runs": len(runs),
                "ended": worst.ended,
            },
        )


_FUNCTIONS = {
    "comparison": ("is_page_fault_stale", "mmu_invalidate_retry_hva"),
    "unpaired": ("kvm_mmu_notifier_invalidate_range_start",),
    "storm": ("kvm_mmu_notifier_invalidate_range_end",),
    "slot": ("kvm_faultin_pfn",),
    "no page": ("kvm_setup_async_pf",),
    "contended": ("tdp_mmu_set_spte_atomic",),
}


def _place(faults: Records, at: int) -> tuple[int, int, int | None, tuple[int, int] | None]:
    """Return gfn, hva, slot and (fault_ts, tid) of a fault."""
    gfn, hva, fault_ts, tid = (int(faults[n][at]) for n in ("gfn", "hva", "fault_ts", "tid"))
    slot = int(faults["slot"][at]) if faults.known("slot")[at] else None
    return gfn, hva, slot, (fault_ts, tid) if faults.known("fault_ts")[at] else None


def _title(kind: str, run: _Run) -> str:
    if kind == "comparison" and run.signed >= ROUNDS:
        return (
            f"mmu_invalidate_seq {run.seq:#x} has bit 31 set and is compared as a negative int "
            '(mended by Linux ba6e3fe25543 ("KVM: x86/mmu: Grab mmu_invalidate_seq in '
            'kvm_faultin_pfn()") (v6.3))'
        )
    return {
        "comparison": "KVM throws its page away although nothing was invalidated",
        "unpaired": "KVM counts an invalidation as in progress though each has ended"
        if run.miscounted
        else "an invalidation is in progress "
        + ("for as long as that" if run.ended else "and does not end"),
        "storm": "every fault is overtaken by an invalidation (NUMA balancing, KSM, migration)",
        "slot": "its memslot is being changed",
        "no page": "the host has no page for it yet",
        "contended": "another CPU is changing the same entries of the page table",
    }[kind]


def _innocent(kind: str, run: _Run) -> list[Innocent]:
    if kind == "comparison":
        told = f"no: the sequence was {run.seq:#x} in all of {run.rounds:,} rounds"
        if not run.same_seq:
            told = f"no: it stood still in {run.kinds['comparison']:,} of {run.rounds:,} rounds"
        progress = run.kinds["unpaired"]
        return [
            Innocent("invalidations storm the range", told),
            Innocent(
                "an invalidation never ended",
                f"not in {progress:,} rounds" if progress else "no: none was in progress",
            ),
            Innocent(
                "another CPU was changing the same entries of the page table",
                "no: no round got as far as mapping",
            ),
            Innocent(
                "the memslot was being changed",
                "no: fault-in returned a page in every round"
                if run.kinds["comparison"] == run.rounds
                else "not ruled out in all rounds",
            ),
            Innocent(
                "the root is obsolete",
                "unlikely: a vCPU gets a new root before it enters the guest again",
            ),
        ]
    if kind == "unpaired":
        seconds = (run.last_ts - run.first_ts) / 1e9
        if run.miscounted:
            return [
                Innocent(
                    "a long invalidation is still at work",
                    "no: by the records each has ended, but the last "
                    + (
                        f"{run.miscounted:,} ends left a higher count"
                        if run.miscounted > 1
                        else "end left a higher count"
                    ),
                ),
                Innocent("the record of a start was lost", "no: none of that kind was"),
                Innocent(
                    "KVM itself zaps a range, which has no record (kvm_zap_gfn_range())",
                    f"unlikely for {seconds:.3f} s and {run.kinds['unpaired']:,} rounds",
                ),
            ]
        return [
            Innocent(
                "a long invalidation is still at work",
                f"unlikely after {seconds:.1f} s, and it never ended in this trace"
                if not run.ended
                else "yes: the faults went on when it had ended",
            )
        ]
    return [Innocent("the host is at work on this memory", "yes: that is what the rounds say")]
