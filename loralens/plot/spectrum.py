"""Spectra drawn kind by kind, over a map of the effective rank of every block and kind."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise, takewhile
from math import ceil
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from loralens.analysis.spectrum import Spectrum
from loralens.core.lazy import Array
from loralens.core.names import Block, block, kind, natural_key
from loralens.errors import OptionError
from loralens.plot.figure import fit, settle, styled

PANELS = 24  # of one figure
ADAPTERS = 12  # of one figure
LINES = 256  # of one panel; beyond, one mean line a block
TICKS = 32  # labels that fit under the map
NAME = 28  # letters of a name on an axis
LETTER = 0.055  # width of a letter, inches
STEPS = (1, 2, 4, 5, 8, 10, 20, 40, 50, 100, 200, 400, 500, 1000)

OUTSIDE = "0.35"  # the grey of modules outside any block
ZERO = "#0072B2"  # a blue that the map has not, to colour-blind eyes either

GOLDEN = 0.618  # multiples of it mix evenly, so late blocks do not hide early ones
NOTE: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}

Limits = tuple[float, float] | None
Column = Block | str | None  # a block; a module where an adapter has no blocks; None: outside any block


@dataclass(frozen=True, slots=True)
class _Sheet:
    """One adapter laid out: a row for each kind, a column for each block, and the modules of every cell."""

    label: str
    rows: Sequence[str]
    columns: Sequence[Column]
    cells: Mapping[tuple[int, int], Sequence[Spectrum]]
    gathered: int  # kinds that share the last row

    @property
    def places(self) -> int:
        """Columns with a colour of their own: all but the one outside any block."""
        return sum(column is not None for column in self.columns)

    @property
    def colours(self) -> list[tuple[float, ...]]:
        """One colour a place: viridis without its palest end, which white paper swallows."""
        return [tuple(colour) for colour in colormaps["viridis"](np.linspace(0, 0.93, self.places))]

    @property
    def names(self) -> list[str]:
        """What the columns are called; of many blocks in several stacks only the first says its stack."""
        stacks = self.stacks
        many, first = len(self.columns) > TICKS, set(_starts(self.columns))
        return [
            fit(c or "outside", NAME)
            if not isinstance(c, Block)
            else f"{stacks[c.stack]}.{c.number}"
            if len(stacks) > 1 and (j in first or not many)
            else str(c.number)
            for j, c in enumerate(self.columns)
        ]

    @property
    def stacks(self) -> dict[str, str]:
        """The stacks of blocks, and their short names."""
        return _short(dict.fromkeys(c.stack for c in self.columns if isinstance(c, Block)))

    @property
    def headed(self) -> bool:
        """Whether there are several stacks, each wide enough on the map to stand under its name."""
        counts = [sum(isinstance(c, Block) and c.stack == stack for c in self.columns) for stack in self.stacks]
        room = [count * (_width([self]) - 2) / len(self.columns) for count in counts]
        return len(room) > 1 and all(LETTER * len(n) < w for n, w in zip(self.stacks.values(), room, strict=True))

    @property
    def upright(self) -> bool:
        """Whether the names are too long to stand side by side under the map."""
        names = [self.names[j] for j in _thin(self.columns, TICKS)]
        return not self.headed and LETTER * len(names) * (1 + max(map(len, names), default=0)) > _width([self]) - 2

    @property
    def noun(self) -> str:
        """What a column is."""
        if any(isinstance(c, str) for c in self.columns):
            return "module"
        return f"block of {fit(next(iter(self.stacks)), NAME)}" if len(self.stacks) == 1 else "block"

    @property
    def flat(self) -> bool:
        """Whether no module has a second direction."""
        return all(one.s.size < 2 for one in self.spectra)

    @property
    def spectra(self) -> list[Spectrum]:
        return [one for members in self.cells.values() for one in members]

    def row(self, row: int) -> list[tuple[int, Sequence[Spectrum]]]:
        """Columns that hold modules of this row, with these modules."""
        return [(j, self.cells[row, j]) for j in range(len(self.columns)) if (row, j) in self.cells]


def spectrum_figure(spectra: Mapping[str, Mapping[str, Spectrum]]) -> Figure:
    """The spectra of one or more adapters by kind, and the effective rank of every block and kind.

    One band an adapter. Above: a panel for each kind, σᵢ against i, a line for each module in the colour of its
    block; a line ends where σᵢ is zero to rounding. Below: the effective rank, a row for each kind and a column for
    each block, as the mean over the non-zero modules of the cell. All bands share the limits of σ and the colours.

    Parameters
    ----------
    spectra : mapping of str to mapping of str to Spectrum
        Label of the adapter → module name → Spectrum. Labels and names are shown as they are, long ones without
        their middle.

    Returns
    -------
    Figure
        At most 24 panels and 12 adapters. The kinds of least energy share a panel where there are more; the titles
        say so. A panel of more than 256 modules shows the mean σᵢ of every block instead.

    Raises
    ------
    OptionError
        No adapter.
    """
    if not spectra:
        raise OptionError("no adapter to draw", fix="give at least one")
    shown = dict(list(spectra.items())[:ADAPTERS])
    blocks = sorted({b for names in shown.values() for name in names if (b := block(name))}, key=_order)
    sheets = [_sheet(label, one, blocks, max(1, PANELS // len(shown))) for label, one in shown.items()]
    with styled():
        figure = Figure(figsize=(_width(sheets), sum(map(_height, sheets))), layout="constrained")
        bands = figure.subfigures(len(sheets), 1, squeeze=False, height_ratios=[_height(s) for s in sheets])[:, 0]
        limits, colours = _limits(sheets), _scale(sheets)
        for band, sheet in zip(bands, sheets, strict=True):
            _draw(band, sheet, limits, colours)
        if len(shown) < len(spectra):
            figure.suptitle(f"{len(shown)} of {len(spectra)} adapters; {len(spectra) - len(shown)} left out")
    return settle(figure)


def _sheet(label: str, spectra: Mapping[str, Spectrum], blocks: Sequence[Block], limit: int) -> _Sheet:
    home = {name: block(name) for name in spectra}
    stacks = {b.stack for b in home.values() if b}
    columns: list[Column] = [b for b in blocks if b.stack in stacks]
    if columns and None in home.values():
        columns.append(None)
    if not columns:
        columns = [*spectra]
    rows, row_of, gathered = _rows(spectra, limit if stacks else 1)
    cells: dict[tuple[int, int], list[Spectrum]] = {}
    for name, one in spectra.items():
        column = columns.index(home[name] if stacks else name)
        cells.setdefault((row_of[kind(name)], column), []).append(one)
    return _Sheet(label, rows, columns, cells, gathered if stacks else 0)


def _rows(spectra: Mapping[str, Spectrum], limit: int) -> tuple[list[str], dict[str, int], int]:
    """The names of at most ``limit`` rows, the row of every kind, and how many kinds share the last row."""
    energy: dict[str, float] = {}
    for name, one in spectra.items():
        energy[kind(name)] = energy.get(kind(name), 0.0) + one.frobenius**2
    kinds = sorted(energy, key=natural_key)
    own = (
        kinds if len(kinds) <= limit else sorted(sorted(kinds, key=lambda k: -energy[k])[: limit - 1], key=natural_key)
    )
    others = len(kinds) - len(own)
    rows = [*own, *([f"{others} other kinds" if own else "all modules"] if others else [])]
    return rows, {k: own.index(k) if k in own else len(own) for k in kinds}, others


def _short(stacks: Iterable[str]) -> dict[str, str]:
    """Short names of stacks, each different: without the path that all share."""
    paths = {stack: stack.split(".") for stack in stacks}
    levels = zip(*(path[:-1] for path in paths.values()), strict=False)
    common = len(list(takewhile(lambda level: len(set(level)) == 1, levels)))
    short = {stack: fit(".".join(path[common:]), NAME) for stack, path in paths.items()}
    if len(set(short.values())) == len(short):
        return short
    return {stack: f"({i}) {name}" for i, (stack, name) in enumerate(short.items(), start=1)}


def _order(b: Block) -> tuple[object, int]:
    return natural_key(b.stack), b.number


def _across(sheet: _Sheet) -> int:
    """Panels side by side."""
    return ceil(len(sheet.rows) / ceil(len(sheet.rows) / 6)) if sheet.rows else 1


def _width(sheets: Iterable[_Sheet]) -> float:
    """Inches."""
    return max(min(max(2.1 * _across(s) + 1, 0.17 * len(s.columns) + 2.5, 7), 13) for s in sheets)


def _heights(sheet: _Sheet) -> tuple[float, float]:
    """Inches of the panels and of the map."""
    if not sheet.cells:
        return 0.5, 0.1
    names = LETTER * max(map(len, sheet.names)) if sheet.upright else 0.2
    return 0.8 + 1.6 * ceil(len(sheet.rows) / _across(sheet)), 0.9 + names + 0.22 * max(3, len(sheet.rows))


def _height(sheet: _Sheet) -> float:
    return sum(_heights(sheet))


def _limits(sheets: Iterable[_Sheet]) -> Limits:
    """Limits of σ: a little more than all that is not zero to rounding; None where all is."""
    drawn = [s for sheet in sheets for one in sheet.spectra if (s := _solid(one)).size]
    if not drawn:
        return None
    low, high = min(float(s[-1]) for s in drawn), max(float(s[0]) for s in drawn)
    margin = max((high / low) ** 0.05, 1.2)
    return low / margin, high * margin


def _scale(sheets: Sequence[_Sheet]) -> tuple[float, float]:
    """The effective ranks that the colours span: those that occur, and no less than a quarter of the nominal rank."""
    top = max((one.rank for sheet in sheets for one in sheet.spectra), default=1)
    values = [value for sheet in sheets for value in _effective(sheet)[0].compressed()] or [1.0, top]
    low, high = min(values), max(values)
    margin = max(0.0, max(top / 4, 1) - (high - low)) / 2
    return float(max(low - margin, 1)), float(high + margin)


def _nominal(sheet: _Sheet) -> str:
    ranks = sorted({one.rank for one in sheet.spectra})
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def _solid(one: Spectrum) -> Array:
    """The singular values that are not zero to rounding."""
    return one.s[: one.numerical_rank]


def _draw(band: SubFigure, sheet: _Sheet, limits: Limits, colours: tuple[float, float]) -> None:
    """One adapter: its panels over its map."""
    top, bottom = band.subfigures(2, 1, squeeze=False, height_ratios=_heights(sheet))[:, 0]
    top.suptitle(_title(sheet), parse_math=False)
    if not sheet.spectra:
        return
    _panels(top, sheet, limits)
    _map(bottom, sheet, colours)


def _title(sheet: _Sheet) -> str:
    if not sheet.cells:
        return f"{fit(sheet.label, 80)}\nno modules"
    kinds = len(sheet.rows) - 1 + sheet.gathered
    note = f"\n{sheet.gathered} of {kinds} kinds, those of least energy, share a panel" if sheet.gathered else ""
    return fit(sheet.label, 80) + note


def _panels(part: SubFigure, sheet: _Sheet, limits: Limits) -> None:
    """A panel for each kind, with one bar for the colours of all."""
    across, grid = _across(sheet), part.add_gridspec(ceil(len(sheet.rows) / _across(sheet)), _across(sheet))
    panels: list[Axes] = []
    for row, name in enumerate(sheet.rows):
        first = panels[0] if panels else None
        axes = part.add_subplot(grid[row // across, row % across], sharex=first, sharey=first)
        _lines(axes, sheet, row)
        axes.set_title(fit(name, 30), parse_math=False)
        axes.tick_params(which="both", labelleft=row % across == 0, labelbottom=row + across >= len(sheet.rows))
        panels.append(axes)
    panels[0].set(yscale="log", ylim=limits or (0.1, 1))
    if not limits:
        panels[0].set_yticks([])
        panels[0].minorticks_off()
    _directions(part, panels[0], sheet)
    part.supylabel("singular value σᵢ of ΔW", fontsize="medium")
    if sheet.places > 1:
        _block_bar(part, panels, sheet)


def _directions(part: SubFigure, axes: Axes, sheet: _Sheet) -> None:
    """The x axis that all panels share: i, or the place of the block where there is one direction only."""
    if sheet.flat:
        axes.set(xticks=[], xlim=(-0.5, len(sheet.columns) - 0.5))
        part.supxlabel("block, in the order of the map (one direction a module)", fontsize="medium")
        return
    most = max(one.s.size for one in sheet.spectra)
    axes.set(xlim=(1 - 0.04 * most, 1.04 * most), xticks=_counts(most))
    ends = any(one.numerical_rank < one.s.size for one in sheet.spectra if one.spectral > 0)
    note = " (a line ends where σᵢ is zero to rounding)" if ends else ""
    part.supxlabel(f"direction i{note}", fontsize="medium")


def _lines(axes: Axes, sheet: _Sheet, row: int) -> None:
    """The spectra of one kind, and in words what they do not show."""
    cells, colours = sheet.row(row), sheet.colours
    modules = [one for _, members in cells for one in members]
    many, zero = len(modules) > LINES, sum(one.spectral == 0 for one in modules)
    for column, members in cells:
        outside = sheet.columns[column] is None
        for s in [_mean(members)] if many else map(_solid, members):
            axes.plot(
                [column] if sheet.flat else np.arange(1, s.size + 1),
                s,
                color=OUTSIDE if outside else colours[column],
                linestyle="--" if outside else "-",
                linewidth=0.8 if len(modules) <= 40 else 0.5,
                marker="." if s.size <= 8 else "",
                markersize=3,
                zorder=2 + column * GOLDEN % 1,
            )
    notes = [
        *(["grey: outside any block"] if zero < len(modules) and sheet.columns[cells[-1][0]] is None else []),
        *(["mean of each block's modules"] if many else []),
        *([f"{zero} of {len(modules)} modules are zero" if zero < len(modules) else "all zero"] if zero else []),
    ]
    axes.text(0.04, 0.05, "\n".join(notes), transform=axes.transAxes, fontsize=6.5, va="bottom", bbox=NOTE)


def _mean(members: Sequence[Spectrum]) -> Array:
    """Mean σᵢ of the non-zero modules, one that is too short counted as zero."""
    solid = [s for one in members if (s := _solid(one)).size]
    total = np.zeros(max((s.size for s in solid), default=0))
    for s in solid:
        total[: s.size] += s
    return total / max(len(solid), 1)


def _block_bar(part: SubFigure, panels: Sequence[Axes], sheet: _Sheet) -> None:
    count = sheet.places
    scale = ScalarMappable(BoundaryNorm(np.arange(count + 1) - 0.5, count), ListedColormap(sheet.colours))
    aspect = 20 * ceil(len(sheet.rows) / _across(sheet))
    bar = part.colorbar(scale, ax=panels, label=sheet.noun, aspect=aspect, pad=0.01)
    bar.ax.yaxis.label.set_parse_math(False)
    ticks = _thin(sheet.columns[:count], 8)
    bar.set_ticks(ticks, labels=[sheet.names[j] for j in ticks], parse_math=False)
    bar.ax.minorticks_off()


def _map(part: SubFigure, sheet: _Sheet, colours: tuple[float, float]) -> None:
    """Effective rank, mean over the non-zero modules of a cell, kinds down and blocks across."""
    axes = part.add_subplot()
    values, zero = _effective(sheet)
    axes.patch.set(facecolor="0.93", hatch="////", edgecolor="0.8", linewidth=0)
    mesh = axes.pcolormesh(values, cmap="magma", vmin=colours[0], vmax=colours[1], edgecolors="white", linewidth=0.4)
    axes.pcolormesh(zero, cmap=ListedColormap(["white"]), edgecolors="white", linewidth=0.4)
    y, x = np.nonzero(~zero.mask)
    axes.plot(x + 0.5, y + 0.5, linestyle="none", marker="x", markersize=4, color=ZERO)
    _map_axes(axes, sheet)
    label = f"effective rank\n(of nominal r = {_nominal(sheet)})"
    part.colorbar(mesh, ax=axes, label=label, pad=0.01, fraction=0.05, aspect=max(7, 1.5 * len(sheet.rows)))
    handles = [
        *([Patch(facecolor="0.93", hatch="////", edgecolor="0.8", label="no module")] if _holes(sheet) else []),
        *([Line2D([], [], linestyle="none", marker="x", color=ZERO, label="ΔW = 0")] if x.size else []),
    ]
    if handles:
        part.legend(handles=handles, loc="outside lower right", ncols=2, frameon=False, fontsize=7)


def _map_axes(axes: Axes, sheet: _Sheet) -> None:
    """Name the rows, the columns and the stacks of the map."""
    ticks, most = _thin(sheet.columns, TICKS), max(map(len, sheet.cells.values()))
    names = [
        str(c.number) if sheet.headed and isinstance(c := sheet.columns[j], Block) else sheet.names[j] for j in ticks
    ]
    axes.set_xticks(np.array(ticks) + 0.5, names, rotation=90 if sheet.upright else 0, parse_math=False)
    axes.set_yticks(np.arange(len(sheet.rows)) + 0.5, [fit(row, NAME) for row in sheet.rows], parse_math=False)
    axes.set(xlim=(0, len(sheet.columns)), ylim=(len(sheet.rows), 0))
    mean = f" (a cell is the mean of its non-zero modules, of up to {most})" if most > 1 else ""
    axes.set_xlabel(sheet.noun + mean, parse_math=False)
    axes.tick_params(length=2)
    edges = [*_starts(sheet.columns), len(sheet.columns)]
    for start, stop in pairwise(edges):
        axes.axvline(start, color="black", linewidth=0.8)
        first = sheet.columns[start]
        if sheet.headed and isinstance(first, Block):
            name = sheet.stacks[first.stack]
            axes.text((start + stop) / 2, -0.1, name, ha="center", va="bottom", fontsize=7, parse_math=False)


def _effective(sheet: _Sheet) -> tuple[np.ma.MaskedArray, np.ma.MaskedArray]:
    """The value of every cell, masked where it holds none, and the cells that are zero."""
    shape = len(sheet.rows), len(sheet.columns)
    values, zero = (np.ma.masked_invalid(np.full(shape, np.nan)) for _ in range(2))
    for cell, members in sheet.cells.items():
        alive = [one.effective_rank for one in members if one.spectral > 0]
        (values if alive else zero)[cell] = sum(alive) / max(len(alive), 1)
    return values, zero


def _holes(sheet: _Sheet) -> bool:
    return len(sheet.cells) < len(sheet.rows) * len(sheet.columns)


def _starts(columns: Sequence[Column]) -> list[int]:
    """Where a stack of blocks begins, and the modules outside any block."""
    groups = [list(group) for _, group in groupby(columns, lambda c: c.stack if isinstance(c, Block) else type(c))]
    return [0, *accumulate(map(len, groups[:-1]))]


def _thin(columns: Sequence[Column], most: int) -> list[int]:
    """Columns to label, about ``most``: the first of every stack, and every second, fourth, fifth … after it."""
    count, starts = len(columns), _starts(columns)
    step = next(step for step in STEPS if count <= step * most or step == STEPS[-1])
    if len(starts) > most:
        return list(range(0, count, step))
    return [
        j
        for start, stop in pairwise([*starts, count])
        for j in range(start, stop, step)
        if j == start or stop == count or stop - j >= step
    ]


def _counts(most: int) -> list[int]:
    """Round numbers from 1 to ``most`` for an axis, about five."""
    step = next((2**k for k in range(32) if most <= 4 * 2**k), most)
    return sorted({1, *range(step, most + 1, step)})
