"""Leading singular triplets of a matrix that multiplies vectors cheaply, with a check that none is missing.

The method is Golub–Kahan bidiagonalisation (Golub & Kahan 1965), in which every new vector is orthogonalised against
all before it. Alone it can miss a repeated singular value. Therefore the matrix itself counts its singular values above
the last one found (`RankUpdate.above`), and the recursion goes on until both counts agree.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, final

import numpy as np

from loralens.errors import FormatError
from loralens.linalg.device import Device
from loralens.linalg.factor import Array, Floats, cross_gram

NOTHING = 1e-14  # relative to ‖B‖: if a projection leaves less than this, it is rounding


class Decomposed(NamedTuple):
    """The thin SVD of a weight, W = U diag(s) Vᵀ. The vectors are rounded to float32, the values are not."""

    U: Array  # (out, k), float32
    s: Floats  # (k,), largest first
    V: Array  # (in, k), float32


def decompose(W: Array, device: Device | None = None) -> Decomposed:
    """Compute the thin SVD of W (out, in), any float dtype, k = min(out, in), by LAPACK or on a GPU.

    The computation is in float64. In float32, neighbouring vectors of a dense spectrum mix by up to 4e-3 (a random W of
    side 1024). Rounding the vectors to float32 at the end changes their entries by a relative 6e-8, and inner products
    with them by about 1e-8.

    Raises
    ------
    FormatError
        W holds NaN or Inf.
    """
    if not np.isfinite(W).all():
        raise FormatError("the weight holds NaN or Inf", fix="download the base model again")
    device = device or Device()
    # float64 on a GPU too, although it is slower there than float32.
    X = device.put(W, "float64")
    U, s, Vh = map(device.numpy, device.xp.linalg.svd(X, full_matrices=False))
    return Decomposed(U.astype(np.float32), s, np.ascontiguousarray(Vh.T, dtype=np.float32))


@final
@dataclass(frozen=True, slots=True)
class RankUpdate:
    """The matrix diag(s) + P Q, shape (m, n), which is not formed; diag(s) is in its upper left corner.

    Attributes
    ----------
    s : float64 array, shape (k,)
        Not negative, largest first, k ≤ min(m, n).
    P : float64 array, shape (m, r)
    Q : float64 array, shape (r, n)
    """

    s: Floats
    P: Floats
    Q: Floats

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.P.shape[0], self.Q.shape[1]

    @property
    def T(self) -> "RankUpdate":
        """The transpose."""
        return RankUpdate(self.s, self.Q.T, self.P.T)

    def times(self, x: Floats) -> Floats:
        """M x, shape (m,)."""
        y = self.P @ (self.Q @ x)
        y[: self.s.size] += self.s * x[: self.s.size]
        return np.asarray(y, dtype=np.float64)

    def adjoint(self, y: Floats) -> Floats:
        """Mᵀ y, shape (n,)."""
        x = (y @ self.P) @ self.Q
        x[: self.s.size] += self.s * y[: self.s.size]
        return np.asarray(x, dtype=np.float64)

    def dense(self) -> Floats:
        """M itself, shape (m, n)."""
        M = self.P @ self.Q
        i = np.arange(self.s.size)
        M[i, i] += self.s
        return np.asarray(M, dtype=np.float64)

    def bound(self) -> float:
        """An upper bound of the largest singular value: max s + ‖P‖_F‖Q‖_F."""
        return float(self.s.max(initial=0.0) + np.linalg.norm(self.P) * np.linalg.norm(self.Q))

    def above(self, value: float) -> int:
        """The number of singular values above ``value``, in O((m + n) r²); ``value`` is positive and not in ``s``.

        By Sylvester's law of inertia for [0 M; Mᵀ 0] − value, with the part of rank 2 r eliminated, the count is the
        number of larger ``s``, plus the number of positive eigenvalues of a 2 r × 2 r matrix, minus r.
        """
        r = self.P.shape[1]
        # s is padded with zeros to each side's length: the diagonal block of a rectangular M ends before its longer
        # side.
        s_P, s_Q = (np.concatenate([self.s, np.zeros(n - self.s.size)]) for n in self.shape)
        # s couples only the leading coordinates of the two sides; the others meet in P Q alone.
        P, Q = self.P[: self.s.size], self.Q[:, : self.s.size]
        T = np.empty((2 * r, 2 * r))
        T[:r, :r] = (self.P.T * (value / (value**2 - s_P**2))) @ self.P
        T[r:, r:] = (self.Q * (value / (value**2 - s_Q**2))) @ self.Q.T
        T[:r, r:] = (P.T * (self.s / (value**2 - self.s**2))) @ Q.T - np.eye(r)
        T[r:, :r] = T[:r, r:].T
        positive = np.count_nonzero(np.linalg.eigvalsh(T) > 0)
        return int(np.count_nonzero(self.s > value) + positive - r)


@final
@dataclass(frozen=True, slots=True)
class Coordinates:
    """A singular basis of W and its extension, in which a `RankUpdate` is expressed.

    Attributes
    ----------
    basis : float32 array, shape (n, k)
    extension : float64 array, shape (n, e)
        Orthonormal, and orthogonal to ``basis``; e ≤ r.
    """

    basis: Array
    extension: Floats

    def columns(self, Y: Floats) -> Floats:
        """The vectors with coordinates Y (k + e, c), shape (n, c), float64."""
        k = self.basis.shape[1]
        inside = cross_gram(self.basis.T, Y[:k])
        return np.asarray(inside + self.extension @ Y[k:], dtype=np.float64)


class UpdatedWeight(NamedTuple):
    """W + B A in the singular bases of W, with the bases of its left and right side."""

    matrix: RankUpdate
    left: Coordinates
    right: Coordinates


def rank_update(W: Decomposed, B: Floats, A: Floats) -> UpdatedWeight:
    """W + B A as a diagonal plus a product of rank r, for B (out, r) and A (r, in), float64.

    Only the longer side of W needs an extension, because the singular vectors of the shorter side are a full basis.
    """
    P, out_side = _coordinates(W.U, B)
    Q, in_side = _coordinates(W.V, A.T)
    return UpdatedWeight(RankUpdate(W.s, P, Q.T), out_side, in_side)


def _coordinates(basis: Array, X: Floats) -> tuple[Floats, Coordinates]:
    """X (n, r) in the coordinates of a basis (n, k), which is extended by the part of X outside its span.

    X is projected twice, because the basis is orthonormal to 1e-7 only. Directions outside whose length is rounding are
    dropped, because they would not be orthogonal to the basis.
    """
    inside = cross_gram(basis, X)
    n, k = basis.shape
    # A square basis spans everything, so X has nothing outside it.
    if n == k or not X.size:
        return inside, Coordinates(basis, np.zeros((n, 0)))
    outside = X - cross_gram(basis.T, inside)
    # The second projection: the first leaves 1e-7 of X inside the span, because the basis was rounded to float32.
    correction = cross_gram(basis, outside)
    outside -= cross_gram(basis.T, correction)
    directions, t, Zh = np.linalg.svd(outside, full_matrices=False)
    count = np.count_nonzero(t > NOTHING * np.linalg.norm(X))
    return np.vstack([inside + correction, t[:count, None] * Zh[:count]]), Coordinates(basis, directions[:, :count])


# A few hundred times the rounding of one product, which is what the recursion can reach.
RESIDUAL = 1e-13  # relative to σ_1: largest ‖Mᵀy − σz‖ of a triplet that has converged
TIE = 1e-9  # relative to σ_1: values that are closer than this count as equal
BREAKDOWN = 1e-14  # relative to ‖M‖: a new vector shorter than this is rounding
SMALL = 512  # length of the side up to which the recursion may run to its end
PATIENCE = 4  # for larger sides a dense SVD is faster once the recursion has made side / PATIENCE steps
Method = Literal["lanczos", "dense"]


class LeadingTriplets(NamedTuple):
    """Singular triplets, largest first."""

    Y: Floats  # (m, k) left vectors
    s: Floats  # (k,)
    Z: Floats  # (n, k) right vectors
    tied: bool  # whether two of s, or the last and the next value, are equal within TIE, so that vectors are not unique
    method: Method


def leading_triplets(M: RankUpdate, k: int) -> LeadingTriplets:
    """The k leading singular triplets of M, k ≤ min(m, n).

    Notes
    -----
    Residuals are below 1e-13 σ_1, so the error of a vector is about 1e-13 σ_1 divided by the distance to the next
    value. The cost is O(j n r + j² n) for j steps; ten triplets at the edge of a random spectrum of 2048 take about 200
    steps. If j would exceed a quarter of the side, M is formed and LAPACK computes its SVD.
    """
    m, n = M.shape
    if m < n:
        Z, s, Y, tied, method = leading_triplets(M.T, k)
        return LeadingTriplets(Y, s, Z, tied, method)

    if M.P.shape[1] == 0:  # a diagonal matrix has unit vectors as singular vectors, whatever ties it has
        return LeadingTriplets(np.eye(m, k), M.s[:k], np.eye(n, k), _has_tie(M.s, k), "lanczos")
    # A small matrix may run to the end of its space, where the recursion is a full SVD anyway.
    limit = n if n <= SMALL else n // PATIENCE
    # Twice the directions wanted, and a few: fewer steps never converge, and every check costs an SVD of B.
    for U, V, B, beta in _bidiagonal(M, limit, first=min(2 * k + 4, limit)):
        X, s, Wh = np.linalg.svd(B)
        if len(s) == n or _is_complete(M, s, beta * np.abs(X[-1]), k):
            return LeadingTriplets(U.T @ X[:, :k], s[:k], V.T @ Wh[:k].T, _has_tie(s, k), "lanczos")
    Y, s, Zh = np.linalg.svd(M.dense(), full_matrices=False)
    return LeadingTriplets(Y[:, :k], s[:k], Zh[:k].T, _has_tie(s, k), "dense")


def _bidiagonal(M: RankUpdate, limit: int, *, first: int) -> Iterator[tuple[Floats, Floats, Floats, float]]:
    """U (j, m), V (j, n), B (j, j) and β with M Vᵀ = Uᵀ B and ‖MᵀUᵀ − VᵀBᵀ‖ = β in its last column, for growing j."""
    m, n = M.shape
    # A fixed start, so that the same matrix gives the same bits.
    rng = np.random.default_rng(0)
    least = BREAKDOWN * M.bound()
    U, V, B = np.zeros((limit, m)), np.zeros((limit, n)), np.zeros((limit, limit))
    v, beta = _direction(rng.standard_normal(n), V[:0], least, rng)[0], 0.0
    due = first
    for j in range(limit):
        V[j] = v
        u = M.times(v) - (beta * U[j - 1] if j else 0.0)
        U[j], B[j, j] = _direction(u, U[:j], least, rng)
        if j:
            B[j - 1, j] = beta
        if j + 1 < n:
            v, beta = _direction(M.adjoint(U[j]) - B[j, j] * v, V[: j + 1], least, rng)
        else:
            beta = 0.0
        if j + 1 in (due, limit):
            # Checked at steps that grow by a fifth: the SVDs of all checks together cost a few times the last one.
            due = due + due // 5 + 5
            yield U[: j + 1], V[: j + 1], B[: j + 1, : j + 1], beta


def _direction(x: Floats, Q: Floats, least: float, rng: np.random.Generator) -> tuple[Floats, float]:
    """The unit vector of the part of x orthogonal to the rows of Q, and the length of that part.

    If the length is 0, the vector is a random one orthogonal to Q. Two projections are enough (Giraud et al. 2005).
    """
    x = _project_out(x, Q)
    length = float(np.linalg.norm(x))
    if length > least:
        return x / length, length
    # The space found so far is invariant: a random direction outside it starts the next one.
    x = _project_out(rng.standard_normal(x.size), Q)
    return x / np.linalg.norm(x), 0.0


def _project_out(x: Floats, Q: Floats) -> Floats:
    """The part of x that is orthogonal to the rows of Q, projected twice."""
    for _ in range(2):
        x = x - (Q @ x) @ Q
    return x


def _is_complete(M: RankUpdate, s: Floats, residuals: Floats, k: int) -> bool:
    """Whether s[:k] has converged and contains every singular value of M above s[k - 1]."""
    # The value behind the k-th is needed to see a gap.
    if len(s) <= k or s[0] == 0:
        return False
    gap_behind = np.diff(-s) > TIE * s[0]
    # Values closer than `TIE` form a group. The count is therefore taken in the next gap behind a whole group.
    gaps = np.flatnonzero(gap_behind[k - 1 :])
    if not gaps.size:
        return False
    j = k + int(gaps[0])
    if (residuals[:j] > RESIDUAL * s[0]).any():
        return False
    # The recursion can miss a copy of a repeated value; the count taken from the matrix cannot.
    # The argument of `above` is in the gap and as far as possible from the singular values of W, because `above`
    # divides by the distance to them.
    marks = np.sort(np.concatenate([s[j - 1 : j + 1], M.s[(M.s > s[j]) & (M.s < s[j - 1])]]))
    widest = np.diff(marks).argmax()
    return M.above(float(marks[widest] + marks[widest + 1]) / 2) == j


def _has_tie(s: Floats, k: int) -> bool:
    """Whether one of the first k values equals the next one within `TIE`."""
    return bool((np.diff(-s[: k + 1]) <= TIE * s[0]).any()) if s.size > 1 else False
