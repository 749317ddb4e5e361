"""The messages of an Arrow IPC stream, as far as a reader must know them before it trusts them.

Arrow's own reader believes the lengths that a file states. So the little of each message that
says how much there is, the `flatbuffer tables <https://arrow.apache.org/docs/format/Columnar.html>`
Message and RecordBatch, is read here with every offset checked; and each batch carries our tags,
with a checksum. Everything raises `Malformed`. May import: standard library.

    message = FFFFFFFF · length of metadata (i32) · metadata (Message table) · body
"""

import dataclasses
import struct
import zlib
from collections.abc import Mapping

__all__ = (
    "DICTIONARY",
    "END_OF_STREAM",
    "PREFIX_SIZE",
    "RECORD_BATCH",
    "SCHEMA",
    "Layout",
    "Malformed",
    "Message",
    "Tags",
    "body_checksum",
    "checksum",
    "first_batch",
    "may_begin",
    "metadata_size",
    "parse",
    "parse_layout",
    "sign",
)

#: Continuation mark and the length of the metadata.
PREFIX_SIZE = 8
_CONTINUATION = b"\xff\xff\xff\xff"
END_OF_STREAM = _CONTINUATION + bytes(4)

#: Values of Message.header_type.
SCHEMA, DICTIONARY, RECORD_BATCH = 1, 2, 3

_CRC_TAG = b"pfntrace.crc"
#: What stands in place of the checksums while the first one is computed.
_CRC_BLANK = b"0000000000000000"
_TAGS_MAX = 16
_TAG_BYTES_MAX = 64


#: Numbers as flatbuffers have them; made once, since a scan reads thousands.
_NUMBERS = {form: struct.Struct(form) for form in ("<b", "<B", "<H", "<i", "<I", "<q")}


class Malformed(Exception):
    """These bytes are not a message as pfntrace writes them; `str()` says what is wrong."""


@dataclasses.dataclass(frozen=True, slots=True)
class Tags:
    """What each batch says of itself, so that a reader can pass over it unread."""

    kind: str
    #: number of the `write_group` that the batch belongs to.
    group: int
    #: earliest and latest `ts` in it, ns.
    ts_min: int
    ts_max: int
    #: offset in the file from which on its checksums count: the end of the batch before.
    crc_from: int

    def to_metadata(self) -> dict[str, str]:
        """Return the tags as a message's custom metadata, the checksum left blank."""
        return {
            "pfntrace.kind": self.kind,
            "pfntrace.group": str(self.group),
            "pfntrace.ts": f"{self.ts_min} {self.ts_max}",
            "pfntrace.from": str(self.crc_from),
            _CRC_TAG.decode(): _CRC_BLANK.decode(),
        }

    @classmethod
    def from_metadata(cls, pairs: Mapping[bytes, bytes]) -> "Tags":
        """Return the tags of a message; raises Malformed if one is missing or is no number."""
        try:
            ts_min, ts_max = (int(part) for part in pairs[b"pfntrace.ts"].split())
            kind = pairs[b"pfntrace.kind"].decode("ascii")
            group, crc_from = int(pairs[b"pfntrace.group"]), int(pairs[b"pfntrace.from"])
        except (KeyError, ValueError) as err:
            raise Malformed("a batch without the tags of pfntrace") from err
        if not 0 <= ts_min <= ts_max < 1 << 64:
            raise Malformed("a batch of impossible times")
        return cls(kind, group, ts_min, ts_max, crc_from)


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One message without its body.

    `crc` is sixteen digits, the checksums of head and body; `crc_at` is where they lie in the
    metadata.
    """

    type: int
    body_size: int
    #: rows of a batch, else 0.
    rows: int
    tags: Tags | None
    crc: bytes
    crc_at: int


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """What a batch's metadata says of its body: pairs, and is the body compressed with LZ4?"""

    rows: int
    #: (length, null count) of each column, as little-endian i64.
    nodes: bytes
    #: (offset, length) of each buffer, as little-endian i64.
    buffers: bytes
    compressed: bool


class _Tables:
    """Reads flatbuffer tables; every position is checked, a wrong one raises Malformed."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def number(self, form: str, at: int) -> int:
        if at < 0:
            raise Malformed("a position outside of the message")
        try:
            value: int = _NUMBERS[form].unpack_from(self._data, at)[0]
        except struct.error:
            raise Malformed("a position outside of the message") from None
        return value

    def follow(self, at: int) -> int:
        """Return where the relative offset at `at` leads to."""
        return at + self.number("<I", at)

    def field(self, table: int, index: int) -> int:
        """Return where a field of a table lies, 0 if it is absent."""
        vtable = table - self.number("<i", table)
        entry = 4 + 2 * index
        if entry >= self.number("<H", vtable):
            return 0
        offset = self.number("<H", vtable + entry)
        return table + offset if offset else 0

    def scalar(self, table: int, index: int, form: str) -> int:
        at = self.field(table, index)
        return self.number(form, at) if at else 0

    def child(self, table: int, index: int) -> int:
        """Return the position of a sub-table or vector, 0 if absent."""
        at = self.field(table, index)
        return self.follow(at) if at else 0

    def text(self, at: int) -> tuple[bytes, int]:
        """Return a short string and the position of its first byte."""
        size = self.number("<I", at)
        if size > _TAG_BYTES_MAX or at + 4 + size > len(self._data):
            raise Malformed("a tag too long")
        return self._data[at + 4 : at + 4 + size], at + 4

    def structs(self, at: int, size: int) -> bytes:
        """Return the bytes of a vector of structs of `size` bytes."""
        end = at + 4 + self.number("<I", at) * size
        if end > len(self._data):
            raise Malformed("a list longer than the message")
        return self._data[at + 4 : end]


def may_begin(data: bytes) -> bool:
    """Tell whether these few bytes can be the beginning of a message."""
    return data[:4] == _CONTINUATION[: len(data)]


def metadata_size(prefix: bytes) -> int:
    """Return the length of the metadata that follows the prefix, 0 for the end of the stream."""
    if prefix[:4] != _CONTINUATION or len(prefix) < PREFIX_SIZE:
        raise Malformed("no message begins here")
    size: int = struct.unpack_from("<i", prefix, 4)[0]
    if size < 0 or size % 8:
        raise Malformed("a message of impossible length")
    return size


def parse(metadata: bytes) -> Message:
    """Read one message's metadata; tags are given for record batches only."""
    tables = _Tables(metadata)
    root = tables.follow(0)
    kind = tables.scalar(root, 1, "<B")
    body_size = tables.scalar(root, 3, "<q")
    if body_size < 0 or body_size % 8:
        raise Malformed("a body of impossible length")
    if kind != RECORD_BATCH:
        return Message(kind, body_size, 0, None, b"", 0)
    batch = tables.child(root, 2)
    rows = tables.scalar(batch, 0, "<q") if batch else 0
    pairs, crc_at = _pairs(tables, root)
    return Message(kind, body_size, rows, Tags.from_metadata(pairs), pairs[_CRC_TAG], crc_at)


def _pairs(tables: _Tables, root: int) -> tuple[dict[bytes, bytes], int]:
    vector = tables.child(root, 4)
    count = tables.number("<I", vector) if vector else 0
    if count > _TAGS_MAX:
        raise Malformed("too many tags")
    pairs: dict[bytes, bytes] = {}
    crc_at = 0
    for index in range(count):
        pair = tables.follow(vector + 4 + 4 * index)
        key, _ = tables.text(tables.child(pair, 0))
        pairs[key], at = tables.text(tables.child(pair, 1))
        if key == _CRC_TAG:
            crc_at = at
    if len(pairs.get(_CRC_TAG, b"")) != len(_CRC_BLANK):
        raise Malformed("a batch without a checksum")
    return pairs, crc_at


def parse_layout(metadata: bytes, kind: int) -> Layout:
    """Read where a record batch or a dictionary says that its parts lie in the body."""
    tables = _Tables(metadata)
    batch = tables.child(tables.follow(0), 2)
    if kind == DICTIONARY and batch:
        if tables.scalar(batch, 2, "<B"):
            raise Malformed("a dictionary that grows")
        batch = tables.child(batch, 1)
    nodes, buffers = (tables.child(batch, 1), tables.child(batch, 2)) if batch else (0, 0)
    if not nodes or not buffers:
        raise Malformed("a batch without columns")
    compression = tables.child(batch, 3)
    if compression and (tables.scalar(compression, 0, "<b") or tables.scalar(compression, 1, "<b")):
        raise Malformed("compression other than LZ4")
    rows = tables.scalar(batch, 0, "<q")
    return Layout(rows, tables.structs(nodes, 16), tables.structs(buffers, 16), bool(compression))


def checksum(head: bytes | memoryview, crc_at: int, start: int = 0) -> bytes:
    """Return the checksum of a message's prefix and metadata as eight digits.

    `crc_at` is the position of the tag in `head`, which counts as zeros; `start` is the checksum
    of what stood before the message.
    """
    crc = zlib.crc32(head[:crc_at], start)
    crc = zlib.crc32(_CRC_BLANK, crc)
    return b"%08x" % zlib.crc32(head[crc_at + len(_CRC_BLANK) :], crc)


def body_checksum(body: bytes | memoryview) -> bytes:
    """Return the checksum of a message's body as eight digits."""
    return b"%08x" % zlib.crc32(body)


def sign(data: bytearray, start: int) -> None:
    """Fill in the checksums of a message that was made with `Tags.to_metadata`."""
    end = PREFIX_SIZE + metadata_size(bytes(data[:PREFIX_SIZE]))
    crc_at = PREFIX_SIZE + parse(bytes(data[PREFIX_SIZE:end])).crc_at
    view = memoryview(data)
    digits = checksum(view[:end], crc_at, start) + body_checksum(view[end:])
    view.release()
    data[crc_at : crc_at + len(digits)] = digits


def first_batch(data: bytes | bytearray) -> int:
    """Return the offset of the first record batch in well-formed messages of our own making."""
    at = 0
    while True:
        size = metadata_size(bytes(data[at : at + PREFIX_SIZE]))
        metadata = bytes(data[at + PREFIX_SIZE : at + PREFIX_SIZE + size])
        tables = _Tables(metadata)
        root = tables.follow(0)
        if tables.scalar(root, 1, "<B") == RECORD_BATCH:
            return at
        at += PREFIX_SIZE + size + tables.scalar(root, 3, "<q")
