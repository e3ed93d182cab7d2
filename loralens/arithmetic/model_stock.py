"""Model Stock: the average, shrunk towards the base the more the updates disagree."""

import numpy as np

from loralens.core.joint import Joint
from loralens.linalg.factor import Floats


def model_stock(joint: Joint, *, lam: float = 1.0) -> Floats:
    """λ t Σ x_t / N with x_t = w_t M_t, float64, shape (p, q), and t = N c/(1 + (N − 1) c).

    c is the mean cosine of all pairs of the N updates that are not 0. If the updates agree, t is 1; if they are
    orthogonal, t is 0. This is Model Stock (Jang et al. 2024, arXiv 2403.19522), one module at a time. Where we differ:
    a negative c counts as 0. The geometry of the paper does not cover it, and t may become infinite.
    """
    present = joint.present
    if not present.size:
        return joint.total()
    x = joint.weighted[present].reshape(present.size, -1)
    norms = np.linalg.norm(x, axis=1)
    x, norms = x[norms > 0], norms[norms > 0]
    # An update that the adapter has is also 0 if its weight is 0.
    count = len(x)
    if count < 2:
        return lam * joint.total()
    cosines = (x @ x.T) / np.outer(norms, norms)
    # Without the diagonal: every update has the cosine 1 with itself.
    c = max(0.0, float((cosines.sum() - np.trace(cosines)) / (count * (count - 1))))
    t = count * c / (1 + (count - 1) * c)
    return lam * t / count * joint.total()
