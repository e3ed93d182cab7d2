"""Merging one weight in memory, and restoring its base bit for bit.

D, rounding and patch are those of `loralens merge` and `unmerge`, so the weight has the same bits as a merged file.
"""

from dataclasses import dataclass, replace
from math import prod
from typing import final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.merging.apply import prepare_merge
from loralens.merging.dora_factors import DoraFactors
from loralens.merging.matrix import Buffer
from loralens.merging.plan import TensorPlan
from loralens.merging.resident.sixteen_bits import RoundedMerge, merge_sixteen_bits, restore_sixteen_bits
from loralens.merging.resident.task import Task
from loralens.merging.undo.patch import Blob, PatchReader, PatchWriter
from loralens.merging.undo.restore import subtract_updates


@final
@dataclass(frozen=True, slots=True)
class MergedWeight:
    """Everything that is needed to restore the base of a merged weight.

    Attributes
    ----------
    task : Task
        The task that is merged into the weight.
    slab_factors : dict of int to DoraFactors
        DoRA's factors by the first row of their slab.
    patch : Blob or None
        The patch relative to W' − D.
    copy : array or None
        The weight of the base itself, if the adapter replaces it.
    factor_bytes : int
        Bytes of the factors in the plan, if they are a copy that this merge made.
    """

    task: Task
    plan: TensorPlan
    slab_factors: dict[int, DoraFactors]
    patch: Blob | None = None
    copy: Array | None = None
    factor_bytes: int = 0

    @property
    def patch_bytes(self) -> int:
        """Bytes of the patch and of the factors of DoRA."""
        return (self.patch.nbytes if self.patch else 0) + sum(
            dora_factors.values.nbytes for dora_factors in self.slab_factors.values()
        )

    @property
    def copy_bytes(self) -> int:
        """Bytes of the copy."""
        return 0 if self.copy is None else self.copy.nbytes


Undo = MergedWeight | RoundedMerge


def merge_weight(
    W: Array, plan: TensorPlan, task: Task, *, with_torch: bool = False, hold: bool = False
) -> tuple[Array, Undo]:
    """W' = round(W + D) in a new array with the shape of W, and what restores W.

    Parameters
    ----------
    W : array
        The weight of the base, which is not modified.
    plan : TensorPlan
        Its result must have the shape and dtype of W.
    task : Task
    with_torch : bool
        Let torch merge a weight of 16 bits, which changes no bit of W'.
    hold : bool
        Keep a copy of the factors, because those of the plan may change before the weight is restored.
    """
    quick = merge_sixteen_bits(W, plan, task) if with_torch else None
    if quick:
        return quick
    plan = _with_factors(plan) if hold else plan
    # `plan.base` reads the memory of the model, which may hold merged numbers by now. W has those of the base.
    merge = prepare_merge(replace(plan, base=LazyArray.of(W)), dtype=W.dtype)
    replaced = plan.replacement is not None
    result, writer, buffer = np.empty(plan.matrix, W.dtype), PatchWriter(W.dtype.itemsize), Buffer()
    for block in merge.blocks():
        result[block.start : block.stop] = block.merged
        if not replaced:
            writer.block(block.stored, block.subtract(buffer.of(block.merged.shape)))
    # A patch against unrelated numbers would be as large as the weight, and a copy is faster.
    patch, copy = (None, W.copy()) if replaced else (writer.finish(), None)
    return result.reshape(W.shape), MergedWeight(
        task, plan, merge.slab_factors, patch, copy, _factor_bytes(plan) if hold else 0
    )


def _with_factors(plan: TensorPlan) -> TensorPlan:
    """The plan with its factors in memory."""
    slabs = (replace(slab, terms=tuple((weight, term.load()) for weight, term in slab.terms)) for slab in plan.slabs)
    return replace(plan, slabs=tuple(slabs))


def _factor_bytes(plan: TensorPlan) -> int:
    return sum(term.nbytes for slab in plan.slabs for _, term in slab.terms)


def restore_weight(W: Array, undo: Undo) -> Array:
    """Restore the weight of the base from the merged one. The array must not be modified.

    Raises
    ------
    FormatError
        The patch does not fit, because the weight was changed after the merge.
    """
    if isinstance(undo, RoundedMerge):
        return restore_sixteen_bits(W, undo)
    if undo.copy is not None:
        return undo.copy
    assert undo.patch is not None
    assert prod(undo.plan.matrix) == W.size
    reader, result, start = PatchReader(undo.patch, W.dtype.itemsize), np.empty(undo.plan.matrix, W.dtype), 0
    for R in subtract_updates(replace(undo.plan, base=LazyArray.of(W)), undo.slab_factors, W.dtype):
        result[start : start + len(R)] = reader.block(R)
        start += len(R)
    reader.finish()
    return result.reshape(W.shape)
