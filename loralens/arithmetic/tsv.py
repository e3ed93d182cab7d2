"""TSV-M: the singular vectors of all updates are made orthogonal and keep their singular values (Gargiulo et al.)."""

import numpy as np

from loralens.core.joint import Core, Joint
from loralens.linalg.factor import Floats
from loralens.linalg.pairwise import SAME


def nearest_orthonormal(X: Floats) -> Floats:
    """Return P Qᵀ of the SVD X = P S Qᵀ, float64, shape (n, k): the nearest matrix with orthonormal columns.

    Only directions with S > 1e-6·S_1 are used. For columns that the others span already the SVD would make up
    arbitrary new directions, in which two LAPACK drivers differ. Without them P Qᵀ is a partial isometry and unique.
    """
    P, s, Qh = np.linalg.svd(X, full_matrices=False)
    # The sum is S_1, or 0 if there is no column.
    keep = s > SAME * s[:1].sum()
    return np.asarray(P[:, keep] @ Qh[keep], dtype=np.float64)


def components(joint: Joint) -> list[Core]:
    """Return the leading singular triplets of every M_t: as many as its rank, at most min(out, in)/T, so all fit."""
    # With more adapters than directions, each still keeps one direction, because it would otherwise not take part.
    most = max(1, min(joint.shape) // len(joint.cores))
    triplets = []
    for M, floor in zip(joint.cores, joint.floors, strict=True):
        U, s, Vh = np.linalg.svd(M, full_matrices=False)
        k = min(int(np.count_nonzero(s > floor)), most)
        triplets.append(Core(U[:, :k], s[:k], Vh[:k]))
    return triplets


def tsv_m(joint: Joint, *, lam: float = 1.0) -> Floats:
    """λ U_⊥ diag(w_t σ_t) V_⊥ᵀ, float64, shape (p, q), with U_⊥ the nearest orthonormal matrix to [U_1 … U_T].

    U_t, σ_t, V_t are the singular triplets of update t, and V_⊥ is made likewise. TSV-M of Gargiulo et al. 2025, arXiv
    2412.00081, §4, which keeps min(out, in)/T triplets of every full update; those of a low-rank update beyond its
    rank are null directions, and are not used. Where we differ: the weights w_t multiply σ_t (the paper has none), and
    directions that two updates share count once (`nearest_orthonormal`), so the result does not depend on the driver.
    """
    parts = components(joint)
    # Weights multiply the singular values only: the vectors have length 1, and all of them count alike below.
    s = np.concatenate([w * part.s for w, part in zip(joint.strengths, parts, strict=True)])
    if not s.size:
        return joint.total()
    U = nearest_orthonormal(np.hstack([part.U for part in parts]))
    V = nearest_orthonormal(np.hstack([part.Vh.T for part in parts]))
    return np.asarray(lam * (U * s) @ V.T, dtype=np.float64)
