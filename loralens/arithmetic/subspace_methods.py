"""Methods that work on directions: in spaces that adapters share, and on singular values (TSV, Iso-C, Tucker …)."""

from math import ceil
from typing import NamedTuple

import numpy as np

from loralens.arithmetic.whole_update_methods import equalise_norms
from loralens.core.joint import Core, Joint
from loralens.linalg.factor import Floats
from loralens.linalg.pairwise import SAME


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
    return np.asarray(lam * U @ parts.sum(axis=0))


def nearest_orthonormal(X: Floats) -> Floats:
    """Return P Qᵀ of the SVD X = P S Qᵀ, float64, shape (n, k): the nearest matrix with orthonormal columns.

    Only directions with S > 1e-6·S_1 are used. For columns that the others span already the SVD would make up
    arbitrary new directions, in which two LAPACK drivers differ. Without them P Qᵀ is a partial isometry and unique.
    """
    P, s, Qh = np.linalg.svd(X, full_matrices=False)
    # The sum is S_1, or 0 if there is no column.
    keep = s > SAME * s[:1].sum()
    return np.asarray(P[:, keep] @ Qh[keep])


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
    return np.asarray(lam * (U * s) @ V.T)


def flat(U: Floats, V: Floats, size: float) -> Core:
    """Return ``size``·U Vᵀ of orthonormal columns (p, k) and (q, k), as an SVD in their order.

    All singular values are equal, so a later truncation cannot rank them and keeps the first columns. Their order is
    therefore fixed here and not by the LAPACK driver.
    """
    # Singular values are not negative, so the sign goes to U.
    return Core(-U if size < 0 else U, np.full(U.shape[1], abs(size)), V.T)


def iso_c(joint: Joint, *, lam: float = 1.0) -> Core:
    """λ σ̄ U Vᵀ, as an SVD of U (p, k), k values and Vᵀ (k, q), where Σ w_t M_t = U S Vᵀ and σ̄ is the mean of S.

    Iso-C of Marczak et al. 2025, arXiv 2502.04959, on the numerical rank of the sum. The published code takes all
    min(out, in) directions. For a low-rank update nearly all of those are null directions: their vectors depend on the
    LAPACK driver (two drivers differed by 58 % of the result), and their σ = 0 enters the mean. In the leading
    directions its result is ours times rank/min(out, in). Directions stay in the order of S, so a truncation keeps the
    leading ones of the sum.
    """
    U, s, Vh = joint.decompose(joint.total())
    return flat(U, Vh.T, lam * float(s.mean()) if s.size else 0.0)


def iso_cts(joint: Joint, *, lam: float = 1.0, common: float = 0.8) -> Core | Floats:
    """λ σ̄ U_⊥ V_⊥ᵀ, float64, shape (p, q) or as an SVD, from common and task-specific directions.

    Of r directions in all, the k leading ones of the sum Σ w_t M_t are common, and every update adds the s leading ones
    of (1 − U_k U_kᵀ) w_t M_t, with s = round((1 − common)·r/T), at most ⌊r/T⌋, and k = r − T·s. The vectors of both
    sides are then made orthonormal, and σ̄ is the mean of all their singular values. Iso-CTS of Marczak et al. 2025,
    arXiv 2502.04959, where ``common`` is 0.8 and r = min(out, in); of low-rank updates r is the sum of their numerical
    ranks, at most min(out, in). Null directions are left out, as in `iso_c`. Truncated, it keeps common directions
    first.
    """
    x = joint.weighted
    parts = [joint.decompose(M) for M in x]
    # Not min(out, in) as in the paper, which would fill up with null directions.
    r = min(sum(part.s.size for part in parts), *joint.shape)
    # Rounding must not leave a negative number of common directions.
    own = min(round((1 - common) * r / len(parts)), r // len(parts))
    k = r - own * len(parts)
    U, s, Vh = joint.decompose(joint.total())
    # Task-specific directions come from what the common ones leave of each update, as in the paper.
    shared = Core(U[:, :k], s[:k], Vh[:k])
    remainders = [joint.decompose(M - shared.U @ (shared.U.T @ M)) for M in x]
    chosen = [shared, *(Core(part.U[:, :own], part.s[:own], part.Vh[:own]) for part in remainders)]
    values = np.concatenate([part.s for part in chosen])
    if not values.size:
        return joint.total()
    U_all = nearest_orthonormal(np.hstack([part.U for part in chosen]))
    V_all = nearest_orthonormal(np.hstack([part.Vh.T for part in chosen]))
    if _orthonormal(U_all) and _orthonormal(V_all):
        return flat(U_all, V_all, lam * float(values.mean()))
    # Where a direction was left out the columns are no longer orthonormal, so this is not an SVD yet.
    return lam * float(values.mean()) * U_all @ V_all.T


def _orthonormal(X: Floats) -> bool:
    """Whether the columns are orthonormal; they are unless `nearest_orthonormal` left a direction out."""
    return bool(np.abs(X.T @ X - np.eye(X.shape[1])).max() < SAME)


def pico(joint: Joint, *, lam: float = 1.0) -> Floats:
    """λ (m/‖y‖) y with y = (1 + U diag(α − 1) Uᵀ) Σ x_t, float64, shape (p, q), with x_t = w_t M_t.

    U holds the left singular vectors of the B of all T updates side by side, s_j = σ_j²/Σσ² is the share of each of
    them, and α_j = 1/(1 + (T − 1) s_j), so a direction that all updates share is weakened most. m is the mean of ‖x_t‖,
    and T counts the updates that are not 0. This is PICO (Tang & Yang 2026, arXiv 2604.16826) with task arithmetic. We
    differ in one point: B alone is not defined by the update, as (B G)(G⁻¹ A) is the same update. Here B is ΔW V, which
    belongs to orthonormal rows of A, so the result depends on the updates only.
    """
    x, total = joint.weighted, joint.total()
    norms = np.linalg.norm(x, axis=(1, 2))
    # T and the mean are those of the updates that exist: an adapter that lacks the module does not count.
    x, norms = x[norms > 0], norms[norms > 0]
    if not len(x) or np.linalg.norm(total, 2) <= joint.floor:
        # A sum that cancels is rounding error, which must not be scaled to the norm m.
        return np.zeros_like(total)
    # The B of the docstring side by side have the same left singular vectors: Σ x_t x_tᵀ is Σ B_t B_tᵀ.
    U, s, _ = np.linalg.svd(np.hstack(list(x)), full_matrices=False)
    alpha = 1 / (1 + (len(x) - 1) * s**2 / float(s @ s))
    y = total + (U * (alpha - 1)) @ (U.T @ total)
    # Weakening shared directions makes the sum shorter, so it is brought back to the mean norm of the updates.
    return lam * float(norms.mean()) / float(np.linalg.norm(y)) * y


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
    return np.asarray(result)


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
    return np.asarray(side @ side.T)


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
