"""Q4_1 and Q8_0 against ggml's own Python package, bit for bit."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from loralens.linalg.codes import BLOCK_TYPES, GGML_BLOCK, BlockType


@pytest.mark.parametrize("type_", BLOCK_TYPES.values(), ids=lambda type_: type_.name)
@pytest.mark.parametrize("size", [1e-9, 1e-3, 0.02, 1.0, 1e4])
def test_the_bits_are_those_of_ggml(type_: BlockType, size: float) -> None:
    rng = np.random.default_rng(0)
    numbers = (size * rng.standard_normal((500, 2 * GGML_BLOCK))).astype(np.float32)
    # Zeros, a constant, few numbers, and halves, where the ways of rounding differ.
    numbers[0], numbers[1], numbers[2, 5:] = 0, -size, 0
    numbers[3] = size * np.arange(-GGML_BLOCK, GGML_BLOCK) / 4
    number = GGMLQuantizationType(type_.number)
    # The largest numbers are beyond float16.
    with np.errstate(over="ignore", invalid="ignore"):
        theirs = quants.quantize(numbers, number)
        expected = quants.dequantize(theirs, number)
    stored, decoded = type_.quantise(numbers.reshape(-1, GGML_BLOCK))
    np.testing.assert_array_equal(stored.reshape(theirs.shape), theirs)
    np.testing.assert_array_equal(decoded.reshape(numbers.shape), expected)
    assert type_.nbytes * 2 == theirs.shape[1]
    assert number.name == type_.name
