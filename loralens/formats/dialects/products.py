"""Hadamard, Kronecker and Tucker products as one pair B·A if its rank is small, and otherwise in their own form.

A product becomes a pair if its exact rank is at most min(out, in)/2. The factors of the pair are computed in float64
when they are read, and rounded to float32 once. If the stored factors have 16 bits, every entry of a Khatri-Rao or
Kronecker product of them is exact.
"""

from collections.abc import Callable

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LowRank
from loralens.core.structured import Dense, Hadamard, Kronecker
from loralens.errors import ShapeError
from loralens.formats.dialects.pairs import SAVE_AGAIN


def tucker(core: LazyArray, up: LazyArray, down: LazyArray) -> LowRank:
    """ΔW[o, i, k…] = Σ up[o, p] · core[p, q, k…] · down[q, i], as B (out, p) and A (p, in · k…)."""
    # The file may hold tensors of any shapes.
    if core.ndim < 2 or up.ndim != 2 or down.ndim != 2 or core.shape[:2] != (up.shape[1], down.shape[0]):
        what = f"core {core.shape} between {up.shape} and {down.shape} do not fit together"
        raise ShapeError(what, fix=SAVE_AGAIN)
    p, q = core.shape[:2]
    window, in_ = core.size // (p * q), down.shape[1]

    def product() -> Array:
        flat = core.read().astype(np.float64).reshape(p, q, window)
        matrix: Array = np.einsum("pqk,qi->pik", flat, *_wide(down)).reshape(p, in_ * window)
        return matrix

    return LowRank(up, _float32(product, (p, in_ * window)))


def hadamard(first: LowRank, second: LowRank) -> LowRank | Hadamard:
    """The product first ∘ second: B[:, (p, q)] = B₁[:, p] · B₂[:, q] and A[(p, q), :] = A₁[p, :] · A₂[q, :]."""
    if first.shape != second.shape:
        raise ShapeError(f"products {first.shape} and {second.shape} do not fit together", fix=SAVE_AGAIN)
    # The rank of a Hadamard product is at most the product of the ranks.
    (out, in_), rank = first.shape, first.rank * second.rank
    if not _narrow(rank, first.shape):
        return Hadamard(first, second)
    (B1, A1), (B2, A2) = first.factors, second.factors
    B = _float32(lambda: np.einsum("op,oq->opq", *_wide(B1, B2)).reshape(out, rank), (out, rank))
    A = _float32(lambda: np.einsum("pi,qi->pqi", *_wide(A1, A2)).reshape(rank, in_), (rank, in_))
    return LowRank(B, A)


def kronecker(first: LowRank | Dense, second: LowRank | Dense) -> LowRank | Kronecker:
    """kron(first, second) = kron(B₁, B₂) · kron(A₁, A₂); a full factor is itself times an identity."""
    first, second = _exact(first), _exact(second)
    # The Kronecker form knows the exact rank of the product.
    form = Kronecker(first, second)
    if not _narrow(form.rank, form.shape):
        return form
    (B1, A1), (B2, A2) = _split(first), _split(second)
    B = _float32(lambda: np.kron(*_wide(B1, B2)), (form.shape[0], form.rank))
    A = _float32(lambda: np.kron(*_wide(A1, A2)), (form.rank, form.shape[1]))
    return LowRank(B, A)


def _narrow(rank: int, shape: tuple[int, int]) -> bool:
    # A pair of a larger rank holds more numbers than the matrix: r·(out + in) against out·in, for a square one.
    return rank <= min(shape) / 2


def _exact(factor: LowRank | Dense) -> LowRank | Dense:
    """A factor whose nominal rank is not larger than its shape allows; a pair of a larger rank is multiplied out."""
    if isinstance(factor, Dense) or factor.rank <= min(factor.shape):
        return factor
    return Dense(LazyArray(factor.dense, shape=factor.shape, dtype=np.float64))


def _split(factor: LowRank | Dense) -> tuple[LazyArray, LazyArray]:
    if isinstance(factor, LowRank):
        return factor.factors
    matrix = factor.array.reshape(*factor.shape)
    identity = LazyArray.of(np.eye(factor.rank))
    # The identity is on the smaller side, where it is of the size of the factor's rank.
    return (matrix, identity) if factor.shape[1] == factor.rank else (identity, matrix)


def _wide(*arrays: LazyArray) -> list[Array]:
    return [array.read().astype(np.float64) for array in arrays]


def _float32(product: Callable[[], Array], shape: tuple[int, ...]) -> LazyArray:
    """``product``, rounded to float32. Larger numbers become infinite, as in the software that trained the adapter."""

    def read() -> Array:
        with np.errstate(all="ignore"):
            return product().astype(np.float32)

    return LazyArray(read, shape=shape, dtype=np.float32)
