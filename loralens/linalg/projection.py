"""Quantities of a big matrix S that one pass gives: its norm, its projection LᵀSR, and a sketch of its spectrum."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from loralens.errors import FormatError
from loralens.linalg.compiled.loops import pad_projection, project_rows
from loralens.linalg.device import Device
from loralens.linalg.factor import Array, Floats

# The relative error of Σσ⁴ is 2/√(l(l + 1)): 24 % at l = 8; every column costs a column of the product.
SKETCH = 8  # columns of Ω

Block = tuple[slice, Array]


class Projection(NamedTuple):
    """The results of one pass over S (m, n); NumPy, float64."""

    squares: float  # ‖S‖_F²
    product: Floats  # (k1, k2) LᵀSR
    gram: Floats  # (l, l) ΩᵀSᵀSΩ


class Estimate(NamedTuple):
    """An estimated number and its standard error."""

    value: float
    error: float


def gaussian(rng: "np.random.Generator | None", n: int) -> Floats:
    """Ω: independent standard normal numbers, float64, shape (n, 8); zeros without a generator."""
    return np.zeros((n, SKETCH)) if rng is None else rng.standard_normal((n, SKETCH))


def project(
    blocks: Iterable[Block],
    left: Floats,
    right: Floats,
    sketch: Floats,
    *,
    device: Device,
    out: Any = None,
    step: Callable[[int], None] | None = None,
) -> Projection:
    """Compute norm, projection and sketch of S (m, n) in one pass over blocks of its rows.

    Parameters
    ----------
    blocks : iterable of (slice, array)
        Rows of S with their position, in any order and of any float dtype of NumPy.
    left : float64 array, shape (m, k1)
    right : float64 array, shape (n, k2)
    sketch : float64 array, shape (n, l)
        Ω of `gaussian`.
    device : Device
        Blocks are cast to its dtype: float64 on the CPU, float32 in torch. Results in torch agree to 1e-5.
    out : array of the device, shape (m, n), optional
        Filled with S.
    step : callable, optional
        Called with the size of every block that is done.

    Raises
    ------
    FormatError
        S holds NaN or Inf.

    Notes
    -----
    The cost is 2 m n (k2 + l) flops in one product, and S is read once. The threads of the device work on blocks, and
    their results are added in the order of the blocks, so the result does not depend on the number of threads.
    """
    k = right.shape[1]
    # One product with both, so that S is read once.
    both = np.hstack([right, sketch])
    R, L = device.put(both), device.put(left)
    padded = pad_projection(both) if device.torch is None else None

    def part(block_of_rows: Block) -> tuple[int, float, Floats, Floats]:
        rows, block = block_of_rows
        with np.errstate(over="ignore", invalid="ignore"):  # each thread has its own
            compiled = None if padded is None else project_rows(block, padded, both.shape[1])
            x = block if compiled else device.cast(block)
            if out is not None:
                # A copy in the dtype of the block is exact, and needs no conversion.
                out[rows, :] = block if block.dtype == out.dtype else x
            y = compiled.product if compiled else x @ R
            P, G = L[rows, :].T @ y[:, :k], y[:, k:].T @ y[:, k:]
            squares = compiled.squares if compiled else device.squares(x)
            return block.size, squares, device.numpy(P), device.numpy(G)

    # Partial results are added up here, by one thread and in order, so the bits do not depend on the threads.
    squares, product = 0.0, np.zeros((left.shape[1], k))
    gram = np.zeros((sketch.shape[1], sketch.shape[1]))
    for size, square, P, G in device.map(part, blocks):
        with np.errstate(over="ignore", invalid="ignore"):
            squares, product, gram = squares + square, product + P, gram + G
        if step:
            step(size)
    # One check for the whole pass: any NaN or Inf in S makes the sum of squares NaN or Inf.
    if not np.isfinite(squares):
        raise FormatError("the weight holds NaN or Inf", fix="the base is damaged: download it again")
    return Projection(squares, product, gram)


def fourth_powers(
    projection: Projection, shape: tuple[int, int], *, leading: tuple[Floats, Floats] | None = None
) -> Estimate:
    """Estimate Σσ⁴ of S, which is ‖SᵀS‖_F², and its standard error from the sketch.

    Parameters
    ----------
    projection : Projection
    shape : tuple of int
        Shape of S.
    leading : tuple, optional
        Leading singular values s (k,) of S, and VᵀΩ (k, l), where V are their right vectors. Only the other singular
        values are then estimated.

    Notes
    -----
    Let M = SᵀS, t = tr M = ‖S‖_F² and G = ΩᵀMΩ. Then E‖G − t·1‖_F² = l(l + 1) tr M² exactly, since E G_ij² = tr M² for
    i ≠ j and Var G_ii = 2 tr M². The estimate is limited to values that some spectrum can have. Its error is that of
    the jackknife over the columns of Ω. If many σ share the energy, the relative error is 2/√(l(l + 1)), 24 % at l = 8.
    If a few σ hold most of the energy, the sketch may miss them. The relative error then grows to 1, and it is
    understated in one case of four. Leading values that are known remove this error.
    """
    count, tail, G = min(shape), projection.squares, projection.gram
    head, highest = 0.0, projection.squares
    # Leading directions that are known exactly are taken out of the sketch, which estimates only what remains.
    if leading:
        s, overlap = leading
        count, tail = count - s.size, max(tail - float(s @ s), 0.0)
        head, highest = float(np.sum(s**4)), min(float(s[-1]) ** 2, tail)
        G = G - (overlap.T * s**2) @ overlap
    # The known values are all there are, so nothing is estimated.
    if count <= 0 or tail <= 0:
        return Estimate(head, 0.0)
    size, squares = len(G), (G - tail * np.eye(len(G))) ** 2
    unbiased = float(squares.sum()) / (size * (size + 1))
    # Jackknife: the estimate that results when each column of Ω is left out in turn.
    without = (squares.sum() - 2 * squares.sum(axis=0) + squares.diagonal()) / (size * (size - 1))
    error = float(np.sqrt((size - 1) * without.var()))
    # No spectrum of `count` values with this Σσ² has a Σσ⁴ outside these bounds. The lower bound is that of equal
    # values, the upper bound that of values equal to the largest possible one.
    return Estimate(head + min(max(unbiased, tail**2 / count), tail * highest), error)


def exact_fourth_powers(S: Any, *, device: Device) -> float:
    """Σσ⁴ of S (m, n) from the Gram matrix of its shorter side, in m n min(m, n) multiplications."""
    # SSᵀ and SᵀS have the same nonzero eigenvalues; the smaller of them is cheaper.
    short = S if S.shape[0] <= S.shape[1] else S.T
    return float(np.sum(device.numpy(device.matmul(short, short.T)) ** 2))
