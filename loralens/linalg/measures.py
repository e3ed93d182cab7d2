"""Norms and ranks of a matrix, read off its singular values.

Every function takes ``s``: the singular values, float64, shape (k,), largest first, none negative. All of them
return 0 where every value is 0 (or there is none). Ranks are dimensionless and do not change when ``s`` is scaled;
they and the norms are computed from σ_i / σ_1, so nothing over- or underflows on the way.
"""

from math import exp

import numpy as np

from loralens.errors import OptionError
from loralens.linalg.factor import Floats

EPS = float(np.finfo(np.float64).eps)


def frobenius(s: Floats) -> float:
    """Frobenius norm √Σσ_i²."""
    x = _relative(s)
    return spectral(s) * float(np.sqrt(x @ x))


def spectral(s: Floats) -> float:
    """Spectral norm σ_1, the largest stretch of any unit vector."""
    return float(s[0]) if s.size else 0.0


def nuclear(s: Floats) -> float:
    """Nuclear norm Σσ_i."""
    return spectral(s) * float(_relative(s).sum())


def numerical_rank(s: Floats, shape: tuple[int, int]) -> int:
    """Number of values above rounding, #{σ_i > σ_1 · max(shape) · ε}, ε = 2.2e-16; an integer from 0 to k.

    ``shape`` is that of the matrix. The threshold is the one of NumPy's and MATLAB's ``matrix_rank``, with the ε of
    the float64 arithmetic, not that of the dtype in which the matrix was stored.
    """
    return int(np.count_nonzero(_relative(s) > max(shape) * EPS))


def stable_rank(s: Floats) -> float:
    """Stable rank Σσ_i² / σ_1², in [1, numerical rank].

    Rudelson & Vershynin 2007 (there: numerical rank). Some tools print its square root, ‖·‖_F / ‖·‖_2.
    """
    x = _relative(s)
    return float(x @ x)


def effective_rank(s: Floats) -> float:
    """Effective rank exp(-Σ p_i ln p_i) with p_i = σ_i / Σσ, in [1, k].

    Roy & Vetterli 2007, eq. 3 to 5. Tools that use energies for p, as `effective_rank_energy` does, report a
    smaller number by the same name; others report the entropy itself, or divide it by ln k.
    """
    return _exp_entropy(_relative(s))


def effective_rank_energy(s: Floats) -> float:
    """Effective rank exp(-Σ p_i ln p_i) with the energies p_i = σ_i² / Σσ², in [1, k].

    The exponential of the von Neumann entropy; never above `effective_rank`, which has p_i = σ_i / Σσ.
    """
    return _exp_entropy(_relative(s) ** 2)


def participation_ratio(s: Floats) -> float:
    """Participation ratio (Σσ_i²)² / Σσ_i⁴, in [1, k]: the number of equal energies that would give the same value.

    Of the energies, as usual for the eigenvalues of a covariance; not of the σ_i.
    """
    squares = _relative(s) ** 2
    return float(squares.sum() ** 2 / (squares @ squares)) if squares.size else 0.0


def energy_rank(s: Floats, fraction: float) -> int:
    """Smallest k with Σ_{i≤k} σ_i² ≥ ``fraction`` · Σσ², an integer from 1.

    What is compared is the discarded tail, summed from the small end, with (1 - fraction) · Σσ², and two roundings
    are forgiven: σ = (3, 1) has an energy rank of 1 at 0.9. A fraction of 1 keeps every σ_i > 0.

    Energy is Σσ². kohya's ``sv_cumulative`` takes Σσ and its ``sv_fro`` √Σσ², and both keep one direction more than
    the criterion asks.

    Raises
    ------
    OptionError
        ``fraction`` is not in (0, 1].
    """
    if not 0 < fraction <= 1:
        raise OptionError(f"energy fraction {fraction} is not in (0, 1]", fix="pass a fraction such as 0.9")
    if fraction == 1 or not spectral(s):
        return int(np.count_nonzero(s))
    squares = _relative(s) ** 2
    tails = squares[::-1].cumsum()[::-1]  # tails[k] is lost if k values are kept; they fall
    return max(1, int(np.count_nonzero(tails > (1 - fraction + 2 * EPS) * tails[0])))


def _relative(s: Floats) -> Floats:
    """The positive σ_i / σ_1; empty where all are 0."""
    if not (s.size and s[-1] > 0):
        s = s[s > 0]
    return s / s[0] if s.size else s


def _exp_entropy(x: Floats) -> float:
    """exp(-Σ p ln p) for p = x / Σx; 0 for none. 0 ln 0 = 0."""
    if not (x.size and x[-1] > 0):  # the smallest: x falls
        x = x[x > 0]
    if not x.size:
        return 0.0
    p = x / x.sum()
    return exp(-float(p @ np.log(p)))
