"""Leading singular triplets of a big matrix by a randomised block Krylov method, with an error bound.

The method is that of Halko, Martinsson & Tropp 2011 with a Krylov space instead of powers (Musco & Musco 2015). It is a
block Golub–Kahan bidiagonalisation from a Gaussian start, in which every block is orthogonalised against all before it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from loralens.linalg.device import Device, Float
from loralens.linalg.factor import Floats

# Halko, Martinsson & Tropp 2011 recommend 5 to 10 columns more than wanted.
OVERSAMPLE = 8  # columns of a block beyond those wanted
STEPS = 8  # most steps; a step is a product with W and one with Wᵀ
ENOUGH = 1e-3  # relative to ‖σ‖: the error bound at which the steps end
ROUNDING = 2.0**-20  # relative to σ₁: what float32 adds to the error

SMALL = 512  # length of the shorter side up to which the dense SVD is as fast
FEWEST = 3  # steps that must fit into the matrix; otherwise the dense SVD is used

Step = Callable[[int], None]


class Leading(NamedTuple):
    """Leading singular triplets of W (m, n), largest first; NumPy, float64."""

    U: Floats  # (m, k)
    s: Floats  # (k,)
    V: Floats  # (n, k)
    error: Floats  # (k,) bound of the distance from each s to a singular value of W; 0 where the SVD was dense
    steps: int  # 0 where the SVD was dense


def is_dense(shape: tuple[int, int], k: int, *, exact: bool = False) -> bool:
    """Whether `leading_svd` computes the dense SVD, because ``exact`` demands it or because it is as cheap."""
    return exact or min(shape) <= SMALL or FEWEST * _width(k) > min(shape) // 2


def input_dtype(shape: tuple[int, int], k: int, *, exact: bool = False) -> Float:
    """The dtype in which `leading_svd` needs W: float64 for the dense SVD, else float32."""
    return "float64" if is_dense(shape, k, exact=exact) else "float32"


def leading_svd(
    W: Any, k: int, *, rng: "np.random.Generator", device: Device, exact: bool = False, step: Step | None = None
) -> Leading:
    """Compute the k leading singular triplets of W.

    Parameters
    ----------
    W : array of the device, shape (m, n)
        float32, or float64 where `is_dense` (see `input_dtype`).
    k : int
        Number of triplets. If W has fewer, all min(m, n) are returned.
    rng : Generator
        The source of the Gaussian start.
    exact : bool
        Compute the dense SVD with LAPACK, O(m n min(m, n)). For 4096 × 4096 this takes minutes and four times the
        memory of W.
    step : callable, optional
        Called after every step with the number of entries of W.

    Notes
    -----
    There are at most 8 steps, which are 16 products with k + 8 columns. The steps end when the
    relative error of √Σσ² is below 1e-3.

    WV = US holds by construction, so ρᵢ = ‖Wᵀuᵢ − σᵢvᵢ‖ is known without another product. Some singular value of W lies
    within ρᵢ/√2 of σᵢ, and all together lie within √Σρᵢ² (Kahan 1967 on [0 W; Wᵀ 0]). Apart from rounding, σᵢ is never
    above the i-th singular value. The true error is about ρᵢ²/σᵢ, which is mostly far less than the bound. It is not
    proved that no larger value was missed, but to miss a value the start would have to be orthogonal to its vector.
    Vectors have an error of ρᵢ divided by the distance to the next value. Among crowded values the single vectors are
    therefore not determined, only the space that they span.
    """
    m, n = W.shape
    k = min(k, m, n)
    if is_dense((m, n), k, exact=exact):
        return _dense(W, k, device)
    width = _width(k)
    # Every step adds `width` columns on both sides; beyond half of the shorter side a dense SVD would do as well.
    most = min(STEPS, min(m, n) // (2 * width))
    space = _Krylov(W, device.put(rng.standard_normal((n, width)), "float32"), device)
    for count in range(1, most + 1):
        space.extend()
        if step:
            step(m * n)
        # The core is small, so the error is looked at after each step rather than predicted.
        a, s, b, error = space.triplets(k)
        if float(np.linalg.norm(error)) <= ENOUGH * float(np.linalg.norm(s)) or count == most:
            break
    U = device.matmul(space.P, device.put(a, "float32"))
    V = device.matmul(space.Q, device.put(b, "float32"))
    return Leading(device.numpy(U), s, device.numpy(V), error + ROUNDING * s[0], count)


def _width(k: int) -> int:
    """Number of columns of a block."""
    return k + OVERSAMPLE


def _dense(W: Any, k: int, device: Device) -> Leading:
    """The k leading triplets of the whole SVD."""
    U, s, Vh = array_namespace(W).linalg.svd(W, full_matrices=False)
    return Leading(device.numpy(U[:, :k]), device.numpy(s[:k]), device.numpy(Vh[:k, :].T), np.zeros(k), 0)


class _Krylov:
    """Orthonormal P (m, K) and Q (n, K) with W Q = P M, and the part of Wᵀ P outside the span of Q, which is the error.

    This part is ``next @ rest`` and belongs to the last block of P alone; ``next`` is the next block of Q.
    """

    def __init__(self, W: Any, start: Any, device: Device) -> None:
        self.W, self.device, self.xp = W, device, array_namespace(W)
        self.next = self.xp.linalg.qr(start)[0]
        self.P, self.Q = W[:, :0], start[:, :0]
        self.M = np.zeros((0, 0))
        self.rest = np.zeros((0, 0))

    def extend(self) -> None:
        """Add a block to P and to Q, by one product with W and one with Wᵀ."""
        # M grows by one block: the coordinates of W·next in the old P stand above those in the new one.
        old, width = self.M.shape[0], self.next.shape[1]
        P, C, A = self._orthogonal(self.device.matmul(self.W, self.next), self.P)
        M = np.zeros((old + width, old + width))
        M[:old, :old], M[:old, old:], M[old:, old:] = self.M, C, A
        self.M, self.P = M, self.xp.concat([self.P, P], axis=1)
        self.Q = self.xp.concat([self.Q, self.next], axis=1)
        self.next, _, self.rest = self._orthogonal(self.device.matmul(self.W.T, P), self.Q)

    def triplets(self, k: int) -> tuple[Floats, Floats, Floats, Floats]:
        """The k leading triplets: their coordinates in P and in Q, σ, and ‖Wᵀu − σv‖."""
        a, s, bh = np.linalg.svd(self.M)
        # Only the last block of P has a part of WᵀP outside Q, because Q was extended by the parts of the earlier ones.
        residual = np.linalg.norm(self.rest @ a[-len(self.rest) :, :k], axis=0)
        return a[:, :k], s[:k], bh[:k].T, residual

    def _orthogonal(self, Y: Any, basis: Any) -> tuple[Any, Floats, Floats]:
        """Z, C and A with Y = basis C + Z A and orthonormal [basis, Z], in two passes, since one leaves rounding."""
        Y1, C1, A1 = self._against(Y, basis)
        Z, C2, A2 = self._against(Y1, basis)
        return Z, C1 + C2 @ A1, A2 @ A1

    def _against(self, Y: Any, basis: Any) -> tuple[Any, Floats, Floats]:
        """Z, C and A of `_orthogonal` after one pass of projection."""
        C = basis.T @ Y
        Z, A = self.xp.linalg.qr(Y - basis @ C)
        return Z, self.device.numpy(C), self.device.numpy(A)
