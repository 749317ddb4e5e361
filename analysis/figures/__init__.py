"""The figures of `pfntrace plot`, a module each: what to show of a trace, and how it is drawn.

In each, one function chooses and adds up, and `draw` makes a matplotlib figure of that without
computing anything. `analysis.plot` composes them. May import: matplotlib, numpy, `analysis`.
"""

import logging

# Where it has no home to keep a cache in, it makes one for the moment, and says so in two lines:
# nothing that who asked for a figure must know. Before matplotlib is imported.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
