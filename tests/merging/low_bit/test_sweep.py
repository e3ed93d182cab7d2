"""The sweep with the gain held: the same codes as a dense float64 version of its formula, on every machine."""

import numpy as np
import pytest

from loralens.errors import FormatError
from loralens.linalg.draws import Draws
from loralens.merging.low_bit.apply import added_numbers
from loralens.merging.low_bit.stochastic import asked_moves, draw_codes
from loralens.merging.low_bit.sweep import mean_move, sweep_moments, sweep_rows
from tests.merging.low_bit.grids import grid, part


def inputs(n, seed=0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((3 * n, n)) * (0.1 + 2 * rng.random(n)) + rng.standard_normal(
        (3 * n, 4)
    ) @ rng.standard_normal((4, n))
    return (X.T @ X / len(X)).astype(np.float32)


def case(layout, rows, columns, size=3e-4):
    rng = np.random.default_rng(1)
    one = grid(layout, rows, columns, seed=4)
    D = (size * rng.standard_normal((rows, 4)) @ rng.standard_normal((4, columns))).astype(np.float32)
    return one, D, draw_codes(one, asked_moves(one, D), Draws.named(0, "w"), 0).codes


def dense_sweep(one, codes, D, H):
    """The formula, column by column, without blocks and without the tricks of exact products."""
    levels = np.arange(one.lowest, one.highest + 1.0) if one.levels is None else one.levels.astype(np.float64)
    steps, D, H = one.step[:, one.group_of_column].astype(np.float64), D.astype(np.float64), H.astype(np.float64)
    mean = np.mean(np.diag(H))
    H, k = H + 0.01 * mean * np.eye(len(H)), 100 * mean
    Q = codes.copy() - one.lowest
    for row in range(len(Q)):
        length = np.linalg.norm(D[row])
        unit = D[row] / length if length else D[row]
        for j in range(Q.shape[1]):
            if steps[row, j] == 0:
                continue
            E = steps[row] * (levels[Q[row]] - levels[one.codes[row] - one.lowest]) - D[row]
            wanted = -(E @ H[:, j] + k * (E @ unit) * unit[j]) / (H[j, j] + k * unit[j] ** 2)
            target = levels[Q[row, j]] + wanted / steps[row, j]
            best = int(np.argmin(np.abs(levels - target)))
            if levels[best] != levels[Q[row, j]]:
                Q[row, j] = best
    return Q + one.lowest


def loss(one, codes, D, H):
    E = added_numbers(one, codes).astype(np.float64) - D
    return float(np.sum(E @ H * E))


@pytest.mark.parametrize("layout", ["Q4_0", "Q4_1", "NF4"])
def test_it_is_the_dense_formula(layout):
    one, D, codes = case(layout, 6, 160)
    H = inputs(160)
    np.testing.assert_array_equal(sweep_rows(one, codes, D, sweep_moments(H)), dense_sweep(one, codes, D, H))


def test_it_lowers_the_error_on_the_inputs_and_holds_the_gain():
    one, D, codes = case("Q4_1", 32, 256, size=1e-3)
    one.step[one.step == 0] = 0.01
    H = inputs(256)
    swept = sweep_rows(one, codes, D, sweep_moments(H))
    assert loss(one, swept, D, H) < 0.6 * loss(one, codes, D, H)
    gain = np.sum(added_numbers(one, swept) * D) / np.sum(D**2)
    assert abs(gain - 1) < 0.02


@pytest.mark.parametrize("layout", ["Q4_1", "FP4"])
def test_any_division_into_rows_gives_the_same_codes(layout):
    one, D, codes = case(layout, 15, 192)
    moments = sweep_moments(inputs(192))
    whole = sweep_rows(one, codes, D, moments)
    for start, stop in ((0, 1), (1, 8), (8, 15)):
        rows = sweep_rows(part(one, start, stop), codes[start:stop], D[start:stop], moments)
        np.testing.assert_array_equal(rows, whole[start:stop])


def test_products_with_the_moments_are_exact():
    moments = sweep_moments(inputs(150))
    X = np.random.default_rng(2).standard_normal((150, 3)) * [1e-6, 1, 1e6]
    product = moments.times(X, 0, 150, slice(None))
    exponents = np.frexp(np.abs(X).max(axis=0))[1] - moments.bits
    integers = np.rint(X / 2.0**exponents)
    exact = np.array([[int(h) for h in row] for row in moments.integers], object) @ np.array(
        [[int(x) for x in row] for row in integers], object
    )
    assert max(abs(int(x)) for x in exact.ravel()) < 2**53
    np.testing.assert_array_equal(product, exact.astype(np.float64) * 2.0 ** (moments.exponent + exponents))


def test_the_codes_stay_on_the_grid_and_a_step_of_0_is_kept():
    one, D, codes = case("Q4_0", 8, 64, size=0.05)
    swept = sweep_rows(one, codes, D, sweep_moments(inputs(64)))
    assert swept.min() >= -8
    assert swept.max() <= 7
    fixed = one.step[:, one.group_of_column] == 0
    assert fixed.any()
    np.testing.assert_array_equal(swept[fixed], one.codes[fixed])


def test_moments_that_are_none_are_refused():
    for H in (np.zeros((4, 4)), -np.eye(4), np.full((4, 4), np.nan)):
        with pytest.raises(FormatError):
            sweep_moments(H.astype(np.float32))


def test_the_mean_move():
    moves = np.array([[0.25, -0.5], [0.0, 7.0]])
    assert mean_move(moves) == pytest.approx((0.25 + 0.5 + 1) / 4)
