"""Norm equalisation: updates are brought to one norm, so that none outweighs the others by its length alone."""

import numpy as np

from loralens.core.joint import Joint
from loralens.linalg.factor import Floats


def equalise_norms(x: Floats, beta: float) -> Floats:
    """Scale the updates x_t (T, p, q) to the norms β‖x_t‖ + (1 − β) mean‖x‖; updates of 0 do not count in the mean."""
    norms = np.linalg.norm(x, axis=(1, 2))
    nonzero = norms > 0
    if not nonzero.any():
        return x
    targets = beta * norms + (1 - beta) * norms[nonzero].mean()
    # An update of 0 has no direction in which it could grow to the norm of the others.
    factors = np.divide(targets, norms, out=np.zeros_like(norms), where=nonzero)
    return np.asarray(factors[:, None, None] * x, dtype=np.float64)


def equal_norms(joint: Joint, *, lam: float = 1.0, beta: float = 0.0) -> Floats:
    """λ Σ w_t M̃_t, float64, shape (p, q), where all M̃_t have the mean Frobenius norm of the updates.

    ``beta`` in [0, 1] is the part of the differences in norm that stays: 1 gives the plain sum. This rescaling is the
    first step of Compress-then-Merge (arXiv 2606.03723).
    """
    return lam * np.tensordot(joint.strengths, equalise_norms(joint.cores, beta), 1)
