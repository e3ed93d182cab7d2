"""Adapters as vectors: +, −, · and what they refuse."""

import numpy as np
import pytest

from loralens import Adapter, OptionError
from tests.models import low_rank
from tests.tolerances import COMBINED


def made(seed, rank):
    return Adapter(modules={"a.q": low_rank(7, 5, rank, 0.5, seed=seed, dtype=float)})


def dense(adapter):
    return adapter["a.q"].dense()


def test_operators_are_those_of_the_updates():
    a, b = made(0, 2), made(1, 3)
    for found, expected in (
        (a + b, dense(a) + dense(b)),
        (a - b, dense(a) - dense(b)),
        (-a, -dense(a)),
        (0.25 * a, 0.25 * dense(a)),
        (a * -2, -2 * dense(a)),
        (b / 4, dense(b) / 4),
        (sum([a, b, a]), 2 * dense(a) + dense(b)),
    ):
        assert np.abs(dense(found) - expected).max() <= COMBINED * 10
    assert (a + b)["a.q"].rank == 5
    assert (a + a)["a.q"].rank == 2


def test_a_multiple_keeps_the_factors_to_the_bit():
    a = made(2, 3)
    assert (-a)["a.q"].B is a["a.q"].B
    assert (3 * a)["a.q"].scale == 1.5


def test_a_less_a_is_exactly_0():
    a = made(3, 3)
    assert not dense(a - a).any()
    assert (a - a)["a.q"].rank == 1


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused(weight):
    with pytest.raises(OptionError, match="is not finite"):
        made(6, 1) * weight
