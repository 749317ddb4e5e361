"""A trace for Perfetto's UI: VMs and vCPUs as tracks, faults as slices, SPTEs and frees as marks.

    recording            what was lost, at the time when the recorder told it
    findings             what the detectors found, at its first time
    VM 1 (process 219)   created, destroyed, memslots, pins
      vCPU 0             faults, with fault-in, GUP and map as slices inside; SPTEs set in a fault
      SPTEs              those set and zapped outside of faults, with their cause
      page frees         of pages that the VM mapped
      MMU notifier       invalidations
      live 4K SPTEs …    counters: installed less zapped; and the memory that they map

Perfetto's own protobuf is written, not Chrome's JSON: that has microseconds and only processes and
threads for tracks, and two VMs may be of one process. Its schema is the package `perfetto`, an
extra, since nothing else needs it. Times are the trace's CLOCK_MONOTONIC. May import: `analysis`,
`probes.errors`, `tracer.describe`, `tracer.tracefile`, pyarrow, and perfetto where it is used.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import pyarrow as pa

from analysis.findings import Finding
from analysis.pages import page_class, pfn_error
from analysis.perfettofile import Packets, Track
from analysis.tables import DTYPES, parse_notes
from tracer.describe import verdict_line
from tracer.tracefile import TraceReader

__all__ = ("write_perfetto",)

_KINDS = ("FAULT", "SPTE", "PAGE_FREE", "PAGE_ALLOC", "INVALIDATE", "PIN", "SLOT", "VM", "LOSS")
_COLUMNS = (
    *("ts", "fault_ts", "cpu", "seq", "kind", "op", "tid", "vm", "vcpu", "error_code", "gfn"),
    *("hva", "hva_end", "pfn", "walk_pfn", "slot", "level", "mmu", "t_faultin", "t_gup"),
    *("t_gup_end", "t_faultin_end", "t_map", "ret", "result", "refcounted", "prefetch"),
    *("refcount", "refcount_end", "mapcount", "page_bits", "old", "new", "cause", "event"),
    *("order", "npages", "loss_kind", "lost", "in_progress"),
)
_CLASS_COLUMNS = ["pfn", "walk_pfn", "page_bits", "refcount", "mapcount"]
_LEVELS = {1: "4K", 2: "2M", 3: "1G"}
#: PFERR_WRITE_MASK and PFERR_FETCH_MASK, arch/x86/include/asm/kvm_host.h.
_WRITE, _FETCH = 1 << 1, 1 << 4
#: Order of the tracks of a VM: vCPUs come first, by number.
_AFTER_VCPUS = 1 << 20
_RANKS = {name: _AFTER_VCPUS + at for at, name in enumerate(("SPTEs", "frees", "notifier"))}
_LIVE_RANK = _AFTER_VCPUS + 100

Row = dict[str, Any]
Args = dict[str, Any]


def write_perfetto(
    reader: TraceReader,
    file: BinaryIO,
    progress: Callable[[int, int], None] | None = None,
    findings: Sequence[Finding] = (),
) -> tuple[int, int]:
    """Write a whole trace, piece by piece; return (records written, records left out).

    `findings` are what the detectors found in it.

    Left out is what has an impossible time. Where the trace is damaged it ends; `reader.reason`
    says so. Raises PerfettoMissing if the package perfetto is not installed, TooManyTracks for
    more VMs and vCPUs than a page can show.
    """
    info = reader.info()
    packets = Packets(file, info["start_unix_ns"], reader.meta.start_monotonic_ns)
    scene = _Scene(packets, _owners(reader, info))
    scene.begin(info, reader.meta.start_monotonic_ns)
    for finding in findings:
        scene.find(finding)
    done, total = 0, info["records"]
    for batch in reader.records(_KINDS, _COLUMNS):
        for row in _rows(batch):
            scene.show(row)
        done += len(batch)
        if progress is not None:
            progress(done, total)
    packets.close()
    return scene.shown, scene.left_out


def _owners(reader: TraceReader, info: dict[str, Any]) -> dict[int, int]:
    """Return VM -> process, from VM records and the recorder's notes."""
    owners = {vm["vm"]: vm["tgid"] for vm in info["vms"] if vm["tgid"]}
    for batch in reader.batches(["NOTE"], ["note"]):
        for note in parse_notes(batch.column("note").to_pylist()):
            vms = note.get("vms")
            for vm in vms if isinstance(vms, list) else ():
                if isinstance(vm, dict) and type(vm.get("tgid")) is int:
                    owners.setdefault(vm.get("vm", 0), vm["tgid"])
    return owners


def _rows(batch: pa.RecordBatch) -> Iterator[Row]:
    pages = pa.Table.from_batches([batch.select(_CLASS_COLUMNS)])
    classes = page_class(pages.to_pandas(types_mapper=DTYPES.get)).tolist()
    for row, kind_of_page in zip(batch.to_pylist(), classes, strict=True):
        row["class"] = kind_of_page
        yield row


def _args(row: Row, names: str) -> Args:
    """Return some columns that are not null as arguments of an event."""
    return {name: row[name] for name in names.split() if row[name] is not None}


def _level(row: Row) -> str:
    return _LEVELS.get(row["level"], f"level {row['level']}")


class _Scene:
    """Turns records, in order of time, into events on tracks."""

    def __init__(self, packets: Packets, owners: dict[int, int]) -> None:
        self._packets = packets
        self._owners = owners
        self._created: set[int] = set()
        #: installed less zapped, by (VM, level).
        self._live: Counter[tuple[int, int]] = Counter()
        #: (VM, thread) -> the tracks of its invalidations that have not ended.
        self._invalidating: dict[tuple[int, int], list[Track]] = {}
        self._lost: dict[tuple[str, int], int] = {}
        self._forms: dict[str, Callable[[Row], None]] = {
            "FAULT": self._fault,
            "SPTE": self._spte,
            "PAGE_FREE": self._page,
            "PAGE_ALLOC": self._page,
            "INVALIDATE": self._invalidate,
            "PIN": self._pin,
            "SLOT": self._slot,
            "VM": self._vm_event,
            "LOSS": self._loss,
        }
        self.shown = 0
        self.left_out = 0

    def begin(self, info: dict[str, Any], start_ns: int) -> None:
        """Say first what the trace is and what it is worth."""
        said = ("kernel", "generation", "hostname", "start", "reason", "lost", "filtered")
        args = {name: info[name] for name in said}
        args["command"] = " ".join(map(str, info["command"]))
        begin = start_ns if self._packets.can_show(start_ns) else 0
        self._packets.instant(self._recording(), begin, verdict_line(info), args)

    def find(self, finding: Finding) -> None:
        """Show one finding."""
        if not self._packets.can_show(finding.first_ts):
            return
        track = self._packets.track(("findings",), "findings", rank=1)
        args: Args = {"verdict": finding.verdict, "count": finding.count, "pages": finding.pages}
        args["lasted_ns"] = max(0, finding.last_ts - finding.first_ts)
        for name in ("vms", "slots", "gfns", "pfns"):
            numbers = [_range(part) for part in getattr(finding, name)]
            if numbers:
                more = finding.more and name in ("gfns", "pfns")
                args[name] = ", ".join(numbers) + (", ..." if more else "")
        args |= {"behind": finding.where, "rule": finding.rule, "recording": finding.recording}
        name = f"{finding.verdict.upper()} {finding.detector}: {finding.title}"
        known = {key: value for key, value in args.items() if value != ""}
        self._packets.instant(track, finding.first_ts, name, known)

    def show(self, row: Row) -> None:
        """Show one record."""
        if not self._packets.can_show(row["ts"]):
            self.left_out += 1
            return
        self._forms[row["kind"]](row)
        self.shown += 1

    # -- tracks -----------------------------------------------------------

    def _recording(self) -> Track:
        return self._packets.track(("recording",), "recording", rank=0)

    def _vm(self, row: Row) -> Track:
        vm = row["vm"] or 0
        owner = f" (process {self._owners[vm]})" if vm in self._owners else ""
        name = f"VM {vm}{owner}" if vm else "VM not known"
        return self._packets.track(("vm", vm), name, rank=vm + 2)

    def _side(self, row: Row, name: str, rank: str) -> Track:
        key = ("side", row["vm"] or 0, name)
        return self._packets.track(key, name, parent=self._vm(row), rank=_RANKS[rank])

    def _vcpu(self, row: Row) -> Track:
        vcpu = row["vcpu"]
        name = "no vCPU" if vcpu is None else f"vCPU {vcpu}"
        rank = _AFTER_VCPUS - 1 if vcpu is None else min(vcpu, _AFTER_VCPUS - 2)
        return self._packets.track(
            ("vcpu", row["vm"] or 0, vcpu), name, parent=self._vm(row), rank=rank
        )

    # -- kinds ------------------------------------------------------------

    def _fault(self, row: Row) -> None:
        end, track = row["ts"], self._vcpu(row)
        code = row["error_code"] or 0
        args = _args(row, "gfn hva slot pfn walk_pfn class refcounted refcount refcount_end mmu")
        args["result"] = str(row["result"])
        args["access"] = "write" if code & _WRITE else "exec" if code & _FETCH else "read"
        args["level"] = _level(row)
        error = pfn_error(row["pfn"] or 0)
        if error:
            args["pfn"] = error
        if (row["ret"] or 0) < 0:
            args["errno"] = -row["ret"]
        if row["prefetch"]:
            args["prefetch"] = True
        name, begin = f"fault {row['result']}", row["fault_ts"]
        if begin is None or begin > end:
            self._packets.instant(track, end, name, args)
            return
        lane = self._packets.lane(track, begin, end)
        if lane is None:
            self._packets.instant(track, end, name, args)
            return
        self._packets.slice(lane, begin, end, name, args, _stages(row, begin, end))

    def _spte(self, row: Row) -> None:
        in_fault = row["fault_ts"] is not None and row["vcpu"] is not None
        track = self._vcpu(row) if in_fault else self._side(row, "SPTEs", "SPTEs")
        args = _args(row, "gfn pfn cause class old new refcount mmu tid")
        self._packets.instant(track, row["ts"], f"{row['op']} {_level(row)}", args)
        step = {"install": 1, "zap": -1}.get(row["op"], 0)
        if step:
            self._count(row, step)

    def _count(self, row: Row, step: int) -> None:
        vm, level, parent = row["vm"] or 0, row["level"] or 0, self._vm(row)
        self._live[vm, level] += step
        # Of a VM that is older than the trace nobody knows what was mapped before.
        since = "" if vm in self._created else ", since the trace began"
        track = self._packets.track(
            ("live", vm, level),
            f"live {_level(row)} SPTEs{since}",
            parent=parent,
            rank=_LIVE_RANK + level,
            unit="count",
        )
        self._packets.counter(track, row["ts"], self._live[vm, level])
        if level in _LEVELS:
            track = self._packets.track(
                ("mapped", vm),
                f"mapped memory{since}",
                parent=parent,
                rank=_LIVE_RANK,
                unit="bytes",
            )
            pages = sum(self._live[vm, lv] << 9 * (lv - 1) for lv in _LEVELS)
            self._packets.counter(track, row["ts"], pages << 12)

    def _page(self, row: Row) -> None:
        name = "free" if row["kind"] == "PAGE_FREE" else "used again"
        args = _args(row, "pfn order class refcount tid")
        self._packets.instant(self._side(row, "page frees", "frees"), row["ts"], name, args)

    def _invalidate(self, row: Row) -> None:
        parent = self._side(row, "MMU notifier", "notifier")
        key = (row["vm"] or 0, row["tid"] or 0)
        args = _args(row, "hva hva_end in_progress tid")
        name = f"invalidate {row['event']}"
        if row["op"] == "start":
            lane = self._packets.free_lane(parent)
            if lane is not None:
                self._invalidating.setdefault(key, []).append(lane)
                self._packets.begin(lane, row["ts"], name, args)
                return
        elif key in self._invalidating:
            lane = self._invalidating[key].pop()
            if not self._invalidating[key]:
                del self._invalidating[key]
            self._packets.end(lane, row["ts"])
            self._packets.give_back(lane)
            return
        self._packets.instant(parent, row["ts"], f"{name}: {row['op']}", args)

    def _pin(self, row: Row) -> None:
        args = _args(row, "gfn pfn hva class refcount ret tid")
        self._packets.instant(self._vm(row), row["ts"], f"pin {row['op']}", args)

    def _slot(self, row: Row) -> None:
        args = _args(row, "slot gfn npages hva tid")
        self._packets.instant(self._vm(row), row["ts"], f"memslot {row['op']}", args)

    def _vm_event(self, row: Row) -> None:
        if row["op"] == "create":
            self._created.add(row["vm"] or 0)
        self._packets.instant(self._vm(row), row["ts"], f"VM {row['op']}", _args(row, "tid"))

    def _loss(self, row: Row) -> None:
        key, lost = (str(row["loss_kind"]), row["cpu"] or 0), row["lost"] or 0
        more = lost - self._lost.get(key, 0)
        self._lost[key] = lost
        if more > 0:
            args = {"kind": key[0], "records": more, **_args(row, "cpu")}
            self._packets.instant(self._recording(), row["ts"], "LOST", args)


def _range(part: int | tuple[int, int]) -> str:
    if isinstance(part, int):
        return str(part)
    first, last = part
    return f"{first:#x}-{last:#x}" if first != last else f"{first:#x}"


def _stages(row: Row, begin: int, end: int) -> list[tuple[str, int, int, list[Any]]]:
    """Return the parts of a fault that it reached: (name, begin, end, parts of it).

    Their times are cut to the fault's, so that slices always lie within each other.
    """

    def part(name: str, first: str, last: str, low: int, high: int) -> list[Any]:
        if row[first] is None:
            return []
        start = min(max(begin + row[first], low), high)
        stop = high if not last or row[last] is None else begin + row[last]
        return [(name, start, min(max(stop, start), high), [])]

    stages = part("fault-in", "t_faultin", "t_faultin_end", begin, end)
    for name, low, high, inner in stages:
        assert name
        inner += part("GUP", "t_gup", "t_gup_end", low, high)
    after = stages[-1][2] if stages else begin
    return stages + part("map", "t_map", "", after, end)
