"""The arithmetic of merging and unmerging for each entry: W' = round(W + D) and R = round(W' − D).

D is float32 (`loralens.merging.update`) and is never rounded to the dtype of the weight on its own. The sum is computed
in float32 and rounded to the stored dtype. For float32 weights this is one rounding. For bf16, f16 and fp8 it is a
double rounding, with an error of at most 0.5 + 2⁻¹⁴ units in the last place for f16, and less for the others. float64
weights are added in float64. With DoRA's factors g the result is round(g·(W + D)).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
from numpy.typing import DTypeLike

from loralens.choices import RoundingMode
from loralens.core.lazy import Array
from loralens.linalg.exact import Singles
from loralens.linalg.rounding import STEPS, Draws, other_neighbour, round_to_dtype

# Dtypes in which a trained update is far above the unit in the last place, so they are always rounded to the nearest.
WIDE = (np.dtype(np.float32), np.dtype(np.float64))
PART = 1 << 16  # numbers that are converted, added and rounded together: 256 KiB in float32 stay in the cache of a core


@final
@dataclass(frozen=True, slots=True)
class MergeRounding:
    """How sums are rounded to the stored dtype.

    Attributes
    ----------
    mode : str
        ``nearest``: ties go to even. ``stochastic``: up or down with the probability that makes the mean exact.
        ``feedback``: to the nearest, after sums are corrected by earlier losses (`loralens.merging.feedback`).
    key : str
        The key of the tensor. Every tensor has random numbers of its own.
    offset : int
        Index of the first entry. A random number belongs to an entry, so it does not depend on the division in blocks.
    """

    mode: RoundingMode = "nearest"
    seed: int = 0
    key: str = ""
    offset: int = 0

    def at(self, offset: int) -> "MergeRounding":
        """The same rounding, starting at another entry."""
        return replace(self, offset=offset)

    def draws(self, count: int) -> Singles:
        """Uniform random numbers in [0, 1), multiples of 2⁻¹⁶, for ``count`` entries from the offset (Philox 4×64)."""
        # 16 bits are enough: rounding to bf16 drops exactly 16 bits of a float32.
        words = Draws.named(self.seed, self.key).words(self.offset, count)
        return words.astype(np.float32) * np.float32(1 / STEPS)


def slices_for(dtype: DTypeLike) -> int:
    """Number of slices of the exact product for a weight of this dtype: 2 for float32 and wider, else 1."""
    return 2 if np.dtype(dtype) in WIDE else 1


def merge_entries(
    W: Array,
    D: Singles,
    dtype: DTypeLike,
    *,
    dora_factors: Singles | None = None,
    rounding: MergeRounding | None = None,
) -> Array:
    """W' = round(g·(W + D)) in ``dtype``; D (float32) has the shape of W, and g is 1 if there are no factors of DoRA.

    Overflow gives ±inf as in IEEE arithmetic, but in fp8 it gives the largest number.
    """
    return round_sums(add_update(W, D, dora_factors=dora_factors), dtype, rounding=rounding)


def subtract_update(
    merged: Array, D: Singles, dtype: DTypeLike, *, dora_factors: Singles | None = None, out: Singles | None = None
) -> Array:
    """R = round(W'/g − D) in ``dtype``: it is W unless several W are rounded to the same W'; ``out`` is a buffer."""
    if dora_factors is None and _rounds_in_parts(merged, dtype):
        rows = _part_rows(merged)
        part = np.empty((rows, *merged.shape[1:]), np.float32) if out is None else out[:rows]
        return _round_in_parts(np.subtract, merged, D, np.dtype(dtype), part)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if dora_factors is None:
            total = _in_wide(np.subtract, merged, D, out)
        else:
            # W' = g·(W + D), so g is taken out before D.
            total = _in_wide(np.divide, merged, dora_factors, out)
            total -= D
    return round_sums(total, dtype)


def add_and_round(W: Array, D: Singles, dtype: DTypeLike, *, out: Singles) -> tuple[Array, Array]:
    """W + D as by `add_update`, in ``out`` (float32) if the dtype fits, and the sums rounded to the nearest number."""
    if _rounds_in_parts(W, dtype):
        return out, _round_in_parts(np.add, W, D, np.dtype(dtype), out)
    total = add_update(W, D, out=out)
    return total, round_sums(total, dtype)


def add_update(W: Array, D: Singles, *, dora_factors: Singles | None = None, out: Singles | None = None) -> Array:
    """g·(W + D) in float32, or in float64 for float64 weights; in ``out`` (float32) if the dtype fits."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = _in_wide(np.add, W, D, out)
        if dora_factors is not None:
            total *= dora_factors
    return total


def round_sums(total: Array, dtype: DTypeLike, *, rounding: MergeRounding | None = None) -> Array:
    """Round sums to ``dtype``. The result is a new array, or ``total`` itself if it has this dtype."""
    dtype = np.dtype(dtype)
    # Feedback rounds to the nearest too; it corrects the sums before this call.
    nearest = round_to_dtype(total, dtype)
    if not rounding or rounding.mode != "stochastic" or dtype in WIDE:
        return nearest
    other, _, _, share = other_neighbour(total, nearest)
    return np.where(rounding.draws(total.size).reshape(total.shape) < share, other, nearest)


def _rounds_in_parts(W: Array, dtype: DTypeLike) -> bool:
    """Whether sums of float32 are rounded to 16 bits, which needs no limits as one byte does."""
    return np.dtype(dtype).itemsize == 2 and W.dtype.itemsize <= 4


def _part_rows(W: Array) -> int:
    """The number of rows in a part."""
    return max(1, PART * len(W) // max(1, W.size))


def row_parts(W: Array) -> Iterator[slice]:
    """Ranges of rows of W, each of which fits into the cache of a core together with what is computed from it."""
    rows = _part_rows(W)
    return (slice(first, first + rows) for first in range(0, len(W), rows))


def _round_in_parts(operation: np.ufunc, W: Array, D: Singles, dtype: np.dtype[Any], out: Singles) -> Array:
    """The operation in float32, rounded to a dtype of 16 bits; ``out`` has all rows of W, or those of a part."""
    rounded = np.empty(W.shape, dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        for part in row_parts(W):
            total = out[part] if len(out) == len(W) else out[: len(W[part])]
            _in_wide(operation, W[part], D[part], total)
            # As `astype` does it; 16 bits have an infinity for what is too large.
            np.copyto(rounded[part], total, casting="unsafe")
    return rounded


def _in_wide(operation: np.ufunc, W: Array, other: Singles, out: Singles | None) -> Array:
    """The operation in float32, or in float64 for float64 weights; in ``out`` if the dtype fits."""
    wide = np.result_type(W.dtype, np.float32)
    # Buffers are float32, and float64 weights get a new array.
    total: Array = np.empty(W.shape, wide) if out is None or out.dtype != wide else out
    if W.dtype != wide:
        # Quicker than to convert within the operation, for which NumPy goes through small buffers.
        np.copyto(total, W)
        W = total
    operation(W, other, out=total)
    return total
