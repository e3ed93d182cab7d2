"""DoRA's gain: what W + D is multiplied by, so that its vectors get the lengths that were trained."""

from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from loralens.core.weights import as_made
from loralens.linalg.exact import Singles
from loralens.merging.matrix import MatrixRows
from loralens.merging.plan import Axis, Magnitude
from loralens.merging.update import Rows, row_blocks


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
        m; where it is the length of the base, rounded to the dtype of 16-bit weights as PEFT rounds it.
    D : Rows
        The update of the slab.
    source, scale : MatrixRows
        The stored tensor, and what float8 numbers in it are multiplied by.
    start : int
        First row of the slab in them.
    """
    by_row = magnitude.axis == "rows"
    squares: NDArray[np.float64] = np.zeros(D.shape[0 if by_row else 1])
    before, dtype = np.zeros_like(squares), np.dtype(np.float32)
    for first, last in row_blocks(*D.shape):
        stored = source.rows(start + first, start + last)
        W, dtype = stored.astype(np.float64), stored.dtype
        if scale:
            W *= scale.rows(start + first, start + last)
        own = [(W, before)] if magnitude.lengths is None else []
        for X, sums in [(W + D.rows(first, last), squares), *own]:
            if by_row:
                sums[first:last] = np.einsum("ij,ij->i", X, X)
            else:
                sums += np.einsum("ij,ij->j", X, X)
    lengths = as_made(before, dtype) if magnitude.lengths is None else magnitude.lengths.read().astype(np.float64)
    width = len(squares) // len(lengths)
    norms = np.sqrt(squares.reshape(-1, width).sum(axis=1))
    gains = np.divide(lengths, norms, out=np.zeros_like(norms), where=norms > 0)
    return Gain(np.repeat(gains, width).astype(np.float32), magnitude.axis)
