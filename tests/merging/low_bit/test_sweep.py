"""The sweep with the gain held: the codes of a dense float64 version of its formula, the same on every machine."""

import numpy as np
import pytest

from loralens.errors import FormatError
from loralens.linalg.draws import Draws
from loralens.merging.low_bit.apply import added_numbers
from loralens.merging.low_bit.stochastic import asked_moves, draw_codes
from loralens.merging.low_bit.sweep import BITS, DAMPING, HOLD, HOLD_OUTPUTS, sweep_moments, sweep_rows
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
    return one, D


def dense_sweep(one, D, H):
    """Column by column: the columns that are free solve their least squares problem, by a solver for dense systems."""
    levels = np.arange(one.lowest, one.highest + 1.0) if one.levels is None else one.levels.astype(np.float64)
    steps, D, H = one.step[:, one.group_of_column].astype(np.float64), D.astype(np.float64), H.astype(np.float64)
    mean = np.mean(np.diag(H))
    order = np.argsort(-np.diag(H), kind="stable")
    codes = one.codes.copy() - one.lowest
    for row in range(len(codes)):
        u = D[row] / (np.linalg.norm(D[row]) or 1)
        damped = H + DAMPING * mean * np.eye(len(H))
        outputs = damped @ D[row] / (np.sqrt(D[row] @ damped @ D[row]) or 1)
        # The whole sum is a quadratic form of the error of the row.
        form = damped + HOLD * mean * np.outer(u, u) + HOLD_OUTPUTS * np.outer(outputs, outputs)
        e = np.zeros(len(H))
        for i, j in enumerate(order):
            done, free = order[:i], order[i:]
            e[free] = -np.linalg.solve(form[np.ix_(free, free)], form[np.ix_(free, done)] @ e[done])
            before = levels[codes[row, j]]
            if steps[row, j] == 0:
                e[j] = -D[row, j]
                continue
            best = int(np.argmin(np.abs(levels - before - (D[row, j] + e[j]) / steps[row, j])))
            if levels[best] != before:
                codes[row, j] = best
            e[j] = steps[row, j] * (levels[codes[row, j]] - before) - D[row, j]
    return codes + one.lowest


def loss(one, codes, D, H):
    E = added_numbers(one, codes).astype(np.float64) - D
    return float(np.sum(E @ H * E))


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["Q4_0", "Q4_1", "NF4"])
def test_it_is_the_dense_formula(layout):
    one, D = case(layout, 6, 160, size=2e-3)
    H = inputs(160)
    codes = sweep_rows(one, D, sweep_moments(H)).codes
    assert np.mean(codes != one.codes) > 0.02
    # Ties apart, which a solver and a recursion may decide differently.
    assert np.count_nonzero(codes != dense_sweep(one, D, H)) <= 2


@pytest.mark.parametrize("size", [1e-3, 1e-4])
def test_it_lowers_the_error_on_the_inputs_and_holds_both_gains(size):
    one, D = case("Q4_1", 32, 256, size=size)
    one.step[one.step == 0] = 0.01
    H = inputs(256)
    drawn = draw_codes(one, asked_moves(one, D), Draws.named(0, "w"), 0).codes
    swept = sweep_rows(one, D, sweep_moments(H)).codes
    assert loss(one, swept, D, H) < 0.3 * loss(one, drawn, D, H)
    added = added_numbers(one, swept).astype(np.float64)
    assert abs(np.sum(added * D) / np.sum(D**2) - 1) < 0.1
    # The gain of the outputs on such inputs.
    assert abs(np.sum(added @ H * D) / np.sum(D @ H * D) - 1) < 0.05


def test_the_factors_are_those_of_the_damped_moments():
    H = inputs(300)
    moments = sweep_moments(H)
    C = np.ldexp(moments.integers.astype(np.float64), moments.exponent)
    assert not np.tril(C).any()
    C += np.eye(300)
    damped = (H + DAMPING * np.mean(np.diag(H)) * np.eye(300))[np.ix_(moments.order, moments.order)]
    np.testing.assert_allclose(C * moments.pivots @ C.T, damped, rtol=1e-5, atol=1e-5 * damped.max())
    assert (np.diff(np.diag(H)[moments.order]) <= 0).all()


def test_a_clipped_move_is_counted_and_its_gain_comes_back_elsewhere():
    one, D = case("Q4_1", 16, 256, size=1e-3)
    one.step[one.step == 0] = 0.01
    # A fourth of the codes lie at the end to which the update asks them to move.
    quarter = one.codes[:, ::4]
    quarter[:] = np.where((D * one.step[:, one.group_of_column])[:, ::4] > 0, 15, 0)
    drawn = sweep_rows(one, D, sweep_moments(inputs(256)))
    by_chance = draw_codes(one, asked_moves(one, D), Draws.named(0, "w"), 0)
    assert 0 < drawn.clipped[:, ::4].mean() < 0.5
    assert drawn.clipped[:, 1::4].mean() < 0.05
    gains = [np.sum(added_numbers(one, each.codes) * D) / np.sum(D**2) for each in (by_chance, drawn)]
    assert gains[0] < 0.8
    assert 0.93 < gains[1] < 1.03


@pytest.mark.parametrize("layout", ["Q4_1", "FP4"])
def test_any_division_into_rows_gives_the_same_codes(layout):
    one, D = case(layout, 15, 192)
    moments = sweep_moments(inputs(192))
    whole = sweep_rows(one, D, moments).codes
    for start, stop in ((0, 1), (1, 8), (8, 15)):
        rows = sweep_rows(part(one, start, stop), D[start:stop], moments).codes
        np.testing.assert_array_equal(rows, whole[start:stop])


@pytest.mark.parametrize("side", ["above", "after"])
def test_products_with_the_factors_are_exact(side):
    moments = sweep_moments(inputs(300))
    X = np.random.default_rng(2).standard_normal((128, 3)) * [1e-6, 1, 1e6]
    if side == "above":
        product, factor = moments.above(X, 128, 256), moments.integers[:128, 128:256]
        outer, inner = moments.exponent[:128], X
    else:
        product, factor = moments.after(X, 128, 256), moments.integers[128:256, 256:].T
        outer, inner = 0, np.ldexp(X, moments.exponent[128:256])
    exponents = np.frexp(np.abs(inner).max(axis=0))[1] - BITS
    integers = np.rint(np.ldexp(inner, -exponents))
    exact = np.array([[int(c) for c in row] for row in factor], object) @ np.array(
        [[int(x) for x in row] for row in integers], object
    )
    assert max(abs(int(x)) for x in exact.ravel()) < 2**53
    np.testing.assert_array_equal(product, np.ldexp(exact.astype(np.float64), outer + exponents))


def test_the_codes_stay_on_the_grid_and_a_step_of_0_is_kept():
    one, D = case("Q4_0", 8, 64, size=0.05)
    swept = sweep_rows(one, D, sweep_moments(inputs(64))).codes
    assert swept.min() >= -8
    assert swept.max() <= 7
    fixed = one.step[:, one.group_of_column] == 0
    assert fixed.any()
    np.testing.assert_array_equal(swept[fixed], one.codes[fixed])


def test_rows_without_an_update_stay():
    one, D = case("Q4_1", 8, 64, size=1e-2)
    D[::2] = 0
    swept = sweep_rows(one, D, sweep_moments(inputs(64))).codes
    np.testing.assert_array_equal(swept[::2], one.codes[::2])
    assert (swept[1::2] != one.codes[1::2]).any()


def test_moments_that_are_none_are_refused():
    for H in (np.zeros((4, 4)), -np.eye(4), np.full((4, 4), np.nan)):
        with pytest.raises(FormatError):
            sweep_moments(H.astype(np.float32))
