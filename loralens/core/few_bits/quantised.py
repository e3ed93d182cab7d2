"""Modules in integers of a few bits: the bytes that store one, and the `LowRank` that reads them.

The bytes of a module (out, in) with k directions, whose integers are packed by `loralens.linalg.few_bits.packing`:

=====================  =======================================================================
k bytes                bit width b of each direction, 2 to 16
4k bytes               scales of the columns of B, float32, little-endian
4k bytes               scales of the rows of A
Σ⌈out·b/8⌉ bytes       integers of B, column by column
Σ⌈in·b/8⌉ bytes        integers of A, row by row
=====================  =======================================================================

B[:, i] = scale_B[i] · integers of column i, A[i] = scale_A[i] · integers of row i, and ΔW = scale · B · A.
"""

from collections.abc import Sequence
from itertools import pairwise
from math import prod

import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import Layout, LowRank, Origin
from loralens.core.scaling import Scaling
from loralens.errors import FormatError, OptionError
from loralens.linalg.few_bits.packing import FEWEST, MOST, Bytes, Numbers, pack, packed_length, unpack
from loralens.linalg.few_bits.quantise import Quantised, quantise_product

NAME = "loralens-q"  # the dialect of files that hold these bytes
PART = "q"  # name of the tensor with the bytes of a module, after the name of the module
HEAD = 9  # bytes of a direction in addition to its integers: the bit width and two float32 scales

_DAMAGED = "the file is damaged: download or save it again"


def direction_bytes(shape: tuple[int, int], bits: int) -> int:
    """Bytes of one direction of a module (out, in): 9 + ⌈out·b/8⌉ + ⌈in·b/8⌉, or 0 if it is left out."""
    return HEAD + sum(packed_length(side, bits) for side in shape) if bits else 0


def quantise_module(module: LowRank, bits: int | Sequence[int]) -> LowRank:
    """Quantise a module to integers of a few bits. A file of the dialect ``loralens-q`` stores exactly these integers.

    Parameters
    ----------
    module : LowRank
    bits : int or sequence of int
        One bit width from 2 to 16 for every direction, or one for each leading singular direction, largest first.
        Directions with 0 bits and directions behind the last one are left out.

    Returns
    -------
    LowRank
        It has the directions whose bit width is not 0, and float32 factors. Scale, scaling and layout are those of
        ``module``. ``origin`` has the bytes, so ``nbytes`` is the size of the integers and their scales.

    Raises
    ------
    OptionError
        A bit width is not allowed, a 0 comes before another bit width, all of them are 0, or there are more bit widths
        than directions.
    FormatError
        A factor holds NaN or Inf, or is too large for float32.
    """
    widths = direction_bits(module, bits)
    # Encoded and decoded at once, so that the module has exactly the numbers that a file would give back.
    data = as_bytes(quantise_product(module.B, module.A, np.array(widths)))
    return from_bytes(
        LazyArray.of(data), module.shape, rank=len(widths), scale=module.scale, scaling=module.scaling,
        layout=module.layout, key=PART,
    )  # fmt: skip


def direction_bits(module: LowRank, bits: int | Sequence[int]) -> list[int]:
    """The bit widths of the directions of ``module`` that are kept, largest direction first.

    Raises
    ------
    OptionError
        As `quantise_module`.
    """
    most = min(module.rank, *module.shape)
    widths = [bits] * most if isinstance(bits, int) else [int(b) for b in bits]
    nonzero = [b for b in widths if b]
    # Zeros may stand only behind all others: the directions that are left out are the smallest.
    if (
        not nonzero
        or len(widths) > most
        or not all(FEWEST <= b <= MOST for b in nonzero)
        or widths[: len(nonzero)] != nonzero
    ):
        raise OptionError(
            f"{bits} are not the bit widths of at most {most} directions, largest first",
            fix=f"give {FEWEST} to {MOST} to each direction that is kept",
        )
    return nonzero


def as_bytes(product: Quantised) -> Bytes:
    """The bytes that store a quantised product, uint8, in one dimension."""
    scales = np.stack([product.out_scales, product.in_scales]).astype("<f4")
    parts = [
        product.bits,
        scales.view(np.uint8).ravel(),
        _pack_lines(product.Q_B.T, product.bits),
        _pack_lines(product.Q_A, product.bits),
    ]
    return np.concatenate(parts)


def _pack_lines(lines: Numbers, bits: NDArray[np.uint8]) -> Bytes:
    """Pack lines of integers (k, count), one line after the other."""
    # Lines of different widths have different lengths, so their places are sums.
    starts = np.cumsum([0, *(packed_length(lines.shape[1], int(b)) for b in bits)])
    data = np.empty(starts[-1], np.uint8)
    # Directions of equal width are packed together, which is much faster than one by one.
    for run in _runs(bits):
        data[starts[run.start] : starts[run.stop]] = pack(lines[run], int(bits[run.start])).ravel()
    return data


def _unpack_lines(data: Bytes, bits: NDArray[np.uint8], count: int) -> Numbers:
    """The lines that `_pack_lines` made ``data`` of, int16, shape (k, count)."""
    starts = np.cumsum([0, *(packed_length(count, int(b)) for b in bits)])
    lines = np.empty((bits.size, count), np.int16)
    for run in _runs(bits):
        part = data[starts[run.start] : starts[run.stop]].reshape(run.stop - run.start, -1)
        lines[run] = unpack(part, int(bits[run.start]), count)
    return lines


def _runs(bits: NDArray[np.uint8]) -> list[slice]:
    """The runs of consecutive directions with the same bit width."""
    edges = [0, *(np.flatnonzero(np.diff(bits)) + 1).tolist(), bits.size]
    return [slice(a, b) for a, b in pairwise(edges)]


def from_bytes(
    data: LazyArray, shape: tuple[int, int], *, rank: int, scale: float, scaling: Scaling, layout: Layout, key: str
) -> LowRank:
    """The module that these bytes store. Only the bit widths are read at once, the factors on demand.

    Raises
    ------
    FormatError
        These are not the bytes of a module of this shape and rank.
    """
    out, in_ = shape
    # The size is checked first, so that a hostile rank cannot make a huge array.
    if data.dtype != np.uint8 or data.ndim != 1 or not 0 < HEAD * rank <= data.size:
        raise FormatError(f"{key}: {data.dtype} {data.shape} cannot hold {rank} directions", fix=_DAMAGED)
    # Only the bit widths are read now; they give the positions of all other parts.
    bits = data.rows(0, rank).read()
    # Checked before any length is computed from them.
    if not ((bits >= FEWEST) & (bits <= MOST)).all():
        raise FormatError(
            f"{key}: its directions have {bits.min()} to {bits.max()} bits, and {FEWEST} to {MOST} are possible",
            fix=_DAMAGED,
        )
    size = sum(direction_bytes(shape, int(b)) for b in bits)
    if data.size != size:
        raise FormatError(
            f"{key}: it has {data.size:,} bytes, and {rank} directions of {shape} take {size:,}", fix=_DAMAGED
        )
    middle = HEAD * rank + sum(packed_length(out, int(b)) for b in bits)

    def side(scales: int, start: int, stop: int, count: int) -> Array:
        """One factor (k, count), float32: the scales that begin at byte ``scales``, times the integers of a range."""
        numbers = _unpack_lines(data.rows(start, stop).read(), bits, count)
        factors = np.frombuffer(data.rows(scales, scales + 4 * rank).read().tobytes(), "<f4").astype(np.float32)
        # The integers are always finite, so the scales are all that can be damaged into NaN.
        if not np.isfinite(factors).all():
            raise FormatError(f"{key}: a scale is NaN or Inf", fix=_DAMAGED)
        return numbers.astype(np.float32) * factors[:, None]

    B = LazyArray(lambda: side(rank, HEAD * rank, middle, out).T, shape=(out, rank), dtype=np.float32)
    A = LazyArray(lambda: side(5 * rank, middle, size, in_), shape=(rank, in_), dtype=np.float32)
    origin = Origin(NAME, {key: data}, numbers=rank * sum(shape))
    return LowRank(B, A, scale, scaling=scaling, layout=layout, origin=origin)


def kernel_fits(layout: Layout, shape: tuple[int, int]) -> bool:
    """Whether a module of this shape can have this layout."""
    return layout.groups > 0 and all(k > 0 for k in layout.kernel) and shape[1] % prod(layout.kernel) == 0
