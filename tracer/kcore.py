"""Words of the running kernel's memory, read from /proc/kcore.

Needed for a handful of data symbols (`shadow_*_mask`, `vmemmap_base`), before any program is
loaded. May import: standard library, `probes`.
"""

import struct
from collections.abc import Mapping
from pathlib import Path

from probes.errors import HostError

__all__ = ("read_symbols",)

_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_PT_LOAD = 1


def read_symbols(
    addresses: Mapping[str, int], sizes: Mapping[str, int], kcore: Path = Path("/proc/kcore")
) -> dict[str, int]:
    """Return the little-endian value of each symbol that kcore covers.

    `addresses` are virtual addresses, `sizes` bytes. Raises HostError if kcore cannot be read
    (no CAP_SYS_RAWIO, lockdown `confidentiality`).
    """
    values: dict[str, int] = {}
    try:
        with kcore.open("rb", buffering=0) as core:
            header = _EHDR.unpack(core.read(_EHDR.size))
            if not header[0].startswith(b"\x7fELF\x02\x01"):
                raise HostError(f"{kcore} is not a 64-bit ELF core file")
            core.seek(header[5])
            raw = core.read(_PHDR.size * header[10])
            segments = [s for s in _PHDR.iter_unpack(raw) if s[0] == _PT_LOAD]
            for name, address in addresses.items():
                for _, _, offset, vaddr, _, _, size, _ in segments:
                    if vaddr <= address < vaddr + size:
                        core.seek(offset + address - vaddr)
                        word = core.read(sizes[name])
                        if len(word) == sizes[name]:
                            values[name] = int.from_bytes(word, "little")
                        break
    except (OSError, OverflowError, struct.error) as err:
        raise HostError(f"{kcore} cannot be read: {err}") from err
    return values
