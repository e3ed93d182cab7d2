"""The amplification factor: its curve over the kept rank, excess and z of every block and kind, and φ(ΔW, W)."""

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite, nan
from statistics import median

import numpy as np

from loralens.analysis.base.amplification import FAR, Amplification, KeptRank
from loralens.charts.axes import direction_axis, line_chart
from loralens.charts.grid import Grid
from loralens.charts.names import NAME, commonest_kinds, fit
from loralens.charts.spec import Area, Band, Figure, Heat, Limits, Line, Lines, Overlaps, Scale
from loralens.core.lazy import Array
from loralens.core.names import kind
from loralens.errors import OptionError
from loralens.tables.numbers import fixed, number

KINDS = 12  # of one figure: those of most modules
FEW = 8  # directions up to which every point is drawn

Results = Mapping[str, Amplification]


def amplification_figure(results: Results, *, title: str = "", phi_rank: int = 16) -> Figure:
    """The amplification of W by ΔW, in three bands.

    Curves: ‖ΔWᵢ‖/‖UᵢᵀWVᵢ‖ against the kept rank i, a panel a kind, a line a module in the colour of its block; dashed
    over grey, median and range of what random directions would give. Maps: the z-score of ‖UᵀWV‖ and its excess over
    random, kinds down, blocks across, the median where a cell has several modules. φ(i, j) between the directions of
    ΔW and those of W (Figure 8 of the LoRA paper), on either side, the mean over modules; left out where the top of W
    was not computed.

    Parameters
    ----------
    results : mapping of str to Amplification
        Modules whose ΔW or W is 0 have no value and are left out of curves and means.
    title : str
    phi_rank : int
        Largest i and j of φ.

    Returns
    -------
    Figure
        Of at most 12 kinds, those of most modules.

    Raises
    ------
    OptionError
        No module has a value.
    """
    if not whole_rank(results):
        raise OptionError("no module has both a ΔW and a W that are not 0", fix="there is nothing to draw")
    kinds = commonest_kinds(results, KINDS)
    shown = {name: one for name, one in results.items() if kind(name) in kinds}
    grid, rows = Grid.of(shown, most=KINDS), whole_rank(shown)
    z, excess = z_scale(rows.values()), excess_scale(rows.values())
    curves = "amplification over the kept directions of ΔW (dashed: random directions; grey: their range)"
    maps = amplification_maps(rows, grid, z, excess)
    bands = [Band(_curves(shown, grid), curves, grid.ramp), Band(list(maps), "at the whole rank")]
    topped = [one for one in results.values() if one.top and one.s.size and one.weight_norm]
    return Figure(title, [*bands, *([_phi(topped, phi_rank)] if topped else [])])


def whole_rank(results: Results) -> dict[str, KeptRank]:
    """The row of Table 7 at the whole rank, of modules that have one."""
    return {name: one.at_rank(one.s.size) for name, one in results.items() if one.s.size and one.weight_norm}


def _curves(results: Results, grid: Grid) -> list[Lines]:
    alive = {name: one for name, one in results.items() if one.s.size and one.weight_norm}
    limits, ticks = direction_axis(max(one.s.size for one in alive.values()))
    panels, values = [], []
    for row, name in enumerate(grid.kinds):
        lines, areas = _lines(alive, grid, row)
        values += [y for line in lines for y in line.y] + [y for area in areas for y in (*area.low, *area.high)]
        panels.append((fit(name, NAME), lines, areas))
    known = [value for value in values if isfinite(value) and value > 0] or [0.1, 1.0]
    span: Limits = (min(known) / 1.2, max(known) * 1.2)
    axes = {"log": True, "x_range": limits, "x_ticks": ticks, "y_range": span}
    return [
        line_chart(title, lines, "kept directions i of ΔW", "‖ΔWᵢ‖/‖UᵢᵀWVᵢ‖", areas=areas, **axes)  # type: ignore[arg-type]
        for title, lines, areas in panels
    ]


def _lines(alive: Results, grid: Grid, row: int) -> tuple[list[Line], list[Area]]:
    """The curves of one kind, and those that random directions would give."""
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


def z_scale(rows: Iterable[KeptRank]) -> Scale:
    """The colours of z-scores: 0, which is chance, in their middle."""
    values = [abs(row.z) for row in rows if isfinite(row.z)]
    far = max([*values, FAR])
    return Scale(-far, far, "standard deviations from chance", diverging=True, chance=0.0, form="+.1f")


def excess_scale(rows: Iterable[KeptRank]) -> Scale:
    """The colours of the excess over random, by doublings: 1, which is chance, in their middle."""
    values = [abs(float(np.log2(row.excess))) for row in rows if isfinite(row.excess) and row.excess > 0]
    most = max([*values, 1.0])
    ticks = [(float(k), f"{2.0**k:.3g}") for k in (-int(most), 0, int(most))]
    label = "‖UᵀWV‖ over that of random directions"
    return Scale(-most, most, label, diverging=True, chance=0.0, doublings=True, ticks=ticks)


def amplification_maps(
    rows: Mapping[str, KeptRank], grid: Grid, z: Scale, excess: Scale, numbers: Mapping[str, int] | None = None
) -> tuple[Heat, Heat]:
    """Maps of the z-score of ‖UᵀWV‖², and of its excess over random directions, at the whole rank."""
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
    """Figure 8: mean φ over the modules that have so many directions, on both sides, with one bar."""
    pairs = [(one.top.out, one.top.in_, *one.top.chance(one.shape)) for one in topped if one.top]
    i = min(max(out.shape[0] for out, *_ in pairs), limit)
    full = [[side[:i, :limit] for side in sides] for sides in pairs if sides[0].shape[0] >= i]
    j = min(side.shape[1] for sides in full for side in sides)
    out, in_, chance_out, chance_in = (_mean([sides[k][:, :j] for sides in full]) for k in range(4))
    levels = sorted((float(chance_out[-1, -1]), float(chance_in[-1, -1])))
    top = max(float(out.max()), float(in_.max()), 2 * levels[1])
    scale = Scale(0.0, top, "φ(i, j)", chance=levels[0], chance_high=levels[1], form=".2g")
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
