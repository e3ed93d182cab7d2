"""NP-LoRA: all other updates kept out of the directions of the first."""

import numpy as np

from loralens.core.joint import Joint
from loralens.linalg.factor import Floats


def null_space(joint: Joint, *, lam: float = 1.0, mu: float = np.inf, rank: int = 0) -> Floats:
    """λ (x_1 + Σ_{t>1} x_t (1 − μ/(1+μ) V Vᵀ)), float64, shape (p, q), with x_t = w_t M_t.

    V are the leading ``rank`` right singular directions of the first update (0: all of its numerical rank). What the
    first adapter reads of an input the others no longer touch: with μ = ∞, the default, not at all; with 0 it is the
    sum. NP-LoRA, Chen et al. 2025, arXiv 2511.11051, where the first is the style and the second the content; more than
    two adapters are ours. The order counts.
    """
    first, *others_x = joint.weighted
    V = joint.decomposed(first).Vh[: rank or None].T
    share = 1.0 if np.isinf(mu) else mu / (1 + mu)
    others_sum = np.sum(others_x, axis=0) if others_x else np.zeros_like(first)
    return np.asarray(lam * (first + others_sum - share * (others_sum @ V) @ V.T), dtype=np.float64)
