"""Merging a weight of 16 or 32 bits in memory with torch, which multiplies and rounds several times as fast as NumPy.

W' has the bits of `loralens merge`, since both compute the same exact product and add and round it in the same way. The
patch is relative to R = round(W' − D̃). D̃ is a coarse product (`loralens.linalg.exact`), whose factors are kept until
the merge is undone. So the adapter may change in the meantime.
"""

import threading
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.linalg.exact import ExactProduct, NarrowProduct, SlicedBlock
from loralens.merging.matrix import NewArray
from loralens.merging.plan import TensorPlan
from loralens.merging.resident.block_operations import BlockMemory, subtract_coarse
from loralens.merging.resident.differences import FewEntries, share_of_entries
from loralens.merging.resident.in_place import MergeInPlace, RestoreInPlace, RoundedMerge, Task, updated_rows
from loralens.merging.rounding import slices_for
from loralens.merging.undo.patch import PatchReader, PatchWriter

DTYPES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))
# A patch that would make it more is deflated, which takes five times as long and a third of the memory.
QUICK = 1 / 12  # of the bytes of a weight: what its factors and its patch may take
# Where the factors alone take more, as those of narrow layers do.
QUICK_PATCH = 1 / 25  # of the bytes of a weight: what its patch may always take


class _Memory(threading.local):
    """The buffers of a thread."""

    def __init__(self) -> None:
        self.blocks = BlockMemory()


_memory = _Memory()


def merge_by_torch(
    W: Array, plan: TensorPlan, task: Task, *, new: NewArray = np.empty, memory: BlockMemory | None = None
) -> tuple[Array, RoundedMerge] | None:
    """W' = round(W + D) in a ``new`` array, and what restores W; None if the weight needs the general way.

    This is the way for updates that are products of factors and nothing else. W must be finite, since
    torch may write any NaN where it computes one. ``memory`` must be used by nothing else meanwhile.
    """
    exact = _exact_products(W, plan)
    if exact is None:
        return None
    products = _coarse_products(W, exact)
    merged = new(plan.matrix, W.dtype)
    merged[...] = W.reshape(plan.matrix)
    memory = memory or _memory.blocks
    change = MergeInPlace.begin(merged, plan, task, products, exact, memory, few=_few_entries(W, products))
    undo = change.finish() if change else _merge_with_blob(merged, plan, task, products, exact, memory)
    return merged.reshape(W.shape), undo


def merge_in_place(W: Array, plan: TensorPlan, task: Task, memory: BlockMemory) -> MergeInPlace | None:
    """The change of W into W' in its own memory; None if the weight needs another way, and then W is unchanged.

    ``memory`` must be used by nothing else until the change is finished.
    """
    exact = _exact_products(W, plan)
    if exact is None:
        return None
    products = _coarse_products(W, exact)
    return MergeInPlace.begin(W, plan, task, products, exact, memory, few=_few_entries(W, products))


def restore_by_torch(
    W: Array, undo: RoundedMerge, *, new: NewArray = np.empty, memory: BlockMemory | None = None
) -> Array:
    """The weight of the base from the merged one, in a ``new`` array. Nothing else may use ``memory`` meanwhile.

    If other code changed the weight after the merge, the result differs too, and `Switchboard.verify` finds it.
    """
    result = new(undo.plan.matrix, W.dtype)
    result[...] = W.reshape(undo.plan.matrix)
    memory = memory or _memory.blocks
    if isinstance(undo.patch, FewEntries):
        RestoreInPlace(result, undo, memory).finish()
        return result.reshape(W.shape)
    reader = PatchReader(undo.patch, W.dtype.itemsize)
    for block in updated_rows(result, undo.plan, undo.products, memory.size):
        buffers = memory.of(block.rows)
        block.coarse.multiply(block.B, buffers)
        subtract_coarse(block.rows, buffers, out=block.rows)
        reader.correct(block.bits)
    reader.finish()
    return result.reshape(W.shape)


def _exact_products(W: Array, plan: TensorPlan) -> dict[int, SlicedBlock] | None:
    """D by the first row of its slab; None if the weight needs the general way."""
    if W.dtype not in DTYPES or plan.replacement or plan.tokens or plan.scale or not np.size(W) or not plan.slabs:
        return None
    pairs = all(isinstance(term, LowRank) for slab in plan.slabs for _, term in slab.terms)
    if not pairs or any(slab.magnitude for slab in plan.slabs):
        return None
    updates = {slab.start: slab.update(slices_for(W.dtype)) for slab in plan.slabs}
    exact = {
        start: one.pieces[0] for start, one in updates.items() if isinstance(one, ExactProduct) and len(one.pieces) == 1
    }
    # Ranks above 512 are several products.
    return exact if len(exact) == len(updates) else None


def _coarse_products(W: Array, exact: Mapping[int, SlicedBlock]) -> dict[int, NarrowProduct]:
    """D̃ by the first row of its slab."""
    coarse = NarrowProduct.of_slices if W.dtype == np.float32 else NarrowProduct.rounded
    return {start: coarse(piece.B1, piece.A1) for start, piece in exact.items()}


def _merge_with_blob(
    merged: Array,
    plan: TensorPlan,
    task: Task,
    products: Mapping[int, NarrowProduct],
    exact: Mapping[int, SlicedBlock],
    memory: BlockMemory,
) -> RoundedMerge:
    """Change W into W' in its memory, and return what restores W, where many entries differ."""
    writer = PatchWriter(merged.itemsize)
    for block in updated_rows(merged, plan, products, memory.size, exact):
        assert block.slices is not None
        buffers = memory.of(block.rows)
        block.slices.add(block.rows, block.left, buffers, out=buffers.changed)
        if merged.itemsize == 2:
            block.coarse.multiply(block.B, buffers)
        subtract_coarse(buffers.changed, buffers, out=buffers.rounded)
        writer.block(block.bits, buffers.bits)
        block.rows.copy_(buffers.changed)
    return RoundedMerge(task, plan, products, writer.finish())


def _few_entries(W: Array, products: Mapping[int, NarrowProduct]) -> float:
    """The share of entries with a difference from which on the patch is deflated."""
    factors = sum(product.nbytes for product in products.values()) / W.nbytes
    return share_of_entries(max(QUICK - factors, QUICK_PATCH), W.itemsize)
