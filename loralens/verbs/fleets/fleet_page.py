"""The page of a fleet: its families as a map, its sizes and ranks, its bases, copies and findings."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import accumulate
from math import log10
from typing import Any, NamedTuple

import numpy as np

from loralens.analysis.diagnosis import LEVELS
from loralens.charts.pair_charts import family_map
from loralens.choices import Level
from loralens.core.names import some
from loralens.fleet.catalogue import NON_FINITE, Member, Unreadable
from loralens.fleet.groups import exact_cosines
from loralens.fleet.likeness import MEANINGS, SIMILAR
from loralens.reporting.document import Notice, Notices, PageTable, Panel, Paragraph, Part, Picture, Report, Section
from loralens.tables.numbers import count, number, percent, size
from loralens.tables.table import ALWAYS, Column, Columns, Table, label_column
from loralens.verbs.fleets.fleet_verbs import Fleet
from loralens.verbs.fleets.group_answers import BasesResult, CopiesResult, FamiliesResult
from loralens.verbs.fleets.index_answers import RankCount

NEWEST = 10  # adapters in the table of the newest
ROOM = 72  # adapters on the map: more would be rows of less than 9 pixels
# A pair of modules takes about 0.1 ms, so this takes some seconds.
MOST_PAIRS = 60_000  # pairs of modules up to which the cosines of the map are exact


class SizeRow(NamedTuple):
    """How many files have sizes in one range, and how many bytes they have together."""

    low: int
    high: int
    adapters: int
    share: float
    total: int


def fleet_report(fleet: Fleet, *, command: str) -> Report:
    """The page about a fleet."""
    members, unreadable, families = fleet.members(), fleet.unreadable(), fleet.families()
    copies, runs, bases = fleet.copies(), fleet.runs(), fleet.bases()
    total = sum(member.bytes for member in members)
    summary = [
        f"{count(len(members), 'adapter')} of {size(total)} for {count(len(bases), 'base model')}: "
        f"{count(len(families), 'family', 'families')}, and {count(len(families.alone), 'adapter')} in none.",
        *copies.conclusion(),
        *runs.conclusion(),
    ]
    ranks, sizes = Table("", RANK_COLUMNS, fleet.stats().ranks), Table("", SIZE_COLUMNS, size_rows(members))
    newest = sorted(members, key=lambda member: (member.added, member.name), reverse=True)[:NEWEST]
    notices = Notices(_notices(members, unreadable, bases, copies), "Nothing was found that needs attention.")
    sections = [
        Section("findings", "Findings", "", [notices]),
        _families_section(fleet, families),
        Section("ranks", "Ranks", _RANKS_LEAD, [PageTable(ranks)]),
        Section("sizes", "Sizes", "", [PageTable(sizes)]),
        Section("bases", "Base models", "", _tables(bases.tables())),
        _groups_section("runs", "Same initialisation", MEANINGS["run"], runs.tables(), runs.conclusion()),
        _groups_section("copies", "Copies", MEANINGS["copy"], copies.tables(), copies.conclusion()),
        Section(
            "newest", "Newest", "The adapters that were indexed last.", [PageTable(Table("", NEWEST_COLUMNS, newest))]
        ),
    ]
    return Report(
        title=str(fleet.root),
        command=command,
        headline=summary[0],
        remarks=summary[1:],
        sections=sections,
        record={
            "fleet": str(fleet.root),
            "command": command,
            "headline": summary[0],
            "summary": summary,
            "members": len(members),
            "bytes": total,
            "unreadable": [{"path": str(file.path), "reason": file.reason} for file in unreadable],
            "ranks": ranks.records(),
            "sizes": sizes.records(),
            "families": families.record(),
            "runs": runs.record(),
            "copies": copies.record(),
            "bases": bases.record(),
        },
    )


_RANKS_LEAD = (
    "The largest rank of each adapter. A server has one limit for the rank of all adapters: the last column says how "
    "many adapters a limit of this rank takes. loralens compress --rank makes the others fit."
)


def _tables(tables: Sequence[Table[Any]]) -> list[Part]:
    return [PageTable(table) for table in tables if table.rows]


def _families_section(fleet: Fleet, families: FamiliesResult) -> Section:
    """The map and the table of the families."""
    parts = [*([_map(fleet, families)] if families.families else []), *_tables(families.tables())]
    meaning = MEANINGS["family"].partition(": ")[2]
    lead = (
        f"The adapters of a family have a mean cosine of at least {families.at:g}: {meaning}. Adapters with a cosine "
        f"of {SIMILAR} or more are similar: {MEANINGS['similar'].partition(': ')[2]}."
    )
    return Section("families", "Families", lead, parts or [Paragraph(families.conclusion()[0])])


def _map(fleet: Fleet, families: FamiliesResult) -> Picture:
    """The map of the largest families; there must be one."""
    every, sketches = fleet.snapshot()
    chosen = families.families[:ROOM]
    largest = max(len(family.members) for family in chosen)
    fits = (k for k in range(largest, 1, -1) if sum(min(len(family.members), k) for family in chosen) <= ROOM)
    most = next(fits, 1)  # of each family
    groups = [family.members[:most] for family in chosen]
    members = [member for group in groups for member in group]
    pairs = sum(min(x.modules, y.modules) for i, x in enumerate(members) for y in members[:i])
    cosines = exact_cosines(fleet, members) if pairs <= MOST_PAIRS else None
    chance, how = families.chance.cosine, "exact"
    if cosines is None:
        row_of = {member.number: row for row, member in enumerate(every)}
        directions = sketches.directions(rows=[row_of[member.number] for member in members]).astype(np.float64)
        cosines, chance, how = directions @ directions.T, families.chance.sketch, "by sketches"
    total = len(families)
    which = f"The {len(chosen)} largest of {total} families. " if total > len(chosen) else ""
    which += f"Of each family at most {most}, nearest to its middle. " if most < largest else ""
    chart = family_map([member.name for member in members], cosines, [*accumulate(map(len, groups))][:-1])
    return Picture(
        "Families",
        f"{which}Each row and column is an adapter, and lines divide the families. The cosines of the whole updates "
        f"are {how}.",
        f"cosine 0 ± {number(chance, 2)}",
        "average linkage of the cosines of ΔW",
        [Panel("families-map", [chart])],
    )


def _groups_section(key: str, title: str, lead: str, tables: Sequence[Table[Any]], sentences: Sequence[str]) -> Section:
    return Section(key, title, f"{lead[0].upper()}{lead[1:]}.", _tables(tables) or list(map(Paragraph, sentences)))


_OF_READER: tuple[Level, str] = ("note", "`loralens inspect` explains it")
_OF_INDEX: Mapping[str, tuple[Level, str]] = {
    NON_FINITE: ("error", "a head or another tensor holds NaN or Inf: go back to an earlier checkpoint"),
}


def _notices(
    members: Sequence[Member], unreadable: Sequence[Unreadable], bases: BasesResult, copies: CopiesResult
) -> list[Notice]:
    """What needs attention: unreadable files, contradictions, adapters that do nothing, findings, and copies."""
    reasons = Counter(file.reason for file in unreadable).most_common()
    empty = [member.name for member in members if not member.frobenius]
    by_code = defaultdict(list)
    for member in members:
        for code in member.findings:
            by_code[code].append(member.name)
    safe = [copy for copy in copies.copies if copy.safe_to_delete]
    freed = f"{count(len(safe), 'adapter')} of {size(sum(copy.freed for copy in safe))} can be deleted"
    found: list[tuple[Level, str, Sequence[str], Sequence[str], str]] = [
        (
            "error",
            "unreadable",
            [file.name for file in unreadable],
            [f"{count(times, 'file')}: {reason}" for reason, times in reasons],
            unreadable[0].fix if unreadable else "",
        ),
        *(
            (
                "warning",
                "other-base",
                [other.member.name],
                [f"it names {other.member.base}, but {other.contradiction}"],
                "correct base_model_name_or_path in its configuration",
            )
            for other in bases.contradictions
        ),
        (
            "warning",
            "empty",
            empty,
            [f"{count(len(empty), 'adapter')} with ΔW = 0: they change nothing"],
            "train them, or delete them",
        ),
        *(
            (level, code, names, [count(len(names), "adapter")], fix)
            for code, names in sorted(by_code.items(), key=lambda item: -len(item[1]))
            for level, fix in (_OF_INDEX.get(code, _OF_READER),)
        ),
        ("note", "copies", [copy.member.name for copy in safe], [freed], f"`{copies.command}` lists their files"),
    ]
    notices = [Notice(level, code, some(names), texts, fix) for level, code, names, texts, fix in found if names]
    return sorted(notices, key=lambda notice: LEVELS.index(notice.level))


def size_rows(members: Sequence[Member]) -> list[SizeRow]:
    """The files by their sizes, in ranges between the powers of √10: 1, 3, 10, 31 … bytes."""
    groups = defaultdict(list)
    for member in members:
        groups[int(2 * log10(max(member.bytes, 1)))].append(member.bytes)
    return [
        SizeRow(int(10 ** (half / 2)), int(10 ** ((half + 1) / 2)), len(sizes), len(sizes) / len(members), sum(sizes))
        for half, sizes in sorted(groups.items())
    ]


RANK_COLUMNS: Columns[RankCount] = (
    Column("rank", "rank", "rank", priority=ALWAYS),
    Column("adapters", "adapters", "adapters", priority=ALWAYS),
    Column("share", lambda row: row.adapters / row.of, "share", percent, bar=True),
    Column("fitting", "up_to", "fit into this limit"),
)
SIZE_COLUMNS: Columns[SizeRow] = (
    Column("low", "low", "from", size, priority=ALWAYS),
    Column("high", "high", "to", size, priority=ALWAYS),
    Column("adapters", "adapters", "adapters", priority=ALWAYS),
    Column("share", "share", "share", percent, bar=True),
    Column("total", "total", "together", size),
)
NEWEST_COLUMNS: Columns[Member] = (
    label_column("name", "adapter"),
    label_column("added", "first indexed"),
    Column("base", lambda row: row.base or row.inferred, "base", align="left"),
    Column("frobenius", "frobenius", "‖ΔW‖F", number),
    Column("bytes", "bytes", "size", size),
)
