"""A large trace of a sound kernel, made by the recorder's own writer: input of benchmarks.

    python tests/bench/bigtrace.py 100000000 big.pfnt [--pages N] [--seed N] [--force]

Three VMs as Linux 6.12 runs them touch memory at random; the host ages it, logs what gets dirty,
reclaims ranges through the MMU notifier and hands freed pages out again; a fourth VM has 2M pages.
At the end all VMs are destroyed. The records of each action are those of a real trace, in their
order; nothing is wrong in it. Memory is bounded: one group of records, and a word for each page.
"""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from probes import wire  # noqa: E402
from tracer.tracefile import TraceMeta, TraceReader, TraceWriter  # noqa: E402

__all__ = ("BigTrace", "write_big_trace")

Array = npt.NDArray[Any]

#: A trace of Linux 6.12 whose description (facts, profile) the large one takes.
MODEL = ROOT / "tests/unit/traces/ttm-6.12.pfnt"
CPUS = 4
#: Faults, aged and reclaimed pages of one round.
FAULTS, AGED, RECLAIMED, HUGE_FAULTS = 20_000, 8_000, 20_000, 64
RANGE = 16  # pages of one invalidation, on average
BASE_GFN = 0x100
_HVA = 0x7F00_0000_0000
_SPTE, _HUGE_SPTE = 0xE67, 0xEE7  # present, writable, accessed, dirty; large
_NOT_PRESENT = 1 << 63
_FLAGS = 0x10000020000000
_NONE = (1 << 64) - 1


def _code(names: tuple[str, ...], name: str) -> int:
    return names.index(name)


class _Round:
    """Records of one span of time, by kind, in any order."""

    def __init__(self) -> None:
        self.parts: dict[str, list[Array]] = {}

    def add(self, kind: str, count: int, op: str, **fields: Any) -> Array:
        """Add records; `fields` are those of the wire, `h_` before those of the header."""
        out = np.zeros(count, wire.FAULT if kind == "FAULT" else wire.EVENT)
        h = out["h"]
        h["kind"], h["stack"], h["vcpu"] = wire.KINDS.index(kind), -1, -1
        h["op"] = _code(wire.OPS, op)
        for name, value in fields.items():
            if name.startswith("h_"):
                h[name[2:]] = value
            elif name in ("refcount", "mapcount", "bits", "order"):
                out["page"][name] = value
            else:
                out[name] = value
        if kind in ("FAULT", "SPTE", "RELEASE", "PAGE_FREE", "PAGE_ALLOC"):
            out["page"]["flags"] = _FLAGS
            if "bits" not in fields:
                out["page"]["bits"] = 1
        self.parts.setdefault(kind, []).append(out)
        return out

    def groups(self, seq: Array) -> list[tuple[str, Array]]:
        """Return the records by kind in order of time, numbered on from `seq` per cpu."""
        kinds = list(self.parts)
        arrays = [np.concatenate(self.parts[kind]) for kind in kinds]
        ts = np.concatenate([a["h"]["ts"] for a in arrays])
        cpu = np.concatenate([a["h"]["cpu"] for a in arrays])
        number = np.empty(len(ts), np.uint32)
        for one in range(CPUS):
            mine = np.flatnonzero(cpu == one)
            mine = mine[np.argsort(ts[mine], kind="stable")]
            number[mine] = seq[one] + np.arange(len(mine))
            seq[one] += len(mine)
        out, at = [], 0
        for kind, array in zip(kinds, arrays, strict=True):
            array["h"]["seq"] = number[at : at + len(array)]
            at += len(array)
            order = np.lexsort([array["h"]["seq"], array["h"]["cpu"], array["h"]["ts"]])
            out.append((kind, array[order]))
        return out


@dataclasses.dataclass
class _Vm:
    number: int
    pages: int
    #: guest frame (from BASE_GFN) -> host frame, 0 if not mapped; in units of `level`.
    mapped: Array
    level: int = 1
    seq: int = 0  # mmu_invalidate_seq

    @property
    def tgid(self) -> int:
        return 1000 * self.number


class BigTrace:
    """The world: what is mapped where, which frames are free, what time it is."""

    def __init__(self, pages: int, seed: int = 1) -> None:
        self._draw = np.random.default_rng(seed)
        self._vms = [_Vm(n, pages, np.zeros(pages, np.uint64)) for n in (1, 2, 3)]
        self._vms.append(_Vm(4, pages, np.zeros(pages // 512 - 1, np.uint64), 2))
        self._fresh = 0x100000  # frames that no VM had yet
        self._huge_fresh = 0x40000000 // 512
        self._free: list[Array] = []
        self._now = 0
        self.seq = np.zeros(CPUS, np.int64)

    def mapped(self) -> int:
        """Return how many leaves are mapped."""
        return sum(int(np.count_nonzero(vm.mapped)) for vm in self._vms)

    def begin(self, now: int) -> list[tuple[str, Array]]:
        """Create the VMs and their slots."""
        self._now, made = now, _Round()
        for vm in self._vms:
            who = {"h_tid": vm.tgid, "h_tgid": vm.tgid, "h_vm": vm.number}
            made.add("VM", 1, "create", h_ts=self._tick(), d=vm.tgid, a=vm.number << 20, **who)
            made.add(
                "SLOT", 1, "create", h_ts=self._tick(), gfn=BASE_GFN, a=vm.pages, b=_HVA, **who
            )
        return made.groups(self.seq)

    def step(self) -> list[tuple[str, Array]]:
        """Return the records of the next round."""
        made = _Round()
        for vm in self._vms[:3]:
            self._fault(made, vm, FAULTS // 3)
        self._fault(made, self._vms[3], HUGE_FAULTS)
        for vm in self._vms[:3]:
            self._age(made, vm, AGED // 3)
        full = self.mapped() > sum(vm.pages for vm in self._vms[:3]) // 2
        for vm in self._vms[:3] if full else ():
            self._reclaim(made, vm, self._ranges(vm, RECLAIMED // 3 // RANGE))
        if full:
            self._reclaim(made, self._vms[3], self._ranges(self._vms[3], HUGE_FAULTS // 4))
        return made.groups(self.seq)

    def end(self) -> list[list[tuple[str, Array]]]:
        """Destroy the VMs; return groups of records."""
        groups = []
        for vm in self._vms:
            at = np.flatnonzero(vm.mapped)
            for first in range(0, len(at), 1 << 16):
                made = _Round()
                self._teardown(made, vm, at[first : first + (1 << 16)])
                groups.append(made.groups(self.seq))
            made = _Round()
            made.add(
                "VM", 1, "delete", h_ts=self._tick(), h_vm=vm.number, h_tid=vm.tgid,
                h_tgid=vm.tgid, d=vm.tgid, a=vm.number << 20,
            )  # fmt: skip
            groups.append(made.groups(self.seq))
        return groups

    def _tick(self, ns: int = 100_000) -> int:
        self._now += ns
        return self._now

    def _times(self, count: int, step: int) -> Array:
        """Return so many moments and let that time pass."""
        times = self._now + np.arange(count, dtype=np.uint64) * np.uint64(step)
        self._now += count * step + 1_000_000
        return times

    def _frames(self, vm: _Vm, count: int) -> tuple[Array, int]:
        """Return host frames, those that were freed first, and how many of them were freed."""
        if vm.level == 2:
            self._huge_fresh += count
            first = self._huge_fresh - count
            return np.arange(first, first + count, dtype=np.uint64) * np.uint64(512), 0
        old: list[Array] = []
        need = count
        # Not what was freed just now: it goes through other hands first.
        while need and len(self._free) > 8:
            piece = self._free.pop(0)
            old.append(piece[:need])
            if len(piece) > need:
                self._free.insert(0, piece[need:])
            need -= len(old[-1])
        fresh = np.arange(self._fresh, self._fresh + need, dtype=np.uint64)
        self._fresh += need
        return np.concatenate([*old, fresh]), count - need

    def _fault(self, made: _Round, vm: _Vm, count: int) -> None:
        at = np.unique(self._draw.integers(0, len(vm.mapped), 2 * count))
        at = self._draw.permutation(at[vm.mapped[at] == 0])[:count]
        count = len(at)
        pfn, reused = self._frames(vm, count)
        vm.mapped[at] = pfn
        begin = self._times(count, 11_000)
        vcpu = np.arange(count) % CPUS
        gfn = (at * (512 if vm.level == 2 else 1) + self._base(vm)).astype(np.uint64)
        who = {
            "h_tid": vm.tgid + 1 + vcpu, "h_tgid": vm.tgid, "h_vm": vm.number, "h_cpu": vcpu,
            "h_vcpu": vcpu, "h_fault_ts": begin,
        }  # fmt: skip
        page: dict[str, Any] = {"mapcount": 0}
        if vm.level == 2:
            page |= {"bits": 5, "order": 9}
        if reused:
            alloc = {
                key: value[:reused] if isinstance(value, np.ndarray) else value
                for key, value in who.items()
            }
            made.add(
                "PAGE_ALLOC", reused, "none", h_ts=begin[:reused] + np.uint64(9_000),
                pfn=pfn[:reused], refcount=0, mapcount=-1, **alloc,
            )  # fmt: skip
        spte = pfn << np.uint64(12) | np.uint64(_HUGE_SPTE if vm.level == 2 else _SPTE)
        made.add(
            "SPTE", count, "install", h_ts=begin + np.uint64(32_000), gfn=gfn, pfn=pfn,
            a=_NOT_PRESENT, b=spte, level=vm.level, mmu=1, cause=_code(wire.CAUSES, "fault"),
            refcount=3, **page, **who,
        )  # fmt: skip
        made.add(
            "RELEASE", count, "none", h_ts=begin + np.uint64(36_000), gfn=gfn, pfn=pfn,
            cause=_code(wire.CALLS, "pfn_clean"), refcount=3, **page, **who,
        )  # fmt: skip
        faults = made.add(
            "FAULT", count, "none", h_ts=begin + np.uint64(40_000), addr=gfn << np.uint64(12),
            error_code=0x100000006, gfn=gfn, pfn=pfn, hva=self._hva(gfn), walk_pfn=_NONE,
            mmu_seq=vm.seq, invalidate_seq=vm.seq, t_faultin=3_000, t_gup=4_600, t_gup_end=28_000,
            t_faultin_end=29_000, t_map=31_000, ret=5, level=vm.level, refcounted=2, writable=1,
            mmu=1, sptes=1, refcount=3, **page, **who,
        )  # fmt: skip
        faults["page_end"] = faults["page"]
        faults["page_end"]["refcount"] = 2

    def _base(self, vm: _Vm) -> int:
        return 512 if vm.level == 2 else BASE_GFN

    def _hva(self, gfn: Array) -> Array:
        return np.uint64(_HVA) + ((gfn - np.uint64(BASE_GFN)) << np.uint64(12))

    def _age(self, made: _Round, vm: _Vm, count: int) -> None:
        """Clear the accessed bit of some leaves, the dirty bit of others."""
        at = np.unique(self._draw.integers(0, len(vm.mapped), count))
        at = at[vm.mapped[at] != 0]
        pfn = vm.mapped[at]
        dirty = at % 4 == 0
        spte = pfn << np.uint64(12) | np.uint64(_SPTE)
        cause = np.where(dirty, _code(wire.CAUSES, "dirty_log"), _code(wire.CAUSES, "aging"))
        made.add(
            "SPTE", len(at), "change", h_ts=self._times(len(at), 800), h_tid=vm.tgid,
            h_tgid=vm.tgid, h_vm=vm.number, gfn=at + self._base(vm), pfn=pfn, a=spte,
            b=spte & ~np.where(dirty, np.uint64(0x40), np.uint64(0x20)), level=1, mmu=1,
            cause=cause, refcount=1, mapcount=0,
        )  # fmt: skip

    def _ranges(self, vm: _Vm, count: int) -> Array:
        """Return the mapped leaves of some ranges, the number of its range beside each."""
        length = 1 if vm.level == 2 else RANGE
        first = np.unique(self._draw.integers(0, len(vm.mapped) // length, 2 * count)) * length
        first = self._draw.permutation(first)[:count]
        at = (first[:, np.newaxis] + np.arange(length)).ravel()
        of = np.repeat(np.arange(len(first)), length)
        mapped = vm.mapped[at] != 0
        return np.stack([at[mapped], of[mapped]])

    def _reclaim(self, made: _Round, vm: _Vm, ranges: Array) -> None:
        """Zap ranges through the notifier; their pages are freed before it ends."""
        at, of = ranges
        if not len(at):
            return
        names, of, counts = np.unique(of, return_inverse=True, return_counts=True)
        nth = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)
        begin = self._times(len(names), 100_000)
        cpu = np.arange(len(names)) % CPUS
        who = {"h_tid": vm.tgid, "h_tgid": vm.tgid, "h_vm": vm.number}
        self._zap(made, vm, at, begin[of] + nth.astype(np.uint64) * np.uint64(2_500), cpu[of],
                  "notifier", who)  # fmt: skip
        first = at[np.cumsum(counts) - counts]
        size = np.uint64(512 if vm.level == 2 else RANGE)
        gfn = (first // (1 if vm.level == 2 else RANGE)).astype(np.uint64) * size
        hva = self._hva(gfn + np.uint64(self._base(vm)))
        seq = vm.seq + np.arange(len(names), dtype=np.uint64)
        vm.seq += len(names)
        for op, offset, more, busy in (("start", 45_000, 0, 1), ("end", 98_000, 1, 0)):
            made.add(
                "INVALIDATE", len(names), op, h_ts=begin + np.uint64(offset), h_cpu=cpu, a=hva,
                b=hva + (size << np.uint64(12)), c=seq + np.uint64(more), d=busy,
                cause=_code(wire.INVALIDATE_EVENTS, "clear"), **who,
            )  # fmt: skip
        freed = begin[of] + np.uint64(50_000) + nth.astype(np.uint64) * np.uint64(1_000)
        self._free_pages(made, vm, at, freed, cpu[of], who)

    def _teardown(self, made: _Round, vm: _Vm, at: Array) -> None:
        who = {"h_tid": vm.tgid, "h_tgid": vm.tgid, "h_vm": vm.number}
        cpu = np.zeros(len(at), np.int64)
        self._zap(made, vm, at, self._times(len(at), 2_000), cpu, "teardown", who)
        self._free_pages(made, vm, at, self._times(len(at), 700), cpu, who)

    def _zap(
        self, made: _Round, vm: _Vm, at: Array, ts: Array, cpu: Array, cause: str,
        who: dict[str, Any],
    ) -> None:  # fmt: skip
        pfn = vm.mapped[at]
        huge = vm.level == 2
        page: dict[str, Any] = {"bits": 5, "order": 9} if huge else {}
        page |= {"refcount": 1, "mapcount": 0, "pfn": pfn, "h_cpu": cpu}
        made.add(
            "SPTE", len(at), "zap", h_ts=ts, gfn=at * (512 if huge else 1) + self._base(vm),
            a=pfn << np.uint64(12) | np.uint64(_HUGE_SPTE if huge else _SPTE), b=_NOT_PRESENT,
            level=vm.level, mmu=1, cause=_code(wire.CAUSES, cause), **page, **who,
        )  # fmt: skip
        for call, later in (("mark_dirty", 500), ("mark_accessed", 900)):
            made.add(
                "RELEASE", len(at), "none", h_ts=ts + np.uint64(later),
                cause=_code(wire.CALLS, call), **page, **who,
            )  # fmt: skip

    def _free_pages(
        self, made: _Round, vm: _Vm, at: Array, ts: Array, cpu: Array, who: dict[str, Any]
    ) -> None:
        pfn = vm.mapped[at]
        made.add(
            "PAGE_FREE", len(at), "none", h_ts=ts, h_cpu=cpu, pfn=pfn, refcount=0, mapcount=-1,
            d=9 if vm.level == 2 else 0, **who,
        )  # fmt: skip
        vm.mapped[at] = 0
        if vm.level == 1:
            self._free.append(pfn)


def write_big_trace(path: Path, records: int, *, pages: int, seed: int = 1, force: bool = False,
                    show: bool = False) -> int:  # fmt: skip
    """Write a trace of about `records` records, VMs having `pages` 4K pages; return how many."""
    with TraceReader(MODEL) as reader:
        meta: TraceMeta = dataclasses.replace(
            reader.meta, command=("bigtrace",), start_monotonic_ns=10**12, hostname="bench"
        )
    world = BigTrace(pages, seed)
    writer = TraceWriter(path, meta, overwrite=force)
    began = time.monotonic()
    try:
        writer.write_group(world.begin(meta.start_monotonic_ns))
        # The end takes four records for each leaf.
        while writer.records + 4 * world.mapped() < records:
            writer.write_group(world.step())
            if show and sys.stderr.isatty():
                done = writer.records / (time.monotonic() - began)
                sys.stderr.write(f"\r{writer.records:,} records, {done:,.0f}/s\x1b[K")
        for group in world.end():
            writer.write_group(group)
        counts = {k: {"produced": n, "lost": 0, "filtered": 0} for k, n in writer.written.items()}
        total = writer.records
        writer.close({
            "why": "command", "seconds": (world._now - meta.start_monotonic_ns) / 1e9, "lost": 0,
            "records": total, "produced": total, "filtered": 0, "counts": counts, "missed": {},
        }, ts=world._now)  # fmt: skip
    finally:
        writer.abandon()
    return writer.records


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("records", type=int, help="about so many")
    parser.add_argument("output", type=Path)
    parser.add_argument("--pages", type=int, default=0, help="4K pages of a VM [1/50 of records]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--force", action="store_true", help="overwrite OUTPUT")
    args = parser.parse_args()
    pages = args.pages or max(1 << 14, args.records // 50)
    made = write_big_trace(
        args.output, args.records, pages=pages, seed=args.seed, force=args.force, show=True
    )
    print(f"{args.output}: {made:,} records, {args.output.stat().st_size / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
