"""W' = round(W + D) and R = round(W' − D): what merging and unmerging do to every entry.

D is float32 (`loralens.merge.update`), never rounded to the dtype of the weight by itself. The sum is made in float32
and rounded to the stored dtype: for float32 that is one rounding; for bf16, f16 and fp8 it is a double one, at most
0.5 + 2⁻¹⁶ units in the last place. float64 weights are added in float64.
"""

import numpy as np
from numpy.typing import DTypeLike

from loralens.core.lazy import Array
from loralens.linalg.exact import Singles

WIDE = (np.dtype(np.float32), np.dtype(np.float64))


def slices_for(dtype: DTypeLike) -> int:
    """How many slices of the exact product a weight of this dtype deserves: 2 where it is float32 or wider."""
    return 2 if np.dtype(dtype) in WIDE else 1


def added(W: Array, D: Singles, dtype: DTypeLike) -> Array:
    """W' = round(W + D) in ``dtype``; D (float32) of the shape of W. Overflow becomes ±inf as IEEE says, but for fp8,
    whose largest number stands for what lies beyond.
    """
    return _rounded(_wide(W) + D, dtype)


def removed(merged: Array, D: Singles, dtype: DTypeLike) -> Array:
    """R = round(W' − D) in ``dtype``: W itself, except where rounding gave two W one W'."""
    return _rounded(_wide(merged) - D, dtype)


def _wide(W: Array) -> Array:
    return W if W.dtype in WIDE else W.astype(np.float32)


def _rounded(total: Array, dtype: DTypeLike) -> Array:
    import ml_dtypes

    dtype = np.dtype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype.itemsize == 1:
            limit = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
            total = np.clip(total, -limit, limit)  # NaN stays
        return total.astype(dtype, copy=False)
