"""Compress-then-Merge: the sum within two subspaces of rank r that all updates share (He et al. 2026)."""

import numpy as np

from loralens.arithmetic.norms import equalise_norms
from loralens.core.joint import Joint
from loralens.linalg.factor import Floats

ROUNDS = 1000  # most rounds of the alternating iteration
STEADY = 1e-13  # the iteration ends when no angle between old and new U has a larger sine


def shared_subspaces(x: Floats, rank: int) -> tuple[Floats, Floats]:
    """Return orthonormal U (p, r) and V (q, r) that maximise Σ‖Uᵀ x_t V‖² of the updates x (T, p, q): Tucker-2.

    The iteration starts from the HOSVD and alternates leading eigenvectors (HOOI, De Lathauwer et al. 2000). It finds a
    local optimum.
    """
    U, V = _leading(_gram(x), rank), _leading(_gram(x.transpose(0, 2, 1)), rank)
    for _ in range(ROUNDS):
        # One side at a time: with the other fixed, the best U are leading eigenvectors.
        before, projected = U, x @ V
        U = _leading(_gram(projected), rank)
        projected_T = x.transpose(0, 2, 1) @ U
        V = _leading(_gram(projected_T), rank)
        # The part of U outside the span of the old U; single columns may still turn within the subspace.
        if np.linalg.norm(U - before @ (before.T @ U)) <= STEADY:
            break
    return U, V


def _gram(parts: Floats) -> Floats:
    """Σ P_t P_tᵀ of parts (T, n, k)."""
    side = np.hstack(list(parts))
    return np.asarray(side @ side.T, dtype=np.float64)


def _leading(G: Floats, count: int) -> Floats:
    """The leading eigenvectors of a symmetric G."""
    # eigh returns them by rising eigenvalue.
    return np.linalg.eigh(G)[1][:, ::-1][:, :count]


def compress_then_merge(joint: Joint, *, lam: float = 1.0, rank: int = 0, beta: float = 0.25) -> Floats:
    """λ U (Σ w_t Uᵀ M_t V) Vᵀ, float64, shape (p, q): the sum inside shared subspaces of rank r.

    U and V are those of the updates brought to the norms β‖·‖ + (1 − β) mean‖·‖ (`shared_subspaces`); the updates
    themselves are summed unscaled. r is ``rank``; 0 stands for the largest rank of any of the adapters, so the result
    is as wide as one of them. Compress-then-Merge, He et al. 2026, arXiv 2606.03723, with task arithmetic as the rule
    inside. Where we differ: the iteration runs until the subspaces change by at most 1e-13, and not until their
    energy does by 1e-6, so the result does not depend on where it stopped.
    """
    nominal = max(update.rank for update in joint.updates if update is not None)
    # Subspaces of one adapter's rank, so that the result is as small as an adapter. A core may be smaller than that, if
    # the updates share directions.
    count = min(rank or nominal, *joint.cores.shape[1:])
    if not count:
        return joint.total()
    U, V = shared_subspaces(equalise_norms(joint.cores, beta), count)
    # Norms are equalised for finding the subspaces only, so that a small adapter counts in the choice of the subspaces.
    return lam * U @ (U.T @ joint.total() @ V) @ V.T
