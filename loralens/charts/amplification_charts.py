"""Charts of the amplification factor: curves over the rank, maps of z-score and excess, and φ of ΔW and W."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import isfinite, log2
from statistics import median

import numpy as np

from loralens.analysis.amplification import FAR, Amplification, KeptRank
from loralens.charts.module_grid import Grid, fit_name
from loralens.charts.pair_charts import directions_map
from loralens.charts.spec import Band, ColourScale, Figure, HeatMap, Line, LineChart
from loralens.charts.spectrum_charts import FEW, direction_limits
from loralens.errors import OptionError
from loralens.tables.numbers import fixed, number

KINDS = 12  # panels of a figure: three rows of four

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
        If there are more than 12 kinds, those with the fewest modules share a panel.

    Raises
    ------
    OptionError
        No module has a value.
    """
    alive = _with_value(results)
    if not alive:
        raise OptionError(
            "there is nothing to draw: ΔW or W is 0 in every module", fix="choose other modules with --modules"
        )
    grid, rows = Grid.of(results, most=KINDS), full_rank_rows(results)
    curves = "amplification over the kept directions of ΔW (dashed: random directions; grey: their range)"
    maps = amplification_maps(rows, grid, z_scale(rows.values()), excess_scale(rows.values()))
    bands = [Band(_curves(alive, grid), curves, grid.ramp), Band(maps, "at full rank")]
    return Figure(title, [*bands, *_phi(alive, phi_rank)])


def full_rank_rows(results: Results) -> dict[str, KeptRank]:
    """Return module name → its row of Table 7 of the LoRA paper at the full rank, for modules that have a value."""
    return {name: result.at_rank(result.s.size) for name, result in _with_value(results).items()}


def _with_value(results: Results) -> dict[str, Amplification]:
    """The modules in which neither ΔW nor W is 0."""
    return {name: result for name, result in results.items() if result.s.size and result.weight_norm}


def _curves(alive: Results, grid: Grid) -> list[LineChart]:
    """A panel for each kind, with the median and range that random directions would give."""
    limits = direction_limits(max(result.s.size for result in alive.values()))
    charts = []
    for row, title in enumerate(grid.kinds):
        members = [(j, name, alive[name].curve) for j, names in grid.row(row) for name in names if name in alive]
        most = max((len(curve) for _, _, curve in members), default=0)
        lines = [
            Line(name, [k.rank for k in curve], [k.amplification for k in curve], grid.ink(j), "o" * (most <= FEW))
            for j, name, curve in members
        ]
        # Modules of lower rank end earlier, so each rank is compared among those that reach it.
        chance = [
            [curve[i].delta_norm / curve[i].random_norm for _, _, curve in members if len(curve) > i]
            for i in range(most)
        ]
        area = [(i, min(values), max(values)) for i, values in enumerate(chance, start=1)]
        if area:
            lines.append(Line("random directions, median", range(1, most + 1), list(map(median, chance)), style="--"))
        charts.append(
            LineChart(
                fit_name(title), lines, "kept directions i of ΔW", "‖ΔWᵢ‖/‖UᵢᵀWVᵢ‖", log=True, x_range=limits, area=area
            )
        )  # fmt: skip
    values = [y for chart in charts for line in chart.lines for y in line.y]
    values += [y for chart in charts for _, *edges in chart.area for y in edges]
    values = [y for y in values if isfinite(y) and y > 0] or [0.1, 1.0]
    # One span for all panels, so that kinds can be compared.
    return [replace(chart, y_range=(min(values) / 1.2, max(values) * 1.2)) for chart in charts]


def z_scale(rows: Iterable[KeptRank]) -> ColourScale:
    """Return the colour scale of z-scores, with 0, the level of chance, in its middle."""
    # At least FAR, so that values within chance stay pale.
    far = max([FAR, *(abs(row.z) for row in rows if isfinite(row.z))])
    return ColourScale(-far, far, "standard deviations from chance", fixed("+.1f"), diverging=True, chance=[0.0])


def excess_scale(rows: Iterable[KeptRank]) -> ColourScale:
    """Return the logarithmic colour scale of the excess over random directions; 1, which is chance, is its middle."""
    # From a half to twice at least, so that values close to chance stay pale.
    most = max([1.0, *(abs(log2(row.excess)) for row in rows if isfinite(row.excess) and row.excess > 0)])
    label = "‖UᵀWV‖ over that of random directions"
    return ColourScale(-most, most, label, lambda x: number(2.0**x, 3), diverging=True, chance=[0.0])


def amplification_maps(rows: Mapping[str, KeptRank], grid: Grid, z: ColourScale, excess: ColourScale) -> list[HeatMap]:
    """Draw maps of the z-score of ‖UᵀWV‖² and of the excess of ‖UᵀWV‖ over random directions, at the full rank."""

    def tip(name: str) -> str:
        row = rows[name]
        return (
            f"‖ΔW‖ {number(row.delta_norm)}, ‖UᵀWV‖ {number(row.projected_norm)}, amplification "
            f"{number(row.amplification)}, excess over random {number(row.excess)}, z {fixed('+.1f')(row.z)}"
        )

    scores = {name: row.z for name, row in rows.items()}
    # An excess of 0 has no logarithm, and its cell stays empty.
    doublings = {name: log2(row.excess) for name, row in rows.items() if row.excess > 0}
    note = "a cell: the median of its modules"
    return [
        grid.heat("z-score of ‖UᵀWV‖²", scores, z, gather=median, tip=tip, note=note),
        grid.heat("excess of ‖UᵀWV‖ over random", doublings, excess, gather=median, tip=tip, note=note),
    ]


def _phi(alive: Results, limit: int) -> list[Band]:
    """The band of Figure 8: φ on both sides on one colour scale, the mean over modules that have enough directions."""
    tops = [(result.top, result.shape) for result in alive.values() if result.top]
    if not tops:
        return []
    pairs = [(top.out, top.in_, *top.chance(shape)) for top, shape in tops]
    # Modules with fewer directions are left out of the mean and not padded, because padding would look like no overlap.
    i = min(max(out.shape[0] for out, *_ in pairs), limit)
    full = [[side[:i, :limit] for side in sides] for sides in pairs if sides[0].shape[0] >= i]
    j = min(side.shape[1] for sides in full for side in sides)
    phis = [np.mean([sides[k][:, :j] for sides in full], axis=0) for k in range(4)]
    levels = [float(phi[-1, -1]) for phi in phis]
    # The scale reaches at least twice the level of chance, so that noise around that level does not fill it.
    top = max(float(phis[0].max()), float(phis[1].max()), 2 * max(levels[2:]))
    scale = ColourScale(0.0, top, "φ(i, j)", lambda x: number(x, 2), chance=levels[2:])
    maps = [
        directions_map(f"{side} side of ΔW and W", phi, scale, f"corner {corner:.3g}, chance {chance:.3g}")
        for side, phi, corner, chance in zip(("out", "in"), phis, levels, levels[2:], strict=False)
    ]
    title = f"φ(i, j): directions i of ΔW (down) and j of W (across), mean of {len(full)} modules"
    return [Band(maps, title, [scale])]
