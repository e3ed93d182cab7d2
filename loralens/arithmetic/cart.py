"""CART: the mean of the updates, plus the low-rank part of every deviation from it (Choi et al. 2024)."""

from math import ceil

import numpy as np

from loralens.core.joint import Joint
from loralens.linalg.factor import Floats

# rank / min(out, in) if no rank is given: the published setting, which is meant for updates of full rank.
SHARE = 0.04


def cart(joint: Joint, *, lam: float = 1.0, rank: int = 0) -> Floats:
    """x̄ + λ Σ [x_t − x̄]_k, float64, shape (p, q), with x_t = w_t M_t, x̄ their mean and [·]_k the leading k directions.

    k is ``rank``; 0 stands for 4 % of min(out, in). CART (Choi et al. 2024, arXiv 2412.12153) was made for updates of
    full rank. If k reaches the rank of the deviations x_t − x̄, nothing is cut, they add up to 0, and the result is the
    mean; for LoRA adapters k should therefore be below r. Where two singular values at the cut are equal, the LAPACK
    driver decides which direction is kept.
    """
    x = joint.weighted
    # min(out, in) of the weight and not of the core, whose size depends on the ranks of the adapters.
    k = rank or max(1, ceil(SHARE * min(joint.shape)))
    mean = x.mean(axis=0)
    result = mean.copy()
    # Deviations are cut one by one: together they add up to 0.
    for deviation in x - mean:
        U, s, Vh = joint.decompose(deviation)
        result += lam * (U[:, :k] * s[:k]) @ Vh[:k]
    return np.asarray(result, dtype=np.float64)
