"""What kind of page a finding is about, where its evidence knows: the zero page, a huge one, none.

A mapping's name says too little: behind anonymous memory may be the host's zero page, which every
guest shares. May import: `analysis`.
"""

import dataclasses
from typing import Any

from analysis.findings import Finding
from analysis.pages import page_class_names, row_frame

__all__ = ("page_words", "with_page")

#: Records that hold the state of the page that they are about.
_KINDS = ("FAULT", "SPTE", "RELEASE")
_WORDS = {
    "zero page": "the host's zero page, shared by all who read what was never written",
    "zone device": "memory of a device that has struct pages (ZONE_DEVICE)",
    "reserved": "reserved by the host (PG_reserved): nobody counts it",
    "no struct page": "memory without struct pages, as of a device",
    "counted, compound": "part of a compound page, as huge pages are",
    "uncounted": "with count 0 when it was mapped, and of no compound page: nobody counts it",
}


def with_page(finding: Finding) -> Finding:
    """Return the finding with `detail["page_class"]`, a name of PAGE_CLASSES, if it is telling.

    It is the class of the page that the evidence is about, by its first record.
    """
    rows = [row for row in finding.evidence if row.get("kind") in _KINDS]
    frames = finding.chain.pfns[:1] if finding.chain is not None else ()
    if not rows or not frames:
        return finding
    mine = [row for row in rows if row_frame(row) == frames[0]]
    for row, name in zip(mine, page_class_names(mine), strict=True):
        if name in _WORDS and (name != "uncounted" or _maps(row)):
            return dataclasses.replace(finding, detail={**finding.detail, "page_class": name})
        if name == "counted":
            break
    return finding


def _maps(row: dict[str, Any]) -> bool:
    """Tell whether a record is of the mapping of a page: later ones may be of a freed page."""
    return row["kind"] == "FAULT" or row.get("op") == "install"


def page_words(finding: Finding) -> str:
    """Return what a finding's page is for people, "" if it is a page like any."""
    words = _WORDS.get(str(finding.detail.get("page_class")), "")
    if "count 0" in words and "count 0" in finding.title:
        return ""
    return f"the first one is {words}" if words and finding.pages > 1 else words
