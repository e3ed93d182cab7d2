"""The fidelity of a merge: how much of an update is in the merged weights, measured and predicted.

Predictions are made from W and D without rounding the whole weight, block by block, from what is in memory during the
merge. Before a merge, the doctor predicts the same quantities from a sample of both files
(`loralens.linalg.rounding.sampled_rounding`, and `DrawPrediction` for codes).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from typing import final

import numpy as np

from loralens.choices import RoundingMode
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.core.weights import GridRows
from loralens.linalg.exact import Singles
from loralens.linalg.factor import Floats
from loralens.linalg.product import product_singular_values
from loralens.linalg.rounding import SAMPLE, sampled_rounding, survivors
from loralens.merging.codec import Block, Codec, GridBlock, GridCodec
from loralens.merging.grid_moves import asked_moves
from loralens.merging.merge_plan import Buffer, Segment
from loralens.merging.merge_rounding import input_directions

Predicted = tuple[float | None, float | None, float | None]  # gain, relative error, share of unmoved entries


@final
@dataclass(frozen=True, slots=True)
class CodeFidelity:
    """What a merge into the codes of a low-bit weight did to them.

    Attributes
    ----------
    rounding : str
        The rounding that was used.
    changed : float
        Share of the codes that changed.
    clipped : float
        Share of the codes whose move would have ended beyond the grid; they stay at its end.
    mean_move : float
        The mean of |y|, the moves that the update asks for, in steps.
    predicted_changed, predicted_clipped : float
        The same two shares as stochastic rounding is expected to give them.
    noise : float
        √(Σ d² f(1 − f))/‖δ‖, the expected error of stochastic rounding relative to the update δ, where d is the step of
        an entry and f the fractional part of its move. What is clipped does not count.
    """

    rounding: RoundingMode
    changed: float
    clipped: float
    mean_move: float
    predicted_changed: float
    predicted_clipped: float
    noise: float


@final
@dataclass(frozen=True, slots=True)
class Fidelity:
    """How much of an update is in the merged weights; dimensionless.

    Attributes
    ----------
    gain : float
        ⟨W' − W, D⟩/‖D‖²; 1 if D = 0. With DoRA, D is g·(W + D) − W.
    error : float
        ‖W' − W − D‖_F/‖D‖_F.
    subspace_error : float or None
        ‖(W' − W − D) V‖_F/‖D‖_F, where V are the input directions of the update. This is the loss for inputs on which
        the update acts. None if the update is not a pair.
    unmoved : float
        Share of the entries that kept their value.
    predicted_gain, predicted_error, predicted_unmoved : float or None
        The same quantities as predicted (`sampled_rounding`, and `DrawPrediction` for codes). None where there is no
        prediction: under error feedback, for NF4 made from floats, and for codes unless the rounding is stochastic.
        ``predicted_unmoved`` is also None under stochastic rounding of floats.
    directions, surviving : int
        Number of singular values of D, and number of those above the noise of the rounding. Both are 0 if the update is
        not a pair.
    norm : float
        ‖D‖_F.
    entries : int
        Number of entries of W.
    overflowed : int
        Number of finite weights that became infinite.
    codes : CodeFidelity or None
        For a merge into the codes of a low-bit weight.
    non_finite : int
        Number of weights of the base that are infinite or NaN, and stay so.
    """

    module: str
    gain: float
    error: float
    subspace_error: float | None
    unmoved: float
    predicted_gain: float | None
    predicted_error: float | None
    predicted_unmoved: float | None
    directions: int
    surviving: int
    norm: float
    entries: int
    overflowed: int
    codes: CodeFidelity | None = None
    non_finite: int = 0


@final
class FidelitySums:
    """Sums over the blocks of a segment, accurate to about 1e-5: float32 within a block, float64 between blocks.

    Entries that are infinite or NaN before or after the merge are left out, since nothing can be added to them.
    """

    def __init__(self, segment: Segment, codec: Codec) -> None:
        self._segment, self._codec, self._buffer = segment, codec, Buffer()
        self._still = self._seen = self._overflowed = self._non_finite = self._clipped = 0
        self._D_D = self._along = self._lost = self._sum_inside = 0.0
        V = input_directions(segment.terms)
        self._V: Singles | None = None if V is None else V.astype(np.float32)
        self._inside = np.zeros((0, 0), np.float32)  # (r, outputs): the projected loss of a transposed segment
        size = (segment.stop - segment.start) * codec.plan.matrix[1]
        # Of codes, every k-th row of a block is predicted: whole rows make as good a sample as single entries.
        self._every = slice(None, None, max(1, size // SAMPLE))
        self._draws = DrawPrediction()
        self._size, self._sample = size, list[list[Array]]()
        # A fixed seed, so that the same merge predicts the same numbers.
        self._rng = np.random.default_rng(0)
        # Error feedback is not predicted, because its losses depend on all earlier columns.
        self._sampled = codec.stored is None and codec.rounding.mode != "feedback"

    def take(self, block: Block) -> None:
        """Add the next rows."""
        with np.errstate(invalid="ignore", over="ignore"):
            D, lost = block.losses(self._buffer)
            sums = dot(D, D), dot(lost, D), dot(lost, lost)
            # Entries are examined only if a sum is not finite, since that costs another pass over the block.
            if not isfinite(sum(sums)):
                bad = ~(np.isfinite(lost) & np.isfinite(D))
                finite = np.isfinite(block.W.astype(np.float64))
                self._overflowed += int(np.count_nonzero(bad & finite))
                self._non_finite += int(np.count_nonzero(~finite))
                D, lost = np.where(bad, np.float64(0), D), np.where(bad, np.float64(0), lost)
                sums = dot(D, D), dot(lost, D), dot(lost, lost)
        self._still += block.count_unmoved()
        self._seen += lost.size
        if isinstance(block, GridBlock):
            assert block.D is not None
            assert block.moves is not None
            self._clipped += int(np.count_nonzero(block.clipped))
            grid, every = block.grid, self._every
            # The offsets of numbers do not change how codes move.
            rows = replace(grid, codes=grid.codes[every], step=grid.step[every], offset=None)
            self._draws.take(rows, block.D[every], block.moves[every])
        elif self._sampled:
            # Each block gives its share of the sample, rounded up; a small module is used whole.
            share = -(-SAMPLE * D.size // self._size)
            places = np.arange(D.size) if self._size <= SAMPLE else self._rng.integers(D.size, size=share)
            self._sample.append([x.reshape(-1)[places] for x in (block.W, D, block.scale) if x is not None])
        self._D_D += sums[0]
        self._along += sums[1]
        self._lost += sums[2]
        if self._V is None:
            return
        if self._segment.transposed:  # rows are inputs, so the loss of an output is complete only after the last block
            first = block.start - self._segment.start
            projected = self._V[first : first + len(lost)].T @ lost
            self._inside = projected if not self._inside.size else self._inside + projected
        else:
            projected = np.dot(lost, self._V)
            self._sum_inside += dot(projected, projected)

    def fidelity(self) -> Fidelity:
        """The fidelity of all rows together."""
        norm, moved, seen = sqrt(self._D_D), bool(self._D_D), max(self._seen, 1)
        inside = None
        if self._V is not None:
            inside = sqrt(self._sum_inside + dot(self._inside, self._inside)) / norm if moved else 0.0
        expected, codes, still, mode = self._draws, None, self._still / seen, self._codec.rounding.mode
        predicted = self._predict(norm)
        if isinstance(self._codec, GridCodec):
            moving, clipped, steps = (
                n / max(expected.entries, 1) for n in (expected.moving, expected.clipped, expected.steps)
            )
            # Only stochastic rounding is predicted: rounding to the nearest moves few codes.
            if mode == "stochastic":
                predicted = expected.gain, expected.error, 1 - moving
            codes = CodeFidelity(mode, 1 - still, self._clipped / seen, steps, moving, clipped, expected.noise)
        return Fidelity(
            self._segment.module,
            1 + self._along / self._D_D if moved else 1.0,
            sqrt(self._lost) / norm if moved else 0.0,
            inside,
            still,
            *predicted,
            *self._directions(),
            norm,
            self._seen,
            self._overflowed,
            codes,
            self._non_finite,
        )

    def _predict(self, norm: float) -> Predicted:
        """Expected gain, relative error and share of unmoved weights; ``norm`` is ‖D‖_F."""
        if not self._sample:
            return None, None, None
        w, d, *scale = (np.concatenate(parts) for parts in zip(*self._sample, strict=True))
        drawn = self._codec.rounding.mode == "stochastic"
        unit, dtype = (scale[0] if scale else None), self._codec.dtype
        loss = sampled_rounding(w, d, size=self._size, norm=norm, dtype=dtype, scale=unit, stochastic=drawn)
        # Stochastic rounding has no bias, and whether a weight moves is a matter of chance.
        return (1.0, loss.error, None) if drawn else (loss.gain, loss.error, loss.unmoved)

    def _directions(self) -> tuple[int, int]:
        """The number of singular values of D, and how many exceed the noise; 0 if an update is not a pair."""
        terms = self._segment.terms
        s = np.zeros(0)
        if all(isinstance(update, LowRank) for _, update in terms):
            # From the factors of all pairs side by side.
            B = np.hstack([strength * update.scale * update.B.astype(np.float64) for strength, update in terms])
            A = np.vstack([update.A.astype(np.float64) for _, update in terms])
            s = product_singular_values(B, A)
        # The measured rounding error of one entry is used, not the predicted one.
        noise = sqrt(self._lost / max(self._seen, 1))
        return int(np.count_nonzero(s)), survivors(s, noise, terms[0][1].shape)


def dot(x: Array, y: Array) -> float:
    """Σ x·y over all entries."""
    return float(np.dot(x.ravel(), y.ravel()))


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
        """Add some rows, with D (rows, in) and, if they are known, their `asked_moves`.

        ``directions`` are orthonormal input directions V (in, r), in which the error is predicted too.
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


def join_rows(grids: Sequence[GridRows]) -> GridRows:
    """The rows of several blocks of one weight below each other, without their offsets."""
    codes, step = (np.concatenate([getattr(grid, name) for grid in grids]) for name in ("codes", "step"))
    return replace(grids[0], codes=codes, step=step, offset=None)
