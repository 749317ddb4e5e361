"""What some simulations are, as one number each: an accidental change of the model shows.

    python tests/unit/simdigest.py --write

writes `simdigests.json` anew, after a change on purpose. Digested is what records and truth say,
not the bytes of the files: those depend on the version of Arrow too.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zlib import crc32

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from unit.simkit import Made, make  # noqa: E402

from tracer.simulator.kernels import KERNELS  # noqa: E402
from tracer.simulator.scenario import names  # noqa: E402

__all__ = ("DIGESTS", "STORIES", "digest", "pinned")

DIGESTS = Path(__file__).with_name("simdigests.json")
#: Each kernel with a scenario or two, and one each for what is done to stories and records.
STORIES: Mapping[str, dict[str, Any]] = {
    **{
        f"{scenario} on {kernel}": {"kernel": kernel, "scenario": scenario}
        for scenario in sorted(names())
        for kernel in [list(KERNELS)[crc32(scenario.encode()) % len(KERNELS)]]
    },
    "a bug": {"kernel": "6.13", "bugs": ("missing_put", "wrong_gfn")},
    "a race": {"kernel": "v7", "bugs": ("use_after_put=0.3",)},
    "hostile": {"scenario": "balloon", "hostile": ("loss", "reorder", "skew", "duplicate")},
    "late": {"scenario": "balloon", "hostile": ("late", "truncate")},
}


def digest(made: Made) -> str:
    """Return the SHA-256 of all records, notes and losses, and of the truth."""
    told = hashlib.sha256()
    for rows in (made.rows(), *(made.truth(name) for name in ("lives", "references", "bugs"))):
        for row in rows:
            known = {name: value for name, value in row.items() if value is not None}
            told.update(json.dumps(known, sort_keys=True).encode())
    return told.hexdigest()


def pinned() -> dict[str, str]:
    """Return the digests that were written last, by story."""
    return dict(json.loads(DIGESTS.read_text()))


def main() -> int:
    """Print the digests, or write them."""
    with tempfile.TemporaryDirectory() as folder:
        found = {
            name: digest(make(Path(folder), mem_bytes=1 << 20, seed=11, **knobs))
            for name, knobs in STORIES.items()
        }
    text = json.dumps(found, indent=1) + "\n"
    if "--write" in sys.argv[1:]:
        DIGESTS.write_text(text)
    else:
        print(text, end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
