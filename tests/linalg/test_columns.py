"""Columns and entries in few bits: what is decoded is what was coded, in the bytes that are promised."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralens.linalg.few_bits.columns import (
    columns_bytes,
    decode_columns,
    decode_entries,
    encode_columns,
    encode_entries,
    entries_bytes,
    entry_widths,
    round_columns,
)
from loralens.linalg.few_bits.quantise import SIDE
from loralens.linalg.leading import leading_directions


@given(st.integers(1, 40), st.lists(st.integers(2, 8), max_size=9), st.integers(0, 10**6))
def test_columns_come_back_from_their_bytes(rows, bits, seed):
    X = np.random.default_rng(seed).standard_normal((rows, len(bits)))
    coded = round_columns(X, np.array(bits, np.int64))
    data = encode_columns(coded)
    assert data.size == columns_bytes(rows, np.array(bits)) == coded.nbytes
    assert np.array_equal(decode_columns(data, rows, len(bits)), coded.values)
    # Other lengths than those of these columns are refused.
    assert decode_columns(data[:-1] if data.size else np.zeros(1, np.uint8), rows, len(bits)) is None
    assert decode_columns(np.append(data, np.uint8(0)), rows, len(bits)) is None


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_noise_of_a_column_is_that_of_its_bits(bits):
    x = np.random.default_rng(bits).standard_normal((4000, 1))
    noise = np.sum((round_columns(x, np.array([bits])).values - x) ** 2) / np.sum(x**2)
    # SIDE is for endless columns; the largest of 4,000 numbers is smaller, which helps where the steps are fine.
    assert 0.6 * SIDE[bits - 2] < noise < 1.2 * SIDE[bits - 2]


def test_widths_outside_of_2_to_8_bits_and_scales_that_are_not_finite_are_refused():
    data = encode_columns(round_columns(np.ones((8, 2)), np.array([3, 4])))
    for place, value in ((0, 1), (1, 9)):
        damaged = data.copy()
        damaged[place] = value
        assert decode_columns(damaged, 8, 2) is None
    damaged = data.copy()
    damaged[2:6] = np.array([np.nan], "<f4").view(np.uint8)
    assert decode_columns(damaged, 8, 2) is None


@given(st.integers(1, 6), st.integers(1, 50), st.integers(0, 14), st.integers(0, 10**6))
def test_entries_come_back_from_their_bytes(rows, count, most, seed):
    rng = np.random.default_rng(seed)
    # Entries of very different size, some of them always 0.
    largest = 2 ** rng.integers(0, most + 1, count) - 1
    integers = np.rint(rng.uniform(-1, 1, (rows, count)) * largest).astype(np.int16)
    widths = entry_widths(integers)
    packed = encode_entries(integers, widths)
    assert packed.shape == (rows, entries_bytes(widths))
    for row, expected in zip(packed, integers, strict=True):
        assert np.array_equal(decode_entries(row, widths), expected)


def test_a_width_is_the_least_that_holds_all_integers():
    for largest, width in ((0, 0), (1, 2), (2, 3), (3, 3), (4, 4), (7, 4), (8, 5), (127, 8), (128, 9), (16383, 15)):
        assert entry_widths(np.array([[0], [-largest]]))[0] == width


@pytest.mark.parametrize("shape", [(30, 7), (7, 30), (12, 12), (5, 1)])
def test_leading_directions_are_those_of_an_svd(shape):
    X = np.random.default_rng(1).standard_normal(shape)
    U, s, _ = np.linalg.svd(X, full_matrices=False)
    found = leading_directions(X)
    assert np.allclose(found.energies, s**2)
    assert np.allclose(np.abs(np.sum(found.columns * U, axis=0)), 1)


def test_a_matrix_of_low_rank_has_as_many_directions():
    rng = np.random.default_rng(2)
    X = rng.standard_normal((40, 3)) @ rng.standard_normal((3, 60))
    assert leading_directions(X).columns.shape == (40, 3)
    assert leading_directions(np.zeros((5, 4))).columns.shape == (5, 0)
    assert leading_directions(np.zeros((5, 0))).columns.shape == (5, 0)
