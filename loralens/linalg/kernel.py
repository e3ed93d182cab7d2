"""The loop of ``kernel.c`` for NumPy arrays: two products with one pass over a big matrix."""

from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

try:
    compiled: ModuleType | None = import_module("loralens.linalg._kernel")
except ImportError:  # there was no compiler
    compiled = None

Array = NDArray[Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# The loop takes a multiple of so many columns of W and columns of X, and so many rows of W at a time.
SPAN, PART, PANEL = 32, 16, 16


@cache
def can_multiply_twice() -> bool:
    """Whether `multiply_rows_twice` does its work on this processor."""
    if compiled is None:
        return False
    nothing, Z = np.empty((0, PART), np.float32), np.zeros((SPAN, PART), np.float32)
    return bool(compiled.multiply_twice(nothing, False, 0, SPAN, Z, PART, nothing, Z.copy()))


def pad_columns(X: Array) -> NDArray[np.float32]:
    """X (n, b) as `multiply_rows_twice` needs it: parts of 16 columns, with zeros below and beside those of X."""
    n, b = X.shape
    padded = np.zeros((-(-b // PART), -(-n // SPAN) * SPAN, PART), np.float32)
    for part, columns in zip(padded, range(0, b, PART), strict=True):
        part[:n, : b - columns] = X[:, columns : columns + PART]
    return padded


def join_parts(Z: NDArray[np.float32], n: int, b: int) -> NDArray[np.float32]:
    """The columns of `pad_columns`, as rows (b, n)."""
    return Z.transpose(0, 2, 1).reshape(-1, Z.shape[1])[:b, :n]


def multiply_rows_twice(W: Array, X: NDArray[np.float32], Y: NDArray[np.float32], Z: NDArray[np.float32]) -> None:
    """Write W X into Y and add WᵀY to Z, for some rows W in bfloat16 or float32; only where `can_multiply_twice`.

    X and Z have the shape of `pad_columns`, and Y has as many columns as all their parts.
    """
    assert compiled is not None
    is_half = W.dtype == BFLOAT16
    # The buffer of a bfloat16 array has no format that C knows.
    compiled.multiply_twice(W.view(np.uint16) if is_half else W, is_half, *W.shape, X, Y.shape[1], Y, Z)
