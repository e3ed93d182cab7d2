"""Charts of spectra: singular values by kind, energy of the leading directions, maps of effective rank and energy."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from loralens.analysis.spectrum import Spectrum
from loralens.charts.grid import Grid, all_blocks, arithmetic_mean, columns_to_label, fit_name, gather_kinds
from loralens.charts.spec import (
    Band,
    ColourScale,
    Figure,
    HeatMap,
    Ink,
    Limits,
    Line,
    LineChart,
    Marker,
    direction_limits,
    line_chart,
)
from loralens.core.names import kind
from loralens.errors import OptionError
from loralens.linalg.factor import Floats
from loralens.tables.numbers import number, percent

PANELS = 24  # panels of a figure: six rows of four
ADAPTERS = 12  # adapters of a figure: with 24 panels, two for each
LINES = 128  # lines of a panel; where there are more modules, there is one mean line per block
# Up to so many lines the order of drawing does not matter, and up to so many directions points are marked.
FEW = 8
# Lines are drawn in the order of the fractional parts of multiples of the golden ratio, which mixes early and late
# blocks evenly: in their own order late blocks would hide early ones.
GOLDEN = 0.618
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
        It has at most 24 panels and 12 adapters. If there are more kinds, those with the least energy share a panel,
        and the title says so. A panel of more than 128 modules shows the mean σᵢ of every block instead.

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
    most = max(1, PANELS // len(shown))
    limits, scale = singular_value_limits(shown.values()), effective_rank_scale(shown.values())
    bands = []
    # The name of the only adapter is the title of the figure, which a paper replaces or leaves out.
    alone = len(spectra) == 1 and any(spectra.values())
    for label, modules in shown.items():
        energies = {name: spectrum.frobenius**2 for name, spectrum in modules.items()}
        grid = Grid.of(modules, energies, most=most, blocks=blocks)
        bands += _bands("" if alone else label, modules, grid, limits, scale)
    left_out = len(spectra) - len(shown)
    title = f"{len(shown)} of {len(spectra)} adapters; {left_out} left out" if left_out else ""
    if alone:
        title = fit_name(next(iter(spectra)), TITLE)
    return Figure(title, bands)


def _bands(label: str, modules: Spectra, grid: Grid, limits: Limits | None, scale: ColourScale) -> list[Band]:
    title = fit_name(label, TITLE)
    if not modules:
        return [Band([], f"{title}: no modules")]
    if grid.gathered:
        kinds = len(grid.kinds) - 1 + grid.gathered
        note = f"{grid.gathered} of {kinds} kinds, those with the least energy, share a panel"
        title = f"{title}: {note}" if title else note
    panels = singular_value_panels(modules, grid, limits)
    return [Band(panels, title, grid.ramp), Band([effective_rank_map(modules, grid, scale)])]


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


def singular_value_panels(
    spectra: Spectra, grid: Grid, limits: Limits | None, numbers: Mapping[str, int] | None = None
) -> list[LineChart]:
    """Draw σᵢ of every module against i, with one panel per kind, all on one scale.

    If no module has a second direction, σ₁ is drawn against the block. ``numbers`` are those of modules on a page.
    """
    most = max((spectrum.s.size for spectrum in spectra.values()), default=1)
    flat = most < 2
    if flat:
        label, x_range = grid.across or "module", (-0.5, len(grid.blocks) - 0.5)
        # Six labels of at most eight letters fit below a panel.
        shown = columns_to_label(grid.blocks, 6)
        x_ticks = [(float(j), grid.columns[j]) for j in shown if len(grid.columns[j]) <= 8]
    else:
        label, x_range, x_ticks = "direction i", direction_limits(most), []
    charts, y_range = [], limits or (0.1, 1.0)
    for row, name in enumerate(grid.kinds):
        lines, note = _lines(spectra, grid, row, numbers or {}, flat=flat), _note(spectra, grid, row)
        charts.append(line_chart(
            fit_name(name), lines, label, "σᵢ of ΔW", log=True, x_range=x_range, y_range=y_range, x_ticks=x_ticks,
            note=note,
        ))  # fmt: skip
    return charts


def _lines(spectra: Spectra, grid: Grid, row: int, numbers: Mapping[str, int], *, flat: bool) -> list[Line]:
    cells = grid.row(row)
    if len(cells) > FEW:
        cells.sort(key=lambda cell: cell[0] * GOLDEN % 1)
    # Asked once: the answer takes a pass over the row.
    lines, crowded = [], _is_crowded(grid, row)
    for column, names in cells:
        curves = [(name, nonzero(spectra[name]), [name]) for name in names if spectra[name].numerical_rank]
        if crowded and len(curves) > 1:
            label = f"mean of {len(curves)} modules of block {grid.columns[column]}"
            # Modules of lower rank count as 0 beyond it; without them the mean would rise where they end.
            total = np.zeros(max(s.size for _, s, _ in curves))
            for _, s, _ in curves:
                total[: s.size] += s
            curves = [(label, total / len(curves), [name for name, _, _ in curves])]
        for label, s, members in curves:
            x = [column] if flat else range(1, s.size + 1)
            tagged = [numbers[name] for name in members] if numbers else ()
            marker: Marker = "dot" if s.size <= FEW else ""
            outside = grid.blocks[column] is None
            lines.append(Line(label, x, s.tolist(), grid.ink(column), tagged, marker, dashed=outside))
    return lines


def _is_crowded(grid: Grid, row: int) -> bool:
    return sum(len(names) for _, names in grid.row(row)) > LINES


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
    """Return the colour scale of effective ranks. It spans all of them, and at least a quarter of the nominal rank."""
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
    """Draw effective ranks by kind and block; a cell is the mean over its non-zero modules."""
    values = {name: spectrum.effective_rank for name, spectrum in spectra.items() if spectrum.spectral > 0}

    def tip(name: str) -> str:
        s = spectra[name]
        return f"effective rank {s.effective_rank:.2f} of r = {s.rank}, stable rank {s.stable_rank:.2f}"

    zeros = [name for name in spectra if name not in values]
    note = f"a cell: the mean of its modules, up to {grid.fullest}" if grid.fullest > 1 else ""
    return grid.heat(title, values, scale, numbers=numbers, gather=arithmetic_mean, tip=tip, zeros=zeros, note=note)


def energy_chart(spectra: Spectra, weights: Mapping[str, float]) -> LineChart:
    """Draw the share of Σσ² in the k leading directions of every module, with one line per kind.

    ``weights`` maps module names to their share of the energy: the kinds with the most energy have a line of their own.
    """
    kinds, place_of, _ = gather_kinds(spectra, weights)
    members: list[list[Spectrum]] = [[] for _ in kinds]
    for name, spectrum in spectra.items():
        members[place_of[kind(name)]].append(spectrum)
    lines = []
    for k, name in enumerate(kinds):
        if curve := energy_curve(members[k]):
            ink: Ink = ("series", k % SERIES)
            turn = k // SERIES
            lines.append(Line(fit_name(name), range(len(curve)), curve, ink, dashed=turn == 1, dotted=turn > 1))
    if len(lines) > 1:
        curve = energy_curve(list(spectra.values()))
        lines.append(Line("all modules", range(len(curve)), curve, ("quiet", 0), dashed=True))
    return line_chart(
        "", lines, "directions kept in every module", "share of energy", y_range=(0.0, 1.0),
        levels={"99 %": 0.99, "90 %": 0.9}, legend=True,
    )  # fmt: skip


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
    return ColourScale(0.0, max(tops, default=0.0) or 1.0, "share of the adapter's energy", form=".2%")


def energy_map(
    spectra: Spectra,
    shares: Mapping[str, float],
    grid: Grid,
    scale: ColourScale,
    numbers: Mapping[str, int] | None = None,
) -> HeatMap:
    """Draw shares of ‖ΔW‖² by kind and block. The mark of chance is the share of each module if all were equal."""
    even = 1 / max(len(spectra), 1)
    # A cell of several modules has a multiple of the even share, so there is not one level to mark.
    level = [even] if grid.fullest == 1 and even < scale.high else []
    colours = replace(scale, chance=level)

    def tip(name: str) -> str:
        return f"{percent(shares[name])} of the energy, ‖ΔW‖ {number(spectra[name].frobenius)}"

    # If the energy is 0, all cells stay empty, because a map of zeros would look like a map of equal shares.
    values = shares if any(shares.values()) else {}
    return grid.heat("", values, colours, numbers=numbers, gather=sum, tip=tip)
