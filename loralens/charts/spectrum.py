"""Charts of spectra: singular values by kind, energy of the leading directions, maps of effective rank and energy."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from loralens.analysis.spectrum import Spectrum
from loralens.charts.axes import direction_axis, line_chart
from loralens.charts.grid import Grid, all_blocks, arithmetic_mean, gather_kinds
from loralens.charts.names import NAME, columns_to_label, fit_name
from loralens.charts.spec import Band, ColourScale, Figure, HeatMap, Limits, Line, LineChart
from loralens.core.names import kind
from loralens.errors import OptionError
from loralens.linalg.factor import Floats
from loralens.tables.numbers import number, percent

PANELS = 24  # panels of a figure: six rows of four
ADAPTERS = 12  # adapters of a figure: with 24 panels, two for each
LINES = 128  # lines of a panel; where there are more modules, there is one mean line per block
FEW = 8  # up to so many lines the order of drawing does not matter, and up to so many directions points are marked
# Lines are drawn in the order of the fractional parts of multiples of the golden ratio, which mixes early and late
# blocks evenly: in their own order late blocks would hide early ones.
GOLDEN = 0.618
TITLE = 80  # letters of the name of an adapter above its charts
SERIES = 8  # colours of kinds, as the palette has; further kinds have dashed, then dotted lines

Spectra = Mapping[str, Spectrum]


def spectrum_figure(spectra: Mapping[str, Spectra]) -> Figure:
    """The spectra of one or more adapters by kind, and the effective rank of every block and kind.

    For every adapter a panel for each kind, σᵢ against i, a line for each module in the colour of its block; a line
    ends where σᵢ is zero to rounding. Below, the effective rank, a row for each kind and a column for each block, as
    the mean over the non-zero modules of the cell. All adapters share the limits of σ and the colours.

    Parameters
    ----------
    spectra : mapping of str to mapping of str to Spectrum
        Label of the adapter → module name → Spectrum. Labels and names are shown as they are, long ones without
        their middle.

    Returns
    -------
    Figure
        At most 24 panels and 12 adapters. The kinds of least energy share a panel where there are more; the titles
        say so. A panel of more than 128 modules shows the mean σᵢ of every block instead.

    Raises
    ------
    OptionError
        No adapter.
    """
    if not spectra:
        raise OptionError("no adapter to draw", fix="give at least one")
    shown = dict(list(spectra.items())[:ADAPTERS])
    blocks = all_blocks(name for modules in shown.values() for name in modules)
    most = max(1, PANELS // len(shown))
    limits, scale = singular_value_limits(shown.values()), effective_rank_scale(shown.values())
    bands = []
    for label, modules in shown.items():
        grid = Grid.of(
            modules, {name: spectrum.frobenius**2 for name, spectrum in modules.items()}, most=most, blocks=blocks
        )
        bands += _bands(label, modules, grid, limits, scale)
    left_out = len(spectra) - len(shown)
    title = f"{len(shown)} of {len(spectra)} adapters; {left_out} left out" if left_out else ""
    return Figure(title, bands)


def _bands(label: str, modules: Spectra, grid: Grid, limits: Limits | None, scale: ColourScale) -> list[Band]:
    title = fit_name(label, TITLE)
    if not modules:
        return [Band([], f"{title}: no modules")]
    if grid.gathered:
        kinds = len(grid.kinds) - 1 + grid.gathered
        title += f": {grid.gathered} of {kinds} kinds, those of least energy, share a panel"
    panels = singular_value_panels(modules, grid, limits)
    return [Band(panels, title, grid.ramp), Band([effective_rank_map(modules, grid, scale)])]


def singular_value_limits(spectra: Iterable[Spectra]) -> Limits | None:
    """Limits that hold all singular values that are not zero to rounding; None where there are none."""
    drawn = [s for modules in spectra for spectrum in modules.values() if (s := nonzero(spectrum)).size]
    if not drawn:
        return None
    low, high = min(float(s[-1]) for s in drawn), max(float(s[0]) for s in drawn)
    margin = max((high / low) ** 0.05, 1.2)  # 5 % of the logarithmic axis, and at least a factor of 1.2
    return low / margin, high * margin


def nonzero(spectrum: Spectrum) -> Floats:
    """The singular values that are not zero to rounding."""
    return np.asarray(spectrum.s[: spectrum.numerical_rank], dtype=np.float64)


def singular_value_panels(
    spectra: Spectra, grid: Grid, limits: Limits | None, numbers: Mapping[str, int] | None = None
) -> list[LineChart]:
    """One panel per kind, all on one scale: σᵢ of every module against i.

    Where no module has a second direction, σ₁ is drawn against the block. ``numbers`` are those of modules on a page.
    """
    most = max((spectrum.s.size for spectrum in spectra.values()), default=1)
    flat = most < 2
    if flat:
        shown = columns_to_label(grid.blocks, 6)
        x_range: Limits = (-0.5, len(grid.blocks) - 0.5)
        x_ticks = [(float(j), grid.columns[j]) for j in shown if len(grid.columns[j]) <= 8]
    else:
        x_range, x_ticks = direction_axis(most)
    return [
        line_chart(
            fit_name(name, NAME),
            _lines(spectra, grid, row, numbers or {}, flat=flat),
            grid.across or "module" if flat else "direction i",
            "σᵢ of ΔW",
            log=True,
            x_range=x_range,
            y_range=limits or (0.1, 1.0),
            x_ticks=x_ticks,
            note=_note(spectra, grid, row),
        )
        for row, name in enumerate(grid.kinds)
    ]


def _lines(spectra: Spectra, grid: Grid, row: int, numbers: Mapping[str, int], *, flat: bool) -> list[Line]:
    cells = grid.row(row)
    if len(cells) > FEW:
        cells.sort(key=lambda cell: cell[0] * GOLDEN % 1)
    lines = []
    for column, names in cells:
        alive = [name for name in names if spectra[name].numerical_rank]
        if _is_crowded(grid, row) and len(alive) > 1:
            label = f"mean of {len(alive)} modules of block {grid.columns[column]}"
            curves = [(label, _mean_curve([nonzero(spectra[name]) for name in alive]), alive)]
        else:
            curves = [(name, nonzero(spectra[name]), [name]) for name in alive]
        for label, s, members in curves:
            x = [column] if flat else range(1, s.size + 1)
            tagged = [numbers[name] for name in members] if numbers else ()
            outside = grid.blocks[column] is None
            marker = "dot" if s.size <= FEW else ""
            lines.append(Line(label, x, s.tolist(), grid.ink(column), tagged, marker, dashed=outside))  # type: ignore[arg-type]
    return lines


def _is_crowded(grid: Grid, row: int) -> bool:
    return sum(len(names) for _, names in grid.row(row)) > LINES


def _mean_curve(curves: Sequence[Floats]) -> Floats:
    """The mean σᵢ of the non-zero modules; a missing σᵢ counts as zero."""
    total = np.zeros(max(s.size for s in curves))
    for s in curves:
        total[: s.size] += s
    return total / len(curves)


def _note(spectra: Spectra, grid: Grid, row: int) -> str:
    """The remark of a panel about what its lines do not show."""
    cells = grid.row(row)
    names = [name for _, members in cells for name in members]
    zero = sum(spectra[name].spectral == 0 for name in names)
    if zero == len(names):
        return ""
    notes = [
        "dashed: outside any block" if grid.blocks[cells[-1][0]] is None and len(grid.blocks) > 1 else "",
        "mean of each block's modules" if _is_crowded(grid, row) else "",
        f"{zero} of {len(names)} modules are zero" if zero else "",
    ]
    return "\n".join(filter(None, notes))


def effective_rank_scale(spectra: Iterable[Spectra]) -> ColourScale:
    """The colour scale of effective ranks, which spans those that occur and at least a quarter of the nominal rank."""
    every = [spectrum for modules in spectra for spectrum in modules.values()]
    values = [spectrum.effective_rank for spectrum in every if spectrum.spectral > 0] or [1.0]
    ranks = sorted({spectrum.rank for spectrum in every}) or [1]
    nominal = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
    # The least span keeps small differences from looking like large ones.
    margin = max(0.0, max(ranks[-1] / 4, 1) - (max(values) - min(values))) / 2
    low, high = max(min(values) - margin, 1.0), max(values) + margin
    return ColourScale(low, high, f"effective rank (of r = {nominal})", form=".2f")


def effective_rank_map(
    spectra: Spectra, grid: Grid, scale: ColourScale, numbers: Mapping[str, int] | None = None, title: str = ""
) -> HeatMap:
    """The map of effective ranks by kind and block; a cell is the mean over its non-zero modules."""
    values = {name: spectrum.effective_rank for name, spectrum in spectra.items() if spectrum.spectral > 0}

    def tip(name: str) -> str:
        s = spectra[name]
        return f"{name}: effective rank {s.effective_rank:.2f} of r = {s.rank}, stable rank {s.stable_rank:.2f}"

    zeros = [name for name in spectra if name not in values]
    note = f"a cell: the mean of its modules, up to {grid.fullest}" if grid.fullest > 1 else ""
    return grid.heat(title, values, scale, numbers=numbers, gather=arithmetic_mean, tip=tip, zeros=zeros, note=note)


def energy_chart(spectra: Spectra, weights: Mapping[str, float]) -> LineChart:
    """The share of Σσ² in the k leading directions of every module, one line per kind.

    ``weights`` maps module names to their share of the energy: the kinds of most energy have a line of their own.
    """
    kinds, place_of, _ = gather_kinds(spectra, weights)
    members: list[list[Spectrum]] = [[] for _ in kinds]
    for name, spectrum in spectra.items():
        members[place_of[kind(name)]].append(spectrum)
    lines = [
        Line(
            fit_name(name, NAME),
            range(len(curve)),
            curve,
            ("series", k % SERIES),
            dashed=SERIES <= k < 2 * SERIES,
            dotted=k >= 2 * SERIES,
        )
        for k, name in enumerate(kinds)
        if (curve := energy_curve(members[k]))
    ]
    if len(lines) > 1:
        total_curve = energy_curve(list(spectra.values()))
        lines.append(Line("all modules", range(len(total_curve)), total_curve, ("quiet", 0), dashed=True))
    return line_chart(
        "", lines, "directions kept of every module", "share of energy", y_range=(0.0, 1.0),
        levels={"99 %": 0.99, "90 %": 0.9}, legend=True,
    )  # fmt: skip


def energy_curve(members: Sequence[Spectrum]) -> list[float]:
    """The share of energy in the k leading directions of each module, for k = 0 … r; empty where all σ are 0."""
    most = max((spectrum.s.size for spectrum in members), default=0)
    energy = np.zeros(most + 1)
    unit = max((spectrum.spectral for spectrum in members), default=0.0)
    if not unit:
        return []
    for spectrum in members:
        # Divided by the largest σ first, as the square of a large or small σ may not be a float.
        energy[1 : spectrum.s.size + 1] += (spectrum.s / unit) ** 2
    return [float(share) for share in energy.cumsum() / energy.sum()]


def energy_scale(grids: Iterable[Grid], shares: Iterable[Mapping[str, float]]) -> ColourScale:
    """The colour scale of shares of energy, from 0 to the largest share of a cell."""
    pairs = zip(grids, shares, strict=True)
    tops = [sum(of[name] for name in names) for grid, of in pairs for names in grid.cells.values()]
    return ColourScale(0.0, max(tops, default=0.0) or 1.0, "share of the adapter's energy", form=".2%")


def energy_map(
    spectra: Spectra,
    shares: Mapping[str, float],
    grid: Grid,
    scale: ColourScale,
    numbers: Mapping[str, int] | None = None,
) -> HeatMap:
    """The map of shares of ‖ΔW‖² by kind and block; the share of a module if all had the same is marked as chance."""
    even = 1 / max(len(spectra), 1)
    # A cell of several modules has a multiple of the even share, so there is no one level to mark.
    level = even if grid.fullest == 1 and even < scale.high else None
    colours = ColourScale(0.0, scale.high, scale.label, chance=level, form=scale.form)

    def tip(name: str) -> str:
        return f"{name}: {percent(shares[name])} of the energy, ‖ΔW‖ {number(spectra[name].frobenius)}"

    values = shares if any(shares.values()) else {}
    return grid.heat("", values, colours, numbers=numbers, gather=sum, tip=tip)
