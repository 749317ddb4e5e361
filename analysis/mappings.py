"""What stands behind a guest's memory on the host: mappings of the VM's process, and their files.

Two witnesses: VMA records, written when a fault walked a PFNMAP mapping, with device notes that
name the device; and slot notes, read from /proc when a memslot appeared. The record is newer.
May import: numpy, pandas, `analysis.pages`.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.pages import vm_flag_names

__all__ = ("UNKNOWN_FILE", "Mappings", "VmaMapping", "numbered")

UNKNOWN_FILE = "a mapping whose file is not known"

_WORD = 1 << 64


@dataclasses.dataclass(frozen=True, slots=True)
class VmaMapping:
    """One mapping of a VM's process: [start, end) in bytes, VM_* names that matter, its file.

    `path` is as the trace has it, so it may be hostile; "" for anonymous memory, None if unknown.
    """

    vm: int
    start: int
    end: int
    flags: tuple[str, ...]
    path: str | None

    def __str__(self) -> str:
        """Return for example "/dev/dri/card0 (VM_PFNMAP, VM_IO)"."""
        name = UNKNOWN_FILE if self.path is None else self.path or "anonymous memory"
        return f"{name} ({', '.join(self.flags)})" if self.flags else name


class Mappings:
    """All mappings that a trace tells of."""

    def __init__(self, vmas: pd.DataFrame, notes: Iterable[Mapping[str, Any]]) -> None:
        """Take the VMA records (vm, hva, hva_end, vm_flags, rdev), oldest first, and the notes."""
        notes = list(notes)
        noted = [mapping for note in notes for mapping in _of_slot_note(note)]
        devices = dict(device for note in notes for device in _of_device_note(note))
        # In this order, since of those that overlap the later one is right.
        self._all = [*dict.fromkeys(noted), *_of_records(vmas, devices, noted)]
        self._of_vm: dict[int, list[int]] = {}
        for at, mapping in enumerate(self._all):
            self._of_vm.setdefault(mapping.vm, []).append(at)

    def __iter__(self) -> Iterator[VmaMapping]:
        """Yield all mappings; of those that overlap the later one is right."""
        return iter(self._all)

    def find_all(self, table: pd.DataFrame) -> list[VmaMapping | None]:
        """Return the mapping of each row of a table with the columns vm and hva.

        None where the trace tells of no mapping at that address of the VM's process.
        """
        vm = table["vm"].to_numpy(dtype=np.int64, na_value=0)
        hva = table["hva"].to_numpy(dtype=np.uint64, na_value=0)
        order = np.lexsort((hva, vm))
        owner = np.full(len(table), -1, np.int64)
        bounds = np.flatnonzero(np.diff(vm[order])) + 1
        for rows in np.split(order, bounds):
            if len(rows):
                owner[rows] = self._owners(self._of_vm.get(int(vm[rows[0]]), []), hva[rows])
        return [self._all[at] if at >= 0 else None for at in owner]

    def find(self, vm: int, hva: int) -> VmaMapping | None:
        """Return the mapping at one address, as `find_all` would."""
        mine = (self._all[at] for at in reversed(self._of_vm.get(vm, [])))
        return next((one for one in mine if one.start <= hva < one.end), None)

    def _owners(self, mine: list[int], hva: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Return the index in `_all` for each of some sorted addresses of one VM."""
        owner = np.full(len(hva), -1, np.int64)
        starts = np.searchsorted(hva, np.array([self._all[at].start for at in mine], np.uint64))
        ends = np.searchsorted(hva, np.array([self._all[at].end for at in mine], np.uint64))
        for at, start, end in zip(mine, starts, ends, strict=True):
            owner[start:end] = at
        return owner


def numbered(mappings: Iterable[VmaMapping | None]) -> list[int]:
    """Return a number for each mapping, equal ones having the same: a key to group by."""
    numbers: dict[VmaMapping | None, int] = {}
    return [numbers.setdefault(mapping, len(numbers)) for mapping in mappings]


def _of_slot_note(note: Mapping[str, Any]) -> Iterator[VmaMapping]:
    slot, vmas = note.get("slot"), note.get("vmas")
    if not isinstance(slot, dict) or not isinstance(vmas, list):
        return
    vm = slot.get("vm")
    for vma in vmas:
        if not isinstance(vma, dict) or not isinstance(vm, int):
            continue
        start, end = vma.get("start"), vma.get("end")
        path, flags = vma.get("path"), vma.get("flags")
        if not isinstance(start, int) or not isinstance(end, int) or not 0 <= start < end < _WORD:
            continue
        letters = [str(f) for f in flags] if isinstance(flags, list) else []
        name = path if isinstance(path, str) else None
        yield VmaMapping(vm, start, end, vm_flag_names(smaps=letters), name)


def _of_device_note(note: Mapping[str, Any]) -> Iterator[tuple[int, str]]:
    device = note.get("device")
    if isinstance(device, dict):
        rdev, path = device.get("rdev"), device.get("path")
        if isinstance(rdev, int) and isinstance(path, str) and path:
            yield rdev, path


def _of_records(
    vmas: pd.DataFrame, devices: Mapping[int, str], noted: list[VmaMapping]
) -> Iterator[VmaMapping]:
    columns = ["vm", "hva", "hva_end", "vm_flags", "rdev"]
    if not len(vmas):
        return
    # One thread that faults in two mappings by turns writes a record each time.
    for vm, start, end, flags, rdev in (
        vmas[columns]
        .astype("UInt64")
        .fillna(0)
        .drop_duplicates(keep="last")
        .itertuples(index=False)
    ):
        path = devices.get(int(rdev)) if rdev else None
        if path is None:
            path = _noted_path(noted, int(vm), int(start), int(end) if rdev else None)
        if path is None and rdev:
            path = f"device {int(rdev) >> 20}:{int(rdev) & 0xFFFFF}"
        yield VmaMapping(int(vm), int(start), int(end), vm_flag_names(int(flags)), path)


def _noted_path(noted: list[VmaMapping], vm: int, start: int, end: int | None) -> str | None:
    """Return the path that a slot note has for an address, or for exactly [start, end)."""
    for m in noted:
        if m.vm == vm and m.path and m.start <= start < m.end and end in (None, m.end):
            return m.path
    return None
