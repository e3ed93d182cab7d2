"""How much of an update arrives in the codes of a low-bit weight: measured, and predicted without rounding."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import final

import numpy as np

from loralens.core.weights import GridRows
from loralens.linalg.exact import Singles
from loralens.linalg.factor import Floats
from loralens.merging.apply import MergedBlock
from loralens.merging.fidelity import CodeFidelity, Fidelity, LossSums, dot
from loralens.merging.low_bit.apply import CodesBlock, CodesMerge
from loralens.merging.low_bit.stochastic import asked_moves
from loralens.merging.plan import Slab

# With this many entries, a prediction is accurate to 1 %. Whole rows make as good a sample as single entries.
SAMPLE = 1 << 19  # entries of a module from which the prediction is made


# About 8 % of the codes of a block format are at an end of the grid, and half of their moves point outwards, so
# stochastic rounding loses 4 % of the gain. Larger moves of the other entries of the row would give it back. This was
# measured (reports/low_bit.md): the gain is 1 again, but the divergence of the model is not smaller, so it is not done.
@final
@dataclass(slots=True)
class DrawPrediction:
    """Sums over entries: what stochastic rounding on a grid is expected to do with an update.

    Codes move by whole steps, so an entry that asks for y steps moves by ⌊y⌋, or by one step more with the probability
    f = y − ⌊y⌋. Its variance is f(1 − f) in squared steps; in the unit of the weight, with the step d, this is
    d|δ| − δ² where |y| is below 1. What lies beyond the grid is lost, and everything else arrives on average.

    Attributes
    ----------
    energy, variance, lost, lost_energy : float
        Σ δ²; the sum of the variances; Σ l·δ and Σ l² of the clipped parts l.
    moving, clipped, steps : float
        The expected numbers of codes that change, and whose move ends beyond the grid; Σ |y|.
    own : float
        The expected Σ ‖e V‖² over the rows e of the error, with V the directions that were given.
    """

    entries: int = 0
    energy: float = 0.0
    variance: float = 0.0
    lost: float = 0.0
    lost_energy: float = 0.0
    moving: float = 0.0
    clipped: float = 0.0
    steps: float = 0.0
    own: float = 0.0

    def take(
        self, grid: GridRows, D: Singles, moves: Floats | None = None, *, directions: Floats | None = None
    ) -> None:
        """Add some rows.

        Parameters
        ----------
        grid : GridRows
        D : float32 array, shape (rows, in)
        moves : float64 array, optional
            Their `asked_moves`, if these are known.
        directions : float64 array, shape (in, r), optional
            Orthonormal input directions V, in which the error is predicted too.
        """
        moves = asked_moves(grid, D) if moves is None else moves
        wide = D.astype(np.float64)
        # The size of one step. Where it is 0, the code cannot move, and what the entry should gain is lost.
        step = np.divide(wide, moves, out=np.zeros_like(wide), where=moves != 0)
        # The two places at which a code may end, and what the grid leaves of them.
        low = grid.codes + np.floor(moves)
        likely = moves - np.floor(moves)  # the probability of the upper place
        below, above = (np.clip(place, grid.lowest, grid.highest) for place in (low, low + 1))
        arrives = below - grid.codes + likely * (above - below)
        lost = np.where(moves == 0, wide, step * (moves - arrives))
        self.entries += D.size
        self.energy += dot(wide, wide)
        variances = np.square(step * (above - below)) * likely * (1 - likely)
        self.variance += float(variances.sum())
        self.lost += dot(lost, wide)
        self.lost_energy += dot(lost, lost)
        self.moving += float(np.where(below != grid.codes, 1 - likely, 0).sum() + likely[above != grid.codes].sum())
        self.clipped += float(np.where(below != low, 1 - likely, 0).sum() + likely[above != low + 1].sum())
        self.steps += float(np.abs(moves).sum())
        if directions is not None:
            # The draws are independent, so only their variances add up; what is clipped is the same in every draw.
            by_input, offset = variances.sum(axis=0), lost @ directions
            self.own += float(by_input @ np.square(directions).sum(axis=1)) + dot(offset, offset)

    @property
    def gain(self) -> float:
        """The expected gain: what is not clipped."""
        return 1 - self.lost / self.energy if self.energy else 1.0

    @property
    def noise(self) -> float:
        """√(Σ variances)/‖δ‖."""
        return sqrt(self.variance / self.energy) if self.energy else 0.0

    @property
    def error(self) -> float:
        """The expected error relative to the update, with what is clipped."""
        return sqrt((self.variance + self.lost_energy) / self.energy) if self.energy else 0.0

    def share(self, count: float) -> float:
        """An expected number of entries as a share of all."""
        return count / max(self.entries, 1)


@final
@dataclass(slots=True)
class CodesSums:
    """Sums over the blocks of one slab."""

    slab: Slab
    merge: CodesMerge
    losses: LossSums = field(init=False)
    prediction: DrawPrediction = field(default_factory=DrawPrediction)
    entries: int = 0
    changed: int = 0
    clipped: int = 0

    def __post_init__(self) -> None:
        self.losses = LossSums(self.slab)

    def take(self, block: CodesBlock) -> None:
        """Add the next rows."""
        assert block.D is not None
        assert block.moves is not None
        lost = block.moved - block.D
        self.losses.take(block.start, (dot(block.D, block.D), dot(lost, block.D), dot(lost, lost)), lost)
        self.entries += lost.size
        self.changed += int(np.count_nonzero(block.drawn.codes != block.grid.codes))
        self.clipped += int(np.count_nonzero(block.drawn.clipped))
        size = (self.slab.stop - self.slab.start) * self.merge.plan.matrix[1]
        # Every k-th row of the block, from its first one on.
        every = slice(None, None, max(1, size // SAMPLE))
        self.prediction.take(rows_of(block.grid, every), block.D[every], block.moves[every])

    def fidelity(self) -> Fidelity:
        """The fidelity of all rows together."""
        sums, expected = self.losses, self.prediction
        still, drawn = 1 - self.changed / max(self.entries, 1), self.merge.mode == "stochastic"
        # Only stochastic rounding is predicted: rounding to the nearest moves few codes.
        directions, surviving = sums.directions(self.entries)
        return Fidelity(
            self.slab.module,
            sums.gain,
            sums.error,
            sums.subspace_error,
            still,
            expected.gain if drawn else None,
            expected.error if drawn else None,
            1 - expected.share(expected.moving) if drawn else None,
            directions,
            surviving,
            sums.norm,
            self.entries,
            0,
            CodeFidelity(
                self.merge.mode,
                1 - still,
                self.clipped / max(self.entries, 1),
                expected.share(expected.steps),
                expected.share(expected.moving),
                expected.share(expected.clipped),
                expected.noise,
            ),
        )


@final
class QuantisedSums:
    """Sums over the blocks of one slab whose merged floats were quantised once."""

    def __init__(self, slab: Slab) -> None:
        self._losses, self._module = LossSums(slab), slab.module
        self._seen = 0

    def take(self, block: MergedBlock, quantised: Singles) -> None:
        """Add the next rows, and the numbers that they are quantised to."""
        W = block.W.astype(np.float32)
        # With DoRA this is g·(W + D) − W.
        D = block.merged.astype(np.float32) - W
        lost = quantised - W - D
        self._seen += lost.size
        self._losses.take(block.start, (dot(D, D), dot(lost, D), dot(lost, lost)), lost)

    def fidelity(self) -> Fidelity:
        """The fidelity of all rows together."""
        sums = self._losses
        measured = sums.gain, sums.error, sums.subspace_error
        # Every number moves to a level, whether the adapter moves it or not.
        return Fidelity(
            self._module, *measured, 0.0, None, None, None, *sums.directions(self._seen), sums.norm, self._seen, 0
        )


def rows_of(grid: GridRows, rows: slice) -> GridRows:
    """Some of the rows of a block."""
    offset = None if grid.offset is None else grid.offset[rows]
    same = grid.group_of_column, grid.lowest, grid.highest, grid.levels
    return GridRows(grid.codes[rows], grid.step[rows], offset, *same)


def join_rows(grids: Sequence[GridRows]) -> GridRows:
    """The rows of several blocks of one weight below each other, without their offsets."""
    codes, step = (np.concatenate([getattr(grid, name) for grid in grids]) for name in ("codes", "step"))
    first = grids[0]
    return GridRows(codes, step, None, first.group_of_column, first.lowest, first.highest, first.levels)
