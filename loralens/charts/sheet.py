"""Sheet: one adapter laid out for a figure, a row for each kind and a column for each block."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby, pairwise, takewhile
from math import ceil

import numpy as np

from loralens.analysis.spectrum import Spectrum
from loralens.charts.figure import fit
from loralens.core.names import Block, block, kind, natural_key

TICKS = 32  # labels that fit under the map
NAME = 28  # letters of a name on an axis
LETTER = 0.055  # width of a letter, inches
STEPS = (1, 2, 4, 5, 8, 10, 20, 40, 50, 100, 200, 400, 500, 1000)
WIDE = 16  # letters of the name of a block where room is scarce
PALEST = 0.93  # where the colours of blocks end: white paper swallows what comes behind it
OUTSIDE = "0.35"  # the grey of modules outside any block

Column = Block | str | None  # a block; a module where an adapter has no blocks; None: outside any block


@dataclass(frozen=True, slots=True)
class Sheet:
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
        """One colour a place."""
        return block_colours(self.places)

    @property
    def names(self) -> list[str]:
        """What the columns are called; of many blocks in several stacks only the first says its stack."""
        stacks = self.stacks
        many, first = len(self.columns) > TICKS, set(starts(self.columns))
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
        return stack_names(c.stack for c in self.columns if isinstance(c, Block))

    @property
    def headed(self) -> bool:
        """Whether there are several stacks, each wide enough on the map to stand under its name."""
        counts = [sum(isinstance(c, Block) and c.stack == stack for c in self.columns) for stack in self.stacks]
        room = [count * (width([self]) - 2) / len(self.columns) for count in counts]
        return len(room) > 1 and all(LETTER * len(n) < w for n, w in zip(self.stacks.values(), room, strict=True))

    @property
    def upright(self) -> bool:
        """Whether the names are too long to stand side by side under the map."""
        names = [self.names[j] for j in thin(self.columns, TICKS)]
        return not self.headed and LETTER * len(names) * (1 + max(map(len, names), default=0)) > width([self]) - 2

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
        """Of all modules."""
        return [one for members in self.cells.values() for one in members]

    def row(self, row: int) -> list[tuple[int, Sequence[Spectrum]]]:
        """Columns that hold modules of this row, with these modules."""
        return [(j, self.cells[row, j]) for j in range(len(self.columns)) if (row, j) in self.cells]


def lay_out(label: str, spectra: Mapping[str, Spectrum], blocks: Sequence[Block], limit: int) -> Sheet:
    """Lay out one adapter: blocks across, kinds down, at most ``limit`` rows."""
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
    return Sheet(label, rows, columns, cells, gathered if stacks else 0)


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


def commonest_kinds(names: Iterable[str], most: int) -> list[str]:
    """The kinds of these modules in natural order, at most ``most``: those of most modules."""
    counts = Counter(map(kind, names))
    return sorted(sorted(counts, key=lambda k: (-counts[k], natural_key(k)))[:most], key=natural_key)


def block_colours(count: int) -> list[tuple[float, ...]]:
    """A colour for each of so many blocks: viridis without its palest end."""
    from matplotlib import colormaps

    return [tuple(colour) for colour in colormaps["viridis"](np.linspace(0, PALEST, count))]


def block_names(columns: Sequence[Column]) -> list[str]:
    """What columns are called where room is scarce: a block by its number, with its stack where there are several."""
    stacks = stack_names(c.stack for c in columns if isinstance(c, Block))
    names = [_short(c, stacks) for c in columns]
    if len(set(names)) < len(names):
        names = [_short(c, _numbered(stacks)) for c in columns]
    return names


def _short(column: Column, stacks: Mapping[str, str]) -> str:
    if not isinstance(column, Block):
        return fit(column or "outside", WIDE)
    return fit(f"{stacks[column.stack]}.{column.number}", WIDE) if len(stacks) > 1 else str(column.number)


def stack_names(stacks: Iterable[str]) -> dict[str, str]:
    """Short names of stacks, each once and each different: without the path that all share."""
    paths = {stack: stack.split(".") for stack in stacks}
    levels = zip(*(path[:-1] for path in paths.values()), strict=False)
    common = len(list(takewhile(lambda level: len(set(level)) == 1, levels)))
    short = {stack: fit(".".join(path[common:]), NAME) for stack, path in paths.items()}
    return short if len(set(short.values())) == len(short) else _numbered(short)


def _numbered(names: Mapping[str, str]) -> dict[str, str]:
    """The names of stacks with a number before each, so that what shortens them leaves them different."""
    return {stack: f"({i}) {name}" for i, (stack, name) in enumerate(names.items(), start=1)}


def block_order(b: Block) -> tuple[object, int]:
    """The order of blocks: stacks in natural order, then numbers."""
    return natural_key(b.stack), b.number


def across(sheet: Sheet) -> int:
    """Panels side by side."""
    return ceil(len(sheet.rows) / ceil(len(sheet.rows) / 6)) if sheet.rows else 1


def width(sheets: Iterable[Sheet]) -> float:
    """Inches."""
    return max(min(max(2.1 * across(s) + 1, 0.17 * len(s.columns) + 2.5, 7), 13) for s in sheets)


def heights(sheet: Sheet) -> tuple[float, float]:
    """Inches of the panels and of the map."""
    if not sheet.cells:
        return 0.5, 0.1
    names = LETTER * max(map(len, sheet.names)) if sheet.upright else 0.2
    return 0.8 + 1.6 * ceil(len(sheet.rows) / across(sheet)), 0.9 + names + 0.22 * max(3, len(sheet.rows))


def height(sheet: Sheet) -> float:
    """Inches of the whole band."""
    return sum(heights(sheet))


def starts(columns: Sequence[Column]) -> list[int]:
    """Where a stack of blocks begins, and the modules outside any block."""
    groups = [list(group) for _, group in groupby(columns, lambda c: c.stack if isinstance(c, Block) else type(c))]
    return [0, *accumulate(map(len, groups[:-1]))]


def stride(count: int, most: int) -> int:
    """The first of `STEPS` by which ``count`` things are thinned to at most ``most``; the largest where none does."""
    return next((step for step in STEPS if count <= step * most), STEPS[-1])


def thin(columns: Sequence[Column], most: int) -> list[int]:
    """Columns to label, about ``most``: the first of every stack, and every second, fourth, fifth … after it."""
    count, firsts = len(columns), starts(columns)
    step = stride(count, most)
    if len(firsts) > most:
        return list(range(0, count, step))
    return [
        j
        for start, stop in pairwise([*firsts, count])
        for j in range(start, stop, step)
        if j == start or stop == count or stop - j >= step
    ]
