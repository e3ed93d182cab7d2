"""The page of a fleet: its families as a map, its sizes and ranks, its bases, copies and findings."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log10
from typing import Any, NamedTuple, final

from loralens.charts.pairwise import family_map
from loralens.choices import Level
from loralens.fleet.catalogue import NON_FINITE, UNREACHABLE, Member, Unreadable
from loralens.fleet.likeness import KIN, MEANINGS
from loralens.linalg.factor import Floats
from loralens.reporting.document import Notice, Notices, PageTable, Paragraph, Part, Picture, Report, Section
from loralens.tables.numbers import count, number, percent, size
from loralens.tables.table import ALWAYS, Column, Table

LEVELS: tuple[Level, ...] = ("error", "warning", "note")
NAMED = 3  # adapters that a finding names
NEWEST = 10  # adapters in the table of the newest


@final
@dataclass(frozen=True, slots=True)
class FleetMap:
    """The adapters of the map, in order of their families, and the cosines of all pairs.

    Attributes
    ----------
    names : sequence of str
    starts : sequence of int
        The index of the first adapter of each family.
    cosines : float64 array, shape (n, n)
    exact : bool
        Whether the cosines are exact, or by sketches.
    most : int
        The largest number of adapters of a family that are shown; 0 if all are.
    """

    names: Sequence[str]
    starts: Sequence[int]
    cosines: Floats
    exact: bool
    most: int


@final
@dataclass(frozen=True, slots=True)
class FleetAnswers:
    """What a fleet answers to the questions of the page; the last four but one are the results of its methods."""

    root: str
    members: Sequence[Member]
    unreadable: Sequence[Unreadable]
    families: Any
    runs: Any
    copies: Any
    bases: Any
    map: FleetMap | None


class RankRow(NamedTuple):
    """How many adapters have a largest rank, and how many a server with that limit takes."""

    rank: int
    adapters: int
    share: float
    fitting: int


class SizeRow(NamedTuple):
    """How many files have sizes in one range, and how many bytes they have together."""

    low: int
    high: int
    adapters: int
    share: float
    total: int


def fleet_report(answers: FleetAnswers, *, command: str) -> Report:
    """The page about a fleet."""
    members = answers.members
    total = sum(member.bytes for member in members)
    headline = f"{count(len(members), 'adapter')} of {size(total)} for {count(len(answers.bases), 'base model')}"
    summary = [
        f"{headline}: {count(len(answers.families), 'family', 'families')}, and "
        f"{count(len(answers.families.alone), 'adapter')} in none.",
        *answers.copies.conclusion(),
        *answers.runs.conclusion(),
    ]
    sections = [
        Section("findings", "Findings", "", [Notices(_notices(answers), "Nothing was found that needs attention.")]),
        _families_section(answers),
        Section("ranks", "Ranks", _RANKS_LEAD, [PageTable(Table("", RANK_COLUMNS, rank_rows(members)))]),
        Section("sizes", "Sizes", "", [PageTable(Table("", SIZE_COLUMNS, size_rows(members)))]),
        Section("bases", "Base models", "", [PageTable(table) for table in answers.bases.tables() if table.rows]),
        _groups_section("runs", "Same start", MEANINGS["run"], answers.runs.tables(), answers.runs.conclusion()),
        _groups_section("copies", "Copies", MEANINGS["copy"], answers.copies.tables(), answers.copies.conclusion()),
        Section("newest", "Newest", "The adapters that were indexed last.", [PageTable(_newest(members))]),
    ]
    return Report(
        title=answers.root,
        command=command,
        summary=summary,
        headline=summary[0],
        remarks=summary[1:],
        sections=sections,
        modules=[],
        record=_record(answers, command, summary),
    )


_RANKS_LEAD = (
    "The largest rank of each adapter. A server has one limit for the rank of all adapters: the last column says how "
    "many adapters a limit of this rank takes. loralens compress --rank makes the others fit."
)


def _families_section(answers: FleetAnswers) -> Section:
    """The map and the table of the families."""
    parts: list[Part] = []
    shown, chance = answers.map, answers.families.chance
    if shown:
        total = len(answers.families)
        which = f"The {len(shown.starts)} largest of {total} families. " if total > len(shown.starts) else ""
        which += f"Of each family at most {shown.most}, nearest to its middle. " if shown.most else ""
        how = "exact" if shown.exact else "by sketches"
        lead = "Each row and column is an adapter, and lines divide the families."
        parts.append(
            Picture(
                "families-map",
                "Families",
                [family_map(shown.names, shown.cosines, shown.starts[1:], chance=0.0)],
                f"{which}{lead} The cosines of the whole updates are {how}.",
                f"cosine 0 ± {number(chance.cosine if shown.exact else chance.sketch, 2)}",
                "average linkage of the cosines of ΔW",
                f"Cosines of {count(len(shown.names), 'adapter')} in {count(len(shown.starts), 'family', 'families')}.",
            )
        )
    parts += [PageTable(table) for table in answers.families.tables() if table.rows]
    meaning = MEANINGS["family"].partition(": ")[2]
    lead = (
        f"The adapters of a family have a mean cosine of at least {answers.families.at:g}: {meaning}. Adapters with a "
        f"cosine of {KIN} or more are kin: {MEANINGS['kin'].partition(': ')[2]}."
    )
    return Section("families", "Families", lead, parts or [Paragraph(answers.families.conclusion()[0])])


def _groups_section(key: str, title: str, lead: str, tables: Sequence[Table[Any]], sentences: Sequence[str]) -> Section:
    parts: list[Part] = [PageTable(table) for table in tables if table.rows]
    return Section(
        key, title, f"{lead[0].upper()}{lead[1:]}.", parts or [Paragraph(sentence) for sentence in sentences]
    )


_OF_READER: tuple[Level, str] = ("note", "`loralens inspect` explains it")
_OF_INDEX: Mapping[str, tuple[Level, str]] = {
    NON_FINITE: ("error", "a head or another tensor holds NaN or Inf: go back to an earlier checkpoint"),
    UNREACHABLE: ("warning", "mount its disk, or give yourself the right to read it, and index again"),
}


def _notices(answers: FleetAnswers) -> list[Notice]:
    """What needs attention: unreadable files, contradictions, adapters that do nothing, findings, and copies."""
    notices = []
    if answers.unreadable:
        reasons = Counter(file.reason for file in answers.unreadable)
        evidence = [f"{count(times, 'file')}: {reason}" for reason, times in reasons.most_common()]
        names = [file.name for file in answers.unreadable]
        notices.append(Notice("error", "unreadable", _some(names), evidence, answers.unreadable[0].fix))
    for other in answers.bases.contradictions:
        text = f"it names {other.member.base}, but {other.contradiction}"
        fix = "correct base_model_name_or_path in its configuration"
        notices.append(Notice("warning", "other-base", other.member.name, [text], fix))
    empty = [member.name for member in answers.members if not member.frobenius]
    if empty:
        text = f"{count(len(empty), 'adapter')} with ΔW = 0: they change nothing"
        notices.append(Notice("warning", "empty", _some(empty), [text], "train them, or delete them"))
    by_code: dict[str, list[str]] = {}
    for member in answers.members:
        for code in member.findings:
            by_code.setdefault(code, []).append(member.name)
    for code, names in sorted(by_code.items(), key=lambda item: -len(item[1])):
        level, fix = _OF_INDEX.get(code, _OF_READER)
        notices.append(Notice(level, code, _some(names), [count(len(names), "adapter")], fix))
    safe = [copy for copy in answers.copies.copies if copy.safe_to_delete]
    if safe:
        text = f"{count(len(safe), 'adapter')} of {size(sum(copy.freed for copy in safe))} can be deleted"
        fix = f"`{answers.copies.command}` lists their files"
        notices.append(Notice("note", "copies", _some([copy.member.name for copy in safe]), [text], fix))
    return sorted(notices, key=lambda notice: LEVELS.index(notice.level))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def rank_rows(members: Sequence[Member]) -> list[RankRow]:
    """The largest ranks that occur, with the number of adapters that have them, and of those that a limit takes."""
    counts = Counter(max(member.ranks, default=0) for member in members)
    fitting, rows = 0, []
    for rank, adapters in sorted(counts.items()):
        fitting += adapters
        rows.append(RankRow(rank, adapters, adapters / len(members), fitting))
    return rows


def size_rows(members: Sequence[Member]) -> list[SizeRow]:
    """The files by their sizes, in ranges of a factor of 10 that begin with 1 or 3."""
    groups: dict[int, list[int]] = {}
    for member in members:
        groups.setdefault(int(2 * log10(max(member.bytes, 1))), []).append(member.bytes)
    return [
        SizeRow(_bound(half), _bound(half + 1), len(sizes), len(sizes) / len(members), sum(sizes))
        for half, sizes in sorted(groups.items())
    ]


def _bound(half: int) -> int:
    """10^(half/2): 1, 3, 10, 31 … bytes."""
    return int(10 ** (half / 2))


def _newest(members: Sequence[Member]) -> Table[Member]:
    newest = sorted(members, key=lambda member: (member.added, member.name), reverse=True)[:NEWEST]
    return Table("", NEWEST_COLUMNS, newest)


RANK_COLUMNS: tuple[Column[RankRow], ...] = (
    Column("rank", lambda row: row.rank, "rank", priority=ALWAYS),
    Column("adapters", lambda row: row.adapters, "adapters", priority=ALWAYS),
    Column("share", lambda row: row.share, "share", percent, bar=True),
    Column("fitting", lambda row: row.fitting, "fit into this limit"),
)
SIZE_COLUMNS: tuple[Column[SizeRow], ...] = (
    Column("low", lambda row: row.low, "from", size, priority=ALWAYS),
    Column("high", lambda row: row.high, "to", size, priority=ALWAYS),
    Column("adapters", lambda row: row.adapters, "adapters", priority=ALWAYS),
    Column("share", lambda row: row.share, "share", percent, bar=True),
    Column("total", lambda row: row.total, "together", size),
)
NEWEST_COLUMNS: tuple[Column[Member], ...] = (
    Column("name", lambda row: row.name, "adapter", align="left", priority=ALWAYS),
    Column("added", lambda row: row.added, "first indexed", align="left", priority=ALWAYS),
    Column("base", lambda row: row.base or row.inferred, "base", align="left"),
    Column("frobenius", lambda row: row.frobenius, "‖ΔW‖F", number),
    Column("bytes", lambda row: row.bytes, "size", size),
)


def _record(answers: FleetAnswers, command: str, summary: Sequence[str]) -> Mapping[str, Any]:
    """The numbers of the page as a JSON object."""
    members = answers.members
    return {
        "fleet": answers.root,
        "command": command,
        "headline": summary[0],
        "summary": list(summary),
        "members": len(members),
        "bytes": sum(member.bytes for member in members),
        "unreadable": [{"path": str(file.path), "reason": file.reason} for file in answers.unreadable],
        "ranks": Table("", RANK_COLUMNS, rank_rows(members)).records(),
        "sizes": Table("", SIZE_COLUMNS, size_rows(members)).records(),
        "families": answers.families.record(),
        "runs": answers.runs.record(),
        "copies": answers.copies.record(),
        "bases": answers.bases.record(),
    }
