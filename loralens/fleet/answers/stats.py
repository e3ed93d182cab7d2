"""A fleet in numbers: how many adapters of which dialects and ranks it has, and what a server must allow for them."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

from loralens.core.messages import command_line
from loralens.fleet.answers.empty import is_empty
from loralens.fleet.catalogue.members import Member
from loralens.tables.numbers import count, percent, size
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table

MOST = 0.9  # the share of the adapters for which the smallest sufficient rank is named


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
    formats: Sequence[FormatCount]

    def __len__(self) -> int:
        return len(self.ranks)

    def __getitem__(self, index: int) -> RankCount:
        return self.ranks[index]

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
            enough = next(row for row in self.ranks if row.share >= MOST)
            sentences.append(f"A server that loads all of them needs a largest rank of {self.ranks[-1].rank}.")
            if enough.rank < self.ranks[-1].rank:
                command = command_line("loralens", "compress", str(self.root), "--rank", str(enough.rank), "-o", "OUT")
                sentences.append(
                    f"{percent(enough.share)} of them need no more than {enough.rank}; for the others: {command}"
                )
        if self.adapters:
            per_adapter = size(round(self.index_bytes / self.adapters))
            sentences.append(f"The index takes {size(self.index_bytes)}: {per_adapter} per adapter.")
        return sentences

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
            "formats": formats.records(),
        }


def count_members(root: Path, home: Path, members: Sequence[Member], unreadable: int) -> StatsResult:
    """The numbers of these members, and of files that cannot be read."""
    by_rank = Counter(max(member.ranks, default=0) for member in members)
    ranks = sorted(by_rank)
    up_to = list(accumulate(by_rank[rank] for rank in ranks))
    by_format: dict[str, list[Member]] = defaultdict(list)
    for member in members:
        by_format[member.format].append(member)
    formats = [FormatCount(name, len(each), sum(one.size for one in each)) for name, each in by_format.items()]
    return StatsResult(
        root,
        len(members),
        unreadable,
        sum(member.size for member in members),
        sum(file.stat().st_size for file in home.iterdir() if file.is_file()),
        sum(is_empty(member) for member in members),
        sum(member.parameters for member in members),
        [RankCount(rank, by_rank[rank], most, most / len(members)) for rank, most in zip(ranks, up_to, strict=True)],
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
