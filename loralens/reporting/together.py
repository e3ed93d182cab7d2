"""The section of several adapters: how alike they are, where they meet, and φ(i, j) as the LoRA paper draws it."""

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import isfinite

import numpy as np

from loralens.analysis.compare.interference import LARGE, Meeting, far
from loralens.analysis.compare.pairwise import SHARED, Side, mean
from loralens.analysis.compare.similarity import Comparison
from loralens.charts.figure import fit
from loralens.core.names import block, kind
from loralens.linalg.factor import Floats
from loralens.reporting.chart import Cell, Chart, Heat, Overlaps, Scale
from loralens.reporting.company import Company
from loralens.reporting.document import Beside, PageTable, Part, Picture, Section, Text
from loralens.reporting.grid import NAME, Grid
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject
from loralens.reporting.words import listed, number, percent
from loralens.tables.numbers import fixed
from loralens.tables.table import Column, Table

WRITTEN = 8  # adapters up to which cells say their number
BLOCKS, KINDS = 4, 8  # of the heat maps of a pair
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
    pairs = found.pairs
    names = [labels[t] for t in order]
    shown: list[tuple[str, Floats, Scale]] = [("cosine of ΔW", pairs.cosine, _cosine_scale("cosine"))]
    for side in ("out", "in"):
        off = pairs.chance(side)[~np.eye(pairs.count, dtype=bool)]
        level = float(off[np.isfinite(off)].mean()) if np.isfinite(off).any() else None
        shown.append((f"φ, {side} side", pairs.phi(side), Scale(0.0, 1.0, "φ", chance=level, form=".2f")))
    shown.append(("cosine of A", pairs.shared_initialisation, _cosine_scale("cosine of A")))
    charts = [_matrix(title, values[np.ix_(order, order)], names, scale) for title, values, scale in shown]
    return Picture(
        "pairs",
        "Each with each",
        charts,
        "Near ones side by side, clustered by 1 − |cosine|. A high cosine of A says that two began from one random "
        "start.",
        "cosine 0; of φ the mark on its colour bar",
        SOURCE + " and App. G",
        "Matrices of cosines and of φ between all adapters; the table of pairs has their numbers.",
    )


def _cosine_scale(label: str) -> Scale:
    return Scale(-1.0, 1.0, label, diverging=True, chance=0.0, form="+.2f")


def _matrix(title: str, values: Floats, names: Sequence[str], scale: Scale) -> Heat:
    cells = {
        (i, j): Cell(float(values[i, j]), f"{names[i]} and {names[j]}: {title} {values[i, j]:.3f}")
        for i in range(len(names))
        for j in range(len(names))
        if isfinite(values[i, j])
    }
    short = [fit(name, NAME) for name in names]
    return Heat(title, short, [str(i + 1) for i in range(len(names))], cells, scale, written=len(names) <= WRITTEN)


def _shared(labels: Sequence[str], found: Company, order: Sequence[int]) -> Picture:
    energy, modules = found.energy, found.pairs.modules
    grid = Grid.of(module.name for module in modules)
    homes = [block(module.name) for module in modules]
    values = np.array([mean(energy.shared[[m for m, home in enumerate(homes) if home == b]]) for b in grid.blocks])
    known = energy.shared_chance[np.isfinite(energy.shared_chance)]
    level = float(known.mean()) if known.size else 0.0
    cells = {
        (i, j): Cell(float(values[j, t]), f"{labels[t]}, block {grid.columns[j]}: {percent(values[j, t])} shared")
        for i, t in enumerate(order)
        for j in range(len(grid.blocks))
        if isfinite(values[j, t])
    }
    top = min(max([cell.value for cell in cells.values()] + [2 * level, 0.01]), 1.0)
    scale = Scale(0.0, top, "shared energy", chance=level, form=".2%")
    chart = Heat("", [fit(labels[t], NAME) for t in order], grid.columns, cells, scale, across=grid.across)
    return Picture(
        "interference",
        "Interference",
        [chart],
        "The part of each adapter's ‖ΔW‖² that lies inside the directions of all others on both sides, mean over the "
        "modules of a block: what adding the others can reach.",
        f"{percent(level)} for directions drawn anew (the mark on the colour bar)",
        "after Hu et al. 2021, §7.2, for the spans of all others",
        f"Map of shared energy, an adapter a row and a block a column; between {_range(cells)}.",
    )


def _range(cells: Mapping[tuple[int, int], Cell]) -> str:
    values = [cell.value for cell in cells.values()] or [0.0]
    return f"{percent(min(values))} and {percent(max(values))}"


def _conflicts(labels: Sequence[str], found: Company, numbers: Numbers) -> Picture:
    pairs = found.pairs
    several = pairs.count > 2
    values, tips = {}, {}
    for m, module in enumerate(pairs.modules):
        known = {
            (s, t): float(pairs.cosines[m, s, t])
            for s, t in combinations(range(pairs.count), 2)
            if isfinite(pairs.cosines[m, s, t])
        }
        if not known:
            continue
        s, t = min(known, key=lambda pair: known[pair])
        values[module.name] = known[s, t]
        tips[module.name] = f"{module.name}: cosine {known[s, t]:+.3f} of {labels[s]} and {labels[t]}"
    most = max([abs(v) for v in values.values()] + [4 * float(pairs.spreads.max()) if pairs.modules else 0.0, 0.05])
    scale = Scale(-most, most, "cosine", diverging=True, chance=0.0, form="+.3f")
    grid = Grid.of(module.name for module in pairs.modules)
    chart = grid.heat("", values, scale, numbers=numbers, gather=min, tip=lambda name: tips[name])
    what = "The most negative cosine of any two adapters in each module" if several else "Cosine of ΔW in each module"
    spread = number(float(pairs.spreads.max()), 2) if pairs.modules else "0"
    return Picture(
        "conflicts",
        "Conflicts" if several else "Cosine by module",
        [chart],
        f"{what}: below 0 they push against each other, above 0 the same way.",
        f"0 ± {spread} in a module"
        + (
            f"; the least of many cosines lies below that by chance alone, so look for {far(pairs):.1f} times it"
            * several
        ),
        "cosine of updates, as in task arithmetic (Ilharco et al. 2023)",
        f"Map of cosines by kind and block, from {min(values.values(), default=0.0):+.3f} to "
        f"{max(values.values(), default=0.0):+.3f}.",
    )


def _meetings(labels: Sequence[str], found: Company) -> list[Part]:
    rule = f"every module with |cosine| ≥ {LARGE:g} and {far(found.pairs):.1f} standard deviations from chance"
    parts: list[Part] = []
    for verb, met in (("fight", found.fights), ("agree", found.agreements)):
        if not met:
            parts.append(Text(f"No two {verb} anywhere ({rule})."))
            continue
        table = Table(f"Where two {verb}: {rule}", _meeting_columns(labels), met[: 5 * SENTENCES])
        parts.append(PageTable(table, folded=len(met) > SENTENCES))
    return parts


def _meeting_columns(labels: Sequence[str]) -> tuple[Column[Meeting], ...]:
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
    shown = _chosen(list(alive))
    levels = [level for name in shown for level in (1 / alive[name].n, alive[name].full_chance)]
    top = min(1.0, max([float(alive[name].phi.max()) for name in shown] + [0.1]))
    scale = Scale(0.0, top, "φ(i, j)", chance=max(levels), form=".2f")
    charts: list[Chart] = [
        Overlaps(
            f"{fit(kind(name), 20)}{_at(name)}",
            alive[name].phi[:WIDEST, :WIDEST].tolist(),
            scale,
            notes=[
                f"φ(1,1) {alive[name].first:.2f}",
                f"all {alive[name].full:.2f} (chance {alive[name].full_chance:.2g})",
            ],
            modules=[numbers[name]],
        )
        for name in shown
    ]
    first, second = (labels[i] for i in pair)
    full = [one.full for one in alive.values()]
    left = f" {len(shown)} of {len(alive)} modules are drawn." if len(shown) < len(alive) else ""
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
        )
    ]


def _at(name: str) -> str:
    home = block(name)
    return f", block {home.number}" if home else ""


def _chosen(names: Sequence[str]) -> list[str]:
    """The modules to draw: a few blocks, evenly spaced, and their kinds."""
    blocks = list(dict.fromkeys(block(name) for name in names))
    picks = {blocks[round(i)] for i in np.linspace(0, len(blocks) - 1, min(BLOCKS, len(blocks)))}
    kinds = list(dict.fromkeys(kind(name) for name in names))[:KINDS]
    return [name for name in names if block(name) in picks and kind(name) in kinds][: BLOCKS * KINDS]
