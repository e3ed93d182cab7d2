"""The ordered directions of an update, from which it can be truncated to any rank."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from sys import float_info
from typing import Any, Literal, final

import numpy as np

from loralens.core.lazy import Array, LazyArray, Recent
from loralens.core.lowrank import Bases, LowRank, Scaling, check_float64
from loralens.core.selection import select
from loralens.core.structured import Structured, Update
from loralens.errors import OptionError, place
from loralens.linalg.factor import Basis, Floats, check_in_range, times
from loralens.linalg.measures import frobenius, numerical_rank, spectral
from loralens.linalg.product import truncation


def safe_unit(s: Floats) -> float:
    """A unit in which no square of these singular values overflows or underflows."""
    return spectral(s) or 1.0


DType = np.dtype[Any]


@final
@dataclass(frozen=True, slots=True)
class Directions:
    """The directions of an update, most important first, as linear combinations of columns of B and of rows of A.

    B′ = B·out[:, :k] and A′ = in_[:k]·A are the factors of rank k, with the scale of the module. The importance of a
    direction is its singular value, either that of ΔW or that on real activations.

    Attributes
    ----------
    s : float64 array, shape (k,)
        The values by which ranks are chosen, decreasing and nonzero.
    out : float64 array, shape (r, k), or None
    in_ : float64 array, shape (k, r), or None
        None: they are the singular directions of the module, which are computed when a factor is read.
    bases : tuple of float64 arrays, shape (r, k), or None
        If ``s`` are the singular values of ΔW: the matrices T of the two bases of `LowRank.bases`, which refer to the
        stored factors. None if these are not known.
    """

    s: Array
    out: Array | None = None
    in_: Array | None = None
    bases: tuple[Array, Array] | None = None

    def head(self, module: LowRank, k: int) -> tuple[Array, Array]:
        """The combinations of the first k directions of ``module``; beyond the last one they add nothing."""
        # A rank that is common to several modules may be above the number of directions of one of them.
        found = singular_directions(module) if self.out is None else self
        assert found.out is not None
        assert found.in_ is not None
        count, rank = min(k, self.s.size), len(found.out)
        out, in_ = np.zeros((rank, k)), np.eye(k, rank)
        out[:, :count], in_[:count] = found.out[:, :count], found.in_[:count]
        return out, in_


def singular_directions(module: Update, *, bases: bool = False) -> Directions:
    """The singular directions of ΔW, with which truncation is optimal (Eckart & Young 1936).

    The resulting factors are balanced: of all factors with this product they have the smallest ‖A‖_F² + ‖B‖_F². For an
    update without factors the combinations are empty; `nearest_pair` makes its pair. With ``bases`` those of ΔW are
    kept too, as far as that costs little.
    """
    if isinstance(module, Structured):
        s = module.singular_values()
        # Values below rounding would count as directions in a budget.
        s = s[: numerical_rank(s, module.shape)]
        return Directions(s, np.zeros((0, s.size)), np.zeros((s.size, 0)))
    out, s, in_, small = truncation(module.B, module.A, bases=bases)
    # A scale of 0 makes ΔW = 0, whatever the factors are.
    if not module.scale:
        return Directions(s[:0], out[:, :0], in_[:0])
    s = check_float64(abs(module.scale), s)
    if small and module.scale < 0:
        small = -small[0], small[1]
    return Directions(s, out, in_, small)


def bases_of(module: Update, directions: Directions) -> Bases | None:
    """`LowRank.bases` of a module from its directions, if they have them."""
    if directions.bases is None or not isinstance(module, LowRank):
        return None
    left, right = directions.bases
    return Bases(Basis(module.B, left), directions.s, Basis(module.A.T, right))


def truncate_pair(
    module: LowRank,
    directions: Directions,
    rank: int,
    dtype: DType | None = None,
    *,
    whole_alpha: bool = False,
) -> LowRank:
    """The module reduced to its leading directions. Its factors are computed when they are read.

    Scale and layout stay; so does the dtype of each factor, unless ``dtype`` is given. With ``whole_alpha`` α is whole,
    because some programs read it so. The change of the scale goes into both factors before they are rounded.
    """
    B, A = module.factors
    dtype_B, dtype_A = dtype or B.dtype, dtype or A.dtype
    scaling = module.scaling.with_whole_alpha(module.scale, rank) if whole_alpha else module.scaling
    scale = module.scale if scaling is module.scaling else scaling.value
    root = sqrt(module.scale / scale) if scale else 1.0
    return LowRank(
        B.map(
            lambda X: times(X, root * directions.head(module, rank)[0], dtype_B),
            shape=(B.shape[0], rank),
            dtype=dtype_B,
        ),
        A.map(
            lambda X: times(X.T, root * directions.head(module, rank)[1].T, dtype_A).T,
            shape=(rank, A.shape[1]),
            dtype=dtype_A,
        ),
        scale,
        scaling=scaling,
        layout=module.layout,
    )


def cast_factors(module: Update, dtype: DType) -> Update:
    """The module with its factors rounded to ``dtype``; the module itself if they have that dtype already."""
    B, A = module.factors
    if B.dtype == A.dtype == dtype:
        return module

    def rounded(x: Array) -> Array:
        with np.errstate(over="ignore"):
            result = x.astype(dtype)
        # What was infinite before is passed on; only what the cast itself makes infinite is an error.
        return result if np.isfinite(result).sum() == np.isfinite(x).sum() else check_in_range(result, dtype)

    B, A = (factor.map(rounded, shape=factor.shape, dtype=dtype) for factor in (B, A))
    return LowRank(B, A, module.scale, scaling=module.scaling, layout=module.layout)


def locate_errors(name: str, module: Update) -> LowRank:
    """The same pair, with factors that add the name of the module to every error raised while they are read."""

    def reading(factor: LazyArray) -> LazyArray:
        def read() -> Array:
            with place(name):
                return factor.read()

        return LazyArray(read, shape=factor.shape, dtype=factor.dtype)

    B, A = map(reading, module.factors)
    return LowRank(B, A, module.scale, scaling=module.scaling, layout=module.layout)


def nearest_pair(module: Structured, k: int, dtype: DType | None, recent: Recent) -> LowRank:
    """The nearest pair of rank k to an update that has no factors, in ``dtype`` or float32, computed when it is read.

    ``recent`` keeps the last pair, so that one dense SVD serves both factors.
    """
    (rows, columns), dtype = module.shape, dtype or np.dtype(np.float32)

    # Both factors are in one array, so that reading either of them computes both.
    def joint() -> Array:
        pair = module.truncated(k)
        with np.errstate(over="ignore"):
            return check_in_range(np.hstack([pair.B.T, pair.A]).astype(dtype), dtype)

    both = recent.keep(LazyArray(joint, shape=(k, rows + columns), dtype=dtype))
    scaling = Scaling("given", origin=f"rank {k} of a {module.form.name}")
    return LowRank(
        both.map(lambda x: x[:, :rows].T, shape=(rows, k)),
        both.map(lambda x: x[:, rows:], shape=(k, columns)),
        scaling=scaling,
        layout=module.layout,
    )


Protection = Literal["absolute", "relative"] | Mapping[str, float]
MOST = 1e50  # largest ratio of two norms ‖ΔW‖ that is used: its square, 1e100, times σ² is far from overflowing


def protection(spectra: Mapping[str, Array], protect: Protection) -> dict[str, float]:
    """Module name → the weight of its squared error.

    Parameters
    ----------
    spectra : mapping of str to float64 array
    protect : "absolute", "relative" or mapping of str to float
        ``absolute``: 1, which minimises ‖ΔW−ΔW'‖ of the whole adapter. ``relative``: 1/‖ΔW‖_F² of the module, relative
        to that of the largest one, so that small modules count as much as large ones. A mapping from globs over module
        names or kinds to numbers: the number of the first glob that matches, and 1 if none does.

    Raises
    ------
    OptionError
        A weight is negative or not a number, or a glob matches nothing.
    """
    if protect == "absolute":
        return dict.fromkeys(spectra, 1.0)
    if protect == "relative":
        norms = {name: frobenius(s) for name, s in spectra.items()}
        # Relative to the largest norm, because 1/‖ΔW‖² itself could overflow. ΔW = 0 has nothing to protect.
        largest = max(norms.values(), default=0.0)
        return {name: min(largest / norm, MOST) ** 2 if norm else 0.0 for name, norm in norms.items()}
    weights: dict[str, float] = {}
    for glob, weight in protect.items():
        # Python treats True as a number, but a weight of True is probably a mistake.
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight <= float_info.max:
            raise OptionError(f"the weight of {glob} is {weight!r:.100}", fix="give a finite number of 0 or more")
        # The first glob wins, so that exceptions can be written before a general rule.
        for name in select(spectra, [glob]):
            weights.setdefault(name, float(weight))
    return {name: weights.get(name, 1.0) for name in spectra}
