"""The codes from which a merge leads to its codes, against all codes tried one by one."""

from dataclasses import replace

import numpy as np
import pytest

from loralens.linalg.rounding import Draws
from loralens.merging import grid_moves
from loralens.merging.grid_moves import asked_moves, find_origins, move_codes, uniform_numbers
from tests.merging.low_bit.grids import grid

LAYOUTS = ("Q4_0", "Q4_1", "NF4", "FP4")


@pytest.mark.parametrize("size", [0.01, 0.4, 3.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_origins_are_those_that_trying_every_code_finds(layout, size, monkeypatch):
    monkeypatch.setattr(grid_moves, "SEARCHED", 37)
    base, rng = grid(layout, 6, 64, seed=2), np.random.default_rng(1)
    D = (size * np.abs(base.step[:, base.group_of_column]) * rng.standard_normal(base.codes.shape)).astype(np.float32)
    uniform = uniform_numbers(Draws.named(0, "w"), 0, base.codes.size).reshape(base.codes.shape)

    def move(rows):
        return move_codes(rows, asked_moves(rows, D), uniform)[0]

    merged = move(base)
    nearest, several, none = find_origins(replace(base, codes=merged), D, uniform)
    codes = np.arange(base.lowest, base.highest + 1)
    leads = np.stack([move(replace(base, codes=np.full_like(base.codes, code))) == merged for code in codes])
    assert (several, none) == (np.count_nonzero(leads.sum(axis=0) > 1), 0)
    distances = np.where(leads, np.abs(codes[:, None, None] - merged), 1000)
    np.testing.assert_array_equal(np.abs(nearest - merged), distances.min(axis=0))
    assert np.take_along_axis(leads, (nearest - base.lowest)[None].astype(int), axis=0).all()


def test_codes_that_no_code_leads_to_are_counted_and_stay():
    base = replace(grid("Q4_1", 4, 64, codes=8), step=np.full((4, 2), 0.01, np.float32))
    D, half = np.full(base.codes.shape, 0.025, np.float32), np.full(base.codes.shape, 0.5)
    nearest, _, none = find_origins(replace(base, codes=np.zeros((4, 64), np.int16)), D, half)
    assert none == 4 * 64
    np.testing.assert_array_equal(nearest, 0)
