"""Norm equalisation: no update outvoices the others by its length alone."""

import numpy as np

from loralens.core.joint import Joint
from loralens.linalg.factor import Floats


def equalised(x: Floats, beta: float) -> Floats:
    """The updates x_t (T, p, q) brought to the norms β‖x_t‖ + (1 − β) mean‖x‖; the mean is of those that are not 0."""
    norms = np.linalg.norm(x, axis=(1, 2))
    nonzero = norms > 0
    if not nonzero.any():
        return x
    targets = beta * norms + (1 - beta) * norms[nonzero].mean()
    factors = np.divide(targets, norms, out=np.zeros_like(norms), where=nonzero)
    return np.asarray(factors[:, None, None] * x, dtype=np.float64)


def equal_norms(joint: Joint, *, lam: float = 1.0, beta: float = 0.0) -> Floats:
    """λ Σ w_t M̃_t, float64, shape (p, q), M̃_t the updates brought to one Frobenius norm, their mean.

    ``beta`` in [0, 1] leaves that part of their differences: 1 is the plain sum. The rescaling is the first step of
    Compress-then-Merge (arXiv 2606.03723); methods that weight by norms in other ways go by other names.
    """
    return lam * np.tensordot(joint.strengths, equalised(joint.cores, beta), 1)
