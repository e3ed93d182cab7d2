"""The result of `similarity` for three and more adapters: tables of pairs, and where adapters agree or conflict."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import isnan
from typing import Any, NamedTuple

import numpy as np

from loralens.analysis.compare.clusters import connected_groups
from loralens.analysis.compare.interference import LARGE, Interaction, Interference, far_cosine
from loralens.analysis.compare.pairwise import SHARED, Of, Pairwise, Side, known_mean
from loralens.analysis.compare.similarity import Comparison, compare_subspaces
from loralens.core.adapter import Adapter
from loralens.linalg.factor import Floats
from loralens.tables.numbers import UNDEFINED, count, fixed, json_number, matrix, number, span
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.inputs.adapters import short_labels
from loralens.verbs.outputs.pair_similarity import module_records
from loralens.version import __version__

MATRIX = 12  # adapters whose matrices fit on a terminal
PAIRS = 12  # pairs that are listed for people
LINES = 8  # sentences about where two fight, and as many about where they agree


class AdapterRow(NamedTuple):
    """One row: an adapter of the collection, in the order of the clusters."""

    place: int
    label: str
    modules: int
    ranks: Sequence[int]
    norm: float | None
    start: int  # the number of the group that began from one A
    shared: float
    shared_chance: float
    private: float
    private_chance: float


class MatrixRow(NamedTuple):
    """One row of a matrix: an adapter, and its values beside all others."""

    place: int
    label: str
    values: Sequence[float]


class PairRow(NamedTuple):
    """One row: two adapters."""

    first: str
    second: str
    modules: int
    cosine: float
    cosine_z: float
    phi: dict[Side, float]
    chance: dict[Side, float]
    initial: float


@dataclass(frozen=True, slots=True)
class CollectionSimilarity(Tabular):
    """Three or more adapters in pairs, clustered, and where two of them fight or agree.

    Attributes
    ----------
    adapters : tuple of str
        What they are called.
    of : str
        Whose directions were compared: ``update``, ``A`` or ``B``.
    side : str
        That of the φ maps of every pair.
    sides : tuple of str
        Those whose φ the tables show.
    phi_rank : int or None
        Leading directions that φ compares at most.
    energy : Interference
        Of the same modules.
    tree : float64 array, shape (T − 1, 4)
        The clusters, as `loralens.analysis.compare.pairwise.cluster_order` returns them.
    order : sequence of int
        The adapters so that near ones stand side by side.
    fights, agreements : sequence of Meeting
        Where two push against each other, and where the same way; most weight first.
    """

    adapters: tuple[str, ...]
    of: Of
    side: Side
    sides: tuple[Side, ...]
    phi_rank: int | None
    loaded: tuple[Adapter, ...]
    pairs: Pairwise
    energy: Interference
    tree: Floats
    order: Sequence[int]
    fights: Sequence[Interaction]
    agreements: Sequence[Interaction]

    def __repr__(self) -> str:
        return f"CollectionSimilarity({len(self.adapters)} adapters, {len(self.pairs.modules)} modules)"

    @property
    def labels(self) -> list[str]:
        """The adapters without the folders that all of them share."""
        return short_labels(self.adapters)

    @property
    def cosine(self) -> Floats:
        """Cosine of the whole updates of every pair on the modules that both have, shape (T, T); NaN if one is 0."""
        return self.pairs.cosine

    def compare(self, first: int, second: int) -> Comparison | None:
        """Two of the adapters as if they were alone, by their numbers; None where they have no module in common."""
        names_in_both = [(module.holders[first], module.holders[second]) for module in self.pairs.modules]
        names = [name for name, other in names_in_both if name is not None and other is not None]
        if not names:
            return None
        return compare_subspaces(
            self.loaded[first], self.loaded[second], of=self.of, side=self.side, modules=names, phi_rank=self.phi_rank
        )

    def tables(self) -> list[Table[Any]]:
        """The adapters, the matrices where they fit, and the pairs that are most alike, or most opposed."""
        energy = "energy inside and outside the others' directions"
        title = f"{self.pairs.count} adapters, near ones side by side; {energy}"
        tables: list[Table[Any]] = [Table(title, ADAPTER_COLUMNS, self._adapter_rows())]
        if self.pairs.count <= MATRIX:
            tables.append(self._matrix("cosine of the updates", self.pairs.cosine))
            for side in self.sides:
                title = f"φ, {side} side, mean over modules (chance {self._chance(side)})"
                tables.append(self._matrix(title, self.pairs.phi(side)))
            tables.append(self._matrix("shared initialisation: cosine of A", self.pairs.shared_initialisation))
        defined = [row for row in pair_rows(self.pairs, self.labels) if not isnan(row.cosine)]
        nearest = sorted(defined, key=lambda row: -abs(row.cosine))[:PAIRS]
        every = self.pairs.count * (self.pairs.count - 1) // 2
        which = f"the {len(nearest)} of {every} pairs" if len(defined) > PAIRS else "pairs"
        tables.append(Table(f"{which} with the largest |cosine|", pair_columns(self.sides), nearest))
        return tables

    def listing(self) -> list[Table[PairRow]]:
        """Every pair of adapters."""
        return [Table("", pair_columns(tuple(self.pairs.overlaps)), pair_rows(self.pairs, self.labels))]

    def sentences(self) -> list[str]:
        """What could not be compared, who began from one A, and where two fight and agree."""
        return [*self._on_common_modules(), *self._on_initialisation(), *self._on_meetings()]

    def record(self) -> dict[str, Any]:
        """Everything as a JSON object; of a hundred adapters it takes 200 MB, which `json_pieces` avoids."""
        return {**self._summary(), "pairs": list(self._pair_records())}

    def json_pieces(self) -> Iterator[str]:
        """The text of that JSON object, one pair of adapters after the other."""
        head = json.dumps({"loralens": __version__, **self._summary()})
        yield f'{head[:-1]}, "pairs": ['
        for i, record in enumerate(self._pair_records()):
            yield (", " if i else "") + json.dumps(record)
        yield "]}"

    def _summary(self) -> dict[str, Any]:
        """All but the pairs, for JSON."""
        pairs, energy = self.pairs, self.energy
        return {
            "of": self.of,
            "side": self.side,
            "adapters": list(self.adapters),
            "cosine": matrix(pairs.cosine),
            "cosine_z": matrix(pairs.cosine_z),
            "phi": {side: matrix(pairs.phi(side)) for side in pairs.overlaps},
            "chance": {side: matrix(pairs.chance(side)) for side in pairs.overlaps},
            "shared_initialisation": matrix(pairs.shared_initialisation),
            "common_modules": pairs.common.tolist(),
            "order": list(self.order),
            "groups": connected_groups(pairs.shared_initialisation),
            "interference": [
                {
                    "name": module.name,
                    "shape": list(module.shape),
                    "cosine": matrix(pairs.cosines[m]),
                    "shared": [json_number(value) for value in energy.shared[m]],
                    "private": [json_number(value) for value in energy.private[m]],
                    "shared_chance": [json_number(value) for value in energy.shared_chance[m]],
                    "private_chance": [json_number(value) for value in energy.private_chance[m]],
                }
                for m, module in enumerate(pairs.modules)
            ],
            "fights": [_meeting_record(meeting) for meeting in self.fights],
            "agreements": [_meeting_record(meeting) for meeting in self.agreements],
        }

    def _pair_records(self) -> Iterator[dict[str, Any]]:
        """φ maps, cosines and angles of every pair, as for two adapters alone."""
        for s, t in combinations(range(self.pairs.count), 2):
            comparison = self.compare(s, t)
            yield {"first": s, "second": t, "modules": module_records(comparison) if comparison else []}

    def _adapter_rows(self) -> list[AdapterRow]:
        pairs, energy, labels = self.pairs, self.energy, self.labels
        family = {t: i for i, group in enumerate(connected_groups(pairs.shared_initialisation), start=1) for t in group}
        parts = [
            known_mean(values)
            for values in (energy.shared, energy.shared_chance, energy.private, energy.private_chance)
        ]
        rows = []
        for place, t in enumerate(self.order, start=1):
            ranks = sorted({int(rank) for rank in pairs.ranks[:, t] if rank})
            norm = float((pairs.norms[:, t] ** 2).sum() ** 0.5) if ranks else None
            modules = int((pairs.ranks[:, t] > 0).sum())
            shares = [float(values[t]) for values in parts]
            rows.append(AdapterRow(place, labels[t], modules, ranks, norm, family[t], *shares))
        return rows

    def _matrix(self, title: str, values: Floats) -> Table[MatrixRow]:
        """The values of every pair, adapters down and across in the order of the clusters."""
        labels = self.labels
        rows = [
            MatrixRow(place, labels[s], [float(values[s, t]) for t in self.order])
            for place, s in enumerate(self.order, start=1)
        ]
        return Table(title, (*MATRIX_COLUMNS, *map(_matrix_column, range(len(self.order)))), rows)

    def _chance(self, side: Side) -> str:
        """The chance level, or its range where ranks differ."""
        levels = self.pairs.chance(side)[~np.eye(self.pairs.count, dtype=bool)]
        levels = levels[~np.isnan(levels)]
        if not levels.size:
            return UNDEFINED
        low, high = number(levels.min()), number(levels.max())
        return low if low == high else f"{low} to {high}"

    def _on_common_modules(self) -> list[str]:
        """Who cannot be compared with whom, where not every pair has every module."""
        pairs = self.pairs
        sentences = [
            f"not compared: {label} has no module of the others' names and shapes"
            for t, label in enumerate(self.labels)
            if not pairs.ranks[:, t].any()
        ]
        counts = pairs.common[~np.eye(pairs.count, dtype=bool)]
        if counts.min() < counts.max() or counts.min() < len(pairs.modules):
            low, high = counts.min(), counts.max()
            sentences += [f"pairs have {low} to {high} modules in common: each is compared on those", ""]
        return sentences

    def _on_initialisation(self) -> list[str]:
        """Who began from the same A, and what that does to φ."""
        labels = self.labels
        families = [group for group in connected_groups(self.pairs.shared_initialisation) if len(group) > 1]
        sentences = [
            f"began from one A (cosine of A ≥ {SHARED}): {', '.join(labels[t] for t in group)}" for group in families
        ]
        if families and "in" in self.pairs.overlaps:
            warning = "between these, φ of the in side shows the common start, not a common task: read the out side"
            sentences += [f"  {warning}", ""]
        return sentences

    def _on_meetings(self) -> list[str]:
        labels = self.labels
        rule = f"every module with |cosine| ≥ {LARGE} and {far_cosine(self.pairs):.1f} standard deviations from chance"
        sentences = []
        for verb, meetings in (("fight", self.fights), ("agree", self.agreements)):
            if not meetings:
                sentences.append(f"no two {verb} anywhere ({rule})")
                continue
            sentences.append(f"where two {verb} ({rule}), most weight first")
            for meeting in meetings[:LINES]:
                names = f"{labels[meeting.first]} and {labels[meeting.second]}"
                strength = f"cosine {meeting.cosine:+.3f} over {count(meeting.modules, 'module')}"
                sentences.append(f"  {names} {verb} in {meeting.location}: {strength}")
            if len(meetings) > LINES:
                sentences.append(f"  … and {len(meetings) - LINES} more: --json lists them")
        return sentences


def _meeting_record(meeting: Interaction) -> dict[str, Any]:
    return {
        "first": meeting.first,
        "second": meeting.second,
        "stack": meeting.stack,
        "blocks": list(meeting.blocks),
        "kinds": list(meeting.kinds),
        "modules": meeting.modules,
        "cosine": meeting.cosine,
        "weight": meeting.weight,
    }


def _share(key: str, title: str, value: Callable[[AdapterRow], float], priority: int) -> Column[AdapterRow]:
    return Column(key, lambda row: json_number(value(row)), title, fixed(".2%"), priority=priority)


def _matrix_column(t: int) -> Column[MatrixRow]:
    return Column(f"{t + 1}", lambda row: json_number(row.values[t]), f"{t + 1}", fixed(".3f"))


def pair_rows(pairs: Pairwise, labels: Sequence[str]) -> list[PairRow]:
    """Every two adapters."""
    cosine, z, initial, common = pairs.cosine, pairs.cosine_z, pairs.shared_initialisation, pairs.common
    phi = {side: pairs.phi(side) for side in pairs.overlaps}
    chance = {side: pairs.chance(side) for side in pairs.overlaps}
    return [
        PairRow(
            labels[s],
            labels[t],
            int(common[s, t]),
            float(cosine[s, t]),
            float(z[s, t]),
            {side: float(values[s, t]) for side, values in phi.items()},
            {side: float(values[s, t]) for side, values in chance.items()},
            float(initial[s, t]),
        )
        for s, t in combinations(range(pairs.count), 2)
    ]


def pair_columns(sides: Sequence[Side]) -> tuple[Column[PairRow], ...]:
    """Of every pair; φ on these sides."""
    phis = [
        column
        for side in sides
        for column in (
            _pair_column(side, "phi", f"φ {side}", 7, "of all directions, mean over modules"),
            _pair_column(side, "chance", "by chance", 5, f"of φ, {side} side"),
        )
    ]
    return (
        Column("first", lambda row: row.first, "adapter", align="left", priority=ALWAYS),
        Column("second", lambda row: row.second, "and", align="left", priority=ALWAYS),
        Column("modules", lambda row: row.modules, "modules", priority=4),
        Column(
            "cosine",
            lambda row: json_number(row.cosine),
            "cosine",
            fixed("+.3f"),
            priority=ALWAYS,
            about="⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖); chance 0",
        ),
        Column(
            "cosine_z",
            lambda row: json_number(row.cosine_z),
            "z",
            fixed("+.1f"),
            priority=8,
            about="standard deviations from chance",
        ),
        *phis,
        Column(
            "shared_initialisation",
            lambda row: json_number(row.initial),
            "cosine of A",
            fixed(".3f"),
            priority=6,
            about=f"from {SHARED:g} on they began from the same random A",
        ),
    )


def _pair_column(side: Side, quantity: str, title: str, priority: int, about: str) -> Column[PairRow]:
    return Column(
        (quantity, side),
        lambda row: json_number(getattr(row, quantity)[side]),
        title,
        fixed(".3f"),
        priority=priority,
        about=about,
    )


ADAPTER_COLUMNS: tuple[Column[AdapterRow], ...] = (
    Column("place", lambda row: row.place, "#", priority=ALWAYS),
    Column("adapter", lambda row: row.label, "adapter", align="left", priority=ALWAYS),
    Column("modules", lambda row: row.modules, "modules", priority=4),
    Column("ranks", lambda row: row.ranks, "r", span, priority=6),
    Column("frobenius", lambda row: row.norm, "‖ΔW‖F", number, priority=7),
    _share("shared", "shared", lambda row: row.shared, ALWAYS),
    _share("shared_chance", "by chance", lambda row: row.shared_chance, 5),
    _share("private", "private", lambda row: row.private, 8),
    _share("private_chance", "by chance", lambda row: row.private_chance, 5),
    Column("start", lambda row: row.start, "start", priority=3),
)
MATRIX_COLUMNS: tuple[Column[MatrixRow], ...] = (
    Column("place", lambda row: row.place, "#", priority=ALWAYS),
    Column("adapter", lambda row: row.label, " ", align="left", priority=ALWAYS),
)
