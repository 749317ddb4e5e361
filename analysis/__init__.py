"""From a trace file to tables, and from tables to a report.

Reads traces through `tracer.tracefile` only; knows no kernel and no ring.
"""
