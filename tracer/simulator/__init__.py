"""The simulator: a deterministic model of KVM's fault-in path that writes ordinary traces.

It stands behind the same seam as the kernel: what it makes are records of `probes.wire`, which go
through `tracer.tracewriter` into a `.pfnt` file. One seed gives one trace and one truth.
May import: `probes`, `tracer`.
"""

__all__ = ()
