"""Check that a batch unpacks to what its number of rows allows, before Arrow unpacks it.

A compressed buffer states its unpacked size in its first eight bytes and Arrow allocates that
much; a column shorter than its rows would be read beyond its end. Both are known from the rows
and our columns, so both are compared, for all buffers of a batch at once. May import:
`tracer.columns`, `tracer.messages`, `tracer.schema`, numpy, pyarrow.
"""

import dataclasses
import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from tracer import messages, schema
from tracer.columns import ROWS_MAX
from tracer.messages import Malformed

__all__ = ("NAMES_BYTES_MAX", "check_batch", "check_names")

#: Names in one dictionary, which int8 numbers, and their text.
_NAMES_MAX = 128
NAMES_BYTES_MAX = 64 << 10
#: Notes of one batch together; the writer makes no more than 3 MiB.
_TEXT_MAX = 4 << 20

#: (length, null count) of a column, (offset, length) of a buffer.
_PAIR = struct.Struct("<qq")


@dataclasses.dataclass(frozen=True, slots=True)
class _Buffers:
    """What each buffer of a batch must hold: a row of these is one buffer, in Arrow's order."""

    #: index of the column.
    column: npt.NDArray[np.int64]
    #: bytes needed = rows * bits / 8 rounded up, plus `extra`.
    bits: npt.NDArray[np.int64]
    extra: npt.NDArray[np.int64]
    #: bytes allowed beyond these.
    slack: npt.NDArray[np.int64]
    #: may be absent where the column has no nulls.
    validity: npt.NDArray[np.bool_]


def _buffers(types: Sequence[pa.DataType]) -> _Buffers:
    buffers: list[tuple[int, int, int, int, bool]] = []
    padding = 64  # Arrow may round a buffer up to this
    for index, kind in enumerate(types):
        buffers.append((index, 1, 0, padding, True))
        if kind == pa.utf8():
            buffers.append((index, 32, 4, padding, False))
            buffers.append((index, 0, 0, _TEXT_MAX, False))
        else:
            width = 8 if pa.types.is_dictionary(kind) else kind.bit_width
            buffers.append((index, width, 0, padding, False))
    column, bits, extra, slack, validity = (np.array(part) for part in zip(*buffers, strict=True))
    return _Buffers(column, bits, extra, slack, validity)


_BATCH = _buffers([c.type for c in schema.COLUMNS])


def _opened(whole: bytes, kind: int) -> tuple[messages.Layout, memoryview]:
    """Return what a message says of its body, and the body."""
    begin = messages.PREFIX_SIZE + messages.metadata_size(whole[: messages.PREFIX_SIZE])
    layout = messages.parse_layout(whole[messages.PREFIX_SIZE : begin], kind)
    return layout, memoryview(whole)[begin:]


def check_names(whole: bytes) -> None:
    """Check a dictionary message; raises Malformed.

    There are eight in each file, of three buffers: too few for numpy to be quick.
    """
    layout, body = _opened(whole, messages.DICTIONARY)
    if layout.nodes != _PAIR.pack(layout.rows, 0) or not 0 < layout.rows <= _NAMES_MAX:
        raise Malformed("too many names, or nulls among them")
    if len(layout.buffers) != 3 * _PAIR.size:
        raise Malformed("names that are no text")
    needed = (0, 4 * layout.rows + 4, 0)
    for (offset, length), least in zip(_PAIR.iter_unpack(layout.buffers), needed, strict=True):
        if not 0 <= offset <= offset + length <= len(body) or 0 < length < 8:
            raise Malformed("names outside of their message")
        holds = length
        if layout.compressed and length:
            stated = int.from_bytes(body[offset : offset + 8], "little", signed=True)
            holds = length - 8 if stated == -1 else stated
        if not least <= holds <= NAMES_BYTES_MAX:
            raise Malformed("names of impossible length")


def check_batch(whole: bytes) -> int:
    """Check a record batch message of our columns and return its rows; raises Malformed."""
    layout, rest = _opened(whole, messages.RECORD_BATCH)
    body = np.frombuffer(rest, "u1")
    nodes = np.frombuffer(layout.nodes, "<i8").reshape(-1, 2)
    buffers = np.frombuffer(layout.buffers, "<i8").reshape(-1, 2)
    rows = layout.rows
    if len(nodes) != len(schema.COLUMNS) or len(buffers) != len(_BATCH.column):
        raise Malformed("another number of columns")
    nulls = nodes[:, 1]
    if not 0 <= rows <= ROWS_MAX or (nodes[:, 0] != rows).any():
        raise Malformed("columns of different length")
    if ((nulls < 0) | (nulls > rows)).any():
        raise Malformed("more nulls than rows")
    offset, length = buffers[:, 0], buffers[:, 1]
    if ((length < 0) | (offset < 0) | (offset > len(body)) | (length > len(body) - offset)).any():
        raise Malformed("a column outside of its batch")
    if (length[layout.compressed & (length < 8)] != 0).any():
        raise Malformed("a column too short")
    holds = length.copy()
    if layout.compressed:
        # A compressed buffer begins with its unpacked size, -1 if it is stored as it is.
        packed = np.flatnonzero(length)
        places = offset[packed, np.newaxis] + np.arange(8)
        stated = np.ascontiguousarray(body[places]).view("<i8")[:, 0]
        holds[packed] = np.where(stated == -1, length[packed] - 8, stated)
    needed = (rows * _BATCH.bits + 7) // 8 + _BATCH.extra
    absent = _BATCH.validity & (holds == 0) & (nulls[_BATCH.column] == 0)
    if ((holds < needed) & ~absent | (holds > needed + _BATCH.slack)).any():
        raise Malformed("a column whose size is not that of its rows")
    return rows
