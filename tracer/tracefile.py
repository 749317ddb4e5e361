"""The trace file."""
from tracer.tracemeta import TraceMeta
from tracer.tracewriter import TraceWriter
__all__ = ("TraceMeta", "TraceWriter")
