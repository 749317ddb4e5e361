"""What memory a page is of: whether it is anonymous, and which slot of which VM it belongs to.

For detectors that keep a few bytes for each page. May import: `analysis`, numpy.
"""

from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt

from analysis.recording import Recording

__all__ = ("ANONYMOUS", "KNOWN", "Anonymous", "Groups")

#: What is known of a page's memory; may be kept among other bits.
ANONYMOUS, KNOWN = 1, 2
#: Pages of a slot that must have been freed, for its memory to be taken for anonymous.
_FREED_SOME = 8


class Anonymous:
    """Which addresses of a VM's process are anonymous memory, and of which anything is known."""

    def __init__(self, recording: Recording) -> None:
        self._known: dict[int, list[tuple[int, int, bool]]] = {}
        for mapping in recording.mappings:
            if mapping.path is not None:
                ranges = self._known.setdefault(mapping.vm, [])
                ranges.append((mapping.start, mapping.end, not mapping.path))

    def state(self, vm: npt.NDArray[Any], hva: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
        """Return KNOWN and ANONYMOUS for some addresses of VMs' processes."""
        answer = np.zeros(len(vm), np.uint8)
        for number, ranges in self._known.items():
            mine = vm == number
            # Later notes are newer; a VM has a handful of slots.
            for start, end, anonymous in ranges[-256:]:
                hit = mine & (hva >= start) & (hva < end)
                answer[hit] = KNOWN | (ANONYMOUS if anonymous else 0)
        return answer


class Groups:
    """Slots of VMs by a small number, and how many pages of each were freed when let go."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._keys: list[int] = [0]
        self._freed = np.zeros(1 << 16, np.int64)

    def of(self, vm: npt.NDArray[Any], slot: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
        """Return the number of the slot of each row; 0 if there are too many slots."""
        every = vm.astype(np.int64) << 17 | (slot.astype(np.int64) + 1)
        if len(every) and (every == every[0]).all():
            keys, which = every[:1], np.zeros(len(every), np.int64)
        else:
            keys, which = np.unique(every, return_inverse=True)
        numbers = []
        for key in keys.tolist():
            if key not in self._numbers and len(self._keys) < 1 << 16:
                self._numbers[key] = len(self._keys)
                self._keys.append(key)
            numbers.append(self._numbers.get(key, 0))
        return np.array(numbers, np.uint16)[which]

    def freed(self, numbers: npt.NDArray[np.uint16]) -> None:
        """Take pages that nobody held when KVM let them go, and that were freed."""
        self._freed += np.bincount(numbers, minlength=len(self._freed))

    def with_freed(self, numbers: npt.NDArray[np.uint16]) -> npt.NDArray[np.bool_]:
        """Tell which slots had several such pages: they are no file's memory."""
        return np.asarray((self._freed[numbers] >= _FREED_SOME) & (numbers > 0), np.bool_)

    def of_vms(self, vms: Collection[int]) -> npt.NDArray[np.bool_]:
        """Tell for each number whether its slot is of one of some VMs."""
        answer = np.zeros(1 << 16, np.bool_)
        answer[: len(self._keys)] = [key >> 17 in vms for key in self._keys]
        return answer

    def vms(self, numbers: npt.NDArray[np.uint16]) -> tuple[int, ...]:
        """Return the VMs that some slots are of."""
        return tuple(sorted({self._keys[n] >> 17 for n in np.unique(numbers).tolist() if n}))

    def slots(self, numbers: npt.NDArray[np.uint16]) -> tuple[int, ...]:
        """Return the numbers that KVM gave some slots."""
        keys = [self._keys[n] for n in np.unique(numbers).tolist() if n]
        return tuple(sorted({(key & 0x1FFFF) - 1 for key in keys if key & 0x1FFFF}))
