"""The result of `similarity` for the modules of one adapter: its tables and sentences."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

from loralens.analysis.compare.nested import Nesting, Relation, closest, relations
from loralens.analysis.compare.pairwise import Of, Side
from loralens.core.names import some
from loralens.linalg.factor import Floats
from loralens.tables.numbers import fixed, json_number, matrix
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.outputs.pair_similarity import WHOSE


class ModulePair(NamedTuple):
    """One row: two modules of one width, and what their directions have in common."""

    first: str
    second: str
    width: int
    phi_first: float | None
    phi_all: float | None
    chance: float | None
    z: float | None


@dataclass(frozen=True, slots=True)
class NestedSimilarity(Tabular):
    """The modules of one adapter against each other, where they are of one width.

    Attributes
    ----------
    adapters : tuple of str
        What the one adapter is called.
    groups : sequence of Nesting
        The modules of one width, the largest group first.
    of : str
        Whose directions were compared: ``update``, ``A`` or ``B``.
    """

    adapters: tuple[str]
    groups: Sequence[Nesting]
    of: Of
    side: Side

    def __repr__(self) -> str:
        modules = sum(len(group.names) for group in self.groups)
        return f"NestedSimilarity({modules} modules of {len(self.groups)} widths, {self.side} side of {self.of})"

    def tables(self) -> list[Table[Any]]:
        """Of every width with two modules: kinds beside kinds, and the modules that share most."""
        (adapter,) = self.adapters
        tables: list[Table[Any]] = []
        for group in self.groups:
            if len(group.names) > 1:
                what = f"{len(group.names)} modules of width {group.width}, {self.side} side of {WHOSE[self.of]}"
                tables.append(Table(f"{adapter}: {what}", RELATION_COLUMNS, relations(group)))
                tables.append(Table("share most, beside chance", COLUMNS, _pairs(group, closest(group))))
        return tables

    def listing(self) -> list[Table[ModulePair]]:
        """Every two modules of one width."""
        return [
            Table("", COLUMNS, _pairs(group, list(combinations(range(len(group.names)), 2)))) for group in self.groups
        ]

    def sentences(self) -> list[str]:
        """Which modules were not compared, and why."""
        alone = [group.names[0] for group in self.groups if len(group.names) == 1]
        zero = [name for group in self.groups for name, k in zip(group.names, group.directions, strict=True) if not k]
        sentences = [f"no other module is as wide as {some(alone)}"] if alone else []
        return sentences + ([f"not compared, as {WHOSE[self.of]} is 0: {some(zero)}"] if zero else [])

    def record(self) -> dict[str, Any]:
        """Everything as a JSON object; what is not defined is null."""
        return {
            "of": self.of,
            "side": self.side,
            "adapters": list(self.adapters),
            "groups": [
                {
                    "width": group.width,
                    "modules": list(group.names),
                    "directions": group.directions.tolist(),
                    "first": matrix(group.first),
                    "phi": matrix(group.full),
                    "chance": matrix(group.chance),
                    "z": matrix(group.z),
                }
                for group in self.groups
            ],
            "cosine": [[1.0]],
            "shared_initialisation": [[1.0]],
        }


def _pairs(group: Nesting, indices: Sequence[tuple[int, int]]) -> list[ModulePair]:
    numbers: tuple[Floats, ...] = (group.first, group.full, group.chance, group.z)
    return [
        ModulePair(group.names[i], group.names[j], group.width, *(json_number(values[i, j]) for values in numbers))
        for i, j in indices
    ]


COLUMNS: tuple[Column[ModulePair], ...] = (
    Column("first", lambda row: row.first, "module", align="left", priority=ALWAYS),
    Column("second", lambda row: row.second, "and", align="left", priority=ALWAYS),
    Column("width", lambda row: row.width),
    Column("phi_first", lambda row: row.phi_first, "φ(1,1)", fixed(".3f"), priority=6),
    Column("phi", lambda row: row.phi_all, "φ(all)", fixed(".4f"), priority=ALWAYS),
    Column("chance", lambda row: row.chance, "chance", fixed(".2g"), priority=7),
    Column("z", lambda row: row.z, "z", fixed("+.1f"), priority=8),
)
RELATION_COLUMNS: tuple[Column[Relation], ...] = (
    Column("kind", lambda row: row.kinds[0], "kind", align="left", priority=ALWAYS),
    Column("other_kind", lambda row: row.kinds[1], "and", align="left", priority=ALWAYS),
    Column("pairs", lambda row: row.pairs, "pairs", priority=3),
    Column("phi_first", lambda row: row.first, "φ(1,1) nearest", fixed(".3f"), priority=4),
    Column("same_block", lambda row: row.same, "φ(all) same block", fixed(".4f"), priority=8),
    Column("next_block", lambda row: row.next, "next block", fixed(".4f"), priority=6),
    Column("farther", lambda row: row.farther, "farther", fixed(".4f"), priority=5),
    Column("chance", lambda row: row.chance, "chance", fixed(".2g"), priority=7),
)
