"""Model Stock: the average, drawn back to the base by how far the updates agree."""

import numpy as np

from loralens.core.joint import Joint
from loralens.linalg.factor import Floats


def model_stock(joint: Joint, *, lam: float = 1.0) -> Floats:
    """λ t Σ x_t / N with x_t = w_t M_t, float64, shape (p, q), and t = N c/(1 + (N − 1) c).

    c is the mean cosine of the N updates that are there, pair by pair: with updates that agree t is 1, with orthogonal
    ones 0. Jang et al. 2024, arXiv 2403.19522, of one layer at a time. Where we differ: a negative c, for which the
    geometry of the paper has no place and t may become infinite, counts as 0.
    """
    present = joint.present
    if not present.size:
        return joint.total()
    x = joint.weighted[present].reshape(present.size, -1)
    norms = np.linalg.norm(x, axis=1)
    x, norms = x[norms > 0], norms[norms > 0]
    count = len(x)
    if count < 2:
        return lam * joint.total()
    cosines = (x @ x.T) / np.outer(norms, norms)
    c = max(0.0, float((cosines.sum() - np.trace(cosines)) / (count * (count - 1))))
    t = count * c / (1 + (count - 1) * c)
    return lam * t / count * joint.total()
