"""Noise edge: which singular values of a difference of two checkpoints are more than noise.

Gavish & Donoho 2014, "The optimal hard threshold for singular values is 4/√3": of a low-rank matrix in white noise the
mean squared error is least if exactly the values above τ are kept. With known noise e per entry τ = λ(β)·e·√max(m, n),
with unknown noise τ = ω(β)·median(σ), β = min(m, n)/max(m, n).

Both take the noise for white. Rounding noise is independent from entry to entry but grows with the weight, so a row of
large weights has noise that looks like a direction of its own: 11 and 9 directions were kept of two of twelve real
merges of rank 8. τ is λ(β)/(1+√β) times the largest singular value of white noise, so here that value is taken from
noise that is drawn with the variances of the entries (parallel analysis, Horn 1965). The median rule says something
only of a difference that is full-rank itself, as full fine-tuning leaves it; the values of a merged pair have no bulk
that a median could be of.
"""

from functools import lru_cache
from math import cos, pi, sqrt

import numpy as np

POINTS = 1 << 14  # steps of the Marchenko–Pastur law: its median to 1e-8

Shape = tuple[int, int]


def known_threshold(noise: float, shape: Shape) -> float:
    """τ = λ(β)·e·√max(m, n) for white noise of standard deviation e = ``noise``.

    λ(β) = √(2(β+1) + 8β/((β+1) + √(β²+14β+1))), 4/√3 for a square matrix.
    """
    return _lambda(_beta(shape)) * noise * sqrt(max(shape))


def drawn_threshold(largest: float, shape: Shape) -> float:
    """τ = λ(β)/(1+√β)·σ₁, σ₁ = ``largest`` that of noise alone, drawn with the variances that its entries have.

    For white noise of a large matrix, where σ₁ = e(√m + √n), this is `known_threshold`.
    """
    beta = _beta(shape)
    return _lambda(beta) / (1 + sqrt(beta)) * largest


def median_threshold(median: float, shape: Shape) -> float:
    """τ = ω(β)·median of all min(m, n) singular values; ω(β) = λ(β)/√μ_β, 2.8584 for a square matrix."""
    beta = _beta(shape)
    return _lambda(beta) / sqrt(marchenko_pastur_median(beta)) * median


@lru_cache(maxsize=1024)
def marchenko_pastur_median(beta: float) -> float:
    """μ_β: the median of the squared singular values of an m × n matrix of noise of variance 1/n, β = m/n ≤ 1.

    With t = 1 + β − 2√β cos θ the law is (2/π) sin²θ/t dθ on (0, π), smooth also for β = 1.
    """
    theta = np.linspace(0, pi, POINTS + 1)[1:]  # 0/0 at 0 for β = 1
    density = 2 / pi * np.sin(theta) ** 2 / (1 + beta - 2 * sqrt(beta) * np.cos(theta))
    first = 2 / pi if beta == 1 else 0.0  # its limit there
    steps = (np.concatenate([[first], density[:-1]]) + density) / 2 * (pi / POINTS)
    middle = float(np.interp(0.5, np.cumsum(steps), theta))
    return 1 + beta - 2 * sqrt(beta) * cos(middle)


def _beta(shape: Shape) -> float:
    return min(shape) / max(shape)


def _lambda(beta: float) -> float:
    return sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + sqrt(beta**2 + 14 * beta + 1)))
