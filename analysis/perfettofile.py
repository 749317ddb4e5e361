"""Packets of a Perfetto trace: tracks, slices, instants and counters, written as they come.

Knows nothing of KVM. Names and argument keys are interned: each is written once, then a number.
Perfetto matches the begin and end of slices on a track like brackets, so slices that overlap go to
lanes: tracks of the same name, which the UI shows as one. May import: `probes.errors`,
`tracer.describe`, and perfetto where it is used.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

from probes.errors import PfntraceError
from tracer.describe import printable

__all__ = ("LANES_MAX", "TRACKS_MAX", "Packets", "PerfettoMissing", "TooManyTracks", "Track")

#: More tracks than this no page can show.
TRACKS_MAX = 20_000
#: Slices of one track that overlap; what exceeds it becomes an instant.
LANES_MAX = 64

#: Perfetto's times are signed.
_TIME_END = 1 << 63
_PACKETS_AT_ONCE = 4096
_SEQUENCE = 1
#: Arguments that people read as hexadecimal numbers.
_HEX = frozenset(("gfn", "pfn", "walk_pfn", "hva", "hva_end", "old", "new"))
_TEXT_MAX = 1000

#: (name, begin, end, slices inside it); ns.
Part = tuple[str, int, int, Sequence[Any]]


class PerfettoMissing(PfntraceError):
    """The package perfetto is not installed."""


class TooManyTracks(PfntraceError):
    """More VMs or vCPUs than a page can show."""


class Track(NamedTuple):
    """A track that was declared."""

    uuid: int
    name: str
    parent: int
    rank: int


class Packets:
    """A Perfetto trace being written to a binary file. Times are ns."""

    def __init__(self, file: BinaryIO, start_unix_ns: int, start_ns: int) -> None:
        """Write the head: which moment of the wall clock `start_ns` is."""
        try:
            from perfetto.protos.perfetto.trace import perfetto_trace_pb2 as proto
            from perfetto.trace_builder.proto_builder import TraceProtoBuilder
        except ImportError as err:
            raise PerfettoMissing(
                f"--format perfetto needs the package perfetto ({err}): "
                "pip install 'pfntrace[perfetto]'"
            ) from err
        self._new_builder = TraceProtoBuilder
        self._proto = proto
        self._event = proto.TrackEvent
        self._file = file
        self._builder = TraceProtoBuilder()
        self._waiting = 0
        self._tracks: dict[Hashable, Track] = {}
        #: uuid of a track -> its lanes; when the last slice of each ended, None while one is open.
        self._lanes: dict[int, list[Track]] = {}
        self._free_from: dict[int, int | None] = {}
        self._names: dict[str, int] = {}
        self._keys: dict[str, int] = {}
        self._head(start_unix_ns, start_ns)

    def _head(self, start_unix_ns: int, start_ns: int) -> None:
        packet = self._packet()
        packet.sequence_flags = self._proto.TracePacket.SEQ_INCREMENTAL_STATE_CLEARED
        if not (0 <= start_unix_ns < _TIME_END and 0 <= start_ns < _TIME_END):
            return
        clocks = self._proto.ClockSnapshot.Clock
        # Events are on Perfetto's default clock, BOOTTIME, which counts as MONOTONIC does.
        for number, time in (
            (clocks.BOOTTIME, start_ns),
            (clocks.MONOTONIC, start_ns),
            (clocks.REALTIME, start_unix_ns),
        ):
            clock = packet.clock_snapshot.clocks.add()
            clock.clock_id, clock.timestamp = number, time

    def can_show(self, ts: int | None) -> bool:
        """Tell whether Perfetto has a number for this time."""
        return ts is not None and 0 <= ts < _TIME_END

    def close(self) -> None:
        """Write what waits."""
        self._file.write(self._builder.serialize())
        self._builder, self._waiting = self._new_builder(), 0

    # -- tracks -----------------------------------------------------------

    def track(
        self,
        key: Hashable,
        name: str,
        *,
        parent: Track | None = None,
        rank: int = 0,
        unit: str = "",
    ) -> Track:
        """Return the track of a key, declared at the first call; `unit`: a counter in that.

        Tracks of one parent are in order of `rank`.
        """
        found = self._tracks.get(key)
        if found is not None:
            return found
        if len(self._tracks) >= TRACKS_MAX:
            raise TooManyTracks(
                f"more than {TRACKS_MAX:,} VMs and vCPUs in this trace; no page can show them"
            )
        track = Track(len(self._tracks) + 1, name, parent.uuid if parent else 0, rank)
        self._tracks[key] = track
        self._declare(track, unit)
        return track

    def _declare(self, track: Track, unit: str = "") -> None:
        told = self._packet().track_descriptor
        told.uuid, told.name = track.uuid, printable(track.name)[:_TEXT_MAX]
        told.child_ordering = self._proto.TrackDescriptor.EXPLICIT
        told.sibling_order_rank = min(track.rank, (1 << 31) - 1)
        if track.parent:
            told.parent_uuid = track.parent
        if unit == "bytes":
            told.counter.unit = self._proto.CounterDescriptor.UNIT_SIZE_BYTES
        elif unit:
            told.counter.unit = self._proto.CounterDescriptor.UNIT_COUNT

    def lane(self, track: Track, begin: int, end: int) -> Track | None:
        """Return a lane for a slice whose end is known; None if LANES_MAX overlap.

        Slices come in order of their ends.
        """
        lane = self._open_lane(track, begin)
        if lane is not None:
            self._free_from[lane.uuid] = end
        return lane

    def free_lane(self, track: Track) -> Track | None:
        """Return a lane for a slice whose end is not known; to be given back with `give_back`."""
        lane = self._open_lane(track, _TIME_END)
        if lane is not None:
            self._free_from[lane.uuid] = None
        return lane

    def give_back(self, lane: Track) -> None:
        """Take back what `free_lane` gave."""
        self._free_from[lane.uuid] = 0

    def _open_lane(self, track: Track, begin: int) -> Track | None:
        lanes = self._lanes.setdefault(track.uuid, [track])
        for lane in lanes:
            free = self._free_from.get(lane.uuid, 0)
            if free is not None and free <= begin:
                return lane
        if len(lanes) == LANES_MAX:
            return None
        key = ("lane", track.uuid, len(lanes))
        parent = Track(track.parent, "", 0, 0) if track.parent else None
        lanes.append(self.track(key, track.name, parent=parent, rank=track.rank))
        return lanes[-1]

    # -- events -----------------------------------------------------------

    def slice(
        self,
        track: Track,
        begin: int,
        end: int,
        name: str,
        args: Mapping[str, Any],
        inner: Sequence[Part] = (),
    ) -> None:
        """Write a slice and the slices inside it."""
        self.begin(track, begin, name, args)
        for part, low, high, parts in inner:
            self.slice(track, low, high, part, {}, parts)
        self.end(track, end)

    def begin(self, track: Track, ts: int, name: str, args: Mapping[str, Any]) -> None:
        """Begin a slice."""
        self._named(track, ts, name, args, self._event.TYPE_SLICE_BEGIN)

    def end(self, track: Track, ts: int) -> None:
        """End the slice of the track that began last."""
        packet = self._packet(ts)
        packet.track_event.type = self._event.TYPE_SLICE_END
        packet.track_event.track_uuid = track.uuid

    def instant(self, track: Track, ts: int, name: str, args: Mapping[str, Any]) -> None:
        """Write an event without a length."""
        self._named(track, ts, name, args, self._event.TYPE_INSTANT)

    def counter(self, track: Track, ts: int, value: int) -> None:
        """Write the new value of a counter."""
        packet = self._packet(ts)
        packet.track_event.type = self._event.TYPE_COUNTER
        packet.track_event.track_uuid = track.uuid
        packet.track_event.counter_value = value

    def _named(self, track: Track, ts: int, name: str, args: Mapping[str, Any], kind: int) -> None:
        packet = self._packet(ts)
        event = packet.track_event
        event.type, event.track_uuid = kind, track.uuid
        event.name_iid = self._interned(packet, self._names, name, "event_names")
        for key, value in args.items():
            note = event.debug_annotations.add()
            note.name_iid = self._interned(packet, self._keys, key, "debug_annotation_names")
            if isinstance(value, bool):
                note.bool_value = value
            elif not isinstance(value, int):
                note.string_value = printable(value)[:_TEXT_MAX]
            elif key in _HEX:
                note.pointer_value = value
            elif value < 0:
                note.int_value = value
            else:
                note.uint_value = value

    def _interned(self, packet: Any, known: dict[str, int], text: str, table: str) -> int:
        number = known.get(text)
        if number is None:
            number = known[text] = len(known) + 1
            entry = getattr(packet.interned_data, table).add()
            entry.iid, entry.name = number, printable(text)[:_TEXT_MAX]
        return number

    def _packet(self, ts: int | None = None) -> Any:
        if self._waiting >= _PACKETS_AT_ONCE:
            self.close()
        packet = self._builder.add_packet()
        packet.trusted_packet_sequence_id = _SEQUENCE
        if ts is not None:
            packet.timestamp = ts
            packet.sequence_flags = self._proto.TracePacket.SEQ_NEEDS_INCREMENTAL_STATE
        self._waiting += 1
        return packet
