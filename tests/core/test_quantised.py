"""The bytes of a module in few bits: against a reader of its own that takes them bit by bit, and what it refuses."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralens.core.few_bits.quantised import (
    NAME,
    as_bytes,
    direction_bits,
    direction_bytes,
    from_bytes,
    kernel_fits,
    quantise_module,
)
from loralens.core.lazy import LazyArray
from loralens.core.lowrank import Layout, LowRank
from loralens.core.scaling import Scaling
from loralens.errors import FormatError, OptionError
from loralens.linalg.few_bits.quantise import Quantised
from tests.marks import examples
from tests.reference import unpacked_bits

SCALING = Scaling("alpha/r", -6, 3, "adapter_config.json")


def bit_by_bit(data: bytes, out: int, in_: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """B and A of the bytes, as the table in `loralens.core.few_bits.quantised` says, one bit after the other."""
    bits, place = data[:rank], rank
    scales = struct.unpack(f"<{2 * rank}f", data[place : place + 8 * rank])
    place += 8 * rank
    sides = []
    for side, count in enumerate((out, in_)):
        lines = []
        for direction, b in enumerate(bits):
            length = -(-count * b // 8)
            numbers = unpacked_bits(data[place : place + length], b, count)
            place += length
            lines.append(np.array(numbers) * scales[side * rank + direction])
        sides.append(np.array(lines))
    assert place == len(data)
    return sides[0].T, sides[1]


def whole_numbers(rng: np.random.Generator, out: int, in_: int, bits: list[int]) -> Quantised:
    """Numbers of every size that the bits hold, the most negative ones included."""

    def side(count: int) -> np.ndarray:
        return np.array([rng.integers(-(1 << (b - 1)), 1 << (b - 1), count) for b in bits], np.int16)

    scales = rng.standard_normal((2, len(bits))).astype(np.float32)
    return Quantised(np.array(bits, np.uint8), scales[0], scales[1], side(out).T, side(in_))


def module_of(data: np.ndarray, shape: tuple[int, int], rank: int, scale: float = 1.0) -> LowRank:
    return from_bytes(
        LazyArray.of(data), shape, rank=rank, scale=scale, scaling=SCALING, layout=Layout(), key="m.q"
    )  # fmt: skip


@examples(60)
@given(st.integers(0, 10**6), st.integers(1, 20), st.integers(1, 20), st.lists(st.integers(2, 16), min_size=1))
def test_bytes_are_those_of_the_table_and_come_back(seed: int, out: int, in_: int, bits: list[int]) -> None:
    made = whole_numbers(np.random.default_rng(seed), out, in_, bits)
    data = as_bytes(made)
    assert (data.dtype, data.size) == (np.uint8, sum(direction_bytes((out, in_), b) for b in bits))
    B, A = bit_by_bit(data.tobytes(), out, in_, len(bits))
    module = module_of(data, (out, in_), len(bits))
    assert (module.B.dtype, module.A.dtype, module.shape, module.rank) == (
        np.float32, np.float32, (out, in_), len(bits),
    )  # fmt: skip
    for found, once, expected in ((module.B, made.B, B), (module.A, made.A, A)):
        np.testing.assert_array_equal(found, once)
        np.testing.assert_array_equal(found, expected.astype(np.float32))


def test_the_layout_never_moves() -> None:
    """Written out by hand: 4 bits, numbers 1, −2, 3 of B and 7, −8 of A, scales 0.5 and 2."""
    made = Quantised(
        np.array([4], np.uint8), np.float32([0.5]), np.float32([2.0]),
        np.array([[1], [-2], [3]], np.int16), np.array([[7, -8]], np.int16),
    )  # fmt: skip
    assert as_bytes(made).tobytes().hex() == "04" + "0000003f" + "00000040" + "e103" + "87"
    assert direction_bytes((3, 2), 4) == 12
    assert direction_bytes((3, 2), 0) == 0


@pytest.mark.parametrize(("bits", "rank"), [(8, 3), (4, 3), ([8, 5, 2], 3), ([16, 4], 2), ([6, 0, 0], 1), ([9], 1)])
def test_a_module_is_near_to_its_leading_directions(bits: int | list[int], rank: int) -> None:
    rng = np.random.default_rng(0)
    layout = Layout("conv", kernel=(3,))
    pair = LowRank(rng.standard_normal((40, 3)), rng.standard_normal((3, 30)), -2.0, scaling=SCALING, layout=layout)
    found = quantise_module(pair, bits)
    assert (found.rank, found.scale, found.scaling, found.layout) == (rank, -2.0, SCALING, layout)
    assert found.origin is not None
    assert found.origin.format == NAME
    each = [bits] * 3 if isinstance(bits, int) else bits
    assert found.nbytes == sum(direction_bytes((40, 30), b) for b in each)
    assert found.parameters == rank * 70
    U, s, Vh = np.linalg.svd(pair.dense())
    leading = (U[:, :rank] * s[:rank]) @ Vh[:rank]
    coarsest = min(b for b in each if b)
    assert np.linalg.norm(found.dense() - leading) <= 1.5 * 2.0 ** (1 - coarsest) * np.linalg.norm(leading)


def test_an_update_of_nothing_stays_nothing() -> None:
    found = quantise_module(LowRank(np.zeros((4, 2)), np.ones((2, 3))), 2)
    assert (found.rank, found.dense().any()) == (2, False)


@pytest.mark.parametrize("bits", [1, 17, 0, [], [0], [8, 8, 8, 8], [8, 0, 8], [0, 8], [8, 1], [8, 17], [-1]])
def test_bits_that_are_none(bits: int | list[int]) -> None:
    pair = LowRank(np.ones((5, 3)), np.ones((3, 7)))
    for call in (direction_bits, quantise_module):
        with pytest.raises(OptionError, match="are not the bit widths of at most 3 directions"):
            call(pair, bits)


def test_no_more_directions_than_the_smaller_side_has() -> None:
    wide = LowRank(np.ones((2, 4)), np.ones((4, 7)))
    assert direction_bits(wide, 3) == [3, 3]
    with pytest.raises(OptionError, match="at most 2 directions"):
        direction_bits(wide, [3, 3, 3])


def test_only_the_bits_are_read_before_a_factor_is_asked_for() -> None:
    data = as_bytes(whole_numbers(np.random.default_rng(1), 9, 8, [5, 5, 3]))
    seen: list[tuple[int, int]] = []

    def rows(start: int, stop: int) -> np.ndarray:
        seen.append((start, stop))
        return data[start:stop]

    lazy = LazyArray(lambda: data, shape=data.shape, dtype=np.uint8, rows=rows)
    module = from_bytes(lazy, (9, 8), rank=3, scale=1.0, scaling=SCALING, layout=Layout(), key="m.q")
    assert seen == [(0, 3)]
    seen.clear()
    assert module.B.shape == (9, 3)
    assert sorted(seen) == [(3, 15), (27, 27 + 6 + 6 + 4)]
    seen.clear()
    assert module.A.shape == (3, 8)
    assert sorted(seen) == [(15, 27), (43, data.size)]


GOOD = as_bytes(whole_numbers(np.random.default_rng(2), 6, 5, [4, 3]))


@pytest.mark.parametrize(
    ("data", "rank", "message"),
    [
        (GOOD[:-1], 2, "bytes, and 2 directions"),
        (np.append(GOOD, np.uint8(0)), 2, "bytes, and 2 directions"),
        (GOOD, 1, "bytes, and 1 directions"),
        (GOOD, 3, "cannot hold 3 directions|directions of|bits"),
        (GOOD, 0, "cannot hold 0 directions"),
        (GOOD, GOOD.size, "cannot hold"),
        (GOOD.astype(np.int8), 2, "int8"),
        (GOOD.reshape(1, -1), 2, "cannot hold 2 directions"),
        (np.concatenate([np.uint8([4, 1]), GOOD[2:]]), 2, "its directions have 1 to 4 bits"),
        (np.concatenate([np.uint8([17, 3]), GOOD[2:]]), 2, "its directions have 3 to 17 bits"),
    ],
    ids=str,
)
def test_bytes_that_hold_no_module(data: np.ndarray, rank: int, message: str) -> None:
    with pytest.raises(FormatError, match=message) as error:
        module_of(data, (6, 5), rank)
    assert str(error.value).startswith("m.q: ")


@pytest.mark.parametrize("side", ["B", "A"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_scale_that_is_no_number(side: str, value: float) -> None:
    data = GOOD.copy()
    place = 2 if side == "B" else 10
    data[place : place + 4] = np.frombuffer(struct.pack("<f", value), np.uint8)
    module = module_of(data, (6, 5), 2)
    with pytest.raises(FormatError, match="a scale is NaN or Inf"):
        getattr(module, side)
    assert getattr(module, "A" if side == "B" else "B").shape


def test_kernels_that_fit() -> None:
    assert kernel_fits(Layout(), (4, 6))
    assert kernel_fits(Layout("conv", kernel=(3, 2)), (4, 12))
    assert not kernel_fits(Layout("conv", kernel=(3, 2)), (4, 10))
    assert not kernel_fits(Layout("conv", kernel=(0, 2)), (4, 10))
    assert not kernel_fits(Layout("conv", groups=0), (4, 10))
