"""The weighted sum of updates (task arithmetic), and their weighted mean."""

import numpy as np

from loralens.core.joint import Joint
from loralens.errors import OptionError
from loralens.linalg.factor import Floats


def task_arithmetic(joint: Joint, *, lam: float = 1.0) -> Floats:
    """λ Σ w_t M_t, float64, shape (p, q): task arithmetic (Ilharco et al. 2023), exact.

    PEFT's ``linear`` adds the factors instead, which gives a different update: (Σ√w_t B_t)(Σ√w_t A_t).
    """
    return lam * joint.total()


def average(joint: Joint, *, lam: float = 1.0) -> Floats:
    """λ Σ w_t M_t / Σ w_t, float64, shape (p, q): the mean of the updates.

    Adapters that lack the module count as ΔW = 0.

    Raises
    ------
    OptionError
        The weights add up to 0.
    """
    # The weights of all adapters, also of those that lack the module, so that every module is divided by one number.
    weight_sum = float(np.sum(joint.strengths))
    if weight_sum == 0:
        raise OptionError("the weights add up to 0, so there is no average", fix="give --method sum, or other weights")
    return lam * joint.total() / weight_sum
