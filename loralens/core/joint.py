"""`Joint`: the updates of one module by several adapters, expressed in the small space that contains all of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, Self, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import LARGEST, Layout, LowRank, Scaling, check_float64
from loralens.core.structured import Update
from loralens.errors import ShapeError
from loralens.linalg.factor import (
    Basis,
    FactorsSideBySide,
    Integers,
    are_usual,
    check_in_range,
    gram,
    implicit,
    measure,
    times,
    unit_triangles,
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
    out: "JointSide"
    in_: "JointSide"
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
        return JointFactors.of(updates, strengths).joint()

    @property
    def left(self) -> Basis:
        """Q_B; factors are read."""
        return self.out.basis()

    @property
    def right(self) -> Basis:
        """Q_A; factors are read."""
        return self.in_.basis()

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
        return Lift(s, self.out.lift(U * root), self.in_.lift(Vh.T * root), self.dtype, layout)

    def lift(self, M: Floats | Core, dtype: DTypeLike | None = None) -> LowRank:
        """The update Q_B M Q_Aᵀ, re-factored to its numerical rank: `Lift.at`."""
        return self.to_lift(M).at(dtype=dtype)

    @property
    def dtype(self) -> "np.dtype[Any]":
        """The dtype of a combination: that of all factors if they agree, else float32."""
        dtypes = {factor.dtype for update in self.updates if update is not None for factor in update.factors}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)


@final
@dataclass(frozen=True, slots=True)
class JointSide:
    """One side of a joint space: orthonormal columns Q = X T.

    Attributes
    ----------
    n : int
        The length of a column.
    T : float64 array, shape (r, p)
    source : callable
        Returns X (n, r).
    again : callable
        Reads the factors and makes X of them again; ``source`` may keep X. Where X consists of the unchanged factors
        [B_1 … B_T] or [A_1ᵀ … A_Tᵀ], both are one function.
    """

    n: int
    T: Floats
    source: "Callable[[], Array | FactorsSideBySide]"
    again: "Callable[[], Array | FactorsSideBySide]"

    def basis(self) -> Basis:
        """Q; X is read."""
        X = self.source()
        return Basis(X.whole() if isinstance(X, FactorsSideBySide) else X, self.T)

    def lift(self, M: Floats) -> "Side":
        """The columns Q @ M, computed from the factors at each read, so that no tall array stays in memory."""
        # No directions: nothing has to be read, and a `Side` of width 0 is padded with zeros as any other.
        if not M.shape[1]:
            return Side(self.n, lambda: np.zeros((self.n, 0)), np.zeros((0, 0)))
        return Side(self.n, self.again, self.T @ M)


@final
@dataclass(frozen=True, slots=True)
class JointFactors:
    """The factors of some updates of one weight side by side, of which only the Gram matrices are kept.

    Attributes
    ----------
    updates : tuple of LowRank or None
    strengths : float64 array, shape (T,)
    owner : int64 array, shape (Σr,)
        The index of the update to which each rank index belongs.
    scales : float64 array, shape (Σr,)
        The scale of that update.
    grams : tuple of float64 arrays, shape (Σr, Σr)
        Those of [B_1 … B_T] and of [A_1ᵀ … A_Tᵀ].
    """

    updates: tuple[LowRank | None, ...]
    strengths: Floats
    owner: Integers
    scales: Floats
    grams: tuple[Floats, Floats]

    @classmethod
    def of(cls, updates: "Sequence[Update | None]", strengths: Sequence[float] | Floats) -> Self:
        """Read the factors of these updates once; errors are those of `Joint.of`."""
        present_updates = [update for update in updates if update is not None]
        if len({update.shape for update in present_updates}) > 1:
            shapes = ", ".join(str(update.shape) for update in present_updates)
            raise ShapeError(f"the updates have the shapes {shapes}", fix="give adapters of one base model")
        grams = (
            gram(FactorsSideBySide([update.B for update in present_updates])),
            gram(FactorsSideBySide([update.A.T for update in present_updates])),
        )
        ranks = [0 if update is None else update.rank for update in updates]
        owner, scales = np.repeat(np.arange(len(ranks)), ranks), [1.0 if u is None else u.scale for u in updates]
        pairs = tuple(update if isinstance(update, LowRank) else None for update in updates)
        return cls(pairs, np.asarray(strengths, dtype=np.float64), owner, np.repeat(scales, ranks), grams)

    def sources(self) -> "tuple[Callable[[], FactorsSideBySide], Callable[[], FactorsSideBySide]]":
        """Functions that read [B_1 … B_T] and [A_1ᵀ … A_Tᵀ]."""
        pairs = [update for update in self.updates if update is not None]
        # No lambdas, since results hold these functions and can be pickled.
        return partial(_outputs, pairs), partial(_inputs, pairs)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return next(update.shape for update in self.updates if update is not None)

    def joint(self) -> Joint:
        """The joint space, whatever the factors are; errors are those of `Joint.of`."""
        sources = self.sources()
        stacks = tuple(source().whole() for source in sources)
        factor_B, factor_A = (measure(X, G) for X, G in zip(stacks, self.grams, strict=True))
        # ‖b_k‖‖a_k‖ of all rank indices, with the powers of two that `measure` took out of the columns.
        strength = np.ldexp(factor_B.norms * factor_A.norms, factor_B.exponents + factor_A.exponents)
        # An overflow is refused by the check below, with a message and without a warning of NumPy.
        with np.errstate(over="ignore"):
            D = strength * self.scales
        # Before anything is computed, this raises an error if norms of a combination would leave the range of float64.
        largest = max(1.0, float(np.abs(self.strengths).max(initial=0.0)))
        check_float64(largest, np.abs(D).max(initial=0.0, keepdims=True))
        # Rank indices of length 0 have no direction for the bases.
        alive = np.flatnonzero(D)
        X_B, T_B, R_B = implicit(factor_B, alive)
        X_A, T_A, R_A = implicit(factor_A, alive)
        cores = np.zeros((len(self.updates), len(R_B), len(R_A)))
        for t in set(self.owner[alive].tolist()):
            mine = self.owner[alive] == t
            cores[t] = (R_B[:, mine] * D[alive][mine]) @ R_A[:, mine].T
        # Spectral norms, since a rank is decided by comparing singular values with σ₁.
        tops = np.array([np.linalg.norm(M, 2) if M.size else 0.0 for M in cores])
        floors = _floors(self.shape, tops, np.bincount(self.owner, np.abs(D), minlength=len(self.updates)))
        out, in_ = (
            JointSide(len(X), T, source, source)
            if X is stack
            else JointSide(len(X), T, partial(_same, X), partial(_columns, source, G, alive))
            for X, T, source, stack, G in zip((X_B, X_A), (T_B, T_A), sources, stacks, self.grams, strict=True)
        )
        return Joint(self.updates, self.strengths, out, in_, cores, floors)


def _outputs(pairs: Sequence[LowRank]) -> FactorsSideBySide:
    return FactorsSideBySide([pair.B for pair in pairs])


def _inputs(pairs: Sequence[LowRank]) -> FactorsSideBySide:
    return FactorsSideBySide([pair.A.T for pair in pairs])


def _same(X: Array) -> Array:
    return X


def _columns(source: Callable[[], FactorsSideBySide], G: Floats, order: Integers) -> Array:
    """The X of `implicit` for the factors of a source with the Gram matrix G; the same bits each time."""
    return implicit(measure(source().whole(), G), order)[0]


def _floors(shape: tuple[int, int], tops: Floats, lengths: Array) -> Floats:
    """The singular values of each update up to which they are rounding."""
    # The larger of the usual threshold of a rank and the error of a product that cancels.
    return np.asarray(EPS * np.maximum(max(shape) * tops, BACKWARD * lengths), dtype=np.float64)


def joint_spaces(modules: Sequence[JointFactors]) -> list[Joint | None]:
    """The joint spaces of several modules with the same ranks; None for those that `JointFactors.joint` has to compute.

    One module takes some sixty calls of NumPy, which take far longer than their arithmetic. Here one call serves all of
    them. Every step is that of one module on the usual route: no length is 0 or very large, and the Gram matrices give
    the bases.
    """
    owner, count = modules[0].owner, len(modules[0].updates)
    if not owner.size:
        return [None] * len(modules)
    G_B, G_A = (np.stack(grams) for grams in zip(*(module.grams for module in modules), strict=True))
    strengths = np.stack([module.strengths for module in modules])
    squares_B, squares_A = (G.diagonal(axis1=1, axis2=2) for G in (G_B, G_A))
    usual = are_usual(squares_B) & are_usual(squares_A)
    norms_B, norms_A = (np.sqrt(np.where(usual[:, None], squares, 1.0)) for squares in (squares_B, squares_A))
    with np.errstate(over="ignore"):
        D = norms_B * norms_A * np.stack([module.scales for module in modules])
        largest = np.maximum(1.0, np.abs(strengths).max(axis=1)) * np.abs(D).max(axis=1, initial=0.0)
    usual &= (D != 0).all(axis=1) & (largest <= LARGEST)
    # What is left to the other route must not end a call for all.
    D[~usual] = 0
    try:
        (R_B, safe_B), (R_A, safe_A) = unit_triangles(G_B, norms_B, usual), unit_triangles(G_A, norms_A, usual)
    except np.linalg.LinAlgError:
        return [None] * len(modules)
    T_B, T_A = np.linalg.inv(R_B) / norms_B[:, :, None], np.linalg.inv(R_A) / norms_A[:, :, None]
    cores, lengths = np.zeros((len(modules), count, *R_B.shape[1:])), np.zeros((len(modules), count))
    for t in set(owner.tolist()):
        mine = owner == t
        cores[:, t] = (R_B[:, :, mine] * D[:, None, mine]) @ R_A[:, :, mine].transpose(0, 2, 1)
        lengths[:, t] = np.abs(D[:, mine]).sum(axis=1)
    tops = np.linalg.svd(cores, compute_uv=False)[..., 0]

    def space(i: int) -> Joint:
        module = modules[i]
        (out, in_), (B, A) = module.shape, module.sources()
        sides = JointSide(out, T_B[i], B, B), JointSide(in_, T_A[i], A, A)
        return Joint(module.updates, module.strengths, *sides, cores[i], _floors(module.shape, tops[i], lengths[i]))

    return [space(i) if safe else None for i, safe in enumerate(safe_B & safe_A)]


def decompose_cores(joints: Sequence[Joint], matrices: "Sequence[Floats | Core]") -> list[Core]:
    """`Joint.decompose` of a core matrix of each joint space; matrices of equal shape go through one call of NumPy."""
    cores = list(matrices)
    alike: dict[tuple[int, ...], list[int]] = {}
    for i, M in enumerate(matrices):
        if not isinstance(M, Core):
            alike.setdefault(M.shape, []).append(i)
    for ids in alike.values():
        U, s, Vh = np.linalg.svd(np.stack([matrices[i] for i in ids]), full_matrices=False)
        for i, *triplet in zip(ids, U, s, Vh, strict=True):
            cores[i] = Core(*triplet)
    return [joint.decompose(core) for joint, core in zip(joints, cores, strict=True)]


@final
@dataclass(frozen=True, slots=True)
class Side:
    """A factor X @ M that is computed when it is read; ``source`` returns X (n, r), and M is (r, k)."""

    n: int
    source: "Callable[[], Array | FactorsSideBySide]"
    M: Floats
    rows: Floats | None = None  # a factor for each row, (n,)

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
            return check_in_range(
                (self.rows[:, None] * times(self.source(), M, np.dtype(np.float64))).astype(dtype), dtype
            )


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
