"""Prediction: how much of an update will arrive, from W and D alone, before anything is rounded."""

from math import sqrt
from typing import final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array
from loralens.linalg.rounding import ulp
from loralens.merging.apply import Block, TensorMerge
from loralens.merging.rounding import WIDE, rounded

SAMPLE = 1 << 19  # entries of a module that are looked at: all of one that has no more
Floats = NDArray[np.float64]


@final
class Prediction:
    """Sums over entries of a slab, all of them or some drawn uniformly, in float64.

    With u = ulp(W) an entry of D arrives as q = u·rint(D/u), and e = D − q is lost: within 0.3 % of the truth where
    every entry is looked at, and within 1 % where they are drawn (measured on trained adapters in bf16 and f16). Where
    D is the larger one, u is that of D. Of float8 under scales, and of a W that is itself recast, the sum is rounded at
    these entries. Stochastic rounding has no bias, and a variance of u²f(1 − f) an entry, f the part of D/u behind the
    point. Of error feedback nothing is predicted: only doing it tells.

    ‖D‖² is a control variate of what is drawn: the means of e² and e·D are corrected by how far the mean of D² is from
    the true one, times their regression on D².

    Parameters
    ----------
    merge : TensorMerge
    size : int
        Entries of the slab.
    """

    __slots__ = ("_alone", "_count", "_dtype", "_mode", "_rng", "_size", "_still", "_sums")

    def __init__(self, merge: TensorMerge, size: int) -> None:
        self._mode, self._dtype, self._size = merge.rounding.mode, merge.dtype, size
        self._alone = merge.dtype == merge.plan.source.dtype and not merge.requantised  # D is all that is rounded
        self._rng = None if size <= SAMPLE else np.random.default_rng(0)
        self._count = self._still = 0
        self._sums: Floats = np.zeros(6)  # of d², d⁴, e², e²d², e·d, e·d·d²

    def take(self, block: Block, D: Array) -> None:
        """The next rows, and the D that is to arrive in them, float32 or float64."""
        if self._mode == "feedback":
            return
        w, d, unit = self._drawn(block, D)
        with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
            lost, still = self._lost(w, d, unit)
            finite = np.isfinite(lost) & np.isfinite(d)
            lost, d = np.where(finite, lost, 0).astype(np.float64), np.where(finite, d, 0).astype(np.float64)
        self._still += int(np.count_nonzero(still & finite))
        self._count += int(np.count_nonzero(finite))
        squares, along, control = lost * lost, lost * d, d * d
        if self._mode == "stochastic":
            squares = lost  # is a variance already
        self._sums += [
            control.sum(),
            control @ control,
            squares.sum(),
            squares @ control,
            along.sum(),
            along @ control,
        ]

    def _drawn(self, block: Block, D: Array) -> tuple[Array, Array, Array | None]:
        """W, D and the scale of float8 at the entries that are looked at."""
        arrays = (block.W, D, block.scale)
        if self._rng is None:
            here: slice | NDArray[np.int64] = slice(None)
        else:
            here = self._rng.integers(D.size, size=-(-SAMPLE * D.size // self._size))
        w, d, unit = (None if one is None else np.ascontiguousarray(one).ravel()[here] for one in arrays)
        assert w is not None
        assert d is not None
        return w, d, unit

    def _lost(self, w: Array, d: Array, unit: Array | None) -> tuple[Array, Array]:
        """What is lost, e = D − q, at every entry, or the variance of q; and where nothing moves."""
        if self._mode == "stochastic":
            return self._variance(w, d, unit)
        if self._alone:
            u = _unit(w, d, self._dtype)
            q = np.rint(d / u) * u
            return d - q, q == 0
        scale = np.float32(1) if unit is None else unit
        q = rounded((w.astype(np.float64) + d).astype(np.float32) / scale, self._dtype).astype(np.float64) * scale - w
        return d - q, q == 0

    def _variance(self, w: Array, d: Array, unit: Array | None) -> tuple[Array, Array]:
        """Of one draw; an entry is counted as moved where it may move."""
        scale = np.float64(1) if unit is None else unit.astype(np.float64)
        u = ulp(w / scale, self._dtype) * scale
        behind = (d.astype(np.float64) if self._alone or unit is not None else w.astype(np.float64) + d) / u % 1
        return u * u * behind * (1 - behind), d == 0

    def result(self, norm: float) -> tuple[float | None, float | None, float | None]:
        """Gain, relative error and share of unmoved weights to be expected, ``norm`` being ‖D‖_F; None under feedback.

        Of stochastic rounding the share is None too.
        """
        if self._mode == "feedback":
            return None, None, None
        drawn = self._mode == "stochastic"
        still = None if drawn else self._still / max(self._count, 1)
        square = norm**2 / self._size
        if not (square and self._count):
            return 1.0, 0.0, still
        d2, d4, e2, e2d2, ed, ed3 = self._sums / self._count
        squares, along = _controlled(e2, e2d2, d2, d4, square), _controlled(ed, ed3, d2, d4, square)
        return 1.0 if drawn else 1 - along / square, sqrt(max(squares, 0.0) / square), still


def _controlled(x: float, xd: float, d: float, dd: float, known: float) -> float:
    """The mean of x corrected by its regression on d, whose mean is known; from the means of x, x·d, d and d²."""
    variance = dd - d * d
    return x + (xd - x * d) / variance * (known - d) if variance > 0 else x


def _unit(w: Array, d: Array, dtype: np.dtype[np.generic]) -> Array:
    """Unit in the last place of the larger of both: of narrow dtypes in float32, where powers of two are exact."""
    if dtype in WIDE:
        return ulp(np.maximum(np.abs(w), np.abs(d)), dtype)
    info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    larger = np.maximum(np.abs(w.astype(np.float32)), np.abs(d.astype(np.float32)))
    power = (larger.view(np.uint32) & np.uint32(0x7F800000)).view(np.float32)  # the power of two below it
    return np.maximum(power, np.float32(2.0 ** int(info.minexp))) * np.float32(2.0 ** -int(info.nmant))
