"""NP-LoRA: all other updates are projected out of the input directions of the first (Chen et al. 2025)."""

import numpy as np

from loralens.core.joint import Joint
from loralens.linalg.factor import Floats


def null_space(joint: Joint, *, lam: float = 1.0, mu: float = np.inf, rank: int = 0) -> Floats:
    """λ (x_1 + Σ_{t>1} x_t (1 − μ/(1+μ) V Vᵀ)), float64, shape (p, q), with x_t = w_t M_t.

    V holds the leading ``rank`` right singular directions of the first update; 0 stands for all of its numerical rank.
    With μ = ∞, the default, the other updates no longer respond to the directions of the input that the first one
    reads; with μ = 0 the result is the sum. NP-LoRA (Chen et al. 2025, arXiv 2511.11051) combines a style, the first,
    with a content, the second; more than two adapters are our extension. The order of the adapters matters.
    """
    first, *other_updates = joint.weighted
    # All directions if rank is 0: a slice to None has no end.
    V = joint.decompose(first).Vh[: rank or None].T
    share = 1.0 if np.isinf(mu) else mu / (1 + mu)  # ∞/∞ is NaN
    # The projection is linear, so the others are added before it.
    other_sum = np.sum(other_updates, axis=0) if other_updates else np.zeros_like(first)
    return np.asarray(lam * (first + other_sum - share * (other_sum @ V) @ V.T), dtype=np.float64)
