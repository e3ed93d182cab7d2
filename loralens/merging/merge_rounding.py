"""The arithmetic of merging and unmerging for each entry: W' = round(W + D) and R = round(W' − D).

D is float32 (`merge_plan`) and is never rounded to the dtype of the weight on its own. The sum is computed
in float32 and rounded to the stored dtype. For float32 weights this is one rounding. For bf16, f16 and fp8 it is a
double rounding, with an error of at most 0.5 + 2⁻¹⁴ units in the last place for f16, and less for the others. float64
weights are added in float64. With DoRA's factors g the result is round(g·(W + D)).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from loralens.choices import RoundingMode
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.linalg.exact import Singles
from loralens.linalg.rounding import STEPS, Draws, other_neighbour, round_to_dtype
from loralens.merging.merge_plan import Weighted

# Dtypes in which a trained update is far above the unit in the last place, so they are always rounded to the nearest.
WIDE = (np.dtype(np.float32), np.dtype(np.float64))


@final
@dataclass(frozen=True, slots=True)
class MergeRounding:
    """How sums are rounded to the stored dtype.

    Attributes
    ----------
    mode : str
        ``nearest``: ties go to even. ``stochastic``: up or down with the probability that makes the mean exact.
        ``feedback``: to the nearest, after sums are corrected by earlier losses (`loralens.merging.merge_rounding`).
    key : str
        The key of the tensor. Every tensor has random numbers of its own.
    offset : int
        Index of the first entry. A random number belongs to an entry, so it does not depend on the division in blocks.
    """

    mode: RoundingMode = "nearest"
    seed: int = 0
    key: str = ""
    offset: int = 0

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
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        if dora_factors is None:
            total = _in_wide(np.subtract, merged, D, out)
        else:
            # W' = g·(W + D), so g is taken out before D.
            total = _in_wide(np.divide, merged, dora_factors, out)
            total -= D
    return round_sums(total, dtype)


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


# Weaker directions are rounding noise of float32, in which the correction is computed.
WEAKEST = 1e-6  # smallest singular value of A, relative to the largest, whose direction is used
# λ limits the corrections of the last inputs, after which no input is left that could make up for an error.
DAMPING = 1e-3  # λ; a direction counts as used up when the remaining inputs hold less than this share of it


@final
class Feedback:
    """The rounding of one segment with error feedback, block by block in the order of its rows.

    Parameters
    ----------
    V : float64 array, shape (in, r)
        Orthonormal input directions (`input_directions`).
    transposed : bool
        Whether the segment is stored (in, out). Its rows are then the inputs, and blocks pass the error on.
    """

    def __init__(self, V: NDArray[np.float64], *, transposed: bool) -> None:
        self._V, self._G = V.astype(np.float32), corrections(V).astype(np.float32)
        self._transposed = transposed
        self._E: Singles | None = None

    def round_rows(self, total: Array, first: int, dtype: np.dtype[Any]) -> Array:
        """Round the rows of t = g·(W + D) (float32) from row ``first`` on to ``dtype``."""
        # Each row is an output. It has all inputs, so no error is passed on to the next rows. The inputs are processed
        # one by one, so they are put into rows, which are contiguous.
        if not self._transposed:
            return np.ascontiguousarray(self._inputs(np.ascontiguousarray(total.T), 0, None, dtype)[0].T)
        merged, self._E = self._inputs(total, first, self._E if first else None, dtype)
        return merged

    def _inputs(self, t: Array, first: int, E: Singles | None, dtype: np.dtype[Any]) -> tuple[Array, Singles]:
        """The inputs of t (inputs, outputs) from ``first`` on, rounded to ``dtype``, and the new error (r, outputs)."""
        merged = np.empty(t.shape, dtype)
        if E is None:
            E = np.zeros((self._V.shape[1], t.shape[1]), np.float32)
        with np.errstate(invalid="ignore", over="ignore"):
            for j, row in enumerate(t):
                merged[j] = round_sums(row - self._G[first + j] @ E, dtype)
                lost = merged[j].astype(np.float32) - row
                lost[~np.isfinite(lost)] = 0  # weights that are infinite or NaN cause no feedback
                E += np.outer(self._V[first + j], lost)
        return merged, E


def input_directions(terms: Sequence[Weighted]) -> NDArray[np.float64] | None:
    """Orthonormal input directions of the updates, shape (in, r); None if one of the updates is not a pair."""
    if not all(isinstance(update, LowRank) for _, update in terms):
        return None
    A = np.vstack([update.A.astype(np.float64) for _, update in terms])
    # Scaled so that the squares in A Aᵀ neither over- nor underflow.
    A /= max(float(np.abs(A).max(initial=0.0)), np.finfo(np.float64).tiny)
    squares, Q = np.linalg.eigh(A @ A.T)  # much cheaper than an SVD of A, and accurate enough for float32
    significant = squares > squares.max(initial=0.0) * WEAKEST**2
    return np.asarray(A.T @ (Q[:, significant] / np.sqrt(squares[significant])))


def corrections(V: NDArray[np.float64]) -> NDArray[np.float64]:
    """The rows g_j = (S_j + λ1)⁻¹ v_j with S_j = Σ_{k≥j} v_k v_kᵀ, from the last input to the first."""
    G = np.empty_like(V)
    M = np.eye(V.shape[1]) / DAMPING
    # Sherman–Morrison: adding v_j v_jᵀ updates the inverse in r² operations.
    for j in range(len(V) - 1, -1, -1):
        along = M @ V[j]
        G[j] = along / (1 + V[j] @ along)
        M -= np.outer(along, G[j])
    return G
