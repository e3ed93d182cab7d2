"""Charts of the amplification factor: curves over the rank, maps of z-score and excess, and φ of ΔW and W."""

from collections.abc import Iterable, Mapping
from math import isfinite
from statistics import median

import numpy as np

from loralens.analysis.amplification import FAR, Amplification, KeptRank
from loralens.charts.grid import Grid, commonest_kinds, fit_name
from loralens.charts.spec import (
    Area,
    Band,
    ColourScale,
    Figure,
    HeatMap,
    Line,
    LineChart,
    Marker,
    Overlaps,
    direction_limits,
    line_chart,
)
from loralens.core.names import kind
from loralens.errors import OptionError
from loralens.tables.numbers import fixed, number

KINDS = 12  # kinds in a figure, those with the most modules: three rows of four panels
FEW = 8  # the number of directions up to which the points of a curve are marked: more marks would hide the line

Results = Mapping[str, Amplification]


def amplification_figure(results: Results, *, title: str = "", phi_rank: int = 16) -> Figure:
    """Draw the amplification of W by ΔW, in three bands.

    The curves show ‖ΔWᵢ‖/‖UᵢᵀWVᵢ‖ against the kept rank i, with one panel per kind and one line per module in the
    colour of its block. A dashed line and a grey area show the median and the range that random directions would give.
    The maps show the z-score of ‖UᵀWV‖ and its excess over random directions, by kind and block; a cell of several
    modules shows their median. The last band shows φ(i, j) between the directions of ΔW and those of W (Figure 8 of the
    LoRA paper) on either side, as the mean over modules. It is left out if the leading directions of W were not
    computed.

    Parameters
    ----------
    results : mapping of str to Amplification
        Modules in which ΔW or W is 0 have no value, and are left out of curves and means.
    title : str
    phi_rank : int
        The largest i and j of φ.

    Returns
    -------
    Figure
        It shows at most 12 kinds, those with the most modules.

    Raises
    ------
    OptionError
        No module has a value.
    """
    if not _with_value(results):
        raise OptionError(
            "there is nothing to draw: ΔW or W is 0 in every module", fix="choose other modules with --modules"
        )
    kinds = commonest_kinds(results, KINDS)
    shown = {name: result for name, result in results.items() if kind(name) in kinds}
    grid, rows = Grid.of(shown, most=KINDS), full_rank_rows(shown)
    z, excess = z_scale(rows.values()), excess_scale(rows.values())
    curves = "amplification over the kept directions of ΔW (dashed: random directions; grey: their range)"
    maps = amplification_maps(rows, grid, z, excess)
    bands = [Band(_curves(shown, grid), curves, grid.ramp), Band(list(maps), "at full rank")]
    return Figure(title, [*bands, *_phi(results, phi_rank)])


def full_rank_rows(results: Results) -> dict[str, KeptRank]:
    """Return module name → its row of Table 7 of the LoRA paper at the full rank, for modules that have a value."""
    return {name: result.at_rank(result.s.size) for name, result in _with_value(results).items()}


def _with_value(results: Results) -> dict[str, Amplification]:
    """The modules in which neither ΔW nor W is 0."""
    return {name: result for name, result in results.items() if result.s.size and result.weight_norm}


def _curves(results: Results, grid: Grid) -> list[LineChart]:
    alive = _with_value(results)
    limits = direction_limits(max(result.s.size for result in alive.values()))
    panels = [(fit_name(name), *_lines(alive, grid, row)) for row, name in enumerate(grid.kinds)]
    curves = [line.y for _, lines, _ in panels for line in lines]
    curves += [edge for _, _, areas in panels for area in areas for edge in (area.low, area.high)]
    values = [y for curve in curves for y in curve if isfinite(y) and y > 0] or [0.1, 1.0]
    # One span for all panels, so that kinds can be compared.
    span = (min(values) / 1.2, max(values) * 1.2)
    labels = ("kept directions i of ΔW", "‖ΔWᵢ‖/‖UᵢᵀWVᵢ‖")
    return [
        line_chart(title, lines, *labels, log=True, x_range=limits, y_range=span, areas=areas)
        for title, lines, areas in panels
    ]


def _lines(alive: Results, grid: Grid, row: int) -> tuple[list[Line], list[Area]]:
    """The curves of one kind, with the median and range that random directions would give."""
    members = [(j, name, alive[name].curve) for j, names in grid.row(row) for name in names if name in alive]
    chance = [[kept.delta_norm / kept.random_norm for kept in curve] for _, _, curve in members]
    most = max((len(curve) for curve in chance), default=0)
    marker: Marker = "dot" if most <= FEW else ""
    lines = [
        Line(name, [kept.rank for kept in curve], [kept.amplification for kept in curve], grid.ink(j), marker=marker)
        for j, name, curve in members
    ]
    if not most:
        return lines, []
    # Modules of lower rank end earlier, so each rank is compared among those that reach it.
    columns = [[curve[i] for curve in chance if len(curve) > i] for i in range(most)]
    x = range(1, most + 1)
    lines.append(Line("random directions, median", x, [median(c) for c in columns], ("quiet", 0), dashed=True))
    return lines, [Area(x, [min(c) for c in columns], [max(c) for c in columns])]


def z_scale(rows: Iterable[KeptRank]) -> ColourScale:
    """Return the colour scale of z-scores, with 0, the level of chance, in its middle."""
    values = [abs(row.z) for row in rows if isfinite(row.z)]
    far = max([*values, FAR])  # so that values within chance stay pale
    return ColourScale(-far, far, "standard deviations from chance", diverging=True, chance=[0.0], form="+.1f")


def excess_scale(rows: Iterable[KeptRank]) -> ColourScale:
    """Return the logarithmic colour scale of the excess over random directions; 1, which is chance, is its middle."""
    values = [abs(float(np.log2(row.excess))) for row in rows if isfinite(row.excess) and row.excess > 0]
    most = max([*values, 1.0])  # from a half to twice at least, so that values close to chance stay pale
    ticks = [(float(k), f"{2.0**k:.3g}") for k in (-int(most), 0, int(most))]
    label = "‖UᵀWV‖ over that of random directions"
    return ColourScale(-most, most, label, diverging=True, chance=[0.0], doublings=True, ticks=ticks)


def amplification_maps(
    rows: Mapping[str, KeptRank],
    grid: Grid,
    z: ColourScale,
    excess: ColourScale,
    numbers: Mapping[str, int] | None = None,
) -> tuple[HeatMap, HeatMap]:
    """Draw maps of the z-score of ‖UᵀWV‖² and of the excess of ‖UᵀWV‖ over random directions, at the full rank."""
    # Both maps show the same text, so it is made once.
    tips = {
        name: f"‖ΔW‖ {number(row.delta_norm)}, ‖UᵀWV‖ {number(row.projected_norm)}, amplification "
        f"{number(row.amplification)}, excess over random {number(row.excess)}, z {fixed('+.1f')(row.z)}"
        for name, row in rows.items()
    }
    scores = {name: row.z for name, row in rows.items()}
    # An excess of 0 has no logarithm, and its cell stays empty.
    doublings = {name: float(np.log2(row.excess)) for name, row in rows.items() if row.excess > 0}
    note = "a cell: the median of its modules" if grid.fullest > 1 else ""
    look = {"numbers": numbers, "gather": median, "tip": tips.__getitem__, "note": note}
    return (
        grid.heat("z-score of ‖UᵀWV‖²", scores, z, **look),  # type: ignore[arg-type]
        grid.heat("excess of ‖UᵀWV‖ over random", doublings, excess, **look),  # type: ignore[arg-type]
    )


def _phi(results: Results, limit: int) -> list[Band]:
    """The band of Figure 8: φ on both sides on one colour scale, the mean over modules that have enough directions."""
    tops = [(result.top, result.shape) for result in _with_value(results).values() if result.top]
    if not tops:
        return []
    pairs = [(top.out, top.in_, *top.chance(shape)) for top, shape in tops]
    # Modules with fewer directions are left out of the mean and not padded, because padding would look like no overlap.
    i = min(max(out.shape[0] for out, *_ in pairs), limit)
    full = [[side[:i, :limit] for side in sides] for sides in pairs if sides[0].shape[0] >= i]
    j = min(side.shape[1] for sides in full for side in sides)
    out, in_, chance_out, chance_in = (np.mean([sides[k][:, :j] for sides in full], axis=0) for k in range(4))
    levels = [float(chance_out[-1, -1]), float(chance_in[-1, -1])]
    # The scale reaches at least twice the level of chance, so that noise around that level does not fill it.
    top = max(float(out.max()), float(in_.max()), 2 * max(levels))
    scale = ColourScale(0.0, top, "φ(i, j)", chance=levels, form=".2g")
    maps = []
    for side, phi, level in (("out", out, levels[0]), ("in", in_, levels[1])):
        notes = [f"corner {phi[-1, -1]:.3g}, chance {level:.3g}"]
        maps.append(Overlaps(f"{side} side of ΔW and W", phi.tolist(), scale, notes))
    title = f"φ(i, j): directions i of ΔW (down) and j of W (across), mean of {len(full)} modules"
    return [Band(maps, title, [scale])]
