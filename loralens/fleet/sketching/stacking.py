"""One factor of several small modules as rows of float64 in one array, with what is measured of it at once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from loralens.core.lazy import Array
from loralens.linalg.factor import Floats


class StackedRows(NamedTuple):
    """One factor of several modules of one shape and rank."""

    rows: Floats  # (modules, rank, size)
    grams: Floats  # (modules, rank, rank): their inner products
    peaks: Floats  # (modules, rank): the largest absolute value of each row; NaN if the row holds NaN


def stack(factors: Sequence[Array], scales: Sequence[float] | None) -> StackedRows:
    """The columns of every B, shape (size, rank), times its scale, or without scales the rows of every A, (rank, size).

    All factors have one shape and any float dtypes.
    """
    rank, size = factors[0].shape if scales is None else factors[0].shape[::-1]
    rows = np.empty((len(factors), rank, size))
    for i, factor in enumerate(factors):
        rows[i] = factor if scales is None else factor.T
        if scales is not None:
            rows[i] *= scales[i]
    return StackedRows(rows, np.matmul(rows, np.swapaxes(rows, 1, 2)), peaks_of(rows))


def peaks_of(rows: Array) -> Array:
    """The largest absolute value of every row, over the last axis; NaN if the row holds NaN."""
    return np.asarray(np.abs(rows).max(axis=-1, initial=0))
