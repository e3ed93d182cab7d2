"""The loops of ``kernel.c`` for NumPy arrays.

Each function does its work only if the kernel was compiled and the arrays are of the kind that it takes, mostly
bfloat16, float16 and float32 in C order. Otherwise it says so, and the caller computes the same bits with NumPy; only
the last bits of `block_gram`, `gram_of_factors`, `map_block`, `multiply_rows_twice` and `project_rows` may be others,
and so may be what `prune_rows` keeps of a row that is not finite.
With ``LORALENS_KERNEL=off`` in the environment NumPy computes everything.
"""

import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Of more entries than one in so many the differences are not collected: an undo file of them would be large anyway.
FEW = 8
# Numbers of a factor from which on its arithmetic takes longer than the call.
MANY = 1 << 13
# Numbers of a row from which on it is worth setting up the 6,144 counters of a radix sort.
LONG = 512


def _compiled() -> ModuleType | None:
    """The compiled module; None if there is none, if it is older than its source, or if it is switched off."""
    if os.environ.get("LORALENS_KERNEL") == "off":
        return None
    try:
        from loralens.linalg.compiled import _kernel
    except ImportError:
        return None
    return None if _is_outdated(Path(_kernel.__file__)) else _kernel


def _is_outdated(compiled: Path) -> bool:
    """Whether ``kernel.c`` beside a compiled file has changed since, as in a clone that was updated but not built."""
    source = compiled.with_name("kernel.c")
    return source.exists() and compiled.stat().st_mtime < source.stat().st_mtime


_loops = _compiled()


def kernel() -> ModuleType | None:
    """The compiled module, for the loops of other files; None if it is not used."""
    return _loops


def multiply(pairs: list[tuple[Array, Array]], out: NDArray[np.float32]) -> bool:
    """Write the sum of one or two products into ``out``, rounded once from float64; False if that was not done.

    The products are those of `loralens.linalg.exact`, whose sums are exact in any order.
    """
    if _loops is None or not all(array.flags.c_contiguous for pair in pairs for array in pair) or not _is_plain(out):
        return False
    (B, A), (B2, A2) = pairs[0], pairs[1] if len(pairs) > 1 else _no_pair(*pairs[0])
    return bool(_loops.multiply(B, A, len(A), B2, A2, len(A2), *out.shape, False, out))


def block_gram(X: NDArray[np.float64], Y: NDArray[np.float64] | None = None) -> NDArray[np.float64] | None:
    """XᵀX of a factor X (m, r), in C or Fortran order, or XᵀY with a second one of that order; None if not computed.

    The sums have other last bits than those of BLAS, which differ between its libraries and processors too.
    """
    Y = X if Y is None else Y
    if _loops is None or X.size < MANY:
        return None
    (m, r), k = X.shape, Y.shape[1]
    G = np.empty((r, k))
    if X.flags.c_contiguous and Y.flags.c_contiguous:
        return G if _loops.gram(X, Y, m, r, k, False, G) else None
    if X.flags.f_contiguous and Y.flags.f_contiguous:
        return G if _loops.gram(X.T, Y.T, m, r, k, True, G) else None
    return None


def gram_of_factors(parts: Sequence[Array], step: int, new: Callable[[int], Array]) -> NDArray[np.float64] | None:
    """XᵀX of one or two factors side by side, X = [X₁ X₂] (m, r); None if it was not computed.

    It is the sum of what `block_gram` computes for blocks of ``step`` rows. In one call threads wait less often.

    Parameters
    ----------
    parts : sequence of arrays
        All in C order or all in Fortran order.
    step : int
    new : callable
        Gives memory for as many numbers of float64.
    """
    if _loops is None or len(parts) > 2 or any(part.dtype != BFLOAT16 for part in parts):
        return None
    by_rows = not all(part.flags.c_contiguous for part in parts)
    if by_rows and not all(part.flags.f_contiguous for part in parts):
        return None
    (m, width), second = parts[0].shape, parts[1:] or [parts[0][:, :0]]
    r = width + second[0].shape[1]
    sides = [_bits(part.T if by_rows else part) for part in (parts[0], *second)]
    block, part, G = new(min(m, step) * r), np.empty((r, r)), np.empty((r, r))
    done = _loops.gram_of_factors(sides[0], width, sides[1], r - width, m, by_rows, step, MANY, block, part, G)
    return G if done else None


def map_block(X: NDArray[np.float64], T: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """X @ T of a factor X (m, r), in C or Fortran order, and T (r, k), in that order; None if it was not computed.

    As for `block_gram`, the last bits are others than those of BLAS.
    """
    if _loops is None or X.size < MANY:
        return None
    if X.flags.c_contiguous:
        return _map(X, np.ascontiguousarray(T))
    product = _map(np.ascontiguousarray(T.T), X.T) if X.flags.f_contiguous else None
    return None if product is None else product.T


def _map(B: NDArray[np.float64], A: NDArray[np.float64]) -> NDArray[np.float64] | None:
    """B @ A, both in C order; None if it was not computed."""
    assert _loops is not None
    D = np.empty((len(B), A.shape[1]))
    return D if _loops.multiply(B, A, len(A), b"", b"", 0, *D.shape, True, D) else None


def _no_pair(B: Array, A: Array) -> tuple[Array, Array]:
    """Factors without any rank index."""
    return B[:0], A[:0]


class MergedEntries(NamedTuple):
    """Some weights in bfloat16 after a merge.

    Attributes
    ----------
    merged : array
        W + D, rounded to bfloat16.
    unmoved : int
        The number of entries whose bits are those of W.
    differences : (places, bits) or None
        Where W is not what `subtract_and_round` gives, and the bits of that there. None if they were not asked for, or
        are so many that they have to be found in another way.
    """

    merged: Array
    unmoved: int
    differences: tuple[NDArray[np.int64], NDArray[np.uint16]] | None


def merge_entries_with(W: Array, D: Array, *, lost: Array | None, search: bool) -> MergedEntries | None:
    """W + D, rounded to the nearest bfloat16; None if it was not computed.

    The rounded minus the exact sums are written into ``lost`` if it is given. With ``search`` the differences are
    found.
    """
    if _loops is None or not _fit(W, D) or not (lost is None or _fit(W, lost)):
        return None
    merged, most = np.empty(W.shape, BFLOAT16), W.size // FEW + 1 if search else 0
    places, there = np.empty(most, np.int64), np.empty(most, np.uint16)
    no_loss = np.empty(0, np.float32)
    unmoved, found = _loops.merge(_bits(W), D, no_loss if lost is None else lost, _bits(merged), places, there)
    few = search and found <= most
    return MergedEntries(merged, unmoved, (places[:found], there[:found]) if few else None)


# `multiply_rows_twice` takes a multiple of so many columns of W and columns of X, and so many rows of W at a time.
SPAN, PART, PANEL = 32, 16, 16
WIDTHS = 24  # columns of R, of which `project_rows` takes a multiple


@cache
def can_multiply_twice() -> bool:
    """Whether `multiply_rows_twice` does its work on this processor."""
    if _loops is None:
        return False
    nothing, Z = np.empty((0, PART), np.float32), np.zeros((SPAN, PART), np.float32)
    return bool(_loops.multiply_twice(nothing, False, 0, SPAN, Z, PART, False, nothing, Z.copy()))


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


def multiply_rows_twice(
    W: Array, X: NDArray[np.float32] | None, Y: NDArray[np.float32], Z: NDArray[np.float32]
) -> None:
    """Write W X into Y, unless X is None, and add WᵀY to Z, for some rows W in bfloat16 or float32.

    Only where `can_multiply_twice`. X and Z have the shape of `pad_columns`, and Y has as many columns as all their
    parts. W is read once for both products. The last bits are not those of BLAS.
    """
    assert _loops is not None
    is_half = W.dtype == BFLOAT16
    _loops.multiply_twice(
        _bits(W) if is_half else W, is_half, *W.shape, Y[:0] if X is None else X, Y.shape[1], X is None, Y, Z
    )


class ProjectedRows(NamedTuple):
    """Some rows W of a matrix times R."""

    product: NDArray[np.float64]  # W R
    squares: float  # the sum of the squares of W


def pad_projection(R: NDArray[np.float64]) -> NDArray[np.float64]:
    """R (n, k) with columns of zeros beside it, as `project_rows` needs it, in C order."""
    padded = np.zeros((len(R), -(-R.shape[1] // WIDTHS) * WIDTHS))
    padded[:, : R.shape[1]] = R
    return padded


def project_rows(W: Array, padded: NDArray[np.float64], count: int) -> ProjectedRows | None:
    """W R in float64 for rows of bfloat16 or float32, where R is the first ``count`` columns of `pad_projection`.

    None if it was not computed. The last bits are not those of BLAS.
    """
    if _loops is None or W.dtype not in (BFLOAT16, np.float32) or not W.flags.c_contiguous:
        return None
    is_half, product = W.dtype == BFLOAT16, np.empty((len(W), padded.shape[1]))
    squares = _loops.project(_bits(W) if is_half else W, is_half, *W.shape, padded, padded.shape[1], product)
    return None if squares < 0 else ProjectedRows(product[:, :count], squares)


def subtract_and_round(merged: Array, D: Array) -> Array | None:
    """The merged weights minus D, rounded to bfloat16; None if that was not done."""
    if _loops is None or not _fit(merged, D):
        return None
    R = np.empty(merged.shape, BFLOAT16)
    _loops.subtract(_bits(merged), D, _bits(R))
    return R


class Predicted(NamedTuple):
    """What a prediction needs of a sample.

    Attributes
    ----------
    lost, d : float64 array
        The loss e = D − q and D; both are 0 where the loss is not finite.
    finite, still : int
        The numbers of finite entries, and of those with q = 0.
    """

    lost: NDArray[np.float64]
    d: NDArray[np.float64]
    finite: int
    still: int


def predict(W: Array, D: Array, sample: NDArray[np.int64]) -> Predicted | None:
    """The loss of rounding to bfloat16 at the places of a sample (`loralens.merging.prediction`).

    None if it was not computed.
    """
    if _loops is None or not _fit(W, D) or not sample.flags.c_contiguous:
        return None
    d, lost = np.empty(sample.size), np.empty(sample.size)
    return Predicted(lost, d, *_loops.predict(_bits(W), D, sample, d, lost))


def prune_rows(rows: Array, words: NDArray[np.uint16], factors: Array, end: float, *, kept: NDArray[np.bool_]) -> bool:
    """Multiply every entry of some rows by the factor of its rank, as `loralens.arithmetic.elementwise_methods` does.

    Entries are ranked by absolute value within their row, the smallest first, equal ones from left to right. An entry
    that is not 0 is ``kept`` if its word times its factor is below ``end``. False if that was not done.

    NumPy may give infinite entries other ranks. A combination with such an entry is refused, whatever is kept of it,
    because its sum of squares is not finite (`loralens.linalg.randomized`).
    """
    if _loops is None or rows.shape[1] < LONG or not _is_plain(rows):
        return False
    if not all(array.flags.c_contiguous for array in (words, factors, kept)):
        return False
    _loops.prune(rows, words, factors.astype(np.float32, copy=False), end, kept)
    return True


def elect_mean_of_two(a: Array, b: Array, kept: Sequence[NDArray[np.bool_] | float], *, out: Array) -> bool:
    """Write the elected mean of two updates into ``out``, as `ties` and its siblings do; False if not done.

    ``kept`` are two masks, which leave out entries of 0, or two least absolute values.
    """
    masks = [keep for keep in kept if isinstance(keep, np.ndarray)]
    cutoffs = [keep for keep in kept if not isinstance(keep, np.ndarray)]
    if _loops is None or (masks and cutoffs) or not all(_is_plain(array) for array in (a, b, out)):
        return False
    if not all(mask.flags.c_contiguous for mask in masks):
        return False
    # NumPy may compare with a number of float64, and the kernel compares with a float.
    if any(float(np.float32(least)) != float(least) for least in cutoffs):
        return False
    _loops.elect(a, b, *(masks or (_NO_MASK, _NO_MASK)), *(cutoffs or (0.0, 0.0)), out)
    return True


_NO_MASK = np.empty(0, np.bool_)


def widen_halves(array: Array) -> NDArray[np.float32] | None:
    """The numbers of a float16 array as float32: −0 becomes 0, and all NaN get the same bits; None if not computed."""
    if _loops is None or array.dtype != np.float16 or not array.flags.c_contiguous:
        return None
    wide = np.empty(array.shape, np.float32)
    _loops.widen(array.view(np.uint16), wide)
    return wide


def _fit(weights: Array, *singles: Array) -> bool:
    """Whether these are weights in bfloat16, and float32 arrays of their size."""
    return (
        weights.dtype == BFLOAT16
        and weights.flags.c_contiguous
        and all(_is_plain(array) and array.size == weights.size for array in singles)
    )


def _is_plain(array: Array) -> bool:
    return array.dtype == np.float32 and array.flags.c_contiguous


def _bits(weights: Array) -> NDArray[np.uint16]:
    """The same memory as unsigned integers: the buffer of a bfloat16 array has no format that others know."""
    return weights.view(np.uint16)
