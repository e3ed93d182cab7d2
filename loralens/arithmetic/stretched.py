"""The quality of a combination of DoRA adapters: of whole changes, the stretch of W included."""

from dataclasses import replace

import numpy as np

from loralens.arithmetic.dora import pieces
from loralens.arithmetic.quality import Quality
from loralens.core.joint import Core, Joint
from loralens.core.weights import Weight
from loralens.linalg.factor import Floats


def stretched(quality: Quality, joint: Joint, core: Core, each: Floats, whole: Floats, weight: Weight) -> Quality:
    """``quality`` of the pairs alone, with what stretches of W add to every square and inner product.

    Parameters
    ----------
    quality : Quality
    joint : Joint
        Of the pairs K_t = diag(g_t) L_t.
    core : Core
        Of the pair of the result, which may be cut; its stretch never is.
    each : float64 array, shape (T, out)
        h_t: ΔW_t = K_t + diag(h_t) W.
    whole : float64 array, shape (out,)
        h of the result.
    weight : Weight
        W.

    Notes
    -----
    Of K inside Q_B … Q_Aᵀ and a stretch, ⟨K, diag(h) W⟩ = ⟨M, P⟩ with P = Q_Bᵀ diag(h) W Q_A, and ⟨diag(x) W,
    diag(y) W⟩ = Σ x y‖W_i‖²: one pass over W, and none where no update stretches it. An update is retained but for what
    of its pair is cut off.
    """
    if not each.any():
        return quality
    U, s, Vh = core
    norms, across = _seen(weight, joint.right.columns())
    Q_B = joint.left.columns()
    of_sum = joint.strengths @ each
    P, P_sum, P_whole = ([Q_B.T @ (h[:, None] * across) for h in hs] for hs in (each, [of_sum], [whole]))
    S = joint.total()
    if np.linalg.norm(S) <= joint.floor:
        S = np.zeros_like(S)

    def along(X: Floats) -> Floats:
        """⟨R_j, ·⟩ for j = 0 … k."""
        return np.append(0.0, (s * np.einsum("ik,ij,kj->k", U, X, Vh)).cumsum())

    pairs = list(zip(joint.cores, P, each, strict=True))
    extra = np.array([2 * np.sum(M * own) + h**2 @ norms for M, own, h in pairs])
    P_excess = P_whole[0] - P_sum[0]
    errors = quality.errors + 2 * (along(P_excess) - np.sum(S * P_excess)) + (whole - of_sum) ** 2 @ norms
    return replace(
        quality,
        energies=quality.energies + extra,
        sum_energy=float(quality.sum_energy + 2 * np.sum(S * P_sum[0]) + of_sum**2 @ norms),
        sum_inner=quality.sum_inner
        + np.array([np.sum(S * own) + np.sum(P_sum[0] * M) + (of_sum * h) @ norms for M, own, h in pairs]),
        errors=np.maximum(errors, 0.0),
        inner=quality.inner
        + np.array([along(own) + np.sum(P_whole[0] * M) + (whole * h) @ norms for M, own, h in pairs]),
        retained=quality.retained + extra[:, None],
    )


def _seen(weight: Weight, columns: Floats) -> tuple[Floats, Floats]:
    """‖W_i‖² of every row, shape (out,), and W @ columns."""
    out = weight.shape[0]
    norms, across = np.zeros(out), np.zeros((out, columns.shape[1]))
    for rows, place, W in pieces(weight):
        norms[rows] += np.einsum("ij,ij->i", W, W)
        across[rows] += W @ columns[place]
    return norms, across
