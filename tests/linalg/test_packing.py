"""Whole numbers of a few bits in bytes: against the same written bit by bit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loralens.linalg.few_bits.packing import FEWEST, MOST, pack, packed_length, unpack
from tests.reference import unpacked_bits

BITS = range(FEWEST, MOST + 1)


@pytest.mark.some(6)
@pytest.mark.parametrize("bits", BITS)
@settings(max_examples=20, deadline=None)
@given(st.integers(0, 3), st.integers(1, 19), st.integers(0, 2**32 - 1))
def test_packed_is_as_the_description_says_and_comes_back(bits: int, lines: int, count: int, seed: int) -> None:
    numbers = np.random.default_rng(seed).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (lines, count))
    packed = pack(numbers, bits)
    assert packed.dtype == np.uint8
    assert packed.shape == (lines, packed_length(count, bits))
    for line, row in zip(packed, numbers, strict=True):
        assert unpacked_bits(line, bits, count) == row.tolist()
    again = unpack(packed, bits, count)
    assert again.dtype == np.int16
    np.testing.assert_array_equal(again, numbers)


@pytest.mark.parametrize("bits", BITS)
def test_the_ends_of_the_range(bits: int) -> None:
    ends = np.array([[-(2 ** (bits - 1)), 2 ** (bits - 1) - 1, -1, 0, 1]])
    np.testing.assert_array_equal(unpack(pack(ends, bits), bits, 5), ends)


def test_eight_bits_are_int8_and_of_four_the_first_is_the_low_half() -> None:
    assert pack(np.array([[1, -2]]), 8).tobytes() == np.array([1, -2], np.int8).tobytes()
    assert pack(np.array([[1, -2, 3]]), 4).tolist() == [[0xE1, 0x03]]
    assert pack(np.array([[-2]]), 16).tobytes() == np.array([-2], "<i2").tobytes()


def test_a_part_of_a_bigger_array_can_be_unpacked() -> None:
    packed = pack(np.arange(12).reshape(3, 4) - 6, 4)
    wide = np.zeros((3, 5), np.uint8)
    wide[:, 1:3] = packed
    np.testing.assert_array_equal(unpack(wide[:, 1:3], 4, 4), np.arange(12).reshape(3, 4) - 6)
