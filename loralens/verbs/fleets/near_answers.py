"""Answers about single adapters of a fleet: those near an example, and the base model of each."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from loralens.core.names import some
from loralens.fleet.likeness import MEANINGS, ChanceLevels
from loralens.fleet.member_bases import BaseRow, MemberBase, Source
from loralens.fleet.near import Neighbour
from loralens.tables.numbers import UNDEFINED, count, number, signed, size, span
from loralens.tables.result import ResultSequence
from loralens.tables.table import ALWAYS, Column, Columns, Keys, Table, label_column, rows_key


@final
@dataclass(frozen=True, slots=True, repr=False)
class NearResult(ResultSequence[Neighbour]):
    """The members near an example, the nearest first; the result is a sequence of them.

    Attributes
    ----------
    example : str
        The name of the example.
    modules : int
        The number of modules of the example.
    neighbours : sequence of Neighbour
    compared : int
        How many members have a module of the example, and were compared by sketches.
    read : int
        How many of them were compared exactly.
    chance : ChanceLevels
    reason : str
        Why there is no neighbour, in words; empty if there is one.
    """

    contents = "neighbours"

    example: str
    modules: int
    neighbours: Sequence[Neighbour]
    compared: int
    read: int
    chance: ChanceLevels
    reason: str = ""

    def conclusion(self) -> list[str]:
        """Which member is nearest, and what that means."""
        if not self.neighbours:
            return [f"{self.example}: {self.reason}."]
        nearest = self.neighbours[0]
        cosine = f"cosine {signed(nearest.cosine)}"
        if not nearest.level:
            return [f"Nothing in the fleet is like {self.example}: the largest cosine is {signed(nearest.cosine)}."]
        words = {"copy": "a copy", "run": "from the same start", "family": "in one family with it", "kin": "kin"}
        name = f"{nearest.member.name}, {words[nearest.level]} ({cosine})"
        if self.compared == 1:
            return [f"The only other adapter with common modules is {name}."]
        return [f"Of {count(self.compared, 'adapter')} with common modules the nearest to {self.example} is {name}."]

    def tables(self) -> list[Table[Neighbour]]:
        """The neighbours, the nearest first."""
        return [Table(f"near {self.example}", NEAR_COLUMNS, self.neighbours)]

    def sentences(self) -> list[str]:
        """What chance gives, and what the levels mean."""
        if not self.neighbours:
            return []
        levels = dict.fromkeys(row.level for row in self.neighbours)
        meanings = [f"{level or 'no level'}: {MEANINGS[level]}" for level in MEANINGS if level in levels]
        return [self.chance.sentence(sketched=not self.read), *meanings]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "example",
            "modules",
            "compared",
            "read",
            "chance",
            "reason",
            rows_key("neighbours", NEAR_COLUMNS),
        )


NEAR_COLUMNS: Columns[Neighbour] = (
    label_column("name", "adapter", "member.name", distinct=True),
    Column("path", "member.path"),
    Column("level", lambda row: row.level or None, "level", align="left", priority=8, type=str | None),
    Column("cosine", "cosine", "cosine", signed, priority=ALWAYS, about="of the whole updates"),
    Column(
        "common_cosine",
        "common_cosine",
        "common",
        signed,
        priority=7,
        about="cosine over the modules that both have",
    ),
    Column("common_modules", "common_modules", "modules", priority=5, about="modules that both have"),
    Column("exact"),
    Column("sketch", "sketch", "sketch", signed, priority=2, about="cosine by sketches"),
    Column("start", "start", "start", signed, priority=4, about="cosine of the first A, by sketches"),
    Column("base_model", "base_model", "base", align="left", priority=3),
    Column("ranks", "member.ranks", "r", span, priority=6),
    Column("frobenius", "member.frobenius", "‖ΔW‖F", number, priority=4),
    Column("bytes", "member.bytes", "size", size, priority=1),
)


@final
@dataclass(frozen=True, slots=True, repr=False)
class BasesResult(ResultSequence[BaseRow]):
    """The bases of a fleet, the most frequent first; the result is a sequence of them.

    Attributes
    ----------
    bases : sequence of BaseRow
    unknown : sequence of MemberBase
    contradictions : sequence of MemberBase
        Adapters that name a base whose weights they do not fit. They are counted under what their shapes show.
    command : str
        The command that lists the base of each adapter.
    """

    contents = "bases"

    bases: Sequence[BaseRow]
    unknown: Sequence[MemberBase]
    contradictions: Sequence[MemberBase]
    command: str = "loralens fleet bases --csv"

    @property
    def members(self) -> int:
        """The number of adapters."""
        return sum(len(row.adapters) for row in self.bases) + len(self.unknown)

    def conclusion(self) -> list[str]:
        """How many bases there are, how many adapters have an unknown one, and how many contradict themselves."""
        text = f"{count(self.members, 'adapter')} for {count(len(self.bases), 'base model')}"
        if self.unknown:
            text += f"; the base of {len(self.unknown)} is unknown"
        sentences = [f"{text}."]
        if self.contradictions:
            names = "names a base that it does" if len(self.contradictions) == 1 else "name a base that they do"
            sentences.append(f"{count(len(self.contradictions), 'adapter')} {names} not fit.")
        return sentences

    def tables(self) -> list[Table[Any]]:
        """The bases, the adapters of unknown base, and the contradictions."""
        return [
            Table("bases", BASE_COLUMNS, self.bases),
            Table("unknown base", UNKNOWN_COLUMNS, self.unknown),
            Table("names a base that it does not fit", CONTRADICTION_COLUMNS, self.contradictions),
        ]

    def sentences(self) -> list[str]:
        """How the base of each adapter is listed."""
        return [f"to list the base of each adapter: {self.command}"] if self.bases else []

    def listing(self) -> list[Table[MemberBase]]:
        """Every adapter with its base."""
        rows = [adapter for row in self.bases for adapter in row.adapters]
        return [Table("adapters", MEMBER_COLUMNS, [*rows, *self.unknown])]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            rows_key("bases", BASE_COLUMNS),
            rows_key("adapters", MEMBER_COLUMNS, MemberBase, lambda result: result.listing()[0]),
            Column("unknown", lambda result: [adapter.member.path for adapter in result.unknown], type=list[str]),
            rows_key(
                "contradictions",
                (Column("path", "member.path"), Column("named", "member.base"), Column("reason", "contradiction")),
            ),
        )


def _count_column(key: str, source: Source, title: str, about: str, priority: int) -> Column[BaseRow]:
    return Column(key, lambda row: row.from_source(source), title, priority=priority, about=about)


def _some_names(names: Sequence[str]) -> str:
    return some(names) if names else UNDEFINED


BASE_COLUMNS: Columns[BaseRow] = (
    label_column("base", "base"),
    Column("adapters", "adapters.len", "adapters", priority=ALWAYS),
    _count_column("named", "named", "named", "adapters whose file or configuration names the base", 6),
    _count_column("shown", "names and shapes", "by shapes", "adapters whose names and shapes show it", 6),
    _count_column("by_neighbours", "neighbours", "by neighbours", "adapters that are like others of this base", 4),
    Column("names", "names", "called", _some_names, align="left", priority=3),
)
NAME: Column[MemberBase] = label_column("name", "adapter", "member.name", distinct=True)
MEMBER_COLUMNS: Columns[MemberBase] = (
    NAME,
    Column("path", "member.path"),
    Column("base", lambda row: row.base or None, type=str | None),
    Column("source"),
    Column("named", "member.base"),
    Column("contradiction", lambda row: row.contradiction or None, type=str | None),
    Column("candidates", "candidates", csv=False),
)
UNKNOWN_COLUMNS: Columns[MemberBase] = (
    NAME,
    Column("candidates", "candidates", "could be", _some_names, align="left", priority=8),
)
CONTRADICTION_COLUMNS: Columns[MemberBase] = (
    NAME,
    Column("named", "member.base", "names", align="left", priority=7),
    Column("contradiction", "contradiction", "but", align="left", priority=8),
)
