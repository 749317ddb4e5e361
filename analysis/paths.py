"""Which way a fault took through KVM, and how long each stage of it was, from its FAULT record.

A record has the times at which a fault reached the hooks, and no others: so the paths below are
what can be told apart, and their number does not grow with wishes. The fast and the slow half of
get_user_pages (hva_to_pfn_fast(), hva_to_pfn_slow(), virt/kvm/kvm_main.c) are inlined into
hva_to_pfn() and look alike; how long that stage was is the only hint. Pure functions over columns
of one table. May import: numpy, pandas.
"""

import numpy as np
import numpy.typing as npt
import pandas as pd

__all__ = ("PATHS", "PATH_COLUMNS", "STAGES", "path_of", "stage_times")

#: Path -> what it means. A fault has the first one that fits.
PATHS: dict[str, str] = {
    "lockless": "no fault-in: the SPTE was there and got what the access lacked, without mmu_lock "
    "(fast_page_fault)",
    "guest's own": "no fault-in: the guest's own page tables have no such mapping, the fault went "
    "to the guest (shadow MMU)",
    "early": "no fault-in for another reason: a write to a table that KVM shadows, or no memory",
    "PFNMAP": "the host's mapping has no pages that can be taken: KVM walked its page table",
    "GUP": "the page came by get_user_pages, fast or slow: the records cannot tell which",
    "MMIO": "no memslot: emulated, or left to user space",
    "no GUP": "fault-in ended without get_user_pages: an invalidation or a change of memslots was "
    "under way (retry), the APIC page (emulate), or memory of guest_memfd",
    "not known": "fault-in, but by which way was not seen: hook gup was not attached",
}
#: Columns of a FAULT table that `path_of` and `stage_times` take.
PATH_COLUMNS = (
    *("mmu", "result", "slot", "walk_pfn", "dur"),
    *("t_faultin", "t_gup", "t_gup_end", "t_faultin_end", "t_map"),
)
#: Stage -> what happens in it; a fault has those that it reached.
STAGES: dict[str, str] = {
    "all": "the whole fault",
    "entry": "until fault-in: lockless attempt, memory for tables; shadow MMU: walk of the guest's "
    "tables",
    "before hva_to_pfn": "in fault-in: memslot, checks for invalidations under way",
    "hva_to_pfn": "get_user_pages or PFNMAP walk, with all sleep for swap, I/O and other threads; "
    "of two calls both",
    "after hva_to_pfn": "the rest of fault-in: checks",
    "fault-in": "all of it, where hva_to_pfn() was not called",
    "lock": "wait for mmu_lock, check for staleness; shadow MMU: walk of its tables",
    "map": "install, reference given back; TDP MMU: walk of its tables",
    "give up": "from fault-in to the end of a fault that mapped nothing",
}
#: Results after which the guest has a mapping; in `lockless` one that it had.
_MAPPED = ("fixed", "spurious")


def path_of(table: pd.DataFrame) -> pd.Series:
    """Return the path of each row of a FAULT table, a category of PATHS.

    Without hook `walk`, PFNMAP faults count as GUP, since hva_to_pfn() is where the walk begins;
    without hook `gup`, what is called `no GUP` here is `not known`.
    """
    began = table["t_faultin"].notna().to_numpy()
    asked = table["t_gup"].notna().to_numpy()
    slot = table["slot"].notna().to_numpy()
    result = table["result"].astype(object).to_numpy()
    conditions: dict[str, npt.NDArray[np.bool_]] = {
        "lockless": ~began & np.isin(result, _MAPPED),
        # FNAME(page_fault), arch/x86/kvm/mmu/paging_tmpl.h: RET_PF_RETRY is what is left once the
        # walk of the guest's tables has failed and the fault was injected.
        "guest's own": ~began & (result == "retry") & (table["mmu"] == "shadow").to_numpy(),
        "early": ~began,
        "PFNMAP": table["walk_pfn"].notna().to_numpy(),
        "GUP": asked,
        "MMIO": ~slot,
    }
    names = list(PATHS)
    codes = [names.index(name) for name in conditions]
    chosen = np.select(list(conditions.values()), codes, names.index("no GUP"))
    return pd.Series(pd.Categorical.from_codes(chosen, names), index=table.index)


def stage_times(table: pd.DataFrame) -> dict[str, npt.NDArray[np.int64]]:
    """Return stage -> ns of each row of a FAULT table, -1 where the fault did not reach it.

    The stages of a fault that came to the end of fault-in add up to `all`. Times that are not in
    order (no kernel writes such, but a file may come from anyone) count as not reached.
    """
    at = {name: _ns(table[name]) for name in PATH_COLUMNS if name.startswith("t_")}
    end = _ns(table["dur"])
    began, done, mapped = at["t_faultin"], at["t_faultin_end"], at["t_map"]
    asked, given = at["t_gup"], at["t_gup_end"]
    no_gup = (asked < 0) | (given < 0)
    times = {
        "all": end,
        "entry": began,
        "before hva_to_pfn": _between(began, np.where(no_gup, -1, asked)),
        "hva_to_pfn": _between(asked, given),
        "after hva_to_pfn": _between(np.where(no_gup, -1, given), done),
        "fault-in": _between(np.where(no_gup, began, -1), done),
        "lock": _between(done, mapped),
        "map": _between(mapped, end),
        "give up": _between(np.where(mapped < 0, done, -1), end),
    }
    return times


def _ns(column: pd.Series) -> npt.NDArray[np.int64]:
    return np.asarray(column.to_numpy(dtype=np.int64, na_value=-1), np.int64)


def _between(begin: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    return np.where((begin >= 0) & (end >= begin), end - begin, -1)
