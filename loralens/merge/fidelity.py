"""Fidelity: how much of an update arrived, measured on what was written, and predicted from W and D alone."""

from dataclasses import dataclass
from math import isfinite, sqrt
from typing import final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.linalg.exact import Singles
from loralens.linalg.product import product_singular_values
from loralens.linalg.rounding import sampled_rounding, survivors, ulp
from loralens.merge.apply import Block, TensorMerge
from loralens.merge.feedback import input_directions
from loralens.merge.matrix import Buffer
from loralens.merge.patch import bits
from loralens.merge.plan import Slab
from loralens.merge.rounding import Mode, rounded, summed

SAMPLE = 1 << 15  # entries of a module that a prediction looks at


@final
@dataclass(frozen=True, slots=True)
class Fidelity:
    """How much of an update arrived, measured on what was written; dimensionless.

    Attributes
    ----------
    module : str
    gain : float
        ⟨W' − W, D⟩/‖D‖²; 1 where D = 0. With DoRA D stands for g·(W + D) − W.
    error : float
        ‖W' − W − D‖_F/‖D‖_F.
    subspace_error : float or None
        ‖(W' − W − D) V‖_F/‖D‖_F, V the input directions of the update: what is lost for inputs that it reads. None for
        what is no pair.
    unmoved : float
        Share of the entries that kept their value.
    predicted_gain, predicted_error : float or None
        The same before anything is written, from 32,768 entries of W and D: see `predicted`. None under feedback.
    directions, surviving : int
        Singular values of D, and how many of them stand above the edge of what rounding left as noise; 0 and 0 for
        what is no pair.
    norm : float
        ‖D‖_F.
    entries : int
        Of W.
    overflowed : int
        Finite weights that became infinite.
    """

    module: str
    gain: float
    error: float
    subspace_error: float | None
    unmoved: float
    predicted_gain: float | None
    predicted_error: float | None
    directions: int
    surviving: int
    norm: float
    entries: int
    overflowed: int


@final
class FidelitySums:
    """Sums over the blocks of a slab: float32 within a block, float64 between them; good to about 1e-5.

    Entries that are infinite or missing before or after are left out: nothing can be added to them.
    """

    def __init__(self, slab: Slab, merge: TensorMerge) -> None:
        self.slab, self.merge = slab, merge
        self.size = (slab.stop - slab.start) * merge.plan.matrix[1]
        self.D_D = self.along = self.lost = self.inside = 0.0
        self.still = self.seen = self.overflowed = 0
        V = input_directions(slab.terms)
        self._V: Singles | None = None if V is None else V.astype(np.float32)
        self._inside = np.zeros((0, 0), np.float32)  # (r, outputs): what a transposed slab has summed so far
        self._buffer = Buffer()
        self._rng = np.random.default_rng(0)
        self._sample: list[tuple[Array, Array, Array | None]] = []

    def take(self, block: Block) -> None:
        """The next rows."""
        with np.errstate(invalid="ignore", over="ignore"):
            D, lost = self._parts(block)
            sums = _dot(D, D), _dot(lost, D), _dot(lost, lost)
            if not isfinite(sum(sums)):
                D, lost = self._tamed(block, D, lost)
                sums = _dot(D, D), _dot(lost, D), _dot(lost, lost)
        self.D_D += sums[0]
        self.along += sums[1]
        self.lost += sums[2]
        self.still += _equal(block.merged, block.stored)
        self.seen += lost.size
        self._draw(block, D)
        self._take_inside(block, lost)

    def _parts(self, block: Block) -> tuple[Array, Array]:
        """D, or what DoRA makes of it, and W' − W − D, float32.

        The sum that was rounded is at hand where it is wider than the result by far.
        """
        assert block.D is not None
        lost, D = self._buffer.of(block.W.shape), block.D
        if block.gain is not None:
            D = summed(block.W, D, gain=block.gain).astype(np.float32, copy=False)
            D -= block.W.astype(np.float32)
        if block.total is not None:
            np.subtract(block.merged, block.total, out=lost, dtype=np.float32, casting="same_kind")
        else:
            np.subtract(block.numbers(block.merged), block.W, out=lost, dtype=np.float32, casting="same_kind")
            lost -= D
        return D, lost

    def _tamed(self, block: Block, D: Array, lost: Array) -> tuple[Array, Array]:
        """The same in float64, with zeros where something is infinite or missing; what overflowed is counted."""
        bad = ~(np.isfinite(lost) & np.isfinite(D))
        self.overflowed += int(np.count_nonzero(bad & np.isfinite(block.W.astype(np.float64))))
        return np.where(bad, np.float64(0), D), np.where(bad, np.float64(0), lost)

    def _take_inside(self, block: Block, lost: Singles) -> None:
        """What of the loss lies in the input directions."""
        if self._V is None:
            return
        if self.slab.transposed:  # the inputs are the rows: the loss of an output is complete after the last block
            first = block.start - self.slab.start
            here = self._V[first : first + len(lost)].T @ lost
            self._inside = here if not self._inside.size else self._inside + here
            return
        here = np.dot(lost, self._V)
        self.inside += _dot(here, here)

    def _draw(self, block: Block, D: Singles) -> None:
        """W, D and the scale at entries drawn at random, in proportion to the size of the block."""
        here = self._rng.integers(D.size, size=-(-SAMPLE * D.size // self.size))
        scale = None if block.scale is None else block.scale.ravel()[here]
        self._sample.append((block.W.ravel()[here], np.ascontiguousarray(D).ravel()[here], scale))

    def fidelity(self) -> Fidelity:
        """What the rows say together."""
        norm = sqrt(self.D_D)
        gain, error = self._predicted(norm)
        s = self._singular_values()
        noise = sqrt(self.lost / max(self.seen, 1))
        inside = self.inside + _dot(self._inside, self._inside)
        return Fidelity(
            self.slab.module,
            1 + self.along / self.D_D if norm else 1.0,
            sqrt(self.lost) / norm if norm else 0.0,
            None if self._V is None else sqrt(inside) / norm if norm else 0.0,
            self.still / max(self.seen, 1),
            gain,
            error,
            int(np.count_nonzero(s)),
            survivors(s, noise, self.slab.terms[0][1].shape),
            norm,
            self.seen,
            self.overflowed,
        )

    def _predicted(self, norm: float) -> tuple[float | None, float | None]:
        w, d = (np.concatenate([one[i] for one in self._sample]).astype(np.float32) for i in (0, 1))
        scales = [one[2] for one in self._sample if one[2] is not None]
        kept = np.isfinite(w)
        scale = np.concatenate(scales)[kept] if scales else None
        dtype = self.merge.dtype
        return predicted(
            w[kept], d[kept], scale if dtype.itemsize == 1 else None,
            size=self.size, norm=norm, dtype=dtype, mode=self.merge.rounding.mode,
            recast=dtype != self.merge.plan.source.dtype,
        )  # fmt: skip

    def _singular_values(self) -> NDArray[np.float64]:
        """Of D: of the pairs beside each other."""
        terms = self.slab.terms
        if not all(isinstance(one, LowRank) for _, one in terms):
            return np.zeros(0)
        B = np.hstack([strength * one.scale * one.B.astype(np.float64) for strength, one in terms])
        A = np.vstack([one.A.astype(np.float64) for _, one in terms])
        return product_singular_values(B, A)


def predicted(
    w: Array, d: Array, scale: Array | None, *, size: int, norm: float, dtype: DTypeLike, mode: Mode, recast: bool
) -> tuple[float | None, float | None]:
    """Gain and relative error to be expected, from some entries of W and D.

    Parameters
    ----------
    w, d : float32 arrays, shape (count,)
        W and D at entries drawn uniformly.
    scale : float32 array or None
        What float8 numbers are multiplied by, at the same entries.
    size, norm
        Entries of the matrix, and ‖D‖_F.
    dtype, mode
        Of the result, and how it is rounded.
    recast : bool
        W itself is not in ``dtype``: its own rounding adds to the error.

    Notes
    -----
    To the nearest: `sampled_rounding`, within 3 %; of a recast W the rounding itself at these entries. Stochastic: no
    bias, and a variance of u²f(1 − f) an entry, f the part of D/u behind the point. Feedback: None, only doing it
    tells.
    """
    if mode == "feedback":
        return None, None
    unit = np.float32(1) if scale is None else scale
    if mode == "nearest" and not recast and scale is None:
        told = sampled_rounding(w, d, size=size, norm=norm, dtype=dtype)
        return told.gain, told.error
    square = norm**2 / size
    if not square:
        return 1.0, 0.0
    wide = w.astype(np.float64) + d
    if mode == "nearest":
        q = rounded((wide / unit).astype(np.float32), dtype).astype(np.float64) * unit - w
        e = q - d
        e = e[np.isfinite(e)]
        return 1 + float(np.mean(e * d[: e.size])) / square, sqrt(float(np.mean(e**2)) / square)
    u = ulp(w / unit, dtype) * unit
    f = (wide if recast else d) / u % 1
    return 1.0, sqrt(float(np.mean(u**2 * f * (1 - f))) / square)


def _equal(merged: Array, stored: Array) -> int:
    """How many entries kept their value: of one dtype by their bits, which is much faster."""
    if merged.dtype == stored.dtype:
        return int(np.count_nonzero(bits(merged) == bits(stored)))
    return int(np.count_nonzero(merged.astype(np.float64) == stored.astype(np.float64)))


def _dot(x: Array, y: Array) -> float:
    return float(np.dot(x.ravel(), y.ravel()))
