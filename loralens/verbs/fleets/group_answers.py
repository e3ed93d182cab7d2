"""Answers about the adapters of a fleet: copies, runs, families, those near an example, and the base of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, final

from loralens.analysis.explanation import Word
from loralens.core.names import some
from loralens.fleet.catalogue import Member
from loralens.fleet.copies import Copy, LinkedPath
from loralens.fleet.groups import Family, SharedStart, base_of
from loralens.fleet.likeness import MEANINGS, RUN, ChanceLevels, Kind
from loralens.fleet.member_bases import BaseRow, MemberBase, Source
from loralens.fleet.near import Neighbour
from loralens.tables.numbers import UNDEFINED, count, fixed, number, or_blank, signed, size, span
from loralens.tables.result import ResultSequence
from loralens.tables.table import ALWAYS, Column, Columns, Keys, Table, label_column, rows_key


def paths_of(members: Sequence[Member]) -> list[Path]:
    """The paths of adapters, for JSON."""
    return [member.path for member in members]


# The adapters that are in no group.
ALONE: Column[Any] = Column("alone", lambda result: paths_of(result.alone), type=list[str])


Group = TypeVar("Group", bound=SharedStart | Family)


class GroupMember(NamedTuple):
    """One row: an adapter, the number of its group, and its step."""

    group: int
    member: Member
    step: int | None = None


class GroupRow(NamedTuple):
    """An adapter in the table of a group: the one that stays, or a copy of it."""

    group: int
    member: Member
    copy: Copy | None


@final
@dataclass(frozen=True, slots=True, repr=False)
class CopiesResult(ResultSequence[Copy]):
    """The copies in a fleet; the result is a sequence of them.

    Attributes
    ----------
    members : int
        The number of adapters.
    copies : sequence of Copy
        Adapters that are the same as a kept one, in order of the kept ones.
    close : sequence of Copy
        Adapters that are nearly the same as another, and are not copies.
    links : sequence of LinkedPath
    command : str
        The command that lists the files that can be deleted.
    """

    contents = "copies"

    members: int
    copies: Sequence[Copy]
    close: Sequence[Copy]
    links: Sequence[LinkedPath] = ()
    command: str = "loralens fleet copies --paths"

    @property
    def groups(self) -> list[list[Member]]:
        """The adapters that are the same update, together; the one that stays is first."""
        by_kept: dict[int, list[Member]] = {}
        for copy in self.copies:
            by_kept.setdefault(copy.kept.number, [copy.kept]).append(copy.member)
        return list(by_kept.values())

    @property
    def safe_to_delete(self) -> list[Path]:
        """The files that can be deleted: the weights of copies, and configurations that only these need."""
        return list(dict.fromkeys(path for copy in self.copies for path in copy.files))

    def conclusion(self) -> list[str]:
        """How many copies there are, and what their deletion frees."""
        among = f"{count(self.members, 'adapter')}"
        if not self.copies:
            return [f"{among}: none is a copy of another."]
        are = count(len(self.copies), "is a copy", "are copies")
        sentences = [f"{among}: {are} of {count(len(self.groups), 'other')}."]
        if safe := [copy for copy in self.copies if copy.safe_to_delete]:
            copies = count(len(safe), "copy", "copies")
            sentences.append(f"{copies} can be deleted, which frees {size(sum(copy.freed for copy in safe))}.")
        return sentences

    def tables(self) -> list[Table[GroupRow]]:
        """The copies below the adapter that stays, and the pairs that are nearly the same."""
        # One name in a row, since two names of the length that paths have do not fit into a terminal.
        of = {copy.member.number: copy for copy in self.copies}
        grouped = [
            GroupRow(i, member, of.get(member.number)) for i, group in enumerate(self.groups, 1) for member in group
        ]
        pairs = [
            row
            for i, pair in enumerate(self.close, 1)
            for row in (GroupRow(i, pair.kept, None), GroupRow(i, pair.member, pair))
        ]
        return [Table("copies", COPY_COLUMNS, grouped), Table("nearly the same, but not copies", CLOSE_COLUMNS, pairs)]

    def listing(self) -> list[Table[Copy]]:
        """The copies and then the adapters that are nearly the same, one a row."""
        return [Table("copies", RECORD_COLUMNS, [*self.copies, *self.close])]

    def sentences(self) -> list[str]:
        """How the files are listed that can be deleted, and which paths are links."""
        sentences = [f"to list their files: {self.command}"] if self.safe_to_delete else []
        if self.links:
            first, several = self.links[0], len(self.links) > 1
            leads = count(len(self.links), "path leads", "paths lead")
            counted = "are not counted as copies" if several else "is not counted as a copy"
            sentences.append(
                f"{leads} to the file of another adapter through a link, and {counted}: "
                f"{first.member.name} → {first.file.name}" + (" …" if several else "")
            )
        return sentences

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "members",
            rows_key("copies", RECORD_COLUMNS),
            rows_key("close", RECORD_COLUMNS),
            rows_key("links", (Column("path", "member.path"), Column("file", "file.path"))),
            "safe_to_delete",
        )


KINDS: Mapping[Kind, str] = {"tensors": "same numbers", "update": "same ΔW", "close": "nearly the same", "": ""}
DIFFERENCE: Column[Copy] = Column(
    "difference",
    "sameness.difference",
    "difference",
    or_blank(partial(number, digits=2)),
    priority=6,
    about="‖ΔW₁ − ΔW₂‖/‖ΔW‖ of the worst module",
)
KIND: Column[Copy] = Column("kind", "sameness.kind", "kind", lambda kind: KINDS[kind or ""], "left", 8)
NAMES: Columns[GroupRow] = (
    Column("group", "group", "#", priority=ALWAYS),
    label_column("name", "adapter", "member.name", distinct=True),
)
COPY_COLUMNS: Columns[GroupRow] = (
    *NAMES,
    KIND.of(lambda row: row.copy),
    DIFFERENCE.of(lambda row: row.copy),
    Column("bytes", "member.bytes", "size", size, priority=5),
    Column(
        "delete",
        lambda row: (row.copy.protected or "safe") if row.copy else "stays",
        "to delete",
        align="left",
        priority=8,
        about="whether the files can be deleted without a loss",
    ),
)
CLOSE_COLUMNS: Columns[GroupRow] = (
    *NAMES,
    Column(
        "cosine",
        "copy.sameness.cosine",
        "cosine",
        or_blank(fixed("+.4f")),
        priority=7,
    ),
    DIFFERENCE.of(lambda row: row.copy),
    Column("reason", "copy.sameness.reason", "why not a copy", align="left", priority=8),
)
RECORD_COLUMNS: Columns[Copy] = (
    Column("name", "member.name"),
    Column("path", "member.path"),
    Column("kept", "kept.name"),
    Column("kept_path", "kept.path"),
    KIND,
    Column("cosine", "sameness.cosine"),
    DIFFERENCE,
    Column("reason", lambda row: row.sameness.reason or row.protected),
    Column("safe_to_delete"),
    # A cell of CSV would hold the repr of a list of paths.
    Column("files", "files", csv=False),
    Column("bytes", "member.bytes"),
)


def _members_of(group: SharedStart | Family) -> list[GroupMember]:
    steps = getattr(group, "steps", repeat(None))
    return [GroupMember(group.number, *row) for row in zip(group.members, steps, strict=False)]


# In JSON the members of a run have no more.
RUN_STEPS: Columns[GroupMember] = (Column("path", "member.path"), Column("step"))


class GroupsResult(ResultSequence[Group]):
    """The groups of a fleet, the largest first, and the adapters that are in none."""

    __slots__ = ()

    alone: Sequence[Member]

    @property
    def members(self) -> int:
        """The number of adapters."""
        return sum(len(group.members) for group in self) + len(self.alone)

    def member_rows(self) -> list[GroupMember]:
        """Every adapter with the number of its group, 0 if it is in none."""
        return [*chain(*map(_members_of, self)), *(GroupMember(0, member) for member in self.alone)]


@final
@dataclass(frozen=True, slots=True, repr=False)
class RunsResult(GroupsResult[SharedStart]):
    """The groups of a fleet that began from the same random A, the largest first.

    Attributes
    ----------
    runs : sequence of SharedStart
    alone : sequence of Member
        The adapters that share their initialisation with no other.
    chance : ChanceLevels
    command : str
        The command that lists the adapters of each group.
    """

    contents = "runs"

    runs: Sequence[SharedStart]
    alone: Sequence[Member]
    chance: ChanceLevels
    command: str = "loralens fleet runs --csv"

    def conclusion(self) -> list[str]:
        """How many groups there are, and how many adapters are in none."""
        among = count(self.members, "adapter")
        if not self.runs:
            return [f"{among}: no two began from the same random A."]
        grouped = self.members - len(self.alone)
        return [
            f"{among}: {grouped} began from the same random A as another, in {count(len(self.runs), 'group')}; "
            f"{len(self.alone)} did not."
        ]

    def tables(self) -> list[Table[SharedStart]]:
        """The groups, the largest first."""
        return [Table("began from the same A", RUN_COLUMNS, self.runs)]

    def listing(self) -> list[Table[GroupMember]]:
        """Every adapter with the number of its group, 0 if it is in none."""
        return [Table("members", RUN_MEMBER_COLUMNS, self.member_rows())]

    def sentences(self) -> list[str]:
        """What a group is, what chance gives, and how the adapters of the groups are listed."""
        if not self.runs:
            return []
        return [
            "A group has the checkpoints of a run, and runs with the same seed.",
            f"chance: two independent A have a cosine of 0 ± {number(self.chance.start, 2)} by sketches; "
            f"a group has at least {RUN:g}",
            f"to list the adapters of each group: {self.command}",
        ]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "members",
            rows_key("runs", (*RUN_COLUMNS, rows_key("members", RUN_STEPS, GroupMember, _members_of))),
            ALONE,
            "chance",
        )


# Columns of both kinds of groups.
ADAPTERS: Column[Any] = Column("adapters", "members.len", "adapters", priority=ALWAYS, type=int)
BASE: Column[Any] = Column(
    "base", lambda row: base_of(row.members) or None, "base", align="left", priority=5, type=str | None
)
SUCH_AS: Column[Any] = label_column("names", "such as", "members.0.name", json=False, distinct=True)


RUN_COLUMNS: Columns[SharedStart] = (
    Column("run", "number", "#", priority=ALWAYS),
    ADAPTERS,
    Column("steps", "known_steps", "steps", lambda steps: span(steps) if steps else "", priority=7),
    Column(
        "cosine",
        "cosine",
        "first to last",
        signed,
        priority=7,
        about="cosine of the updates of the first and the last step",
    ),
    Column("exact"),
    BASE,
    SUCH_AS,
)
RUN_MEMBER_COLUMNS: Columns[GroupMember] = (
    Column("run", "group", "run"),
    Column("step", "step", "step"),
    Column("name", "member.name", "adapter", align="left"),
    Column("path", "member.path"),
)


@final
@dataclass(frozen=True, slots=True, repr=False)
class FamiliesResult(GroupsResult[Family]):
    """The families of a fleet, the largest first; the result is a sequence of them.

    Attributes
    ----------
    at : float
        The smallest mean cosine within a family.
    families : sequence of Family
    alone : sequence of Member
        The adapters that are in none.
    chance : ChanceLevels
    command : str
        The command that lists the adapters of each family.
    """

    contents = "families"

    at: float
    families: Sequence[Family]
    alone: Sequence[Member]
    chance: ChanceLevels
    command: str = "loralens fleet families --csv"

    def conclusion(self) -> list[str]:
        """How many families there are, how large the largest is, and how many adapters are in none."""
        among = count(self.members, "adapter")
        if not self.families:
            return [f"{among}: no two have a cosine of {self.at:g} or more, so there is no family."]
        largest = self.families[0]
        families = count(len(self.families), "family", "families")
        how = "" if all(family.exact for family in self.families) else " by sketches"
        return [
            f"{among}: {families} of adapters that are alike (mean cosine{how} at least {self.at:g}), and "
            f"{len(self.alone)} in none. The largest has {count(len(largest.members), 'adapter')}."
        ]

    def tables(self) -> list[Table[Family]]:
        """The families, the largest first."""
        return [Table(f"families at {self.at:g}", FAMILY_COLUMNS, self.families)]

    def listing(self) -> list[Table[GroupMember]]:
        """Every adapter with the number of its family, 0 if it is in none."""
        return [Table("members", FAMILY_MEMBER_COLUMNS, self.member_rows())]

    def sentences(self) -> list[str]:
        """What chance gives, and how the members are listed."""
        if not self.families:
            return []
        chance = self.chance.sentence(sketched=not any(one.exact for one in self.families))
        return [chance, f"to list the adapters of each family: {self.command}"]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "at",
            "members",
            rows_key(
                "families",
                (*FAMILY_COLUMNS, Column("members", lambda family: paths_of(family.members), type=list[str])),
            ),
            ALONE,
            "chance",
        )


FAMILY_COLUMNS: Columns[Family] = (
    Column("family", "number", "#", priority=ALWAYS),
    ADAPTERS,
    Column(
        "middle_to_furthest",
        "middle_to_furthest",
        "to furthest",
        signed,
        priority=7,
        about="cosine of the adapter nearest to the middle of the family with the one furthest from it",
    ),
    Column("exact"),
    BASE,
    Column("ranks", "ranks", "r", span, priority=4),
    SUCH_AS,
)
FAMILY_MEMBER_COLUMNS: Columns[GroupMember] = (
    Column("family", "group", "family"),
    Column("name", "member.name", "adapter", align="left"),
    Column("path", "member.path"),
    Column("base", lambda row: row.member.base or row.member.inferred),
)


WORDS_SHOWN = 10  # words of a family that a terminal shows


@final
@dataclass(frozen=True, slots=True)
class FamilyWords:
    """A family of a fleet, and the words that set it apart from the other families.

    Attributes
    ----------
    number : int
        That of `loralens.Fleet.families`; 0 for an adapter that is in no family.
    members : sequence of Member
        Those nearest to the middle first.
    read : int
        How many of them were read.
    words : sequence of Word
        Strongest first; empty if random updates do as much.
    """

    number: int
    members: Sequence[Member]
    read: int
    words: Sequence[Word]


class FamilyWord(NamedTuple):
    """One row: a word of a family."""

    family: FamilyWords
    word: Word


@final
@dataclass(frozen=True, slots=True, repr=False)
class FamilyWordsResult(ResultSequence[FamilyWords]):
    """The families of a fleet by the words that set them apart, the largest first; the result is a sequence of them.

    Attributes
    ----------
    base : str
    families : sequence of FamilyWords
        The families that fit the base, and the adapters that are in none, each for itself.
    unfit : int
        How many families and single adapters do not fit the base, or cannot be read.
    further : int
        How many others were not read, as ``limit`` of them were.
    forward : bool
        Whether the model was run.
    """

    contents = "families"

    base: str
    families: Sequence[FamilyWords]
    unfit: int
    further: int
    forward: bool

    @property
    def undecided(self) -> bool:
        """Whether no family has a word."""
        return not any(family.words for family in self.families)

    def conclusion(self) -> list[str]:
        """How many families fit the base, how many have words, and what was left out."""
        left = f"; {self.unfit} do not fit" if self.unfit else ""
        left += f"; {self.further} were not read (--limit)" if self.further else ""
        if not self.families:
            return [f"No family or single adapter of the fleet fits {self.base}{left}."]
        grouped = sum(family.number > 0 for family in self.families)
        kinds = ((grouped, "family", "families"), (len(self.families) - grouped, "single adapter", "single adapters"))
        fit = " and ".join(count(number, *nouns) for number, *nouns in kinds if number)
        verb = "fits" if len(self.families) == 1 else "fit"
        spoken = sum(bool(family.words) for family in self.families)
        return [f"{fit} {verb} {self.base}{left}. {spoken} of {len(self.families)} have words of their own."]

    def sentences(self) -> list[str]:
        """The words of every family, and how they were found."""
        lines = list(map(_told, self.families))
        if not self.forward and self.families:
            lines.append("The weights alone were read, which misses topics that differ within one style (--forward).")
        if len(self.families) == 1:
            lines.append("There is no other family, so nothing was subtracted.")
        return lines

    def tables(self) -> list[Table[Any]]:
        """No tables for people, who read words in lines."""
        return []

    def listing(self) -> list[Table[FamilyWord]]:
        """Every word of every family."""
        rows = [FamilyWord(family, word) for family in self.families for word in family.words]
        return [Table("words", WORD_ROWS, rows)]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "base",
            rows_key(
                "families",
                (
                    Column("family", "number"),
                    Column("members", lambda family: [member.path for member in family.members], type=list[str]),
                    Column("read"),
                    rows_key("words", WORD_COLUMNS),
                ),
            ),
            "unfit",
            "further",
            "forward",
        )


WORD_COLUMNS: Columns[Word] = (Column("text"), Column("change"), Column("texts"), Column("symbol"))
WORD_ROWS: Columns[FamilyWord] = (
    Column("family", "family.number"),
    label_column("name", "such as", "family.members.0.name"),
    *(column.of(lambda row: row.word) for column in WORD_COLUMNS),
)


def _told(family: FamilyWords) -> str:
    name = family.members[0].name
    if family.number:
        name = f"Family {family.number} ({count(len(family.members), 'adapter')} such as {name})"
    words = [word.text for word in family.words if not word.symbol] or [word.text for word in family.words]
    return f"{name}: {', '.join(words[:WORDS_SHOWN]) or 'no word beyond random updates'}."


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
        words = {
            "copy": "a copy",
            "run": "with the same initialisation",
            "family": "in one family with it",
            "similar": "similar to it",
        }
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
            words = "adapter names a base that it does", "adapters name a base that they do"
            sentences.append(f"{count(len(self.contradictions), *words)} not fit.")
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
            rows_key("adapters", MEMBER_COLUMNS, MemberBase, "listing.0"),
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
