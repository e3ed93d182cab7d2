"""Draws belong to entries: any cut, any machine."""

import numpy as np
import pytest

from loralens.linalg.rounding import STEPS, Draws

GOLDEN = [60290, 57022, 53711, 54409, 42687, 56801]


def test_the_numbers_are_these_on_every_machine():
    draws = Draws.of(np.random.SeedSequence([7, 11]), 2)
    assert draws.words(0, 6).tolist() == GOLDEN
    assert Draws.of(np.random.SeedSequence([7, 11]), 3).words(0, 6).tolist() != GOLDEN
    assert Draws.of(np.random.SeedSequence([8, 11]), 2).words(0, 6).tolist() != GOLDEN


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 100])
def test_a_draw_belongs_to_an_entry(cut):
    draws = Draws(5)
    whole = draws.words(3, 400)
    parts = [draws.words(3 + i, min(cut, 400 - i)) for i in range(0, 400, cut)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_they_are_uniform():
    words = Draws(1).words(0, 1 << 20)
    assert words.dtype == np.uint16
    assert abs(words.mean() / STEPS - 0.5) < 5 * np.sqrt(1 / 12) / 2**10
    assert len(np.unique(words)) == STEPS


@pytest.mark.parametrize("cut", [1, 7, 8, 9, 100])
def test_a_wide_draw_belongs_to_an_entry(cut):
    draws = Draws.named(5, "a weight")
    whole = draws.wide_words(3, 400)
    parts = [draws.wide_words(3 + i, min(cut, 400 - i)) for i in range(0, 400, cut)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
    # Both are parts of one sequence of bytes.
    np.testing.assert_array_equal(draws.wide_words(0, 50).view("<u2"), draws.words(0, 100))
