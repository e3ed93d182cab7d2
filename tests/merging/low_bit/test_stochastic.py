"""Stochastic rounding on a grid: the mean is the update, with the variance of a draw between two levels."""

from bisect import bisect_right

import numpy as np
import pytest

from loralens import FormatError
from loralens.linalg.rounding import Draws
from loralens.merging.grid_moves import added_numbers, asked_moves, move_codes, nearest_codes, uniform_numbers
from tests.merging.low_bit.grids import grid

LAYOUTS = ("Q4_0", "Q4_1", "NF4", "FP4")


def draw_codes(whole, moves, draws, offset):
    return move_codes(whole, moves, uniform_numbers(draws, offset, moves.size).reshape(moves.shape))


def drawn(whole, D, *, seed=0, offset=0):
    return draw_codes(whole, asked_moves(whole, D), Draws.named(seed, "w"), offset)


def level(whole, code):
    return float(code if whole.levels is None else whole.levels[code - whole.lowest])


def expectation(whole, row, column, delta):
    """Mean and variance of what a draw adds to an entry, in Python, or None where the grid ends or has no step."""
    step = float(whole.step[row, whole.group_of_column[column]])
    levels = [level(whole, code) for code in range(whole.lowest, whole.highest + 1)]
    code = int(whole.codes[row, column]) - whole.lowest
    if step == 0:
        return None
    target = levels[code] + delta / step
    if not levels[0] <= target < levels[-1]:
        return None
    lower = bisect_right(levels, target) - 1
    gap = levels[lower + 1] - levels[lower]
    p = (target - levels[lower]) / gap
    return delta, (step * gap) ** 2 * p * (1 - p)


@pytest.mark.some(3)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("size", [1e-3, 2e-2])
def test_the_mean_is_the_update(layout, size):
    rng = np.random.default_rng(3)
    one = grid(layout, 4, 64, seed=1)
    D = (size * rng.standard_normal((4, 64))).astype(np.float32)
    draws, total = 1000, np.zeros((4, 64))
    for seed in range(draws):
        total += added_numbers(one, drawn(one, D, seed=seed)[0])
    scores = []
    for row in range(4):
        for column in range(64):
            known = expectation(one, row, column, float(D[row, column]))
            if known:
                mean, variance = known
                scores.append((total[row, column] - draws * mean) / np.sqrt(draws * variance))
    scores = np.array(scores)
    assert len(scores) > 150
    # Standard scores: three standard errors of their mean, and of their mean square.
    assert abs(scores.mean()) < 3 / np.sqrt(len(scores))
    assert abs((scores**2).mean() - 1) < 3 * np.sqrt(2 / len(scores)) + 0.1


def test_a_negative_step_turns_the_move_and_a_step_of_0_forbids_it():
    one = grid("Q4_1", 2, 32, codes=7)
    one.step[:] = [[-0.5], [0.0]]
    D = np.full((2, 32), 1.0, np.float32)
    np.testing.assert_array_equal(asked_moves(one, D), [[-2.0] * 32, [0.0] * 32])
    np.testing.assert_array_equal(drawn(one, D)[0], [[5] * 32, [7] * 32])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_codes_stay_on_the_grid_and_what_leaves_it_is_counted(layout):
    for end, sign in (("highest", 1), ("lowest", -1)):
        one = grid(layout, 1, 32, codes=0)
        code = getattr(one, end)
        one = type(one)(np.full_like(one.codes, code), abs(one.step) + 0.1, None, one.group_of_column, one.lowest,
                        one.highest, one.levels)  # fmt: skip
        outwards = np.full((1, 32), sign * 0.05, np.float32)
        codes, clipped = drawn(one, outwards)
        assert (codes == code).all()
        assert clipped.any()
        codes, clipped = drawn(one, -outwards)
        assert not clipped.any()
        assert (codes != code).any()
        assert (drawn(one, np.float32(1e30) * outwards)[0] == code).all()


def test_no_update_keeps_every_code_even_where_two_codes_are_one_number():
    for layout in LAYOUTS:
        one = grid(layout, 8, 64, seed=6)
        np.testing.assert_array_equal(drawn(one, np.zeros((8, 64), np.float32))[0], one.codes)


def test_an_update_that_is_not_finite_is_refused():
    one = grid("Q4_1", 1, 32)
    for number in (np.inf, np.nan):
        with pytest.raises(FormatError, match="leaves float32"):
            asked_moves(one, np.full((1, 32), number, np.float32))


def test_the_nearest_codes_lose_what_is_smaller_than_half_a_step():
    one = grid("Q4_1", 4, 64, codes=7, seed=1)
    D = np.full((4, 64), 0.004, np.float32)
    np.testing.assert_array_equal(nearest_codes(one, asked_moves(one, D))[0], one.codes)
