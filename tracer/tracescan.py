"""Find the batches of a trace file and check them, before Arrow sees any of it.

A scan reads the head of each message and no body: it finds where every batch lies, what it holds
and where the readable part of the file ends. A trace may come from strangers: whatever a file
says about sizes is compared with the file and with the limits below. May import: `probes.errors`,
`tracer.columns`, `tracer.messages`, `tracer.schema`, `tracer.tracecheck`,
`tracer.tracemeta`, pyarrow.
"""

import dataclasses
import os
import stat
import zlib
from pathlib import Path
from types import TracebackType

import pyarrow as pa

from probes.errors import TraceFormatError
from tracer import messages, schema
from tracer.columns import ROWS_MAX
from tracer.messages import Malformed
from tracer.tracecheck import NAMES_BYTES_MAX, check_batch, check_names
from tracer.tracemeta import HEAD_BYTES_MAX

__all__ = ("Block", "Scan", "TraceBytes", "load", "read_schema", "scan")

#: Longest metadata of any other message (ours are 4 KiB) and longest body.
_METADATA_MAX = 64 << 10
_BODY_MAX = 32 << 20
#: Columns whose dictionaries stand before the first batch.
_NAMED = sum(1 for column in schema.COLUMNS if column.names)

#: Read at once for the head of a message: usually all of it.
_GUESS = 6 << 10

_KILLED = "no end mark: the recorder was killed or is still at work; the last second may be missing"


class TraceBytes:
    """The bytes of one file, read by position. All methods raise TraceFormatError."""

    def __init__(self, path: Path) -> None:
        """Open the file; a FIFO or a device is refused, not waited for."""
        self.path = path
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as err:
            raise TraceFormatError(f"{path} cannot be read: {err.strerror}") from err
        status = os.fstat(self._fd)
        #: size in bytes when it was opened; a recorder at work may add to it.
        self.size = status.st_size
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise TraceFormatError(f"{path} is not an ordinary file; name a trace")

    def __enter__(self) -> "TraceBytes":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        self.close()

    def read(self, offset: int, count: int) -> bytes:
        """Return `count` bytes, fewer only at the end of the file."""
        try:
            data = os.pread(self._fd, count, offset)
        except OSError as err:
            raise TraceFormatError(
                f"{self.path} cannot be read at byte {offset}: {err.strerror}"
            ) from err
        return data

    @property
    def stamp(self) -> tuple[int, int]:
        """Size and time of change (ns), which tell whether somebody wrote to the file."""
        try:
            status = os.fstat(self._fd)
        except OSError:
            return -1, -1  # closed: nothing is what it was
        return status.st_size, status.st_mtime_ns

    def close(self) -> None:
        """Close the file; further calls do nothing."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """One batch in the file, known by its head only. Offsets and sizes are bytes."""

    offset: int
    head_size: int
    body_size: int
    rows: int
    kind: str
    group: int
    ts_min: int
    ts_max: int
    #: eight digits, see `messages.body_checksum`.
    body_crc: bytes

    @property
    def end(self) -> int:
        """Offset of what follows."""
        return self.offset + self.head_size + self.body_size


@dataclasses.dataclass(frozen=True, slots=True)
class Scan:
    """What is in a file. `head` is the schema and the dictionaries, ready for Arrow."""

    head: bytes
    blocks: tuple[Block, ...]
    #: where the readable part ends, and why it ends there: "" if by the end mark.
    end: int
    problem: str


class _Cut(Exception):
    """The file ends within a message."""


def _head_at(file: TraceBytes, at: int, limit: int = _METADATA_MAX) -> bytes:
    """Return prefix and metadata of the message at a position; raises Malformed or _Cut."""
    guess = file.read(at, _GUESS)
    if len(guess) < messages.PREFIX_SIZE and messages.may_begin(guess):
        raise _Cut
    size = messages.PREFIX_SIZE + messages.metadata_size(guess)
    if size > limit:
        raise Malformed("a message too long")
    if at + size > file.size:
        raise _Cut
    return guess[:size] if size <= len(guess) else file.read(at, size)


def read_schema(file: TraceBytes) -> tuple[bytes, pa.Schema]:
    """Return the first message of the file and the schema in it, of whatever columns."""
    if not file.size:
        raise TraceFormatError(f"{file.path} is empty; record again")
    try:
        head = _head_at(file, 0, HEAD_BYTES_MAX)
        first = messages.parse(head[messages.PREFIX_SIZE :])
        if first.type != messages.SCHEMA or first.body_size:
            raise Malformed("it does not begin with a schema")
        return head, pa.ipc.read_schema(pa.py_buffer(head))
    except _Cut as err:
        raise TraceFormatError(f"{file.path} is cut within its head; record again") from err
    except (Malformed, pa.ArrowException, OSError, ValueError) as err:
        raise TraceFormatError(f"{file.path} is not a pfntrace trace; name another file") from err


class _Walk:
    """The walk from message to message that `scan` makes."""

    def __init__(self, file: TraceBytes, head: bytes) -> None:
        self._file = file
        self.head = [head]
        self.blocks: list[Block] = []
        self.at = len(head)
        self._crc_from = 0
        self._crc = zlib.crc32(head)

    def step(self) -> bool:
        """Pass over one message; False at the end mark."""
        head = _head_at(self._file, self.at)
        if len(head) == messages.PREFIX_SIZE:
            return False
        message = messages.parse(head[messages.PREFIX_SIZE :])
        if self.at + len(head) + message.body_size > self._file.size:
            raise _Cut
        if message.type == messages.RECORD_BATCH:
            self._batch(head, message)
        elif message.type == messages.DICTIONARY and not self.blocks:
            self._dictionary(head, message)
        else:
            raise Malformed("a message that does not belong here")
        self.at += len(head) + message.body_size
        return True

    def _dictionary(self, head: bytes, message: messages.Message) -> None:
        if message.body_size > NAMES_BYTES_MAX or len(self.head) > _NAMED:
            raise Malformed("too many names")
        whole = head + self._file.read(self.at + len(head), message.body_size)
        check_names(whole)
        self.head.append(whole)
        self._crc = zlib.crc32(whole, self._crc)

    def _batch(self, head: bytes, message: messages.Message) -> None:
        tags = message.tags
        assert tags is not None
        crc = messages.checksum(head, messages.PREFIX_SIZE + message.crc_at, self._crc)
        if message.crc[:8] != crc or tags.crc_from != self._crc_from:
            raise Malformed("its checksum is wrong")
        if tags.kind not in schema.FILE_KINDS or not 0 < message.rows <= ROWS_MAX:
            raise Malformed("a batch of impossible kind or length")
        if message.body_size > _BODY_MAX or len(self.head) != 1 + _NAMED:
            raise Malformed("a batch too large, or without names before it")
        block = Block(
            self.at,
            len(head),
            message.body_size,
            message.rows,
            tags.kind,
            tags.group,
            tags.ts_min,
            tags.ts_max,
            message.crc[8:],
        )
        self.blocks.append(block)
        self._crc_from, self._crc = block.end, 0

    @property
    def checked_to(self) -> int:
        """Offset up to which the checksums of heads have been right."""
        return self._crc_from


def scan(file: TraceBytes, head: bytes) -> Scan:
    """Find all batches behind the schema message `head`; bodies are not read.

    Never raises for what is in the file: where it cannot be followed further, the scan ends and
    says why.
    """
    walk = _Walk(file, head)
    problem = ""
    try:
        while walk.at < file.size and walk.step():
            pass
        if walk.at == file.size:
            problem = _KILLED
        elif walk.at + messages.PREFIX_SIZE != file.size:
            problem = f"{file.size - walk.at - messages.PREFIX_SIZE} bytes follow the end mark"
    except _Cut:
        problem = f"truncated at byte {file.size}"
    except Malformed as err:
        problem = f"damaged at byte {walk.at}: {err}"
    return Scan(b"".join(walk.head), tuple(walk.blocks), walk.checked_to, problem)


def load(file: TraceBytes, block: Block) -> bytes:
    """Return a whole batch message whose body is intact and whose sizes are those of its rows.

    Raises Malformed if not.
    """
    whole = file.read(block.offset, block.end - block.offset)
    if len(whole) < block.end - block.offset:
        raise Malformed("the file became shorter")
    if messages.body_checksum(memoryview(whole)[block.head_size :]) != block.body_crc:
        raise Malformed("its checksum is wrong")
    if check_batch(whole) != block.rows:
        raise Malformed("another number of rows than its head says")
    return whole
