"""W + B A in the singular bases of W: a diagonal plus a product of rank r, which multiplies a vector in O(n r).

Let W = U₀ S₀ V₀ᵀ, and extend both bases by the directions that B and Aᵀ add, U₀⁺ = [U₀, E] and V₀⁺ = [V₀, F]. Then

    W + B A = U₀⁺ (S₀⁺ + P Q) V₀⁺ᵀ,    P = U₀⁺ᵀB,  Q = A V₀⁺,  S₀⁺ = S₀ padded with zeros,

so the matrix in the middle has the singular values of W + B A. Its left singular vectors y are those of W + B A in the
coordinates of U₀⁺, so their first entries are the inner products with the left singular vectors of W.
"""

from dataclasses import dataclass
from typing import NamedTuple, final

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
