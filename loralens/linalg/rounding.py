"""What rounding W + D to a narrow dtype costs D, predicted from entries of W and D.

Merged into weights of few bits, a small update D arrives damaged: where |D| is under half a unit in the last place of W
the weight does not move at all. Each entry that is looked at is merged as a merge does it: added in float32, divided by
the scale where W is float8 under scales, and rounded. What arrives is W' − W, and what is lost is e = D − (W' − W); of
a W that is itself wider than the result, its own rounding is part of that. Where all entries are looked at it is what a
merge measures. The white noise law (`survivors`) over-predicts it by 7–50 % where entries are absorbed, and is kept for
what it says of directions.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Any, final

import ml_dtypes
import numpy as np
from numpy.typing import DTypeLike

from loralens.errors import OptionError, ShapeError
from loralens.linalg.factor import Array, Floats, Integers

SAMPLE = 1 << 18  # entries of a prediction: within 1 % of the truth on trained adapters; of 8,192 within 5 %
NARROW = 2  # bytes of the dtypes that are rounded stochastically where that is asked for
BLOCK = 1 << 12  # entries of a product made at a time


@final
@dataclass(frozen=True, slots=True)
class Rounding:
    """What will become of D when W + D is rounded. All but ``noise`` are dimensionless.

    Attributes
    ----------
    gain : float
        ⟨W' − W, D⟩/‖D‖²: 1 where D arrives at full strength, 0 where nothing of it does.
    error : float
        ‖W' − W − D‖_F/‖D‖_F.
    unmoved : float
        Share of the entries of W that stay as they are, in [0, 1].
    noise : float
        Root mean square of the rounding error of one entry, √(mean u²/12), in the unit of the weights.
    """

    gain: float
    error: float
    unmoved: float
    noise: float


def ulp(W: Array, dtype: DTypeLike) -> Floats:
    """Unit in the last place of ``dtype`` at every entry of W: the distance to its next neighbour away from zero.

    Parameters
    ----------
    W : array, any shape, any float dtype
    dtype : dtype
        float16, float32, float64, or one of ml_dtypes: bfloat16, float8_e4m3fn, float8_e5m2 and kin.

    Returns
    -------
    float64 array, shape of W
        2^(max(⌊log₂|w|⌋, e_min) − mantissa bits); the smallest subnormal at 0 and among subnormals.

    Raises
    ------
    OptionError
        ``dtype`` is not a floating one.
    """
    mantissa, lowest = _bits(dtype)
    exponents = np.frexp(np.asarray(W, dtype=np.float64))[1].astype(np.int64) - 1
    exponents = np.where(W == 0, lowest, np.maximum(exponents, lowest))
    return np.ldexp(1.0, exponents - mantissa)


def rounded(W: Array, dtype: DTypeLike) -> Array:
    """W in ``dtype``, unchanged where it is that already; float64 → bfloat16 goes through float32, as everywhere.

    In a dtype of one byte, what is beyond its largest number becomes that.
    """
    dtype = np.dtype(dtype)
    if W.dtype == dtype:
        return W
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype.itemsize == 1:
            limit = _largest(dtype)
            W = np.clip(W, -limit, limit)
        return W.astype(dtype)


def sampled_rounding(
    w: Array,
    d: Array,
    *,
    size: int,
    norm: float,
    dtype: DTypeLike,
    scale: Array | None = None,
    stochastic: bool = False,
) -> Rounding:
    """What rounding W + D to ``dtype`` makes of D, from some entries: within 1 % at 2¹⁸ of them, exact from all.

    Parameters
    ----------
    w, d : arrays, shape (count,)
        W, in the dtype of the base, and D at entries drawn uniformly: `sample_entries`, `product_entries`.
    size : int
        Entries that the matrices have.
    norm : float
        ‖D‖_F, which the factors of D tell exactly.
    dtype : dtype
        One of those of `ulp`.
    scale : array, shape (count,), optional
        What the result is multiplied by where it is float8 under the scales of the base; w is multiplied already.
    stochastic : bool
        Up or down with the probability that makes the mean exact, in dtypes of 16 bits and less: the expectation of
        what is lost is told.

    Raises
    ------
    ShapeError
        w and d differ in shape.

    Notes
    -----
    ‖D‖² is a control variate: the sampled means of e² and e·d are corrected by how far the sampled mean of d² is from
    the true one, times their regression on d². That is exact where nothing moves (e = D), and leaves the sampled means
    alone where e is small and knows nothing of d; heavy tails of D then do no harm. Entries that are infinite before or
    after are left out.
    """
    _check(w, d)
    wide, unit = w.astype(np.float64), None if scale is None else scale.astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        total = np.add(w, d.astype(np.float32), dtype=np.result_type(w.dtype, np.float32))
        total = total if scale is None else (total / scale).astype(np.float32)
        squares, lost, still = _lost(total, wide, d.astype(np.float64), unit, np.dtype(dtype), stochastic=stochastic)
        noise = ulp(rounded(wide, dtype), dtype) if unit is None else ulp(rounded(wide / unit, dtype), dtype) * unit
    finite = np.isfinite(squares) & np.isfinite(lost) & np.isfinite(noise)
    squares, lost, still, d = (x[finite] for x in (squares, lost, still, d.astype(np.float64)))
    unmoved, spread = float(still.sum()) / max(still.size, 1), sqrt(np.mean(noise[finite] ** 2) / 12)
    mean_square = float(norm) ** 2 / size
    if mean_square == 0:
        return Rounding(1.0, 0.0, unmoved, spread)
    square, along = (_controlled(x, d**2, mean_square) / mean_square for x in (squares, lost * d))
    return Rounding(1 - along, sqrt(max(square, 0.0)), unmoved, spread)


def _lost(
    total: Array, w: Floats, d: Floats, unit: Floats | None, dtype: np.dtype[Any], *, stochastic: bool
) -> tuple[Floats, Floats, Floats]:
    """e², e and whether the weight stays, at every entry, or the expectations of these; ``unit``: of float8 scales."""
    near = rounded(total, dtype)
    merged, scale = near.astype(np.float64), 1.0 if unit is None else unit
    held = w if unit is None else rounded(w / unit, dtype).astype(np.float64)
    lost, still = d - (merged * scale - w), (merged == held).astype(np.float64)
    if not stochastic or dtype.itemsize > NARROW:
        return lost**2, lost, still
    error, limit = total.astype(np.float64) - merged, _largest(dtype)
    other = np.nextafter(near, np.where(error > 0, limit, -limit).astype(dtype)).astype(np.float64)
    step = np.abs(other - merged)
    share = np.where((error != 0) & np.isfinite(step), np.abs(error) / step, 0.0)  # the probability of the other one
    stays = np.where(merged == held, 1 - share, np.where(other == held, share, 0.0))
    return np.abs(error) * (step - np.abs(error)) * scale**2, np.zeros_like(lost), stays


def sample_entries(shape: tuple[int, int], *, count: int = SAMPLE, seed: int = 0) -> tuple[Integers, Integers]:
    """Row and column of ``count`` entries drawn uniformly with replacement; of all entries where there are no more."""
    size = shape[0] * shape[1]
    flat = np.arange(size) if size <= count else np.random.default_rng(seed).integers(size, size=count)
    rows, columns = np.divmod(flat, shape[1])
    return rows.astype(np.int64), columns.astype(np.int64)


def product_entries(B: Array, A: Array, rows: Integers, columns: Integers) -> Floats:
    """B A at the entries (rows[i], columns[i]), float64, shape (count,): O(count·r) and no other entry is formed."""
    found = np.empty(len(rows))
    B, A = B.astype(np.float64), np.ascontiguousarray(A.T, dtype=np.float64)
    for start in range(0, len(rows), BLOCK):
        here = slice(start, start + BLOCK)
        np.einsum("ij,ij->i", B[rows[here]], A[columns[here]], out=found[here])
    return found


def survivors(s: Floats, noise: float, shape: tuple[int, int]) -> int:
    """Directions that can still be told from rounding noise: #{σ_i > noise·(m n)^(1/4)}.

    The detectability threshold of a spike in white noise (Baik, Ben Arous & Péché 2005; Benaych-Georges & Nadakuditi
    2012). Rounding noise is only nearly white: see the module.
    """
    return int(np.count_nonzero(np.asarray(s) > noise * (shape[0] * shape[1]) ** 0.25))


def _controlled(x: Floats, control: Floats, known: float) -> float:
    """Mean of x, corrected by its regression on ``control``, whose true mean is known."""
    spread = control - control.mean()
    variance = float(spread @ spread)
    slope = float(spread @ x) / variance if variance else 0.0
    return float(x.mean() + slope * (known - control.mean()))


def _largest(dtype: np.dtype[Any]) -> float:
    """The largest finite number of a dtype."""
    return float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]


def _check(first: Array, second: Array) -> None:
    if first.shape != second.shape:
        raise ShapeError(f"{first.shape} and {second.shape} are not one shape", fix="pass w and d at the same entries")


def _bits(dtype: DTypeLike) -> tuple[int, int]:
    """Mantissa bits, the leading one not counted, and the exponent of the smallest normal number."""
    try:
        info: Any = ml_dtypes.finfo(np.dtype(dtype))  # type: ignore[no-untyped-call, unused-ignore]
    except (ValueError, TypeError) as error:
        raise OptionError(f"{dtype!r} is no floating dtype", fix="give a dtype such as bfloat16") from error
    return int(info.nmant), int(info.minexp)
