"""Grid: modules laid out for a map, kinds down and blocks across."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import final

from loralens.charts.figure import fit
from loralens.charts.sheet import block_order, stack_names
from loralens.core.names import Block, block, kind, natural_key
from loralens.reporting.chart import Cell, Heat, Scale

KINDS = 24  # rows of a map; the kinds of least weight come together
NAME = 28  # letters of a name beside a map


@final
@dataclass(frozen=True, slots=True)
class Grid:
    """Modules by kind and block.

    Attributes
    ----------
    kinds : sequence of str
        Down.
    blocks : sequence of Block or None
        Across; None: outside any block.
    cells : mapping of (int, int) to sequence of str
        The modules of each cell.
    """

    kinds: Sequence[str]
    blocks: Sequence[Block | None]
    cells: Mapping[tuple[int, int], Sequence[str]]

    @classmethod
    def of(cls, names: Iterable[str], weights: Mapping[str, float] | None = None) -> "Grid":
        """These modules; of more than `KINDS` kinds those of most weight, the others in one row."""
        names = list(names)
        weight: dict[str, float] = {}
        for name in names:
            weight[kind(name)] = weight.get(kind(name), 0.0) + (weights or {}).get(name, 1.0)
        own = sorted(sorted(weight, key=lambda k: (-weight[k], natural_key(k)))[:KINDS], key=natural_key)
        row = {k: own.index(k) if k in own else len(own) for k in weight}
        others = len(weight) - len(own)
        homes = {name: block(name) for name in names}
        blocks: list[Block | None] = [*sorted({home for home in homes.values() if home}, key=block_order)]
        blocks += [None] if None in homes.values() else []
        cells: dict[tuple[int, int], list[str]] = {}
        for name in names:
            cells.setdefault((row[kind(name)], blocks.index(homes[name])), []).append(name)
        return cls([*own, *([f"{others} other kinds"] if others else [])], blocks, cells)

    @property
    def columns(self) -> list[str]:
        """What the blocks are called: their numbers, with the stack where there are several."""
        stacks = self.stacks
        return [
            "outside"
            if one is None
            else str(one.number)
            if len(stacks) == 1
            else fit(f"{stacks[one.stack]}.{one.number}", NAME)
            for one in self.blocks
        ]

    @property
    def stacks(self) -> dict[str, str]:
        """Stacks of blocks and their short names."""
        return stack_names(one.stack for one in self.blocks if one)

    @property
    def across(self) -> str:
        """What the columns are."""
        stacks = self.stacks
        return f"block of {fit(next(iter(stacks)), NAME)}" if len(stacks) == 1 else "block" if stacks else ""

    def heat(
        self,
        title: str,
        values: Mapping[str, float],
        scale: Scale,
        *,
        numbers: Mapping[str, int],
        gather: Callable[[Sequence[float]], float],
        tip: Callable[[str], str],
    ) -> Heat:
        """A map of one number a module: cells that hold several gather them, those without a finite one are dotted.

        ``tip`` says a module's own value; a cell of several also says theirs together.
        """
        cells: dict[tuple[int, int], Cell] = {}
        for place, names in self.cells.items():
            known = [name for name in names if isfinite(values.get(name, float("nan")))]
            if not known:
                continue
            value = gather([values[name] for name in known])
            said = tip(known[0]) if len(known) == 1 else f"{len(known)} modules together: {value:{scale.form}}"
            cells[place] = Cell(value, said, [numbers[name] for name in names])
        rows = [fit(name, NAME) for name in self.kinds]
        return Heat(title, rows, self.columns, cells, scale, across=self.across)


def mean(values: Sequence[float]) -> float:
    """Of one or more."""
    return sum(values) / len(values)
