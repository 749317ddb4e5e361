"""The trace file `.pfnt`: one Apache Arrow IPC stream, which any Arrow reader opens.

    import pyarrow as pa; pa.ipc.open_stream("x.pfnt").read_all()
    import polars as pl;  pl.read_ipc_stream("x.pfnt")

Layout; every line is one message of the stream, `│` shows what one checksum covers:

    ┌ schema         the columns of `tracer.schema`; its metadata holds
    │                    pfntrace       TraceMeta, one JSON object
    │                    pfntrace.crc   CRC-32 of that text
    │ dictionary ×8  the names that kind, op, cause, … stand for
    └ batch          rows of ONE kind, sorted by (ts, cpu, seq), at most 32768; LZ4; its tags:
                         pfntrace.kind    FAULT, SPTE, …, LOSS, NOTE
                         pfntrace.group   number of the flush that it belongs to
                         pfntrace.ts      earliest and latest ts, ns
                         pfntrace.from    offset of the byte behind the batch before, or 0
                         pfntrace.crc     two CRC-32: of all bytes from there on to the end of the
                                          tags, its own digits as zeros; and of the body
    ─ batch …
    ─ batch NOTE     the end mark: its last row is {"end": summary, "kinds": …, "losses": …}
      end            FFFFFFFF 00000000, Arrow's own end of stream

A flush of the recorder is a *group*: a batch for each kind that has records. Records of a later
group are nearly always later; `TraceReader.records` needs no such promise, it merges by the times
in the tags and holds only batches that overlap.

What a reader can rely on:

* a batch goes to the file in one piece, so a file whose recorder was killed ends with a whole
  batch, has no end mark, and is readable to its end; what was not yet flushed is missing;
* a file cut within a message is readable up to that message;
* a changed byte is noticed, in the head of a message before anything is read (no length is
  believed that was not checked), in a body before it is unpacked; what comes before is readable;
* nothing is allocated that the file merely claims: rows, sizes of columns before and after
  unpacking, names and texts all have limits, in `tracer.tracescan` and `tracer.tracecheck`.

Writing and reading are `tracer.tracewriter` and `tracer.tracereader`; this module is their door.
A merged trace has several recordings in it: `recordings` (`tracer.traceview`) gives each of them.
May import: these and `tracer.tracemeta`.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from tracer.tracemeta import TraceMeta
from tracer.tracereader import TraceReader
from tracer.traceview import recordings
from tracer.tracewriter import TraceWriter

__all__ = ("TraceMeta", "TraceReader", "TraceWriter", "opened", "recordings")


@contextlib.contextmanager
def opened(trace: Path | TraceReader) -> Iterator[TraceReader]:
    """Give a reader of a trace: one that is open stays open, a file is closed afterwards."""
    if isinstance(trace, TraceReader):
        yield trace
    else:
        with TraceReader(trace) as reader:
            yield reader
