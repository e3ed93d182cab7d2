"""The results of `compress` and `expand`."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from loralens.core.adapter import Adapter
from loralens.formats.records.fleets.contents import Kind
from loralens.tables.numbers import count, percent, size, span
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table


@final
@dataclass(frozen=True, slots=True)
class CompressedAdapter:
    """One row: an adapter in the file.

    Attributes
    ----------
    kind : str
        ``joint`` in the bases of its group, ``alone`` in few bits, ``copy`` with the numbers of another adapter, or
        ``stored`` as it was.
    error : float
        ‖ΔW − ΔW'‖/‖ΔW‖ over all modules, measured on the file.
    rank : int
        The rank of its widest module.
    pair_bytes : int
        The bytes of its pairs in the source.
    own_bytes : int
        The bytes in the file that only this adapter uses instead of its pairs. Bases belong to their group.
    group : int or None
    """

    name: str
    kind: Kind
    error: float
    rank: int
    pair_bytes: int
    own_bytes: int
    group: int | None


@final
@dataclass(frozen=True, slots=True)
class Refused:
    """An adapter that is not in the file, and why."""

    name: str
    reason: str


@final
@dataclass(frozen=True, slots=True)
class Part:
    """One row for people: the adapters of one group, or all adapters that are stored in one way.

    Attributes
    ----------
    name : str
        The first adapter.
    adapters : int
    before, after : int
        The bytes of their pairs in the sources, and of what replaces them, shared bases included.
    error : float
        The largest error of an adapter.
    """

    kind: Kind
    name: str
    adapters: int
    before: int
    after: int
    error: float


KINDS: dict[Kind, str] = {"joint": "together", "alone": "alone", "copy": "copies", "stored": "as they were"}
PARTS: tuple[Column[Part], ...] = (
    Column("kind", lambda row: row.kind, "stored", lambda kind: KINDS[kind], align="left", priority=ALWAYS),
    Column("adapters", lambda row: row.adapters, "adapters", priority=ALWAYS),
    Column("name", lambda row: row.name, "the first", align="left", priority=4),
    Column("before", lambda row: row.before, "pairs before", size, priority=7),
    Column("after", lambda row: row.after, "after", size, priority=8),
    Column("share", lambda row: row.after / row.before if row.before else None, "share", percent, priority=8),
    Column("error", lambda row: row.error, "largest error", percent, priority=8),
)
COLUMNS: tuple[Column[CompressedAdapter], ...] = (
    Column("name", lambda row: row.name, "adapter", align="left", priority=ALWAYS, distinct=True),
    Column("kind", lambda row: row.kind, "kind", align="left", priority=8),
    Column("group", lambda row: row.group, "group", priority=5),
    Column("rank", lambda row: row.rank, "r", priority=6),
    Column("error", lambda row: row.error, "error", percent, priority=8),
    Column("pair_bytes", lambda row: row.pair_bytes, "pairs before", size, priority=7),
    Column("own_bytes", lambda row: row.own_bytes, "own bytes", size, priority=7),
)
REFUSED: tuple[Column[Refused], ...] = (
    Column("name", lambda row: row.name, "adapter", align="left", priority=ALWAYS),
    Column("reason", lambda row: row.reason, "reason", align="left", priority=ALWAYS),
)


@final
@dataclass(frozen=True, slots=True, repr=False)
class CompressionResult(Tabular):
    """A fleet in one file, with the error of every adapter; the result is a sequence of these.

    Attributes
    ----------
    output : Path
    allowed_error : float
        The largest error that was allowed.
    adapters : sequence of CompressedAdapter
    refused : sequence of Refused
        Adapters that are not in the file.
    group_bytes : sequence of int
        The bytes of the bases that each group shares.
    file_bytes_before, file_bytes_after : int
        The sizes of the files of weights before, and of the new file.
    """

    output: Path
    allowed_error: float
    adapters: Sequence[CompressedAdapter]
    refused: Sequence[Refused]
    group_bytes: Sequence[int]
    file_bytes_before: int
    file_bytes_after: int

    def __len__(self) -> int:
        return len(self.adapters)

    def __getitem__(self, index: int) -> CompressedAdapter:
        return self.adapters[index]

    def __repr__(self) -> str:
        return f"CompressionResult({count(len(self.adapters), 'adapter')}, {size(self.file_bytes_after)})"

    @property
    def pair_bytes_before(self) -> int:
        """The bytes of all pairs in the sources."""
        return sum(row.pair_bytes for row in self.adapters)

    @property
    def pair_bytes_after(self) -> int:
        """The bytes of everything in the file that replaces pairs, shared bases included."""
        return sum(row.own_bytes for row in self.adapters) + sum(self.group_bytes)

    @property
    def largest_error(self) -> float:
        """The largest error of an adapter, measured on the file."""
        return max((row.error for row in self.adapters), default=0.0)

    def conclusion(self) -> list[str]:
        """What was written, the size of the pairs and of the file before and after, and the largest error."""
        pairs = self.pair_bytes_after / max(1, self.pair_bytes_before)
        files = self.file_bytes_after / max(1, self.file_bytes_before)
        return [
            f"Wrote {self.output}: {count(len(self.adapters), 'adapter')}, each with an error of at most "
            f"{percent(self.largest_error)} of its ΔW.",
            f"The pairs take {percent(pairs)} of their bytes ({size(self.pair_bytes_before)} → "
            f"{size(self.pair_bytes_after)}), and the whole file {percent(files)} of the files "
            f"({size(self.file_bytes_before)} → {size(self.file_bytes_after)}).",
            *(
                [f"Not in it: {count(len(self.refused), 'file')} that cannot be read or written."]
                if self.refused
                else []
            ),
        ]

    def tables(self) -> list[Table[Any]]:
        """The groups and ways of storing, the adapters, and those that are not in the file."""
        return [
            Table(str(self.output), PARTS, self.parts()),
            Table("adapters", COLUMNS, self.adapters, uneventful=lambda _: True, sum_up=lambda _: ""),
            Table("not in the file", REFUSED, self.refused),
        ]

    def listing(self) -> list[Table[CompressedAdapter]]:
        """The adapters, one a row."""
        return [Table("adapters", COLUMNS, self.adapters)]

    def parts(self) -> list[Part]:
        """The groups, and the adapters that are stored in each of the other ways, the most bytes first."""
        rows: dict[tuple[Kind, int | None], list[CompressedAdapter]] = defaultdict(list)
        for row in self.adapters:
            rows[row.kind, row.group if row.kind == "joint" else None].append(row)
        parts = [
            Part(
                kind, members[0].name, len(members), sum(row.pair_bytes for row in members),
                sum(row.own_bytes for row in members) + (0 if group is None else self.group_bytes[group]),
                max(row.error for row in members),
            )
            for (kind, group), members in rows.items()
        ]  # fmt: skip
        return sorted(parts, key=lambda part: -part.before)

    def record(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "output": str(self.output),
            "allowed_error": self.allowed_error,
            "largest_error": self.largest_error,
            "pair_bytes_before": self.pair_bytes_before,
            "pair_bytes_after": self.pair_bytes_after,
            "file_bytes_before": self.file_bytes_before,
            "file_bytes_after": self.file_bytes_after,
            "parts": Table("", PARTS, self.parts()).records(),
            "adapters": Table("", COLUMNS, self.adapters).records(),
            "refused": Table("", REFUSED, self.refused).records(),
        }


@final
@dataclass(frozen=True, slots=True, repr=False)
class ExpansionResult(Tabular):
    """An adapter of a compressed fleet.

    Attributes
    ----------
    source : Path
        The file of the fleet.
    name : str
    adapter : Adapter
    error : float
        ‖ΔW − ΔW'‖/‖ΔW‖ of the adapter in the file, as it was measured when the file was written.
    truncation : float
        ‖ΔW' − ΔW''‖/‖ΔW'‖ of the smaller rank that was asked for; 0 if none was.
    output : Path or None
        The folder with the adapter; None if nothing was written.
    """

    source: Path
    name: str
    adapter: Adapter
    error: float
    truncation: float
    output: Path | None

    def __repr__(self) -> str:
        return f"ExpansionResult({self.name!r}, {self.adapter!r})"

    @property
    def error_bound(self) -> float:
        """The largest possible ‖ΔW − ΔW''‖/‖ΔW‖: the error of the file, and that of the smaller rank."""
        # ‖ΔW − ΔW''‖ ≤ ‖ΔW − ΔW'‖ + ‖ΔW' − ΔW''‖, and ‖ΔW'‖ ≤ (1 + error)·‖ΔW‖.
        return self.error + self.truncation * (1 + self.error) if self.truncation else self.error

    def conclusion(self) -> list[str]:
        """What was written, and how far it is from the adapter before compression."""
        ranks = {module.rank for module in self.adapter.modules.values()}
        rank = f"rank {span(sorted(ranks))}"
        written = f"Wrote {self.output}" if self.output else "Nothing was written"
        error = f"at most {percent(self.error_bound)}" if self.truncation else percent(self.error)
        return [
            f"{written}: {self.name}, {count(len(self.adapter), 'module')} of {rank}.",
            f"Its error is {error} of ΔW before compression.",
        ]

    def tables(self) -> list[Table[Any]]:
        """None: the result is one adapter."""
        return []

    def record(self) -> dict[str, Any]:
        """The result as a JSON object."""
        return {
            "source": str(self.source),
            "name": self.name,
            "output": None if self.output is None else str(self.output),
            "modules": len(self.adapter),
            "rank": max((module.rank for module in self.adapter.modules.values()), default=0),
            "error": self.error,
            "error_bound": self.error_bound,
        }
