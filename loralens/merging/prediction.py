"""Prediction of the fidelity of a merge from W and D, without rounding the whole weight.

It is computed during a merge, block by block, from what is in memory then. Before a merge, the doctor predicts the
same quantities from a sample of both files (`loralens.linalg.rounding.sampled_rounding`).
"""

from math import sqrt
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array
from loralens.linalg.rounding import rounding_losses
from loralens.merging.apply import MergedBlock, TensorMerge

# With this many entries the prediction is accurate to 1 % (see the class).
SAMPLE = 1 << 19  # entries of a module that are sampled; smaller modules are used completely
Floats = NDArray[np.float64]


class _Losses(NamedTuple):
    """The loss e = D − q and D at some entries, both 0 where the loss is not finite, and counts of entries."""

    lost: Floats
    d: Floats
    finite: int
    still: int  # with q = 0


@final
class Prediction:
    """Sums in float64 over the entries of a slab, or over a uniform sample of them.

    An entry of D arrives as q = round(W + D) − W, and e = D − q is lost. If every entry is used, this is what the merge
    loses; of a sample of `SAMPLE` it is within 1 %. Stochastic rounding has no bias, and per entry the variance
    s²p(1 − p), where s is the distance of the two neighbours of W + D and p the probability of one of them. Error
    feedback is not predicted, because its losses depend on all earlier columns.

    In a sample, D² is a control variate: the means of e² and e·D are corrected by the error of the sampled mean of D²,
    times their regression on D².

    Parameters
    ----------
    merge : TensorMerge
    size : int
        Number of entries of the slab.
    """

    __slots__ = ("_count", "_dtype", "_mode", "_rng", "_size", "_still", "_sums")

    def __init__(self, merge: TensorMerge, size: int) -> None:
        self._mode, self._dtype, self._size = merge.rounding.mode, merge.dtype, size
        # A fixed seed, so that the same merge predicts the same numbers.
        self._rng = None if size <= SAMPLE else np.random.default_rng(0)
        self._count = self._still = 0
        self._sums: Floats = np.zeros(6)  # of d², d⁴, e², e²d², e·d, e·d·d²

    def take(self, block: MergedBlock, D: Array) -> None:
        """Add the next rows, with their D in float32 or float64."""
        # The losses of error feedback depend on all earlier columns, so a sample says nothing about them.
        if self._mode == "feedback":
            return
        lost, d, finite, still = self._predict(block, D)
        self._still += still
        self._count += finite
        squares, along, control = lost * lost, lost * d, d * d
        if self._mode == "stochastic":
            squares = lost  # under stochastic rounding `lost` is the variance
        self._sums += [control.sum(), control @ control, squares.sum(), squares @ control, along.sum(), along @ control]

    def _predict(self, block: MergedBlock, D: Array) -> _Losses:
        """The losses at the sampled entries of a block; what is not finite is 0, and is not counted."""
        sample = None
        if self._rng is not None:
            # Each block gives its share of the sample, rounded up.
            sample = self._rng.integers(D.size, size=-(-SAMPLE * D.size // self._size))
        w, d, unit = self._sample_entries(block, D, sample)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            lost, still = self._losses(w, d, unit)
            finite = np.isfinite(lost) & np.isfinite(d)
            count = int(np.count_nonzero(finite))
            if count < finite.size:
                lost, d, still = np.where(finite, lost, 0), np.where(finite, d, 0), still & finite
        lost, d = lost.astype(np.float64, copy=False), d.astype(np.float64, copy=False)
        return _Losses(lost, d, count, int(np.count_nonzero(still)))

    def _sample_entries(
        self, block: MergedBlock, D: Array, sample: NDArray[np.int64] | None
    ) -> tuple[Array, Array, Array | None]:
        """W, D and the float8 scale at the entries of a sample, or at all entries of a block."""
        arrays = (block.W, D, block.scale)
        flat = [None if array is None else np.ascontiguousarray(array).reshape(-1) for array in arrays]
        if sample is not None:
            flat = [None if array is None else array.take(sample) for array in flat]
        w, d, unit = flat
        assert w is not None
        assert d is not None
        return w, d, unit

    def _losses(self, w: Array, d: Array, unit: Array | None) -> tuple[Array, Array]:
        """The loss e = D − q at every entry (under stochastic rounding, the variance of q), and where nothing moves."""
        drawn = self._mode == "stochastic"
        total = np.add(w, d, dtype=np.result_type(w.dtype, np.float32))
        factor = None if unit is None else unit.astype(np.float64)
        total = total if factor is None else (total / factor).astype(np.float32)
        wide = w.astype(np.float64), d.astype(np.float64)
        squares, lost, still = rounding_losses(total, *wide, factor, self._dtype, stochastic=drawn)
        # An entry that may move counts as moved.
        return (squares, d == 0) if drawn else (lost, still == 1)

    def result(self, norm: float) -> tuple[float | None, float | None, float | None]:
        """Expected gain, relative error and share of unmoved weights; ``norm`` is ‖D‖_F.

        All are None under error feedback. The share is None under stochastic rounding.
        """
        if self._mode == "feedback":
            return None, None, None
        drawn = self._mode == "stochastic"
        # Under stochastic rounding whether a weight moves is a matter of chance.
        still = None if drawn else self._still / max(self._count, 1)
        square = norm**2 / self._size
        # An update of 0 arrives in full.
        if not (square and self._count):
            return 1.0, 0.0, still
        d2, d4, e2, e2d2, ed, ed3 = self._sums / self._count
        squares, along = _controlled_mean(e2, e2d2, d2, d4, square), _controlled_mean(ed, ed3, d2, d4, square)
        return 1.0 if drawn else 1 - along / square, sqrt(max(squares, 0.0) / square), still


def _controlled_mean(x: float, xd: float, d: float, dd: float, true_mean: float) -> float:
    """The mean of x, corrected by its regression on d, whose true mean is known; from the means of x, x·d, d and d²."""
    variance = dd - d * d
    return x + (xd - x * d) / variance * (true_mean - d) if variance > 0 else x
