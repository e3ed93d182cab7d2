"""Grid: modules laid out for a figure, kinds down and blocks across."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import isfinite
from typing import final

from loralens.charts.names import NAME, Column, block_order, fit, stack_names, starts, thin
from loralens.charts.palette import block_ink
from loralens.charts.spec import Cell, Heat, Ink, Ramp, Scale
from loralens.core.names import Block, block, kind, natural_key

KINDS = 24  # rows of a map; the kinds of least weight come together
LABELS = 32  # columns of a map that are named,
KEY = 8  # and names beside the colours of blocks
HEAD = 0.5  # columns that a letter of the name of a stack takes above a map


@final
@dataclass(frozen=True)
class Grid:
    """Modules by kind and block.

    Attributes
    ----------
    kinds : sequence of str
        Down.
    blocks : sequence of Block, str or None
        Across; None: outside any block. Where no module is in a block, each module, in one row.
    cells : mapping of (int, int) to sequence of str
        The modules of each cell.
    gathered : int
        Kinds that share the last row.
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
        """These modules; of more than ``most`` kinds those of most weight, the others in one row.

        ``blocks``: those of all adapters that stand beside each other, so that a block has one place and colour.
        """
        names = list(names)
        homes = {name: block(name) for name in names}
        stacks = {home.stack for home in homes.values() if home}
        if not stacks:
            flat = {(0, j): [name] for j, name in enumerate(names)}
            return cls(["all modules"] if len(names) > 1 else [kind(name) for name in names], names, flat)
        kinds, row, others = gather_kinds(names, weights, most)
        places = sorted({home for home in homes.values() if home} if blocks is None else blocks, key=block_order)
        columns: list[Column] = [place for place in places if place.stack in stacks]
        columns += [None] if None in homes.values() else []
        place_of = {column: j for j, column in enumerate(columns)}
        cells: dict[tuple[int, int], list[str]] = {}
        for name in names:
            cells.setdefault((row[kind(name)], place_of[homes[name]]), []).append(name)
        return cls(kinds, columns, cells, others)

    def row(self, row: int) -> list[tuple[int, Sequence[str]]]:
        """Columns that hold modules of this row, with these modules."""
        return [(j, self.cells[row, j]) for j in range(len(self.blocks)) if (row, j) in self.cells]

    @cached_property
    def columns(self) -> list[str]:
        """What the columns are called, each different: blocks by number, with the stack where there are several."""
        stacks = self.stacks
        return [
            fit(column or "outside", NAME)
            if not isinstance(column, Block)
            else str(column.number)
            if len(stacks) == 1
            else f"{stacks[column.stack]}.{column.number}"
            for column in self.blocks
        ]

    @cached_property
    def labels(self) -> list[str]:
        """What stands under the columns: as many names as fit; of many blocks only the first says its stack."""
        shown, firsts = set(thin(self.blocks, LABELS)), set(starts(self.blocks))
        numbers = bool(self.heads)
        many = len(self.blocks) > LABELS
        return [
            ""
            if j not in shown
            else str(column.number)
            if isinstance(column, Block) and (numbers or (many and j not in firsts))
            else fit(self.columns[j], NAME)
            for j, column in enumerate(self.blocks)
        ]

    @cached_property
    def heads(self) -> list[tuple[int, int, str]]:
        """First column, end and name of each stack, where there are several and each is wide enough for its name."""
        stacks = self.stacks
        spans = [
            (start, stop, stacks[first.stack])
            for start, stop in pairwise([*starts(self.blocks), len(self.blocks)])
            if isinstance(first := self.blocks[start], Block)
        ]
        wide = all(HEAD * len(name) + 1 <= stop - start for start, stop, name in spans)
        return spans if len(stacks) > 1 and wide else []

    @cached_property
    def stacks(self) -> dict[str, str]:
        """Stacks of blocks and their short names."""
        return stack_names(column.stack for column in self.blocks if isinstance(column, Block))

    @property
    def across(self) -> str:
        """What the columns are."""
        stacks = self.stacks
        if not stacks:
            return "module" if len(self.blocks) > 1 else ""
        return f"block of {fit(next(iter(stacks)), NAME)}" if len(stacks) == 1 else "block"

    @property
    def places(self) -> int:
        """Columns with a colour of their own: all but the one outside any block."""
        return sum(column is not None for column in self.blocks)

    def ink(self, column: int) -> Ink:
        """The colour of the lines of a column."""
        return ("quiet", 0) if self.blocks[column] is None else block_ink(column, self.places)

    @property
    def ramp(self) -> list[Ramp]:
        """The colours of the columns and their names; nothing where there is one column."""
        if self.places < 2:
            return []
        shown = thin(self.blocks[: self.places], KEY)
        return [Ramp(self.across or "block", [(j / (self.places - 1), self.columns[j]) for j in shown])]

    def heat(
        self,
        title: str,
        values: Mapping[str, float],
        scale: Scale,
        *,
        numbers: Mapping[str, int] | None = None,
        gather: Callable[[Sequence[float]], float],
        tip: Callable[[str], str] | None = None,
        zeros: Iterable[str] = (),
        note: str = "",
    ) -> Heat:
        """A map of one number a module: cells that hold several gather them, those without a finite one are hatched.

        ``tip`` says a module's own value; a cell of several also says theirs together. Cells whose modules are all
        among ``zeros`` have a cross. ``numbers`` are those of the modules on a page.
        """
        cells: dict[tuple[int, int], Cell] = {}
        zero, crosses = set(zeros), []
        for place, names in self.cells.items():
            known = [name for name in names if isfinite(values.get(name, float("nan")))]
            if not known:
                crosses += [place] if zero.issuperset(names) else []
                continue
            value = gather([values[name] for name in known])
            alone = tip(known[0]) if tip else f"{known[0]}: {scale.text(value)}"
            text = alone if len(known) == 1 else f"{len(known)} modules together: {scale.text(value)}"
            cells[place] = Cell(value, text, [numbers[name] for name in names] if numbers else ())
        edges = starts(self.blocks)[1:]
        rows = [fit(name, NAME) for name in self.kinds]
        missing = len(cells) + len(crosses) < len(self.kinds) * len(self.blocks)
        marks = [note, "dotted: none" if missing else "", "×: ΔW = 0" if crosses else ""]
        note = "; ".join(filter(None, marks))
        return Heat(
            title, rows, self.columns, cells, scale, self.across, zeros=crosses, column_labels=self.labels,
            column_edges=edges, heads=self.heads, note=note,
        )  # fmt: skip

    @property
    def fullest(self) -> int:
        """The most modules that any cell holds."""
        return max(map(len, self.cells.values()), default=0)


def gather_kinds(
    names: Iterable[str], weights: Mapping[str, float] | None = None, most: int = KINDS
) -> tuple[list[str], dict[str, int], int]:
    """The names of at most ``most`` kinds of modules, the place of every kind among them, and how many share the last.

    Where there are more, the heaviest have a place of their own.
    """
    weight: dict[str, float] = {}
    for name in names:
        weight[kind(name)] = weight.get(kind(name), 0.0) + (weights or {}).get(name, 1.0)
    heaviest = sorted(weight, key=lambda k: (-weight[k], natural_key(k)))
    own = sorted(heaviest if len(weight) <= most else heaviest[: most - 1], key=natural_key)
    others = len(weight) - len(own)
    together = [f"{others} other kinds" if own else "all modules"] if others else []
    return [*own, *together], {k: own.index(k) if k in own else len(own) for k in weight}, others


def all_blocks(names: Iterable[str]) -> list[Block]:
    """The blocks of these modules, in order."""
    return sorted({home for name in names if (home := block(name))}, key=block_order)


def mean(values: Sequence[float]) -> float:
    """Of one or more."""
    return sum(values) / len(values)
