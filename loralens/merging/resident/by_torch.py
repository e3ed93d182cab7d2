"""Merging a weight of 16 or 32 bits in memory with torch, which multiplies and rounds several times as fast as NumPy.

W' has the bits of `loralens merge`, since both compute the same exact product and add and round it in the same way. The
patch is relative to R = round(W' − D̃). D̃ is a coarse product (`loralens.linalg.narrow`), whose factors are kept until
the merge is undone. So the adapter may change in the meantime.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.linalg.exact import ExactProduct, SlicedBlock
from loralens.linalg.narrow import NarrowProduct
from loralens.merging.matrix import NewArray
from loralens.merging.plan import TensorPlan
from loralens.merging.resident.differences import BlockComparison, Patch, share_of_entries
from loralens.merging.rounding import slices_for
from loralens.merging.undo.patch import bits

Task = tuple[tuple[str, float], ...]  # what is merged: names of adapters and their weights; empty for the base

BLOCK = 1 << 17  # bytes of W in a block of rows: all arrays of a block, 8 times as much, stay in the cache of a core
SHAPES = 4  # shapes of blocks for which a thread keeps buffers
DTYPES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))
# A patch that would make it more is deflated, which takes five times as long and a third of the memory.
QUICK = 1 / 12  # of the bytes of a weight: what its factors and its patch may take
# Where the factors alone take more, as those of narrow layers do.
QUICK_PATCH = 1 / 25  # of the bytes of a weight: what its patch may always take


@final
@dataclass(frozen=True, slots=True)
class RoundedMerge:
    """What restores the base of a weight that `merge_by_torch` merged.

    Attributes
    ----------
    task : Task
        The task that is merged into the weight.
    plan : TensorPlan
        Only its matrix and the rows of its slabs are used.
    products : mapping of int to NarrowProduct
        D̃ by the first row of its slab.
    patch : Patch
        The patch relative to round(W' − D̃), for the rows that have an update.
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
        """Bytes of the factors of D̃."""
        return sum(product.nbytes for product in self.products.values())

    @property
    def copy_bytes(self) -> int:
        """Bytes of a copy of the weight; there is none."""
        return 0


def merge_by_torch(
    W: Array, plan: TensorPlan, task: Task, *, new: NewArray = np.empty
) -> tuple[Array, RoundedMerge] | None:
    """W' = round(W + D) in a ``new`` array, and what restores W; None if the weight needs the general way.

    This is the way for updates that are products of factors and nothing else. W must be finite, since
    torch may write any NaN where it computes one.
    """
    if W.dtype not in DTYPES or plan.replacement or plan.tokens or plan.scale or not np.size(W):
        return None
    pairs = all(isinstance(term, LowRank) for slab in plan.slabs for _, term in slab.terms)
    if not pairs or any(slab.magnitude for slab in plan.slabs):
        return None
    updates = {slab.start: slab.update(slices_for(W.dtype)) for slab in plan.slabs}
    exact = {
        start: one.pieces[0] for start, one in updates.items() if isinstance(one, ExactProduct) and len(one.pieces) == 1
    }
    # Ranks above 512 are several products.
    if len(exact) < len(updates):
        return None
    coarse = NarrowProduct.of_slices if W.dtype == np.float32 else NarrowProduct.rounded
    products = {start: coarse(piece.B1, piece.A1) for start, piece in exact.items()}
    merged = new(plan.matrix, W.dtype)
    patch = _merge_rows(W.reshape(plan.matrix), plan, exact, products, out=merged)
    return merged.reshape(W.shape), RoundedMerge(task, plan, products, patch)


def restore_by_torch(W: Array, undo: RoundedMerge, *, new: NewArray = np.empty) -> Array:
    """The weight of the base from the merged one, in a ``new`` array.

    If other code changed the weight after the merge, the result differs too, and `Switchboard.verify` finds it.
    """
    plan, differences = undo.plan, undo.patch.reader()
    result = new(plan.matrix, W.dtype)
    merged, restored, numbers = _tensor(W.reshape(plan.matrix)), _tensor(result), bits(result)
    _copy_rows_between(plan, merged, restored)
    for slab in plan.slabs:
        coarse = _Coarse.of(undo.products[slab.start])
        sides = (merged[slab.start : slab.stop], restored[slab.start : slab.stop], coarse.B)
        first = slab.start * plan.matrix[1]
        for rows, out, B in _in_blocks(*sides):
            buffers = _buffers(rows)
            coarse.multiply(B, buffers)
            _subtract(rows, buffers, out=out)
            last = first + rows.numel()
            differences.correct(numbers[first:last])
            first = last
    differences.finish()
    return result.reshape(W.shape)


def _merge_rows(
    W: Array,
    plan: TensorPlan,
    exact: Mapping[int, SlicedBlock],
    products: Mapping[int, NarrowProduct],
    *,
    out: Array,
) -> Patch:
    """W' in ``out``, and the patch, a block of rows at a time."""
    size = sum(slab.stop - slab.start for slab in plan.slabs) * plan.matrix[1]
    comparison = BlockComparison(size, W.itemsize, few=_few_entries(W, products))
    stored, merged, numbers = _tensor(W), _tensor(out), bits(W)
    _copy_rows_between(plan, stored, merged)
    for slab in plan.slabs:
        slices, coarse = _Slices.of(exact[slab.start]), _Coarse.of(products[slab.start])
        within = slice(slab.start, slab.stop)
        first = slab.start * plan.matrix[1]
        for rows, changed, B, *left in _in_blocks(stored[within], merged[within], coarse.B, *slices.left):
            buffers = _buffers(rows)
            slices.add(rows, left, buffers, out=changed)
            if W.itemsize == 2:
                coarse.multiply(B, buffers)
            _subtract(changed, buffers, out=buffers.rounded)
            last = first + rows.numel()
            comparison.compare(numbers[first:last], buffers.bits)
            first = last
    return comparison.patch()


def _in_blocks(*sides: Any) -> Iterator[tuple[Any, ...]]:
    """The rows of several tensors, a block at a time."""
    # At once, since slicing a tensor takes as long as adding a thousand numbers.
    step = max(1, BLOCK // max(1, sides[0].shape[1] * sides[0].itemsize))
    # "Unsafe" is about gradients. It takes two thirds of the time.
    return zip(*(side.unsafe_split(step) for side in sides), strict=True)


def _copy_rows_between(plan: TensorPlan, rows: Any, out: Any) -> None:
    """Copy the rows that have no update."""
    start = 0
    for stop, following in [*((slab.start, slab.stop) for slab in plan.slabs), (plan.matrix[0], 0)]:
        if stop > start:
            out[start:stop].copy_(rows[start:stop])
        start = following


def _few_entries(W: Array, products: Mapping[int, NarrowProduct]) -> float:
    """The share of entries with a difference from which on the patch is deflated."""
    factors = sum(product.nbytes for product in products.values()) / W.nbytes
    return share_of_entries(max(QUICK - factors, QUICK_PATCH), W.itemsize)


class _Buffers(NamedTuple):
    """Tensors in the shape of a block, which the next block overwrites.

    ``wide`` and ``second`` are float64, ``product`` and ``total`` float32, and ``rounded`` is R in the dtype of W.
    ``bits`` is R as a flat array. ``total`` and ``rounded`` lie in the memory of ``second``, which is that of ``wide``
    for weights of 16 bits. When they are written, the float64 numbers are no longer needed.
    """

    wide: Any
    second: Any
    product: Any
    total: Any
    rounded: Any
    bits: NDArray[Any]


class _Memory(threading.local):
    """The buffers of a thread, by the shape and the dtype of a block."""

    def __init__(self) -> None:
        self.buffers: dict[Any, _Buffers] = {}


_memory = _Memory()


def _buffers(block: Any) -> _Buffers:
    """The buffers of this thread for a block."""
    import torch

    key = (block.shape, block.dtype)
    if key not in _memory.buffers:
        # The last block of a weight has a shape of its own.
        if len(_memory.buffers) >= SHAPES:
            _memory.buffers.clear()
        # Torch aligns memory with lines of the cache, which NumPy does not.
        wide = torch.empty(block.shape, dtype=torch.float64)
        second = torch.empty_like(wide) if block.dtype == torch.float32 else wide
        product = torch.empty(block.shape, dtype=torch.float32)
        total, spare = second.view(torch.float32).view(2, *block.shape)
        rounded = spare.view(block.dtype).flatten()[: block.numel()].view(block.shape)
        whole = rounded.view(torch.int16 if block.dtype.itemsize == 2 else torch.int32).numpy()
        _memory.buffers[key] = _Buffers(wide, second, product, total, rounded, bits(whole))
    return _memory.buffers[key]


class _Slices(NamedTuple):
    """The slices of D as tensors; the second pair only for weights of 32 bits."""

    left: tuple[Any, ...]  # B1, and B2
    right: tuple[Any, ...]  # A1, and A2

    @classmethod
    def of(cls, piece: SlicedBlock) -> "_Slices":
        """The slices of an exact product."""
        import torch

        left, right = (piece.B1, piece.B2), (piece.A1, piece.A2)
        sides = (tuple(torch.from_numpy(one) for one in side if one is not None) for side in (left, right))
        return cls(*sides)

    def add(self, W: Any, left: Sequence[Any], buffers: _Buffers, *, out: Any) -> None:
        """W' = round(W + D) in ``out``, for some rows of W and those of the left slices.

        For weights of 32 bits, ``buffers.product`` has D̃ afterwards, which is the product of the first pair.
        """
        import torch

        wide, product, total = buffers.wide, buffers.product, buffers.total
        torch.mm(left[0], self.right[0], out=wide)
        # D is rounded to float32 before it is added.
        product.copy_(wide)
        if len(left) == 1:
            out.copy_(total.copy_(W).add_(product))
            return
        # Added up before they are added to the terms of the first pair, as in `ExactProduct`.
        torch.mm(left[1], self.right[1], out=buffers.second)
        torch.add(W, total.copy_(wide.add_(buffers.second)), out=out)


class _Coarse(NamedTuple):
    """The factors of D̃ as tensors, float32 for weights of 16 bits and float64 for others."""

    B: Any
    A: Any
    by_torch: bool

    @classmethod
    def of(cls, product: NarrowProduct) -> "_Coarse":
        """The factors of a product. Torch takes half the time of NumPy, but some programs make it round float32."""
        import torch

        B, A = (torch.from_numpy(factor) for factor in product.factors())
        return cls(B, A, B.dtype == torch.float64 or _torch_keeps_float32())

    def multiply(self, B: Any, buffers: _Buffers) -> None:
        """D̃ for some rows of B in ``buffers.product``, float32; no order of summation changes its bits."""
        import torch

        if not self.by_torch:
            np.dot(B.numpy(), self.A.numpy(), out=buffers.product.numpy())
        elif B.dtype == torch.float64:
            buffers.product.copy_(torch.mm(B, self.A, out=buffers.wide))
        else:
            torch.mm(B, self.A, out=buffers.product)


def _subtract(merged: Any, buffers: _Buffers, *, out: Any) -> None:
    """R = round(W' − D̃) for some rows, in ``out``; D̃ is in ``buffers.product``."""
    import torch

    if out.dtype == torch.float32:
        torch.sub(merged, buffers.product, out=out)
    else:
        out.copy_(buffers.total.copy_(merged).sub_(buffers.product))


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


def _tensor(array: Array) -> Any:
    """An array as a tensor in the same memory; torch cannot take bfloat16 from NumPy."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
