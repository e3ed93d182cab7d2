"""The section that compares adapters: their similarity, their conflicts, and φ(i, j) as the LoRA paper draws it."""

from collections.abc import Mapping, Sequence

from loralens.analysis.interference import LARGE, Interaction, far_cosine
from loralens.analysis.two_adapters import SAME_START, Comparison
from loralens.charts.pairwise import conflict_map, pair_matrices, shared_energy_map
from loralens.charts.similarity import phi_maps
from loralens.choices import Side
from loralens.reporting.collection import Collection
from loralens.reporting.document import PageTable, Paragraph, Part, Picture, Section, SideBySide
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject
from loralens.tables.numbers import fixed, join_words, number, percent, signed
from loralens.tables.table import Column, Table

BLOCKS = 4  # blocks whose φ(i, j) is drawn for each pair: evenly spaced ones, so that the page stays small
WIDEST = 64  # directions of a heat map of φ(i, j): more would be cells of less than two pixels
# With at most this many conflicts (or agreements) their table is open at first; at most five times as many are listed,
# those with the largest share in the cosine of the whole updates.
INTERACTIONS = 8
PAIRS = 15  # with at most this many pairs, which six adapters have, their table is open at first
Numbers = Mapping[str, int]
SOURCE = "Hu et al. 2021, §7.2, eq. 4"


def comparison_section(
    subjects: Sequence[Subject], collection: Collection | None, numbers: Numbers, tables: ResultTables
) -> Section:
    """The section of several adapters: pairs, matrices, conflicts, and φ(i, j) of the most similar pairs."""
    lead = (
        "Cosines compare the updates as a whole; φ compares the directions that they use, whatever their strength. "
        "Each number stands next to the one that unrelated adapters would give."
    )
    if collection is None:
        text = "No two of these adapters have a module with the same name and shape, so nothing was compared."
        return Section("together", "Together", lead, [Paragraph(text, warning=True)])
    labels = [subject.label for subject in subjects]
    pairs = tables.pairs(labels, collection.pairs)
    # The warning comes first, as it changes how everything below is to be read.
    parts: list[Part] = [
        Paragraph(
            f"{join_words([labels[t] for t in group])} were initialised with the same random A (cosine of A "
            f"≥ {SAME_START:g}). Between them φ of the in side shows the common initialisation, not a common task: "
            "judge by the out side.",
            warning=True,
        )
        for group in collection.families
    ]
    parts.append(PageTable(pairs, folded=len(pairs.rows) > PAIRS))
    # Matrices of two adapters would have one cell that is not on the diagonal.
    if len(labels) > 2:
        parts.append(_matrices(labels, collection))
    maps = _shared_energy_picture(labels, collection), _conflicts(labels, collection, numbers)
    parts += [SideBySide([("", [chart]) for chart in maps]), *_interactions(labels, collection)]
    for k, (pair, compared) in enumerate(collection.compared.items()):
        # All pairs after the first are folded: each takes two rows of heat maps.
        for side in ("in", "out"):
            parts += _phi(labels, pair, compared, side, numbers, folded=k > 0)
    total = len(labels) * (len(labels) - 1) // 2
    if len(collection.compared) < total:
        text = f"φ(i, j) is drawn for the {len(collection.compared)} of {total} pairs of largest |cosine|."
        parts.append(Paragraph(text))
    return Section("together", "Together", lead, parts)


def _matrices(labels: Sequence[str], collection: Collection) -> Picture:
    return Picture(
        "pairs",
        "All pairs",
        pair_matrices(labels, collection.pairs, collection.order, ("out", "in"), collection.tree),
        "Similar adapters stand side by side, clustered by 1 − |cosine|. A high cosine of A means that two adapters "
        "were initialised with the same random A.",
        "cosine 0; for φ the mark on its colour bar",
        SOURCE + " and App. G",
        "Matrices of cosines and of φ between all adapters; the table of pairs has their numbers.",
    )


def _shared_energy_picture(labels: Sequence[str], collection: Collection) -> Picture:
    chart = shared_energy_map(labels, collection.pairs, collection.energy, collection.order)
    (level,) = chart.scale.chance
    values = [cell.value for cell in chart.cells.values()] or [0.0]
    return Picture(
        "interference",
        "Interference",
        [chart],
        "The share of each adapter's ‖ΔW‖² that lies in the directions of all others, on both the in and the out "
        "side; the mean over the modules of a block. Only this share can be changed by adding the others.",
        f"{percent(level)} for random directions (the mark on the colour bar)",
        "after Hu et al. 2021, §7.2, for the spans of all others",
        "Map of shared energy, one adapter per row and one block per column; between "
        f"{percent(min(values))} and {percent(max(values))}.",
    )


def _conflicts(labels: Sequence[str], collection: Collection, numbers: Numbers) -> Picture:
    pairs = collection.pairs
    several = pairs.count > 2
    chart = conflict_map(labels, pairs, numbers)
    values = [cell.value for cell in chart.cells.values()]
    cosine = "The most negative cosine of any two adapters in each module" if several else "Cosine of ΔW in each module"
    spread = number(float(pairs.spreads.max()), 2)
    # Of many cosines some are far from 0 by chance, so the most negative is compared with a level for as many.
    many = (
        "; the most negative of many cosines is farther from 0 than that by chance alone, so only a cosine "
        f"{far_cosine(pairs):.1f} times as far from 0 shows a conflict"
    )
    return Picture(
        "conflicts",
        "Lowest cosine by module" if several else "Cosine by module",
        [chart],
        f"{cosine}. Below 0 the two updates work against each other, above 0 in the same direction.",
        f"0 ± {spread} in a module{many if several else ''}",
        "cosine of updates, as in task arithmetic (Ilharco et al. 2023)",
        f"Map of cosines by kind and block, from {signed(min(values, default=0.0))} to "
        f"{signed(max(values, default=0.0))}.",
    )


def _interactions(labels: Sequence[str], collection: Collection) -> list[Part]:
    far = f"{far_cosine(collection.pairs):.1f} standard deviations from chance"
    rule = f"every module with |cosine| ≥ {LARGE:g} and at least {far}"
    parts: list[Part] = []
    for verb, places in (("work against each other", collection.conflicts), ("agree", collection.agreements)):
        if places:
            columns, rows = _interaction_columns(labels), places[: 5 * INTERACTIONS]
            table = Table(f"Where two adapters {verb}: {rule}", columns, rows)
            parts.append(PageTable(table, folded=len(places) > INTERACTIONS))
        else:
            # The rule is stated here too, because a looser rule might have found some.
            parts.append(Paragraph(f"No two adapters {verb} in any module ({rule})."))
    return parts


def _interaction_columns(labels: Sequence[str]) -> tuple[Column[Interaction], ...]:
    return (
        Column("first", lambda row: labels[row.first], "adapter", align="left"),
        Column("second", lambda row: labels[row.second], "and", align="left"),
        Column("where", lambda row: row.location, "where", align="left"),
        Column("modules", lambda row: row.modules, "modules"),
        Column("cosine", lambda row: row.cosine, "cosine", fixed("+.3f")),
        Column(
            "weight",
            lambda row: row.weight,
            "weight",
            fixed("+.4f"),
            about="the share of these modules in the cosine of the whole updates",
        ),
    )


def _phi(
    labels: Sequence[str], pair: tuple[int, int], compared: Comparison, side: Side, numbers: Numbers, *, folded: bool
) -> list[Part]:
    """Heat maps of φ(i, j): some blocks, every kind."""
    # A module whose ΔW is 0 in one of the two has no directions to compare.
    alive = {
        name: comparison.overlaps[side] for name, comparison in compared.items() if comparison.overlaps[side].phi.size
    }
    if not alive:
        return []
    maps = phi_maps(alive, numbers=numbers, blocks=BLOCKS, widest=WIDEST)
    charts = [chart for chart in maps.charts if chart is not None]
    levels, common = maps.scale.levels, "; after a common initialisation the in side is high without a common task"
    first, second = (labels[i] for i in pair)
    full = [comparison.full for comparison in alive.values()]
    not_drawn = f" {len(charts)} of {len(alive)} modules are drawn." if len(charts) < len(alive) else ""
    return [
        Picture(
            f"phi-{pair[0] + 1}-{pair[1] + 1}-{side}",
            f"φ(i, j), {side} side: {first} and {second}",
            [*charts, *maps.chance],
            f"How much of the i leading {side} directions of {first} (down) lies in the j leading ones of {second} "
            "(across). φ is 1 if one set contains the other. The maps at the end show what chance alone would "
            f"give.{not_drawn}",
            f"max(i, j)/n, here {number(min(levels), 2)} to {number(max(levels), 2)}{common if side == 'in' else ''}",
            SOURCE + "; drawn as its Figures 3 and 4",
            f"Heat maps of φ(i, j) between {first} and {second}; φ of all directions is {min(full):.2f} to "
            f"{max(full):.2f}.",
            folded=folded,
            keys=[maps.scale],
        )
    ]
