"""Why a cell of docs/SIMULATION.md is not 1.00: an explanation for each, held beside the numbers.

The soak (`simsoak`) fails if a cell that is not 1.00 has none, if a cell falls below `at_least`, or
if a cell has become 1.00 and its explanation is still here.
"""

import dataclasses
import math

from unit.simtruth import CONSEQUENCES, FINDS

from tracer.simulator.bugs import BUGS

__all__ = (
    "DETECTORS",
    "ENOUGH",
    "HOSTILE",
    "PAGES",
    "PLENTY",
    "Excuse",
    "excuse",
    "explained",
    "shown",
)

#: Seeds from which on a cell that is 1.00 must have no explanation.
ENOUGH = 20
#: Seeds from which on that holds for what goes wrong seldom, too.
PLENTY = 1000
_HIDDEN = ("v7", "v8", "v10", "v11")


@dataclasses.dataclass(frozen=True, slots=True)
class Excuse:
    """Why a number is below 1.00 on some kernels (those of the bug if none are given)."""

    why: str
    kernels: tuple[str, ...] = ()
    at_least: float = 0.0
    #: so seldom below 1.00 that few seeds may not show it
    seldom: bool = False


_NO_PUT = Excuse(
    "no record shows this kernel's put, it is inside of the fault-in function", _HIDDEN
)
_NO_MARK = Excuse("zaps of this kernel touch no page", ("6.13",))
_KEPT = Excuse("this kernel keeps every reference, so that the page is never freed", ("v9-mailed",))

#: (bug, detector) -> why this detector does not name this bug in every run.
DETECTORS: dict[tuple[str, str], tuple[Excuse, ...]] = {
    ("missing_put", "balance"): (_NO_PUT,),
    ("missing_put_shadow", "balance"): (_NO_PUT,),
    **{
        (bug, "growth"): (
            Excuse("few of many pages keep one reference: balance, which sees the put, tells it",
                   ("6.1", "6.12", "v9", "6.13")),
        )
        for bug in ("missing_put", "missing_put_shadow")
    },
    ("double_put", "balance"): (_NO_PUT,),
    ("double_put", "dead-mark"): (_NO_MARK,),
    ("double_put", "refcounted-flag"): (
        Excuse("only where a leaf was made after the page was freed, and has the series' bit"),
    ),
    ("put_on_wrong_folio", "balance"): (
        Excuse("only where the folio that lost a reference had no other left"),
    ),
    ("put_on_wrong_folio", "dead-mark"): (
        Excuse("only where the folio that lost a reference had no other left when it was zapped",
               seldom=True),
    ),
    ("resurrect", "balance"): (_NO_PUT,),
    ("use_after_put", "dead-mark"): (
        Excuse("each of its pages was handed out again before it was marked, and had a count",
               at_least=0.99, seldom=True),
    ),
    ("unpaired_start", "livelock"): (
        Excuse("it struck within the last millisecond: no vCPU faulted in its range again, so that "
               "nothing got stuck", ("6.1", "6.12", "v9"), at_least=0.99, seldom=True),
    ),
    ("resurrect", "refcounted-flag"): (
        Excuse("there is no flag, or the count is 1 when it is looked at: the fault holds the page",
               ("6.1", "6.12", "v9")),
    ),
    ("resurrect", "use-after-free"): (
        Excuse("the page is freed inside of the fault-in function, before a leaf maps it", _HIDDEN),
    ),
    ("stale_spte", "dead-mark"): (
        Excuse("only where the leaf that was overlooked is zapped while its page is free",
               ("6.1", "6.12", *_HIDDEN, "v9"), 0.2),
        _KEPT,
        _NO_MARK,
    ),
    ("stale_spte", "use-after-free"): (
        Excuse("only where the page that was let go had no other user",
               ("6.1", "6.12", *_HIDDEN, "v9", "6.13"), 0.8, True),
        _KEPT,
    ),
    ("stale_sequence", "dead-mark"): (
        Excuse("only where the leaf is zapped before the page is handed out again"),
    ),
    ("stale_sequence", "refcounted-flag"): (
        Excuse("only where the page was free when its leaf was made, and has the series' bit"),
    ),
    ("stale_sequence", "use-after-free"): (
        Excuse("the page may be freed before the leaf is made: then it is a mark or a flag",
               _HIDDEN),
        _KEPT,
    ),
    ("zero_page_growth", "balance"): (_NO_PUT,),
    ("zero_page_growth", "growth"): (
        Excuse("in a short story the count rises too seldom", ("6.12",), 0.8, True),
    ),
    ("wrong_flag", "balance"): (
        Excuse("no record shows a put, so that none is expected of what the flag says",
               ("v7", "v8")),
    ),
    ("wrong_flag", "dead-mark"): (_NO_MARK,),
    ("wrong_gfn", "dead-mark"): (_KEPT, _NO_MARK),
    ("wrong_gfn", "use-after-free"): (_KEPT,),
}  # fmt: skip

#: (bug, detector) -> why this detector, where it names the bug, does not name all of its pages.
PAGES: dict[tuple[str, str], tuple[Excuse, ...]] = {
    ("double_put", "use-after-free"): (
        Excuse("a page in an LRU batch has one reference more, and survives its second put",
               at_least=0.7),
    ),
    ("use_after_put", "dead-mark"): (
        Excuse("a page that was handed out again has a count when it is marked", at_least=0.4),
    ),
    ("stale_spte", "invalidation"): (
        Excuse("made within 20 us of the invalidation, on another cpu: clocks may differ so much",
               at_least=0.95, seldom=True),
    ),
    ("wrong_flag", "refcounted-flag"): (
        Excuse("said to be uncounted though it has a count: that alone proves nothing",
               at_least=0.3),
    ),
    ("unpaired_start", "livelock"): (
        Excuse("the count that is wrong is the VM's: no page is named"),
    ),
}  # fmt: skip

_LOST = "the records that show it are among the lost ones (that records were lost is always told)"
_ELSEWHERE = "it struck, or was to be seen, in the part of the story that was not recorded"
#: Hostile kind -> why a planted bug may be neither found nor doubted there.
HOSTILE: dict[str, str] = {
    "loss": _LOST,
    "drop": _LOST,
    "late": _ELSEWHERE,
    "truncate": _ELSEWHERE,
    "reorder": "an end that is written out of turn makes a count that never falls look only late",
}


def shown(value: float) -> str:
    """Return a share in two digits, or three if these would make it 1.00.

    >>> shown(1), shown(0.666), shown(0.9996)
    ('1.00', '0.67', '0.999')
    """
    text = f"{value:.2f}"
    return text if value >= 1 or text != "1.00" else f"{math.floor(1000 * value) / 1000:.3f}"


def excuse(found: tuple[Excuse, ...], kernel: str, value: float, seeds: int) -> tuple[str, str]:
    """Return (explanation of a cell, complaint about it); each is empty if there is none."""
    mine = [one for one in found if not one.kernels or kernel in one.kernels]
    if value >= 1:
        if mine and seeds >= (PLENTY if mine[0].seldom else ENOUGH) and mine[0].kernels:
            return "", f"is 1.00, and still explained: {mine[0].why}"
        return "", ""
    if not mine:
        return "", f"is {shown(value)}, and nothing explains it"
    if value < mine[0].at_least and seeds >= ENOUGH:
        return "", f"is {shown(value)}, less than {mine[0].at_least}"
    return mine[0].why, ""


def explained(bug: str, kernel: str, *, seldom: bool) -> bool:
    """Is it explained why none of its detectors may find a bug there, always or (too) seldom?"""
    return all(
        any(
            (not one.kernels or kernel in one.kernels) and (seldom or not one.seldom)
            for one in DETECTORS.get((bug, name), ())
        )
        for name in FINDS[bug]
    )


def check_names() -> list[str]:
    """Return what is said of bugs, detectors and kernels that do not go together."""
    told = []
    for table in (DETECTORS, PAGES):
        for (bug, name), excuses in table.items():
            if name not in FINDS[bug] | CONSEQUENCES.get(bug, set()):
                told.append(f"{bug}: {name} is not expected to find it")
            for one in excuses:
                told += [
                    f"{bug} makes no sense on {kernel}" for kernel in one.kernels
                    if kernel not in BUGS[bug].kernels
                ]  # fmt: skip
    return told
