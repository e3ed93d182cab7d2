"""The result of `similarity` for two adapters: its tables and sentences."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, starmap
from math import degrees, isnan, nan, sqrt
from statistics import median
from typing import Any, NamedTuple

from loralens.analysis.interacting_pairs import FAR, in_words, is_same
from loralens.analysis.nested import Nesting, Relation, closest, relations
from loralens.analysis.two_adapters import Comparison, SharedInitialisation, Similarity
from loralens.choices import Of, Side
from loralens.core.names import some
from loralens.linalg.factor import Floats
from loralens.linalg.subspace import Overlap
from loralens.tables.numbers import SIDES, JsonMatrix, count, fixed, number, percent, signed
from loralens.tables.result import ResultMapping, Tabular
from loralens.tables.table import ALWAYS, Column, Columns, Keys, Table, follow, label_column, rows_key, shape_columns
from loralens.verbs.shared.adapters import short_labels
from loralens.verbs.shared.module_groups import group_by_kind

WHOSE = {"update": "ΔW", "A": "A", "B": "B"}
# φ(1, 1) from which the strongest directions count as shared: they are then at most 45° apart.
STRONG = 0.5


class ModuleSimilarity(NamedTuple):
    """One row: a module of the first adapter, and its similarity to the same module of the second."""

    name: str
    similarity: Similarity

    @property
    def compared(self) -> Similarity | None:
        """The similarity; None if one of the updates is 0, which has no direction."""
        return None if self.similarity.zero else self.similarity

    @property
    def spans(self) -> Overlap | None:
        """The overlap of the two subspaces; None if one of them is empty."""
        return self.similarity.overlap if self.similarity.overlap.angles.size else None


class KindSimilarity(NamedTuple):
    """One row: the modules of a kind, seen from one side."""

    kind: str
    side: Side
    members: Sequence[Similarity]


@dataclass(frozen=True, slots=True, repr=False)
class PairSimilarity(ResultMapping[Similarity]):
    """Two adapters compared module by module: a mapping from module names of the first to `Similarity`.

    Attributes
    ----------
    adapters : tuple of str
        The labels of the two adapters.
    initialisation : SharedInitialisation
        The signs that they began from the same random factors.
    of : str
        Whose directions were compared: ``update``, ``A`` or ``B``.
    side : str
        The side of the columns for people; JSON has both sides of an update.
    maps : bool
        Whether the record has the map φ(i, j) of every module; the modules themselves have it always.
    """

    contents = "comparison"

    adapters: tuple[str, str]
    comparison: Comparison
    initialisation: SharedInitialisation
    of: Of
    side: Side
    maps: bool = False

    @property
    def cosine(self) -> float:
        """Cosine of the two whole updates on the modules that both have, in [−1, 1]; 0 if one of them is 0."""
        return self.comparison.cosine

    @property
    def cosine_z(self) -> float:
        """`cosine` in standard deviations of its null; 0 if one of the updates is 0."""
        return self.comparison.cosine_z

    def tables(self) -> list[Table[Any]]:
        """The modules, and the means over the modules of a kind on every side that was measured."""
        first, second = self.adapters
        title = f"{first} and {second}: {count(len(self), 'module')}, {self.side} side of {WHOSE[self.of]}"
        modules = pair_modules_table(self.comparison, title)
        return [
            replace(modules, uneventful=_is_at_chance, sum_up=_sum_up_chance),
            Table("mean by kind", KIND_COLUMNS, _kinds(self.comparison)),
        ]

    def conclusion(self) -> list[str]:
        """How much the two have in common: as vectors, and in the directions of the side that was compared."""
        first, second = short_labels(self.adapters)
        if self.comparison.zero:  # 0 has no direction, so its cosine of 0 would mean nothing
            return [f"{first} and {second} cannot be compared: one of them is 0 in every module that both have."]
        over = f"over {count(len(self), 'module')}"
        measured = f"cosine {signed(self.cosine)} {over}, {_deviations(self.cosine_z)} standard deviations from chance"
        lines = [f"{first} and {second} {in_words(self.cosine, self.cosine_z)}: {measured}."]
        strengths = [sqrt(sum(one.norms[i] ** 2 for one in self.values())) for i in (0, 1)]
        # One adapter at two scales has a cosine of 1, but the two are not interchangeable.
        if is_same(self.cosine) and not 0.9 < strengths[1] / strengths[0] < 1.1:
            lines.append(f"{second} is {number(strengths[1] / strengths[0], 3)} times as strong.")
        overlaps = [one.overlap for one in self.values() if not one.zero]
        phi, chance = (_mean([getattr(overlap, key) for overlap in overlaps]) for key in ("full", "full_chance"))
        if not isnan(phi):
            side, level = f"On the {self.side} side of {WHOSE[self.of]}", f"where chance gives {percent(chance, 2)}"
            lines.append(f"{side} {self._shared(percent(phi))}, {level} (mean of φ of all directions).")
        return lines

    def _shared(self, share: str) -> str:
        """The overlap in words: of unequal ranks it is the part of the fewer directions that lies in the others."""
        first, second = short_labels(self.adapters)
        signs = {(a > b) - (a < b) for a, b in (one.directions for one in self.values() if not one.zero)}
        if signs == {0}:
            return f"they share {share} of their directions"
        if len(signs - {0}) == 2:
            return f"{share} of the directions of the lower rank lie within those of the higher one"
        lower, higher = (second, first) if 1 in signs else (first, second)
        return f"{share} of the directions of {lower} lie within those of {higher}"

    def sentences(self) -> list[str]:
        """Whether the two began from one A, and which modules were not compared, and why."""
        zero = [f"{name} ({similarity.zero})" for name, similarity in self.items() if similarity.zero]
        # In the order of the reasons: nothing to compare, no way to compare, no partner.
        notes = {
            "not compared, as ΔW is 0": zero,
            "not compared, as the shapes differ": self.comparison.misfits,
            f"only in {self.adapters[0]}": self.comparison.alone[0],
            f"only in {self.adapters[1]}": self.comparison.alone[1],
        }
        # On the in side a common initialisation is a warning, which stands above; on the out side it changes nothing.
        start = self.initialisation
        meaning = (
            "as two checkpoints of a run do" if start.both_sided else "the in side would show that and no common task"
        )
        lines = [f"{start.text}: {meaning}"] if start.text and self.side == "out" else []
        return lines + [f"{text}: {some(names)}" for text, names in notes.items() if names]

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "of",
            "side",
            "adapters",
            rows_key(
                "modules",
                JSON_COLUMNS,
                ModuleSimilarity,
                lambda result: pair_modules_table(result.comparison, maps=result.maps),
            ),
            # Matrices, so that programs read two adapters and more in the same way.
            Column(
                "cosine", lambda result: _matrix_of(nan if result.comparison.zero else result.cosine), type=JsonMatrix
            ),
            Column("cosine_z", lambda result: None if result.comparison.zero else result.cosine_z, type=float),
            Column("shared_initialisation", lambda result: _matrix_of(result.initialisation.cosine), type=JsonMatrix),
            *(
                Column(("initialisation", key), f"initialisation.{key}")
                for key in ("verdict", "text", "advice", "alike", "compared")
            ),
            Column(("initialisation", "phi"), "initialisation.spans", type=SIDES),
            Column(("initialisation", "chance"), "initialisation.chance", type=SIDES),
            Column("only_first", "comparison.alone.0", type=list[str]),
            Column("only_second", "comparison.alone.1", type=list[str]),
            Column("misfits", "comparison.misfits"),
        )


def pair_modules_table(comparison: Comparison, title: str = "", *, maps: bool = False) -> Table[ModuleSimilarity]:
    """The modules of two adapters, one module per row; with ``maps`` the JSON has the map φ(i, j) of each."""
    rows = [ModuleSimilarity(name, similarity) for name, similarity in comparison.items()]
    return Table(title, record_columns(maps=maps), rows)


def record_columns(*, maps: bool) -> Sequence[Column[ModuleSimilarity]]:
    """The columns of a module, with or without the map φ(i, j) and its chance level."""
    # With k₁ rows and k₂ columns, the maps are most of the text of the JSON, and few readers need them.
    return COLUMNS if maps else [column for column in COLUMNS if column.key not in MAPS]


def _matrix_of(value: float) -> list[list[float]]:
    return [[1.0, value], [value, 1.0]]


def _deviations(z: float) -> str:
    # Above ten standard deviations a decimal has no meaning.
    return f"{abs(z):.1f}" if abs(z) < 10 else f"{abs(z):,.0f}"


def _is_at_chance(row: ModuleSimilarity) -> bool:
    """Whether a module shows nothing: an update of 0, or cosine and φ within `FAR` standard deviations of chance."""
    similarity = row.similarity
    # A z-score that is not defined, where chance allows one value only, shows nothing either.
    return bool(similarity.zero) or not (abs(similarity.cosine_z) >= FAR or abs(similarity.overlap.z) >= FAR)


def _sum_up_chance(modules: int) -> str:
    return f"{count(modules, 'module')} within {FAR:.0f} standard deviations of chance"


def _kinds(comparison: Comparison) -> list[KindSimilarity]:
    """The kinds in natural order, once for every side, with the modules that are 0 in neither adapter."""
    kinds = group_by_kind({name: similarity for name, similarity in comparison.items() if not similarity.zero})
    return [KindSimilarity(kind, side, members) for kind, members in kinds.items() for side in members[0].overlaps]


def _sides(row: ModuleSimilarity) -> dict[str, dict[str, float]]:
    """The overlaps on both sides, for JSON."""
    return {
        side: {key: getattr(overlap, name) for key, name in OVERLAP.items()}
        for side, overlap in row.similarity.overlaps.items()
    }


def _angle_column(
    key: str, title: str, choose: Callable[[Sequence[float]], float], about: str
) -> Column[ModuleSimilarity]:
    """A principal angle in degrees, for people; JSON and CSV have all of them in radians."""

    def value(row: ModuleSimilarity) -> float | None:
        return degrees(choose(row.spans.angles.tolist())) if row.spans else None

    return Column(key, value, title, fixed(".1f"), priority=3, json=False, csv=False, about=about)


def _mean(values: Iterable[float]) -> float:
    """The mean of the values that are defined; NaN if none is."""
    # A z-score is not defined where chance allows one value only, for example where two spans fill the space.
    defined = [value for value in values if not isnan(value)]
    return sum(defined) / len(defined) if defined else nan


def _mean_column(key: str, title: str, form: str, priority: int, path: str, about: str) -> Column[KindSimilarity]:
    """The mean of a quantity over the modules of a kind; ``{}`` in its path is the side of the row."""

    def mean(row: KindSimilarity) -> float:
        return _mean(map(follow(path.format(row.side)), row.members))

    return Column(key, mean, title, fixed(form), priority=priority, about=f"{about}; mean over modules")


# What the columns mean; two tables have them.
ABOUT_COSINE = "⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖)"
ABOUT_FIRST = "squared cosine of the two strongest directions, from 0 to 1"
ABOUT_ALL = "part of the directions of the lower rank inside those of the other, from 0 to 1"
ABOUT_CHANCE = "φ(all) of random directions"
ABOUT_Z = "of φ(all): standard deviations from chance"
ABOUT_CKA = "cosine of the two Gram matrices, from 0 to 1: like φ, but strong directions count for more"

# Key of an overlap in JSON → its attribute.
OVERLAP = {"first": "first", "full": "full", "chance": "full_chance", "z": "z"}
MAPS = ("phi", "chance")  # the keys of the columns that are matrices

# On a narrow terminal angles and distances are left out first: φ also describes the two subspaces, and its chance level
# is shown with it. The cosine is never left out, as its sign says whether the updates agree or oppose each other.
# The columns of one side are for people and CSV; JSON has both sides in ``sides``.
COLUMNS: Columns[ModuleSimilarity] = (
    label_column("name", "module"),
    # Dialects write names in different ways, so the second adapter may call the module otherwise.
    Column("second_name", "similarity.other"),
    *shape_columns("similarity.shape"),
    # The nominal ranks, and the numbers of directions that ΔW really has.
    Column(
        "ranks",
        "similarity.ranks",
        "r",
        # One number where the ranks agree, as they mostly do.
        lambda ranks: " | ".join(map(str, dict.fromkeys(ranks))),
        priority=5,
        about="nominal rank, of both where they differ",
    ),
    Column("directions", "similarity.directions"),
    Column("norms", "similarity.norms"),
    Column(
        "cosine",
        "compared.cosine",
        "cosine",
        signed,
        priority=ALWAYS,
        about=f"{ABOUT_COSINE}: 1 the same, 0 chance, −1 the opposite",
        matters="strongest",
    ),
    Column(
        "cosine_z",
        "compared.cosine_z",
        "z",
        fixed("+.1f"),
        priority=6,
        about="of the cosine: standard deviations from chance",
    ),
    # A map is a matrix, for which CSV has no cell.
    *(Column(key, f"similarity.overlap.{key}", type=JsonMatrix, csv=False) for key in MAPS),
    *(
        Column(key, f"similarity.overlap.{name}", title, fixed(form), priority=priority, json=False, about=about)
        for key, name, title, form, priority, about in (
            ("phi_first", "first", "φ(1,1)", ".3f", 7, ABOUT_FIRST),
            ("phi_all", "full", "φ(all)", ".3f", 8, ABOUT_ALL),
            ("phi_chance", "full_chance", "chance", ".2g", 6, ABOUT_CHANCE),
        )
    ),
    Column("phi_z", "similarity.overlap.z", "z", fixed("+.1f"), priority=7, about=ABOUT_Z),
    Column("principal_angles", "similarity.overlap.angles", type=list[float]),
    _angle_column(
        "smallest_angle", "θ min °", min, "smallest principal angle of the two spans: 0 is a direction in common"
    ),
    _angle_column("median_angle", "median", median, "median principal angle"),
    _angle_column("largest_angle", "max °", max, "largest principal angle: 90 is a direction that the other lacks"),
    Column(
        "projection_distance",
        "spans.projection_distance",
        "distance",
        fixed(".3f"),
        priority=2,
        about="√Σsin²θ over the principal angles: 0 where one span lies in the other",
    ),
    Column("geodesic_distance", "spans.geodesic_distance"),
    Column("gap", "spans.gap"),
    Column("sides", _sides, type=dict.fromkeys(("in?", "out?"), dict.fromkeys(OVERLAP, float)), csv=False),
    Column(("cka", "in"), "similarity.cka.in"),
    Column(("cka", "out"), "similarity.cka.out"),
    # The CKA of the requested side; only the table for people needs it, as JSON and CSV have both sides.
    Column(
        "side_cka",
        lambda row: row.similarity.cka[row.similarity.side],
        "CKA",
        fixed(".3f"),
        priority=4,
        json=False,
        csv=False,
        about=ABOUT_CKA,
    ),
    Column(("cka_chance", "in"), "similarity.cka_chance.in"),
    Column(("cka_chance", "out"), "similarity.cka_chance.out"),
    Column("shared_initialisation", "similarity.initial"),
    Column("zero", "similarity.zero"),
)

# The maps are there only if they are asked for.
JSON_COLUMNS = [replace(column, may_lack=column.key in MAPS) for column in COLUMNS]

KIND_COLUMNS: Columns[KindSimilarity] = (
    label_column("kind", "kind"),
    label_column("side", "side"),
    Column("modules", "members.len", "modules", priority=5),
    _mean_column("cosine", "cosine", "+.3f", ALWAYS, "cosine", ABOUT_COSINE),
    _mean_column("phi_first", "φ(1,1)", ".4f", 7, "overlaps.{}.first", ABOUT_FIRST),
    Column(
        "first_chance",
        # Of two random unit vectors.
        lambda row: _mean(1 / member.overlaps[row.side].n for member in row.members),
        "chance",
        fixed(".2g"),
        priority=3,
        about="φ(1,1) of random directions; mean over modules",
    ),
    # A mean hides whether a few modules share everything or all of them a little; the count does not.
    Column(
        "strong",
        lambda row: sum(member.overlaps[row.side].first > STRONG for member in row.members),
        f"> {STRONG}",
        priority=2,
        about=f"modules whose φ(1,1) is above {STRONG}",
    ),
    _mean_column("phi_all", "φ(all)", ".4f", 8, "overlaps.{}.full", ABOUT_ALL),
    _mean_column("chance", "chance", ".2g", 6, "overlaps.{}.full_chance", ABOUT_CHANCE),
    _mean_column("z", "z", "+.1f", 6, "overlaps.{}.z", ABOUT_Z),
    _mean_column("cka", "CKA", ".3f", 4, "cka.{}", ABOUT_CKA),
)


Pair = tuple[int, int]  # the indices of two modules of one width, which are also an index of a matrix


@dataclass(frozen=True, slots=True, repr=False)
class NestedSimilarity(Tabular):
    """The modules of one adapter compared with each other, within each width.

    Attributes
    ----------
    adapters : tuple of str
        The label of the adapter. The tuple is there for two adapters and more, whose results have the same attribute.
    groups : sequence of Nesting
        One group of modules for each width, the largest group first.
    of : str
        Whose directions were compared: ``update``, ``A`` or ``B``.
    """

    adapters: tuple[str]
    groups: Sequence[Nesting]
    of: Of
    side: Side

    def tables(self) -> list[Table[Any]]:
        """Two tables for every width of at least two modules: pairs of kinds, and the pairs that share most."""
        (adapter,) = self.adapters
        tables: list[Table[Any]] = []
        for group in self.groups:
            if len(group.names) > 1:  # a width with one module has no pair; a sentence names it
                what = f"{len(group.names)} modules of width {group.width}, {self.side} side of {WHOSE[self.of]}"
                tables.append(Table(f"{adapter}: {what}", RELATION_COLUMNS, relations(group)))
                tables.append(_pairs_table("share most, compared with chance", group, closest(group)))
        return tables

    def listing(self) -> list[Table[Pair]]:
        """Every pair of modules of one width, one pair a row."""
        return [_pairs_table("", group, list(combinations(range(len(group.names)), 2))) for group in self.groups]

    def conclusion(self) -> list[str]:
        """The two modules that share most beyond chance, and how many pairs do."""
        (adapter,) = self.adapters
        pairs = sum(len(group.names) * (len(group.names) - 1) // 2 for group in self.groups)
        on_side = f"on the {self.side} side of {WHOSE[self.of]}"
        if not pairs:
            return [f"{adapter} has no two modules of one width, so none can be compared."]
        # The lists are by falling z-score, so the first of a group is its most similar pair.
        candidates = [(group, pair) for group in self.groups if len(group.names) > 1 for pair in closest(group)[:1]]
        if not candidates:
            return [f"No two modules of {adapter} share more than chance gives {on_side} ({pairs:,} pairs)."]
        group, pair = max(candidates, key=lambda item: item[0].full[item[1]])
        names = " and ".join(group.names[i] for i in pair)
        share = f"{percent(float(group.full[pair]))} of their directions, where chance gives"
        return [f"Of {adapter}, {names} share most {on_side}: {share} {percent(float(group.chance[pair]), 2)}."]

    def sentences(self) -> list[str]:
        """Which modules were not compared, and why."""
        # A module of ΔW = 0 has no directions, and one of a width of its own has nothing to be compared with.
        alone = [group.names[0] for group in self.groups if len(group.names) == 1]
        zero = [name for group in self.groups for name, k in zip(group.names, group.directions, strict=True) if not k]
        sentences = [f"no other module is as wide as {some(alone)}"] if alone else []
        return sentences + ([f"not compared, as {WHOSE[self.of]} is 0: {some(zero)}"] if zero else [])

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            "of",
            "side",
            "adapters",
            rows_key("groups", NESTING_COLUMNS),
            # Matrices of one row, so that programs read one adapter and more in the same way.
            *(Column(key, lambda _: [[1.0]], type=JsonMatrix) for key in ("cosine", "shared_initialisation")),
        )


NESTING_COLUMNS: Columns[Nesting] = (
    Column("width"),
    Column("modules", "names"),
    Column("directions", type=list[int]),
    Column("first", type=JsonMatrix),
    Column("phi", "full", type=JsonMatrix),
    Column("chance", type=JsonMatrix),
    Column("z", type=JsonMatrix),
)


def pair_columns(
    labels: Sequence[str], title: str, columns: Iterable[tuple[str | tuple[str, str], Floats, str, str, int, str]]
) -> list[Column[Pair]]:
    """The columns of pairs: two labels, then quantities (key, matrix, heading, form, priority, explanation).

    ``title`` is the heading of the first label.
    """

    def column(
        key: str | tuple[str, str], values: Floats, title: str, form: str, priority: int, about: str
    ) -> Column[Pair]:
        return Column(key, lambda pair: values[pair], title, fixed(form), priority=priority, about=about)

    return [
        label_column("first", title, lambda pair: labels[pair[0]]),
        label_column("second", "and", lambda pair: labels[pair[1]]),
        *starmap(column, columns),
    ]


def _pairs_table(title: str, group: Nesting, rows: Sequence[Pair]) -> Table[Pair]:
    """Pairs of modules, one pair a row."""
    # On a narrow terminal φ(1,1) is left out first. φ(all) is never left out, as it says whether one span lies in the
    # other.
    first, second, *quantities = pair_columns(
        group.names,
        "module",
        (
            ("phi_first", group.first, "φ(1,1)", ".3f", 6, ABOUT_FIRST),
            ("phi", group.full, "φ(all)", ".4f", ALWAYS, ABOUT_ALL),
            ("chance", group.chance, "chance", ".2g", 7, ABOUT_CHANCE),
            ("z", group.z, "z", "+.1f", 8, ABOUT_Z),
        ),
    )
    return Table(title, [first, second, Column("width", lambda _: group.width), *quantities], rows)


# On a narrow terminal the overlap within a block stays longest of the three, as modules of a block share inputs.
RELATION_COLUMNS: Columns[Relation] = (
    label_column("kind", "kind", "kinds.0"),
    label_column("other_kind", "and", "kinds.1"),
    Column("pairs", "pairs", "pairs", priority=3, about="of modules of these two kinds"),
    *(
        Column(key, name, title, fixed(form), priority=priority, about=about)
        for key, name, title, form, priority, about in (
            ("phi_first", "first", "φ(1,1) nearest", ".3f", 4, f"of the nearest blocks; {ABOUT_FIRST}"),
            ("same_block", "same", "φ(all) same block", ".4f", 8, f"mean; {ABOUT_ALL}"),
            ("next_block", "next", "next block", ".4f", 6, "φ(all) of modules in neighbouring blocks, mean"),
            ("farther", "farther", "farther", ".4f", 5, "φ(all) of modules in blocks farther apart, mean"),
            ("chance", "chance", "chance", ".2g", 7, ABOUT_CHANCE),
        )
    ),
)
