"""Arranges modules for a figure: one row per kind, one column per block."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, groupby, pairwise, takewhile
from math import isfinite
from typing import final

from loralens.charts.palette import block_ink
from loralens.charts.spec import Cell, ColourScale, HeatMap, Ink, Ramp
from loralens.core.names import Block, block, kind, natural_key

NAME = 28  # letters of a name next to a chart
SHORT = 16  # letters of a name where there is less room: in a title after the kind, or as a column
# Factors by which labels are thinned: round ones, so that the labels that stay are numbers that a reader expects.
STEPS = (1, 2, 4, 5, 8, 10, 20, 40, 50, 100, 200, 400, 500, 1000)

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


def block_order(block: Block) -> tuple[object, int]:
    """Return the sorting key of a block: stacks in natural order, then block numbers."""
    return natural_key(block.stack), block.number


def commonest_kinds(names: Iterable[str], most: int) -> list[str]:
    """Return the ``most`` kinds with the largest number of modules, in natural order."""
    counts = Counter(map(kind, names))
    # Ties are broken by name, so that the same adapter always gives the same figure.
    return sorted(sorted(counts, key=lambda k: (-counts[k], natural_key(k)))[:most], key=natural_key)


def stack_names(stacks: Iterable[str]) -> dict[str, str]:
    """Return stack → its short name, without the path that all stacks share; all short names differ."""
    paths = {stack: stack.split(".") for stack in stacks}
    # Without the last part, so that something of every name is left.
    levels = zip(*(path[:-1] for path in paths.values()), strict=False)
    common = len(list(takewhile(lambda level: len(set(level)) == 1, levels)))
    short = {stack: fit_name(".".join(path[common:])) for stack, path in paths.items()}
    return short if len(set(short.values())) == len(short) else _number_stacks(short)


def _number_stacks(names: Mapping[str, str]) -> dict[str, str]:
    """The names with a number before each, so that they still differ when they are shortened."""
    return {stack: f"({i}) {name}" for i, (stack, name) in enumerate(names.items(), start=1)}


def block_names(columns: Sequence[Column]) -> list[str]:
    """Return short names of columns, as in the title of a heat map; all of them differ."""
    stacks = stack_names(c.stack for c in columns if isinstance(c, Block))
    names = [fit_name(column_name(c, stacks, SHORT), SHORT) for c in columns]
    if len(set(names)) == len(names):
        return names
    return [fit_name(column_name(c, _number_stacks(stacks), SHORT), SHORT) for c in columns]


def column_name(column: Column, stacks: Mapping[str, str], width: int = NAME) -> str:
    """Return the name of a column: a block by its number, after the name of its stack where there are several stacks.

    Parameters
    ----------
    column : Block, str or None
    stacks : mapping of str to str
        Stack → its short name.
    width : int
        The number of letters to which the name of a module is shortened.
    """
    if not isinstance(column, Block):
        return fit_name(column or "outside", width)
    return f"{stacks[column.stack]}.{column.number}" if len(stacks) > 1 else str(column.number)


def stack_starts(columns: Sequence[Column]) -> list[int]:
    """Return the columns at which a stack of blocks, or the modules outside any block, begin."""
    groups = [list(group) for _, group in groupby(columns, lambda c: c.stack if isinstance(c, Block) else type(c))]
    return [0, *accumulate(map(len, groups[:-1]))] if groups else []


def stride(count: int, most: int) -> int:
    """Return the first of `STEPS` that thins ``count`` labels to at most ``most``, or the last where none does."""
    return next((step for step in STEPS if count <= step * most), STEPS[-1])


def columns_to_label(columns: Sequence[Column], most: int) -> list[int]:
    """Return about ``most`` columns to label: the first of every stack, and after it every second, fourth, fifth …"""
    count, firsts = len(columns), stack_starts(columns)
    step = stride(count, most)
    # Where there are more stacks than labels, stacks are thinned like blocks.
    if len(firsts) > most:
        return list(range(0, count, step))
    return [
        j
        for start, stop in pairwise([*firsts, count])
        for j in range(start, stop, step)
        # A label close before the next stack would touch the label of that stack.
        if j == start or stop == count or stop - j >= step
    ]


KINDS = 24  # rows of a map; where there are more kinds, those of least weight share the last row
LABELS = 32  # columns of a map that have a label: more would overlap
KEY = 8  # names next to the colours of blocks
HEAD = 0.5  # width of a letter of a stack's name above a map, in columns: 5.9 of 18 pixels, and some margin


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
    gathered : int
        The number of kinds that share the last row.
    """

    kinds: Sequence[str]
    blocks: Sequence[Column]
    cells: Mapping[tuple[int, int], Sequence[str]]
    gathered: int = 0

    @classmethod
    def of(
        cls,
        names: Iterable[str],
        weights: Mapping[str, float] | None = None,
        *,
        most: int = KINDS,
        blocks: Sequence[Block] | None = None,
    ) -> "Grid":
        """Arrange modules in a grid.

        Parameters
        ----------
        names : iterable of str
        weights : mapping of str to float, optional
            The weights of the modules, by default 1. Of more than ``most`` kinds, those of least weight share the last
            row.
        most : int
        blocks : sequence of Block, optional
            The blocks of all adapters that stand side by side, so that a block has one place and one colour in all of
            them. By default the blocks of these modules.
        """
        names = list(names)
        homes = {name: block(name) for name in names}
        stacks = {home.stack for home in homes.values() if home}
        # Without blocks every module has a column, as one row per kind would be a diagonal.
        if not stacks:
            flat = {(0, j): [name] for j, name in enumerate(names)}
            return cls(["all modules"] if len(names) > 1 else [kind(name) for name in names], names, flat)
        kinds, row, sharing = gather_kinds(names, weights, most)
        places = sorted({home for home in homes.values() if home} if blocks is None else blocks, key=block_order)
        columns: list[Column] = [place for place in places if place.stack in stacks]
        columns += [None] if None in homes.values() else []
        place_of = {column: j for j, column in enumerate(columns)}
        cells: dict[tuple[int, int], list[str]] = {}
        for name in names:
            cells.setdefault((row[kind(name)], place_of[homes[name]]), []).append(name)
        return cls(kinds, columns, cells, sharing)

    def row(self, row: int) -> list[tuple[int, Sequence[str]]]:
        """Return the columns in which this row has modules, each with these modules."""
        return [(j, self.cells[row, j]) for j in range(len(self.blocks)) if (row, j) in self.cells]

    @cached_property
    def columns(self) -> list[str]:
        """The names of the columns, as `loralens.charts.grid.column_name` gives them."""
        return [column_name(column, self.stacks) for column in self.blocks]

    @cached_property
    def labels(self) -> list[str]:
        """The labels of the columns, of which as many as fit are not empty."""
        labels, firsts = [""] * len(self.blocks), stack_starts(self.blocks)
        many = len(self.blocks) > LABELS
        for j in columns_to_label(self.blocks, LABELS):
            column = self.blocks[j]
            # The stack is named once: above the map, or at its first block if there is no room above.
            if isinstance(column, Block) and (self.heads or (many and j not in firsts)):
                labels[j] = str(column.number)
            else:
                labels[j] = fit_name(self.columns[j])
        return labels

    @cached_property
    def heads(self) -> list[tuple[int, int, str]]:
        """The first column, end and name of each stack, if there are several and all are as wide as their names."""
        stacks = self.stacks
        spans = [
            (start, stop, stacks[first.stack])
            for start, stop in pairwise([*stack_starts(self.blocks), len(self.blocks)])
            if isinstance(first := self.blocks[start], Block)
        ]
        wide = all(HEAD * len(name) + 1 <= stop - start for start, stop, name in spans)
        return spans if len(stacks) > 1 and wide else []

    @cached_property
    def stacks(self) -> dict[str, str]:
        """Stack → its short name."""
        return stack_names(column.stack for column in self.blocks if isinstance(column, Block))

    @property
    def across(self) -> str:
        """One or two words that say what the columns are."""
        stacks = self.stacks
        if not stacks:
            return "module" if len(self.blocks) > 1 else ""
        return f"block of {fit_name(next(iter(stacks)))}" if len(stacks) == 1 else "block"

    @cached_property
    def places(self) -> int:
        """The number of columns with a colour of their own, which are all but that of modules outside any block."""
        return sum(column is not None for column in self.blocks)

    def ink(self, column: int) -> Ink:
        """Return the colour of the lines of a column."""
        return ("quiet", 0) if self.blocks[column] is None else block_ink(column, self.places)

    @property
    def ramp(self) -> list[Ramp]:
        """The colour key of the columns; empty if there is only one."""
        if self.places < 2:
            return []
        shown = columns_to_label(self.blocks[: self.places], KEY)
        return [Ramp(self.across or "block", [(j / (self.places - 1), self.columns[j]) for j in shown])]

    def heat(
        self,
        title: str,
        values: Mapping[str, float],
        scale: ColourScale,
        *,
        numbers: Mapping[str, int] | None = None,
        gather: Callable[[Sequence[float]], float],
        tip: Callable[[str], str] | None = None,
        zeros: Iterable[str] = (),
        note: str = "",
    ) -> HeatMap:
        """Draw a map of one value per module.

        A cell without a finite value is hatched, or crossed if ``zeros`` holds all of its modules.

        Parameters
        ----------
        title : str
        values : mapping of str to float
            Module name → its value.
        scale : ColourScale
        numbers : mapping of str to int, optional
            The numbers of the modules on a page.
        gather : callable
            Makes one value of those of a cell with several modules.
        tip : callable, optional
            Module name → the text to be shown after the name on hovering over the cell of this module alone.
        zeros : iterable of str
            The modules in which ΔW is 0.
        note : str
            A remark below the map.
        """
        cells: dict[tuple[int, int], Cell] = {}
        zero, crosses = set(zeros), []
        for place, names in self.cells.items():
            members = [name for name in names if isfinite(values.get(name, float("nan")))]
            if not members:
                crosses += [place] if zero.issuperset(names) else []
                continue
            value = gather([values[name] for name in members])
            modules = [numbers[name] for name in names] if numbers else ()
            if len(members) == 1:
                name = members[0]
                cells[place] = Cell(value, tip(name) if tip else scale.text(value), modules, name)
            else:
                cells[place] = Cell(value, f"{len(members)} modules together: {scale.text(value)}", modules)
        edges = stack_starts(self.blocks)[1:]
        rows = [fit_name(name) for name in self.kinds]
        missing = len(cells) + len(crosses) < len(self.kinds) * len(self.blocks)
        # A legend of the two marks, for readers who see a map for the first time.
        remarks = [note, "dotted: none" if missing else "", "×: ΔW = 0" if crosses else ""]
        return HeatMap(
            title, rows, self.columns, cells, scale, self.across, zeros=crosses, column_labels=self.labels,
            column_edges=edges, heads=self.heads, note="; ".join(filter(None, remarks)),
        )  # fmt: skip

    @property
    def fullest(self) -> int:
        """The largest number of modules in a cell."""
        return max(map(len, self.cells.values()), default=0)


def gather_kinds(
    names: Iterable[str], weights: Mapping[str, float] | None = None, most: int = KINDS
) -> tuple[list[str], dict[str, int], int]:
    """Return the names of at most ``most`` rows, the row of every kind, and how many kinds share the last row.

    If there are more kinds than rows, the heaviest have a row of their own.
    """
    weight: defaultdict[str, float] = defaultdict(float)
    for name in names:
        weight[kind(name)] += (weights or {}).get(name, 1.0)
    # Ties are broken by name, so that the same adapter always gives the same figure.
    heaviest = sorted(weight, key=lambda k: (-weight[k], natural_key(k)))
    own = sorted(heaviest if len(weight) <= most else heaviest[: most - 1], key=natural_key)
    sharing = len(weight) - len(own)
    together = [f"{sharing} other kinds" if own else "all modules"] if sharing else []
    return [*own, *together], {k: own.index(k) if k in own else len(own) for k in weight}, sharing


def all_blocks(names: Iterable[str]) -> list[Block]:
    """Return the blocks of these modules, in order."""
    return sorted({home for name in names if (home := block(name))}, key=block_order)


def arithmetic_mean(values: Sequence[float]) -> float:
    """Return the arithmetic mean of one or more values."""
    return sum(values) / len(values)
