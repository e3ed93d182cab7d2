"""Data-aware truncation: the rank-k ΔW' that is nearest to ΔW on real inputs, computed from r × r moments.

Plain truncation minimises ‖ΔW − ΔW'‖_F². This one minimises E‖(ΔW − ΔW')x‖² or, with moments of the out side, E(gᵀ(ΔW −
ΔW')x)² as in K-FAC. In general that takes C = E[x xᵀ] (in, in) and its inverse root. A pair needs neither: with B = Q_B
R_B and K = A C Aᵀ = E[z zᵀ], z = A x, it is enough to know the left singular vectors Û of s R_B K^½ (r × r). Then ΔW'_k
= Q_B Û_k · s Û_kᵀ R_B A. This is a projection, so nothing is inverted, and a singular K needs no special treatment.

C is replaced by C + εI with ε = 1e-6 · E‖ΔW x‖² / ‖ΔW‖_F², which turns K into K + ε A Aᵀ. Directions that the data
never excites are then ordered among each other by their weight, full rank is lossless, B G and G⁻¹ A give the same ΔW',
and the error on the data is never above that of plain truncation. (A term δI added to K itself would lose the last
two.)
"""

from dataclasses import dataclass
from typing import final

import numpy as np

from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.errors import FormatError, ShapeError
from loralens.linalg.basis import Basis
from loralens.linalg.factor import implicit, measure
from loralens.linalg.measures import EPS

# It adds at most 1e-6 · E‖ΔW x‖² to the squared error on the data. It is far above rounding (1e-16), so it orders the
# directions that the data never excites.
SHARE = 1e-6  # energy of white inputs that is mixed in, relative to the energy on the data


@final
@dataclass(frozen=True)
class Whitened:
    """The update of a module as a sum of rank-one terms, ordered by their effect on the data; made by `whitened_svd`.

    ΔW = Q_B (X Y) A, and the best ΔW' of rank k on the data keeps the first k columns of X and rows of Y.

    Attributes
    ----------
    s : float64 array, shape (m,)
        Singular values of the whitened update, largest first: √Σ_{i>k} s_i² is the error at rank k in the norm that
        was minimised, in units of y = W x (with G: of the loss). A budget over modules compares these. m = min(out, r)
        if B has no zero columns.
    X : float64 array, shape (m, m)
    Y : float64 array, shape (m, r)
    Q_B : Basis
        m columns of length out.
    R_A : float64 array, shape (n, r)
        A = R_Aᵀ Q_Aᵀ, so Y_i R_Aᵀ has the length of the row Y_i A. n = min(r, in) if A has no zero rows.
    """

    s: Array
    X: Array
    Y: Array
    Q_B: Basis
    R_A: Array


def whitened_svd(module: LowRank, K: Array, G: Array | None = None) -> Whitened:
    """The directions of a module, ordered by their effect on real inputs.

    Parameters
    ----------
    module : LowRank, (out, in) of rank r
    K : array, shape (r, r)
        E[z zᵀ], z = A x: `loralens.core.moments.Moment.K`.
    G : array, shape (r, r), optional
        E[(Bᵀg)(Bᵀg)ᵀ], g the gradient at the output. Then ‖G^½(ΔW − ΔW')C^½‖_F is minimised, the error of the loss
        under K-FAC's factorisation, and the error on the data alone is no longer the smallest possible.

    Returns
    -------
    Whitened

    Raises
    ------
    ShapeError
        K or G is not (r, r).
    FormatError
        K, G or a factor holds NaN or Inf.

    Notes
    -----
    One-sided: SVD(s R_B [K^½, √ε R_Aᵀ]) = U s V, X = U, Y = s Uᵀ R_B. Two-sided: with FᵀF = G + η R_BᵀR_B,
    SVD(F [K^½, √ε R_Aᵀ]) = u s v, X = s R_B F⁺ u, Y = uᵀ F, F⁺ on the numerical range of F, which is that of B.
    η = 1e-6 of the ratio of the two energies, for the reason that ε has. SVD-LLM (one-sided, with a Cholesky
    factor of C) and K-FAC-weighted SVD give the same ΔW' from matrices of the size of W.

    O((out + in) r²) work.
    """
    K = _moment(K, module.rank, "K")
    Q_B, R_B = _basis_and_R(module.B)
    R_A = _basis_and_R(module.A.T)[1]
    core = module.scale * R_B  # (m, r); Q_B is orthonormal, so that all norms can be taken without it
    sides = _root(K), R_A.T
    L = _join_sides(sides, _white_share(core @ sides[0], core @ sides[1]))  # L Lᵀ = K + ε A Aᵀ
    if G is None:
        U, s, _ = np.linalg.svd(core @ L, full_matrices=False)
        return Whitened(s, U, U.T @ core, Q_B, R_A)
    G_root = _root(_moment(G, module.rank, "G")).T
    eta = _white_share(G_root @ L, R_B @ L)
    # Any square root of G + η R_BᵀR_B serves; a QR decomposition gives one without forming the sum.
    F = np.asarray(np.linalg.qr(_join_sides((G_root.T, R_B.T), eta).T, mode="r"), np.float64)
    u, s, _ = np.linalg.svd(F @ L, full_matrices=False)
    m = Q_B.k  # the rank of B, beyond which F L has no singular values but rounding
    s = abs(module.scale) * s[:m]
    F_inverse = np.asarray(np.linalg.pinv(F, rcond=max(F.shape) * EPS), np.float64)  # on the numerical range of F
    return Whitened(s, (core @ F_inverse) @ u[:, :m], u[:, :m].T @ F, Q_B, R_A)


def data_norm(module: LowRank, K: Array) -> float:
    """√(E‖ΔW x‖²), the size of an update at the output of its module. Raises the errors of `whitened_svd`."""
    root = _root(_moment(K, module.rank, "K"))
    return float(np.linalg.norm(module.scale * _basis_and_R(module.B)[1] @ root))


def data_error(module: LowRank, other: LowRank, K: Array, *, trace: float | None = None) -> float:
    """Relative error √(E‖(ΔW − ΔW')x‖² / E‖ΔW x‖²) of any update ``other`` of the same weight; 0 if both are 0.

    K describes the inputs only as A sees them. This is exact as far as the rows of A' are combinations of the rows of
    A, which holds for every truncation. Rounding adds a part outside the row space of A. For that part the energy of x
    that A does not see is assumed to be spread evenly over the remaining in − n directions, which is exact on average
    for white rounding noise. It needs ``trace``, E‖x‖² (`loralens.core.moments.Moment.trace`), and is left out without
    it. The result is infinite where ΔW x = 0 and ΔW' x is not. Raises the errors of `whitened_svd`, and a ShapeError if
    the two updates have different shapes.
    """
    if module.shape != other.shape:
        raise ShapeError(
            f"updates of the shapes {module.shape} and {other.shape} are not of one weight",
            fix="pass updates of equal shape",
        )
    root = _root(_moment(K, module.rank, "K"))
    right, R_A = _basis_and_R(module.A.T)
    Q_A, rows = right.columns(), other.A.T.astype(np.float64)
    inside = Q_A.T @ rows  # (n, r')
    through = np.linalg.lstsq(R_A, inside, rcond=None)[0].T  # A' = through · A + a part outside the row space of A
    # The difference is formed in the r + r′ directions of both B, so that nearly equal updates do not cancel.
    stacked = np.hstack([module.scale * module.B.astype(np.float64), -other.scale * other.B.astype(np.float64)])
    R = _basis_and_R(stacked)[1]
    first = R[:, : module.rank] @ root
    error, norm = np.linalg.norm(first + R[:, module.rank :] @ through @ root), np.linalg.norm(first)
    if trace is not None and Q_A.shape[0] > right.k:
        visible = float(np.sum(np.linalg.lstsq(R_A.T, root, rcond=None)[0] ** 2))  # E‖Q_Aᵀ x‖²
        spread = max(0.0, trace - visible) / (Q_A.shape[0] - right.k)
        error = np.hypot(error, np.sqrt(spread) * np.linalg.norm((rows - Q_A @ inside) @ R[:, module.rank :].T))
    return float(error / norm) if norm else (np.inf if error else 0.0)


def _moment(K: Array, rank: int, name: str) -> Array:
    """The moment in float64, made exactly symmetric, which `eigh` assumes."""
    K = np.asarray(K, np.float64)
    if K.shape != (rank, rank):
        raise ShapeError(
            f"{name} has the shape {K.shape}, and the module has rank {rank}",
            fix="measure the moments of this adapter: loralens calibrate",
        )
    if not np.isfinite(K).all():
        raise FormatError(
            f"{name} holds NaN or Inf", fix="calibrate again, with inputs for which the model gives finite numbers"
        )
    return np.asarray((K + K.T) / 2, np.float64)


def _root(K: Array) -> Array:
    """L with L Lᵀ = K, shape (r, r).

    Eigenvalues within rounding of 0 become 0, because the root of a rounding error of 1e-16 would count as 1e-8.
    """
    values, V = np.linalg.eigh(K)
    # `eigh` sorts upwards, so the last eigenvalue is the largest.
    alive = values > values[-1:] * len(K) * EPS
    return np.asarray(V * np.sqrt(np.where(alive, values, 0.0)), np.float64)


def _basis_and_R(X: Array) -> tuple[Basis, Array]:
    """Q and R with X = Q R, where Q is a basis of at most min(m, r) columns and R has all r columns."""
    factor = measure(X)
    order = np.flatnonzero(factor.norms)  # columns of 0 have no direction, and get columns of 0 in R
    Y, T, R = implicit(factor, order)
    full = np.zeros((R.shape[0], X.shape[1]))
    full[:, order] = R * np.ldexp(factor.norms, factor.exponents)[order]
    return Basis(Y, T), full


def _white_share(data: Array, weight: Array) -> float:
    """The factor ε of white inputs; 1 if the data has no energy, so that the result is plain truncation."""
    energy, weight_energy = float(np.sum(data**2)), float(np.sum(weight**2))
    return SHARE * energy / weight_energy if energy and weight_energy else 1.0


def _join_sides(sides: tuple[Array, Array], share: float) -> Array:
    """[first, √share · second]."""
    return np.hstack([sides[0], np.sqrt(share) * sides[1]])
