"""The distribution of the largest entry of a random unit vector of R^n, as the chance level of its nearest axis."""

from functools import lru_cache
from math import lgamma, pi, sqrt

import numpy as np
from numpy.typing import NDArray

# Just above the rounding of float64: terms behind it change no digit.
LEAST = 1e-14  # size of the integrand, relative to its peak, at which the sum ends
PRECISION = 1e-5  # absolute, of the median
# Below n = 9 the integrand falls slowly, and the sum would need millions of terms for `LEAST`.
MOST = 50_000  # most terms of the sum; this limit is reached below n = 9 only
NEAR, SERIES = 1.0, 24  # |z| below which the series of the error function is taken, and its terms
PART = 1 << 12  # numbers whose error function is computed at a time
STEP, TERMS = 0.5, 13  # of the trapezoidal rule: e^(−(13/2)²) is below the rounding


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
        erf = error_function(threshold * np.sqrt(v))
        terms[start : start + PART] = np.exp(lgamma(saddle) + v - saddle * np.log(v) + k * np.log(erf)).real
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


def error_function(z: NDArray[np.complex128]) -> NDArray[np.complex128]:
    """The error function at numbers z with |arg z| ≤ π/4; complex128 of any shape.

    Near 0 by its series, else by the trapezoidal rule for the integral of erfc, whose error is known: with the step h
    it is e^(−π²/h²), below the rounding for h = ½ (Chiarella and Reichel 1968; Hunter and Regan 1972). The relative
    error is below 1e-14. SciPy has this function too, and importing it takes 50 ms and 20 MiB.
    """
    z = np.asarray(z, dtype=np.complex128)
    # A part at a time: the sums below hold about ten arrays of its size.
    if z.size > PART:
        flat = z.reshape(-1)
        parts = [error_function(flat[start : start + PART]) for start in range(0, flat.size, PART)]
        return np.concatenate(parts).reshape(z.shape)
    squares, near = z * z, np.abs(z) < NEAR
    # erf z = 2/√π · z e^(−z²) Σ (2z²)ᵏ / (1·3·5 … (2k + 1)), here by Horner's rule from the last term.
    small = np.where(near, squares, 0.0)
    series = np.ones_like(small)
    for k in range(SERIES, 0, -1):
        series = 1 + series * (2 * small / (2 * k + 1))
    inner = 2 / sqrt(pi) * np.where(near, z, 0.0) * np.exp(-small) * series
    large, far = np.where(near, 1.0, squares), np.where(near, 1.0, z)
    total = 1 / (2 * large)
    for k in range(1, TERMS):
        total = total + np.exp(-((k * STEP) ** 2)) / (large + (k * STEP) ** 2)
    # The pole that the rule passes; beyond Re z = 6 it is below 1e-32, and e^(4πz) would soon be too large.
    pole = 2 / np.expm1(2 * pi / STEP * np.where(far.real < 6, far, 6.0))
    outer = 1 - (2 * STEP / pi * far * np.exp(-large) * total - pole)
    return np.where(near, inner, outer)
