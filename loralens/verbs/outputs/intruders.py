"""The result of `intruders`: its tables and sentences, and the adapter in which the intruders are weaker."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from loralens.analysis.base.intruders import Intruders
from loralens.core.adapter import Adapter
from loralens.tables.numbers import count, fixed, number, shape, span
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.outputs.groups import group_by_kind
from loralens.verbs.outputs.rounding import RoundingCost


class ModuleIntruders(NamedTuple):
    """One row: a module, its rank, and what was found among the leading directions of its W + ΔW."""

    name: str
    rank: int
    intruders: Intruders

    @property
    def first(self) -> int | None:
        """The index of the first intruder among the leading directions, counted from 0; None if there is none."""
        return int(self.intruders.indices[0]) if self.intruders.count else None


class KindIntruders(NamedTuple):
    """One row: the modules of a kind, and the sums over them."""

    kind: str
    modules: int
    total: "IntruderTotal"


@dataclass(frozen=True, slots=True)
class IntruderTotal:
    """Sums over several modules: the leading directions, the intruders among them, and their share of the energy."""

    directions: int
    count: int
    energy_share: float

    @classmethod
    def of(cls, modules: Sequence[Intruders]) -> "IntruderTotal":
        """The sums over these modules."""
        # This is a share of sums, not a mean of shares: a module of small norm must not count as much as one of large
        # norm.
        energy = sum(float((module.s**2).sum()) for module in modules)
        intruding = sum(float((module.s[module.indices] ** 2).sum()) for module in modules)
        directions = sum(module.s.size for module in modules)
        return cls(directions, sum(module.count for module in modules), intruding / energy if energy else 0.0)


@dataclass(frozen=True, slots=True)
class Removal:
    """The adapter whose intruders have another strength, and where it was written.

    Attributes
    ----------
    strength : float
        The factor of every intruder: 0 removes them, 1 keeps them.
    changed : int
        The number of modules that were edited.
    rounding : RoundingCost
        The error from rounding the factors of these modules to the dtype that was asked for.
    format : str
        The dialect of the file: the adapter's own, or ``peft`` if that cannot be written.
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
        # Every intruder adds one rank, so modules have different ranks unless they were made equal.
        ranks = [module.rank for module in self.adapter.modules.values()]
        return [min(ranks), max(ranks)]

    def record(self) -> dict[str, Any]:
        """The edit as a JSON object."""
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
        The label of the adapter: its path, if it was read from a file.
    top : int
        The number of leading directions that were examined in every module.
    ranks : mapping of str to int
        The rank of each module of the adapter.
    removal : Removal or None
        The edited adapter; None unless ``remove`` was given.
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
        """The adapter whose intruders have another strength; None unless ``remove`` was given."""
        return self.removal.adapter if self.removal else None

    @property
    def total(self) -> IntruderTotal:
        """The sums over all modules."""
        return IntruderTotal.of(list(self.values()))

    def tables(self) -> list[Table[Any]]:
        """The modules, and the sums over the modules of a kind."""
        title = f"{self.path} on {self.base}: {self.top} leading directions, intruders score below {self.threshold:g}"
        kinds = [
            KindIntruders(kind, len(modules), IntruderTotal.of(modules))
            for kind, modules in group_by_kind(self.modules).items()
        ]
        modules = Table(title, COLUMNS, self._rows(), lambda row: not row.intruders.count, _sum_up_others)
        return [modules, Table("by kind", KIND_COLUMNS, kinds)]

    def conclusion(self) -> list[str]:
        """How many of the leading directions are intruders, how much energy they have, and in how many modules."""
        total, modules = self.total, count(len(self), "module")
        if not total.count:
            return [
                f"No intruders: all {total.directions:,} leading directions of W + ΔW in {modules} resemble one of W."
            ]
        with_any = sum(module.count > 0 for module in self.values())
        # The count is given with the share of the energy, as counts saturate where ‖ΔW‖ is large: in one study 57 % and
        # 99.7 % of the directions were intruders, with 43 % and 92 % of the energy (docs/intruders.md).
        return [
            f"{total.count:,} of {total.directions:,} leading directions of W + ΔW are intruders, with "
            f"{PERCENT(total.energy_share)} of their energy, in {with_any} of {modules}."
        ]

    def sentences(self) -> list[str]:
        """Which vectors are not unique, which modules took a dense SVD, and what was written."""
        sentences = []
        # Equal singular values share a subspace, of which any orthonormal basis is as right as another.
        tied = [name for name, module in self.items() if module.tied]
        if tied:
            equal = f"{len(tied)} modules have equal leading singular values (the first is {tied[0]})"
            sentences += [f"tied: {equal}; their vectors, and", "  so their scores and counts, are not unique"]
        dense = sum(module.method == "dense" for module in self.values())
        # The user should see why a module took long: at n = 2048, 2.5 s instead of 0.13 s.
        if dense:
            sentences.append(f"dense: {dense} modules needed a dense SVD, as Lanczos did not converge in time")
        return sentences + (self._on_removal(self.removal) if self.removal and self.removal.path else [])

    def record(self) -> dict[str, Any]:
        """The whole result as a JSON object."""
        return {
            "adapter": self.path,
            "base": self.base,
            "threshold": self.threshold,
            "top": self.top,
            "modules": Table("", COLUMNS, self._rows()).records(),
            "total": {"modules": len(self), **asdict(self.total)},
            **({"output": self.removal.record()} if self.removal else {}),
        }

    def _rows(self) -> list[ModuleIntruders]:
        return [ModuleIntruders(name, self.ranks[name], module) for name, module in self.items()]

    def _on_removal(self, removal: Removal) -> list[str]:
        # λ = 1 edits nothing, so no intruder counts as scaled.
        shrunk = count(self.total.count if removal.strength != 1 else 0, "intruder")
        changed = f"{removal.changed} of {len(removal.adapter)} modules changed"
        return [
            # Modules that did not change were not rounded.
            *([str(removal.rounding)] if removal.rounding.module else []),
            f"{'would write' if removal.dry_run else 'wrote'} {removal.path}: {removal.format}, {shrunk} scaled by "
            f"{number(removal.strength)}, {changed}, rank {span(removal.ranks)}",
        ]


def _sum_up_others(modules: int) -> str:
    return f"{count(modules, 'module')} without an intruder"


def _first_column(
    key: str, title: str, value: Callable[[Intruders, int], float], text: Callable[[float], str], priority: int
) -> Column[ModuleIntruders]:
    """A quantity of the first intruder, blank if there is none; JSON has it in the list of all intruders."""

    def of_first(row: ModuleIntruders) -> float | None:
        return None if row.first is None else value(row.intruders, row.first)

    def shown(number: float | None) -> str:
        return "" if number is None else text(number)

    return Column(key, of_first, title, shown, priority=priority, json=False)


def _intruder_records(row: ModuleIntruders) -> list[dict[str, float]]:
    module = row.intruders
    return [  # counted from 1, as people count singular values
        {"index": int(j) + 1, "singular_value": float(module.s[j]), "score": float(module.scores[j])}
        for j in module.indices
    ]


def _lowest_score(row: ModuleIntruders) -> float:
    # Without directions the lowest score is 1, which is the score of a direction of W itself.
    return float(row.intruders.scores.min(initial=1.0))


def _count_of(total: tuple[int, int]) -> str:
    return f"{total[0]}/{total[1]}"


PERCENT = fixed(".1%")

# On a narrow terminal the shape and the details of the first intruder are left out first. The energy stays longest,
# because counts alone do not tell a good adapter from a harmful one.
COLUMNS: tuple[Column[ModuleIntruders], ...] = (
    Column("name", lambda row: row.name, "module", align="left", priority=ALWAYS),
    Column("shape", lambda row: list(row.intruders.shape), "out × in", shape, csv=False, priority=2),
    Column("out", lambda row: row.intruders.shape[0], json=False),
    Column("in", lambda row: row.intruders.shape[1], json=False),
    Column("rank", lambda row: row.rank, "r", priority=4),
    # Machines get the number of intruders alone, and people get it with the number of directions.
    Column("count", lambda row: row.intruders.count),
    Column(
        "counts",
        lambda row: (row.intruders.count, row.intruders.s.size),
        "intruders",
        _count_of,
        priority=ALWAYS,
        json=False,
        csv=False,
        about="of the leading directions of W + ΔW",
    ),
    Column(
        "energy_share",
        lambda row: row.intruders.energy_share,
        "energy",
        PERCENT,
        priority=8,
        about="their part of the energy of those directions",
    ),
    _first_column("first", "first", lambda _, j: j + 1, str, 5),
    _first_column("first_value", "its σ", lambda module, j: float(module.s[j]), number, 3),
    _first_column("first_score", "its score", lambda module, j: float(module.scores[j]), fixed(".3f"), 3),
    Column(
        "lowest_score",
        _lowest_score,
        "lowest",
        fixed(".3f"),
        priority=7,
        json=False,
        about="the lowest score: the best |cosine| with any direction of W",
    ),
    # The control: nearly every random direction of a large weight is an intruder, so a low score alone proves little.
    Column(
        "random_score",
        lambda row: row.intruders.random_score,
        "random",
        fixed(".3f"),
        priority=5,
        about="the score of a random direction",
    ),
    Column("chance", lambda row: row.intruders.chance, "chance", number, priority=6),
    Column("singular_values", lambda row: row.intruders.s.tolist()),
    Column("scores", lambda row: row.intruders.scores.tolist()),
    Column("intruders", _intruder_records, csv=False),
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
