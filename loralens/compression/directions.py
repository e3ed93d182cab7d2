"""Directions: every truncation of one update at once, as two small matrices beside its factors."""

from dataclasses import dataclass
from typing import Any, final

import numpy as np

from loralens.core.lazy import Array, LazyArray, Recent
from loralens.core.lowrank import LowRank
from loralens.core.scaling import Scaling
from loralens.core.structured import Structured, Update
from loralens.errors import place
from loralens.linalg.factor import in_range, times
from loralens.linalg.measures import numerical_rank
from loralens.linalg.product import truncating_maps

DType = np.dtype[Any]


@final
@dataclass(frozen=True, slots=True)
class Directions:
    """The directions of an update, the most important first, as combinations of the columns of B and the rows of A.

    B′ = B·out[:, :k] and A′ = in_[:k]·A are the factors of rank k, under the scale of the module. What makes a
    direction important is for whoever made it to say: plain singular values, or those on real activations.

    Attributes
    ----------
    s : float64 array, shape (k,)
        What the ranks are chosen by, falling; nonzero.
    out : float64 array, shape (r, k)
    in_ : float64 array, shape (k, r)
    """

    s: Array
    out: Array
    in_: Array

    def head(self, k: int) -> "Directions":
        """The first k directions; where there are fewer, padding adds nothing: zero columns of B, rows of A."""
        count, rank = min(k, self.s.size), len(self.out)
        out, in_, s = np.zeros((rank, k)), np.eye(k, rank), np.zeros(k)
        out[:, :count], in_[:count], s[:count] = self.out[:, :count], self.in_[:count], self.s[:count]
        return Directions(s, out, in_)


def directions(module: Update) -> Directions:
    """The singular directions of ΔW, by which truncation is optimal (Eckart & Young 1936).

    The factors that they give are balanced: those of the smallest ‖A‖_F² + ‖B‖_F² for their product. An update
    without factors has singular values and empty combinations: `paired` makes its pair.
    """
    if isinstance(module, Structured):
        s = module.singular_values()
        s = s[: numerical_rank(s, module.shape)]
        return Directions(s, np.zeros((0, s.size)), np.zeros((s.size, 0)))
    out, s, in_ = truncating_maps(module.B, module.A)
    count = s.size if module.scale else 0
    return Directions(s[:count] * abs(module.scale), out[:, :count], in_[:count])


def truncated(module: LowRank, leading: Directions, dtype: DType | None = None) -> LowRank:
    """The module with these directions and no others, its factors made when they are asked for.

    Scale, where it came from, and layout stay; so does the dtype of each factor, unless ``dtype`` is another.
    """
    B, A = module.factors
    dtype_B, dtype_A = dtype or B.dtype, dtype or A.dtype
    k = leading.s.size
    return LowRank(
        LazyArray(lambda: times(B.read(), leading.out, dtype_B), shape=(B.shape[0], k), dtype=dtype_B),
        LazyArray(lambda: times(A.read().T, leading.in_.T, dtype_A).T, shape=(k, A.shape[1]), dtype=dtype_A),
        module.scale,
        scaling=module.scaling,
        layout=module.layout,
    )


def narrowed(module: Update, dtype: DType) -> Update:
    """The module with its factors as they are, rounded to ``dtype``; itself where they have it already."""
    B, A = module.factors
    if B.dtype == A.dtype == dtype:
        return module

    def rounded(x: Array) -> Array:
        with np.errstate(over="ignore"):
            result = x.astype(dtype)
        return result if np.isfinite(result).sum() == np.isfinite(x).sum() else in_range(result, dtype)

    B, A = (factor.map(rounded, shape=factor.shape, dtype=dtype) for factor in (B, A))
    return LowRank(B, A, module.scale, scaling=module.scaling, layout=module.layout)


def named(name: str, module: Update) -> LowRank:
    """A pair that says its name where its factors cannot be made."""

    def reading(factor: LazyArray) -> LazyArray:
        def read() -> Array:
            with place(name):
                return factor.read()

        return LazyArray(read, shape=factor.shape, dtype=factor.dtype)

    B, A = map(reading, module.factors)
    return LowRank(B, A, module.scale, scaling=module.scaling, layout=module.layout)


def paired(module: Structured, k: int, dtype: DType | None, recent: Recent) -> LowRank:
    """The nearest pair of rank k to an update that is none, in float32 or ``dtype``, made when it is asked for.

    ``recent`` keeps the last pair, so that its dense SVD is taken once for both factors.
    """
    (rows, columns), dtype = module.shape, dtype or np.dtype(np.float32)

    def joint() -> Array:
        pair = module.truncated(k)
        with np.errstate(over="ignore"):
            return in_range(np.hstack([pair.B.T, pair.A]).astype(dtype), dtype)

    both = recent.keep(LazyArray(joint, shape=(k, rows + columns), dtype=dtype))
    scaling = Scaling("given", origin=f"rank {k} of a {module.form.name}")
    return LowRank(
        both.map(lambda x: x[:, :rows].T, shape=(rows, k)),
        both.map(lambda x: x[:, rows:], shape=(k, columns)),
        scaling=scaling,
        layout=module.layout,
    )
