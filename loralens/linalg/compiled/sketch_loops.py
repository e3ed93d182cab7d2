"""The loops of ``kernel.c`` for sketches of many small pairs, as those of `loralens.linalg.compiled.loops`.

Each function returns None where the kernel does not do its work. What it computes has the bits of NumPy, except for the
last bits of Gram matrices and of `sum_of_squares`. Of float16, −0 becomes 0, and all NaN get the same bits. No sketch
shows either: it is made of sums of integers, and an update with NaN has none.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loralens.linalg.compiled.loops import BFLOAT16, kernel

Array = NDArray[Any]

KINDS = {BFLOAT16: 0, np.dtype(np.float16): 1, np.dtype(np.float32): 2}
MOST_RANKS = 16  # rank up to which the kernel stacks rows


class StackedRows(NamedTuple):
    """One factor of several modules of one shape and rank.

    Attributes
    ----------
    rows : float64 array, shape (modules, rank, size)
        The columns of scale·B, or the rows of A.
    grams : float64 array, shape (modules, rank, rank)
        Their inner products.
    peaks : float64 array, shape (modules, rank)
        The largest absolute value of each row; NaN if the row holds NaN.
    """

    rows: NDArray[np.float64]
    grams: NDArray[np.float64]
    peaks: NDArray[np.float64]


def stack_factors(factors: Sequence[Array], scales: Sequence[float] | None) -> StackedRows | None:
    """The columns of every B, shape (size, rank), times its scale, or without scales the rows of every A, (rank, size).

    In one call threads wait less often for Python's lock. None if it was not computed.
    """
    compiled, dtype = kernel(), factors[0].dtype
    size, rank = factors[0].shape if scales is not None else factors[0].shape[::-1]
    if compiled is None or dtype not in KINDS or not 0 < rank <= MOST_RANKS or not size:
        return None
    if any(factor.dtype != dtype or not (factor.flags.c_contiguous and factor.flags.aligned) for factor in factors):
        return None
    count = len(factors)
    stacked = StackedRows(np.empty((count, rank, size)), np.empty((count, rank, rank)), np.empty((count, rank)))
    numbers = [factor.view(np.uint16) for factor in factors] if dtype == BFLOAT16 else list(factors)
    by = np.ones(count) if scales is None else np.array(scales, np.float64)
    compiled.stack_factors(numbers, KINDS[dtype], rank, size, scales is not None, by, *stacked)
    return stacked


class SketchSide(NamedTuple):
    """One side of modules of one shape and rank, whose rows become count-sketches.

    Attributes
    ----------
    numbers : float64 array, shape (modules, rank, size)
        The rows; each is multiplied by its factor and rounded to integers before it is added up.
    factors : float64 array, shape (modules, rank)
    positions : integers, shape (modules, size)
        The buckets of the numbers, from 0 to 4095.
    signs : float64 array, shape (modules, size)
    """

    numbers: NDArray[np.float64]
    factors: NDArray[np.float64]
    positions: NDArray[np.intp]
    signs: NDArray[np.float64]


BUCKETS = 4096  # numbers of a count-sketch


def sum_of_squares(B: SketchSide, A: SketchSide) -> NDArray[np.complex128] | None:
    """The sum of the squares of the transforms of z = b + i·a over all rows; None if it was not computed.

    b and a are the count-sketches of a row of B and of that of A, and the transform is that of `numpy.fft.fft`. Its
    last bits depend on the processor.
    """
    compiled = kernel()
    if compiled is None:
        return None
    rank, total = B.numbers.shape[1], np.empty(BUCKETS, np.complex128)
    compiled.convolve(*map(np.ascontiguousarray, (*B, *A)), rank, _turns(), total)
    return total[_transformed_order()]


@cache
def _turns() -> NDArray[np.complex128]:
    """The roots of one by which the kernel multiplies."""
    turns: NDArray[np.complex128] = np.exp(-2j * np.pi / BUCKETS * np.arange(BUCKETS))
    return turns


@cache
def _transformed_order() -> NDArray[np.intp]:
    """Where the kernel leaves each number of a transform: at the number whose digits to the base 8 are reversed."""
    return np.arange(BUCKETS).reshape((8,) * 4).transpose().ravel()
