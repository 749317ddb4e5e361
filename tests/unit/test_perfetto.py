"""A trace for Perfetto, read back with Perfetto's own schema and replayed as its importer does.

trace_processor, which would be the proof, is a binary from the network; what it does with these
packets is short: sort by time, keep the order of equal times, match begins and ends like brackets
on each track. `replayed` does that.
"""

import collections
import dataclasses
import io
import sys
from pathlib import Path

import numpy as np
import pytest
from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import Trace, TrackEvent
from unit.records import START_NS, group, meta, records, write_trace

from analysis import perfetto, perfettofile
from analysis.check import check_trace
from analysis.export import export
from analysis.perfettofile import Packets, PerfettoMissing, TooManyTracks
from probes import wire
from tracer.tracefile import TraceReader, TraceWriter

TRACES = Path(__file__).parent / "traces"


@dataclasses.dataclass
class Slice:
    track: str
    depth: int
    name: str
    begin: int
    end: int
    args: dict


@dataclasses.dataclass
class Replayed:
    """What the importer would have in its tables."""

    tracks: dict
    slices: list
    instants: list
    counters: dict
    unfinished: int

    def paths(self):
        """Return the names of tracks with those of their parents."""
        return {self.path(uuid) for uuid in self.tracks}

    def path(self, uuid):
        told = self.tracks[uuid]
        above = f"{self.path(told.parent_uuid)}/" if told.parent_uuid else ""
        return above + told.name


def replayed(data):
    trace = Trace()
    trace.ParseFromString(data)
    names, keys, tracks, events = {}, {}, {}, []
    for packet in trace.packet:
        assert packet.trusted_packet_sequence_id == 1
        for entry in packet.interned_data.event_names:
            names[entry.iid] = entry.name
        for entry in packet.interned_data.debug_annotation_names:
            keys[entry.iid] = entry.name
        if packet.HasField("track_descriptor"):
            told = packet.track_descriptor
            assert told.uuid not in tracks, "declared once"
            assert not told.parent_uuid or told.parent_uuid in tracks, "parents first"
            tracks[told.uuid] = told
        if packet.HasField("track_event"):
            assert packet.track_event.track_uuid in tracks, "declared before it is used"
            assert not packet.track_event.name_iid or packet.track_event.name_iid in names
            events.append((packet.timestamp, packet.track_event))
    events.sort(key=lambda pair: pair[0])
    out = Replayed(tracks, [], [], collections.defaultdict(list), 0)
    stacks: dict[int, list[Slice]] = collections.defaultdict(list)
    for ts, event in events:
        path = out.path(event.track_uuid)
        stack = stacks[event.track_uuid]
        args = {keys[note.name_iid]: _value(note) for note in event.debug_annotations}
        if event.type == TrackEvent.TYPE_SLICE_BEGIN:
            stack.append(Slice(path, len(stack), names[event.name_iid], ts, ts, args))
            out.slices.append(stack[-1])
        elif event.type == TrackEvent.TYPE_SLICE_END:
            stack.pop().end = ts
        elif event.type == TrackEvent.TYPE_INSTANT:
            out.instants.append(Slice(path, 0, names[event.name_iid], ts, ts, args))
        else:
            out.counters[path].append((ts, event.counter_value))
    out.unfinished = sum(map(len, stacks.values()))
    return out


def _value(note):
    return getattr(note, note.WhichOneof("value"))


def exported(path):
    file = io.BytesIO()
    with TraceReader(path) as reader:
        counts = perfetto.write_perfetto(reader, file)
    return replayed(file.getvalue()), counts


def shown(tmp_path, *flushes, **changes):
    return exported(write_trace(tmp_path / "x.pfnt", list(flushes), **changes))[0]


def faults(count=1, **fields):
    return [("FAULT", records("FAULT", count, **fields))]


# --- what comes of records ------------------------------------------------------------------------


def test_a_fault_is_a_slice_with_its_stages_inside(tmp_path):
    # GIVEN a fault of 100 us on vCPU 1 that went all the way
    out = shown(
        tmp_path,
        faults(
            h__vcpu=1, h__ts=START_NS + 100_000, h__fault_ts=START_NS, gfn=0x123, pfn=0x456,
            t_faultin=10_000, t_gup=20_000, t_gup_end=60_000, t_faultin_end=70_000, t_map=75_000,
        ),
    )  # fmt: skip
    # THEN its track is the vCPU's in its VM, and each stage lies where it was
    track = "VM 1/vCPU 1"
    stages = [(s.track, s.depth, s.name, s.begin - START_NS, s.end - START_NS) for s in out.slices]
    assert stages == [
        (track, 0, "fault fixed", 0, 100_000),
        (track, 1, "fault-in", 10_000, 70_000),
        (track, 2, "GUP", 20_000, 60_000),
        (track, 1, "map", 75_000, 100_000),
    ]
    args = out.slices[0].args
    assert (args["gfn"], args["pfn"], args["class"]) == (0x123, 0x456, "counted")
    assert (args["result"], args["access"], args["level"]) == ("fixed", "write", "4K")
    assert (args["refcount"], args["refcount_end"]) == (3, 2)


def test_a_failed_fault_says_which_error(tmp_path):
    never = wire.NEVER_REACHED
    out = shown(
        tmp_path,
        faults(ret=-14, pfn=(0x7FF << 52) + 2, t_map=never, t_gup=never, t_gup_end=never),
    )
    assert [s.name for s in out.slices] == ["fault error", "fault-in"]
    assert out.slices[0].args["errno"] == 14
    assert out.slices[0].args["pfn"] == "KVM_PFN_ERR_RO_FAULT"


def test_faults_of_one_vcpu_that_overlap_are_on_lanes_of_one_name(tmp_path):
    # GIVEN three faults of vCPU 0: the second within the first, the third begins as the first ends
    ends = START_NS + 1000, START_NS + 2000, START_NS + 3000
    begins = START_NS + 500, START_NS, START_NS + 2000
    out = shown(
        tmp_path,
        faults(
            3, h__vcpu=0, h__ts=ends, h__fault_ts=begins,
            **dict.fromkeys(("t_faultin", "t_map"), wire.NEVER_REACHED),
        ),
    )  # fmt: skip
    assert [(s.depth, s.begin, s.end) for s in out.slices] == [
        (0, begins[1], ends[1]),
        (0, begins[0], ends[0]),
        (0, begins[2], ends[2]),
    ]
    assert [t.name for t in out.tracks.values()].count("vCPU 0") == 2


def test_sptes_are_marks_on_the_vcpu_in_a_fault_and_beside_it_else(tmp_path):
    sptes = records("SPTE", 2, h__vcpu=[0, -1], h__fault_ts=[START_NS, 0])
    sptes["h"]["op"] = [wire.OPS.index("install"), wire.OPS.index("zap")]
    sptes["cause"] = [wire.CAUSES.index("fault"), wire.CAUSES.index("notifier")]
    out = shown(tmp_path, [("SPTE", sptes)])
    marks = [(i.track, i.name, i.args["cause"]) for i in out.instants[1:]]
    assert marks == [
        ("VM 1/vCPU 0", "install 4K", "fault"),
        ("VM 1/SPTEs", "zap 4K", "notifier"),
    ]


def test_live_sptes_and_mapped_memory_are_counted(tmp_path):
    sptes = records("SPTE", 4, level=[1, 2, 1, 2])
    sptes["h"]["op"] = [wire.OPS.index(op) for op in ("install", "install", "zap", "change")]
    out = shown(tmp_path, [("VM", records("VM", 1, h__ts=START_NS)), ("SPTE", sptes)])
    values = {path: [value for _, value in rows] for path, rows in out.counters.items()}
    assert values == {
        "VM 1 (process 4242)/live 4K SPTEs": [1, 0],
        "VM 1 (process 4242)/live 2M SPTEs": [1],
        "VM 1 (process 4242)/mapped memory": [4096, 4096 + (2 << 20), 2 << 20],
    }


def test_a_vm_older_than_the_trace_has_counters_that_say_so(tmp_path):
    out = shown(tmp_path, [("SPTE", records("SPTE", 1))])
    assert set(out.counters) == {
        "VM 1/live 4K SPTEs, since the trace began",
        "VM 1/mapped memory, since the trace began",
    }


def test_invalidations_are_slices_matched_by_thread(tmp_path):
    # GIVEN two threads whose invalidations overlap without lying in each other
    events = records("INVALIDATE", 5, h__tid=[7, 8, 7, 8, 9])
    events["h"]["op"] = [wire.OPS.index(op) for op in ("start", "start", "end", "end", "end")]
    ts = events["h"]["ts"].tolist()
    out = shown(tmp_path, [("INVALIDATE", events)])
    spans = [(s.depth, s.args["tid"], s.begin, s.end) for s in out.slices]
    assert spans == [(0, 7, ts[0], ts[2]), (0, 8, ts[1], ts[3])]
    # an end without its start stands alone
    assert out.instants[-1].name == "invalidate clear: end" and out.unfinished == 0


def test_frees_pins_slots_and_vms_are_marks(tmp_path):
    kinds = ("PAGE_FREE", "PAGE_ALLOC", "PIN", "SLOT", "VM")
    flush = [(kind, records(kind, 1, h__ts=START_NS + at)) for at, kind in enumerate(kinds)]
    out = shown(tmp_path, flush)
    vm = "VM 1 (process 4242)"
    assert [(i.track, i.name) for i in out.instants[1:]] == [
        (f"{vm}/page frees", "free"),
        (f"{vm}/page frees", "used again"),
        (vm, "pin map"),
        (vm, "memslot create"),
        (vm, "VM create"),
    ]


def test_losses_are_on_a_track_of_their_own_and_the_verdict_stands_first(tmp_path):
    path = tmp_path / "x.pfnt"
    writer = TraceWriter(path, meta())
    writer.write_losses({"FAULT": [(5, 0, 0, 0), (9, 3, 0, 0)]}, ts=START_NS + 10)
    writer.write_losses({"FAULT": [(6, 0, 0, 0), (20, 5, 0, 0)]}, ts=START_NS + 20)
    writer.close({"lost": 5, "produced": 26})
    out, _ = exported(path)
    assert out.instants[0].track == "recording" and out.instants[0].name.startswith("LOST 5 of")
    assert [(i.name, i.args["records"], i.args["cpu"]) for i in out.instants[1:]] == [
        ("LOST", 3, 1),
        ("LOST", 2, 1),
    ]


def test_what_the_detectors_found_is_marked_at_its_first_time(tmp_path):
    # GIVEN a recording of a kernel that keeps a reference when a fault is retried
    path = TRACES / "leak-on-retry-6.12.pfnt"
    out = tmp_path / "x.pftrace"
    # WHEN
    export(path, "perfetto", out)
    # THEN the finding of the check is there, in words
    told = replayed(out.read_bytes())
    marks = [mark for mark in told.instants if mark.track == "findings"]
    findings = check_trace(path).findings
    assert [mark.begin for mark in marks] == sorted(one.first_ts for one in findings)
    worst = next(mark for mark in marks if mark.begin == findings[0].first_ts)
    assert worst.name.startswith(f"{findings[0].verdict.upper()} {findings[0].detector}: ")
    assert worst.args["count"] == findings[0].count and worst.args["vms"] == "1"
    assert worst.args["rule"] and "0x" in worst.args["pfns"]


def test_tracks_are_in_the_order_in_which_people_look(tmp_path):
    out = shown(tmp_path, group(0, kinds=("FAULT", "SPTE", "PAGE_FREE", "INVALIDATE")))
    vm = next(uuid for uuid, told in out.tracks.items() if told.name == "VM 1")
    children = [t for t in out.tracks.values() if t.parent_uuid == vm]
    children.sort(key=lambda told: told.sibling_order_rank)
    assert list(dict.fromkeys(told.name for told in children)) == [
        "vCPU 0", "vCPU 1", "SPTEs", "page frees", "MMU notifier",
        "mapped memory, since the trace began", "live 4K SPTEs, since the trace began",
    ]  # fmt: skip
    assert out.tracks[vm].child_ordering == out.tracks[vm].EXPLICIT


# --- real and hostile traces ----------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(TRACES.glob("*.pfnt")), ids=lambda path: path.stem)
def test_every_fault_of_a_real_trace_is_a_slice_on_a_vcpu(path):
    out, (rows, left_out) = exported(path)
    with TraceReader(path) as reader:
        kinds = reader.info()["kinds"]
    outer = [s for s in out.slices if s.name.startswith("fault ") and s.depth == 0]
    assert len(outer) == kinds["FAULT"] and not left_out and not out.unfinished
    assert all("/vCPU" in s.track for s in outer)
    assert sum(i.name == "free" for i in out.instants) == kinds["PAGE_FREE"]
    assert rows >= kinds["FAULT"] + kinds["SPTE"]


def test_impossible_times_are_left_out_and_counted(tmp_path):
    times = [0, 1, START_NS, 2**63, 2**64 - 1]
    path = write_trace(
        tmp_path / "x.pfnt", [faults(5, h__ts=times, h__fault_ts=[0, 5, 2**64 - 1, 7, 0])]
    )
    out, (rows, left_out) = exported(path)
    assert (rows, left_out) == (3, 2)
    # A fault that ended before it began has no length.
    assert len(out.slices) + len(out.instants) - 1 >= 3 and not out.unfinished


def test_more_overlapping_faults_than_there_are_lanes_become_marks(tmp_path, monkeypatch):
    monkeypatch.setattr(perfettofile, "LANES_MAX", 3)
    ends = START_NS + 1000 * (1 + np.arange(10, dtype="u8"))
    out = shown(tmp_path, faults(10, h__vcpu=0, h__ts=ends, h__fault_ts=START_NS))
    outer = [s for s in out.slices if s.depth == 0]
    assert len(outer) == 3 and len(out.instants) == 1 + 7


def test_more_tracks_than_a_page_can_show_are_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(perfettofile, "TRACKS_MAX", 10)
    path = write_trace(tmp_path / "x.pfnt", [faults(20, h__vm=range(1, 21))])
    with pytest.raises(TooManyTracks) as caught:
        exported(path)
    assert "\n" not in str(caught.value)


def test_text_from_a_trace_is_made_printable(tmp_path):
    out = shown(tmp_path, group(0), command=("\x1b[31mred", "x" * 10_000), hostname="\x07bell")
    args = out.instants[0].args
    assert args["command"].startswith("\\x1b[31mred") and len(args["command"]) == 1000
    assert args["hostname"] == "\\x07bell"


def test_names_are_written_once(tmp_path):
    file = io.BytesIO()
    with TraceReader(write_trace(tmp_path / "x.pfnt", [faults(500)])) as reader:
        perfetto.write_perfetto(reader, file)
    assert file.getvalue().count(b"fault fixed") == 1
    assert file.getvalue().count(b"refcount_end") == 1


def test_long_traces_are_written_piece_by_piece():
    class Pieces(io.BytesIO):
        sizes: list[int] = []

        def write(self, data):
            self.sizes.append(len(data))
            return super().write(data)

    file = Pieces()
    packets = Packets(file, 0, 0)
    track = packets.track("t", "t")
    for at in range(20_000):
        packets.instant(track, at, "x", {"n": at})
    packets.close()
    assert len(file.sizes) >= 4 and len(replayed(file.getvalue()).instants) == 20_000


def test_without_the_package_one_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "perfetto.trace_builder.proto_builder", None)
    out = tmp_path / "x.pftrace"
    with pytest.raises(PerfettoMissing) as caught:
        export(TRACES / "ttm-6.12.pfnt", "perfetto", out)
    assert "pip install 'pfntrace[perfetto]'" in str(caught.value)
    assert not list(tmp_path.iterdir())
