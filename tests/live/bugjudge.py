"""What a changed KVM says of itself, and how an answer of pfntrace is held against that.

Nothing here boots or reads a trace: plain data in, "" or what is wrong out. Imports ``bugrows``.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from live.bugrows import Row

__all__ = (
    "ANOMALIES",
    "Truth",
    "judge",
    "judge_recording",
    "judge_replay",
    "pages_of",
    "truth_between",
    "truth_of",
)

ANOMALIES = ("definite", "probable")
#: The one detector whose findings are about faults, not about pages.
PAGELESS = "livelock"
LINE = re.compile(r"^(?:(\w+) )?gfn=(0x[0-9a-f]+) pfn=(0x[0-9a-f]+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Truth:
    """How often something happened, and on which pages; of an early end, within bounds.

    Of a pfn or gfn that the change does not know it says 0, which is in no set.
    """

    hits: int
    pfns: frozenset[int]
    gfns: frozenset[int] = frozenset()
    first_pfn: int = 0
    """Of the first time."""
    victims: frozenset[int] = frozenset()
    """Other pages that it hurts."""
    freed: tuple[int, frozenset[int]] = (0, frozenset())
    """The times and pages of it that were free already."""
    sure_hits: int | None = None
    sure_pfns: frozenset[int] | None = None
    """What had surely happened by then, where the end is not exact."""

    @property
    def least(self) -> tuple[int, frozenset[int]]:
        """The times and pages that must be found."""
        hits = self.hits if self.sure_hits is None else self.sure_hits
        return hits, self.pfns if self.sure_pfns is None else self.sure_pfns


def truth_of(text: str) -> Truth:
    """Read what `planted` wrote.

    >>> truth = truth_of("hits: 2\\ngfn=0x1 pfn=0x10\\nvictim gfn=0x2 pfn=0x11\\n")
    >>> truth.hits, truth.pfns, truth.victims
    (2, frozenset({16}), frozenset({17}))
    """
    hits = re.search(r"^hits: (\d+)$", text, re.MULTILINE)
    return _truth(int(hits[1]) if hits else 0, _lines(text))


def truth_between(text: str, least: int, most: int) -> Truth:
    """Read what `planted` wrote, of the first `least` to `most` times."""
    lines = [line for line in _lines(text) if not line[0]]
    hits, sure = _truth(most, lines[:most]), _truth(least, lines[:least])
    return Truth(
        hits.hits, hits.pfns, hits.gfns, hits.first_pfn, sure_hits=least, sure_pfns=sure.pfns
    )


def _lines(text: str) -> list[tuple[str, int, int]]:
    return [(word, int(gfn, 16), int(pfn, 16)) for word, gfn, pfn in LINE.findall(text)]


def _truth(hits: int, lines: Sequence[tuple[str, int, int]]) -> Truth:
    def pfns(which: str) -> list[int]:
        return [pfn for word, _, pfn in lines if word == which and pfn]

    own = pfns("")
    return Truth(
        hits,
        frozenset(own),
        frozenset(gfn for word, gfn, _ in lines if not word) - {0},
        own[0] if own else 0,
        frozenset(pfns("victim")),
        (len(pfns("freed")), frozenset(pfns("freed"))),
    )


def pages_of(finding: Mapping[str, Any], name: str = "pfns") -> frozenset[int]:
    """Return all frames that a finding names."""
    return frozenset(frame for first, last in finding[name] for frame in range(first, last + 1))


def judge_recording(row: Row, made: Mapping[str, Any], info: Mapping[str, Any], said: str) -> str:
    """Return what is wrong with a recording itself: its age, its end, what the workload said.

    `made` is when its boot began and ended (s, Unix time) and the exit status of its script,
    `info` what `pfntrace info --json` says, `said` what record and the workload printed.
    """
    start = info["start_unix_ns"] / 1e9
    if not made["begun"] <= start <= made["ended"]:
        return "the trace is not of this boot"
    if not info["records"]:
        return "the trace is empty"
    if not info["complete"] or info["lost"]:
        return "not all was recorded"
    cut = "ended by duration" in said
    if cut != row.early:
        return "the recording ended before the guest" if cut else "the guest ended before it"
    if not cut and "ended by command" not in said:
        return "the recording did not end by itself"
    # `record` ends with its command's status and says so; another one is its own.
    ended = re.search(r"command exited with status (-?\d+)", said)
    status = int(ended[1]) if ended else 0
    if made.get("status", status) != (0 if cut else status):
        return f"pfntrace record ended with status {made['status']}"
    status = made.get("workload", status)
    if status not in row.status:
        return f"the workload ended with status {status}"
    return ""


def judge(row: Row, truth: Truth | None, checked: Mapping[str, Any]) -> str:
    """Return what is wrong with what `pfntrace check --json` said; "" if nothing is."""
    findings = checked["findings"]
    why = _whole(row, checked)
    if why:
        return why
    found = [item for item in findings if item["verdict"] in ANOMALIES]
    unsure = [item for item in findings if item["verdict"] == "inconclusive"]
    explained = [
        item
        for item in findings
        if item["verdict"] == "explained" and item["detector"] != row.may_explain
    ]
    for item in explained:
        if item["detector"] != row.explained_by:
            return f"{item['detector']} explains what did not happen"
    if row.explained_by and not explained:
        return f"not explained by {row.explained_by}"
    if not row.found_by:
        for item in (*found, *unsure):
            return f"nothing is wrong, and {item['detector']} is {item['verdict']}"
        return ""
    if truth is None:
        return "what happened is not known"
    if not truth.hits:
        return "it did not happen"
    return _only(row, truth, (*found, *unsure)) or _exact(row, truth, found)


def _whole(row: Row, checked: Mapping[str, Any]) -> str:
    if not checked["records"]:
        return "no records"
    if not checked["complete"] or checked["lost"] or checked["missing"]:
        return "not all was recorded"
    for item in checked["unanswerable"]:
        if row.silent.get(item["detector"], "\0") not in item["reason"]:
            return f"{item['detector']} did not answer"
    return ""


def _only(row: Row, truth: Truth, found: Sequence[Mapping[str, Any]]) -> str:
    """Return what is found that is not there."""
    for item in found:
        detector, named = item["detector"], pages_of(item)
        if detector not in (*row.found_by, *row.leads_to):
            return f"{detector} has nothing to find"
        if not item["evidence"]:
            return f"{detector} shows no evidence"
        if detector == PAGELESS:
            if truth.gfns and not pages_of(item, "gfns") <= truth.gfns:
                return f"{detector} names other guest pages"
            continue
        if not named:
            return f"{detector} names no page"
        if item["pages"] != len(named) and not item["more"]:
            return f"{detector} counts other pages than it names"
        may = truth.pfns | truth.victims if detector in row.leads_to else truth.pfns
        if not named <= may:
            return f"{detector} names other pages"
    return ""


def _exact(row: Row, truth: Truth, found: Sequence[Mapping[str, Any]]) -> str:
    """Return what is not found: the pages, the times, and those that were free."""
    named = [item for item in found if item["detector"] in row.found_by]
    if not named:
        return f"not found by {' or '.join(row.found_by)}"
    hits, pfns = truth.least
    whole = [item for item in (*named, *_joined(named)) if _names_enough(row, item, pfns, truth)]
    if not whole:
        return f"of {len(pfns):,} pages {max(item['pages'] for item in named):,} are named"
    if not row.repeats and not any(
        hits * row.share <= item["count"] <= truth.hits for item in whole
    ):
        return f"another count: it happened {truth.hits:,} times"
    times, freed = truth.freed
    if times and not any((item["count"], pages_of(item)) == (times, freed) for item in named):
        return f"nobody says which {times:,} were free"
    return ""


def _joined(named: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """Yield what a detector said in parts, each on pages of its own, as one."""
    for detector in {item["detector"] for item in named}:
        parts = [item for item in named if item["detector"] == detector]
        pages = sum(item["pages"] for item in parts)
        if pages == len(frozenset().union(*(pages_of(item) for item in parts))):
            pfns = [pair for item in parts for pair in item["pfns"]]
            count = sum(item["count"] for item in parts)
            yield {**parts[0], "count": count, "pages": pages, "pfns": pfns}


def _names_enough(row: Row, item: Mapping[str, Any], pfns: frozenset[int], truth: Truth) -> bool:
    if item["detector"] == PAGELESS:
        return True
    # Of more ranges than a finding names, the number of pages has to do.
    if item["more"]:
        return len(pfns) * row.share <= item["pages"] <= len(truth.pfns)
    return len(pages_of(item) & pfns) >= len(pfns) * row.share


def judge_replay(row: Row, truth: Truth | None, said: Mapping[str, Any]) -> tuple[str, bool]:
    """Return in a few words what the model makes of a recording, and whether that is right.

    Where a record is wrong the model must leave at one that is about a planted page: by its pfn, by
    the pfn that was expected of it, or, of a record without a page, by what it is. What the model
    follows as far as that is not held against anything else.
    """
    if not said["records"]:
        return "no records", False
    if said["conforms"]:
        return f"conforms to {said['kernel']}", row.replays is not False
    divergence = said["first_divergence"]
    if divergence is None:
        return "stops early: the recording has no end", False
    first, expected = divergence["record"], divergence["expected"]
    what = first.get("op") or first.get("call") or first.get("result") or ""
    record = f"{first['kind']} {what}".strip()
    words = f"leaves {said['kernel']} at record {said['explained'] + 1:,} of {said['records']:,}: "
    words += record
    pages = {
        first.get("pfn"),
        *(int(pfn, 16) for pfn in re.findall(r"pfn (0x[0-9a-f]+)", expected)),
    }
    if truth is not None and truth.first_pfn in pages:
        return f"{words}, first planted page", row.replays is not True
    if truth is not None and pages & truth.pfns:
        return f"{words}, a planted page", row.replays is not True
    if row.leaves == record and first.get("pfn") is None:
        return f"{words}, planted", row.replays is not True
    return f"{words}, where nothing is planted", False
