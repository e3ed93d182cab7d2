"""Merging a weight of 16 bits in memory with torch, which rounds to bfloat16 several times as fast as NumPy does.

W' has the bits of `loralens merge`, since both compute the same exact product and add and round it in the same way. The
patch is relative to R = round(W' − D̃). D̃ is the product of rounded factors (`loralens.linalg.narrow`), which are kept
until the merge is undone. So the adapter may change in the meantime.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, final

import ml_dtypes
import numpy as np

from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.linalg.exact import ExactProduct, Singles
from loralens.linalg.factor import Scratch
from loralens.linalg.narrow import NarrowProduct
from loralens.merging.matrix import cuts
from loralens.merging.plan import TensorPlan
from loralens.merging.resident.differences import BlockComparison, Patch
from loralens.merging.undo.patch import bits

Task = tuple[tuple[str, float], ...]  # what is merged: names of adapters and their weights; empty for the base

BLOCK = 1 << 16  # numbers in a block of rows: all arrays of a block stay in the cache of a core
DTYPES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16))

_scratch = Scratch()


@final
@dataclass(frozen=True, slots=True)
class RoundedMerge:
    """What restores the base of a weight that `merge_sixteen_bits` merged.

    Attributes
    ----------
    task : Task
        The task that is merged into the weight.
    plan : TensorPlan
        Only its matrix and the rows of its slabs are used.
    products : mapping of int to NarrowProduct
        D̃ by the first row of its slab.
    patch : Patch
        The patch relative to round(W' − D̃).
    """

    task: Task
    plan: TensorPlan
    products: Mapping[int, NarrowProduct]
    patch: Patch

    @property
    def patch_bytes(self) -> int:
        """Bytes of the patch."""
        return self.patch.nbytes

    @property
    def factor_bytes(self) -> int:
        """Bytes of the rounded factors."""
        return sum(product.nbytes for product in self.products.values())

    @property
    def copy_bytes(self) -> int:
        """Bytes of a copy of the weight; there is none."""
        return 0


def merge_sixteen_bits(W: Array, plan: TensorPlan, task: Task) -> tuple[Array, RoundedMerge] | None:
    """W' = round(W + D) in a new array, and what restores W; None if the weight needs the general way.

    This is the way for updates that are products of factors and nothing else. W must be finite, since
    torch may write any NaN where it computes one.
    """
    if W.dtype not in DTYPES or plan.replacement or plan.tokens or plan.scale or not np.size(W):
        return None
    pairs = all(isinstance(term, LowRank) for slab in plan.slabs for _, term in slab.terms)
    if not pairs or any(slab.magnitude for slab in plan.slabs):
        return None
    updates = {slab.start: slab.update(1) for slab in plan.slabs}
    exact = {start: one for start, one in updates.items() if isinstance(one, ExactProduct) and len(one.pieces) == 1}
    # Ranks above 512 are several products.
    if len(exact) < len(updates):
        return None
    products = {start: NarrowProduct.of(one.pieces[0].B1, one.pieces[0].A1) for start, one in exact.items()}
    merged, patch = _merge_rows(W.reshape(plan.matrix), plan, exact, products)
    return merged.reshape(W.shape), RoundedMerge(task, plan, products, patch)


def _merge_rows(
    W: Array, plan: TensorPlan, exact: Mapping[int, ExactProduct], products: Mapping[int, NarrowProduct]
) -> tuple[Array, Patch]:
    """W' and the patch, a block of rows at a time."""
    import torch

    factors = {start: one.factors() for start, one in products.items()}
    result, comparison = np.empty(W.shape, W.dtype), BlockComparison()
    stored, merged = _tensor(W), _tensor(result)
    shape: tuple[int, ...] = ()
    # Both ways give the same bits, as the product is exact; torch takes half the time.
    by_torch = _torch_keeps_float32()
    for start, stop, slab in cuts(plan, BLOCK):
        rows = W[start:stop]
        if rows.shape != shape:
            # Only the last block has another shape.
            (wide, total, product, R), shape = _buffers(rows), rows.shape
            rounded = _tensor(R)
        if slab is None:
            result[start:stop] = rows
            comparison.compare(rows, rows)
            continue
        first, last = start - slab.start, stop - slab.start
        piece = exact[slab.start].pieces[0]
        torch.mm(torch.from_numpy(piece.B1[first:last]), torch.from_numpy(piece.A1), out=wide)
        # D is rounded to float32 before it is added, as in `loralens merge`.
        product.copy_(wide)
        merged[start:stop].copy_(total.copy_(stored[start:stop]).add_(product))
        B, A = factors[slab.start]
        _subtract(merged[start:stop], B[first:last], A, product, total, rounded, by_torch=by_torch)
        comparison.compare(rows, R)
    return result, comparison.patch()


def restore_sixteen_bits(W: Array, undo: RoundedMerge) -> Array:
    """The weight of the base from the merged one, in a new array.

    If other code changed the weight after the merge, the result differs too, and `Switchboard.verify` finds it.
    """
    plan, differences = undo.plan, undo.patch.reader()
    factors = {start: one.factors() for start, one in undo.products.items()}
    result = np.empty(plan.matrix, W.dtype)
    merged, rounded = _tensor(W.reshape(plan.matrix)), _tensor(result)
    shape: tuple[int, ...] = ()
    # Both ways give the same bits, as the product is exact; torch takes half the time.
    by_torch = _torch_keeps_float32()
    for start, stop, slab in cuts(plan, BLOCK):
        if slab is None:
            rounded[start:stop].copy_(merged[start:stop])
        else:
            first, last = start - slab.start, stop - slab.start
            if result[start:stop].shape != shape:
                (_, total, product, _), shape = _buffers(result[start:stop]), result[start:stop].shape
            B, A = factors[slab.start]
            _subtract(merged[start:stop], B[first:last], A, product, total, rounded[start:stop], by_torch=by_torch)
        differences.correct(bits(result[start:stop]))
    differences.finish()
    return result.reshape(W.shape)


def _subtract(merged: Any, B: Singles, A: Singles, product: Any, total: Any, out: Any, *, by_torch: bool) -> None:
    """R = round(W' − D̃) for some rows, in ``out``; ``product`` and ``total`` are float32 buffers."""
    import torch

    if by_torch:
        torch.mm(torch.from_numpy(B), torch.from_numpy(A), out=product)
    else:
        np.dot(B, A, out=product.numpy())
    out.copy_(total.copy_(merged).sub_(product))


def _torch_keeps_float32() -> bool:
    """Whether torch multiplies float32 numbers as they are. A program may ask it to round them to bfloat16 first."""
    import torch

    mkldnn: Any = torch.backends.mkldnn
    try:
        # Older releases have the first setting alone; a mixture of both is refused by an error.
        levels = [getattr(one, "fp32_precision", "none") for one in (torch.backends, mkldnn, mkldnn.matmul)]
        return torch.get_float32_matmul_precision() == "highest" and all(level in ("none", "ieee") for level in levels)
    except (AttributeError, RuntimeError):
        return False


def _buffers(block: Array) -> tuple[Any, Any, Any, Array]:
    """Memory of this thread in the shape of a block: float64, twice float32, and an array of the dtype of the block."""
    import torch

    size = block.size
    buffer = _scratch.of(2 * size + size // 4 + 1)
    singles, halves = buffer[size : 2 * size].view(np.float32), buffer[2 * size :].view(block.dtype)
    wide, total, product = (
        torch.from_numpy(part.reshape(block.shape)) for part in (buffer[:size], singles[:size], singles[size:])
    )
    return wide, total, product, halves[:size].reshape(block.shape)


def _tensor(array: Array) -> Any:
    """An array of 16 bits as a tensor in the same memory."""
    import torch

    dtype = torch.float16 if array.dtype == np.float16 else torch.bfloat16
    return torch.from_numpy(array.view(np.int16)).view(dtype)
