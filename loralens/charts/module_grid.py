"""Arranges modules for a figure: one row per kind, one column per block."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby
from math import isfinite
from os.path import commonprefix
from typing import final

import numpy as np

from loralens.charts.palette import block_ink
from loralens.charts.spec import ColourScale, HeatMap, Ramp
from loralens.core.names import Block, block, kind, natural_key

NAME = 28  # letters of a name next to a chart
# Factors by which labels are thinned: round ones, so that the labels that stay are numbers that a reader expects.
STEPS = (1, 2, 4, 5, 8, 10, 20, 40, 50, 100, 200, 400, 500, 1000)
KINDS = 24  # rows of a map; where there are more kinds, those of least weight share the last row
LABELS = 32  # columns of a map that have a label: more would overlap

Column = Block | str | None  # a block; a module where an adapter has no blocks; None: outside any block


def fit_name(name: str, width: int = NAME) -> str:
    """Return a name on one line of at most ``width`` characters; '…' replaces the middle of a longer one."""
    # Names of files may hold bytes that are not UTF-8, which cannot be drawn: they become question marks.
    name = " ".join(name.encode("utf-8", "replace").decode().split())
    if len(name) <= width:
        return name
    # The middle, as the beginning says which block a module is in and the end which projection it is.
    tail = (width - 1) // 2
    return f"{name[: width - 1 - tail]}…{name[len(name) - tail :]}"


def thin(labels: Sequence[str], most: int) -> list[str]:
    """Return the labels of which about ``most`` stay, evenly spaced; the others become empty."""
    step = next((step for step in STEPS if len(labels) <= step * most), STEPS[-1])
    return [label if i % step == 0 else "" for i, label in enumerate(labels)]


def all_blocks(names: Iterable[str]) -> list[Block]:
    """Return the blocks of these modules: stacks in natural order, then block numbers."""
    return sorted({home for name in names if (home := block(name))}, key=lambda b: (natural_key(b.stack), b.number))


def column_names(columns: Sequence[Column]) -> list[str]:
    """Return the names of columns: a block by its number, after its stack where there are several stacks."""
    stacks = {column.stack: column.stack.split(".") for column in columns if isinstance(column, Block)}
    # Without the path that all stacks begin or end with, but something of every name is left.
    head = len(commonprefix([path[:-1] for path in stacks.values()]) or ())  # noqa: RUF071  # of lists
    tail = len(commonprefix([path[:head:-1] for path in stacks.values()]) or ())  # noqa: RUF071
    short = {stack: fit_name(".".join(path[head : len(path) - tail])) for stack, path in stacks.items()}

    def name(column: Column) -> str:
        if not isinstance(column, Block):
            return fit_name(column or "outside")
        return f"{short[column.stack]}.{column.number}" if len(short) > 1 else str(column.number)

    return list(map(name, columns))


def gather_kinds(
    names: Iterable[str], weights: Mapping[str, float] | None = None, most: int = KINDS
) -> tuple[list[str], dict[str, int]]:
    """Return the names of at most ``most`` rows, and the row of every kind.

    If there are more kinds than rows, the heaviest have a row of their own, and the others share the last.
    """
    weight: defaultdict[str, float] = defaultdict(float)
    for name in names:
        weight[kind(name)] += (weights or {}).get(name, 1.0)
    # Ties are broken by name, so that the same adapter always gives the same figure.
    heaviest = sorted(weight, key=lambda k: (-weight[k], natural_key(k)))
    own = sorted(heaviest if len(weight) <= most else heaviest[: most - 1], key=natural_key)
    sharing = len(weight) - len(own)
    together = [f"{sharing} other kinds" if own else "all modules"] if sharing else []
    return [*own, *together], {k: own.index(k) if k in own else len(own) for k in weight}


@final
@dataclass(frozen=True)
class Grid:
    """Modules by kind and block.

    Attributes
    ----------
    kinds : sequence of str
        The names of the rows.
    blocks : sequence of Block, str or None
        The columns; None stands for modules outside any block. Where no module is in a block, every module has a column
        of its own, in one row.
    cells : mapping of (int, int) to sequence of str
        (row, column) → names of its modules.
    """

    kinds: Sequence[str]
    blocks: Sequence[Column]
    cells: Mapping[tuple[int, int], Sequence[str]]

    @classmethod
    def of(
        cls,
        names: Iterable[str],
        weights: Mapping[str, float] | None = None,
        *,
        most: int = KINDS,
        blocks: Sequence[Block] | None = None,
    ) -> "Grid":
        """Arrange modules in a grid of at most ``most`` rows, as in `gather_kinds`.

        ``blocks`` are those of all adapters that stand side by side, so that a block has one place and one colour in
        all of them. By default they are the blocks of these modules.
        """
        names = list(names)
        homes = {name: block(name) for name in names}
        stacks = {home.stack for home in homes.values() if home}
        # Without blocks every module has a column, as one row per kind would be a diagonal.
        if not stacks:
            flat = {(0, j): [name] for j, name in enumerate(names)}
            return cls(["all modules"] if len(names) > 1 else [kind(name) for name in names], names, flat)
        kinds, row = gather_kinds(names, weights, most)
        places = all_blocks(names) if blocks is None else blocks
        columns: list[Column] = [place for place in places if place.stack in stacks]
        columns += [None] if None in homes.values() else []
        place_of = {column: j for j, column in enumerate(columns)}
        cells: dict[tuple[int, int], list[str]] = {}
        for name in names:
            cells.setdefault((row[kind(name)], place_of[homes[name]]), []).append(name)
        return cls(kinds, columns, cells)

    def row(self, row: int) -> list[tuple[int, Sequence[str]]]:
        """Return the columns in which this row has modules, each with these modules."""
        return [(j, self.cells[row, j]) for j in range(len(self.blocks)) if (row, j) in self.cells]

    @cached_property
    def columns(self) -> list[str]:
        """The names of the columns, see `column_names`."""
        return column_names(self.blocks)

    @cached_property
    def starts(self) -> list[int]:
        """The columns at which a stack of blocks, or the modules outside any block, begin."""
        groups = groupby(self.blocks, lambda c: c.stack if isinstance(c, Block) else type(c))
        sizes = [len(list(group)) for _, group in groups]
        return [0, *accumulate(sizes)][:-1]

    @cached_property
    def labels(self) -> list[str]:
        """The names of the columns, or their numbers where the column before is of the same stack; thinned to fit."""
        short = [
            str(column.number) if isinstance(column, Block) and j not in self.starts else self.columns[j]
            for j, column in enumerate(self.blocks)
        ]
        return thin(short, LABELS)

    @property
    def across(self) -> str:
        """One or two words that say what the columns are."""
        stacks = {column.stack for column in self.blocks if isinstance(column, Block)}
        if not stacks:
            return "module" if len(self.blocks) > 1 else ""
        return f"block of {fit_name(min(stacks))}" if len(stacks) == 1 else "block"

    def ink(self, column: int) -> str:
        """Return the colour of the lines of a column."""
        return "quiet" if self.blocks[column] is None else block_ink(column, self._places)

    @cached_property
    def _places(self) -> int:
        """The number of columns without that of modules outside any block."""
        return sum(block is not None for block in self.blocks)

    @property
    def ramp(self) -> list[Ramp]:
        """The colour key of the columns; empty if there is only one."""
        named = [name for name, column in zip(self.columns, self.blocks, strict=True) if column is not None]
        return [Ramp(self.across or "block", named[0], named[-1])] if len(named) > 1 else []

    @property
    def fullest(self) -> int:
        """The largest number of modules in a cell."""
        return max(map(len, self.cells.values()), default=0)

    def heat(
        self,
        title: str,
        values: Mapping[str, float],
        scale: ColourScale,
        *,
        gather: Callable[[Sequence[float]], float],
        tip: Callable[[str], str] | None = None,
        zeros: Iterable[str] = (),
        note: str = "",
    ) -> HeatMap:
        """Draw a map of one value per module.

        A cell without a finite value is dotted, or crossed if ``zeros`` holds all of its modules.

        Parameters
        ----------
        title : str
        values : mapping of str to float
            Module name → its value.
        scale : ColourScale
        gather : callable
            Makes one value of those of a cell with several modules.
        tip : callable, optional
            Module name → the text to be shown after the name on hovering over the cell of this module alone.
        zeros : iterable of str
            The modules in which ΔW is 0.
        note : str
            What a cell of several modules shows.
        """
        table, tips = np.full((len(self.kinds), len(self.blocks)), np.nan), {}
        zero, crosses = set(zeros), []
        for place, names in self.cells.items():
            members = [name for name in names if isfinite(values.get(name, np.nan))]
            if not members:
                crosses += [place] if zero.issuperset(names) else []
                continue
            table[place] = value = gather([values[name] for name in members])
            alone = len(members) == 1
            name = members[0] if alone else f"{len(members)} modules together"
            tips[place] = (name, tip(name) if alone and tip else scale.words(value))
        dotted = len(tips) + len(crosses) < table.size
        # What the columns are, and a legend of the two marks, for readers who see a map for the first time.
        remarks = [note if self.fullest > 1 else "", "dotted: none" if dotted else "", "×: ΔW = 0" if crosses else ""]
        return HeatMap(
            title, [fit_name(name) for name in self.kinds], self.labels, table, scale, tips, zeros=crosses,
            column_edges=self.starts[1:], note="\n".join(filter(None, [self.across, "; ".join(filter(None, remarks))])),
        )  # fmt: skip
