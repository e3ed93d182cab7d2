"""The section of several adapters: how alike they are, where they meet, and φ(i, j) as the LoRA paper draws it."""

from collections.abc import Mapping, Sequence

from loralens.analysis.compare.interference import LARGE, Interaction, far_cosine
from loralens.analysis.compare.pairwise import SHARED, Side
from loralens.analysis.compare.similarity import Comparison
from loralens.charts.pairwise import conflict_map, pair_matrices, shared_energy_map
from loralens.charts.similarity import phi_maps
from loralens.charts.spec import Heat
from loralens.reporting.company import Company
from loralens.reporting.document import Beside, PageTable, Part, Picture, Section, Text
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject
from loralens.tables.numbers import fixed, listed, number, percent
from loralens.tables.table import Column, Table

BLOCKS = 4  # rows of the heat maps of a pair
WIDEST = 64  # directions of a heat map
SENTENCES = 8
PAIRS = 15  # rows of pairs up to which their table stands open
Numbers = Mapping[str, int]
SOURCE = "Hu et al. 2021, §7.2, eq. 4"


def section(subjects: Sequence[Subject], found: Company | None, numbers: Numbers, tables: ResultTables) -> Section:
    """All that they have in common."""
    lead = (
        "Cosines compare the updates as a whole, φ the directions they use, whatever their strength. Each stands "
        "beside what unrelated adapters would give."
    )
    if found is None:
        text = "No two of these adapters have a module of one name and shape in common, so nothing was compared."
        return Section("together", "Together", lead, [Text(text, warning=True)])
    labels = [one.label for one in subjects]
    order = list(found.order)
    pairs = tables.pairs(labels, found.pairs)
    parts: list[Part] = [*_families(labels, found), PageTable(pairs, folded=len(pairs.rows) > PAIRS)]
    if len(labels) > 2:
        parts.append(_matrices(labels, found, order))
    maps = _shared(labels, found, order), _conflicts(labels, found, numbers)
    parts += [Beside([("", [one]) for one in maps]), *_meetings(labels, found)]
    for k, (pair, compared) in enumerate(found.compared.items()):
        for side in ("in", "out"):
            parts += _phi(labels, pair, compared, side, numbers, folded=k > 0)
    total = len(labels) * (len(labels) - 1) // 2
    if len(found.compared) < total:
        parts.append(Text(f"φ(i, j) is drawn for the {len(found.compared)} of {total} pairs of largest |cosine|."))
    return Section("together", "Together", lead, parts)


def _families(labels: Sequence[str], found: Company) -> list[Part]:
    return [
        Text(
            f"{listed([labels[t] for t in group])} began from one random A (cosine of A ≥ {SHARED:g}). Between them φ "
            "of the in side shows the common start, not a common task: read the out side.",
            warning=True,
        )
        for group in found.families
    ]


def _matrices(labels: Sequence[str], found: Company, order: Sequence[int]) -> Picture:
    return Picture(
        "pairs",
        "Each with each",
        pair_matrices(labels, found.pairs, order, ("out", "in"), found.tree),
        "Near ones side by side, clustered by 1 − |cosine|. A high cosine of A says that two began from one random "
        "start.",
        "cosine 0; of φ the mark on its colour bar",
        SOURCE + " and App. G",
        "Matrices of cosines and of φ between all adapters; the table of pairs has their numbers.",
    )


def _shared(labels: Sequence[str], found: Company, order: Sequence[int]) -> Picture:
    chart = shared_energy_map(labels, found.pairs, found.energy, order)
    level = chart.scale.chance or 0.0
    return Picture(
        "interference",
        "Interference",
        [chart],
        "The part of each adapter's ‖ΔW‖² that lies inside the directions of all others on both sides, mean over the "
        "modules of a block: what adding the others can reach.",
        f"{percent(level)} for directions drawn anew (the mark on the colour bar)",
        "after Hu et al. 2021, §7.2, for the spans of all others",
        f"Map of shared energy, an adapter a row and a block a column; between {_range(chart)}.",
    )


def _range(chart: Heat) -> str:
    values = [cell.value for cell in chart.cells.values()] or [0.0]
    return f"{percent(min(values))} and {percent(max(values))}"


def _conflicts(labels: Sequence[str], found: Company, numbers: Numbers) -> Picture:
    pairs = found.pairs
    several = pairs.count > 2
    chart = conflict_map(labels, pairs, numbers)
    values = [cell.value for cell in chart.cells.values()]
    what = "The most negative cosine of any two adapters in each module" if several else "Cosine of ΔW in each module"
    spread = number(float(pairs.spreads.max()), 2) if pairs.modules else "0"
    return Picture(
        "conflicts",
        "Conflicts" if several else "Cosine by module",
        [chart],
        f"{what}: below 0 they push against each other, above 0 the same way.",
        f"0 ± {spread} in a module"
        + (
            f"; the least of many cosines lies below that by chance alone, so look for {far_cosine(pairs):.1f} times it"
            * several
        ),
        "cosine of updates, as in task arithmetic (Ilharco et al. 2023)",
        f"Map of cosines by kind and block, from {min(values, default=0.0):+.3f} to {max(values, default=0.0):+.3f}.",
    )


def _meetings(labels: Sequence[str], found: Company) -> list[Part]:
    rule = f"every module with |cosine| ≥ {LARGE:g} and {far_cosine(found.pairs):.1f} standard deviations from chance"
    parts: list[Part] = []
    for verb, met in (("fight", found.fights), ("agree", found.agreements)):
        if not met:
            parts.append(Text(f"No two {verb} anywhere ({rule})."))
            continue
        table = Table(f"Where two {verb}: {rule}", _meeting_columns(labels), met[: 5 * SENTENCES])
        parts.append(PageTable(table, folded=len(met) > SENTENCES))
    return parts


def _meeting_columns(labels: Sequence[str]) -> tuple[Column[Interaction], ...]:
    return (
        Column("first", lambda row: labels[row.first], "adapter", align="left"),
        Column("second", lambda row: labels[row.second], "and", align="left"),
        Column("where", lambda row: row.where, "where", align="left"),
        Column("modules", lambda row: row.modules, "modules"),
        Column("cosine", lambda row: row.cosine, "cosine", fixed("+.3f")),
        Column(
            "weight",
            lambda row: row.weight,
            "weight",
            fixed("+.4f"),
            about="their part of the cosine of the whole updates",
        ),
    )


def _phi(
    labels: Sequence[str], pair: tuple[int, int], compared: Comparison, side: Side, numbers: Numbers, *, folded: bool
) -> list[Part]:
    """Heat maps of φ(i, j): some blocks, every kind."""
    alive = {name: one.overlaps[side] for name, one in compared.items() if one.overlaps[side].phi.size}
    if not alive:
        return []
    maps = phi_maps(alive, numbers=numbers, blocks=BLOCKS, widest=WIDEST)
    charts = [chart for chart in maps.charts if chart is not None]
    levels = maps.scale.levels
    first, second = (labels[i] for i in pair)
    full = [one.full for one in alive.values()]
    left = f" {len(charts)} of {len(alive)} modules are drawn." if len(charts) < len(alive) else ""
    return [
        Picture(
            f"phi-{pair[0] + 1}-{pair[1] + 1}-{side}",
            f"φ(i, j), {side} side: {first} and {second}",
            charts,
            f"How much of the i leading {side} directions of {first} (down) lies in the j leading ones of {second} "
            f"(across): 1 if one contains the other.{left}",
            f"max(i, j)/n, here {number(min(levels), 2)} to {number(max(levels), 2)}"
            + ("; after a common random start the in side is high without a common task" if side == "in" else ""),
            SOURCE + "; drawn as its Figures 3 and 4",
            f"Heat maps of φ(i, j) between {first} and {second}; φ of all directions is {min(full):.2f} to "
            f"{max(full):.2f}.",
            folded=folded,
            keys=[maps.scale],
        )
    ]
