"""The factors of DoRA, which scale the vectors of W + D to the trained lengths."""

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from loralens.core.weights import add_squares, round_lengths
from loralens.linalg.exact import Singles
from loralens.merging.matrix import MatrixRows
from loralens.merging.plan import Axis, Magnitude
from loralens.merging.update import UpdateMatrix, row_ranges


@final
@dataclass(frozen=True, slots=True)
class DoraFactors:
    """A float32 vector g along the rows or the columns of a slab as stored."""

    values: Singles
    axis: Axis

    def of(self, start: int, stop: int) -> Singles:
        """The factors of rows ``start`` to ``stop`` of the slab, in a shape that broadcasts with the rows."""
        return self.values[start:stop, None] if self.axis == "rows" else self.values


def compute_dora_factors(
    magnitude: Magnitude, D: UpdateMatrix, source: MatrixRows, scale: MatrixRows | None, start: int
) -> DoraFactors:
    """The factors g = m / ‖W + D‖, with norms in float64 over the other axis; 0 where the vector is 0.

    If m has one number for several adjacent columns (the kernel of an input channel of a convolution), the norm is
    taken over all of these columns, and all of them get the same factor.

    Parameters
    ----------
    magnitude : Magnitude
        m. If m is the length of the base, it is rounded to the dtype of 16-bit weights, as PEFT rounds it.
    D : UpdateMatrix
        The update of the slab.
    source, scale : MatrixRows
        The stored tensor, and the scales if it is float8 with scales.
    start : int
        First row of the slab in the tensor.
    """
    by_row = magnitude.axis == "rows"
    squares: NDArray[np.float64] = np.zeros(D.shape[0 if by_row else 1])
    before, dtype = np.zeros_like(squares), np.dtype(np.float32)
    for first, last in row_ranges(*D.shape):
        stored = source.rows(start + first, start + last)
        # float64, since these squares are summed over a whole side of the weight.
        W, dtype = stored.astype(np.float64), stored.dtype
        if scale:
            W *= scale.rows(start + first, start + last)
        # The norms of the base are computed in the same pass, if they are needed.
        own = [(W, before)] if magnitude.lengths is None else []
        for X, sums in [(W + D.rows(first, last), squares), *own]:
            add_squares(sums, X, slice(first, last) if by_row else None)
    lengths = round_lengths(before, dtype) if magnitude.lengths is None else magnitude.lengths.read().astype(np.float64)
    # 1, except for the magnitude of a convolution's input channels, each of which has several columns.
    width = len(squares) // len(lengths)
    norms = np.sqrt(squares.reshape(-1, width).sum(axis=1))
    # A vector of length 0 has no direction in which it could get another length.
    factors = np.divide(lengths, norms, out=np.zeros_like(norms), where=norms > 0)
    return DoraFactors(np.repeat(factors, width).astype(np.float32), magnitude.axis)
