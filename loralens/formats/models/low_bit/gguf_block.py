"""`BlockLayout`: one of ggml's types whose numbers are stored in blocks of codes with scales."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loralens.formats.files.gguf.types import TENSOR_TYPES, TensorType
from loralens.linalg.exact import Singles

Bytes = NDArray[np.uint8]


class Blocks(NamedTuple):
    """The content of n blocks.

    Attributes
    ----------
    codes : uint8 array, shape (n, numbers of a block)
        Counted from 0: the code of a number minus ``lowest`` of the layout.
    step : float32 array, shape (n, groups of a block)
    offset : float32 array of the same shape, or None
        None stands for 0.
    """

    codes: Bytes
    step: Singles
    offset: Singles | None


@dataclass(frozen=True)
class BlockLayout:
    """A type of ggml: w = step · level(code) + offset, in the order of operations of ggml, in float32.

    Attributes
    ----------
    number
        ggml's number of the type.
    lowest, highest
        The range of the codes.
    groups
        The groups of a block; each has a step and an offset of its own.
    unpack
        Takes blocks (n, bytes of a block) and returns their content.
    pack
        Takes the same blocks and other codes, counted from 0, and returns the blocks with these codes. Scales stay.
    levels
        The level of every code, not decreasing; None: the level is the code.
    """

    number: int
    lowest: int
    highest: int
    groups: int
    unpack: Callable[[Bytes], Blocks]
    pack: Callable[[Bytes, Bytes], Bytes]
    levels: Singles | None = None

    @cached_property
    def type(self) -> TensorType:
        """The name, the numbers and the bytes of a block."""
        return TENSOR_TYPES[self.number]

    def decode(self, blocks: Bytes) -> Singles:
        """The numbers of blocks, shape (n, numbers of a block), bit for bit as ggml's own Python package."""
        # A damaged or odd file may hold an infinite scale, and inf · 0 is NaN in ggml as well.
        with np.errstate(invalid="ignore", over="ignore"):
            codes, step, offset = self.unpack(blocks)
            if self.levels is None:
                numbers = codes.astype(np.float32)
                numbers += np.float32(self.lowest)
            else:
                numbers = self.levels[codes]
            grouped = numbers.reshape(len(blocks), self.groups, -1)
            grouped *= step[..., None]
            # Subtracting a minimum, as ggml does, and adding its negative give the same bits.
            if offset is not None:
                grouped += offset[..., None]
        return grouped.reshape(len(blocks), -1)


def half(packed: Bytes) -> Singles:
    """The float16 of two bytes of each block as float32, shape (n, 1)."""
    return np.ascontiguousarray(packed).view(np.float16).astype(np.float32)


def low_and_high(packed: Bytes) -> Bytes:
    """The low nibbles of the bytes of each row, then their high nibbles."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)


def as_nibbles(codes: Bytes) -> Bytes:
    """The inverse of `low_and_high`."""
    middle = codes.shape[-1] // 2
    return codes[..., :middle] | (codes[..., middle:] << np.uint8(4))


def planes(packed: Bytes, bits: int, count: int) -> Bytes:
    """Fields of ``bits`` bits of the bytes (…, k), lowest first: shape (…, count, k)."""
    shifts = np.arange(0, bits * count, bits, dtype=np.uint8)[:, None]
    return (packed[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)


def from_planes(fields: Bytes, bits: int) -> Bytes:
    """The inverse of `planes`."""
    shifts = np.arange(0, bits * fields.shape[-2], bits, dtype=np.uint8)[:, None]
    packed: Bytes = np.bitwise_or.reduce(fields << shifts, axis=-2)
    return packed
