"""Scale and α: each found from the other, to the bit where float64 has it."""

from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralens.core import Scaling
from loralens.core.lowrank import alpha_of, scale_of

RULES = ["alpha/r", "alpha/sqrt(r)"]
ranks = st.integers(1, 4096)


def test_scale_of():
    assert scale_of(16, 8, "alpha/r") == 2
    assert scale_of(16, 64, "alpha/sqrt(r)") == 2
    assert scale_of(1, 3, "alpha/r") == 1 / 3
    assert scale_of(-1, 2, "alpha/sqrt(r)") == -1 / sqrt(2)


@pytest.mark.parametrize("rule", RULES)
def test_alpha_of_every_small_pair_gives_the_scale_back(rule):
    for alpha in range(1, 129):
        for rank in range(1, 129):
            scale = scale_of(alpha, rank, rule)
            assert scale_of(alpha_of(scale, rank, rule), rank, rule) == scale


@given(st.floats(1e-200, 1e200), ranks, st.sampled_from(RULES))
def test_what_was_read_is_written_back(alpha, rank, rule):
    scale = scale_of(alpha, rank, rule)
    assert scale_of(alpha_of(scale, rank, rule), rank, rule) == scale
    assert Scaling(rule, alpha, rank).alpha_for(scale, rank, rule) == alpha


@pytest.mark.parametrize(
    ("scale", "rank", "rule"),
    [(2.0, 8, "alpha/sqrt(r)"), (2.0, 4, "alpha/r"), (1.0, 8, "alpha/r")],
    ids=["another rule", "another rank", "another scale"],
)
def test_the_alpha_of_a_file_is_not_kept_where_it_no_longer_fits(scale, rank, rule):
    alpha = Scaling("alpha/r", 16, 8).alpha_for(scale, rank, rule)
    assert alpha == alpha_of(scale, rank, rule) != 16
    assert scale_of(alpha, rank, rule) == scale
