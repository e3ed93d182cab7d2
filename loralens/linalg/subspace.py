"""Comparison of two subspaces: φ(i, j), principal angles, distances computed from the angles, and linear CKA.

Everything is computed from the inner products G = U₁ᵀU₂ of two orthonormal bases, which are k1 × k2 numbers. Columns of
length n are formed only if two directions nearly coincide, because G then no longer determines their angle.
"""

from dataclasses import dataclass
from math import nan, pi, sqrt
from typing import final

import numpy as np

from loralens.linalg.chance import overlap_chance, overlap_spread
from loralens.linalg.factor import Array, Basis, Floats

NEAR = 0.99  # cosine (8°) above which an angle is computed from its sine: arccos would magnify the error of G sevenfold


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
    first : float
        φ(1, 1), the squared cosine of the two strongest directions; NaN where a basis is empty.
    full : float
        φ(k1, k2) of the whole spans, the mean cos² of the principal angles; NaN where a basis is empty.
    full_chance : float
        Mean of `full` under chance, max(k1, k2)/n; NaN where a basis is empty.
    z : float
        `full` minus its chance level, in standard deviations; NaN where all subspaces have the same `full`.
    projection_distance : float
        √(p − Σcos²θ) = ‖sin θ‖₂, p = min(k1, k2), in [0, √p]: the d of Hu et al. 2021, App. G (Hamm & Lee 2008).
        φ(k1, k2) = 1 − d²/p. The paper prints (1 − d²)/p, which is the same only for p = 1.
    geodesic_distance : float
        ‖θ‖₂, in [0, √p·π/2]: the length of the shortest path from the smaller span into the larger.
    gap : float
        Sine of the largest angle, in [0, 1]: 1 where a direction of the smaller span is orthogonal to the larger.
    """

    phi: Floats
    angles: Floats
    n: int
    first: float
    full: float
    full_chance: float
    z: float
    projection_distance: float
    geodesic_distance: float
    gap: float

    @classmethod
    def of(cls, first: Basis, second: Basis, G: Floats) -> "Overlap":
        """The overlap of two bases with the inner products ``G``, shape (k1, k2)."""
        return cls._measure(phi_map(G), principal_angles(first, second, G), first.n)

    @classmethod
    def _measure(cls, phi: Floats, angles: Floats, n: int) -> "Overlap":
        k1, k2 = phi.shape
        first = full = chance = z = nan
        gap, sines = 0.0, np.sin(angles)
        if k1 and k2:
            first, full, gap = float(phi[0, 0]), float(phi[-1, -1]), float(sines[-1])
            # There cannot be more directions than dimensions, and rounding of k/n must not give more than 1.
            chance, spread = min(max(k1, k2) / n, 1.0), overlap_spread(k1, k2, n)
            # A span that fills the space overlaps fully with everything, so the spread is 0 and z is undefined.
            z = (full - chance) / spread if spread else nan
        lengths = sqrt(np.dot(sines, sines)), sqrt(np.dot(angles, angles))
        return cls(phi, angles, n, first, full, chance, z, *lengths, gap)

    @property
    def chance(self) -> Floats:
        """Mean of φ(i, j) between uniform random subspaces, max(i, j)/n; float64, shape (k1, k2)."""
        k1, k2 = self.phi.shape
        return overlap_chance(k1, k2, self.n)


def phi_map(G: Floats) -> Floats:
    """φ(i, j) of every pair of leading subspaces, from the inner products of two orthonormal bases.

    φ(i, j) = ‖U₁ᵢᵀ U₂ⱼ‖_F² / min(i, j), where U₁ᵢ and U₂ⱼ are the first i and j columns. It is 0 for orthogonal
    subspaces and 1 if one contains the other. Hu et al. 2021 (arXiv 2106.09685), §7.2, eq. 4.

    Parameters
    ----------
    G : float64 array, shape (..., k1, k2)
        U₁ᵀU₂, or a stack of them.

    Returns
    -------
    float64 array, shape (..., k1, k2)
        In [0, 1]. The cumulative sums of G² along both axes give all entries at the cost of one.
    """
    i, j = np.ogrid[1 : G.shape[0] + 1, 1 : G.shape[1] + 1]
    sums = (G * G).cumsum(axis=0).cumsum(axis=1)
    return np.asarray(np.clip(sums / np.minimum(i, j), 0.0, 1.0), dtype=np.float64)


def principal_angles(first: Basis, second: Basis, G: Floats | None = None) -> Floats:
    """Principal angles of two spans, radians in [0, π/2], smallest first; float64, shape (min(k1, k2),).

    The singular values of G = U₁ᵀU₂ are cos θ. Where cos θ > 0.99 the cosine determines the angle badly. There the sine
    is computed from the part of U₂ outside the span of U₁, (1 − U₁U₁ᵀ) U₂ (Björck & Golub 1973; Knyazev & Argentati
    2002), so that an angle of 1e-9 is not lost. Only in this case are columns formed.
    """
    G = first.cross(second) if G is None else G
    # The smaller span comes second, because parts of its directions may lie outside the larger one.
    if G.shape[0] < G.shape[1]:
        first, second, G = second, first, G.T
    cosines = np.linalg.svd(G, compute_uv=False)
    angles = np.arccos(np.minimum(cosines, 1.0))
    if near := np.count_nonzero(cosines > NEAR):
        Z = np.linalg.svd(G, full_matrices=False)[2][:near].T
        # A basis is orthonormal to about 1e-12; sines of 1e-9 need it to be orthonormal to ε.
        U, P = _orthonormalise(first.columns()), _orthonormalise(second.columns()) @ Z
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
        U₁ᵀU₂ and V₁ᵀV₂. The signs of U and V must belong together.

    Notes
    -----
    The inner product is Σ s₁ᵢ s₂ⱼ (U₁ᵀU₂ ∘ V₁ᵀV₂)ᵢⱼ. This is the Gram form Σ (B₁ᵀB₂ ∘ A₁A₂ᵀ) in orthonormal
    coordinates, in which nothing cancels.
    """
    if not (s1.size and s2.size):
        return 0.0
    return min(max(float(scale_to_unit(s1) @ (left * right) @ scale_to_unit(s2)), -1.0), 1.0)


def linear_cka(first: Floats, second: Floats, G: Floats) -> float:
    """Linear CKA of two matrices on one side, in [0, 1]; NaN where one of them is 0.

    ``first`` and ``second`` are the `unit_energies` of the matrices. On the in side (G = V₁ᵀV₂) the result is
    ‖M₂M₁ᵀ‖²/(‖M₁M₁ᵀ‖‖M₂M₂ᵀ‖), the cosine of M₁ᵀM₁ and M₂ᵀM₂. It says how similar the responses of the two maps to
    white inputs are (Kornblith et al. 2019, eq. 5, without its centring, since white inputs have mean 0). On the out
    side (G = U₁ᵀU₂) it is the linear CKA of the transposed maps.
    """
    return min(max(float(first @ (G * G) @ second), 0.0), 1.0) if first.size and second.size else nan


def unit_energies(s: Floats) -> Floats:
    """The squares of the singular values, scaled to a vector of length 1, from which linear CKA is computed."""
    return scale_to_unit(scale_to_unit(s) ** 2)


def vector_cosine(X: Array, Y: Array) -> float:
    """Cosine of two arrays of the same shape, taken as vectors, in [−1, 1]; NaN where one of them is 0."""
    x, y = (Z.astype(np.float64).ravel() for Z in (X, Y))
    lengths = sqrt(np.dot(x, x)) * sqrt(np.dot(y, y))
    return min(max(float(np.dot(x, y) / lengths), -1.0), 1.0) if lengths else nan


def scale_to_unit(x: Floats) -> Floats:
    """The vector scaled to length 1, without overflow or underflow; a zero vector stays 0."""
    peak = np.abs(x).max(initial=0.0)
    # Left as it is: dividing by its length would make NaN of it.
    if peak == 0:
        return x
    x = x / peak
    return np.asarray(x / sqrt(np.dot(x, x)), dtype=np.float64)


def _orthonormalise(U: Floats) -> Floats:
    """The nearest orthonormal columns to U by one Newton step for the polar factor, which turns an error e into ¾e²."""
    return np.asarray(1.5 * U - U @ (0.5 * (U.T @ U)), dtype=np.float64)
