"""Norms and ranks of a matrix, computed from its singular values.

Every function takes ``s``: the singular values, float64, shape (k,), largest first, none negative. Every function
returns 0 if all values are 0 or there are none. Ranks are dimensionless and do not change when ``s`` is scaled. Ranks
and norms are computed from σ_i / σ_1, so no intermediate result overflows or underflows.
"""

from math import exp

import numpy as np

from loralens.errors import OptionError
from loralens.linalg.factor import Floats

EPS = float(np.finfo(np.float64).eps)


def frobenius(s: Floats) -> float:
    """Frobenius norm √Σσ_i²."""
    x = _relative_to_first(s)
    # Squares of σ_i / σ_1 cannot overflow; those of σ_i could from 1e154 on.
    return spectral(s) * float(np.sqrt(x @ x))


def spectral(s: Floats) -> float:
    """Spectral norm σ_1, the largest factor by which the matrix lengthens a vector."""
    return float(s[0]) if s.size else 0.0


def nuclear(s: Floats) -> float:
    """Nuclear norm Σσ_i."""
    return spectral(s) * float(_relative_to_first(s).sum())


def numerical_rank(s: Floats, shape: tuple[int, int]) -> int:
    """Number of values above rounding, #{σ_i > σ_1 · max(shape) · ε}, ε = 2.2e-16; an integer from 0 to k.

    ``shape`` is the shape of the matrix. The threshold is that of NumPy's and MATLAB's ``matrix_rank``. Its ε is that
    of float64, in which the values were computed, not that of the dtype in which the matrix was stored.
    """
    return int(np.count_nonzero(_relative_to_first(s) > max(shape) * EPS))


def stable_rank(s: Floats) -> float:
    """Stable rank Σσ_i² / σ_1², in [1, numerical rank].

    Rudelson & Vershynin 2007, who call it the numerical rank. Some tools print its square root, ‖·‖_F / ‖·‖_2.
    """
    x = _relative_to_first(s)
    return float(x @ x)


def effective_rank(s: Floats) -> float:
    """Effective rank exp(-Σ p_i ln p_i) with p_i = σ_i / Σσ, in [1, k].

    Roy & Vetterli 2007, eq. 3 to 5. Some tools use energies for p, as `effective_rank_energy` does, and report a
    smaller number under the same name. Others report the entropy itself, or the entropy divided by ln k.
    """
    return _exp_entropy(_relative_to_first(s))


def effective_rank_energy(s: Floats) -> float:
    """Effective rank exp(-Σ p_i ln p_i) with the energies p_i = σ_i² / Σσ², in [1, k].

    This is the exponential of the von Neumann entropy. It is never larger than `effective_rank`.
    """
    return _exp_entropy(_relative_to_first(s) ** 2)


def participation_ratio(s: Floats) -> float:
    """Participation ratio (Σσ_i²)² / Σσ_i⁴, in [1, k]: the number of equal energies that would give the same value.

    It is taken of the energies σ_i², as is usual for the eigenvalues of a covariance, not of the σ_i.
    """
    squares = _relative_to_first(s) ** 2
    return float(squares.sum() ** 2 / (squares @ squares)) if squares.size else 0.0


def energy_tails(s: Floats) -> Floats:
    """Element k is Σ_{i>k} σ_i² / σ_1², the energy that is lost if k values are kept; positive values only."""
    squares = _relative_to_first(s) ** 2
    # The sum starts at the small end, as small values would be lost in the rounding of a large sum.
    return np.asarray(squares[::-1].cumsum()[::-1], dtype=np.float64)


def energy_rank(s: Floats, fraction: float, *, tails: Floats | None = None) -> int:
    """Smallest k with Σ_{i≤k} σ_i² ≥ ``fraction`` · Σσ², an integer from 1.

    The discarded tail, summed from the small end, is compared with (1 - fraction) · Σσ², with a tolerance of two
    roundings: σ = (3, 1) has an energy rank of 1 at 0.9. A fraction of 1 keeps every σ_i > 0.

    ``tails`` are the `energy_tails` of s, for a caller that asks for several fractions.

    Energy is Σσ². The ``sv_cumulative`` of sd-scripts uses Σσ, and its ``sv_fro`` uses √Σσ². Both keep one direction
    more than their criterion requires.

    Raises
    ------
    OptionError
        ``fraction`` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise OptionError(f"energy fraction {fraction} is not in (0, 1]", fix="pass a fraction such as 0.9")
    # The tolerance below would drop tiny directions at a fraction of 1, which promises to keep all.
    if fraction == 1 or not spectral(s):
        return int(np.count_nonzero(s))
    tails = energy_tails(s) if tails is None else tails
    # The tolerance 2ε covers the rounding of the fraction and of the sum, so that cases such as (3, 1) at 0.9 give the
    # same rank as exact arithmetic.
    return max(1, int(np.count_nonzero(tails > (1 - fraction + 2 * EPS) * tails[0])))


def _relative_to_first(s: Floats) -> Floats:
    """The positive σ_i / σ_1; empty where all are 0."""
    # The usual case, no zeros, needs no copy.
    if not (s.size and s[-1] > 0):
        s = s[s > 0]
    return s / s[0] if s.size else s


def _exp_entropy(x: Floats) -> float:
    """exp(-Σ p ln p) for p = x / Σx, with 0 ln 0 = 0; the result is 0 if all of x is 0."""
    if not (x.size and x[-1] > 0):  # x is sorted, so x[-1] is the smallest
        x = x[x > 0]
    if not x.size:
        return 0.0
    p = x / x.sum()
    return exp(-float(p @ np.log(p)))
