"""KnOTS: a common basis of the outputs of all updates, in which elementwise rules can act (Stoica et al. 2025)."""

from typing import NamedTuple

import numpy as np

from loralens.core.joint import Joint
from loralens.linalg.factor import Floats


class OutputBasis(NamedTuple):
    """Updates in a common basis: w_t M_t = U parts_t, U (p, k) with orthonormal columns and parts (T, k, q)."""

    U: Floats
    parts: Floats


def output_basis(joint: Joint) -> OutputBasis:
    """Return U and S V_tᵀ of the SVD [w_1 M_1 … w_T M_T] = U S [V_1ᵀ … V_Tᵀ].

    KnOTS, Stoica et al. 2025, arXiv 2410.19735. The paper's code keeps singular values above 1e-5; here all that are
    above rounding are kept, whatever the scale of the update.
    """
    count, p, q = joint.cores.shape
    # The cores side by side, (p, T·q): update t has the columns t·q to (t + 1)·q.
    U, s, Vh = joint.decompose(joint.weighted.transpose(1, 0, 2).reshape(p, count * q))
    return OutputBasis(U, (s[:, None] * Vh).reshape(len(s), count, q).transpose(1, 0, 2))


def knots(joint: Joint, *, lam: float = 1.0) -> Floats:
    """λ U Σ S V_tᵀ, float64, shape (p, q): KnOTS with task arithmetic, which equals task arithmetic.

    The basis changes the result of elementwise rules only; use their option ``space`` for that.
    """
    U, parts = output_basis(joint)
    return np.asarray(lam * U @ parts.sum(axis=0), dtype=np.float64)
