"""Scale and α: each found from the other, to the bit where float64 has it."""

from fractions import Fraction
from math import inf, nextafter, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralens.core.lowrank import Scaling, alpha_of, scale_of

RULES = ["alpha/r", "alpha/sqrt(r)"]
ranks = st.integers(1, 4096)
scales = st.floats(1e-250, 1e250) | st.floats(-1e250, -1e-250) | st.just(0.0)


def roots(scale, rank, rule):
    """α near the exact scale · divisor that give the scale, by trying many: slow and obvious."""
    divisor = Fraction(sqrt(rank)) if rule == "alpha/sqrt(r)" else Fraction(rank)
    middle = float(Fraction(scale) * divisor)
    candidates = [middle]
    for towards in (inf, -inf):
        step = middle
        for _ in range(8):
            step = nextafter(step, towards)
            candidates.append(step)
    return [alpha for alpha in candidates if scale_of(alpha, rank, rule) == scale]


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


def test_the_alpha_of_a_file_is_kept_for_every_small_pair():
    """(α/r)·r is not α for one pair in thirteen: that is why Scaling remembers α."""
    changed = 0
    for alpha in range(1, 129):
        for rank in range(1, 129):
            scaling = Scaling("alpha/r", alpha, rank)
            assert scaling.alpha_for(scaling.value, rank, "alpha/r") == alpha
            changed += scaling.value * rank != alpha
    assert changed > 500


@given(scales, ranks, st.sampled_from(RULES))
def test_alpha_of_finds_the_alpha_where_there_is_one(scale, rank, rule):
    there_is_one = bool(roots(scale, rank, rule))
    assert (scale_of(alpha_of(scale, rank, rule), rank, rule) == scale) == there_is_one


@given(scales, ranks, st.sampled_from(RULES))
def test_alpha_of_is_always_within_a_rounding(scale, rank, rule):
    back = scale_of(alpha_of(scale, rank, rule), rank, rule)
    assert abs(back - scale) <= 2**-52 * abs(scale)


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


@pytest.mark.parametrize(
    ("scaling", "value", "words"),
    [
        (Scaling(), 1.0, "given"),
        (Scaling("given", origin="--scale"), 1.0, "given (--scale)"),
        (Scaling("unknown"), 1.0, "unknown, taken as 1"),
        (Scaling("alpha/r", 16, 8, "adapter_config.json"), 2.0, "α/r = 16/8 (adapter_config.json)"),
        (Scaling("alpha/r", 0.5, 8), 0.0625, "α/r = 0.5/8"),
        (Scaling("alpha/sqrt(r)", 16, 64, "x"), 2.0, "α/√r = 16/√64 (x)"),
        (Scaling("alpha/r"), 1.0, "α/r"),
        (Scaling("alpha/sqrt(r)"), 1.0, "α/√r"),
    ],
)
def test_value_and_words(scaling, value, words):
    assert scaling.value == value
    assert str(scaling) == words


def test_it_is_frozen():
    with pytest.raises(AttributeError):
        Scaling().alpha = 3
