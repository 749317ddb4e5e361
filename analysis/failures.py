"""Faults that failed, and why: grouped by VM, slot, mapping, errno and reason.

A fault failed if it returned an errno, or if KVM met a page that it cannot map (poisoned, or
read-only where the guest wrote). A fault without a memslot is MMIO and no failure; one that KVM
retries has no page yet and is none either. May import: numpy, pandas, `analysis.mappings`,
`analysis.pages`, `analysis.tables`, `probes.wire`.
"""

import dataclasses
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from analysis.mappings import Mappings, VmaMapping, numbered
from analysis.pages import frame_of, pfn_error
from analysis.tables import largest_groups, stack
from probes.wire import PAGE_BITS

__all__ = (
    "FAILED_COLUMNS",
    "REASONS",
    "Block",
    "Failure",
    "Head",
    "block_of",
    "failed_faults",
    "failures",
    "head_before",
    "reasons",
    "walked_heads",
)

#: In the order in which `reasons` tries them; `analysis.explain` words them.
REASONS = (
    "poisoned",
    "read-only",
    "signal",
    "uncounted",
    "free page",
    "count 0",
    "refused",
    "no slot",
    "early",
    "not asked",
    "not seen",
    "no memory",
    "not mapped",
)
#: What must be equal for two faults to be counted as one.
_SAME = (
    *("vm", "tgid", "vcpu", "slot", "gfn", "hva", "pfn", "frame", "page", "ret", "faultin_ret"),
    *("error_code", "refcount", "prefetch", "early", "asked"),
)
#: Columns of a FAULT table that `failed_faults` takes, `page` being its class.
FAILED_COLUMNS = [
    *("ts", "vm", "tgid", "vcpu", "slot", "gfn", "hva", "pfn", "walk_pfn", "page", "ret"),
    *("faultin_ret", "error_code", "refcount", "prefetch", "t_faultin", "t_gup"),
]

_EINTR, _EFAULT = 4, 14
_ERR_FAULT = 0x7FF << 52
_HWPOISON, _RO_FAULT, _SIGPENDING = _ERR_FAULT + 1, _ERR_FAULT + 2, _ERR_FAULT + 3
#: PFERR_WRITE_MASK and PFERR_FETCH_MASK, arch/x86/include/asm/kvm_host.h.
_WRITE, _FETCH = 1 << 1, 1 << 4


@dataclasses.dataclass(frozen=True, slots=True)
class Failure:
    """Faults that failed alike; `gfn`, `hva`, `frame` and `vcpu` are those of the first.

    `faults` is how often, `gfns` on how many guest pages, up to `gfn_last`; `died` is whether no
    fault of any of the vCPUs succeeded afterwards; `prefetch` is whether the guest did not ask for
    the page. `errno` is 0 if KVM returned none. Times are ns.
    """

    reason: str
    vm: int
    tgid: int
    vcpu: int
    vcpus: int
    slot: int | None
    mapping: VmaMapping | None
    errno: int
    error: str
    access: str
    gfn: int
    gfn_last: int
    gfns: int
    hva: int
    frame: int | None
    faults: int
    first_ts: int
    last_ts: int
    prefetch: bool
    died: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Head:
    """A page before a failed one that was mapped: `count` at the end of its fault."""

    frame: int
    gfn: int
    count: int
    ts: int


@dataclasses.dataclass(frozen=True, slots=True)
class Block:
    """A non-compound block of 2^order pages that was freed as one."""

    frame: int
    order: int
    ts: int


def failed_faults(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Add up failed faults: the table so far (may be empty), then FAULT rows of FAILED_COLUMNS.

    Returns one row for each combination of `_SAME` with `faults`, `first_ts` and `last_ts`.
    """
    *before, fresh = parts
    pfn = fresh["pfn"].to_numpy(dtype=np.uint64, na_value=0)
    unmappable = (pfn == _HWPOISON) | (pfn == _RO_FAULT)
    fresh = fresh[(fresh["ret"] < 0).to_numpy() | unmappable]
    if not len(fresh):
        return before[0] if before else fresh
    fresh = fresh.assign(
        # A file may come from anyone: a record need not name its VM.
        vm=fresh["vm"].fillna(0),
        vcpu=fresh["vcpu"].fillna(-1),
        ret=fresh["ret"].fillna(0),
        frame=frame_of(fresh),
        page=fresh["page"].astype(str),
        early=fresh["t_faultin"].isna(),
        asked=fresh["t_gup"].notna(),
        faults=1,
        first_ts=fresh["ts"],
        last_ts=fresh["ts"],
    )[[*_SAME, "faults", "first_ts", "last_ts"]]
    return (
        stack([*before, fresh])
        .groupby(list(_SAME), dropna=False, sort=False, observed=True)
        .agg(faults=("faults", "sum"), first_ts=("first_ts", "min"), last_ts=("last_ts", "max"))
        .reset_index()
    )


def walked_heads(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Collect pages that a PFNMAP walk found and that had a count: heads of blocks, perhaps.

    Takes the table so far, then FAULT rows; returns vm, frame, gfn, count (at the end of the
    fault, KVM's own reference given back), ts; one row for each page, its newest.
    """
    *before, fresh = parts
    if "walk_pfn" not in fresh or not fresh["walk_pfn"].notna().any():
        return before[0] if before else fresh.iloc[:0]
    fresh = fresh[(fresh["walk_pfn"].notna() & (fresh["refcount"].fillna(0) > 0))]
    heads = pd.DataFrame(
        {
            "vm": fresh["vm"],
            "frame": fresh["walk_pfn"],
            "gfn": fresh["gfn"],
            "count": fresh["refcount_end"].fillna(fresh["refcount"]),
            "ts": fresh["ts"],
        }
    )
    return stack([*before, heads]).drop_duplicates(["vm", "frame"], keep="last")


def reasons(
    failed: pd.DataFrame, *, takes_reference: bool, hooks: Collection[str] = ("gup", "walk")
) -> pd.Series:
    """Return why each row of `failed_faults` failed, one of REASONS.

    `takes_reference` is whether KVM of this generation takes a reference to the page of every
    fault, so that a count of 0 is what made it fail. `hooks` were attached: without gup nobody saw
    whether KVM asked the host for a page, without walk not whether it refused one.
    """
    pfn = failed["pfn"].to_numpy(dtype=np.uint64, na_value=0)
    ret = failed["ret"].to_numpy(dtype=np.int64, na_value=0)
    page = failed["page"].to_numpy(dtype=str)
    asked = failed["asked"].to_numpy(dtype=bool) | ("gup" not in hooks)
    walked = failed["frame"].notna().to_numpy() & (pfn >= _ERR_FAULT)
    refused = walked & (ret == -_EFAULT)
    conditions: dict[str, npt.NDArray[np.bool_]] = {
        "poisoned": pfn == _HWPOISON,
        "read-only": pfn == _RO_FAULT,
        "signal": (pfn == _SIGPENDING) | (ret == -_EINTR),
        "uncounted": refused & (page == "uncounted") & takes_reference,
        "free page": refused & (page == "free"),
        "count 0": refused & (page == "count 0, compound or typed") & takes_reference,
        "refused": refused,
        "no slot": failed["slot"].isna().to_numpy() & ~asked,
        "early": failed["early"].to_numpy(dtype=bool),
        "not asked": ~asked & (failed["faultin_ret"] < 0).to_numpy(dtype=bool, na_value=False),
        "not seen": (pfn >= _ERR_FAULT) & ("walk" not in hooks),
        "no memory": pfn >= _ERR_FAULT,
    }
    chosen = np.select(list(conditions.values()), list(conditions), "not mapped")
    return pd.Series(chosen, index=failed.index)


def failures(
    failed: pd.DataFrame,
    mappings: Mappings,
    alive: Mapping[tuple[int, int], int],
    *,
    takes_reference: bool,
    hooks: Collection[str] = ("gup", "walk"),
    limit: int = 20,
) -> list[Failure]:
    """Group what `failed_faults` returned: the `limit` most frequent groups, those first.

    `alive` is (vm, vcpu) -> ts of the vCPU's last fault that did not fail.
    """
    if not len(failed):
        return []
    table = failed.assign(
        reason=reasons(failed, takes_reference=takes_reference, hooks=hooks),
        mapping=pd.Series(mappings.find_all(failed), index=failed.index, dtype=object),
    ).sort_values("first_ts", kind="stable")
    table["place"] = numbered(table["mapping"])
    keys = ["vm", "slot", "place", "ret", "reason", "prefetch"]
    return [_failure(rows, alive) for rows in largest_groups(table, keys, "faults", limit)]


def _failure(rows: pd.DataFrame, alive: Mapping[tuple[int, int], int]) -> Failure:
    first = rows.iloc[0]
    vcpus = [(int(vm), int(vcpu)) for vm, vcpu in {*zip(rows["vm"], rows["vcpu"], strict=True)}]
    last = {key: 0 for key in vcpus}
    for vm, vcpu, ts in zip(rows["vm"], rows["vcpu"], rows["last_ts"], strict=True):
        last[int(vm), int(vcpu)] = max(last[int(vm), int(vcpu)], int(ts))
    gfns = rows["gfn"].dropna()
    pfn = 0 if pd.isna(first["pfn"]) else int(first["pfn"])
    return Failure(
        reason=str(first["reason"]),
        vm=int(first["vm"]),
        tgid=0 if pd.isna(first["tgid"]) else int(first["tgid"]),
        vcpu=int(first["vcpu"]),
        vcpus=len(vcpus),
        slot=None if pd.isna(first["slot"]) else int(first["slot"]),
        mapping=first["mapping"],
        errno=max(0, -int(first["ret"])),
        error=pfn_error(pfn),
        access=_access(first["error_code"]),
        gfn=0 if pd.isna(first["gfn"]) else int(first["gfn"]),
        gfn_last=int(gfns.max()) if len(gfns) else 0,
        gfns=int(gfns.nunique()),
        hva=0 if pd.isna(first["hva"]) else int(first["hva"]),
        frame=None if pd.isna(first["frame"]) else int(first["frame"]),
        faults=int(rows["faults"].sum()),
        first_ts=int(rows["first_ts"].min()),
        last_ts=int(rows["last_ts"].max()),
        prefetch=bool(pd.notna(first["prefetch"]) and first["prefetch"]),
        died=all(alive.get(key, 0) < ts for key, ts in last.items()),
    )


def _access(error_code: object) -> str:
    if pd.isna(error_code):
        return "access"
    bits = int(error_code)  # type: ignore[call-overload]
    return "write" if bits & _WRITE else "fetch" if bits & _FETCH else "read"


def head_before(failure: Failure, heads: pd.DataFrame, block: Block | None) -> Head | None:
    """Return the page with a count whose block the failed page is in: see `walked_heads`.

    Only the frame right before says so by itself; one farther off needs the block.
    """
    if not failure.frame or not len(heads):
        return None
    at = block.frame if block else failure.frame - 1
    near = heads[(heads["vm"] == failure.vm) & (heads["frame"] == at)]
    if not len(near) or at == failure.frame:
        return None
    row = near.iloc[-1]
    return Head(at, int(row["gfn"]), int(row["count"]), int(row["ts"]))


def block_of(failure: Failure, blocks: pd.DataFrame) -> Block | None:
    """Return the first block that was freed after the failure and holds the page, from PAGE_FREE.

    Compound ones are left out: the count of their tails is that of the head.
    """
    if failure.frame is None or not len(blocks):
        return None
    compound = PAGE_BITS["head"] | PAGE_BITS["tail"]
    first = blocks["pfn"].to_numpy(dtype=np.uint64, na_value=0)
    order = np.minimum(blocks["order"].to_numpy(dtype=np.uint64, na_value=0), 63)
    bits = blocks["page_bits"].to_numpy(dtype=np.int64, na_value=0)
    ts = blocks["ts"].to_numpy(dtype=np.uint64, na_value=0)
    frame = np.uint64(failure.frame)
    inside = (first <= frame) & ((frame - first) >> order == 0)
    found = np.flatnonzero(inside & (bits & compound == 0) & (ts > failure.last_ts))
    if not len(found):
        return None
    at = found[np.argmin(ts[found])]
    return Block(int(first[at]), int(order[at]), int(ts[at]))
