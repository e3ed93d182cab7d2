"""Charts of the amplification factor: curves over the rank, maps of z-score and excess, and φ of ΔW and W."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, nan
from statistics import median

import numpy as np

from loralens.analysis.base.amplification import FAR, Amplification, KeptRank
from loralens.charts.axes import direction_axis, line_chart
from loralens.charts.grid import Grid
from loralens.charts.names import NAME, commonest_kinds, fit_name
from loralens.charts.spec import Area, Band, ColourScale, Figure, HeatMap, Limits, Line, LineChart, Overlaps
from loralens.core.lazy import Array
from loralens.core.names import kind
from loralens.errors import OptionError
from loralens.tables.numbers import fixed, number

KINDS = 12  # kinds of a figure: those of most modules
FEW = 8  # directions up to which the points of a curve are marked

Results = Mapping[str, Amplification]


def amplification_figure(results: Results, *, title: str = "", phi_rank: int = 16) -> Figure:
    """The amplification of W by ΔW, in three bands.

    The curves show ‖ΔWᵢ‖/‖UᵢᵀWVᵢ‖ against the kept rank i, with one panel per kind and one line per module in the
    colour of its block. A dashed line and a grey area show the median and the range that random directions would give.
    The maps show the z-score of ‖UᵀWV‖ and its excess over random directions, by kind and block; a cell of several
    modules shows their median. The last band shows φ(i, j) between the directions of ΔW and those of W (Figure 8 of the
    LoRA paper) on either side, as the mean over modules. It is left out where the leading directions of W were not
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
        It shows at most 12 kinds, those of most modules.

    Raises
    ------
    OptionError
        No module has a value.
    """
    if not full_rank_rows(results):
        raise OptionError("no module has both a ΔW and a W that are not 0", fix="there is nothing to draw")
    kinds = commonest_kinds(results, KINDS)
    shown = {name: result for name, result in results.items() if kind(name) in kinds}
    grid, rows = Grid.of(shown, most=KINDS), full_rank_rows(shown)
    z, excess = z_scale(rows.values()), excess_scale(rows.values())
    curves = "amplification over the kept directions of ΔW (dashed: random directions; grey: their range)"
    maps = amplification_maps(rows, grid, z, excess)
    bands = [Band(_curves(shown, grid), curves, grid.ramp), Band(list(maps), "at the whole rank")]
    topped = [result for result in results.values() if result.top and result.s.size and result.weight_norm]
    return Figure(title, [*bands, *([_phi(topped, phi_rank)] if topped else [])])


def full_rank_rows(results: Results) -> dict[str, KeptRank]:
    """Module name → its row of Table 7 of the LoRA paper at the full rank; modules without a value are left out."""
    return {
        name: result.at_rank(result.s.size) for name, result in results.items() if result.s.size and result.weight_norm
    }


def _curves(results: Results, grid: Grid) -> list[LineChart]:
    alive = {name: result for name, result in results.items() if result.s.size and result.weight_norm}
    limits, ticks = direction_axis(max(result.s.size for result in alive.values()))
    panels, values = [], []
    for row, name in enumerate(grid.kinds):
        lines, areas = _lines(alive, grid, row)
        values += [y for line in lines for y in line.y] + [y for area in areas for y in (*area.low, *area.high)]
        panels.append((fit_name(name, NAME), lines, areas))
    finite = [value for value in values if isfinite(value) and value > 0] or [0.1, 1.0]
    span: Limits = (min(finite) / 1.2, max(finite) * 1.2)
    axes = {"log": True, "x_range": limits, "x_ticks": ticks, "y_range": span}
    return [
        line_chart(title, lines, "kept directions i of ΔW", "‖ΔWᵢ‖/‖UᵢᵀWVᵢ‖", areas=areas, **axes)  # type: ignore[arg-type]
        for title, lines, areas in panels
    ]


def _lines(alive: Results, grid: Grid, row: int) -> tuple[list[Line], list[Area]]:
    """The curves of one kind, with the median and range that random directions would give."""
    members = [(j, name, alive[name].curve) for j, names in grid.row(row) for name in names if name in alive]
    chance = [[kept.delta_norm / kept.random_norm for kept in curve] for _, _, curve in members]
    most = max((len(curve) for curve in chance), default=0)
    columns = [[curve[i] for curve in chance if len(curve) > i] for i in range(most)]
    x = range(1, most + 1)
    areas = [Area(x, [min(c) for c in columns], [max(c) for c in columns])] if most else []
    random = [Line("random directions, median", x, [median(c) for c in columns], ("quiet", 0), dashed=True)]
    lines = [
        Line(
            name,
            [kept.rank for kept in curve],
            [kept.amplification if isfinite(kept.amplification) else nan for kept in curve],
            grid.ink(j),
            marker="dot" if most <= FEW else "",
        )
        for j, name, curve in members
    ]
    return lines + (random if most else []), areas


def z_scale(rows: Iterable[KeptRank]) -> ColourScale:
    """The colour scale of z-scores, with 0, the level of chance, in its middle."""
    values = [abs(row.z) for row in rows if isfinite(row.z)]
    far = max([*values, FAR])  # so that values within chance stay pale
    return ColourScale(-far, far, "standard deviations from chance", diverging=True, chance=0.0, form="+.1f")


def excess_scale(rows: Iterable[KeptRank]) -> ColourScale:
    """The logarithmic colour scale of the excess over random directions, with 1, the level of chance, in its middle."""
    values = [abs(float(np.log2(row.excess))) for row in rows if isfinite(row.excess) and row.excess > 0]
    most = max([*values, 1.0])  # the scale reaches at least from a half to twice
    ticks = [(float(k), f"{2.0**k:.3g}") for k in (-int(most), 0, int(most))]
    label = "‖UᵀWV‖ over that of random directions"
    return ColourScale(-most, most, label, diverging=True, chance=0.0, doublings=True, ticks=ticks)


def amplification_maps(
    rows: Mapping[str, KeptRank],
    grid: Grid,
    z: ColourScale,
    excess: ColourScale,
    numbers: Mapping[str, int] | None = None,
) -> tuple[HeatMap, HeatMap]:
    """Maps of the z-score of ‖UᵀWV‖² and of the excess of ‖UᵀWV‖ over random directions, at the full rank."""
    sign = fixed("+.1f")

    def tip(name: str) -> str:
        row = rows[name]
        return (
            f"{name}: ‖ΔW‖ {number(row.delta_norm)}, ‖UᵀWV‖ {number(row.projected_norm)}, amplification "
            f"{number(row.amplification)}, excess over random {number(row.excess)}, z {sign(row.z)}"
        )

    scores = {name: row.z for name, row in rows.items()}
    doublings = {name: float(np.log2(row.excess)) for name, row in rows.items() if row.excess > 0}
    note = "a cell: the median of its modules" if grid.fullest > 1 else ""
    look = {"numbers": numbers, "gather": median, "tip": tip, "note": note}
    return (
        grid.heat("z-score of ‖UᵀWV‖²", scores, z, **look),  # type: ignore[arg-type]
        grid.heat("excess of ‖UᵀWV‖ over random", doublings, excess, **look),  # type: ignore[arg-type]
    )


def _phi(topped: Sequence[Amplification], limit: int) -> Band:
    """The band of Figure 8: φ on both sides on one colour scale, the mean over modules that have enough directions."""
    pairs = [(result.top.out, result.top.in_, *result.top.chance(result.shape)) for result in topped if result.top]
    # Modules of fewer directions are left out of the mean rather than padded: padding would look like no overlap.
    i = min(max(out.shape[0] for out, *_ in pairs), limit)
    full = [[side[:i, :limit] for side in sides] for sides in pairs if sides[0].shape[0] >= i]
    j = min(side.shape[1] for sides in full for side in sides)
    out, in_, chance_out, chance_in = (_mean([sides[k][:, :j] for sides in full]) for k in range(4))
    levels = sorted((float(chance_out[-1, -1]), float(chance_in[-1, -1])))
    top = max(float(out.max()), float(in_.max()), 2 * levels[1])
    scale = ColourScale(0.0, top, "φ(i, j)", chance=levels[0], chance_high=levels[1], form=".2g")
    maps = [
        Overlaps(
            f"{side} side of ΔW and W",
            values.tolist(),
            scale,
            notes=[f"corner {values[-1, -1]:.3g}, chance {level[-1, -1]:.3g}"],
        )
        for side, values, level in (("out", out, chance_out), ("in", in_, chance_in))
    ]
    title = f"φ(i, j): directions i of ΔW (down) and j of W (across), mean of {len(full)} modules"
    return Band(maps, title, [scale])


def _mean(arrays: Sequence[Array]) -> Array:
    return np.asarray(np.mean(arrays, axis=0), dtype=np.float64)
