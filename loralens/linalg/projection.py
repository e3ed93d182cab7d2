"""One pass over a big matrix S: its norm, its projection LᵀSR on given directions, and a sketch of its spectrum."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from loralens.errors import FormatError
from loralens.linalg.device import Device
from loralens.linalg.factor import Array, Floats

SKETCH = 8  # columns of Ω

Block = tuple[slice, Array]


class Projection(NamedTuple):
    """What one pass over S (m, n) told; NumPy, float64."""

    squares: float  # ‖S‖_F²
    product: Floats  # (k1, k2) LᵀSR
    gram: Floats  # (l, l) ΩᵀSᵀSΩ


class Estimate(NamedTuple):
    """A number, and its standard error."""

    value: float
    error: float


def gaussian(rng: np.random.Generator, n: int) -> Floats:
    """Ω: independent standard normal numbers, float64, shape (n, 8)."""
    return rng.standard_normal((n, SKETCH))


def project(
    blocks: Iterable[Block],
    left: Floats,
    right: Floats,
    sketch: Floats,
    *,
    device: Device,
    whole: Any = None,
    step: Callable[[int], None] | None = None,
) -> Projection:
    """Norm, projection and sketch of S (m, n), read once, a block of rows at a time.

    Parameters
    ----------
    blocks : iterable of (slice, array)
        Rows of S with their place, in any order, of any float dtype of NumPy.
    left : float64 array, shape (m, k1)
    right : float64 array, shape (n, k2)
    sketch : float64 array, shape (n, l)
        Ω of `gaussian`.
    device : Device
        Blocks are cast to its dtype: float64 on the CPU, float32 in torch. There results agree to 1e-5.
    whole : array of the device, shape (m, n), optional
        Filled with S.
    step : callable, optional
        Told the size of every block that is done.

    Raises
    ------
    FormatError
        S holds NaN or Inf.

    Notes
    -----
    2 m n (k2 + l) flops in one product, and as many bytes read as S has. Blocks are worked on in the threads of the
    device and added in their order, so the result does not depend on the threads.
    """
    k = right.shape[1]
    R, L = device.put(np.hstack([right, sketch])), device.put(left)

    def part(item: Block) -> tuple[int, float, Floats, Floats]:
        rows, block = item
        with np.errstate(over="ignore", invalid="ignore"):  # each thread has its own
            x = device.cast(block)
            if whole is not None:
                whole[rows, :] = x
            y = x @ R
            P, G = L[rows, :].T @ y[:, :k], y[:, k:].T @ y[:, k:]
            return block.size, device.squares(x), device.numpy(P), device.numpy(G)

    squares, product = 0.0, np.zeros((left.shape[1], k))
    gram = np.zeros((sketch.shape[1], sketch.shape[1]))
    for size, square, P, G in device.map(part, blocks):
        with np.errstate(over="ignore", invalid="ignore"):
            squares, product, gram = squares + square, product + P, gram + G
        if step:
            step(size)
    if not np.isfinite(squares):
        raise FormatError("the weight holds NaN or Inf", fix="the base is damaged: download it again")
    return Projection(squares, product, gram)


def fourth_powers(found: Projection, shape: tuple[int, int], *, known: tuple[Floats, Floats] | None = None) -> Estimate:
    """Σσ⁴ of S = ‖SᵀS‖_F² from its sketch, and the standard error of that.

    Parameters
    ----------
    found : Projection
    shape : tuple of int
        Of S.
    known : tuple, optional
        s (k,), leading singular values of S, and VᵀΩ (k, l), V their right vectors: then only the rest is estimated.

    Notes
    -----
    With M = SᵀS, t = tr M = ‖S‖_F² and G = ΩᵀMΩ: E‖G − t·1‖_F² = l(l + 1) tr M² exactly, since E G_ij² = tr M² for
    i ≠ j and Var G_ii = 2 tr M². The estimate is kept within what any spectrum allows, its error is the jackknife's
    over the columns of Ω: relative 2/√(l(l + 1)), 24 % at l = 8, where many σ share the energy. Where few hold most of
    it the sketch may miss them: the error grows to 1 and is understated one time in four. Leading values that are known
    take it away.
    """
    count, tail, G = min(shape), found.squares, found.gram
    head, highest = 0.0, found.squares
    if known:
        s, overlap = known
        count, tail = count - s.size, max(tail - float(s @ s), 0.0)
        head, highest = float(np.sum(s**4)), min(float(s[-1]) ** 2, tail)
        G = G - (overlap.T * s**2) @ overlap
    if count <= 0 or tail <= 0:
        return Estimate(head, 0.0)
    size, squares = len(G), (G - tail * np.eye(len(G))) ** 2
    rest = float(squares.sum()) / (size * (size + 1))
    without = (squares.sum() - 2 * squares.sum(axis=0) + squares.diagonal()) / (size * (size - 1))
    error = float(np.sqrt((size - 1) * without.var()))
    return Estimate(head + min(max(rest, tail**2 / count), tail * highest), error)


def exact_fourth_powers(S: Any, *, device: Device) -> float:
    """Σσ⁴ of S (m, n), from the Gram matrix of its shorter side: m n min(m, n) products."""
    short = S if S.shape[0] <= S.shape[1] else S.T
    return float(np.sum(device.numpy(device.matmul(short, short.T)) ** 2))
