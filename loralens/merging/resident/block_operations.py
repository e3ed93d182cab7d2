"""The operations on one block of rows of a weight, in torch: W + D, D̃, and R = round(W' − D̃).

A block is so small that everything that is computed from it stays in the cache of a core.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array
from loralens.linalg.exact import NarrowProduct, SlicedBlock
from loralens.merging.undo.patch import bits

BLOCK = 1 << 17  # bytes of W in a block of rows: all arrays of a block, 8 times as much, stay in the cache of a core
# After every operation a thread waits for Python's lock if another one has it. So blocks of several threads are larger,
# although they leave the cache: two threads took a third less time on two cores of an Intel Xeon.
OF_SEVERAL = 4  # times as many bytes, if several threads work
SHAPES = 4  # shapes of blocks for which buffers are kept


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch use one thread per operation: those on a block are so short that several threads mostly wait."""
    import torch

    count = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        yield
    finally:
        torch.set_num_threads(count)


def in_blocks(size: int, *sides: Any) -> Iterator[tuple[Any, ...]]:
    """The rows of several tensors, a block at a time, which has about ``size`` bytes of the first one."""
    # At once, since slicing a tensor takes as long as adding a thousand numbers.
    step = max(1, size // max(1, sides[0].shape[1] * sides[0].itemsize))
    # "Unsafe" is about gradients. It takes two thirds of the time.
    return zip(*(side.unsafe_split(step) for side in sides), strict=True)


class Buffers(NamedTuple):
    """Tensors in the shape of a block, and ``bits``, which is ``rounded`` as a flat array.

    ``wide`` and ``second`` are float64, ``product`` and ``total`` float32. ``changed`` is W', and ``rounded`` R. The
    last three lie in the memory of ``second``, which is that of ``wide`` for weights of 16 bits: when they are
    written, the float64 numbers are no longer needed. For weights of 32 bits ``changed`` is ``total``.
    """

    wide: Any
    second: Any
    product: Any
    total: Any
    changed: Any
    rounded: Any
    bits: NDArray[Any]


@final
class BlockMemory:
    """Buffers by the shape and the dtype of a block. The next block of the same shape overwrites them.

    ``threads`` work at a time, each with buffers of its own.
    """

    __slots__ = ("_buffers", "_threads")

    def __init__(self, threads: int = 1) -> None:
        self._buffers: dict[Any, Buffers] = {}
        self._threads = threads

    @property
    def size(self) -> int:
        """How many bytes of W a block has."""
        return BLOCK if self._threads == 1 else OF_SEVERAL * BLOCK

    def of(self, block: Any) -> Buffers:
        """The buffers for a block."""
        import torch

        key = (block.shape, block.dtype)
        if key not in self._buffers:
            # The last block of a weight has a shape of its own.
            if len(self._buffers) >= SHAPES:
                self._buffers.clear()
            # Torch aligns memory with lines of the cache, which NumPy does not.
            wide = torch.empty(block.shape, dtype=torch.float64)
            is_wide = block.dtype == torch.float32
            second = torch.empty_like(wide) if is_wide else wide
            product = torch.empty(block.shape, dtype=torch.float32)
            total, spare = second.view(torch.float32).view(2, *block.shape)
            parts = spare.view(block.dtype).view(-1, *block.shape)
            whole = parts[0].view(torch.int32 if is_wide else torch.int16).numpy()
            changed = total if is_wide else parts[1]
            self._buffers[key] = Buffers(wide, second, product, total, changed, parts[0], bits(whole))
        return self._buffers[key]


class Slices(NamedTuple):
    """The slices of D as tensors; the second pair only for weights of 32 bits."""

    left: tuple[Any, ...]  # B1, and B2
    right: tuple[Any, ...]  # A1, and A2

    @classmethod
    def of(cls, piece: SlicedBlock) -> "Slices":
        """The slices of an exact product."""
        import torch

        left, right = (piece.B1, piece.B2), (piece.A1, piece.A2)
        sides = (tuple(torch.from_numpy(one) for one in side if one is not None) for side in (left, right))
        return cls(*sides)

    def add(self, W: Any, left: Sequence[Any], buffers: Buffers, *, out: Any) -> None:
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


class Coarse(NamedTuple):
    """The factors of D̃ as tensors, float32 for weights of 16 bits and float64 for others."""

    B: Any
    A: Any
    by_torch: bool

    @classmethod
    def of(cls, product: NarrowProduct) -> "Coarse":
        """The factors of a product. Torch takes half the time of NumPy, but some programs make it round float32."""
        import torch

        B, A = (torch.from_numpy(factor) for factor in product.factors())
        return cls(B, A, B.dtype == torch.float64 or _torch_keeps_float32())

    def multiply(self, B: Any, buffers: Buffers) -> None:
        """D̃ for some rows of B in ``buffers.product``, float32; no order of summation changes its bits."""
        import torch

        if not self.by_torch:
            np.dot(B.numpy(), self.A.numpy(), out=buffers.product.numpy())
        elif B.dtype == torch.float64:
            buffers.product.copy_(torch.mm(B, self.A, out=buffers.wide))
        else:
            torch.mm(B, self.A, out=buffers.product)


def subtract_coarse(merged: Any, buffers: Buffers, *, out: Any) -> None:
    """W' − D̃ for some rows, rounded to the dtype of ``out``; D̃ is in ``buffers.product``."""
    import torch

    if merged.dtype == torch.float32:
        torch.sub(merged, buffers.product, out=out)
        return
    buffers.total.copy_(merged).sub_(buffers.product)
    if out is not buffers.total:
        out.copy_(buffers.total)


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


def as_tensor(array: Array) -> Any:
    """An array as a tensor in the same memory; torch cannot take bfloat16 from NumPy."""
    import torch

    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(array)
