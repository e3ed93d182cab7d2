"""The result of `similarity` for three and more adapters: tables of pairs, and where adapters agree or conflict."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from math import isnan
from typing import Any, TypeVar

import numpy as np

from loralens.analysis.every_pair import Pairwise, compare_every_pair, connected_groups, known_mean
from loralens.analysis.interacting_pairs import FIGHT, LARGE, Interaction, Interference, far_cosine, in_words, is_same
from loralens.analysis.two_adapters import SAME_START, Comparison, KnownBases, compare_subspaces
from loralens.choices import Of, Side
from loralens.core.adapter import Adapter
from loralens.linalg.factor import Floats
from loralens.tables.numbers import UNDEFINED, JsonMatrix, count, fixed, json_number, matrix, number, signed, span
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Keys, Rows, Table, rows_key
from loralens.verbs.comparisons.pair_similarity import JSON_COLUMNS, ModuleSimilarity, record_columns
from loralens.verbs.shared.adapters import short_labels
from loralens.version import __version__

Kept = TypeVar("Kept")
Pair = tuple[int, int]  # the indices of two adapters, which are also an index of a matrix

SHARES = ("shared", "private", "shared_chance", "private_chance")  # the arrays of `Interference`
MATRIX = 12  # adapters whose matrices fit on a terminal of 120 columns
PAIRS = 12  # pairs that are listed for people; --csv lists all
SAME_NAMED = 3  # pairs that are practically the same adapter and that the conclusion names
PLACES = 8  # places where two oppose each other that are listed for people, and as many where they agree


@dataclass(frozen=True, slots=True, repr=False)
class CollectionSimilarity(Tabular):
    """Three or more adapters in pairs, clustered, with the places where two of them oppose each other or agree.

    Attributes
    ----------
    adapters : tuple of str
        The labels of the adapters.
    of : str
        Whose directions were compared: ``update``, ``A`` or ``B``.
    side : str
        The side of φ in the tables, and of the φ maps of every pair.
    phi_rank : int or None
        The largest number of leading directions that φ compares.
    energy : Interference
        The shared and the private energy in the modules of ``pairs``.
    tree : float64 array, shape (T − 1, 4)
        The clusters, in the format of `loralens.analysis.every_pair.cluster_order`.
    order : sequence of int
        The indices of the adapters, with similar ones together.
    fights, agreements : sequence of Interaction
        The modules in which two updates oppose each other, and in which they agree; the largest contribution first.
    maps : bool
        Whether the record has the map φ(i, j) of every module of every pair.
    directions : KnownBases
        The directions that were computed for ``pairs``, from which the record of every pair follows.
    """

    adapters: tuple[str, ...]
    of: Of
    side: Side
    phi_rank: int | None
    loaded: tuple[Adapter, ...]
    pairs: Pairwise
    energy: Interference
    tree: Floats
    order: Sequence[int]
    fights: Sequence[Interaction]
    agreements: Sequence[Interaction]
    maps: bool = False
    directions: KnownBases = field(default_factory=KnownBases, repr=False, compare=False)

    @property
    def labels(self) -> list[str]:
        """The paths of the adapters without the folders that all of them share."""
        return short_labels(self.adapters)

    @property
    def cosine(self) -> Floats:
        """Cosine of the whole updates of every pair on the modules that both have, shape (T, T); NaN if one is 0."""
        return self.pairs.cosine

    def compare(self, first: int, second: int) -> Comparison | None:
        """The comparison of two of the adapters, by their indices, as `similarity` makes it of the two alone.

        It is None if they have no module in common.
        """
        # It is made when it is asked for, since the φ maps of all pairs of a hundred adapters would take 200 MB.
        names_in_both = [(module.holders[first], module.holders[second]) for module in self.pairs.modules]
        # Modules of one name may have another shape in some adapter; these are in `pairs` under their own entries.
        names = [name for name, other in names_in_both if name is not None and other is not None]
        if not names:
            return None
        return compare_subspaces(
            self.loaded[first], self.loaded[second], of=self.of, side=self.side, modules=names, phi_rank=self.phi_rank
        )

    def tables(self) -> list[Table[Any]]:
        """The adapters, the matrices if they fit, the pairs by |cosine|, and where two oppose each other or agree."""
        tables: list[Table[Any]] = [self._adapters_table()]
        # A larger matrix would lose columns on a terminal; --json has all of them.
        if self.pairs.count <= MATRIX:
            tables.append(self._matrix("cosine of the updates", self.pairs.cosine))
            title = f"φ, {self.side} side, mean over modules (chance {self._chance(self.side)})"
            tables.append(self._matrix(title, self.pairs.phi(self.side)))
            tables.append(self._matrix("shared initialisation: cosine of A", self.pairs.shared_initialisation))
        every = pairs_by_cosine(self.pairs)
        defined = [pair for pair in every if not isnan(self.pairs.cosine[pair])]
        title = "pairs, the largest |cosine| first"
        table = adapter_pairs_table(title, self.pairs, self.labels, (self.side,), defined)
        far = f"{far_cosine(self.pairs):.1f} standard deviations from chance"
        rule = f"each module with |cosine| ≥ {LARGE} and at least {far}"
        return [
            *tables,
            replace(table, most=PAIRS),
            self._interactions_table(f"two oppose each other ({rule})", self.fights),
            self._interactions_table(f"two agree ({rule})", self.agreements),
        ]

    def listing(self) -> list[Table[Pair]]:
        """Every pair of adapters, one pair a row."""
        every = list(combinations(range(self.pairs.count), 2))
        return [adapter_pairs_table("", self.pairs, self.labels, tuple(self.pairs.overlaps), every)]

    def conclusion(self) -> list[str]:
        """The pairs that are practically the same adapter, else the nearest pair; and the worst opposition of two."""
        pairs = [pair for pair in pairs_by_cosine(self.pairs) if not isnan(self.cosine[pair])]
        if not pairs:
            return ["No two of these adapters can be compared: they have no module in common, or ΔW is 0."]
        same = [pair for pair in pairs if is_same(float(self.cosine[pair]))]
        lines = [self._on_pair(pair) for pair in same[:SAME_NAMED]]
        if len(same) > SAME_NAMED:
            lines.append(f"So are {count(len(same) - SAME_NAMED, 'more pair')}.")
        # A pair that was named as the same is not named again as the nearest one.
        distinct = [pair for pair in pairs if pair not in same]
        if distinct:
            most = f"Of the {len(distinct)} {'other ' if same else ''}pairs the largest |cosine| is"
            lines.append(f"{most} {abs(self.cosine[distinct[0]]):.3f}: {self._on_pair(distinct[0])}")
        opposed = self.fights[0] if self.fights else None
        if opposed:
            names = f"{self.labels[opposed.first]} and {self.labels[opposed.second]}"
            # "fight" is used only if the opposition takes away half of the sum or more.
            verb = "fight" if opposed.cosine <= FIGHT else "oppose each other"
            lines.append(f"{names} {verb} most in {opposed.location} (cosine {signed(opposed.cosine)}).")
        else:
            lines.append(f"No two clearly oppose each other in any module (cosine {fixed('.1f')(-LARGE)} or less).")
        return lines

    def _on_pair(self, pair: Pair) -> str:
        first, second = (self.labels[t] for t in pair)
        cosine, z = float(self.cosine[pair]), float(self.pairs.cosine_z[pair])
        return f"{first} and {second} {in_words(cosine, z)} (cosine {signed(cosine)})."

    def sentences(self) -> list[str]:
        """Which adapters cannot be compared, and which began from one A."""
        return [*self._on_common_modules(), *self._on_initialisation()]

    def _pairs(self) -> list[dict[str, Any]]:
        """The records of every pair.

        With a hundred adapters of 12 modules they take 70 MB of text; `json_pieces` never holds all of it.
        """
        return [
            {"first": s, "second": t, "modules": modules} for s, t, modules in self._pair_records(lambda record: record)
        ]

    def json_pieces(self) -> Iterator[str]:
        """The text of that JSON object in pieces, one pair of adapters after the other."""
        # The object is opened without its brace at the end, and the pairs, which come last, follow.
        head = json.dumps({"loralens": __version__, **Table("", SUMMARY, ()).record(self)})
        yield f'{head[:-1]}, "pairs": ['
        separator = ""
        for s, t, modules in self._pair_records(json.dumps):
            yield f'{separator}{{"first": {s}, "second": {t}, "modules": [{", ".join(modules)}]}}'
            separator = ", "
        yield "]}"

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object; the pairs come last."""
        pair = {"first": int, "second": int, "modules": Rows(ModuleSimilarity, JSON_COLUMNS)}
        return (*SUMMARY, Column("pairs", cls._pairs, type=(pair,)))

    def _pair_records(self, keep: Callable[[dict[str, Any]], Kept]) -> Iterator[tuple[int, int, list[Kept]]]:
        """The indices of every pair, and what is kept of the record of each module that both have."""
        record = Table("", record_columns(maps=self.maps), ()).recorder()
        return compare_every_pair(
            self.loaded,
            self.pairs.modules,
            of=self.of,
            side=self.side,
            phi_rank=self.phi_rank,
            maps=self.maps,
            directions=self.directions,
            keep=lambda name, similarity: keep(record(ModuleSimilarity(name, similarity))),
        )

    def _adapters_table(self) -> Table[int]:
        """The adapters, one adapter a row, in the order of the clusters."""
        pairs, labels = self.pairs, self.labels
        places = {t: place for place, t in enumerate(self.order, start=1)}
        groups = enumerate(connected_groups(pairs.shared_initialisation), start=1)
        start = {t: number for number, group in groups for t in group}

        def ranks(t: int) -> list[int]:
            return sorted({int(rank) for rank in pairs.ranks[:, t] if rank})  # 0 where it lacks the module

        def norm(t: int) -> float | None:
            return float((pairs.norms[:, t] ** 2).sum() ** 0.5) if ranks(t) else None

        def share(key: str, title: str, priority: int, about: str) -> Column[int]:
            values = known_mean(getattr(self.energy, key))
            return Column(key, lambda t: json_number(values[t]), title, fixed(".2%"), priority=priority, about=about)

        columns: tuple[Column[int], ...] = (
            Column("place", places.__getitem__, "#", priority=ALWAYS),
            Column("adapter", labels.__getitem__, "adapter", align="left", priority=ALWAYS),
            Column("modules", lambda t: int((pairs.ranks[:, t] > 0).sum()), "modules", priority=4),
            Column("ranks", ranks, "r", span, priority=6),
            Column("frobenius", norm, "‖ΔW‖F", number, priority=7, about="length of ΔW"),
            share("shared", "shared", ALWAYS, "part of ‖ΔW‖² inside the directions of all others, on both sides"),
            share("shared_chance", "by chance", 5, "shared, if directions were random"),
            share("private", "private", 8, "part of ‖ΔW‖² outside the directions of all others, on both sides"),
            share("private_chance", "by chance", 5, "private, if directions were random"),
            Column(
                "start", start.__getitem__, "start", priority=3, about="adapters of one number began from one random A"
            ),
        )
        energy = "energy inside and outside the others' directions"
        title = f"{pairs.count} adapters, near ones side by side; {energy}"
        return Table(title, columns, self.order, whole=True)  # the numbers of the matrices stand here

    def _matrix(self, title: str, values: Floats) -> Table[int]:
        """The values of every pair, with the adapters down and across in the order of the clusters."""

        def column(place: int, t: int) -> Column[int]:
            # Headed by a number, as twelve names would not fit; the first columns say which adapter has it.
            return Column(f"{place}", lambda s: json_number(values[s, t]), f"{place}", fixed(".3f"))

        places = {t: place for place, t in enumerate(self.order, start=1)}
        columns: tuple[Column[int], ...] = (
            Column("place", places.__getitem__, "#", priority=ALWAYS),
            Column("adapter", self.labels.__getitem__, " ", align="left", priority=ALWAYS),
            *(column(place, t) for t, place in places.items()),
        )
        return Table(title, columns, self.order, whole=True)

    def _chance(self, side: Side) -> str:
        """The chance level of φ, or its range if ranks differ."""
        # Without the diagonal: φ of an adapter with itself is not a comparison.
        levels = self.pairs.chance(side)[~np.eye(self.pairs.count, dtype=bool)]
        levels = levels[~np.isnan(levels)]
        if not levels.size:
            return UNDEFINED
        low, high = number(levels.min()), number(levels.max())
        return low if low == high else f"{low} to {high}"

    def _on_common_modules(self) -> list[str]:
        """Which adapters cannot be compared, and how many modules pairs have in common if not all of them."""
        pairs = self.pairs
        sentences = [
            f"not compared: {label} has no module of the others' names and shapes"
            for t, label in enumerate(self.labels)
            if not pairs.ranks[:, t].any()
        ]
        # Off the diagonal, on which each adapter has all its modules in common with itself.
        counts = pairs.common[~np.eye(pairs.count, dtype=bool)]
        if counts.min() < counts.max() or counts.min() < len(pairs.modules):
            low, high = counts.min(), counts.max()
            sentences += [f"pairs have {low} to {high} modules in common: each is compared on those", ""]
        return sentences

    def _on_initialisation(self) -> list[str]:
        """The adapters that began from the same A, and the effect of that on φ."""
        labels = self.labels
        # A group of one began alone.
        families = [group for group in connected_groups(self.pairs.shared_initialisation) if len(group) > 1]
        rule = f"cosine of A ≥ {SAME_START}"
        sentences = [f"began from one A ({rule}): {', '.join(labels[t] for t in group)}" for group in families]
        if families and self.side == "in":
            warning = "between these, φ of the in side shows the common start, not a common task: read the out side"
            sentences += [f"  {warning}", ""]
        return sentences

    def _interactions_table(self, title: str, interactions: Sequence[Interaction]) -> Table[Interaction]:
        """Places in which two adapters oppose each other, or agree; those with most weight first."""
        labels = self.labels
        columns: tuple[Column[Interaction], ...] = (
            Column("first", lambda row: labels[row.first], "adapter", align="left", priority=ALWAYS),
            Column("second", lambda row: labels[row.second], "and", align="left", priority=ALWAYS),
            Column("location", "location", "in", align="left", priority=ALWAYS),
            Column("modules", "modules", "modules", priority=5),
            Column("cosine", "cosine", "cosine", fixed("+.3f"), priority=ALWAYS),
            Column("weight", "weight", "of all", fixed("+.3f"), priority=3, about="part of the whole cosine"),
        )
        return Table(title, columns, interactions, most=PLACES)


def _matrix_key(key: str) -> Column[CollectionSimilarity]:
    return Column(key, lambda result: matrix(getattr(result.pairs, key)), type=JsonMatrix)


def _interference_records(result: CollectionSimilarity) -> list[dict[str, Any]]:
    return [
        {
            "name": module.name,
            "shape": list(module.shape),
            "cosine": matrix(result.pairs.cosines[m]),
            **{key: [json_number(value) for value in getattr(result.energy, key)[m]] for key in SHARES},
        }
        for m, module in enumerate(result.pairs.modules)
    ]


INTERACTION_COLUMNS: list[Column[Interaction]] = [
    Column(key) for key in ("first", "second", "stack", "blocks", "kinds", "modules", "cosine", "weight")
]
# All but the pairs, for JSON.
SUMMARY: tuple[Column[CollectionSimilarity], ...] = (
    Column("of"),
    Column("side"),
    Column("adapters"),
    _matrix_key("cosine"),
    _matrix_key("cosine_z"),
    Column(
        "phi",
        lambda result: {side: matrix(result.pairs.phi(side)) for side in result.pairs.overlaps},
        type=dict[str, JsonMatrix],
    ),
    Column(
        "chance",
        lambda result: {side: matrix(result.pairs.chance(side)) for side in result.pairs.overlaps},
        type=dict[str, JsonMatrix],
    ),
    _matrix_key("shared_initialisation"),
    Column("common_modules", lambda result: result.pairs.common.tolist(), type=list[list[int]]),
    Column("order"),
    Column("groups", lambda result: connected_groups(result.pairs.shared_initialisation), type=list[list[int]]),
    Column(
        "interference",
        _interference_records,
        type=({"name": str, "shape": list[int], "cosine": JsonMatrix, **dict.fromkeys(SHARES, list[float])},),
    ),
    rows_key("fights", INTERACTION_COLUMNS),
    rows_key("agreements", INTERACTION_COLUMNS),
)


def pairs_by_cosine(pairs: Pairwise) -> list[Pair]:
    """The pairs of adapters by falling |cosine|; a pair without a cosine counts as 0."""
    cosine = np.nan_to_num(pairs.cosine)
    return sorted(combinations(range(pairs.count), 2), key=lambda pair: -abs(cosine[pair]))


def adapter_pairs_table(
    title: str, pairs: Pairwise, labels: Sequence[str], sides: Sequence[Side], rows: Sequence[Pair]
) -> Table[Pair]:
    """Pairs of adapters, one pair a row, with φ on these sides."""
    common = pairs.common

    def column(
        key: str | tuple[str, str], values: Floats, title: str, form: str, priority: int, about: str
    ) -> Column[Pair]:
        return Column(key, lambda pair: json_number(values[pair]), title, fixed(form), priority=priority, about=about)

    columns = [
        Column("first", lambda pair: labels[pair[0]], "adapter", align="left", priority=ALWAYS),
        Column("second", lambda pair: labels[pair[1]], "and", align="left", priority=ALWAYS),
        Column("modules", lambda pair: int(common[pair]), "modules", priority=4),
        column("cosine", pairs.cosine, "cosine", "+.3f", ALWAYS, "⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖); chance 0"),
        column("cosine_z", pairs.cosine_z, "z", "+.1f", 8, "standard deviations from chance"),
    ]
    for side in sides:
        columns += [
            column(("phi", side), pairs.phi(side), f"φ {side}", ".3f", 7, "of all directions, mean over modules"),
            column(("chance", side), pairs.chance(side), "by chance", ".3f", 5, f"of φ, {side} side"),
        ]
    about = f"from {SAME_START:g} on they began from the same random A"
    start = pairs.shared_initialisation
    columns.append(column("shared_initialisation", start, "cosine of A", ".3f", 6, about))
    return Table(title, columns, rows)
