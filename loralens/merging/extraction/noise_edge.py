"""Thresholds for the singular values of a difference of two checkpoints, above which they are more than noise.

Gavish & Donoho 2014, "The optimal hard threshold for singular values is 4/√3": for a low-rank matrix in white noise the
mean squared error is smallest if exactly the values above τ are kept. With known noise e per entry,
τ = λ(β)·e·√max(m, n); with unknown noise, τ = ω(β)·median(σ). Here β = min(m, n)/max(m, n).

Both formulas assume white noise. Rounding noise is independent between entries, but it grows with the weight. The noise
of a row of large weights therefore looks like a direction of its own: with these formulas, 11 and 9 directions were
kept in two of twelve real merges of rank 8. τ is λ(β)/(1+√β) times the largest singular value of white noise. Here,
this singular value is replaced by that of noise drawn with the variances of the entries (parallel analysis, Horn 1965).
The median rule is meaningful only for a difference of full rank, as full fine-tuning gives it. The singular values of a
merged pair have no bulk from which a median could be taken.
"""

from functools import lru_cache
from math import cos, pi, sqrt

import numpy as np

# The trapezoidal rule errs by 1/POINTS², and interpolating the median by about as much.
POINTS = 1 << 14  # steps of the integral of the Marchenko–Pastur law, which give its median to 1e-8

Shape = tuple[int, int]


def known_threshold(noise: float, shape: Shape) -> float:
    """τ = λ(β)·e·√max(m, n) for white noise of standard deviation e = ``noise``.

    λ(β) = √(2(β+1) + 8β/((β+1) + √(β²+14β+1))), 4/√3 for a square matrix.
    """
    return _lambda(_aspect_ratio(shape)) * noise * sqrt(max(shape))


def sampled_threshold(largest: float, shape: Shape) -> float:
    """τ = λ(β)/(1+√β)·σ₁, where σ₁ = ``largest`` is that of pure noise drawn with the variances of the entries.

    For white noise in a large matrix σ₁ = e(√m + √n), and the result is that of `known_threshold`.
    """
    beta = _aspect_ratio(shape)
    return _lambda(beta) / (1 + sqrt(beta)) * largest


def median_threshold(median: float, shape: Shape) -> float:
    """τ = ω(β) times the median of all min(m, n) singular values; ω(β) = λ(β)/√μ_β, 2.8584 for a square matrix."""
    beta = _aspect_ratio(shape)
    return _lambda(beta) / sqrt(marchenko_pastur_median(beta)) * median


@lru_cache(maxsize=1024)
def marchenko_pastur_median(beta: float) -> float:
    """μ_β, the median of the squared singular values of m × n noise with variance 1/n, β = m/n ≤ 1.

    With t = 1 + β − 2√β cos θ the Marchenko–Pastur law is (2/π) sin²θ/t dθ on (0, π), which is smooth also for β = 1.
    """
    theta = np.linspace(0, pi, POINTS + 1)[1:]  # without 0, where the density is 0/0 for β = 1
    density = 2 / pi * np.sin(theta) ** 2 / (1 + beta - 2 * sqrt(beta) * np.cos(theta))
    first = 2 / pi if beta == 1 else 0.0  # the limit of the density at 0
    steps = (np.concatenate([[first], density[:-1]]) + density) / 2 * (pi / POINTS)
    middle = float(np.interp(0.5, np.cumsum(steps), theta))
    return 1 + beta - 2 * sqrt(beta) * cos(middle)


def _aspect_ratio(shape: Shape) -> float:
    return min(shape) / max(shape)


def _lambda(beta: float) -> float:
    return sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + sqrt(beta**2 + 14 * beta + 1)))
