"""Every formula again: dense, float64 or 100 digits, slow and obvious. No shared code with the package."""

import math

import mpmath
import numpy as np

DIGITS = 100  # graded factors: condition 1e16 per product, squared twice on the way to an eigenvalue


def dense_product(B, A):
    return B.astype(np.float64) @ A.astype(np.float64)


def dense_singular_values(B, A):
    """Good to 1e-16 of the largest, so no judge of graded factors: use `exact_singular_values` there."""
    return np.linalg.svd(dense_product(B, A), compute_uv=False)


def exact_singular_values(B, A):
    """√ of the eigenvalues of (B A)ᵀ(B A) or (B A)(B A)ᵀ, whichever is smaller, in 100 digits."""
    with mpmath.workdps(DIGITS):
        P = mpmath.matrix(B.astype(np.float64).tolist()) * mpmath.matrix(A.astype(np.float64).tolist())
        square = P.T * P if P.rows >= P.cols else P * P.T
        eigenvalues = mpmath.eigsy(square, eigvals_only=True)
        values = sorted((float(mpmath.sqrt(abs(x))) for x in eigenvalues), reverse=True)
    return np.array(values)


def exact_values_of_full_rank(B, A):
    """The r nonzero singular values, from the r × r matrix Lᵀ (A Aᵀ) L with L Lᵀ = Bᵀ B; 100 digits, and faster."""
    with mpmath.workdps(DIGITS):
        X, Y = mpmath.matrix(B.astype(np.float64).tolist()), mpmath.matrix(A.astype(np.float64).tolist())
        L = mpmath.cholesky(X.T * X)
        eigenvalues = mpmath.eigsy(L.T * (Y * Y.T) * L, eigvals_only=True)
        values = sorted((float(mpmath.sqrt(abs(x))) for x in eigenvalues), reverse=True)
    return np.array(values)


def size(B, A):
    """‖B‖₂‖A‖₂, the unit of a backward error."""
    return float(np.linalg.norm(B.astype(np.float64), 2) * np.linalg.norm(A.astype(np.float64), 2))


def frobenius(s):
    return math.sqrt(math.fsum(x * x for x in s))


def nuclear(s):
    return math.fsum(s)


def numerical_rank(s, shape):
    return sum(1 for x in s if x > max(s) * max(shape) * 2.0**-52)


def stable_rank(s):
    return math.fsum(x * x for x in s) / max(s) ** 2


def effective_rank(s, power=1):
    total = math.fsum(x**power for x in s)
    p = [x**power / total for x in s if x > 0]
    return math.exp(-math.fsum(x * math.log(x) for x in p))


def participation_ratio(s):
    return math.fsum(x * x for x in s) ** 2 / math.fsum(x**4 for x in s)


def energy_rank(s, fraction):
    """Smallest k that keeps the fraction, in exact rational arithmetic on the numbers given."""
    with mpmath.workdps(60):
        squares = [mpmath.mpf(float(x)) ** 2 for x in s]
        wanted = mpmath.mpf(fraction) * mpmath.fsum(squares)
        return next(k for k in range(1, len(s) + 1) if mpmath.fsum(squares[:k]) >= wanted)
