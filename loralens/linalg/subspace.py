"""How two subspaces lie to each other: φ(i, j), principal angles, the distances made of them, linear CKA.

Everything comes from the inner products G = U₁ᵀU₂ of two orthonormal bases, k1 × k2 numbers; columns of length n are
formed only where two directions nearly coincide and G no longer tells how nearly.
"""

from dataclasses import dataclass
from math import pi, sqrt
from typing import Self, final

import numpy as np

from loralens.linalg.basis import Basis
from loralens.linalg.chance import overlap_chance, overlap_spread
from loralens.linalg.factor import SQUARES, Array, Floats

NEAR = 0.99  # cosine (8°) from which an angle is taken from its sine: arccos would magnify the error of G sevenfold


@final
@dataclass(frozen=True, slots=True)
class Overlap:
    """Two bases of R^n, of k1 and k2 directions ordered by strength. Numbers are dimensionless, angles in radians.

    Attributes
    ----------
    phi : float64 array, shape (k1, k2)
        See `phi_map`.
    angles : float64 array, shape (min(k1, k2),)
        Principal angles of the two whole spans, smallest first, in [0, π/2].
    n : int
        Dimension of the space.
    """

    phi: Floats
    angles: Floats
    n: int

    @classmethod
    def of_one(cls, k: int, n: int) -> Self:
        """Of k directions of R^n with themselves, exactly: no product of columns says it so."""
        return cls(phi_map(np.eye(k)), np.zeros(k), n)

    @property
    def chance(self) -> Floats:
        """Mean of φ(i, j) between uniform random subspaces, max(i, j)/n; float64, shape (k1, k2)."""
        k1, k2 = self.phi.shape
        return overlap_chance(k1, k2, self.n)

    @property
    def first(self) -> float:
        """φ(1, 1), the squared cosine of the two strongest directions; NaN where a basis is empty."""
        return float(self.phi[0, 0]) if self.phi.size else float("nan")

    @property
    def full(self) -> float:
        """φ(k1, k2), of the whole spans: the mean cos² of the principal angles; NaN where a basis is empty."""
        return float(self.phi[-1, -1]) if self.phi.size else float("nan")

    @property
    def full_chance(self) -> float:
        """Mean of `full` under chance, max(k1, k2)/n; NaN where a basis is empty."""
        return min(max(self.phi.shape) / self.n, 1.0) if self.phi.size else float("nan")

    @property
    def z(self) -> float:
        """`full` less its chance level, in standard deviations; NaN where chance leaves it no freedom."""
        k1, k2 = self.phi.shape
        spread = overlap_spread(k1, k2, self.n)
        return (self.full - self.full_chance) / spread if spread else float("nan")

    @property
    def projection_distance(self) -> float:
        """√(p − Σcos²θ) = ‖sin θ‖₂, p = min(k1, k2), in [0, √p]: the d of Hu et al. 2021, App. G (Ham & Lee 2008).

        φ(k1, k2) = 1 − d²/p. The paper prints (1 − d²)/p, which is that only for p = 1.
        """
        return float(np.linalg.norm(np.sin(self.angles)))

    @property
    def geodesic_distance(self) -> float:
        """‖θ‖₂, in [0, √p·π/2]: the length of the shortest way from one span to the other (or into it)."""
        return float(np.linalg.norm(self.angles))

    @property
    def gap(self) -> float:
        """Sine of the largest angle, in [0, 1]: 1 where a direction of the smaller span is orthogonal to the larger."""
        return float(np.sin(self.angles[-1])) if self.angles.size else 0.0


def overlap(first: Basis, second: Basis, G: Floats | None = None) -> Overlap:
    """The `Overlap` of two bases; ``G`` is ``first.cross(second)`` where that is known already."""
    G = first.cross(second) if G is None else G
    return Overlap(phi_map(G), principal_angles(first, second, G), first.n)


def phi_map(G: Floats) -> Floats:
    """φ(i, j) of every pair of leading subspaces, from the inner products of two orthonormal bases.

    φ(i, j) = ‖U₁ᵢᵀ U₂ⱼ‖_F² / min(i, j), U₁ᵢ and U₂ⱼ the first i and j columns. 0: orthogonal; 1: one contains the
    other. Hu et al. 2021 (arXiv 2106.09685), §7.2, eq. 4.

    Parameters
    ----------
    G : float64 array, shape (k1, k2)
        U₁ᵀU₂.

    Returns
    -------
    float64 array, shape (k1, k2)
        In [0, 1]. All of it for the price of one: the squares summed up along both axes.
    """
    i, j = np.ogrid[1 : G.shape[0] + 1, 1 : G.shape[1] + 1]
    sums = (G * G).cumsum(axis=0).cumsum(axis=1)
    return np.asarray(np.clip(sums / np.minimum(i, j), 0.0, 1.0), dtype=np.float64)


def principal_angles(first: Basis, second: Basis, G: Floats | None = None) -> Floats:
    """Principal angles of two spans, radians in [0, π/2], smallest first; float64, shape (min(k1, k2),).

    cos θ are the singular values of G = U₁ᵀU₂. Where cos θ > 0.99 that says little: the sines of those directions are
    taken from what U₁ leaves of them, (1 − U₁U₁ᵀ) U₂ (Björck & Golub 1973; Knyazev & Argentati 2002), so that an angle
    of 1e-9 is not lost. Only then are columns formed.
    """
    G = first.cross(second) if G is None else G
    if G.shape[0] < G.shape[1]:
        first, second, G = second, first, G.T
    cosines = np.linalg.svd(G, compute_uv=False)
    angles = np.arccos(np.minimum(cosines, 1.0))
    near = int(np.count_nonzero(cosines > NEAR))
    if near:
        Z = np.linalg.svd(G, full_matrices=False)[2][:near].T
        U, P = _orthonormal(first.columns()), _orthonormal(second.columns()) @ Z
        sines = np.linalg.svd(P - U @ (U.T @ P), compute_uv=False)[::-1]
        angles[:near] = np.arcsin(np.minimum(sines, 1.0))
    return np.asarray(np.clip(angles, 0.0, pi / 2), dtype=np.float64)


def update_cosine(s1: Floats, s2: Floats, left: Floats, right: Floats) -> float:
    """Cosine ⟨M₁, M₂⟩/(‖M₁‖‖M₂‖) of two matrices U S Vᵀ, in [−1, 1]; 0 where one of them is 0.

    Parameters
    ----------
    s1, s2 : float64 arrays, shapes (k1,) and (k2,)
        Their nonzero singular values.
    left, right : float64 arrays, shape (k1, k2)
        U₁ᵀU₂ and V₁ᵀV₂, which must keep the pairing of U with V.

    Notes
    -----
    Σ s₁ᵢ s₂ⱼ (U₁ᵀU₂ ∘ V₁ᵀV₂)ᵢⱼ: the Gram form Σ (B₁ᵀB₂ ∘ A₁A₂ᵀ) in orthonormal coordinates, in which nothing cancels.
    """
    if not (s1.size and s2.size):
        return 0.0
    return float(np.clip(_unit(s1) @ (left * right) @ _unit(s2), -1.0, 1.0))


def linear_cka(s1: Floats, s2: Floats, G: Floats) -> float:
    """Linear CKA of two matrices on one side, in [0, 1]; NaN where one of them is 0.

    Of the in side (G = V₁ᵀV₂) it is ‖M₂M₁ᵀ‖²/(‖M₁M₁ᵀ‖‖M₂M₂ᵀ‖), the cosine of M₁ᵀM₁ and M₂ᵀM₂: how alike the inputs are
    that both maps respond to, white ones given (Kornblith et al. 2019, eq. 5, without its centring, as white inputs
    have mean 0). Of the out side (G = U₁ᵀU₂) it is the same of the transposed maps.
    """
    if not (s1.size and s2.size):
        return float("nan")
    first, second = _unit(_unit(s1) ** 2), _unit(_unit(s2) ** 2)
    return float(np.clip(first @ (G * G) @ second, 0.0, 1.0))


def linear_cka_chance(s1: Floats, s2: Floats, n: int) -> float:
    """Mean of `linear_cka` between uniform directions of R^n: (Σs₁²/√Σs₁⁴)(Σs₂²/√Σs₂⁴)/n; NaN where one is 0."""
    if not (s1.size and s2.size):
        return float("nan")
    return float(_unit(_unit(s1) ** 2).sum() * _unit(_unit(s2) ** 2).sum() / n)


def vector_cosine(X: Array, Y: Array) -> float:
    """Cosine of two arrays of one shape, any float dtypes, as vectors, in [−1, 1]; NaN where one of them is 0."""
    x, y = (Z.astype(np.float64).ravel() for Z in (X, Y))
    with np.errstate(over="ignore", under="ignore"):
        safe = all(SQUARES[0] < np.dot(z, z) < SQUARES[1] for z in (x, y))
    if not safe:
        x, y = _unit(x), _unit(y)
    lengths = sqrt(np.dot(x, x)) * sqrt(np.dot(y, y))
    return float(np.clip(np.dot(x, y) / lengths, -1.0, 1.0)) if lengths else float("nan")


def _unit(x: Floats) -> Floats:
    """The vector at length 1, whatever its size; 0 where it is 0."""
    peak = np.abs(x).max(initial=0.0)
    if peak == 0:
        return x
    x = x / peak
    return np.asarray(x / sqrt(np.dot(x, x)), dtype=np.float64)


def _orthonormal(U: Floats) -> Floats:
    """The orthonormal columns nearest to U, which is near: one Newton step for the polar factor, error e → ¾e²."""
    return np.asarray(1.5 * U - U @ (0.5 * (U.T @ U)), dtype=np.float64)
