"""Every error that pfntrace tells a user about, in one tree.

    PfntraceError                what, where and what to do next, in one line   exit 1
    ├── UsageError               the command line asks for something impossible  exit 2
    ├── HostError                this host cannot record
    │   ├── UnsupportedKernel    a hook or a layout that recording needs is missing
    │   └── ProbeLoadError       the kernel or bcc refused a program or an attachment
    ├── CommandError             the command to record could not be started      exit 127
    ├── OutputError              the trace file cannot be written
    ├── MergeError               traces that cannot become one
    └── TraceFormatError         a file is not a trace, or is damaged

Only the front door (`pfntrace.py`) turns them into a line on stderr and an exit status.
"""

__all__ = (
    "CommandError",
    "HostError",
    "MergeError",
    "OutputError",
    "PfntraceError",
    "ProbeLoadError",
    "SchemaError",
    "TraceFormatError",
    "UnsupportedKernel",
    "UsageError",
)


class PfntraceError(Exception):
    """Base of all errors meant for a user; `str()` is one line that ends with the next step."""

    exit_code = 1


class UsageError(PfntraceError):
    """The command line asks for something impossible."""

    exit_code = 2


class HostError(PfntraceError):
    """This host cannot record."""


class UnsupportedKernel(HostError):
    """A required hook or structure layout is missing in this kernel."""


class ProbeLoadError(HostError):
    """The kernel or bcc refused to load a program or to attach it."""


class CommandError(PfntraceError):
    """The command to record could not be started (the shell's convention for its status)."""

    exit_code = 127


class OutputError(PfntraceError):
    """The trace file cannot be created or written."""


class MergeError(PfntraceError):
    """Traces that cannot become one."""


class TraceFormatError(PfntraceError):
    """A file is not a pfntrace trace, is of another version, or is damaged."""


class SchemaError(PfntraceError):
    """A table is not what `analysis.schema` declares of it."""
