"""Charts of spectra: singular values by kind, energy of the leading directions, maps of effective rank and energy."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean

import numpy as np

from loralens.analysis.spectrum import Spectrum
from loralens.charts.module_grid import Grid, all_blocks, fit_name, gather_kinds
from loralens.charts.spec import Band, ColourScale, Figure, HeatMap, Limits, Line, LineChart
from loralens.compression.truncation_plan import CurvePoint
from loralens.core.names import Block, kind
from loralens.errors import OptionError
from loralens.linalg.factor import Floats
from loralens.tables.numbers import fixed, number, percent, span, unit_of

PANELS = 24  # panels of a figure: six rows of four
ADAPTERS = 12  # adapters of a figure: with 24 panels, two for each
LINES = 128  # lines of a panel; where there are more modules, there is one mean line per block
FEW = 8  # directions up to which points are marked
TITLE = 80  # letters of the name of an adapter above its charts
SERIES = 8  # colours of kinds, as many as the palette has; further kinds have dashed, then dotted lines

Spectra = Mapping[str, Spectrum]


def spectrum_figure(spectra: Mapping[str, Spectra]) -> Figure:
    """Draw the spectra of one or more adapters by kind, and the effective rank of every block and kind.

    Every adapter has a panel for each kind. It shows σᵢ against i, with one line for each module in the colour of its
    block; a line ends where σᵢ is zero up to rounding. A map below shows the effective rank, with one row for each kind
    and one column for each block, as the mean over the non-zero modules of the cell. All adapters share the limits of σ
    and the colours.

    Parameters
    ----------
    spectra : mapping of str to mapping of str to Spectrum
        Label of the adapter → module name → Spectrum. Long labels and names are shortened in their middle.

    Returns
    -------
    Figure
        It has at most 24 panels and 12 adapters. If there are more kinds, those with the least energy share a panel.
        A panel of more than 128 modules shows the mean σᵢ of every block instead.

    Raises
    ------
    OptionError
        There is no adapter.
    """
    if not spectra:
        raise OptionError("no adapter to draw", fix="give at least one adapter")
    shown = dict(list(spectra.items())[:ADAPTERS])
    # One list of blocks for all adapters, so that a block has one colour throughout the figure.
    blocks = all_blocks(name for modules in shown.values() for name in modules)
    limits, scale = singular_value_limits(shown.values()), effective_rank_scale(shown.values())
    title = f"{len(shown)} of {len(spectra)} adapters" if len(shown) < len(spectra) else ""
    bands = []
    for label, modules in shown.items():
        name = fit_name(label, TITLE)
        if not modules:
            bands.append(Band([], f"{name}: no modules"))
            continue
        if len(spectra) == 1:  # its name is the title of the figure, which a paper replaces or leaves out
            title, name = name, ""
        energies = {name: spectrum.frobenius**2 for name, spectrum in modules.items()}
        grid = Grid.of(modules, energies, most=max(1, PANELS // len(shown)), blocks=blocks)
        bands.append(Band(singular_value_panels(modules, grid, limits), name, grid.ramp))
        bands.append(Band([effective_rank_map(modules, grid, scale)]))
    return Figure(title, bands)


def singular_value_limits(spectra: Iterable[Spectra]) -> Limits | None:
    """Return limits that hold all singular values that are not zero up to rounding, or None if there is none."""
    drawn = [s for modules in spectra for spectrum in modules.values() if (s := nonzero(spectrum)).size]
    if not drawn:
        return None
    low, high = min(float(s[-1]) for s in drawn), max(float(s[0]) for s in drawn)
    margin = max((high / low) ** 0.05, 1.2)  # 5 % of the logarithmic axis, and at least a factor of 1.2
    return low / margin, high * margin


def nonzero(spectrum: Spectrum) -> Floats:
    """Return the singular values that are not zero up to rounding."""
    return np.asarray(spectrum.s[: spectrum.numerical_rank], dtype=np.float64)


def singular_value_panels(spectra: Spectra, grid: Grid, limits: Limits | None) -> list[LineChart]:
    """Draw σᵢ of every module against i, with one panel per kind, all on one scale.

    If no module has a second direction, σ₁ is drawn against the block.
    """
    most = max((spectrum.s.size for spectrum in spectra.values()), default=1)
    flat = most < 2
    label, x_range = (grid.across or "module", None) if flat else ("direction i", direction_limits(most))
    charts = []
    for row, name in enumerate(grid.kinds):
        lines, note = _lines(spectra, grid, row, flat=flat)
        y_range = limits or (0.1, 1.0)
        charts.append(LineChart(fit_name(name), lines, label, "σᵢ of ΔW", True, x_range, y_range, note=note))
    return charts


def _lines(spectra: Spectra, grid: Grid, row: int, *, flat: bool) -> tuple[list[Line], str]:
    """The lines of a kind, and a remark on what they do not show."""
    cells = grid.row(row)
    names = [name for _, members in cells for name in members]
    zero, crowded = sum(spectra[name].spectral == 0 for name in names), len(names) > LINES
    outside = len(grid.blocks) > 1 and grid.blocks[cells[-1][0]] is None
    lines = []
    if len(cells) > FEW:
        # Multiples of the golden ratio mix early and late blocks: in their own order late ones would hide early ones.
        cells.sort(key=lambda cell: cell[0] * 0.618 % 1)
    for column, members in cells:
        curves = [(name, nonzero(spectra[name])) for name in members if spectra[name].numerical_rank]
        if crowded and len(curves) > 1:
            # Modules of lower rank count as 0 beyond it; without them the mean would rise where they end.
            total = np.zeros(max(s.size for _, s in curves))
            for _, s in curves:
                total[: s.size] += s
            curves = [(f"mean of {len(curves)} modules of block {grid.columns[column]}", total / len(curves))]
        for label, s in curves:
            home = grid.blocks[column]
            x = [home.number if isinstance(home, Block) else column] if flat else range(1, s.size + 1)
            marker, style = "o" if s.size <= FEW else "", "--" if grid.blocks[column] is None else "-"
            lines.append(Line(label, x, s.tolist(), grid.ink(column), marker, style))
    notes = [
        "dashed: outside any block" if outside else "",
        "mean of each block's modules" if crowded else "",
        f"{zero} of {len(names)} modules are zero" if zero else "",
    ]
    return lines, "" if zero == len(names) else "\n".join(filter(None, notes))


def direction_limits(most: int) -> Limits:
    """Return the limits of an axis of directions from 1 to ``most``."""
    margin = max(0.02 * most, 0.1)
    return 1 - margin, most + margin


def effective_rank_scale(spectra: Iterable[Spectra]) -> ColourScale:
    """Return the colour scale of effective ranks. It spans all of them, and at least a quarter of the nominal rank."""
    every = [spectrum for modules in spectra for spectrum in modules.values()]
    values = [spectrum.effective_rank for spectrum in every if spectrum.spectral > 0] or [1.0]
    ranks = [spectrum.rank for spectrum in every] or [1]
    # The least span keeps small differences from looking like large ones.
    margin = max(0.0, max(max(ranks) / 4, 1) - (max(values) - min(values))) / 2
    low, high = max(min(values) - margin, 1.0), max(values) + margin
    return ColourScale(low, high, f"effective rank (of r = {span(ranks)})", fixed(".2f"))


def effective_rank_map(spectra: Spectra, grid: Grid, scale: ColourScale) -> HeatMap:
    """Draw effective ranks by kind and block; a cell is the mean over its non-zero modules."""
    values = {name: spectrum.effective_rank for name, spectrum in spectra.items() if spectrum.spectral > 0}

    def tip(name: str) -> str:
        s = spectra[name]
        return f"effective rank {s.effective_rank:.2f} of r = {s.rank}, stable rank {s.stable_rank:.2f}"

    zeros = [name for name in spectra if name not in values]
    note = f"a cell: the mean of its modules, up to {grid.fullest}"
    return grid.heat("", values, scale, gather=fmean, tip=tip, zeros=zeros, note=note)


def energy_chart(spectra: Spectra, weights: Mapping[str, float]) -> LineChart:
    """Draw the share of Σσ² in the k leading directions of every module, with one line per kind.

    ``weights`` maps module names to their share of the energy: the kinds with the most energy have a line of their own.
    """
    kinds, place_of = gather_kinds(spectra, weights)
    lines = []
    for k, name in enumerate(kinds):
        if curve := energy_curve([spectrum for module, spectrum in spectra.items() if place_of[kind(module)] == k]):
            style = "-" if k < SERIES else "--" if k < 2 * SERIES else ":"
            lines.append(Line(fit_name(name), range(len(curve)), curve, f"c{k % SERIES}", style=style))
    if len(lines) > 1:
        curve = energy_curve(list(spectra.values()))
        lines.append(Line("all modules", range(len(curve)), curve, style="--"))
    levels = {"99 %": 0.99, "90 %": 0.9}
    label = "directions kept in every module"
    return LineChart("", lines, label, "share of energy", y_range=(0.0, 1.0), levels=levels, legend=True)


def energy_curve(members: Sequence[Spectrum]) -> list[float]:
    """Return the share of energy in the k leading directions of each module, for k = 0 … r; empty if all σ are 0."""
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
    """Return the colour scale of shares of energy, from 0 to the largest share of a cell."""
    pairs = zip(grids, shares, strict=True)
    tops = [sum(of[name] for name in names) for grid, of in pairs for names in grid.cells.values()]
    return ColourScale(0.0, max(tops, default=0.0) or 1.0, "share of the adapter's energy", percent)


def energy_map(spectra: Spectra, shares: Mapping[str, float], grid: Grid, scale: ColourScale) -> HeatMap:
    """Draw shares of ‖ΔW‖² by kind and block. The mark of chance is the share of each module if all were equal."""
    even = 1 / max(len(spectra), 1)
    # A cell of several modules has a multiple of the even share, so there is not one level to mark.
    level = [even] if grid.fullest == 1 and even < scale.high else []

    def tip(name: str) -> str:
        return f"{percent(shares[name])} of the energy, ‖ΔW‖ {number(spectra[name].frobenius)}"

    # If the energy is 0, all cells stay empty, because a map of zeros would look like a map of equal shares.
    values = shares if any(shares.values()) else {}
    return grid.heat("", values, replace(scale, chance=level), gather=sum, tip=tip)


LABELS = 10  # ranks that are written next to their points: more would overlap
SPACE = 1.08  # the end of an axis, as a multiple of the largest value: room for the label of the last point

UNIFORM, BUDGET = "one rank everywhere", "best rank for each module, at the same size"


def curve_figure(
    title: str, points: Sequence[CurvePoint], *, chosen: tuple[int, float] | None = None, on_data: bool = False
) -> Figure:
    """Draw the relative error in percent against the bytes of the file; both axes begin at 0.

    Parameters
    ----------
    title : str
    points : sequence of CurvePoint
        As `loralens.compression.truncation_plan.rank_curve` returns them.
    chosen : tuple of int and float, optional
        Bytes and error of the file that was written, which is marked on the curve.
    on_data : bool
        Whether errors are measured on real inputs.
    """
    return Figure(fit_name(title, 90), [Band([curve_chart(points, chosen=chosen, on_data=on_data)])])


def curve_chart(
    points: Sequence[CurvePoint], *, chosen: tuple[int, float] | None = None, on_data: bool = False, dialect: str = ""
) -> LineChart:
    """Draw the chart of that figure; ``dialect`` is the format of the file."""
    # All sizes are in the unit that suits the largest file, because an axis has one unit.
    largest = max((point.uniform.bytes for point in points), default=1)
    unit, step = unit_of(largest)
    pairs = [[(of.bytes / step, 100 * of.error) for of in (point.uniform, point.budget)] for point in points]
    (sizes, errors), (budget_sizes, budget_errors) = (
        ([pair[k][0] for pair in pairs], [pair[k][1] for pair in pairs]) for k in (0, 1)
    )
    lines = [
        Line(UNIFORM, sizes, errors, "c0", "o", labels=_rank_labels(points, largest / LABELS)),
        Line(BUDGET, budget_sizes, budget_errors, "c1", "s", "--"),
    ]
    if chosen:
        lines.append(Line("what was written", [chosen[0] / step], [100 * chosen[1]], "c3", "*", ""))
    highest = max([y for line in lines for y in line.y], default=0.0)
    error = "‖(ΔW−ΔW')x‖ / ‖ΔWx‖" if on_data else "‖ΔW−ΔW'‖ / ‖ΔW‖"
    return LineChart(
        "", lines, f"size of the {dialect} file ({unit})" if dialect else f"size of the file ({unit})",
        f"error {error} (%)", x_range=(0.0, SPACE * largest / step), y_range=(0.0, SPACE * highest or 1.0), legend=True,
    )  # fmt: skip


def _rank_labels(points: Sequence[CurvePoint], room: float) -> list[str]:
    """The label of each point; points less than ``room`` bytes from the last labelled one have an empty label."""
    labelled, labels = float("inf"), []
    for point in points:
        # The points go from the largest file to the smallest, which always has a label.
        if labelled - point.uniform.bytes < room and point is not points[-1]:
            labels.append("")
            continue
        labelled = point.uniform.bytes
        # "r =" at the two ends says what the numbers between them are.
        labels.append(f"r = {point.rank}" if point in (points[0], points[-1]) else str(point.rank))
    return labels
