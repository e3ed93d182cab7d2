"""The result of `intruders`: its tables and sentences, and the adapter in which the intruders are weaker."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loralens.analysis.base.intruders import Intruders
from loralens.core.adapter import Adapter
from loralens.core.names import kind, natural_key
from loralens.tables.numbers import count, fixed, number, shape
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.outputs.rounding import RoundingCost


class ModuleIntruders(NamedTuple):
    """One row: a module, its rank, and the leading directions of its W + ΔW."""

    name: str
    rank: int
    intruders: Intruders

    @property
    def first(self) -> int | None:
        """The place of the first intruder among the leading directions, from 0; None where there is none."""
        return int(self.intruders.indices[0]) if self.intruders.count else None


class KindIntruders(NamedTuple):
    """One row: the modules of a kind, and the sums over them."""

    kind: str
    modules: int
    total: "IntruderTotal"


@dataclass(frozen=True, slots=True)
class IntruderTotal:
    """Directions looked at, intruders among them, and their share of the energy, over several modules."""

    directions: int
    count: int
    energy_share: float

    @classmethod
    def of(cls, modules: Sequence[Intruders]) -> "IntruderTotal":
        """The sums over some modules."""
        energy = sum(float((module.s**2).sum()) for module in modules)
        intruding = sum(float((module.s[module.indices] ** 2).sum()) for module in modules)
        looked = sum(module.s.size for module in modules)
        return cls(looked, sum(module.count for module in modules), intruding / energy if energy else 0.0)


@dataclass(frozen=True, slots=True)
class Removal:
    """The adapter whose intruders have another strength, and where it was written.

    Attributes
    ----------
    strength : float
        What of every intruder is left: 0 removes them, 1 keeps them.
    changed : int
        Modules that are others now.
    rounding : RoundingCost
        What narrower factors cost these modules.
    format : str
        The dialect of the file: the adapter's own, or ``peft`` where that cannot be written.
    """

    adapter: Adapter
    strength: float
    changed: int
    rounding: RoundingCost
    format: str
    path: Path | None
    dry_run: bool

    @property
    def ranks(self) -> list[int]:
        """The smallest and the largest rank of a module."""
        ranks = [module.rank for module in self.adapter.modules.values()]
        return [min(ranks), max(ranks)]

    def record(self) -> dict[str, Any]:
        """As a JSON object."""
        return {
            "strength": self.strength,
            "path": str(self.path) if self.path else None,
            "format": self.format,
            "dry_run": self.dry_run,
            "modules": len(self.adapter),
            "changed": self.changed,
            "ranks": self.ranks,
            "parameters": self.adapter.parameters,
            "rounding": self.rounding.record(),
        }


@dataclass(frozen=True, slots=True)
class IntrudersResult(Tabular, Mapping[str, Intruders]):
    """The intruders of an adapter in its base: a mapping from module names to `Intruders`.

    Attributes
    ----------
    path : str
        What the adapter is called: its path, if it was read.
    top : int
        Leading directions that were looked at.
    ranks : mapping of str to int
        The rank of each module.
    removal : Removal or None
        The changed adapter, where ``remove`` was given.
    """

    path: str
    base: str
    threshold: float
    top: int
    modules: Mapping[str, Intruders]
    ranks: Mapping[str, int]
    removal: Removal | None = None

    def __getitem__(self, name: str) -> Intruders:
        return self.modules[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.modules)

    def __len__(self) -> int:
        return len(self.modules)

    def __repr__(self) -> str:
        total = self.total
        return f"IntrudersResult({len(self)} modules, {total.count} of {total.directions} directions are intruders)"

    @property
    def adapter(self) -> Adapter | None:
        """The adapter whose intruders have another strength; None where none was asked for."""
        return self.removal.adapter if self.removal else None

    @property
    def total(self) -> IntruderTotal:
        """The sums over all modules."""
        return IntruderTotal.of(list(self.values()))

    def tables(self) -> list[Table[Any]]:
        """The modules, and their kinds."""
        total = self.total
        title = (
            f"{self.path} on {self.base}: {count(len(self), 'module')}, {total.count} of {total.directions} leading "
            f"directions of W + ΔW are intruders (score below {self.threshold:g}), with {PERCENT(total.energy_share)} "
            "of their energy"
        )
        return [Table(title, COLUMNS, self._rows()), Table("by kind", KIND_COLUMNS, self._kinds())]

    def sentences(self) -> list[str]:
        """What is not unique, what took longer, and what was written."""
        sentences = []
        tied = [name for name, module in self.items() if module.tied]
        if tied:
            equal = f"{len(tied)} modules have equal leading singular values, {tied[0]} first"
            sentences += [f"tied: {equal}; their vectors, and", "  so their scores and counts, are not unique"]
        dense = sum(module.method == "dense" for module in self.values())
        if dense:
            sentences.append(f"dense: {dense} modules needed a dense SVD, as Lanczos did not converge in time")
        return sentences + (self._on_removal(self.removal) if self.removal and self.removal.path else [])

    def record(self) -> dict[str, Any]:
        """Everything as a JSON object."""
        total = self.total
        return {
            "adapter": self.path,
            "base": self.base,
            "threshold": self.threshold,
            "top": self.top,
            "modules": Table("", COLUMNS, self._rows()).records(),
            "total": {
                "modules": len(self),
                "directions": total.directions,
                "count": total.count,
                "energy_share": total.energy_share,
            },
            **({"output": self.removal.record()} if self.removal else {}),
        }

    def _rows(self) -> list[ModuleIntruders]:
        return [ModuleIntruders(name, self.ranks[name], module) for name, module in self.items()]

    def _kinds(self) -> list[KindIntruders]:
        kinds: dict[str, list[Intruders]] = {}
        for name, module in self.items():
            kinds.setdefault(kind(name), []).append(module)
        return [
            KindIntruders(label, len(kinds[label]), IntruderTotal.of(kinds[label]))
            for label in sorted(kinds, key=natural_key)
        ]

    def _on_removal(self, removal: Removal) -> list[str]:
        low, high = removal.ranks
        shrunk = count(self.total.count if removal.strength != 1 else 0, "intruder")
        changed = f"{removal.changed} of {len(removal.adapter)} modules changed"
        return [
            *([str(removal.rounding)] if removal.rounding.module else []),
            f"{'would write' if removal.dry_run else 'wrote'} {removal.path}: {removal.format}, {shrunk} scaled by "
            f"{removal.strength:g}, {changed}, rank {low if low == high else f'{low}–{high}'}",
        ]


def _list_column(module: Intruders) -> list[dict[str, float]]:
    return [
        {"index": int(j) + 1, "singular_value": float(module.s[j]), "score": float(module.scores[j])}
        for j in module.indices
    ]


def _first_column(
    key: str, title: str, value: Callable[[Intruders, int], float], text: Callable[[float], str], priority: int
) -> Column[ModuleIntruders]:
    """Of the first intruder; nothing where there is none. JSON has it in the list of all."""
    return Column(
        key,
        lambda row: None if row.first is None else value(row.intruders, row.first),
        title,
        lambda number: "" if number is None else text(number),
        priority=priority,
        json=False,
    )


def _count_of(total: tuple[int, int]) -> str:
    return f"{total[0]}/{total[1]}"


PERCENT = fixed(".1%")

COLUMNS: tuple[Column[ModuleIntruders], ...] = (
    Column("name", lambda row: row.name, "module", align="left", priority=ALWAYS),
    Column("shape", lambda row: list(row.intruders.shape), "out × in", shape, csv=False, priority=2),
    Column("out", lambda row: row.intruders.shape[0], json=False),
    Column("in", lambda row: row.intruders.shape[1], json=False),
    Column("rank", lambda row: row.rank, "r", priority=4),
    Column("count", lambda row: row.intruders.count),
    Column(
        "counts",
        lambda row: (row.intruders.count, row.intruders.s.size),
        "intruders",
        _count_of,
        priority=ALWAYS,
        json=False,
        csv=False,
    ),
    Column("energy_share", lambda row: row.intruders.energy_share, "energy", PERCENT, priority=8),
    _first_column("first", "first", lambda _, j: j + 1, str, 5),
    _first_column("first_value", "its σ", lambda module, j: float(module.s[j]), number, 3),
    _first_column("first_score", "its score", lambda module, j: float(module.scores[j]), fixed(".3f"), 3),
    Column(
        "lowest_score",
        lambda row: float(row.intruders.scores.min(initial=1.0)),
        "lowest",
        fixed(".3f"),
        priority=7,
        json=False,
    ),
    Column("random_score", lambda row: row.intruders.random_score, "random", fixed(".3f"), priority=5),
    Column("chance", lambda row: row.intruders.chance, "chance", number, priority=6),
    Column("singular_values", lambda row: row.intruders.s.tolist()),
    Column("scores", lambda row: row.intruders.scores.tolist()),
    Column("intruders", lambda row: _list_column(row.intruders), csv=False),
    Column("tied", lambda row: row.intruders.tied),
    Column("method", lambda row: row.intruders.method),
)
KIND_COLUMNS: tuple[Column[KindIntruders], ...] = (
    Column("kind", lambda row: row.kind, "kind", align="left", priority=ALWAYS),
    Column("modules", lambda row: row.modules, "modules", priority=5),
    Column(
        "counts",
        lambda row: (row.total.count, row.total.directions),
        "intruders",
        _count_of,
        priority=ALWAYS,
        about="of the leading directions of W + ΔW",
    ),
    Column(
        "energy_share",
        lambda row: row.total.energy_share,
        "energy",
        PERCENT,
        priority=8,
        about="their part of the energy of those directions",
    ),
)
