"""The fidelity of a merge: how much of an update is in the merged weights, measured and predicted."""

from dataclasses import dataclass
from math import isfinite, sqrt
from typing import final

import numpy as np
from numpy.typing import NDArray

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
from loralens.merging.rounding import add_update
from loralens.merging.undo.patch import bits


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
        The same quantities as predicted before the merge (`Prediction`). None under error feedback.
    directions, surviving : int
        Number of singular values of D, and number of those above the noise of the rounding. Both are 0 if the update is
        not a pair.
    norm : float
        ‖D‖_F.
    entries : int
        Number of entries of W.
    overflowed : int
        Number of finite weights that became infinite.
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


@final
class FidelitySums:
    """Sums over the blocks of a slab, accurate to about 1e-5: float32 within a block, float64 between blocks.

    Entries that are infinite or NaN before or after the merge are left out, since nothing can be added to them.
    """

    def __init__(self, slab: Slab, merge: TensorMerge) -> None:
        self.slab, self.merge = slab, merge
        self.size = (slab.stop - slab.start) * merge.plan.matrix[1]
        self.D_D = self.along = self.lost = self.inside = 0.0
        self.still = self.seen = self.overflowed = 0
        V = input_directions(slab.terms)
        self._V: Singles | None = None if V is None else V.astype(np.float32)
        self._inside = np.zeros((0, 0), np.float32)  # (r, outputs): the projected loss of a transposed slab
        self._buffer = Buffer()
        self._prediction = Prediction(merge, self.size)

    def take(self, block: MergedBlock) -> None:
        """Add the next rows."""
        with np.errstate(invalid="ignore", over="ignore"):
            D, lost = self._parts(block)
            sums = _dot(D, D), _dot(lost, D), _dot(lost, lost)
            # Entries are examined only if a sum is not finite, since that costs another pass over the block.
            if not isfinite(sum(sums)):
                bad = ~(np.isfinite(lost) & np.isfinite(D))
                self.overflowed += int(np.count_nonzero(bad & np.isfinite(block.W.astype(np.float64))))
                D, lost = np.where(bad, np.float64(0), D), np.where(bad, np.float64(0), lost)
                sums = _dot(D, D), _dot(lost, D), _dot(lost, lost)
        self.D_D += sums[0]
        self.along += sums[1]
        self.lost += sums[2]
        # Under scales the stored numbers are compared, since only they are rounded.
        self.still += _count_equal(block.merged, block.W if block.scale is None else block.stored)
        self.seen += lost.size
        self._prediction.take(block, D)
        self._add_projected_loss(block, lost)

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
            np.subtract(block.merged, block.total, out=lost, dtype=np.float32, casting="same_kind")
        else:
            np.subtract(block.numbers(block.merged), block.W, out=lost, dtype=np.float32, casting="same_kind")
            lost -= D
        return D, lost

    def _add_projected_loss(self, block: MergedBlock, lost: Singles) -> None:
        """Add the part of the loss that lies in the input directions of the update."""
        if self._V is None:
            return
        if self.slab.transposed:  # rows are inputs, so the loss of an output is complete only after the last block
            first = block.start - self.slab.start
            projected = self._V[first : first + len(lost)].T @ lost
            self._inside = projected if not self._inside.size else self._inside + projected
            return
        projected = np.dot(lost, self._V)
        self.inside += _dot(projected, projected)

    def fidelity(self) -> Fidelity:
        """The fidelity of all rows together."""
        norm = sqrt(self.D_D)
        s = self._singular_values()
        # The rounding error of one entry as it was measured, instead of the predicted one.
        noise = sqrt(self.lost / max(self.seen, 1))
        inside = self.inside + _dot(self._inside, self._inside)
        return Fidelity(
            self.slab.module,
            1 + self.along / self.D_D if norm else 1.0,
            sqrt(self.lost) / norm if norm else 0.0,
            None if self._V is None else sqrt(inside) / norm if norm else 0.0,
            self.still / max(self.seen, 1),
            *self._prediction.result(norm),
            int(np.count_nonzero(s)),
            survivors(s, noise, self.slab.terms[0][1].shape),
            norm,
            self.seen,
            self.overflowed,
        )

    def _singular_values(self) -> NDArray[np.float64]:
        """The singular values of D, from the factors of all pairs side by side; none if an update is not a pair."""
        terms = self.slab.terms
        if not all(isinstance(update, LowRank) for _, update in terms):
            return np.zeros(0)
        B = np.hstack([strength * update.scale * update.B.astype(np.float64) for strength, update in terms])
        A = np.vstack([update.A.astype(np.float64) for _, update in terms])
        return product_singular_values(B, A)


def _count_equal(merged: Array, before: Array) -> int:
    """Number of entries that kept their value. Within one dtype bits are compared, which is much faster."""
    if merged.dtype == before.dtype:
        return int(np.count_nonzero(bits(merged) == bits(before)))
    return int(np.count_nonzero(merged.astype(np.float64) == before.astype(np.float64)))


def _dot(x: Array, y: Array) -> float:
    return float(np.dot(x.ravel(), y.ravel()))
