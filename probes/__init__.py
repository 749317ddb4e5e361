"""What pfntrace hooks in a kernel and what those hooks write.

The lowest room of the house: it imports neither `tracer` nor `analysis`.
"""
