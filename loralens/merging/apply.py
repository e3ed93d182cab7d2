"""The merge of one stored tensor, a block of rows at a time."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
from numpy.typing import DTypeLike

from loralens.core.lazy import Array
from loralens.errors import OptionError
from loralens.linalg.device import Device
from loralens.linalg.exact import Singles
from loralens.merging.dora_factors import DoraFactors, compute_dora_factors
from loralens.merging.feedback import Feedback, input_directions
from loralens.merging.matrix import Buffer, MatrixRows, cuts
from loralens.merging.plan import Slab, TensorPlan
from loralens.merging.rounding import (
    WIDE,
    MergeRounding,
    add_and_round,
    add_update,
    round_sums,
    slices_for,
    subtract_update,
)
from loralens.merging.update import UpdateMatrix


@final
@dataclass(frozen=True, slots=True)
class MergedBlock:
    """Some rows of a stored tensor before and after the merge. The arrays are valid until the next block is computed.

    Attributes
    ----------
    start, stop : int
        Range of rows in the matrix of the tensor.
    slab : Slab or None
        The slab that contains the rows; None if nothing is added to them.
    stored : array, shape (stop − start, columns)
        The rows of the base, or of its replacement, in their dtype.
    W : array
        The weights that ``stored`` represents: ``stored`` itself, or ``stored`` times its scale.
    D : float32 array or None
        The update.
    dora_factors : float32 array or None
        DoRA's factors.
    scale : float32 array or None
        The scale of ``merged``, if that is float8 with scales.
    merged : array
        The merged rows in the dtype of the result.
    total : array or None
        g·(W + D) before rounding. None if nothing is added, or if it was not kept.
    """

    start: int
    stop: int
    slab: Slab | None
    stored: Array
    W: Array
    D: Singles | None
    dora_factors: Singles | None
    scale: Singles | None
    merged: Array
    total: Array | None = None

    def numbers(self, merged: Array) -> Array:
        """The weights that these rows of a merged tensor represent: the rows times their scale."""
        return merged if self.scale is None else merged.astype(np.float32) * self.scale

    def subtract(self, out: Singles) -> Array:
        """R: the merged rows minus the update, rounded to the dtype of the base; ``out`` is used as a buffer."""
        dtype = self.stored.dtype
        return (
            round_sums(self.merged, dtype)
            if self.D is None
            else subtract_update(self.merged, self.D, dtype, dora_factors=self.dora_factors, out=out)
        )


@final
@dataclass(slots=True)
class TensorMerge:
    """The merge of one tensor: its plan, the products of its updates and DoRA's factors. `prepare_merge` makes it.

    ``within`` is the range of rows that are merged; None for all.
    """

    plan: TensorPlan
    dtype: np.dtype[Any]
    rounding: MergeRounding
    products: dict[int, UpdateMatrix]
    slab_factors: dict[int, DoraFactors] = field(default_factory=dict)
    within: tuple[int, int] | None = None

    @property
    def requantised(self) -> bool:
        """Whether the result is float8 with the scales of the base."""
        return self.plan.scale is not None and self.dtype == self.plan.source.dtype

    def blocks(self) -> Iterator[MergedBlock]:
        """Yield the rows in order, in blocks that do not cross the limits of slabs."""
        plan = self.plan
        source = MatrixRows(plan.source, plan.matrix)
        scales = MatrixRows(plan.scale, plan.matrix) if plan.scale else None
        # D and the sum of a block are alive at the same time, so each has its own buffer.
        buffers, feedback = (Buffer(), Buffer()), self._feedback()
        for start, stop, slab in cuts(plan, within=self.within):
            stored = source.rows(start, stop)
            scale = scales.rows(start, stop) if scales else None
            W = stored if scale is None else stored.astype(np.float32) * scale
            # In another dtype the merged weights are stored without scales.
            scale = scale if self.requantised else None
            if slab is None:
                merged = stored if scale is not None else round_sums(W, self.dtype)
                yield MergedBlock(
                    start, stop, None, stored, W, None, None, scale, self._with_tokens(start, stop, merged)
                )
                continue
            # Products and factors are indexed by the rows of their slab, not by those of the tensor.
            first, last = start - slab.start, stop - slab.start
            D = self.products[slab.start].rows(first, last, out=buffers[0].of(W.shape))
            of_slab = self.slab_factors.get(slab.start)
            dora_factors = of_slab.of(first, last) if of_slab else None
            total = buffers[1].of(W.shape)
            if dora_factors is None and scale is None and self.rounding.mode == "nearest":
                total, merged = add_and_round(W, D, self.dtype, out=total)
            else:
                total = add_update(W, D, dora_factors=dora_factors, out=total)
                merged = self._round(total, scale, start, feedback.get(slab.start), first)
            merged = self._with_tokens(start, stop, merged)
            # In a wide dtype the merged rows may be `total` itself, so it is kept for narrow dtypes only.
            unrounded = total if scale is None and self.dtype not in WIDE else None
            yield MergedBlock(start, stop, slab, stored, W, D, dora_factors, scale, merged, unrounded)

    def _round(self, total: Array, scale: Singles | None, start: int, feedback: Feedback | None, first: int) -> Array:
        """The sums of a block, rounded; the block begins at row ``start``, which is row ``first`` of its slab."""
        if scale is not None:
            # A scale of 0 belongs to weights that are all 0. The quotient is NaN or infinite then, which needs no
            # warning.
            with np.errstate(divide="ignore", invalid="ignore"):
                total /= scale
        if feedback:
            return feedback.round_rows(total, first, self.dtype)
        # Random numbers belong to entries, so each block begins at the index of its first one.
        return round_sums(total, self.dtype, rounding=self.rounding.at(start * total.shape[1]))

    def _feedback(self) -> dict[int, Feedback]:
        """The error feedback of each slab, by its first row; none for wide dtypes and updates that are not pairs."""
        if self.rounding.mode != "feedback" or self.dtype in WIDE:
            return {}
        if self.requantised:
            raise OptionError(
                "error feedback is not available for float8 weights with scales",
                fix="use --rounding nearest, or write another --dtype",
            )
        directions = {slab.start: (slab, input_directions(slab.terms)) for slab in self.plan.slabs}
        return {
            start: Feedback(V, transposed=slab.transposed) for start, (slab, V) in directions.items() if V is not None
        }

    def _with_tokens(self, start: int, stop: int, merged: Array) -> Array:
        tokens = self.plan.tokens
        # The rows of an embedding are tokens, so a block has those whose index lies in its range.
        trained = [(k, row) for k, row in enumerate(tokens.indices) if start <= row < stop] if tokens else []
        if not trained or not tokens:
            return merged
        # The array may be that of the base, which must not be modified.
        merged = merged.copy()
        rows = tokens.rows.read()
        for k, row in trained:
            merged[row - start] = rows[k].astype(merged.dtype)
        return merged


def prepare_merge(
    plan: TensorPlan,
    *,
    dtype: DTypeLike | None = None,
    rounding: MergeRounding | None = None,
    device: Device | None = None,
    within: tuple[int, int] | None = None,
) -> TensorMerge:
    """Prepare the merge of a planned tensor.

    Parameters
    ----------
    plan : TensorPlan
    dtype : dtype or None
        The dtype of the result. The default is that of the base.
    rounding : MergeRounding or None
        The default is rounding to the nearest.
    device : Device or None
        The device that multiplies the factors of the update. NumPy computes everything else.
    within : (int, int) or None
        The range of rows that are merged, with the bits that they have in the whole weight; all rows by default.

    Notes
    -----
    For DoRA the whole weight is read once here, to compute the norms.
    """
    source = plan.source
    # The precision of D follows the dtype of the base, not the dtype of the result. Unmerging by a patch does the same.
    products = {slab.start: slab.update(slices_for(source.dtype), device) for slab in plan.slabs}
    rows = MatrixRows(source, plan.matrix)
    scales = MatrixRows(plan.scale, plan.matrix) if plan.scale else None
    slab_factors = {
        slab.start: compute_dora_factors(slab.magnitude, products[slab.start], rows, scales, slab.start)
        for slab in plan.slabs
        if slab.magnitude
    }
    return TensorMerge(plan, np.dtype(dtype or plan.dtype), rounding or MergeRounding(), products, slab_factors, within)
