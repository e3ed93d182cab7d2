"""`Joint`: the updates of one module by several adapters, expressed in the small space that contains all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Self, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import Layout, LowRank, Scaling, check_float64
from loralens.core.structured import Update, factor_dtypes
from loralens.errors import ShapeError
from loralens.linalg.factor import (
    Basis,
    Integers,
    check_in_range,
    implicit,
    measure,
    side_by_side,
    times,
)
from loralens.linalg.measures import EPS

Floats = NDArray[np.float64]

# The error of a core is less than BACKWARD·ε·Σ_k ‖b_k‖‖a_k‖. The bound has this sum and not σ₁, because factors that
# cancel have large lengths and a small product.
BACKWARD = 64

COMBINED = Scaling("given", origin="combined")


class Core(NamedTuple):
    """The part of the SVD of a core matrix above rounding: U (p, k), s (k,) largest first, Vh (k, q)."""

    U: Floats
    s: Floats
    Vh: Floats


@final
@dataclass(frozen=True, slots=True)
class Joint:
    """ΔW_t = Q_B M_t Q_Aᵀ for T updates of one weight, Q_B (out, p) and Q_A (in, q) with orthonormal columns.

    Any orthogonally equivariant rule gives the same update for the small M_t as for the ΔW_t themselves.

    Attributes
    ----------
    updates : tuple of LowRank or None
        None if an adapter does not have the module; then M_t = 0.
    strengths : float64 array, shape (T,)
        The weights w_t. The cores do not include them.
    out, in_ : JointSide
        The sides of Q_B and Q_A. p and q are at most the sum of all ranks, and may be 0.
    cores : float64 array, shape (T, p, q)
        M_t, including the scale.
    floors : float64 array, shape (T,)
        Singular values of M_t up to this are rounding. It is the larger of max(out, in)·ε·σ₁(ΔW_t) and
        64·ε·Σ_k‖b_k‖‖a_k‖; the second is for factors that cancel in their product.
    width : int
        The rank to which an elementwise result of full rank is cut, if it is larger than the sum of the ranks.
    """

    updates: tuple[LowRank | None, ...]
    strengths: Floats
    out: "Side"
    in_: "Side"
    cores: Floats
    floors: Floats
    width: int = 0

    @classmethod
    def of(cls, updates: "Sequence[Update | None]", strengths: Sequence[float] | Floats) -> Self:
        """Compute the joint space of these updates, at least one of which is not None.

        Raises
        ------
        ShapeError
            The updates differ in shape.
        MismatchError
            An update is not a pair (LoKr, LoHa, full).
        FormatError
            A factor holds NaN or Inf.

        Notes
        -----
        [B_1 … B_T] and [A_1; …; A_T] are orthogonalised once, which costs O((out + in)·(Σr)²). No array of size
        out × in is formed.
        """
        pairs = [update for update in updates if update is not None]
        if len({update.shape for update in pairs}) > 1:
            shapes = ", ".join(str(update.shape) for update in pairs)
            raise ShapeError(f"the updates have the shapes {shapes}", fix="give adapters of one base model")
        shape, weights = pairs[0].shape, np.asarray(strengths, dtype=np.float64)
        # No lambdas, since results hold these functions and can be pickled.
        sources = partial(_stack, pairs), partial(_stack, pairs, inputs=True)
        stacks = tuple(source() for source in sources)
        factor_B, factor_A = map(measure, stacks)
        ranks = [0 if update is None else update.rank for update in updates]
        owner = np.repeat(np.arange(len(ranks)), ranks)
        scales = np.repeat([1.0 if update is None else update.scale for update in updates], ranks)
        # ‖b_k‖‖a_k‖ of all rank indices, with the powers of two that `measure` took out of the columns.
        strength = np.ldexp(factor_B.norms * factor_A.norms, factor_B.exponents + factor_A.exponents)
        # An overflow is refused by the check below, with a message and without a warning of NumPy.
        with np.errstate(over="ignore"):
            D = strength * scales
        # Before anything is computed, this raises an error if norms of a combination would leave the range of float64.
        check_float64(max(1.0, float(np.abs(weights).max(initial=0.0))), np.abs(D).max(initial=0.0, keepdims=True))
        # Rank indices of length 0 have no direction for the bases.
        alive = np.flatnonzero(D)
        X_B, T_B, R_B = implicit(factor_B, alive)
        X_A, T_A, R_A = implicit(factor_A, alive)
        cores = np.zeros((len(updates), len(R_B), len(R_A)))
        for t in set(owner[alive].tolist()):
            mine = owner[alive] == t
            cores[t] = (R_B[:, mine] * D[alive][mine]) @ R_A[:, mine].T
        # Spectral norms, since a rank is decided by comparing singular values with σ₁.
        tops = np.array([np.linalg.norm(M, 2) if M.size else 0.0 for M in cores])
        # The larger of the usual threshold of a rank and the error of a product that cancels.
        lengths = np.bincount(owner, np.abs(D), minlength=len(updates))
        floors = np.asarray(EPS * np.maximum(max(shape) * tops, BACKWARD * lengths), dtype=np.float64)
        out, in_ = (
            Side(len(X), source if X is stack else partial(_columns, source, alive), T)
            for X, T, source, stack in zip((X_B, X_A), (T_B, T_A), sources, stacks, strict=True)
        )
        present = tuple(update if isinstance(update, LowRank) else None for update in updates)
        return cls(present, weights, out, in_, cores, floors)

    @property
    def left(self) -> Basis:
        """Q_B; factors are read."""
        return Basis(self.out.source(), self.out.M)

    @property
    def right(self) -> Basis:
        """Q_A; factors are read."""
        return Basis(self.in_.source(), self.in_.M)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out.n, self.in_.n

    @property
    def floor(self) -> float:
        """Σ|w_t|·floors_t: singular values of a combination up to this are rounding.

        A threshold relative to σ₁ of the combination would give the difference of two equal updates a rank above 0.
        """
        return float(np.abs(self.strengths) @ self.floors)

    @property
    def weighted(self) -> Floats:
        """w_t·M_t, float64, shape (T, p, q)."""
        return self.strengths[:, None, None] * self.cores

    @property
    def present(self) -> Integers:
        """Indices of the updates that exist and are not 0, int64."""
        return np.flatnonzero(np.any(self.cores != 0, axis=(1, 2)))

    def total(self) -> Floats:
        """Σ w_t·M_t, the core of the exact weighted sum, float64, shape (p, q)."""
        return np.asarray(np.tensordot(self.strengths, self.cores, 1), dtype=np.float64)

    def decompose(self, M: Floats | Core) -> Core:
        """The SVD of a core matrix (p, q) without singular values below ``floor``; k may be 0."""
        # If a rule has decomposed the matrix before, it passes the `Core`, so that no SVD is done twice.
        U, s, Vh = M if isinstance(M, Core) else np.linalg.svd(M, full_matrices=False)
        k = int(np.count_nonzero(s > self.floor))
        return Core(U[:, :k], s[:k], Vh[:k])

    def to_lift(self, M: Floats | Core) -> "Lift":
        """The update Q_B M Q_Aᵀ as a `Lift` with factors computed on demand; values below ``floor`` are dropped."""
        U, s, Vh = self.decompose(M)
        root = np.sqrt(s)
        layout = next(update.layout for update in self.updates if update is not None)
        return Lift(s, self.out.times(U * root), self.in_.times(Vh.T * root), self.dtype, layout)

    def lift(self, M: Floats | Core, dtype: DTypeLike | None = None) -> LowRank:
        """The update Q_B M Q_Aᵀ, re-factored to its numerical rank: `Lift.at`."""
        return self.to_lift(M).at(dtype=dtype)

    @property
    def dtype(self) -> "np.dtype[Any]":
        """The dtype of a combination: that of all factors if they agree, else float32."""
        dtypes = {dtype for update in self.updates if update is not None for dtype in factor_dtypes(update)}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


def _stack(pairs: "Sequence[Update]", *, inputs: bool = False) -> Array:
    """All B side by side, or all Aᵀ."""
    return side_by_side([pair.A.T if inputs else pair.B for pair in pairs])


def _columns(source: Callable[[], Array], order: Integers) -> Array:
    """The X of `implicit` for the factors of a source; the same bits each time."""
    return implicit(measure(source()), order)[0]


@final
@dataclass(frozen=True, slots=True)
class Side:
    """The columns X @ M, computed when they are read; ``source`` returns X (n, r), and M is (r, k)."""

    n: int
    source: "Callable[[], Array]"
    M: Floats
    rows: Floats | None = None  # a factor for each row, (n,)

    def times(self, M: Floats) -> "Side":
        """These columns @ M."""
        # No directions: nothing has to be read.
        if not M.shape[1]:
            return Side(self.n, partial(np.zeros, (self.n, 0)), np.zeros((0, 0)))
        return replace(self, M=self.M @ M)

    def factor(self, rank: int, dtype: "np.dtype[Any]") -> LazyArray:
        """The first ``rank`` columns, rounded once to ``dtype``; columns beyond the last are 0."""
        M = np.zeros((len(self.M), rank))
        M[:, : self.M.shape[1]] = self.M[:, :rank]
        return LazyArray(lambda: self._compute(M, dtype), shape=(self.n, rank), dtype=dtype)

    def _compute(self, M: Floats, dtype: "np.dtype[Any]") -> Array:
        if self.rows is None:
            return times(self.source(), M, dtype)
        # Overflow needs no warning here: `check_in_range` turns it into an error.
        with np.errstate(over="ignore"):
            scaled = self.rows[:, None] * times(self.source(), M, np.dtype(np.float64))
            return check_in_range(scaled.astype(dtype), dtype)


@final
@dataclass(frozen=True, slots=True)
class Lift:
    """A combined update that can be truncated to any rank: balanced factors U √s and √s Vᵀ with scale 1.

    The factors are combinations of the factors of the updates, and are computed from them at each read.
    """

    s: Floats
    out: Side
    in_: Side
    dtype: "np.dtype[Any]"
    layout: Layout

    def at(self, rank: int | None = None, dtype: DTypeLike | None = None) -> LowRank:
        """The best approximation of this rank (default: full rank), in ``dtype`` (default: that of all factors).

        Rank 0 becomes rank 1 with zeros, because no format has rank 0. Factors are computed in float64 and rounded
        once. Reading one raises FormatError if its numbers are too large for ``dtype``.
        """
        rank, kind = max(1, self.s.size if rank is None else rank), np.dtype(dtype or self.dtype)
        B, A = self.out.factor(rank, kind), self.in_.factor(rank, kind).T
        return LowRank(B, A, scaling=COMBINED, layout=self.layout)

    def scale_rows(self, rows: Floats) -> "Lift":
        """diag(rows) times the update. Truncation comes before the multiplication, so ``s`` does not change."""
        return replace(self, out=replace(self.out, rows=rows))
