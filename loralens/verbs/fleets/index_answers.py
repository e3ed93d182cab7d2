"""Answers about an index as a whole: what an update has changed, numbers, adapters that do nothing, and rows."""

import os
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from loralens.core.messages import command_line, quote_word
from loralens.errors import OptionError, in_shell
from loralens.fleet.catalogue import FleetState, Member, Unreadable, is_interrupted, open_to_read
from loralens.fleet.updating import FileChange
from loralens.tables.numbers import count, percent, size
from loralens.tables.result import ResultSequence
from loralens.tables.table import ALWAYS, Column, Columns, Keys, Table, label_column, rows_key

MOST = 0.9  # the share of the adapters for which the smallest sufficient rank is named
MOST_NAMED = 8  # adapters above this rank that a command names one by one
LONGEST_ANSWER = 1 << 24  # bytes of one value, so that one function cannot fill the memory
MOST_BYTES = 1 << 28  # bytes of the whole answer
ROW_BYTES = 64  # bytes that a value takes besides its content
# What a SELECT does. Nothing else is allowed: no ATTACH, no PRAGMA, no writing.
_ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
_FIX = (
    "give one SELECT on the tables adapters, unreadable, files and signatures, such as "
    '"SELECT name, rank FROM adapters"; "SELECT * FROM adapters LIMIT 1" shows the columns'
)
Row = tuple[Any, ...]


@dataclass(frozen=True, slots=True, repr=False)
class UpdateResult(ResultSequence[FileChange]):
    """An index after its update; the result is a sequence of the changes.

    Attributes
    ----------
    home, root : Path
        The folder of the index, and that of the adapters.
    adapters : int
        How many adapters it has now.
    no_adapters : int
        Files that hold tensors and no LoRA pairs.
    changes : sequence of FileChange
        The files that were measured or forgotten.
    unreadable : sequence of Unreadable
        All files that should be adapters and cannot be read, and folders that cannot be listed.
    unreachable : sequence of Path
        Adapters that could not be reached this time, and are kept as they were.
    first : bool
        Whether there was no index before.
    """

    contents = "changes"

    home: Path
    root: Path
    adapters: int
    no_adapters: int
    changes: Sequence[FileChange]
    unreadable: Sequence[Unreadable]
    unreachable: Sequence[Path]
    first: bool

    @classmethod
    def of(
        cls, home: Path, state: FleetState, changes: Sequence[FileChange], kept: Iterable[str], first: bool
    ) -> "UpdateResult":
        """The result of `loralens.fleet.updating.update_index`."""
        unreachable = [state.root / path for path in kept]
        adapters, no_adapters = len(state.members), len(state.others)
        return cls(home, state.root, adapters, no_adapters, changes, state.unreadable, unreachable, first)

    def counts(self) -> dict[str, int]:
        """How many files are new, changed and gone."""
        kinds = Counter(change.change for change in self.changes)
        return {kind: kinds[kind] for kind in ("new", "changed", "gone")}

    def conclusion(self) -> list[str]:
        """How many adapters the index has, and what has changed."""
        counts = self.counts()
        if self.first:
            news = ""
        elif self.changes:
            news = " " + ", ".join(f"{number} {kind}" for kind, number in counts.items() if number) + "."
        else:
            news = " Nothing has changed."
        broken = f" {count(len(self.unreadable), 'file')} cannot be read." if self.unreadable else ""
        sentences = [f"{self.root}: {count(self.adapters, 'adapter')} in the index {self.home}.{news}{broken}"]
        if self.unreachable:
            words = "adapter could not be reached, and is", "adapters could not be reached, and are"
            sentences.append(f"{count(len(self.unreachable), *words)} kept as before.")
        return sentences

    def tables(self) -> list[Table[Any]]:
        """The changes, unless everything is new, and the files that cannot be read."""
        changes = [] if self.first else self.changes
        return [
            Table("changes", CHANGES, changes),
            Table("cannot be read", UNREADABLE, self.unreadable),
        ]

    def listing(self) -> list[Table[FileChange]]:
        """The changes."""
        return [Table("changes", CHANGES, self.changes)]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "root",
            "home",
            "adapters",
            "no_adapters",
            *(Column(kind, f"counts.{kind}", type=int) for kind in ("new", "changed", "gone")),
            rows_key("changes", CHANGES),
            rows_key("unreadable", UNREADABLE),
            "unreachable",
        )


CHANGES: Columns[FileChange] = (
    label_column("path", "file", distinct=True),
    label_column("change", "change"),
)
UNREADABLE: Columns[Unreadable] = (
    label_column("name", "file", distinct=True),
    Column("path"),
    Column("bytes"),
    label_column("reason", "reason", sentence=True),
    Column("fix"),
)


@dataclass(frozen=True, slots=True)
class RankCount:
    """How many of all adapters have this largest rank, and how many have at most this rank."""

    rank: int
    adapters: int
    up_to: int
    of: int

    @property
    def share(self) -> float:
        """The share of the adapters that have at most this rank."""
        return self.up_to / self.of


@dataclass(frozen=True, slots=True)
class FormatCount:
    """How many adapters are of a dialect, and their bytes."""

    format: str
    adapters: int
    bytes: int


@dataclass(frozen=True, slots=True, repr=False)
class StatsResult(ResultSequence[RankCount]):
    """A fleet in numbers; the result is a sequence of the counts of ranks.

    Attributes
    ----------
    root : Path
    adapters, unreadable : int
        How many adapters it has, and files that cannot be read.
    bytes : int
        Their bytes on disk.
    index_bytes : int
        The bytes of the index.
    empty : int
        Adapters with ΔW = 0.
    parameters : int
        Numbers in pairs, in all.
    ranks : sequence of RankCount
    common_rank : int
        The smallest rank that is enough for 90 % of the adapters; 0 if there is none.
    largest : mapping of str to int
        Name → the largest rank of every adapter.
    command : str
        The command that lists adapters above a rank, which follows it.
    formats : sequence of FormatCount
    """

    contents = "ranks"

    root: Path
    adapters: int
    unreadable: int
    bytes: int
    index_bytes: int
    empty: int
    parameters: int
    ranks: Sequence[RankCount]
    common_rank: int
    largest: Mapping[str, int]
    command: str
    formats: Sequence[FormatCount]

    def above(self, rank: int) -> list[str]:
        """The names of the adapters with a module of a larger rank."""
        return [name for name, largest in self.largest.items() if largest > rank]

    def conclusion(self) -> list[str]:
        """How many adapters of which ranks there are."""
        broken = f", and {count(self.unreadable, 'file')} that cannot be read" if self.unreadable else ""
        sentences = [f"{self.root}: {count(self.adapters, 'adapter')}, {size(self.bytes)}{broken}."]
        if self.ranks:
            first, last = self.ranks[0].rank, self.ranks[-1].rank
            sentences.append(
                f"Their largest ranks are {first} to {last}." if first < last else f"Their rank is {first}."
            )
        return sentences

    def tables(self) -> list[Table[Any]]:
        """Ranks and dialects."""
        return [Table("largest rank of an adapter", RANKS, self.ranks), Table("dialects", FORMATS, self.formats)]

    def sentences(self) -> list[str]:
        """The rank that a server needs, the command that makes all adapters fit, and the size of the index."""
        sentences = []
        if self.ranks and self.ranks[0].rank < self.ranks[-1].rank:
            sentences.append(f"A server that loads all of them needs a largest rank of {self.ranks[-1].rank}.")
            if above := self.above(self.common_rank):
                share, are = percent(1 - len(above) / self.adapters), count(len(above), "is", "are")
                sentences.append(
                    f"{share} of them need no more than {self.common_rank}. {are} above it, and this "
                    f"writes smaller ones: {self._compression(above)}"
                )
        if self.adapters:
            per_adapter = size(round(self.index_bytes / self.adapters))
            sentences.append(f"The index takes {size(self.index_bytes)}: {per_adapter} per adapter.")
        return sentences

    def _compression(self, above: Sequence[str]) -> str:
        """The command that makes all adapters fit, and leaves those alone that do."""
        rank = str(self.common_rank)
        # In the output folder, several adapters are called by the last part of their paths.
        if len(above) <= MOST_NAMED and len({Path(name).name for name in above}) == len(above):
            paths = [str(self.root / name) for name in above]
            return command_line("loralens", "compress", *paths, "--rank", rank, "-o", "OUT")
        each = f'loralens compress {quote_word(str(self.root))}/"$name" --rank {rank} -o OUT/"$name"'
        return f"{self.command} {rank} | while IFS= read -r name; do {each}; done"

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "root",
            "adapters",
            "unreadable",
            "empty",
            "bytes",
            "parameters",
            "index_bytes",
            rows_key("ranks", RANKS),
            "common_rank",
            Column(
                "above",
                lambda result: [result.root / name for name in result.above(result.common_rank)],
                type=list[str],
            ),
            rows_key("formats", FORMATS),
        )


def count_members(root: Path, home: Path, members: Sequence[Member], unreadable: int, command: str) -> StatsResult:
    """The numbers of these members, and of files that cannot be read."""
    by_rank = sorted(Counter(max(member.ranks, default=0) for member in members).items())
    up_to = accumulate(adapters for _, adapters in by_rank)
    by_format: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        by_format[member.format].append(member)
    counted = [RankCount(*row, most, len(members)) for row, most in zip(by_rank, up_to, strict=True)]
    common = next((row.rank for row in counted if row.share >= MOST), 0)
    formats = [FormatCount(name, len(each), sum(one.bytes for one in each)) for name, each in by_format.items()]
    return StatsResult(
        root,
        len(members),
        unreadable,
        sum(member.bytes for member in members),
        sum(file.stat().st_size for file in home.iterdir() if file.is_file()),
        sum(is_empty(member) for member in members),
        sum(member.parameters for member in members),
        counted,
        common,
        {member.name: max(member.ranks, default=0) for member in members},
        command,
        sorted(formats, key=lambda row: (-row.adapters, row.format)),
    )


RANKS: Columns[RankCount] = (
    Column("rank", "rank", "rank", priority=ALWAYS),
    Column("adapters", "adapters", "adapters", "{:,}".format, priority=ALWAYS),
    Column("up_to", "up_to", "up to it", "{:,}".format, priority=8, about="adapters of at most this rank"),
    Column("share", "share", "share", percent, priority=7, about="share of adapters of at most this rank"),
)
FORMATS: Columns[FormatCount] = (
    label_column("format", "dialect"),
    Column("adapters", "adapters", "adapters", "{:,}".format, priority=ALWAYS),
    Column("bytes", "bytes", "size", size, priority=8),
)


@dataclass(frozen=True, slots=True, repr=False)
class EmptyResult(ResultSequence[Member]):
    """The adapters with modules whose ΔW is 0, those first that have no other module; a sequence of `Member`.

    Attributes
    ----------
    adapters : int
        How many adapters the fleet has.
    """

    contents = "members"

    root: Path
    members: Sequence[Member]
    adapters: int

    @property
    def without_effect(self) -> list[Member]:
        """The adapters whose ΔW is 0 everywhere."""
        return [member for member in self.members if is_empty(member)]

    def conclusion(self) -> list[str]:
        """How many adapters change no weight, and how many of these have other trained tensors."""
        without_effect = self.without_effect
        if not without_effect:
            return [f"{self.root}: none of {count(self.adapters, 'adapter')} is empty: each has a ΔW that is not 0."]
        with_extras = sum(member.extras > 0 for member in without_effect)
        also = f" {with_extras} of them have other tensors, such as a head, that do something." if with_extras else ""
        change = "changes" if len(without_effect) == 1 else "change"
        return [
            f"{self.root}: {len(without_effect)} of {count(self.adapters, 'adapter')} {change} no weight: ΔW = 0.{also}"
        ]

    def tables(self) -> list[Table[Member]]:
        """The adapters; those that are empty only in some modules are counted."""
        return [
            Table(
                "adapters with ΔW = 0",
                EMPTY_COLUMNS,
                self.members,
                uneventful=lambda member: not is_empty(member),
                sum_up=self._sum_up,
            )
        ]

    def _sum_up(self, number: int) -> str:
        more = "more " if self.without_effect else ""
        # Below a table the terminal says how all rows are shown.
        how = "" if self.without_effect else in_shell(f" (--verbose names {'it' if number == 1 else 'them'})")
        return f"{count(number, f'{more}adapter has', f'{more}adapters have')} ΔW = 0 in some of the modules{how}"

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "root",
            "adapters",
            rows_key("empty", EMPTY_COLUMNS, source="members"),
        )


def is_empty(member: Member) -> bool:
    """Whether ΔW is 0 in every module."""
    return member.zero_modules == member.modules


EMPTY_COLUMNS: Columns[Member] = (
    label_column("name", "adapter", distinct=True),
    Column("path"),
    Column("zero_modules", "zero_modules", "zero", priority=8, about="modules with ΔW = 0"),
    Column("modules", "modules", "modules", priority=7),
    Column("extras", "extras", "others", priority=6, about="trained tensors that belong to no pair"),
    Column("bytes", "bytes", "size", size, priority=5),
    Column("findings", lambda row: " ".join(row.findings), json=False),
    Column("findings", "findings", csv=False),
)


@dataclass(frozen=True, slots=True, repr=False)
class RowsResult(ResultSequence[Row]):
    """The answer to a SELECT: names of columns, and rows; the result is a sequence of the rows."""

    contents = "rows"

    columns: Sequence[str]
    rows: Sequence[Row]

    def conclusion(self) -> list[str]:
        """How many rows there are."""
        return [f"{count(len(self.rows), 'row')}."]

    def tables(self) -> list[Table[Row]]:
        """The rows."""
        return [Table("catalogue", [_column(i, name, self.rows) for i, name in enumerate(self.columns)], self.rows)]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "columns",
            Column("rows", lambda result: result.tables()[0].records(), type=list[dict[str, Any]]),
        )


def _column(index: int, name: str, rows: Sequence[Row]) -> Column[Row]:
    # The first columns of a SELECT are those that its author wants most. Texts are shortened before one is left out.
    priority = max(ALWAYS - index, 0)
    is_text = any(isinstance(row[index], str) for row in rows)
    return Column(name, f"{index}", name, align="left" if is_text else "right", priority=priority, distinct=index == 0)


def select_rows(home: Path, sql: str) -> RowsResult:
    """Run one SELECT on the catalogue, which can neither write nor run without end.

    Raises
    ------
    OptionError
        It is not one valid SELECT, or takes too long, or its answer is too large.
    """
    with open_to_read(home) as connection:
        connection.set_authorizer(_authorise)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, LONGEST_ANSWER)
        # Names of files that are not text are bytes in the catalogue; so may be the results of functions.
        connection.text_factory = os.fsdecode
        try:
            cursor = connection.execute(sql)
            # There was nothing, or nothing but blanks and comments.
            if cursor.description is None:
                raise OptionError("the SELECT is empty", fix=_FIX)
            names = [description[0] for description in cursor.description]
            rows: list[Row] = []
            total = 0
            for row in cursor:
                rows.append(tuple(os.fsdecode(value) if isinstance(value, bytes) else value for value in row))
                total += sum(ROW_BYTES + (len(value) if isinstance(value, str) else 0) for value in rows[-1])
                if total > MOST_BYTES:
                    raise OptionError("the answer is larger than 256 MiB", fix="select fewer columns, or add a LIMIT")
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            if is_interrupted(error):
                raise
            if "not authorized" in str(error) or "prohibited" in str(error):
                raise OptionError("the catalogue is only read here", fix=_FIX) from error
            raise OptionError(f"the catalogue cannot answer that: {error}", fix=_FIX) from error
    return RowsResult(_different(names), rows)


def _authorise(action: int, first: str | None, second: str | None, *_: object) -> int:
    del first
    forbidden = action not in _ALLOWED or (action == sqlite3.SQLITE_FUNCTION and second == "load_extension")
    return sqlite3.SQLITE_DENY if forbidden else sqlite3.SQLITE_OK


def _different(names: Sequence[str]) -> list[str]:
    """Names of columns that differ, since JSON and data frames need that."""
    uses: Counter[str] = Counter()
    different = []
    for name in names:
        uses[name] += 1
        different.append(f"{name}_{uses[name]}" if uses[name] > 1 else name or "column")
    return different
