"""Leading singular triplets of a matrix that is cheap to multiply by, all of them, and known to be all.

Golub–Kahan bidiagonalisation (Golub & Kahan 1965) with every new vector orthogonalised against all before it. Alone it
can miss a repeated singular value; here the count of the values above the last one found is asked of the matrix itself
(`RankUpdate.above`), and the recursion goes on until both agree.
"""

from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from loralens.linalg.factor import Floats
from loralens.linalg.rank_update import RankUpdate

RESIDUAL = 1e-13  # of σ_1: ‖Mᵀy − σz‖ of every triplet found
TIE = 1e-9  # of σ_1: values nearer than this are one
BREAKDOWN = 1e-14  # of ‖M‖: a new vector shorter than this is rounding
SMALL = 512  # sides up to which the recursion may run to its end
PATIENCE = 4  # beyond, after a quarter of the side a dense SVD is faster

Method = Literal["lanczos", "dense"]


class Triplets(NamedTuple):
    """Singular triplets, largest first."""

    Y: Floats  # (m, k) left vectors
    s: Floats  # (k,)
    Z: Floats  # (n, k) right vectors
    tied: bool  # whether two of s, or the last and the next, are equal within TIE: then their vectors are not unique
    method: Method


def leading_triplets(M: RankUpdate, k: int) -> Triplets:
    """The k leading singular triplets of M, k ≤ min(m, n).

    Notes
    -----
    Residuals are below 1e-13 σ_1, so a vector errs by about 1e-13 σ_1 over the distance to its neighbour. O(j n r +
    j² n) for j steps, some 200 for ten triplets at the edge of a random spectrum of 2048. Where j would pass a quarter
    of the side, M is formed and LAPACK asked.
    """
    m, n = M.shape
    if m < n:
        Z, s, Y, tied, method = leading_triplets(M.T, k)
        return Triplets(Y, s, Z, tied, method)
    if M.P.shape[1] == 0:  # a diagonal: its vectors are at hand, whatever ties it has
        return Triplets(np.eye(m, k), M.s[:k], np.eye(n, k), _tied(M.s, k), "lanczos")
    limit = n if n <= SMALL else n // PATIENCE
    for U, V, B, rest in _bidiagonal(M, limit, first=min(2 * k + 4, limit)):
        X, s, Wh = np.linalg.svd(B)
        if len(s) == n or _complete(M, s, rest * np.abs(X[-1]), k):
            return Triplets(U.T @ X[:, :k], s[:k], V.T @ Wh[:k].T, _tied(s, k), "lanczos")
    Y, s, Zh = np.linalg.svd(M.dense(), full_matrices=False)
    return Triplets(Y[:, :k], s[:k], Zh[:k].T, _tied(s, k), "dense")


def _bidiagonal(M: RankUpdate, limit: int, *, first: int) -> Iterator[tuple[Floats, Floats, Floats, float]]:
    """U (j, m), V (j, n), B (j, j) and β with M Vᵀ = Uᵀ B and ‖MᵀUᵀ − VᵀBᵀ‖ = β in its last column, for growing j."""
    m, n = M.shape
    rng = np.random.default_rng(0)
    least = BREAKDOWN * M.bound()
    U, V, B = np.zeros((limit, m)), np.zeros((limit, n)), np.zeros((limit, limit))
    v, rest = _direction(rng.standard_normal(n), V[:0], least, rng)[0], 0.0
    due = first
    for j in range(limit):
        V[j] = v
        u = M.times(v) - (rest * U[j - 1] if j else 0.0)
        U[j], B[j, j] = _direction(u, U[:j], least, rng)
        if j:
            B[j - 1, j] = rest
        if j + 1 < n:
            v, rest = _direction(M.adjoint(U[j]) - B[j, j] * v, V[: j + 1], least, rng)
        else:
            rest = 0.0
        if j + 1 in (due, limit):
            due = due + due // 5 + 5
            yield U[: j + 1], V[: j + 1], B[: j + 1, : j + 1], rest


def _direction(x: Floats, Q: Floats, least: float, rng: np.random.Generator) -> tuple[Floats, float]:
    """The unit vector of x without its parts along the rows of Q, and its length; a random one and 0 if that is 0.

    Orthogonalised twice, which is enough (Giraud et al. 2005).
    """
    x = _without(x, Q)
    length = float(np.linalg.norm(x))
    if length > least:
        return x / length, length
    x = _without(rng.standard_normal(x.size), Q)
    return x / np.linalg.norm(x), 0.0


def _without(x: Floats, Q: Floats) -> Floats:
    """What is left of x without its parts along the rows of Q."""
    for _ in range(2):
        x = x - (Q @ x) @ Q
    return x


def _complete(M: RankUpdate, s: Floats, residuals: Floats, k: int) -> bool:
    """Whether s[:k] has converged, and no singular value of M above s[k - 1] is missing from it."""
    if len(s) <= k or s[0] == 0:
        return False
    close = np.diff(-s) > TIE * s[0]  # where there is a gap behind s[j]
    gaps = np.flatnonzero(close[k - 1 :])
    if not gaps.size:
        return False
    j = k + int(gaps[0])
    if (residuals[:j] > RESIDUAL * s[0]).any():
        return False
    return M.above(_between(s[j], s[j - 1], M.s)) == j


def _between(low: float, high: float, poles: Floats) -> float:
    """The number between low and high that is farthest from the poles there."""
    marks = np.sort(np.concatenate([[low, high], poles[(poles > low) & (poles < high)]]))
    widest = np.diff(marks).argmax()
    return float(marks[widest] + marks[widest + 1]) / 2


def _tied(s: Floats, k: int) -> bool:
    """Whether a value among the first k equals the next one."""
    return bool((np.diff(-s[: k + 1]) <= TIE * s[0]).any()) if s.size > 1 else False
