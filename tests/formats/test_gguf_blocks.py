"""ggml's block types: decoded bit for bit as the package `gguf` does, and codes that go back to the same bytes."""

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants
from hypothesis import given
from hypothesis import strategies as st

from loralens.core import LazyArray
from loralens.formats.files.gguf_file import TENSOR_TYPES
from loralens.formats.models.low_bit.gguf_blocks import (
    AT_ONCE,
    LAYOUTS,
    StoredRows,
    can_decode,
    coded_weight,
    row_decoder,
)
from tests.marks import examples

# Older releases of gguf do not know MXFP4.
ALL = [layout for layout in LAYOUTS.values() if layout.number in {int(kind) for kind in GGMLQuantizationType}]
NAMES = [layout.type.name for layout in ALL]
# float16: zeros of both signs, the smallest, a usual one of both signs, the largest, infinities and NaN.
SCALES = np.array([0.0, -0.0, 6e-8, 0.013, -0.013, 65504, np.inf, -np.inf, np.nan], np.float16).view(np.uint16)
# Where the float16 scales of each type stand in a block.
SCALES_AT = {
    "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q8_0": (0,), "Q2_K": (80, 82), "Q3_K": (108,),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": (),
}  # fmt: skip


def random_blocks(layout, count: int, seed: int, *, strange: bool = True) -> np.ndarray:
    """Blocks of random bytes; half of their scales are chosen among strange ones, or all of them are usual."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, layout.type.nbytes), dtype=np.uint8)
    for at in SCALES_AT[layout.type.name]:
        chosen = rng.random(count) < (0.5 if strange else 1)
        usual = np.full(count, np.float16(0.013).view(np.uint16))
        scales = (rng.choice(SCALES, count) if strange else usual).astype("<u2")
        blocks[chosen, at : at + 2] = scales[chosen].view(np.uint8).reshape(-1, 2)
    return blocks


def bits(numbers: np.ndarray) -> np.ndarray:
    """The bits of float32; every NaN is the same, as its payload and sign depend on the processor."""
    return np.where(np.isnan(numbers), np.uint32(0x7FC00000), np.ascontiguousarray(numbers).view(np.uint32))


def rows_of(layout, count: int, blocks_per_row: int, seed: int, *, order=None, strange: bool = True):
    raw = random_blocks(layout, count * blocks_per_row, seed, strange=strange).reshape(count, -1)
    return raw, StoredRows(LazyArray.of(raw), order)


@pytest.mark.parametrize("layout", ALL, ids=NAMES)
@examples(30)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 40))
def test_every_block_is_decoded_as_gguf_does(layout, seed: int, count: int) -> None:
    blocks = random_blocks(layout, count, seed)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(blocks, GGMLQuantizationType(layout.number))
    np.testing.assert_array_equal(bits(layout.decode(blocks)), bits(expected))


@pytest.mark.parametrize("layout", ALL, ids=NAMES)
@examples(30)
@given(seed=st.integers(0, 2**32))
def test_codes_give_back_the_bytes_and_the_numbers(layout, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(6)
    raw, rows = rows_of(layout, 6, 3, seed, order=order)
    weight = coded_weight(rows, layout.number, (6, 3 * layout.type.numbers), stored="blk.0.x.weight")
    assert weight is not None
    assert weight.grid is not None
    assert weight.encode is not None
    grid = weight.grid(1, 5)
    assert grid.codes.dtype == np.int16
    assert grid.codes.min() >= grid.lowest
    assert grid.codes.max() <= grid.highest
    np.testing.assert_array_equal(weight.encode(1, grid.codes), raw[order[1:5]])
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(bits(grid.values(grid.codes)), bits(weight.decode(1, 5)))


@pytest.mark.parametrize("layout", ALL, ids=NAMES)
def test_other_codes_are_what_gguf_reads_then(layout) -> None:
    """Every code of the range, written into blocks, is the number that the grid says, by gguf's own reading."""
    _, rows = rows_of(layout, 4, 2, 7, strange=False)
    weight = coded_weight(rows, layout.number, (4, 2 * layout.type.numbers), stored="x")
    assert weight is not None
    assert weight.grid is not None
    assert weight.encode is not None
    grid = weight.grid(0, 4)
    codes = np.random.default_rng(0).integers(grid.lowest, grid.highest + 1, grid.codes.shape).astype(np.int16)
    codes[0, 0], codes[0, 1] = grid.lowest, grid.highest
    read = quants.dequantize(weight.encode(0, codes), GGMLQuantizationType(layout.number))
    np.testing.assert_array_equal(read, grid.values(codes))
    # Only codes moved: the same scales are read from the new bytes.
    again = coded_weight(StoredRows(LazyArray.of(weight.encode(0, codes))), layout.number, weight.shape, stored="x")
    assert again is not None
    assert again.grid is not None
    np.testing.assert_array_equal(again.grid(0, 4).codes, codes)
    np.testing.assert_array_equal(again.grid(0, 4).step, grid.step)
    if grid.levels is not None:
        assert (np.diff(grid.levels) >= 0).all()


def test_the_sizes_of_blocks_are_those_of_gguf() -> None:
    known = {int(kind): (kind.name, *GGML_QUANT_SIZES[kind]) for kind in GGML_QUANT_SIZES}
    shared = known.keys() & TENSOR_TYPES.keys()
    # Q8_1 is no type of files, and was read in two sizes.
    assert {n: tuple(TENSOR_TYPES[n]) for n in shared} == {n: known[n] for n in shared}
    assert {layout.number for layout in ALL} <= shared


def test_a_large_matrix_is_decoded_in_pieces() -> None:
    layout = LAYOUTS[3]
    rows, columns = 40, 2**14
    assert rows * columns > 2 * AT_ONCE
    raw, stored = rows_of(layout, rows, columns // 32, 1, strange=False)
    numbers = row_decoder(stored, 3, (rows, columns), name="x")(0, rows)
    np.testing.assert_array_equal(numbers, quants.dequantize(raw, GGMLQuantizationType.Q4_1))


def test_other_types_are_decoded_by_gguf_or_refused() -> None:
    assert can_decode(23) == hasattr(quants, "IQ4_XS")
    assert not can_decode(15)  # Q8_K is a type of intermediate results
    raw = np.random.default_rng(0).integers(0, 256, (2, 136), dtype=np.uint8)
    raw[:, :2] = np.array([0.01], np.float16).view(np.uint8)
    read = row_decoder(StoredRows(LazyArray.of(raw)), 23, (2, 256), name="x")
    np.testing.assert_array_equal(read(0, 2), quants.dequantize(raw, GGMLQuantizationType.IQ4_XS))
    weight = coded_weight(StoredRows(LazyArray.of(raw)), 23, (2, 256), stored="x")
    # Its codes are known to be codes, and cannot be moved.
    assert (weight.layout, weight.bits, weight.grid, weight.encode) == ("IQ4_XS", 4.25, None, None)
    np.testing.assert_array_equal(weight.floats().read(), read(0, 2))
