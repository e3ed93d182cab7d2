"""Merging one weight in memory, and restoring its base bit for bit.

D, rounding and patch are those of `loralens merge` and `unmerge`, so the weight has the same bits as a merged file.
"""

from dataclasses import dataclass, replace
from typing import final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.merging.apply import prepare_merge
from loralens.merging.dora_factors import DoraFactors
from loralens.merging.matrix import Buffer, NewArray
from loralens.merging.plan import TensorPlan
from loralens.merging.resident.block_operations import BlockMemory
from loralens.merging.resident.by_torch import merge_by_torch, merge_in_place, restore_by_torch
from loralens.merging.resident.differences import FewEntries
from loralens.merging.resident.in_place import MergeInPlace, RestoreInPlace, RoundedMerge, Task
from loralens.merging.resident.shards import Shard
from loralens.merging.resident.slots import WeightSlot
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
    shard : Shard or None
        The rows that this process has of a weight that several share.
    """

    task: Task
    plan: TensorPlan
    slab_factors: dict[int, DoraFactors]
    patch: Blob | None = None
    copy: Array | None = None
    factor_bytes: int = 0
    shard: Shard | None = None

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


@final
@dataclass(frozen=True, slots=True)
class WholeChange:
    """The change of a weight into an array that was computed before; ``undo`` is None if that is the base."""

    slot: WeightSlot
    array: Array
    undo: Undo | None

    def finish(self) -> Undo | None:
        """Write the array; this may be repeated."""
        self.slot.write(self.array)
        return self.undo


Change = WholeChange | MergeInPlace | RestoreInPlace


def change_in_place(
    slot: WeightSlot, plan: TensorPlan | None, task: Task, undo: Undo | None, memory: BlockMemory
) -> MergeInPlace | RestoreInPlace | None:
    """The change of a finite weight in its own memory, to the base if ``plan`` is None; None if it needs another way.

    ``undo`` is there if the weight is merged. ``memory`` must be used by nothing else until the change is finished.
    """
    # Between two tasks, the memory of the weight would hold the base for a while.
    W = slot.memory() if (plan is None) != (undo is None) else None
    if W is None:
        return None
    if plan is not None:
        return merge_in_place(W, plan, task, memory)
    quick = isinstance(undo, RoundedMerge) and isinstance(undo.patch, FewEntries)
    return RestoreInPlace(W, undo, memory) if quick and isinstance(undo, RoundedMerge) else None


def merge_weight(
    W: Array,
    plan: TensorPlan,
    task: Task,
    *,
    shard: Shard | None = None,
    whole_weight: LazyArray | None = None,
    with_torch: bool = False,
    hold: bool = False,
    new: NewArray = np.empty,
    memory: BlockMemory | None = None,
) -> tuple[Array, Undo]:
    """W' = round(W + D) in an array of its own with the shape of W, and what restores W.

    Parameters
    ----------
    W : array
        The weight of the base, or of ``shard`` of it, which is not modified.
    plan : TensorPlan
        Its result must have the shape and dtype of the whole weight.
    task : Task
    shard : Shard or None
        The rows that W has of a weight that several processes share. They get the bits that they have in the whole.
    whole_weight : LazyArray or None
        The whole weight of the base, which is read only for DoRA, whose norms need all rows.
    with_torch : bool
        Let torch merge a whole weight of 16 or 32 bits, which changes no bit of W'.
    hold : bool
        Keep a copy of the factors, because those of the plan may change before the weight is restored.
    new : callable
        Makes the array of W' where torch merges.
    memory : BlockMemory, optional
        What torch needs for blocks of rows, which nothing else may use meanwhile.
    """
    quick = merge_by_torch(W, plan, task, new=new, memory=memory) if with_torch and shard is None else None
    if quick:
        return quick
    plan = _with_factors(plan) if hold else plan
    within = shard.rows_of(plan.matrix) if shard else None
    # `plan.base` reads the memory of the model, which may hold merged numbers by now. W has those of the base.
    merge = prepare_merge(replace(plan, base=_source(W, plan, shard, whole_weight)), dtype=W.dtype, within=within)
    replaced = plan.replacement is not None
    first, last = within or (0, plan.matrix[0])
    result = np.empty((last - first, plan.matrix[1]), W.dtype)
    writer, buffer = PatchWriter(W.dtype.itemsize), Buffer()
    for block in merge.blocks():
        result[block.start - first : block.stop - first] = block.merged
        if not replaced:
            writer.block(block.stored, block.subtract(buffer.of(block.merged.shape)))
    # A patch against unrelated numbers would be as large as the weight, and a copy is faster.
    patch, copy = (None, W.copy()) if replaced else (writer.finish(), None)
    factor_bytes = sum(term.nbytes for slab in plan.slabs for _, term in slab.terms) if hold else 0
    return result.reshape(W.shape), MergedWeight(task, plan, merge.slab_factors, patch, copy, factor_bytes, shard)


def _with_factors(plan: TensorPlan) -> TensorPlan:
    """The plan with its factors in memory."""
    slabs = (replace(slab, terms=tuple((weight, term.load()) for weight, term in slab.terms)) for slab in plan.slabs)
    return replace(plan, slabs=tuple(slabs))


def _source(W: Array, plan: TensorPlan, shard: Shard | None, whole_weight: LazyArray | None) -> LazyArray:
    """The weight of the base as far as it is needed."""
    if shard is None:
        return LazyArray.of(W)
    if whole_weight is not None and any(slab.magnitude for slab in plan.slabs):
        return LazyArray.of(whole_weight.read())
    return shard.as_part(W)


def restore_weight(W: Array, undo: Undo, *, new: NewArray = np.empty, memory: BlockMemory | None = None) -> Array:
    """Restore the weight of the base, or a shard of it, from the merged one. The array must not be modified.

    ``new`` and ``memory`` are those of `merge_weight`, for weights that torch merged.

    Raises
    ------
    FormatError
        The patch does not fit, because the weight was changed after the merge.
    """
    if isinstance(undo, RoundedMerge):
        return restore_by_torch(W, undo, new=new, memory=memory)
    if undo.copy is not None:
        return undo.copy
    assert undo.patch is not None
    shard, matrix = undo.shard, undo.plan.matrix
    within = shard.rows_of(matrix) if shard else None
    first, last = within or (0, matrix[0])
    assert (last - first) * matrix[1] == W.size
    reader, result, start = PatchReader(undo.patch, W.dtype.itemsize), np.empty((last - first, matrix[1]), W.dtype), 0
    plan = replace(undo.plan, base=_source(W, undo.plan, shard, None))
    for R in subtract_updates(plan, undo.slab_factors, W.dtype, within=within):
        result[start : start + len(R)] = reader.block(R)
        start += len(R)
    reader.finish()
    return result.reshape(W.shape)
