"""The fidelity of a merge: how much of an update is in the merged weights, measured and predicted."""

from dataclasses import dataclass
from math import isfinite, sqrt
from typing import final

import numpy as np
from numpy.typing import NDArray

from loralens.choices import RoundingMode
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.linalg.exact import Singles
from loralens.linalg.product import product_singular_values
from loralens.linalg.rounding import survivors
from loralens.merging.apply import MergedBlock, TensorMerge
from loralens.merging.feedback import input_directions
from loralens.merging.matrix import Buffer
from loralens.merging.plan import Slab
from loralens.merging.prediction import Prediction
from loralens.merging.rounding import add_update, row_parts
from loralens.merging.undo.patch import bits


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
        The same quantities as predicted (`Prediction`, and `DrawPrediction` for codes). None where there is no
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
        Number of weights of the base that are infinite or NaN, and stay so; not counted where the base has codes.
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
class LossSums:
    """Sums over the blocks of a slab: of its update D, and of the loss W' − W − D that the rounding causes.

    Parameters
    ----------
    slab : Slab
    """

    def __init__(self, slab: Slab) -> None:
        self._slab = slab
        self.D_D = self.along = self.lost = self._sum_inside = 0.0
        V = input_directions(slab.terms)
        self._V: Singles | None = None if V is None else V.astype(np.float32)
        self._inside = np.zeros((0, 0), np.float32)  # (r, outputs): the projected loss of a transposed slab

    def take(self, start: int, sums: tuple[float, float, float], lost: Singles) -> None:
        """Add the rows from ``start`` on: Σ D², Σ loss·D and Σ loss², and the loss."""
        self.D_D += sums[0]
        self.along += sums[1]
        self.lost += sums[2]
        if self._V is None:
            return
        if self._slab.transposed:  # rows are inputs, so the loss of an output is complete only after the last block
            first = start - self._slab.start
            projected = self._V[first : first + len(lost)].T @ lost
            self._inside = projected if not self._inside.size else self._inside + projected
            return
        projected = np.dot(lost, self._V)
        self._sum_inside += dot(projected, projected)

    @property
    def norm(self) -> float:
        """‖D‖_F."""
        return sqrt(self.D_D)

    @property
    def gain(self) -> float:
        """⟨W' − W, D⟩/‖D‖²; 1 if D = 0."""
        return 1 + self.along / self.D_D if self.D_D else 1.0

    @property
    def error(self) -> float:
        """‖W' − W − D‖_F/‖D‖_F."""
        return sqrt(self.lost) / self.norm if self.D_D else 0.0

    @property
    def subspace_error(self) -> float | None:
        """The error in the input directions of the update; None if it is not a pair."""
        if self._V is None:
            return None
        return sqrt(self._sum_inside + dot(self._inside, self._inside)) / self.norm if self.D_D else 0.0

    def directions(self, entries: int) -> tuple[int, int]:
        """The number of singular values of D, and how many exceed the noise, for a slab of size ``entries``."""
        s = self._singular_values()
        # The measured rounding error of one entry is used, not the predicted one.
        noise = sqrt(self.lost / max(entries, 1))
        return int(np.count_nonzero(s)), survivors(s, noise, self._slab.terms[0][1].shape)

    def _singular_values(self) -> NDArray[np.float64]:
        """The singular values of D, from the factors of all pairs side by side; none if an update is not a pair."""
        terms = self._slab.terms
        if not all(isinstance(update, LowRank) for _, update in terms):
            return np.zeros(0)
        B = np.hstack([strength * update.scale * update.B.astype(np.float64) for strength, update in terms])
        A = np.vstack([update.A.astype(np.float64) for _, update in terms])
        return product_singular_values(B, A)


@final
class FidelitySums:
    """Sums over the blocks of a slab, accurate to about 1e-5: float32 within a block, float64 between blocks.

    Entries that are infinite or NaN before or after the merge are left out, since nothing can be added to them.
    """

    def __init__(self, slab: Slab, merge: TensorMerge) -> None:
        self.slab, self.merge = slab, merge
        self.size = (slab.stop - slab.start) * merge.plan.matrix[1]
        self.still = self.seen = self.overflowed = self.non_finite = 0
        self._sums, self._buffer = LossSums(slab), Buffer()
        self._prediction = Prediction(merge, self.size)

    def take(self, block: MergedBlock) -> None:
        """Add the next rows."""
        with np.errstate(invalid="ignore", over="ignore"):
            D, lost = self._parts(block)
            sums = dot(D, D), dot(lost, D), dot(lost, lost)
            # Entries are examined only if a sum is not finite, since that costs another pass over the block.
            if not isfinite(sum(sums)):
                bad = ~(np.isfinite(lost) & np.isfinite(D))
                finite = np.isfinite(block.W.astype(np.float64))
                self.overflowed += int(np.count_nonzero(bad & finite))
                self.non_finite += int(np.count_nonzero(~finite))
                D, lost = np.where(bad, np.float64(0), D), np.where(bad, np.float64(0), lost)
                sums = dot(D, D), dot(lost, D), dot(lost, lost)
        # For float8 with scales the stored numbers are compared, since only they are rounded.
        before = block.W if block.scale is None else block.stored
        self.still += _count_equal(block.merged, before)
        self.seen += lost.size
        self._prediction.take(block, D)
        self._sums.take(block.start, sums, lost)

    def _parts(self, block: MergedBlock) -> tuple[Array, Array]:
        """D (with DoRA the effective update) and W' − W − D, both float32."""
        assert block.D is not None
        lost, D = self._buffer.of(block.W.shape), block.D
        # With DoRA the effective update is g·(W + D) − W.
        if block.dora_factors is not None:
            D = add_update(block.W, D, dora_factors=block.dora_factors).astype(np.float32, copy=False)
            D -= block.W.astype(np.float32)
        # W' − total is exact; W' − W − D rounds twice in float32.
        if block.total is not None:
            for rows in row_parts(lost):
                # Converted first, since NumPy takes longer to do it within the subtraction.
                np.copyto(lost[rows], block.merged[rows])
                np.subtract(lost[rows], block.total[rows], out=lost[rows], dtype=np.float32, casting="same_kind")
        else:
            np.subtract(block.numbers(block.merged), block.W, out=lost, dtype=np.float32, casting="same_kind")
            lost -= D
        return D, lost

    def fidelity(self) -> Fidelity:
        """The fidelity of all rows together."""
        sums = self._sums
        return Fidelity(
            self.slab.module,
            sums.gain,
            sums.error,
            sums.subspace_error,
            self.still / max(self.seen, 1),
            *self._prediction.result(sums.norm),
            *sums.directions(self.seen),
            sums.norm,
            self.seen,
            self.overflowed,
            non_finite=self.non_finite,
        )


def _count_equal(merged: Array, before: Array) -> int:
    """Number of entries that kept their value. Within one dtype bits are compared, which is much faster."""
    if merged.dtype == before.dtype:
        return int(np.count_nonzero(bits(merged) == bits(before)))
    return int(np.count_nonzero(merged.astype(np.float64) == before.astype(np.float64)))


def dot(x: Array, y: Array) -> float:
    """Σ x·y over all entries."""
    return float(np.dot(x.ravel(), y.ravel()))
