"""W + B A seen from the singular bases of W: a diagonal plus a product of rank r, whose products cost O(n r).

With W = U₀ S₀ V₀ᵀ and both bases extended by what B and Aᵀ add to them, U₀⁺ = [U₀, E] and V₀⁺ = [V₀, F],

    W + B A = U₀⁺ (S₀⁺ + P Q) V₀⁺ᵀ,    P = U₀⁺ᵀB,  Q = A V₀⁺,  S₀⁺ = S₀ padded with zeros,

so the singular values of W + B A are those of the matrix in the middle, and its left vectors y are those of W + B A in
the coordinates of U₀⁺: their first entries are the inner products with the left vectors of W.
"""

from dataclasses import dataclass
from typing import NamedTuple, final

import numpy as np

from loralens.errors import FormatError
from loralens.linalg.device import Device
from loralens.linalg.factor import Array, Floats, cross_gram

NOTHING = 1e-14  # of ‖B‖: what a projection leaves of it below this is rounding


class Decomposed(NamedTuple):
    """The thin SVD of a weight, W = U diag(s) Vᵀ, its vectors rounded to float32 and its values not."""

    U: Array  # (out, k), float32
    s: Floats  # (k,), largest first
    V: Array  # (in, k), float32


def decompose(W: Array, device: Device | None = None) -> Decomposed:
    """The thin SVD of W (out, in), any float dtype, k = min(out, in), by LAPACK or on a GPU.

    Computed in float64: in float32 neighbouring vectors of a dense spectrum mix by up to 4e-3 (a random W of side
    1024). Rounding the vectors once, at the end, moves their entries by 6e-8 relative, and inner products with them by
    about 1e-8.

    Raises
    ------
    FormatError
        W holds NaN or Inf.
    """
    if not np.isfinite(W).all():
        raise FormatError("the weight holds NaN or Inf", fix="download the base model again")
    U, s, Vh = _svd(W, device or Device())
    return Decomposed(U.astype(np.float32), s, np.ascontiguousarray(Vh.T, dtype=np.float32))


def _svd(W: Array, device: Device) -> tuple[Floats, Floats, Floats]:
    """U, s and Vh, float64, wherever the device computes them."""
    X = device.put(W, "float64")
    if device.torch is None:
        U, s, Vh = np.linalg.svd(X, full_matrices=False)
    else:
        import torch

        U, s, Vh = torch.linalg.svd(X, full_matrices=False)
    return device.numpy(U), device.numpy(s), device.numpy(Vh)


@final
@dataclass(frozen=True, slots=True)
class RankUpdate:
    """The matrix diag(s) + P Q, shape (m, n), never formed; s stands in its upper left corner.

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
        """How many singular values are larger than ``value``, which is positive and none of ``s``; O((m + n) r²).

        Sylvester's law of inertia for [0 M; Mᵀ 0] − value, with the part of rank 2 r eliminated: the count is that of
        ``s`` plus the positive eigenvalues of a 2 r × 2 r matrix, less r.
        """
        r = self.P.shape[1]
        s_P, s_Q = (np.concatenate([self.s, np.zeros(n - self.s.size)]) for n in self.shape)
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
    """A singular basis of W and its extension: the columns that the coordinates of a `RankUpdate` belong to.

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


class Seen(NamedTuple):
    """W + B A in the bases of W."""

    matrix: RankUpdate
    left: Coordinates
    right: Coordinates


def rank_update(W: Decomposed, B: Floats, A: Floats) -> Seen:
    """W + B A as a diagonal plus a product, for B (out, r) and A (r, in), float64.

    Only the longer side of W needs an extension: the singular vectors of the other are a basis of it.
    """
    P, left = _coordinates(W.U, B)
    Q, right = _coordinates(W.V, A.T)
    return Seen(RankUpdate(W.s, P, Q.T), left, right)


def _coordinates(basis: Array, X: Floats) -> tuple[Floats, Coordinates]:
    """X (n, r) in the coordinates of a basis (n, k), extended by what X has outside its span.

    Projected twice: the basis is orthonormal to 1e-7 only. Of directions outside, only those are kept that have a
    length, as any others would not be orthogonal to the basis.
    """
    inside = cross_gram(basis, X)
    n, k = basis.shape
    if n == k or not X.size:
        return inside, Coordinates(basis, np.zeros((n, 0)))
    rest = X - cross_gram(basis.T, inside)
    more = cross_gram(basis, rest)
    rest -= cross_gram(basis.T, more)
    E, t, Zh = np.linalg.svd(rest, full_matrices=False)
    kept = np.count_nonzero(t > NOTHING * np.linalg.norm(X))
    return np.vstack([inside + more, t[:kept, None] * Zh[:kept]]), Coordinates(basis, E[:, :kept])
