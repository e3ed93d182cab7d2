"""W' = round(W + D) and R = round(W' − D): what merging and unmerging do to every entry.

D is float32 (`loralens.merging.update`), never rounded to the dtype of the weight by itself. The sum is made in float32
and rounded to the stored dtype: for float32 that is one rounding; for bf16, f16 and fp8 it is a double one, at most
0.5 + 2⁻¹⁶ units in the last place. float64 weights are added in float64. With DoRA's gain g it is round(g·(W + D)).
"""

from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any, Literal, final

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from loralens.core.lazy import Array
from loralens.linalg.exact import Singles

Mode = Literal["nearest", "stochastic", "feedback"]

WIDE = (np.dtype(np.float32), np.dtype(np.float64))
DRAWS = 16  # numbers of 16 bits that one step of the counter gives


@final
@dataclass(frozen=True, slots=True)
class Rounding:
    """How sums are rounded to the stored dtype.

    Attributes
    ----------
    mode : str
        ``nearest``, ties to even; ``stochastic``: up or down with the probability that makes the mean exact; or
        ``feedback``: to the nearest, of sums corrected by what was lost before (`loralens.merging.feedback`).
    seed : int
    key : str
        Of the tensor: each has its own random numbers.
    offset : int
        Number of the first entry. A draw belongs to an entry, however the tensor is cut.
    """

    mode: Mode = "nearest"
    seed: int = 0
    key: str = ""
    offset: int = 0

    def at(self, offset: int) -> "Rounding":
        """The same from another entry on."""
        return replace(self, offset=offset)

    def draws(self, count: int) -> Singles:
        """Uniform numbers in [0, 1), multiples of 2⁻¹⁶, for the next entries: Philox 4×64, 16 of them a step."""
        key = int.from_bytes(sha256(f"{self.seed}:{self.key}".encode()).digest()[:16], "little")
        first, skipped = divmod(self.offset, DRAWS)
        engine = np.random.Philox(key=key, counter=first)
        words = engine.random_raw(4 * -(-(skipped + count) // DRAWS)).astype("<u8").view("<u2")
        return words[skipped : skipped + count].astype(np.float32) * np.float32(2.0**-16)


def slices_for(dtype: DTypeLike) -> int:
    """How many slices of the exact product a weight of this dtype deserves: 2 where it is float32 or wider."""
    return 2 if np.dtype(dtype) in WIDE else 1


def added(
    W: Array, D: Singles, dtype: DTypeLike, *, gain: Singles | None = None, rounding: Rounding | None = None
) -> Array:
    """W' = round(g·(W + D)) in ``dtype``; D (float32) of the shape of W, g = 1 where there is none.

    Overflow becomes ±inf as IEEE says, but in fp8 the largest number.
    """
    return rounded(summed(W, D, gain=gain), dtype, rounding=rounding)


def removed(
    merged: Array, D: Singles, dtype: DTypeLike, *, gain: Singles | None = None, out: Singles | None = None
) -> Array:
    """R = round(W'/g − D) in ``dtype``: W itself, except where rounding gave two W one W'; worked out in ``out``."""
    wide = np.result_type(merged.dtype, np.float32)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if gain is None:
            total = np.subtract(merged, D, out=_fitting(out, wide), dtype=wide)
        else:
            total = np.divide(merged, gain, out=_fitting(out, wide), dtype=wide)
            total -= D
    return rounded(total, dtype)


def summed(W: Array, D: Singles, *, gain: Singles | None = None, out: Singles | None = None) -> Array:
    """g·(W + D) in float32, or in float64 for float64 weights; into ``out`` (float32) where that fits."""
    wide = np.result_type(W.dtype, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        total: Array = np.add(W, D, out=_fitting(out, wide), dtype=wide)
        if gain is not None:
            total *= gain
    return total


def rounded(total: Array, dtype: DTypeLike, *, rounding: Rounding | None = None) -> Array:
    """Wide numbers in ``dtype``: a new array, or ``total`` itself where it has that dtype."""
    dtype = np.dtype(dtype)
    if rounding and rounding.mode == "stochastic" and dtype not in WIDE:
        return _drawn(total, dtype, rounding)
    return _nearest(total, dtype)


def _fitting(out: Singles | None, dtype: np.dtype[Any]) -> Singles | None:
    return out if out is not None and out.dtype == dtype else None


def _nearest(total: Array, dtype: np.dtype[Any]) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype.itemsize == 1:
            limit = largest(dtype)
            total = np.clip(total, -limit, limit)  # NaN stays
        return total.astype(dtype, copy=False)


def largest(dtype: np.dtype[np.generic]) -> float:
    """The largest finite number of a dtype."""
    return float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


def _drawn(total: Array, dtype: np.dtype[Any], rounding: Rounding) -> Array:
    """Each entry on one of its two neighbours, the nearer one the likelier."""
    nearest = _nearest(total, dtype)
    limit = largest(nearest.dtype)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        error = total - nearest.astype(total.dtype)
        beyond = np.where(error > 0, limit, -limit).astype(nearest.dtype)
        other = np.nextafter(nearest, beyond)
        step = np.abs(other.astype(total.dtype) - nearest.astype(total.dtype))
        share = np.where((error != 0) & np.isfinite(step), np.abs(error) / step, 0)
    drawn = rounding.draws(total.size).reshape(total.shape)
    return np.where(drawn < share, other, nearest)
