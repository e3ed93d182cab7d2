"""What chance alone would give: mean and spread of overlaps between directions that know nothing of each other.

The null is strength-matched: singular values are kept and the directions drawn uniformly (Haar) on each side. The
first two moments are then known in closed form, so nothing is sampled and no seed is needed.
"""

from math import sqrt

import numpy as np

from loralens.linalg.factor import Floats


def overlap_chance(k1: int, k2: int, n: int) -> Floats:
    """Mean of φ(i, j) between uniform subspaces of R^n, max(i, j)/n; float64, shape (k1, k2)."""
    i, j = np.ogrid[1 : k1 + 1, 1 : k2 + 1]
    return np.asarray(np.minimum(np.maximum(i, j) / n, 1.0), dtype=np.float64)


def overlap_spread(i: int, j: int, n: int) -> float:
    """Standard deviation of φ(i, j) between uniform subspaces of R^n; 0 where one of them is all of it.

    Var Σcos² = 2 i j (n − i)(n − j) / (n² (n − 1)(n + 2)), and φ = Σcos²/min(i, j).
    """
    if not (0 < i < n and 0 < j < n):
        return 0.0
    return sqrt(2 * i * j * (n - i) * (n - j) / ((n - 1) * (n + 2))) / n / min(i, j)


def overlap_tail(phi: float, i: int, j: int, n: int) -> float:
    """Probability that φ(i, j) between uniform subspaces of R^n is at least ``phi``.

    The beta distribution of the same mean and spread, which is exact where one of them is a single direction: φ is then
    Beta(k/2, (n − k)/2), and 5 standard deviations are exceeded in 0.5 % of cases.
    """
    from scipy.special import betainc  # 50 ms, and only this needs it

    mean, spread = max(i, j) / n, overlap_spread(i, j, n)
    if not spread:
        return 1.0
    total = mean * (1 - mean) / spread**2 - 1
    return float(betainc((1 - mean) * total, mean * total, min(max(1 - phi, 0.0), 1.0)))


def cosine_spread(shape: tuple[int, int]) -> float:
    """Standard deviation 1/√(out·in) of the cosine of two updates of this shape; its mean is 0, whatever their ranks.

    Exact where both sides are drawn: E⟨M, P N Qᵀ⟩² = ‖M‖²‖N‖²/(out·in). At small ranks the tails are heavier than a
    Gaussian's.
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
    a uniform projection Q, once on each side.
    """
    out, in_ = shape
    mean = rank**2 / (out * in_) * squares
    alpha, beta = _alpha_beta(in_, rank)
    trace_squared = alpha * squares**2 + 2 * beta * fourths  # E (tr M)², M = W Q Wᵀ
    square_trace = (alpha + beta) * fourths + beta * squares**2  # E tr M²
    alpha, beta = _alpha_beta(out, rank)
    second = alpha * trace_squared + 2 * beta * square_trace  # E (tr P M)²
    return mean, sqrt(max(second - mean**2, 0.0))


def projection_beyond(mean: float, spread: float, far: float) -> float:
    """Probability that ‖UᵀWV‖_F² is more than ``far`` standard deviations from its mean, on either side.

    The gamma distribution of the same mean and spread: a sum of squares of near-Gaussian numbers, of which
    2·(mean/spread)² count. At rank 1 that is χ²₁, which exceeds 3 standard deviations in 2.2 % of cases, where a
    Gaussian does in 0.27 %. Sampled from flat to rank-one W it is off by a third of itself at most in spaces ten times
    as wide as the rank; in narrower ones, where ‖UᵀWV‖ has a ceiling, it is too large by up to three quarters.
    """
    from scipy.special import gammainc, gammaincc  # 50 ms, and only this needs them

    shape = (mean / spread) ** 2
    above, below = shape + far * sqrt(shape), shape - far * sqrt(shape)
    return float(gammaincc(shape, above) + (gammainc(shape, below) if below > 0 else 0.0))


def _alpha_beta(n: int, r: int) -> tuple[float, float]:
    """α and β of a uniform projection of rank r in R^n; of R^1 only α + 2β counts, which is 1."""
    if n == 1:
        return 1.0 / 3.0, 1.0 / 3.0
    beta = r * (n - r) / (n * (n - 1) * (n + 2))
    return (r * r - 2 * beta * n) / n**2, beta
