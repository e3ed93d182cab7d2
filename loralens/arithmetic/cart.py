"""CART: the mean, and what each update has beside it, cut to a low rank."""

from math import ceil

import numpy as np

from loralens.core.joint import Joint
from loralens.linalg.factor import Floats

SHARE = 0.04  # of min(out, in): the rank where none is given


def cart(joint: Joint, *, lam: float = 1.0, rank: int = 0) -> Floats:
    """x̄ + λ Σ [x_t − x̄]_k, float64, shape (p, q), with x_t = w_t M_t, x̄ their mean and [·]_k the leading k directions.

    k is ``rank``; 0 stands for 4 % of min(out, in). CART, Choi et al. 2024, arXiv 2412.12153, made for full updates:
    where k is not below the rank of the x_t − x̄ nothing is cut, they add up to 0, and the result is the mean. So give a
    rank below r. Directions of equal singular value at the cut are for the LAPACK driver to choose between.
    """
    x = joint.weighted
    k = rank or max(1, ceil(SHARE * min(joint.shape)))
    mean = x.mean(axis=0)
    result = mean.copy()
    for deviation in x - mean:
        U, s, Vh = joint.decomposed(deviation)
        result += lam * (U[:, :k] * s[:k]) @ Vh[:k]
    return np.asarray(result, dtype=np.float64)
