"""One stored tensor merged, some rows at a time: what is read, what is added, what is to be written."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.typing import DTypeLike

from loralens.core.lazy import Array
from loralens.errors import OptionError
from loralens.linalg.device import Device
from loralens.linalg.exact import Singles
from loralens.merging.feedback import Feedback, input_directions
from loralens.merging.gain import Gain, gain_of
from loralens.merging.matrix import Buffer, MatrixRows, cuts
from loralens.merging.plan import Slab, TensorPlan
from loralens.merging.rounding import WIDE, Rounding, removed, rounded, slices_for, summed
from loralens.merging.update import Rows


@final
@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of a stored tensor before and after; valid until the next block comes.

    Attributes
    ----------
    start, stop : int
        Rows of the matrix under which the tensor is looked at.
    slab : Slab or None
        What the rows belong to; None where nothing is added.
    stored : array, shape (stop − start, columns)
        Of the base, or of what replaces it, in its dtype.
    W : array
        The numbers that ``stored`` stands for: itself, or times its scale.
    D : float32 array or None
        The update.
    gain : float32 array or None
        DoRA's.
    scale : float32 array or None
        What ``merged`` is multiplied by, where it is float8 with scales.
    merged : array
        In the dtype of the result.
    total : array or None
        g·(W + D) before it was rounded; None where nothing is added, or it is not at hand.
    """

    start: int
    stop: int
    slab: Slab | None
    stored: Array
    W: Array
    D: Singles | None
    gain: Singles | None
    scale: Singles | None
    merged: Array
    total: Array | None = None

    def numbers(self, merged: Array) -> Array:
        """What these rows of a merged tensor stand for."""
        return merged if self.scale is None else merged.astype(np.float32) * self.scale

    def subtracted(self, out: Singles) -> Array:
        """R: what taking the update away from the merged rows gives, in the dtype of the base; made in ``out``."""
        dtype = self.stored.dtype
        return (
            rounded(self.merged, dtype)
            if self.D is None
            else removed(self.merged, self.D, dtype, gain=self.gain, out=out)
        )


@final
@dataclass(slots=True)
class TensorMerge:
    """A planned tensor, its products ready, its gains known; made by `prepare`."""

    plan: TensorPlan
    dtype: np.dtype[Any]
    rounding: Rounding
    products: dict[int, Rows]
    gains: dict[int, Gain] = field(default_factory=dict)

    @property
    def requantised(self) -> bool:
        """Whether the result is float8 under the scales of the base."""
        return self.plan.scale is not None and self.dtype == self.plan.source.dtype

    def blocks(self) -> Iterator[Block]:
        """All rows in order, in blocks that end where slabs do."""
        plan = self.plan
        source = MatrixRows(plan.source, plan.matrix)
        scales = MatrixRows(plan.scale, plan.matrix) if plan.scale else None
        buffers, feedback = (Buffer(), Buffer()), self._feedback()
        for start, stop, slab in cuts(plan):
            stored = source.rows(start, stop)
            scale = scales.rows(start, stop) if scales else None
            W = stored if scale is None else stored.astype(np.float32) * scale
            scale = scale if self.requantised else None
            if slab is None:
                merged = stored if scale is not None else rounded(W, self.dtype)
                yield Block(start, stop, None, stored, W, None, None, scale, self._with_tokens(start, stop, merged))
                continue
            first, last = start - slab.start, stop - slab.start
            D = self.products[slab.start].rows(first, last, out=buffers[0].of(W.shape))
            found = self.gains.get(slab.start)
            gain = found.of(first, last) if found else None
            total = summed(W, D, gain=gain, out=buffers[1].of(W.shape))
            if scale is not None:
                with np.errstate(divide="ignore", invalid="ignore"):
                    total /= scale
            merged = (
                feedback[slab.start].rounded(total, first, self.dtype)
                if slab.start in feedback
                else rounded(total, self.dtype, rounding=self.rounding.at(start * W.shape[1]))
            )
            merged = self._with_tokens(start, stop, merged)
            kept = total if scale is None and self.dtype not in WIDE else None
            yield Block(start, stop, slab, stored, W, D, gain, scale, merged, kept)

    def _feedback(self) -> dict[int, Feedback]:
        """By the first row of their slabs; none where rounding loses nothing that matters, or an update is no pair."""
        if self.rounding.mode != "feedback" or self.dtype in WIDE:
            return {}
        if self.requantised:
            raise OptionError(
                "error feedback does not know the scales of float8 weights",
                fix="round to the nearest, or write another --dtype",
            )
        directions = {slab.start: (slab, input_directions(slab.terms)) for slab in self.plan.slabs}
        return {
            start: Feedback(V, transposed=slab.transposed) for start, (slab, V) in directions.items() if V is not None
        }

    def _with_tokens(self, start: int, stop: int, merged: Array) -> Array:
        tokens = self.plan.tokens
        here = [(k, row) for k, row in enumerate(tokens.indices) if start <= row < stop] if tokens else []
        if not here or not tokens:
            return merged
        merged = merged.copy()
        rows = tokens.rows.read()
        for k, row in here:
            merged[row - start] = rows[k].astype(merged.dtype)
        return merged


def prepare(
    plan: TensorPlan, *, dtype: DTypeLike | None = None, rounding: Rounding | None = None, device: Device | None = None
) -> TensorMerge:
    """A planned tensor ready to be merged.

    Parameters
    ----------
    plan : TensorPlan
    dtype : dtype or None
        Of the result; that of the base where None.
    rounding : Rounding or None
        To the nearest where None.
    device : Device or None
        Where the products of the update are made; everything else is NumPy's.

    Notes
    -----
    DoRA reads the weight once here, for the norms.
    """
    source = plan.source
    products = {slab.start: slab.update(slices_for(source.dtype), device) for slab in plan.slabs}
    rows = MatrixRows(source, plan.matrix)
    scales = MatrixRows(plan.scale, plan.matrix) if plan.scale else None
    gains = {
        slab.start: gain_of(slab.magnitude, products[slab.start], rows, scales, slab.start)
        for slab in plan.slabs
        if slab.magnitude
    }
    return TensorMerge(plan, np.dtype(dtype or plan.dtype), rounding or Rounding(), products, gains)
