"""PICO: directions that many updates write to turned down before they add up."""

import numpy as np

from loralens.core.joint import Joint
from loralens.linalg.factor import Floats


def pico(joint: Joint, *, lam: float = 1.0) -> Floats:
    """λ (m/‖y‖) y with y = (1 + U diag(α − 1) Uᵀ) Σ x_t, float64, shape (p, q), with x_t = w_t M_t.

    U are the left singular vectors of the B of all T updates side by side, s_j = σ_j²/Σσ² the part of each in all of
    them, and α_j = 1/(1 + (T − 1) s_j): what all share is turned down most. m is the mean of ‖x_t‖, T counts updates
    that are not 0. PICO, Tang & Yang 2026, arXiv 2604.16826, with task arithmetic. Where we differ: B alone is not
    defined, as (B G)(G⁻¹ A) is the same update. It is taken as ΔW V, the B that goes with orthonormal rows of A, so
    the result depends on the updates only.
    """
    x, total = joint.weighted, joint.total()
    norms = np.linalg.norm(x, axis=(1, 2))
    x, norms = x[norms > 0], norms[norms > 0]
    if not len(x) or np.linalg.norm(total, 2) <= joint.floor:
        return np.zeros_like(total)  # what cancelled is not blown up to the size of an update
    U, s, _ = np.linalg.svd(np.hstack(list(x)), full_matrices=False)  # its Gram matrix is Σ x_t x_tᵀ = Σ B_t B_tᵀ
    alpha = 1 / (1 + (len(x) - 1) * s**2 / float(s @ s))
    y = total + (U * (alpha - 1)) @ (U.T @ total)
    return lam * float(norms.mean()) / float(np.linalg.norm(y)) * y
