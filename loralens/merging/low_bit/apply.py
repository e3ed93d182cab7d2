"""The merge of one coded weight, a block of rows at a time: its codes move, and its scales stay."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import final

import numpy as np

from loralens.choices import RoundingMode
from loralens.core.weights import CodedWeight, Codes, GridRows
from loralens.errors import LEAVE_EXTRA_OUT, FormatError, MismatchError
from loralens.linalg.device import Device
from loralens.linalg.exact import Singles
from loralens.linalg.factor import Floats
from loralens.linalg.rounding import Draws
from loralens.merging.dora_factors import DoraFactors, compute_dora_factors
from loralens.merging.low_bit.stochastic import (
    DrawnCodes,
    asked_moves,
    group_size,
    move_codes,
    nearest_codes,
    uniform_numbers,
)
from loralens.merging.matrix import MatrixRows, cuts
from loralens.merging.plan import Slab, TensorPlan
from loralens.merging.rounding import add_update
from loralens.merging.update import BLOCK, UpdateMatrix

# One slice of the exact product, as for 16-bit weights: what it leaves out is far below the step of any grid.
SLICES = 1


@final
@dataclass(frozen=True, slots=True)
class CodeRounding:
    """How an update is rounded to the grid of a coded weight.

    Attributes
    ----------
    mode : str
        ``stochastic`` or ``nearest``.
    key : str
        The key of the decoded weight. Every weight has random numbers of its own.
    """

    mode: RoundingMode = "stochastic"
    seed: int = 0
    key: str = ""


@final
@dataclass(frozen=True, slots=True)
class CodesBlock:
    """Some rows of a coded weight before and after the merge.

    Attributes
    ----------
    start, stop : int
        Range of rows.
    slab : Slab or None
        The slab that contains the rows; None if nothing is added to them.
    grid : GridRows
        The rows of the base.
    D : float32 array or None
        What the adapter adds to these rows; with DoRA g·(W + D) − W.
    moves : float64 array or None
        What D asks of every code (`asked_moves`).
    drawn : DrawnCodes
        The merged codes.
    """

    start: int
    stop: int
    slab: Slab | None
    grid: GridRows
    D: Singles | None
    moves: Floats | None
    drawn: DrawnCodes

    @property
    def moved(self) -> Singles:
        """What the merge added to the numbers of these rows, float32."""
        return added_numbers(self.grid, self.drawn.codes)


@final
@dataclass(frozen=True, slots=True)
class CodesMerge:
    """The merge of one coded weight: its plan and the products of its updates. `prepare_codes` makes it.

    Attributes
    ----------
    plan : TensorPlan
        The plan of the decoded weight.
    """

    plan: TensorPlan
    weight: CodedWeight
    rounding: CodeRounding
    products: dict[int, UpdateMatrix]
    slab_factors: dict[int, DoraFactors] = field(default_factory=dict)

    @property
    def mode(self) -> RoundingMode:
        """``stochastic`` or ``nearest``."""
        return self.rounding.mode

    def blocks(self) -> Iterator[CodesBlock]:
        """Yield all rows in order, in blocks that do not cross the limits of slabs."""
        assert self.weight.grid is not None
        for start, stop, slab in cuts(self.plan, BLOCK):
            grid = self.weight.grid(start, stop)
            if slab is None:
                still = DrawnCodes(grid.codes, np.zeros(grid.codes.shape, np.bool_))
                yield CodesBlock(start, stop, None, grid, None, None, still)
                continue
            D = self.added(slab, start, stop, grid)
            moves = asked_moves(grid, D)
            yield CodesBlock(start, stop, slab, grid, D, moves, self._round(grid, moves, start))

    def added(self, slab: Slab, start: int, stop: int, grid: GridRows) -> Singles:
        """What the adapter adds to some rows: D, or with DoRA g·(W + D) − W, where W has the codes of ``grid``."""
        first, last = start - slab.start, stop - slab.start
        D, of_slab = self.products[slab.start].rows(first, last), self.slab_factors.get(slab.start)
        if of_slab is None:
            return D
        W = grid.values(grid.codes)
        return np.asarray(add_update(W, D, dora_factors=of_slab.of(first, last)) - W, dtype=np.float32)

    def uniform(self, start: int, shape: tuple[int, ...]) -> Floats:
        """The numbers u of the draws of some rows, from row ``start`` on."""
        draws = Draws.named(self.rounding.seed, self.rounding.key)
        return uniform_numbers(draws, start * shape[1], prod(shape)).reshape(shape)

    def _round(self, grid: GridRows, moves: Floats, start: int) -> DrawnCodes:
        if self.mode == "nearest":
            return nearest_codes(grid, moves)
        return move_codes(grid, moves.copy(), self.uniform(start, moves.shape))


def prepare_codes(
    plan: TensorPlan,
    weight: CodedWeight,
    rounding: CodeRounding,
    *,
    device: Device | None = None,
) -> CodesMerge:
    """Prepare the merge of a planned weight into its codes.

    Parameters
    ----------
    plan : TensorPlan
        The plan of the decoded weight.
    weight : CodedWeight
    rounding : CodeRounding
    device : Device or None
        The device that multiplies the factors of the update.

    Raises
    ------
    MismatchError, FormatError
        The codes of this layout cannot be moved, or the adapter replaces numbers of the weight.
    """
    check_movable(plan, weight)
    products = {slab.start: slab.update(SLICES, device) for slab in plan.slabs}
    rows = MatrixRows(weight.floats(), plan.matrix)
    slab_factors = {
        slab.start: compute_dora_factors(slab.magnitude, products[slab.start], rows, None, slab.start)
        for slab in plan.slabs
        if slab.magnitude
    }
    return CodesMerge(plan, weight, rounding, products, slab_factors)


def check_movable(plan: TensorPlan, weight: CodedWeight) -> None:
    """Refuse a weight whose codes cannot be moved, or in which the adapter replaces numbers.

    Raises
    ------
    FormatError
        The layout can be read, but nothing can be merged into its codes yet.
    MismatchError
        The adapter replaces the weight, or rows of it, by numbers that no codes stand for.
    """
    if weight.grid is None or weight.encode is None or len(weight.shape) != 2:
        raise FormatError(
            f"{plan.key}: {weight.layout} can be read, but its codes cannot be merged into yet",
            fix="write the merged model in floats: --dtype bf16",
        )
    if plan.replacement is not None or plan.tokens:
        raise MismatchError(
            f"{plan.key}: the adapter replaces numbers in it, which codes with the scales of the base cannot hold",
            fix=f"write the merged model in floats: --dtype bf16; or {LEAVE_EXTRA_OUT}",
        )


def added_numbers(grid: GridRows, codes: Codes) -> Singles:
    """What the numbers of some rows gain if they have these codes instead, float32; the offsets cancel."""
    if grid.levels is None:
        change = (codes - grid.codes).astype(np.float32)
    else:
        change = grid.levels[codes - grid.lowest] - grid.levels[grid.codes - grid.lowest]
    size = group_size(grid)
    if size is None:
        return np.asarray(change * grid.step[:, grid.group_of_column])
    return np.asarray(change.reshape(len(change), -1, size) * grid.step[:, :, None]).reshape(change.shape)
