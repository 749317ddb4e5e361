"""Compiles the simulator's model with mypyc; all else about the package is in pyproject.toml.

The modules stay plain Python: where there is no C compiler they run as they are, more slowly, and
tell the same stories byte for byte (tests/unit/test_sim_compiled.py).
"""

from mypyc.build import mypycify
from setuptools import setup

__all__ = ("MODEL",)

#: Modules of `tracer.simulator` that run for each record, not once for each simulation.
MODEL = (
    "clock", "fault", "faultrecord", "host", "hostfault", "invalidate", "kernels", "ledger", "mmu",
    "ops", "pfncache", "putting", "recorder", "simulate", "split",
)  # fmt: skip

if __name__ == "__main__":
    extensions = mypycify(
        [
            # `make check` looks at types; here there is no numpy that would tell any.
            "--config-file=", "--ignore-missing-imports", "--follow-imports=silent",
            *(f"tracer/simulator/{name}.py" for name in MODEL),
        ],
        group_name="pfntrace_model",
        opt_level="2",
        debug_level="0",
    )  # fmt: skip
    for extension in extensions:
        extension.optional = True
    setup(ext_modules=extensions)
