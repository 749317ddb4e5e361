"""From a host to a trace file: observe, load, drain, write.

Imports `probes`; never `analysis`. Only `tracer.kernel` imports bcc, and only when recording.
"""
