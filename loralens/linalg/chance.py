"""Chance levels: mean and spread of overlaps between independent random directions.

The null model keeps the singular values and draws the directions uniformly (Haar) on each side. The first two moments
are then known in closed form, so nothing is sampled and no seed is needed.
"""

from functools import lru_cache
from math import lgamma, pi, sqrt

import numpy as np

from loralens.linalg.factor import Floats


def overlap_chance(k1: int, k2: int, n: int) -> Floats:
    """Mean of φ(i, j) between uniform subspaces of R^n, max(i, j)/n; float64, shape (k1, k2)."""
    i, j = np.ogrid[1 : k1 + 1, 1 : k2 + 1]
    # More directions than dimensions overlap fully, and φ is then 1, not larger.
    return np.asarray(np.minimum(np.maximum(i, j) / n, 1.0), dtype=np.float64)


def overlap_spread(i: int, j: int, n: int) -> float:
    """Standard deviation of φ(i, j) between uniform subspaces of R^n; 0 where one of them is all of R^n.

    Var Σcos² = 2 i j (n − i)(n − j) / (n² (n − 1)(n + 2)), and φ = Σcos²/min(i, j).
    """
    if not (0 < i < n and 0 < j < n):
        return 0.0
    return sqrt(2 * i * j * (n - i) * (n - j) / ((n - 1) * (n + 2))) / n / min(i, j)


def overlap_tail(phi: float, i: int, j: int, n: int) -> float:
    """Probability that φ(i, j) between uniform subspaces of R^n is at least ``phi``.

    It is computed from the beta distribution with the same mean and spread. That is exact where one of the subspaces is
    a single direction: φ is then Beta(k/2, (n − k)/2), and exceeds 5 standard deviations in 0.5 % of cases.
    """
    from scipy.special import betainc  # imported here: it takes 50 ms, and only this function needs it

    mean, spread = max(i, j) / n, overlap_spread(i, j, n)
    # If the spread is 0, φ has only one possible value and reaches it with certainty.
    if not spread:
        return 1.0
    # α + β of the beta distribution with this mean and variance.
    total = mean * (1 - mean) / spread**2 - 1
    # The upper tail of Beta(α, β) is the lower tail of Beta(β, α) at 1 − φ, which does not cancel.
    return float(betainc((1 - mean) * total, mean * total, min(max(1 - phi, 0.0), 1.0)))


def cosine_spread(shape: tuple[int, int]) -> float:
    """Standard deviation 1/√(out·in) of the cosine of two random updates of this shape; its mean is 0 at every rank.

    This is exact if the directions of both sides are uniform: E⟨M, P N Qᵀ⟩² = ‖M‖²‖N‖²/(out·in). At small ranks the
    distribution has heavier tails than a Gaussian.
    """
    return 1 / sqrt(shape[0] * shape[1])


def projection_moments(shape: tuple[int, int], rank: int, squares: float, fourths: float) -> tuple[float, float]:
    """Mean and standard deviation of ‖UᵀWV‖_F² over uniform U (out, rank) and V (in, rank).

    Parameters
    ----------
    shape : tuple of int
        (out, in) of W.
    rank : int
        At most min(out, in).
    squares, fourths : float
        Σσ² = ‖W‖_F² and Σσ⁴ = ‖WᵀW‖_F² of W.

    Notes
    -----
    The mean is rank²‖W‖²/(out·in). The variance follows from E[Q_ij Q_kl] = α δ_ij δ_kl + β (δ_ik δ_jl + δ_il δ_jk) for
    a uniform projection Q, which is applied once for each side.
    """
    out, in_ = shape
    mean = rank**2 / (out * in_) * squares
    # First the expectation over V with U fixed, then over U.
    alpha, beta = _alpha_beta(in_, rank)
    trace_squared = alpha * squares**2 + 2 * beta * fourths  # E (tr M)², M = W Q Wᵀ
    square_trace = (alpha + beta) * fourths + beta * squares**2  # E tr M²
    alpha, beta = _alpha_beta(out, rank)
    second = alpha * trace_squared + 2 * beta * square_trace  # E (tr P M)²
    # max: rounding may leave a variance of 0 slightly negative.
    return mean, sqrt(max(second - mean**2, 0.0))


def projection_beyond(mean: float, spread: float, far: float) -> float:
    """Probability that ‖UᵀWV‖_F² is more than ``far`` standard deviations from its mean, on either side.

    It is computed from the gamma distribution with the same mean and spread, because ‖UᵀWV‖_F² is a sum of about
    2·(mean/spread)² squares of nearly Gaussian numbers. At rank 1 this is χ²₁, which exceeds 3 standard deviations in
    2.2 % of cases; a Gaussian does so in 0.27 %. In comparison with samples, from flat to rank-one W, the probability
    is wrong by at most a third of itself in spaces ten times as wide as the rank. In narrower spaces, where ‖UᵀWV‖ has
    an upper limit, it is too large by up to three quarters.
    """
    from scipy.special import gammainc, gammaincc

    shape = (mean / spread) ** 2
    reach = far * sqrt(shape)
    return float(gammaincc(shape, shape + reach) + gammainc(shape, max(shape - reach, 0.0)))


def _alpha_beta(n: int, r: int) -> tuple[float, float]:
    """α and β of a uniform projection of rank r in R^n; in R^1 only α + 2β = 1 matters."""
    # β's formula divides by n − 1.
    if n == 1:
        return 1.0 / 3.0, 1.0 / 3.0
    beta = r * (n - r) / (n * (n - 1) * (n + 2))
    return (r * r - 2 * beta * n) / n**2, beta


# Just above the rounding of float64: terms behind it change no digit.
LEAST = 1e-14  # size of the integrand, relative to its peak, at which the sum ends
PRECISION = 1e-5  # absolute, of the median
# Below n = 9 the integrand falls slowly, and the sum would need millions of terms for `LEAST`.
MOST = 50_000  # most terms of the sum; this limit is reached below n = 9 only
PART = 1 << 12  # numbers whose error function is computed at a time


@lru_cache(maxsize=4096)
def largest_entry_chance(n: int, k: int, threshold: float) -> float:
    """P(max |z_i| < threshold) over the first k ≤ n entries of a uniform unit vector z of R^n.

    Notes
    -----
    z is a Gaussian vector divided by its length, and the two are independent. The Laplace transform of the probability
    in the squared length is therefore a product of one error function for each entry. Its inverse is

        P = Γ(n/2) / (2πi) ∫ eᵛ v^(−n/2) erf(threshold √v)ᵏ dv

    along the vertical line through the saddle n/2. On this line a plain sum converges exponentially. The error is below
    1e-9 from n = 5 on, 1e-5 at n = 3 and 4, and 1e-3 at n = 2.
    """
    from scipy.special import erf  # it takes 50 ms to import

    # In one dimension |z| is always 1, and no entry of a unit vector exceeds 1.
    if n == 1 or threshold >= 1:
        return float(threshold > 1 or n > 1)
    # The integrand is about √n wide at the saddle; twelve points across it reach the stated error.
    saddle, step = n / 2, min(0.5, sqrt(n) / 12)
    end = saddle * LEAST ** (-2 / n)
    # At least 64 terms, so that the sum also covers the saddle where the integrand falls fast.
    count = int(min(MOST, max(64.0, end / step)))
    terms = np.empty(count)
    # A part at a time, as the numbers in between take many times the memory of the terms.
    for start in range(0, count, PART):
        v = saddle + 1j * step * (np.arange(start, min(start + PART, count)) + 0.5)
        logs = np.log(erf(threshold * np.sqrt(v)))
        terms[start : start + PART] = np.exp(lgamma(saddle) + v - saddle * np.log(v) + k * logs).real
    return float(np.clip(step / pi * terms.sum(), 0.0, 1.0))


@lru_cache(maxsize=1024)
def largest_entry_median(n: int, k: int) -> float:
    """The median of max |z_i| over the first k entries of a uniform unit vector of R^n, to 1e-5."""
    low, high = 0.0, 1.0
    # Bisection: the chance grows with the threshold, and 17 evaluations are cheap.
    while high - low > PRECISION:
        middle = (low + high) / 2
        low, high = (middle, high) if largest_entry_chance(n, k, middle) < 0.5 else (low, middle)
    return (low + high) / 2
