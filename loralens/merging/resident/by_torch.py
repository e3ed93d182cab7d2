"""Merging a weight of 16 or 32 bits in memory with torch, which multiplies and rounds several times as fast as NumPy.

W' has the bits of `loralens merge`, since both compute the same exact product and add and round it in the same way. The
patch is relative to R = round(W' − D̃). D̃ is a coarse product (`loralens.linalg.narrow`), whose factors are kept until
the merge is undone. So the adapter may change in the meantime.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import ml_dtypes
import numpy as np

from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.linalg.exact import ExactProduct, SlicedBlock
from loralens.linalg.factor import Scratch
from loralens.linalg.narrow import NarrowProduct
from loralens.merging.matrix import cuts
from loralens.merging.plan import TensorPlan
from loralens.merging.resident.differences import Found, Patch, share_of_entries
from loralens.merging.resident.task import Task
from loralens.merging.rounding import slices_for
from loralens.merging.undo.patch import bits

BLOCK = 1 << 16  # numbers in a block of rows: all arrays of a block stay in the cache of a core
DTYPES = (np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16), np.dtype(np.float32))
# A patch that would make it more is deflated, which takes five times as long and a third of the memory.
QUICK = 1 / 12  # of the bytes of a weight: what its factors and its patch may take
# Where the factors alone take more, as those of narrow layers do.
QUICK_PATCH = 1 / 25  # of the bytes of a weight: what its patch may always take

_scratch = Scratch()


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


def merge_by_torch(W: Array, plan: TensorPlan, task: Task) -> tuple[Array, RoundedMerge] | None:
    """W' = round(W + D) in a new array, and what restores W; None if the weight needs the general way.

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
    merged, patch = _merge_rows(W.reshape(plan.matrix), plan, exact, products)
    return merged.reshape(W.shape), RoundedMerge(task, plan, products, patch)


def restore_by_torch(W: Array, undo: RoundedMerge) -> Array:
    """The weight of the base from the merged one, in a new array.

    If other code changed the weight after the merge, the result differs too, and `Switchboard.verify` finds it.
    """
    plan, differences = undo.plan, undo.patch.reader()
    coarse = {start: _Coarse.of(product) for start, product in undo.products.items()}
    result = np.empty(plan.matrix, W.dtype)
    merged, restored = _tensor(W.reshape(plan.matrix)), _tensor(result)
    buffers: _Buffers | None = None
    for start, stop, slab in cuts(plan, BLOCK):
        if slab is None:
            restored[start:stop].copy_(merged[start:stop])
            continue
        buffers = _fitting(buffers, result[start:stop])
        coarse[slab.start].multiply(start - slab.start, stop - slab.start, buffers)
        _subtract(merged[start:stop], buffers, out=restored[start:stop])
        differences.correct(bits(result[start:stop]))
    differences.finish()
    return result.reshape(W.shape)


def _merge_rows(
    W: Array, plan: TensorPlan, exact: Mapping[int, SlicedBlock], products: Mapping[int, NarrowProduct]
) -> tuple[Array, Patch]:
    """W' and the patch, a block of rows at a time."""
    slices = {start: _Slices.of(piece) for start, piece in exact.items()}
    coarse = {start: _Coarse.of(product) for start, product in products.items()}
    result, found = np.empty(W.shape, W.dtype), Found(W.itemsize, few=_few_entries(W, products))
    stored, merged = _tensor(W), _tensor(result)
    buffers: _Buffers | None = None
    for start, stop, slab in cuts(plan, BLOCK):
        if slab is None:
            result[start:stop] = W[start:stop]
            continue
        buffers = _fitting(buffers, W[start:stop])
        first, last = start - slab.start, stop - slab.start
        slices[slab.start].add(stored[start:stop], first, last, buffers, out=merged[start:stop])
        if W.itemsize == 2:
            coarse[slab.start].multiply(first, last, buffers)
        _subtract(merged[start:stop], buffers, out=buffers.rounded)
        found.compare(W[start:stop], buffers.R)
    return result, found.patch()


def _few_entries(W: Array, products: Mapping[int, NarrowProduct]) -> float:
    """The share of entries with a difference from which on the patch is deflated."""
    factors = sum(product.nbytes for product in products.values()) / W.nbytes
    return share_of_entries(max(QUICK - factors, QUICK_PATCH), W.itemsize)


@final
class _Buffers(NamedTuple):
    """Memory of this thread in the shape of a block, as tensors that overwrite those of the block before.

    ``wide`` and ``second`` are float64, ``product`` and ``total`` float32, and ``rounded`` is R in the dtype of W.
    """

    wide: Any
    second: Any
    product: Any
    total: Any
    R: Array
    rounded: Any


def _fitting(buffers: _Buffers | None, block: Array) -> _Buffers:
    """The buffers, or others if the block has another shape, as the last one of a slab may have."""
    import torch

    if buffers and buffers.R.shape == block.shape:
        return buffers
    size = block.size
    wide, second, singles, rest = np.split(_scratch.of(4 * size), 4)
    # A float64 number has the memory of two float32 numbers.
    product, total = np.split(singles.view(np.float32), 2)
    R = rest.view(block.dtype)[:size].reshape(block.shape)
    tensors = (torch.from_numpy(part.reshape(block.shape)) for part in (wide, second, product, total))
    return _Buffers(*tensors, R, _tensor(R))


@final
class _Slices(NamedTuple):
    """The slices of D as tensors; the second pair only for weights of 32 bits."""

    B1: Any
    A1: Any
    B2: Any = None
    A2: Any = None

    @classmethod
    def of(cls, piece: SlicedBlock) -> "_Slices":
        """The slices of an exact product."""
        import torch

        sides = (piece.B1, piece.A1, piece.B2, piece.A2)
        return cls(*(torch.from_numpy(side) for side in sides if side is not None))

    def add(self, W: Any, first: int, last: int, buffers: _Buffers, *, out: Any) -> None:
        """W' = round(W + D) in ``out``, for rows of W that have the rows ``first`` to ``last`` of D.

        For weights of 32 bits, ``buffers.product`` has D̃ afterwards, which is the product of the first pair.
        """
        import torch

        wide, product, total = buffers.wide, buffers.product, buffers.total
        torch.mm(self.B1[first:last], self.A1, out=wide)
        # D is rounded to float32 before it is added.
        if self.B2 is None:
            product.copy_(wide)
            out.copy_(total.copy_(W).add_(product))
            return
        product.copy_(wide)
        # Added up before they are added to the terms of the first pair, as in `ExactProduct`.
        torch.mm(self.B2[first:last], self.A2, out=buffers.second)
        torch.add(W, total.copy_(wide.add_(buffers.second)), out=out)


@final
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

    def multiply(self, first: int, last: int, buffers: _Buffers) -> None:
        """Rows ``first`` to ``last`` of D̃ in ``buffers.product``, float32; no order of summation changes its bits."""
        import torch

        if self.B.dtype == torch.float64:
            torch.mm(self.B[first:last], self.A, out=buffers.wide)
            buffers.product.copy_(buffers.wide)
        elif self.by_torch:
            torch.mm(self.B[first:last], self.A, out=buffers.product)
        else:
            np.dot(self.B[first:last].numpy(), self.A.numpy(), out=buffers.product.numpy())


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
