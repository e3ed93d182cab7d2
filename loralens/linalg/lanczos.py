"""Leading singular triplets of a matrix that multiplies vectors cheaply, with a check that none is missing.

The method is Lanczos' (ARPACK). Alone it can miss a repeated singular value. Therefore the matrix itself counts its
singular values above the last one found (`RankUpdate.above`), and a dense SVD replaces a result that lacks one.
"""

from contextlib import suppress
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


TIE = 1e-9  # relative to σ_1: values that are closer than this count as equal
SMALL = 512  # length of the shorter side up to which a dense SVD is as fast
PATIENCE = 4  # more than this part of all directions are found by a dense SVD
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
    ARPACK errs by a few ε σ_1, and a vector by that divided by the distance to the next
    value. A step costs O((m + n) r). If values are missing or tied, M is formed and LAPACK computes its SVD, as it does
    for a small M.
    """
    (m, n), side = M.shape, min(M.shape)
    if M.P.shape[1] == 0:  # a diagonal matrix has unit vectors as singular vectors, whatever ties it has
        return LeadingTriplets(np.eye(m, k), M.s[:k], np.eye(n, k), _has_tie(M.s, k), "lanczos")
    if side > SMALL and k < side // PATIENCE:
        from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, svds

        # A fixed start, so that the same matrix gives the same bits.
        start = np.random.default_rng(0).standard_normal(side)
        operator = LinearOperator(
            (m, n), lambda x: M.times(x.ravel()), lambda y: M.adjoint(y.ravel()), dtype=np.float64
        )
        with suppress(ArpackNoConvergence):
            Y, s, Zh = svds(operator, k + 1, v0=start)
            order = np.argsort(-s)
            if _is_complete(M, s[order], k):
                order = order[:k]
                return LeadingTriplets(Y[:, order], s[order], Zh[order].T, _has_tie(s[order], k), "lanczos")
    Y, s, Zh = np.linalg.svd(M.dense(), full_matrices=False)
    return LeadingTriplets(Y[:, :k], s[:k], Zh[:k].T, _has_tie(s, k), "dense")


def _is_complete(M: RankUpdate, s: Floats, k: int) -> bool:
    """Whether s, the k + 1 values that were found, has every singular value of M above s[k]."""
    if s[k - 1] - s[k] <= TIE * s[0]:
        return False
    # Lanczos can miss a copy of a repeated value; the count taken from the matrix cannot. Its argument is as far as
    # possible from the singular values of W, because `above` divides by the distance to them.
    marks = np.sort(np.concatenate([s[k - 1 :], M.s[(M.s > s[k]) & (M.s < s[k - 1])]]))
    widest = np.diff(marks).argmax()
    return M.above(float(marks[widest] + marks[widest + 1]) / 2) == k


def _has_tie(s: Floats, k: int) -> bool:
    """Whether one of the first k values equals the next one within `TIE`."""
    return bool((np.diff(-s[: k + 1]) <= TIE * s[0]).any()) if s.size > 1 else False
