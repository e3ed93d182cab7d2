"""DoRA's gain: what W + D is multiplied by, so that its vectors get the lengths that were trained."""

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from loralens.linalg.exact import Singles
from loralens.merge.matrix import MatrixRows
from loralens.merge.plan import Axis, Magnitude
from loralens.merge.update import Rows, row_blocks


@final
@dataclass(frozen=True, slots=True)
class Gain:
    """A float32 vector g along the rows or the columns of a slab as stored."""

    values: Singles
    axis: Axis

    def of(self, start: int, stop: int) -> Singles:
        """What rows ``start`` to ``stop`` of the slab are multiplied by, in a shape that goes with theirs."""
        return self.values[start:stop, None] if self.axis == "rows" else self.values


def gain_of(magnitude: Magnitude, D: Rows, source: MatrixRows, scale: MatrixRows | None, start: int) -> Gain:
    """The gain g = m / ‖W + D‖, norms in float64 over the other axis; 0 where the vector is 0.

    Where m has one number for several neighbouring columns, the kernel of a convolution's input channel, the norm is
    that of all of them, and all get its gain.

    Parameters
    ----------
    magnitude : Magnitude
        m.
    D : Rows
        The update of the slab.
    source, scale : MatrixRows
        The stored tensor, and what float8 numbers in it are multiplied by.
    start : int
        First row of the slab in them.
    """
    by_row = magnitude.axis == "rows"
    squares: NDArray[np.float64] = np.zeros(D.shape[0 if by_row else 1])
    for first, last in row_blocks(*D.shape):
        W = source.rows(start + first, start + last).astype(np.float64)
        if scale:
            W *= scale.rows(start + first, start + last)
        total = W + D.rows(first, last)
        if by_row:
            squares[first:last] = np.einsum("ij,ij->i", total, total)
        else:
            squares += np.einsum("ij,ij->j", total, total)
    lengths = magnitude.lengths.read().astype(np.float64)
    width = len(squares) // len(lengths)
    norms = np.sqrt(squares.reshape(-1, width).sum(axis=1))
    gains = np.divide(lengths, norms, out=np.zeros_like(norms), where=norms > 0)
    return Gain(np.repeat(gains, width).astype(np.float32), magnitude.axis)
