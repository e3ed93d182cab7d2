"""Isotropic combinations: all singular values of the sum become equal; Iso-CTS adds task-specific directions."""

import numpy as np

from loralens.arithmetic.tsv import nearest_orthonormal
from loralens.core.joint import Core, Joint
from loralens.linalg.factor import Floats
from loralens.linalg.pairwise import SAME


def flat(U: Floats, V: Floats, size: float) -> Core:
    """Return ``size``·U Vᵀ of orthonormal columns (p, k) and (q, k), as an SVD in their order.

    All singular values are equal, so a later truncation cannot rank them and keeps the first columns. Their order is
    therefore fixed here and not by the LAPACK driver.
    """
    # Singular values are not negative, so the sign goes to U.
    return Core(-U if size < 0 else U, np.full(U.shape[1], abs(size)), V.T)


def iso_c(joint: Joint, *, lam: float = 1.0) -> Core:
    """λ σ̄ U Vᵀ, as an SVD of U (p, k), k values and Vᵀ (k, q), where Σ w_t M_t = U S Vᵀ and σ̄ is the mean of S.

    Iso-C of Marczak et al. 2025, arXiv 2502.04959, on the numerical rank of the sum. The published code takes all
    min(out, in) directions. For a low-rank update nearly all of those are null directions: their vectors depend on the
    LAPACK driver (two drivers differed by 58 % of the result), and their σ = 0 enters the mean. In the leading
    directions its result is ours times rank/min(out, in). Directions stay in the order of S, so a truncation keeps the
    leading ones of the sum.
    """
    U, s, Vh = joint.decompose(joint.total())
    return flat(U, Vh.T, lam * float(s.mean()) if s.size else 0.0)


def iso_cts(joint: Joint, *, lam: float = 1.0, common: float = 0.8) -> Core | Floats:
    """λ σ̄ U_⊥ V_⊥ᵀ, float64, shape (p, q) or as an SVD, from common and task-specific directions.

    Of r directions in all, the k leading ones of the sum Σ w_t M_t are common, and every update adds the s leading ones
    of (1 − U_k U_kᵀ) w_t M_t, with s = round((1 − common)·r/T), at most ⌊r/T⌋, and k = r − T·s. The vectors of both
    sides are then made orthonormal, and σ̄ is the mean of all their singular values. Iso-CTS of Marczak et al. 2025,
    arXiv 2502.04959, where ``common`` is 0.8 and r = min(out, in); of low-rank updates r is the sum of their numerical
    ranks, at most min(out, in). Null directions are left out, as in `iso_c`. Truncated, it keeps common directions
    first.
    """
    x = joint.weighted
    parts = [joint.decompose(M) for M in x]
    # Not min(out, in) as in the paper, which would fill up with null directions.
    r = min(sum(part.s.size for part in parts), *joint.shape)
    # Rounding must not leave a negative number of common directions.
    own = min(round((1 - common) * r / len(parts)), r // len(parts))
    k = r - own * len(parts)
    U, s, Vh = joint.decompose(joint.total())
    # Task-specific directions come from what the common ones leave of each update, as in the paper.
    shared = Core(U[:, :k], s[:k], Vh[:k])
    remainders = [joint.decompose(M - shared.U @ (shared.U.T @ M)) for M in x]
    chosen = [shared, *(Core(part.U[:, :own], part.s[:own], part.Vh[:own]) for part in remainders)]
    values = np.concatenate([part.s for part in chosen])
    if not values.size:
        return joint.total()
    U_all = nearest_orthonormal(np.hstack([part.U for part in chosen]))
    V_all = nearest_orthonormal(np.hstack([part.Vh.T for part in chosen]))
    if _orthonormal(U_all) and _orthonormal(V_all):
        return flat(U_all, V_all, lam * float(values.mean()))
    # Where a direction was left out the columns are no longer orthonormal, so this is not an SVD yet.
    return np.asarray(lam * float(values.mean()) * U_all @ V_all.T, dtype=np.float64)


def _orthonormal(X: Floats) -> bool:
    """Whether the columns are orthonormal; they are unless `nearest_orthonormal` left a direction out."""
    return bool(np.abs(X.T @ X - np.eye(X.shape[1])).max() < SAME)
