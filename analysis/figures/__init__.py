"""The figures of `pfntrace plot`, a module each: what to show of a trace, and how it is drawn.

In each, one function chooses and adds up, and `draw` makes a matplotlib figure of that without
computing anything. `analysis.plot` composes them. May import: matplotlib, numpy, `analysis`.
"""
