"""Comparison of two subspaces: φ(i, j), principal angles, distances computed from the angles, and linear CKA.

Everything is computed from the inner products G = U₁ᵀU₂ of two orthonormal bases, which are k1 × k2 numbers. Columns of
length n are formed only if two directions nearly coincide, because G then no longer determines their angle.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import nan, pi, sqrt
from typing import NamedTuple, Self, final

import numpy as np

from loralens.linalg.chance import overlap_chance, overlap_spread
from loralens.linalg.factor import SQUARES, Array, Basis, Floats

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
    def of_one(cls, k: int, n: int) -> "Overlap":
        """The overlap of k directions of R^n with themselves, exactly; a computed product would contain rounding."""
        return _measure_overlaps(phi_map(np.eye(k))[None], np.zeros((1, k)), n)[0]

    @property
    def chance(self) -> Floats:
        """Mean of φ(i, j) between uniform random subspaces, max(i, j)/n; float64, shape (k1, k2)."""
        k1, k2 = self.phi.shape
        return overlap_chance(k1, k2, self.n)


def overlaps(first: Sequence[Basis], second: Sequence[Basis], G: Floats) -> list[Overlap]:
    """The `Overlap` of the first basis of both sequences, of the second, and so on.

    ``G`` has their inner products ``first[p].cross(second[p])``, shape (P, k1, k2). One call for many pairs costs less
    than many calls, and gives the same bits.
    """
    return _measure_overlaps(phi_map(G), _stacked_angles(first, second, G), first[0].n)


def _measure_overlaps(maps: Floats, angles: Floats, n: int) -> list[Overlap]:
    """The overlaps with these maps (P, k1, k2) and angles (P, min(k1, k2)). All numbers are computed at once."""
    count, k1, k2 = maps.shape
    first = full = z = [nan] * count
    gap = [0.0] * count
    chance, sines = nan, np.sin(angles)
    if k1 and k2:
        first, full, gap = maps[:, 0, 0].tolist(), maps[:, -1, -1].tolist(), sines[:, -1].tolist()
        # There cannot be more directions than dimensions, and rounding of k/n must not give more than 1.
        chance, spread = min(max(k1, k2) / n, 1.0), overlap_spread(k1, k2, n)
        # A span that fills the space overlaps fully with everything, so the spread is 0 and z is undefined.
        z = [(value - chance) / spread for value in full] if spread else z
    numbers = zip(maps, angles, first, full, z, _lengths(sines), _lengths(angles), gap, strict=True)
    return [
        Overlap(phi, own, n, one, whole, chance, far, projected, geodesic, sine)
        for phi, own, one, whole, far, projected, geodesic, sine in numbers
    ]


def _lengths(rows: Floats) -> list[float]:
    """The Euclidean length of every row."""
    squares = rows[:, None] @ rows[:, :, None]
    lengths: list[float] = np.sqrt(squares[:, 0, 0]).tolist()
    return lengths


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
    sums = (G * G).cumsum(axis=-2).cumsum(axis=-1)
    return np.asarray(np.clip(sums / _smaller_indices(*G.shape[-2:]), 0.0, 1.0), dtype=np.float64)


@lru_cache(maxsize=64)
def _smaller_indices(k1: int, k2: int) -> Array:
    """min(i, j), shape (k1, k2), which the maps of many pairs share."""
    i, j = np.ogrid[1 : k1 + 1, 1 : k2 + 1]
    return np.minimum(i, j)


def principal_angles(first: Basis, second: Basis, G: Floats | None = None) -> Floats:
    """Principal angles of two spans, radians in [0, π/2], smallest first; float64, shape (min(k1, k2),).

    The singular values of G = U₁ᵀU₂ are cos θ. Where cos θ > 0.99 the cosine determines the angle badly. There the sine
    is computed from the part of U₂ outside the span of U₁, (1 − U₁U₁ᵀ) U₂ (Björck & Golub 1973; Knyazev & Argentati
    2002), so that an angle of 1e-9 is not lost. Only in this case are columns formed.
    """
    G = first.cross(second) if G is None else G
    return np.asarray(_stacked_angles([first], [second], G[None])[0], dtype=np.float64)


def _stacked_angles(first: Sequence[Basis], second: Sequence[Basis], G: Floats) -> Floats:
    """`principal_angles` of many pairs of bases of one shape, from their inner products (P, k1, k2)."""
    # The smaller span comes second, because parts of its directions may lie outside the larger one.
    if G.shape[1] < G.shape[2]:
        first, second, G = second, first, G.swapaxes(1, 2)
    cosines = np.linalg.svd(G, compute_uv=False)
    angles = np.arccos(np.minimum(cosines, 1.0))
    near = np.count_nonzero(cosines > NEAR, axis=1)
    # Few pairs of directions are so near, so the costly columns are rarely formed.
    for p in np.flatnonzero(near).tolist():
        Z = np.linalg.svd(G[p], full_matrices=False)[2][: near[p]].T
        # A basis is orthonormal to about 1e-12; sines of 1e-9 need it to be orthonormal to ε.
        U, P = _orthonormalise(first[p].columns()), _orthonormalise(second[p].columns()) @ Z
        sines = np.linalg.svd(P - U @ (U.T @ P), compute_uv=False)[::-1]
        angles[p, : near[p]] = np.arcsin(np.minimum(sines, 1.0))
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
    strengths = scale_to_unit(s1)[None], scale_to_unit(s2)[None]
    return float(np.clip(weighted_sums(strengths[0], (left * right)[None], strengths[1]), -1.0, 1.0)[0])


def linear_cka(s1: Floats, s2: Floats, G: Floats) -> float:
    """Linear CKA of two matrices on one side, in [0, 1]; NaN where one of them is 0.

    On the in side (G = V₁ᵀV₂) it is ‖M₂M₁ᵀ‖²/(‖M₁M₁ᵀ‖‖M₂M₂ᵀ‖), the cosine of M₁ᵀM₁ and M₂ᵀM₂. It says how similar the
    responses of the two maps to white inputs are (Kornblith et al. 2019, eq. 5, without its centring, since white
    inputs have mean 0). On the out side (G = U₁ᵀU₂) it is the linear CKA of the transposed maps.
    """
    return energy_cka(unit_energies(s1), unit_energies(s2), G)


def energy_cka(first: Floats, second: Floats, G: Floats) -> float:
    """`linear_cka` from the `unit_energies` of both matrices, which many comparisons share."""
    if not (first.size and second.size):
        return nan
    return min(max(float(weighted_sums(first[None], (G * G)[None], second[None])[0]), 0.0), 1.0)


def linear_cka_chance(s1: Floats, s2: Floats, n: int) -> float:
    """Mean of `linear_cka` between uniform directions of R^n: (Σs₁²/√Σs₁⁴)(Σs₂²/√Σs₂⁴)/n; NaN where one is 0."""
    if not (s1.size and s2.size):
        return nan
    return float(unit_energies(s1).sum() * unit_energies(s2).sum() / n)


def weighted_sums(first: Floats, M: Floats, second: Floats) -> Floats:
    """Σ first_i M_ij second_j of P matrices (P, k1, k2) under the weights of their rows (P, k1) and columns (P, k2)."""
    return np.asarray((first[:, None] @ M @ second[:, :, None])[:, 0, 0], dtype=np.float64)


def unit_energies(s: Floats) -> Floats:
    """The squares of the singular values, scaled to a vector of length 1, from which linear CKA is computed."""
    return scale_to_unit(scale_to_unit(s) ** 2)


class FlatVector(NamedTuple):
    """An array as one vector in float64, with its length, and whether its square neither over- nor underflows."""

    x: Floats
    length: float
    is_usual: bool

    @classmethod
    def of(cls, X: Array) -> Self:
        """The numbers of an array of any float dtype."""
        x = X.astype(np.float64).ravel()
        with np.errstate(over="ignore", under="ignore"):
            square = float(np.dot(x, x))
        return cls(x, sqrt(square), SQUARES[0] < square < SQUARES[1])

    def cosine(self, other: "FlatVector") -> float:
        """Cosine with a vector of the same length, in [−1, 1]; NaN where one of them is 0."""
        # The usual sizes need no scaling, which would cost a copy of both arrays.
        if not (self.is_usual and other.is_usual):
            self, other = (FlatVector.of(scale_to_unit(one.x)) for one in (self, other))
        lengths = self.length * other.length
        return min(max(float(np.dot(self.x, other.x) / lengths), -1.0), 1.0) if lengths else nan


def vector_cosine(X: Array, Y: Array) -> float:
    """Cosine of two arrays of the same shape, taken as vectors, in [−1, 1]; NaN where one of them is 0."""
    return FlatVector.of(X).cosine(FlatVector.of(Y))


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
