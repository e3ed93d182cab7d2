"""A fleet in numbers: how many adapters of which dialects and ranks it has, and what a server must allow for them."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from loralens.core.messages import command_line, quote_word
from loralens.fleet.answers.empty import is_empty
from loralens.fleet.catalogue.members import Member
from loralens.tables.numbers import count, percent, size
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table

MOST = 0.9  # the share of the adapters for which the smallest sufficient rank is named
MOST_NAMED = 8  # adapters above this rank that a command names one by one


@dataclass(frozen=True, slots=True)
class RankCount:
    """How many adapters have this largest rank, and how many have at most this rank."""

    rank: int
    adapters: int
    up_to: int
    share: float


@dataclass(frozen=True, slots=True)
class FormatCount:
    """How many adapters are of a dialect, and their bytes."""

    format: str
    adapters: int
    bytes: int


@dataclass(frozen=True, slots=True)
class StatsResult(Tabular):
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

    def __len__(self) -> int:
        return len(self.ranks)

    def __getitem__(self, index: int) -> RankCount:
        return self.ranks[index]

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

    def listing(self) -> list[Table[Any]]:
        """The ranks."""
        return self.tables()[:1]

    def sentences(self) -> list[str]:
        """The rank that a server needs, the command that makes all adapters fit, and the size of the index."""
        sentences = []
        if self.ranks and self.ranks[0].rank < self.ranks[-1].rank:
            sentences.append(f"A server that loads all of them needs a largest rank of {self.ranks[-1].rank}.")
            if above := self.above(self.common_rank):
                share = percent(1 - len(above) / self.adapters)
                are = "is" if len(above) == 1 else "are"
                sentences.append(
                    f"{share} of them need no more than {self.common_rank}. {len(above)} {are} above it, and this "
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

    def record(self) -> dict[str, Any]:
        """The whole result as a JSON object."""
        ranks, formats = self.tables()
        return {
            "root": str(self.root),
            "adapters": self.adapters,
            "unreadable": self.unreadable,
            "empty": self.empty,
            "bytes": self.bytes,
            "parameters": self.parameters,
            "index_bytes": self.index_bytes,
            "ranks": ranks.records(),
            "common_rank": self.common_rank,
            "above": [str(self.root / name) for name in self.above(self.common_rank)],
            "formats": formats.records(),
        }


def count_members(
    root: Path, home: Path, members: Sequence[Member], unreadable: int, command: str = "loralens fleet stats --above"
) -> StatsResult:
    """The numbers of these members, and of files that cannot be read."""
    by_rank = Counter(max(member.ranks, default=0) for member in members)
    ranks = sorted(by_rank)
    up_to = list(accumulate(by_rank[rank] for rank in ranks))
    by_format: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        by_format[member.format].append(member)
    counted = [
        RankCount(rank, by_rank[rank], most, most / len(members)) for rank, most in zip(ranks, up_to, strict=True)
    ]
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


RANKS: tuple[Column[RankCount], ...] = (
    Column("rank", lambda row: row.rank, "rank", priority=ALWAYS),
    Column("adapters", lambda row: row.adapters, "adapters", "{:,}".format, priority=ALWAYS),
    Column(
        "up_to", lambda row: row.up_to, "up to it", "{:,}".format, priority=8, about="adapters of at most this rank"
    ),
    Column(
        "share", lambda row: row.share, "share", percent, priority=7, about="share of adapters of at most this rank"
    ),
)
FORMATS: tuple[Column[FormatCount], ...] = (
    Column("format", lambda row: row.format, "dialect", align="left", priority=ALWAYS),
    Column("adapters", lambda row: row.adapters, "adapters", "{:,}".format, priority=ALWAYS),
    Column("bytes", lambda row: row.bytes, "size", size, priority=8),
)
