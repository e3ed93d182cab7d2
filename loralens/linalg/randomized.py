"""Leading singular triplets of a big matrix, by a randomised block Krylov method, with a stated error.

Halko, Martinsson & Tropp 2011 with a Krylov space instead of powers (Musco & Musco 2015): block Golub–Kahan
bidiagonalisation from a Gaussian start, every block orthogonalised against all before it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from loralens.linalg.device import Device, Float
from loralens.linalg.factor import Floats

OVERSAMPLE = 8  # columns of a block beyond those wanted
STEPS = 8  # at most; a step is a product with W and one with Wᵀ
ENOUGH = 1e-3  # of ‖σ‖: the stated error at which the steps end
ROUNDING = 2.0**-20  # of σ₁: what float32 adds to the error
SMALL = 512  # a shorter side up to which the dense SVD is as fast
FEWEST = 3  # steps that must fit into the matrix, or the dense SVD is the better way

Step = Callable[[int], None]


class Leading(NamedTuple):
    """Leading singular triplets of W (m, n), largest first; NumPy, float64."""

    U: Floats  # (m, k)
    s: Floats  # (k,)
    V: Floats  # (n, k)
    error: Floats  # (k,) W has a singular value no farther than this from each of s; 0 where the SVD was dense
    steps: int  # 0 where the SVD was dense


def is_dense(shape: tuple[int, int], k: int, *, exact: bool = False) -> bool:
    """Whether `leading` takes the dense SVD: because it is asked to, or because that is as cheap."""
    return exact or min(shape) <= SMALL or FEWEST * _width(k) > min(shape) // 2


def holds(shape: tuple[int, int], k: int, *, exact: bool = False) -> Float:
    """In what W must be given to `leading`: float64 for the dense SVD, else float32."""
    return "float64" if is_dense(shape, k, exact=exact) else "float32"


def leading(
    W: Any,
    k: int,
    *,
    rng: np.random.Generator,
    device: Device,
    exact: bool = False,
    step: Step | None = None,
) -> Leading:
    """The k leading singular triplets of W.

    Parameters
    ----------
    W : array of the device, shape (m, n)
        float32, or float64 where `is_dense` (see `holds`).
    k : int
        How many; where there are fewer, all min(m, n).
    rng : Generator
        Of the start.
    exact : bool
        The dense SVD of LAPACK, O(m n min(m, n)): minutes and four times the memory of W for 4096 × 4096.
    step : callable, optional
        Told the numbers of W after every step.

    Notes
    -----
    At most 8 steps, 16 products with k + 8 columns; they end when the error of √Σσ² is below 1e-3 of it.

    Error: with WV = US exact by construction, ‖Wᵀuᵢ − σᵢvᵢ‖ = ρᵢ is known without another product. Some singular
    value of W lies within ρᵢ/√2 of σᵢ, all together within √Σρᵢ² (Kahan 1967 on [0 W; Wᵀ 0]), σᵢ is never above the
    i-th one but for rounding, and the true error is about ρᵢ²/σᵢ: mostly far less. That no larger value was missed is
    not proved but certain in practice: the start would have to be orthogonal to its vector. Vectors err by ρᵢ over the
    distance to the next value, so among crowded values they are not determined, only the space of all of them is.
    """
    m, n = W.shape
    k = min(k, m, n)
    if is_dense((m, n), k, exact=exact):
        return _dense(W, k, device)
    width = _width(k)
    most = min(STEPS, min(m, n) // (2 * width))
    space = _Krylov(W, device.put(rng.standard_normal((n, width)), "float32"), device)
    for count in range(1, most + 1):
        space.extend()
        if step:
            step(m * n)
        a, s, b, error = space.triplets(k)
        if float(np.linalg.norm(error)) <= ENOUGH * float(np.linalg.norm(s)) or count == most:
            break
    U = device.matmul(space.P, device.put(a, "float32"))
    V = device.matmul(space.Q, device.put(b, "float32"))
    return Leading(device.numpy(U), s, device.numpy(V), error + ROUNDING * s[0], count)


def _width(k: int) -> int:
    """Columns of a block."""
    return k + OVERSAMPLE


def _dense(W: Any, k: int, device: Device) -> Leading:
    """The k leading triplets of the whole SVD."""
    U, s, Vh = array_namespace(W).linalg.svd(W, full_matrices=False)
    return Leading(device.numpy(U[:, :k]), device.numpy(s[:k]), device.numpy(Vh[:k, :].T), np.zeros(k), 0)


class _Krylov:
    """Orthonormal P (m, K) and Q (n, K) with W Q = P M; and what Wᵀ P has outside of Q, which is the error.

    That is ``next @ rest``, of the last block of P alone; ``next`` is the block of Q to come.
    """

    def __init__(self, W: Any, start: Any, device: Device) -> None:
        self.W, self.device, self.xp = W, device, array_namespace(W)
        self.next = self.xp.linalg.qr(start)[0]
        self.P, self.Q = W[:, :0], start[:, :0]
        self.M = np.zeros((0, 0))
        self.rest = np.zeros((0, 0))

    def extend(self) -> None:
        """One block more: a product with W, one with Wᵀ."""
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
        residual = np.linalg.norm(self.rest @ a[-len(self.rest) :, :k], axis=0)
        return a[:, :k], s[:k], bh[:k].T, residual

    def _orthogonal(self, Y: Any, basis: Any) -> tuple[Any, Floats, Floats]:
        """Z, C and A with Y = basis C + Z A and orthonormal [basis, Z]; twice, since rounding may fill what is left."""
        first, one, A = self._against(Y, basis)
        Z, two, B = self._against(first, basis)
        return Z, one + two @ A, B @ A

    def _against(self, Y: Any, basis: Any) -> tuple[Any, Floats, Floats]:
        """Z, C and A of `_orthogonal`, from one pass."""
        C = basis.T @ Y
        Z, A = self.xp.linalg.qr(Y - basis @ C)
        return Z, self.device.numpy(C), self.device.numpy(A)
