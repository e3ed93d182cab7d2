"""The result of `similarity` for the modules of one adapter: its tables and sentences."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from loralens.analysis.compare.nested import Nesting, Relation, closest, relations
from loralens.choices import Of, Side
from loralens.core.names import some
from loralens.linalg.factor import Floats
from loralens.tables.numbers import fixed, json_number, matrix, percent
from loralens.tables.result import Tabular
from loralens.tables.table import ALWAYS, Column, Table
from loralens.verbs.outputs.pair_similarity import ABOUT_ALL, ABOUT_CHANCE, ABOUT_FIRST, ABOUT_Z, WHOSE

Pair = tuple[int, int]  # the indices of two modules of one width, which are also an index of a matrix


@dataclass(frozen=True, slots=True)
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

    def __repr__(self) -> str:
        modules = sum(len(group.names) for group in self.groups)
        return f"NestedSimilarity({modules} modules of {len(self.groups)} widths, {self.side} side of {self.of})"

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

    def record(self) -> dict[str, Any]:
        """The whole result as a JSON object; undefined numbers are null."""
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
            # Matrices of one row, so that programs read one adapter and more in the same way.
            "cosine": [[1.0]],
            "shared_initialisation": [[1.0]],
        }


def _pairs_table(title: str, group: Nesting, rows: Sequence[Pair]) -> Table[Pair]:
    """Pairs of modules, one pair a row."""

    def column(key: str, values: Floats, title: str, form: str, priority: int, about: str) -> Column[Pair]:
        return Column(key, lambda pair: json_number(values[pair]), title, fixed(form), priority=priority, about=about)

    # On a narrow terminal φ(1,1) is left out first. φ(all) is never left out, as it says whether one span lies in the
    # other.
    columns: tuple[Column[Pair], ...] = (
        Column("first", lambda pair: group.names[pair[0]], "module", align="left", priority=ALWAYS),
        Column("second", lambda pair: group.names[pair[1]], "and", align="left", priority=ALWAYS),
        Column("width", lambda _: group.width),
        column("phi_first", group.first, "φ(1,1)", ".3f", 6, ABOUT_FIRST),
        column("phi", group.full, "φ(all)", ".4f", ALWAYS, ABOUT_ALL),
        column("chance", group.chance, "chance", ".2g", 7, ABOUT_CHANCE),
        column("z", group.z, "z", "+.1f", 8, ABOUT_Z),
    )
    return Table(title, columns, rows)


# On a narrow terminal the overlap within a block stays longest of the three, as modules of a block share inputs.
RELATION_COLUMNS: tuple[Column[Relation], ...] = (
    Column("kind", lambda row: row.kinds[0], "kind", align="left", priority=ALWAYS),
    Column("other_kind", lambda row: row.kinds[1], "and", align="left", priority=ALWAYS),
    Column("pairs", lambda row: row.pairs, "pairs", priority=3, about="of modules of these two kinds"),
    Column(
        "phi_first",
        lambda row: row.first,
        "φ(1,1) nearest",
        fixed(".3f"),
        priority=4,
        about=f"of the nearest blocks; {ABOUT_FIRST}",
    ),
    Column(
        "same_block", lambda row: row.same, "φ(all) same block", fixed(".4f"), priority=8, about=f"mean; {ABOUT_ALL}"
    ),
    Column(
        "next_block",
        lambda row: row.next,
        "next block",
        fixed(".4f"),
        priority=6,
        about="φ(all) of modules in neighbouring blocks, mean",
    ),
    Column(
        "farther",
        lambda row: row.farther,
        "farther",
        fixed(".4f"),
        priority=5,
        about="φ(all) of modules in blocks farther apart, mean",
    ),
    Column("chance", lambda row: row.chance, "chance", fixed(".2g"), priority=7, about=ABOUT_CHANCE),
)
