"""PICO: output directions that many updates share are weakened before the updates are added (Tang & Yang 2026)."""

import numpy as np

from loralens.core.joint import Joint
from loralens.linalg.factor import Floats


def pico(joint: Joint, *, lam: float = 1.0) -> Floats:
    """λ (m/‖y‖) y with y = (1 + U diag(α − 1) Uᵀ) Σ x_t, float64, shape (p, q), with x_t = w_t M_t.

    U holds the left singular vectors of the B of all T updates side by side, s_j = σ_j²/Σσ² is the share of each of
    them, and α_j = 1/(1 + (T − 1) s_j), so a direction that all updates share is weakened most. m is the mean of ‖x_t‖,
    and T counts the updates that are not 0. This is PICO (Tang & Yang 2026, arXiv 2604.16826) with task arithmetic. We
    differ in one point: B alone is not defined by the update, as (B G)(G⁻¹ A) is the same update. Here B is ΔW V, which
    belongs to orthonormal rows of A, so the result depends on the updates only.
    """
    x, total = joint.weighted, joint.total()
    norms = np.linalg.norm(x, axis=(1, 2))
    # T and the mean are those of the updates that exist: an adapter that lacks the module does not count.
    x, norms = x[norms > 0], norms[norms > 0]
    if not len(x) or np.linalg.norm(total, 2) <= joint.floor:
        # A sum that cancels is rounding error, which must not be scaled to the norm m.
        return np.zeros_like(total)
    # The B of the docstring side by side have the same left singular vectors: Σ x_t x_tᵀ is Σ B_t B_tᵀ.
    U, s, _ = np.linalg.svd(np.hstack(list(x)), full_matrices=False)
    alpha = 1 / (1 + (len(x) - 1) * s**2 / float(s @ s))
    y = total + (U * (alpha - 1)) @ (U.T @ total)
    # Weakening shared directions makes the sum shorter, so it is brought back to the mean norm of the updates.
    return lam * float(norms.mean()) / float(np.linalg.norm(y)) * y
