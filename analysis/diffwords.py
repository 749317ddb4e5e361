"""The words of `pfntrace diff`: plain figures first, then what can be said of them.

Computes nothing but differences. May import: `analysis`, `tracer.describe`.
"""

from collections.abc import Iterable, Iterator, Sequence

from analysis.diff import CountRow, Diff, FindingRow, TimeRow
from analysis.document import Block, Document, Facts, Section, Sentence, Table
from analysis.latency import BY
from analysis.noise import FAULTS_MIN, P_MAX
from analysis.text import document_lines, duration
from tracer.describe import printable, verdict_line

__all__ = ("diff_lines", "document")

#: VMs and memslots whose times are shown.
_PLACES_MAX = 10

#: Seen in the lab, demand_paging_test and prime-guest twice each on 6.1, 6.12 and 7.3.
_ALIKE = (
    "× is B's median by A's, the interval (95 %) what that ratio becomes when stretches of both "
    "traces are drawn anew. {stretches} So the interval says how much each recording drifts, not "
    "how much recordings differ: of one unchanged kernel, two have differed in the lab by up to "
    "7 % in whole faults and 25 % in short stages, mostly outside of such intervals. From one "
    "recording of each nobody can tell a patch from chance. Record each kernel five times or "
    "more, by turns, and compare the merged traces (pfntrace merge)."
)
_RECORDINGS = (
    "× is B's median by A's, the interval (95 %) what that ratio becomes when recordings of both "
    "are drawn anew. {stretches} p is how often chance makes the medians of the recordings differ "
    "so much (rank test); * marks those of at most {p_max}, and of {rows} rows {expected} would be "
    "marked by chance. Whether the patch made the difference, or what else was different, the "
    "traces do not say."
)


def diff_lines(diff: Diff) -> Iterator[str]:
    """Yield a comparison as lines of at most 80 columns, what both traces lost on the first."""
    yield from document_lines(document(diff))


def document(diff: Diff) -> Document:
    """Return a comparison in words."""
    a, b = diff.sides
    lost = any(side.info["lost"] or not side.info["complete"] for side in diff.sides)
    said = [printable(verdict_line(side.info)) for side in diff.sides]
    verdict = f"A and B: {said[0]}" if said[0] == said[1] else f"A: {said[0]}. B: {said[1]}"
    sections = (
        _recordings(diff),
        _faults(diff),
        _counts("classes", "Pages by class, at the end of fault-in", "class", diff.classes),
        _counts("installs", "Leaf SPTEs installed, by level and class", "leaf", diff.installs),
        _lives(diff),
        _anomalies(diff),
        _latency(diff),
        _places(diff),
    )
    return Document(
        title=f"pfntrace diff of {printable(a.path)} and {printable(b.path)}",
        verdict=verdict,
        tone="bad" if lost else "good",
        reservations=("Where records were lost, figures are lower bounds.",) * lost,
        numbers=(),
        sections=tuple(section for section in sections if section.blocks),
    )


def _recordings(diff: Diff) -> Section:
    items = [
        (name, f"{printable(side.path)}: {printable(side.info['kernel'])}, "
         f"{printable(side.info['generation'])}, {side.info['records']:,} records in "
         f"{side.info['duration_s']:,.1f} s")
        for name, side in zip("AB", diff.sides, strict=True)
    ]  # fmt: skip
    blocks: list[Block] = [Facts(tuple(items))]
    if diff.unlike:
        blocks.append(Sentence("They were not recorded alike:"))
        blocks += [
            Sentence(f"{printable(what)}: {printable(a) or '-'} in A, {printable(b) or '-'} in B",
                     hanging=True)
            for what, a, b in diff.unlike
        ]  # fmt: skip
        if any(what.startswith("hook ") for what, _, _ in diff.unlike):
            blocks.append(
                Sentence(
                    "A hook's own cost is in the times below: where it was attached otherwise, "
                    "times are not comparable."
                )
            )
    else:
        blocks.append(Sentence("Kernel, generation, hooks and command are the same."))
    return Section("recordings", "What is compared", tuple(blocks))


def _faults(diff: Diff) -> Section:
    a, b = diff.sides
    rows = [_count_cells(row) for row in diff.totals]
    per_page = [
        (
            f"faults per page, {printable(row.name)}",
            _share(row.a, a.pages),
            _share(row.b, b.pages),
            "",
            "",
        )
        for row in diff.results
    ]
    header = ("", "A", "B", "B - A", "B / A")
    blocks: list[Block] = [Table(header, tuple(rows), "lr")]
    if per_page:
        blocks.append(Table(("", "A", "B", "", ""), tuple(per_page), "lr"))
    blocks += _tables("result", diff.results) + _tables("path", diff.paths)
    return Section("faults", "Faults", tuple(blocks))


def _counts(key: str, title: str, what: str, rows: Sequence[CountRow]) -> Section:
    return Section(key, title, tuple(_tables(what, rows)))


def _tables(what: str, rows: Sequence[CountRow]) -> list[Block]:
    if not rows:
        return []
    header = (what, "A", "B", "B - A", "B / A", "share A", "share B")
    cells = tuple(
        (*_count_cells(row), _percent(row.a, row.a_of), _percent(row.b, row.b_of)) for row in rows
    )
    return [Table(header, cells, "lr")]


def _count_cells(row: CountRow) -> tuple[str, ...]:
    change = f"{row.b - row.a:+,}" if row.a != row.b else "="
    return (printable(row.name), f"{row.a:,}", f"{row.b:,}", change, _ratio(row.a, row.b))


def _ratio(a: float, b: float) -> str:
    return f"{b / a:.2f}" if a and b else "-"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.3f}" if whole else "-"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def _lives(diff: Diff) -> Section:
    blocks: list[Block] = []
    if any(row.a or row.b for row in diff.lives):
        header = ("", "A", "B", "B - A", "B / A")
        blocks.append(Table(header, tuple(_count_cells(row) for row in diff.lives), "lr"))
        blocks += _tables("ended by (cause)", diff.ends)
    if diff.lifetimes:
        titles = ("mapped for", "n A", "n B", "50 % A", "50 % B", "99 % A", "99 % B")
        rows = tuple(
            (f"{row.group} {printable(row.name)}", f"{row.a.n:,}", f"{row.b.n:,}",
             _ns(row.a.p50), _ns(row.b.p50), _ns(row.a.p99), _ns(row.b.p99))
            for row in diff.lifetimes
        )  # fmt: skip
        blocks.append(Table(titles, rows, "lr"))
        blocks.append(Sentence("Mappings seen from their begin to their end only."))
    return Section("lifetimes", "Lifetimes of mappings", tuple(blocks))


def _anomalies(diff: Diff) -> Section:
    rows = [row for row in diff.findings if row.verdict]
    blocks: list[Block] = []
    if rows:
        header = ("verdict", "detector", "A", "B", "pages A", "pages B", "")
        cells = tuple(
            (row.verdict, row.detector, _found(row.a), _found(row.b), f"{row.a_pages:,}",
             f"{row.b_pages:,}", _news(row))
            for row in rows
        )  # fmt: skip
        blocks.append(Table(header, cells, "llrrrrl"))
    else:
        blocks.append(Sentence("No detector found anything in either trace."))
    for row in diff.findings:
        if row.a is None or row.b is None:
            where = "A and B" if row.a is row.b else "A" if row.a is None else "B"
            blocks.append(
                Sentence(f"{row.detector} cannot answer for {where}: {printable(row.why)}", True)
            )
    return Section("anomalies", "Anomalies (see pfntrace check)", tuple(blocks))


def _found(count: int | None) -> str:
    return "?" if count is None else f"{count:,}"


def _news(row: FindingRow) -> str:
    if row.a is None or row.b is None:
        return ""
    return "NEW in B" if not row.a else "gone in B" if not row.b else ""


def _latency(diff: Diff) -> Section:
    if not diff.latency:
        return Section("latency", "", ())
    blocks: list[Block] = []
    for path, rows in _by_group(diff.latency):
        header = (path, "n A", "n B", "50 % A", "50 % B", "×", "interval", "p")
        blocks.append(Table(header, tuple(_median_cells(row) for row in rows), "lr"))
        tails = (path, "90 % A", "90 % B", "99 % A", "99 % B", "longest A", "longest B")
        blocks.append(Table(tails, tuple(_tail_cells(row) for row in rows), "lr"))
    blocks.append(Sentence(_noise(diff)))
    blocks.append(Sentence(f"No interval for fewer than {FAULTS_MIN} faults."))
    return Section("latency", "How long faults took, by path and stage", tuple(blocks))


def _places(diff: Diff) -> Section:
    """Word whole faults by level, VM and memslot; one of a kind says nothing new."""
    rows: list[TimeRow] = []
    groups = dict(_by_group(diff.places))
    for by in BY:
        mine = groups.get(by, [])
        if len(mine) > 1 or by == "level":
            most = sorted(mine, key=lambda row: -row.a.n - row.b.n)[:_PLACES_MAX]
            rows += [row for row in mine if row in most]
    header = ("whole faults of", "n A", "n B", "50 % A", "50 % B", "×", "99 % A", "99 % B")
    cells = tuple(
        (row.name, f"{row.a.n:,}", f"{row.b.n:,}", _ns(row.a.p50), _ns(row.b.p50),
         _ratio(row.a.p50 or 0, row.b.p50 or 0), _ns(row.a.p99), _ns(row.b.p99))
        for row in rows
    )  # fmt: skip
    title = "Fault latency by level mapped, VM and memslot"
    return Section("places", title, (Table(header, cells, "lr"),) if cells else ())


def _noise(diff: Diff) -> str:
    """Return what an interval says, which depends on what the traces were cut into."""
    parts = [
        f"{side.stretches} recordings" if side.cut == "recordings"
        else f"{side.stretches} equal parts, in order of time"
        for side in diff.sides
    ]  # fmt: skip
    alike = parts[0] if parts[0] == parts[1] else f"{parts[0]} (A) and {parts[1]} (B)"
    stretches = f"Stretches are {alike}."
    judged = [row for row in diff.latency if row.shift is not None and row.shift.p is not None]
    if not judged:
        return _ALIKE.format(stretches=stretches)
    expected = f"{P_MAX * len(judged):.1f}"
    return _RECORDINGS.format(stretches=stretches, p_max=P_MAX, rows=len(judged), expected=expected)


def _by_group(rows: Iterable[TimeRow]) -> Iterator[tuple[str, list[TimeRow]]]:
    groups: dict[str, list[TimeRow]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    yield from groups.items()


def _median_cells(row: TimeRow) -> tuple[str, ...]:
    shift, ratio, interval, p = row.shift, "-", "-", "-"
    if shift is not None and shift.ratio is not None:
        ratio = f"{shift.ratio:.2f}"
    if shift is not None and shift.low is not None and shift.high is not None:
        interval = f"{shift.low:.2f}-{shift.high:.2f}"
    if shift is not None and shift.p is not None:
        p = f"{'*' if shift.verdict != 'same' else ''}{shift.p:.3f}"
    medians = _ns(row.a.p50), _ns(row.b.p50)
    return row.name, f"{row.a.n:,}", f"{row.b.n:,}", *medians, ratio, interval, p


def _tail_cells(row: TimeRow) -> tuple[str, ...]:
    a, b = row.a, row.b
    return row.name, *(_ns(v) for v in (a.p90, b.p90, a.p99, b.p99, a.max, b.max))


def _ns(value: int | None) -> str:
    return "-" if value is None else duration(value)
