"""Isotropic combinations: the spectrum of the sum made flat, with room for what only one update has."""

import numpy as np

from loralens.arithmetic.tsv import nearest_orthonormal
from loralens.core.joint import Core, Joint
from loralens.linalg.factor import Floats
from loralens.linalg.pairwise import SAME


def flat(U: Floats, V: Floats, size: float) -> Core:
    """``size``·U Vᵀ of orthonormal columns (p, k) and (q, k), as an SVD in their order.

    All its singular values are equal, so what a later truncation keeps is decided here, not by the LAPACK driver: the
    first columns.
    """
    return Core(-U if size < 0 else U, np.full(U.shape[1], abs(size)), V.T)


def iso_c(joint: Joint, *, lam: float = 1.0) -> Core:
    """λ σ̄ U Vᵀ, as an SVD of U (p, k), k values and Vᵀ (k, q), of Σ w_t M_t = U S Vᵀ, σ̄ the mean of S.

    Iso-C of Marczak et al. 2025, arXiv 2502.04959. Defined on the numerical rank of the sum: the published code takes
    all min(out, in) directions, for a low-rank update null ones nearly all, whose vectors are the LAPACK driver's to
    choose (58 % of the result, between two drivers), and their σ = 0 in the mean. Its leading part is ours times
    rank/min(out, in). Directions are in the order of S: truncated, it keeps the leading ones of the sum.
    """
    U, s, Vh = joint.decomposed(joint.total())
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
    parts = [joint.decomposed(one) for one in x]
    r = min(sum(part.s.size for part in parts), *joint.shape)
    own = min(round((1 - common) * r / len(parts)), r // len(parts))
    k = r - own * len(parts)
    U, s, Vh = joint.decomposed(joint.total())
    shared = Core(U[:, :k], s[:k], Vh[:k])
    rests = [joint.decomposed(one - shared.U @ (shared.U.T @ one)) for one in x]
    all_ = [shared, *(Core(rest.U[:, :own], rest.s[:own], rest.Vh[:own]) for rest in rests)]
    values = np.concatenate([part.s for part in all_])
    if not values.size:
        return joint.total()
    U_all = nearest_orthonormal(np.hstack([part.U for part in all_]))
    V_all = nearest_orthonormal(np.hstack([part.Vh.T for part in all_]))
    if _orthonormal(U_all) and _orthonormal(V_all):
        return flat(U_all, V_all, lam * float(values.mean()))
    return np.asarray(lam * float(values.mean()) * U_all @ V_all.T, dtype=np.float64)


def _orthonormal(X: Floats) -> bool:
    """Whether the columns are orthonormal, as they are where `nearest_orthonormal` left no direction out."""
    return bool(np.abs(X.T @ X - np.eye(X.shape[1])).max() < SAME)
