"""The result of `similarity` for two adapters: its tables and sentences."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import degrees, isnan, nan
from statistics import fmean, median
from typing import Any, NamedTuple

from loralens.analysis.compare.initialisation import Initialisation
from loralens.analysis.compare.pairwise import Of, Side
from loralens.analysis.compare.similarity import Comparison, Similarity
from loralens.core.names import kind, natural_key, some
from loralens.linalg.subspace import Overlap
from loralens.tables.numbers import count, fixed, json_number, number
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table

WHOSE = {"update": "ΔW", "A": "A", "B": "B"}
STRONG = 0.5  # φ(1, 1) from which the strongest directions are counted as shared


class ModuleSimilarity(NamedTuple):
    """One row: a module of the first adapter beside that of the second."""

    name: str
    similarity: Similarity


class KindSimilarity(NamedTuple):
    """One row: the modules of a kind, and their overlaps on one side."""

    kind: str
    side: Side
    members: Sequence[Similarity]

    @property
    def overlaps(self) -> list[Overlap]:
        """Of every module on this side."""
        return [member.overlaps[self.side] for member in self.members]


@dataclass(frozen=True, slots=True)
class PairSimilarity(Tabular, Mapping[str, Similarity]):
    """Two adapters, module by module: a mapping from the first's module names to `Similarity`.

    Attributes
    ----------
    adapters : tuple of str
        What the two are called.
    initialisation : Initialisation
        Whether they began from the same random factors.
    of : str
        Whose directions were compared: ``update``, ``A`` or ``B``.
    """

    adapters: tuple[str, str]
    comparison: Comparison
    initialisation: Initialisation
    of: Of
    side: Side

    def __getitem__(self, name: str) -> Similarity:
        return self.comparison[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.comparison)

    def __len__(self) -> int:
        return len(self.comparison)

    def __repr__(self) -> str:
        return f"PairSimilarity({len(self)} modules, {self.side} side of {self.of}, cosine {number(self.cosine)})"

    @property
    def cosine(self) -> float:
        """Cosine of the two whole updates on the modules that both have, in [−1, 1]; 0 where one of them is 0."""
        return self.comparison.cosine

    @property
    def cosine_z(self) -> float:
        """`cosine` in standard deviations of its null; 0 where one of the updates is 0."""
        return self.comparison.cosine_z

    def tables(self) -> list[Table[Any]]:
        """The modules, and their means by kind on every side that was measured."""
        first, second = self.adapters
        title = f"{first} and {second}: {count(len(self), 'module')}, {self.side} side of {WHOSE[self.of]}"
        if not self.comparison.zero:
            title += f", cosine {self.cosine:+.3f} in all (z {self.cosine_z:+.1f})"
        return [
            pair_modules_table(self.comparison, title),
            Table("mean by kind", KIND_COLUMNS, _kinds(self.comparison)),
        ]

    def sentences(self) -> list[str]:
        """Which modules were not compared, and why."""
        zero = [f"{name} ({similarity.zero})" for name, similarity in self.items() if similarity.zero]
        notes = {
            "not compared, as ΔW is 0": zero,
            "not compared, as the shapes differ": self.comparison.misfits,
            f"only in {self.adapters[0]}": self.comparison.alone[0],
            f"only in {self.adapters[1]}": self.comparison.alone[1],
        }
        return [f"{text}: {some(names)}" for text, names in notes.items() if names]

    def record(self) -> dict[str, Any]:
        """Everything as a JSON object; what is not defined is null."""
        comparison, start = self.comparison, self.initialisation
        cosine = None if comparison.zero else comparison.cosine
        return {
            "of": self.of,
            "side": self.side,
            "adapters": list(self.adapters),
            "modules": module_records(comparison),
            "cosine": [[1.0, cosine], [cosine, 1.0]],
            "cosine_z": None if comparison.zero else comparison.cosine_z,
            "shared_initialisation": [[1.0, json_number(start.cosine)], [json_number(start.cosine), 1.0]],
            "initialisation": {
                "verdict": start.verdict,
                "text": start.text,
                "advice": start.advice,
                "alike": start.alike,
                "compared": start.compared,
                "phi": {end: json_number(value) for end, value in start.spans.items()},
                "chance": {end: json_number(value) for end, value in start.chance.items()},
            },
            "only_first": list(comparison.alone[0]),
            "only_second": list(comparison.alone[1]),
            "misfits": list(comparison.misfits),
        }


def pair_modules_table(comparison: Comparison, title: str = "") -> Table[ModuleSimilarity]:
    """The modules of two adapters, one a row."""
    return Table(title, COLUMNS, [ModuleSimilarity(name, similarity) for name, similarity in comparison.items()])


def module_records(comparison: Comparison) -> list[dict[str, Any]]:
    """The modules of two adapters for JSON."""
    return pair_modules_table(comparison).records()


def _kinds(comparison: Comparison) -> list[KindSimilarity]:
    """The modules that are 0 in neither adapter by kind, in natural order, once for every side."""
    kinds: dict[str, list[Similarity]] = {}
    for name, similarity in comparison.items():
        if not similarity.zero:
            kinds.setdefault(kind(name), []).append(similarity)
    return [
        KindSimilarity(label, side, kinds[label])
        for label in sorted(kinds, key=natural_key)
        for side in kinds[label][0].overlaps
    ]


def _sides(row: ModuleSimilarity) -> dict[str, dict[str, float | None]]:
    return {
        side: {
            "first": json_number(overlap.first),
            "full": json_number(overlap.full),
            "chance": json_number(overlap.full_chance),
            "z": json_number(overlap.z),
        }
        for side, overlap in row.similarity.overlaps.items()
    }


def _of_overlap(key: str, quantity: str, title: str, form: str, priority: int) -> Column[ModuleSimilarity]:
    """A number of the side asked for, which JSON has among those of both sides."""
    return Column(
        key,
        lambda row: json_number(getattr(row.similarity.overlap, quantity)),
        title,
        fixed(form),
        priority=priority,
        json=False,
    )


def _distance(key: str, title: str = "") -> Column[ModuleSimilarity]:
    """A distance of the two subspaces; None where one of them is empty."""
    return Column(
        key,
        lambda row: getattr(row.similarity.overlap, key) if row.similarity.overlap.angles.size else None,
        title,
        fixed(".3f"),
        priority=2,
    )


def _angle(key: str, title: str, choose: Callable[[Sequence[float]], float]) -> Column[ModuleSimilarity]:
    """A principal angle in degrees; JSON and CSV have all of them in radians."""

    def value(row: ModuleSimilarity) -> float | None:
        angles = [degrees(angle) for angle in row.similarity.overlap.angles]
        return choose(angles) if angles else None

    return Column(key, value, title, fixed(".1f"), priority=3, json=False, csv=False)


def _ranks(ranks: Sequence[int]) -> str:
    first, second = ranks
    return f"{first}" if first == second else f"{first} | {second}"


def _mean(values: Sequence[float]) -> float:
    """Mean of what is defined; NaN where nothing is."""
    defined = [value for value in values if not isnan(value)]
    return sum(defined) / len(defined) if defined else nan


def _cka(side: Side) -> Column[ModuleSimilarity]:
    return Column(("cka", side), lambda row: json_number(row.similarity.cka[side]))


def _cka_chance(side: Side) -> Column[ModuleSimilarity]:
    return Column(("cka_chance", side), lambda row: json_number(row.similarity.cka_chance[side]))


COLUMNS: tuple[Column[ModuleSimilarity], ...] = (
    Column("name", lambda row: row.name, "module", align="left", priority=ALWAYS),
    Column("second_name", lambda row: row.similarity.other),
    Column("shape", lambda row: list(row.similarity.shape), csv=False),
    Column("out", lambda row: row.similarity.shape[0], json=False),
    Column("in", lambda row: row.similarity.shape[1], json=False),
    Column("ranks", lambda row: list(row.similarity.ranks), "r", _ranks, priority=5),
    Column("directions", lambda row: list(row.similarity.directions)),
    Column("norms", lambda row: list(row.similarity.norms)),
    Column(
        "cosine",
        lambda row: None if row.similarity.zero else row.similarity.cosine,
        "cosine",
        fixed("+.3f"),
        priority=ALWAYS,
    ),
    Column(
        "cosine_z",
        lambda row: None if row.similarity.zero else row.similarity.cosine_z,
        "z",
        fixed("+.1f"),
        priority=6,
    ),
    Column("phi", lambda row: row.similarity.overlap.phi.tolist(), csv=False),
    Column("chance", lambda row: row.similarity.overlap.chance.tolist(), csv=False),
    _of_overlap("phi_first", "first", "φ(1,1)", ".3f", priority=7),
    _of_overlap("phi_all", "full", "φ(all)", ".3f", priority=8),
    _of_overlap("phi_chance", "full_chance", "chance", ".2g", priority=6),
    Column("phi_z", lambda row: json_number(row.similarity.overlap.z), "z", fixed("+.1f"), priority=7),
    Column("principal_angles", lambda row: row.similarity.overlap.angles.tolist()),
    _angle("smallest_angle", "θ min", min),
    _angle("median_angle", "median", median),
    _angle("largest_angle", "max °", max),
    _distance("projection_distance", "distance"),
    _distance("geodesic_distance"),
    _distance("gap"),
    Column("sides", _sides, csv=False),
    _cka("in"),
    _cka("out"),
    Column(
        "side_cka",
        lambda row: json_number(row.similarity.cka[row.similarity.side]),
        "CKA",
        fixed(".3f"),
        priority=4,
        json=False,
        csv=False,
    ),
    _cka_chance("in"),
    _cka_chance("out"),
    Column("shared_initialisation", lambda row: json_number(row.similarity.initial)),
    Column("zero", lambda row: row.similarity.zero),
)

KIND_COLUMNS: tuple[Column[KindSimilarity], ...] = (
    Column("kind", lambda row: row.kind, "kind", align="left", priority=ALWAYS),
    Column("side", lambda row: row.side, "side", align="left", priority=ALWAYS),
    Column("modules", lambda row: len(row.members), "modules", priority=5),
    Column(
        "cosine", lambda row: _mean([member.cosine for member in row.members]), "cosine", fixed("+.3f"), priority=ALWAYS
    ),
    Column(
        "phi_first", lambda row: _mean([overlap.first for overlap in row.overlaps]), "φ(1,1)", fixed(".4f"), priority=7
    ),
    Column(
        "first_chance", lambda row: fmean(1 / overlap.n for overlap in row.overlaps), "chance", fixed(".2g"), priority=3
    ),
    Column("strong", lambda row: sum(overlap.first > STRONG for overlap in row.overlaps), f"> {STRONG}", priority=2),
    Column(
        "phi_all", lambda row: _mean([overlap.full for overlap in row.overlaps]), "φ(all)", fixed(".4f"), priority=8
    ),
    Column(
        "chance",
        lambda row: _mean([overlap.full_chance for overlap in row.overlaps]),
        "chance",
        fixed(".2g"),
        priority=6,
    ),
    Column("z", lambda row: _mean([overlap.z for overlap in row.overlaps]), "z", fixed("+.1f"), priority=6),
    Column("cka", lambda row: _mean([member.cka[row.side] for member in row.members]), "CKA", fixed(".3f"), priority=4),
)
