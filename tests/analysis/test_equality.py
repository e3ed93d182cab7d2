"""Equal is: the same update. Not: the same factors."""

import numpy as np
import pytest

import loralens
from loralens import FormatError
from loralens.analysis.equality import differences
from loralens.core import Dense, LazyArray, Structured
from tests.draws import draw_factors

rng = np.random.default_rng(0)
B, A = draw_factors(rng, 7, 5, 3)


def adapter(**modules: object) -> loralens.Adapter:
    return loralens.Adapter(modules={name.replace("__", "."): m for name, m in modules.items()})  # type: ignore[misc]


def largest(first: loralens.Adapter, second: loralens.Adapter) -> float:
    return max(one.relative for one in differences(first, second))


def test_gauge_rank_and_scale_do_not_matter() -> None:
    G = rng.normal(size=(3, 3))
    plain = adapter(m=loralens.LowRank(B, A, 2.0))
    turned = adapter(m=loralens.LowRank(B @ G, np.linalg.solve(G, A), 2.0))
    folded = adapter(m=loralens.LowRank(-2 * B, A, -1.0))
    padded = adapter(m=loralens.LowRank(np.hstack([B, B]), np.vstack([A, A]), 1.0))
    for other in (turned, folded, padded):
        assert largest(plain, other) < 1e-14


@pytest.mark.parametrize("size", [1e-12, 1e-6, 0.5])
def test_a_small_difference_is_measured_not_lost(size: float) -> None:
    D = rng.normal(size=(7, 3))
    D *= np.linalg.norm(B @ A) * size / np.linalg.norm(D @ A)
    found = largest(adapter(m=loralens.LowRank(B, A)), adapter(m=loralens.LowRank(B + D, A)))
    dense = np.linalg.norm(D @ A) / max(np.linalg.norm(B @ A), np.linalg.norm((B + D) @ A))
    assert found == pytest.approx(dense, rel=1e-2 if size < 1e-9 else 1e-6)


def test_missing_and_misshapen_modules() -> None:
    one = adapter(m=loralens.LowRank(B, A), dead=loralens.LowRank(0 * B, A))
    two = adapter(m=loralens.LowRank(A.T, B.T), extra=loralens.LowRank(B, A))
    found = {d.name: (d.relative, d.note) for d in differences(one, two)}
    assert found["dead"] == (0.0, "only in the first")
    assert found["extra"] == (1.0, "only in the second")
    assert found["m"][0] == np.inf


def test_structured_against_a_pair() -> None:
    dense = Structured(Dense(LazyArray.of(B @ A)), 2.0)
    assert largest(adapter(m=dense), adapter(m=loralens.LowRank(B, A, 2.0))) < 1e-14
    assert largest(adapter(m=dense), adapter(m=loralens.LowRank(B, A, 2.2))) > 0.09


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_is_no_difference_but_an_error_whatever_the_form(value: float) -> None:
    spoilt = B.copy()
    spoilt[0, 0] = value
    fine, pair = adapter(m=loralens.LowRank(B, A)), adapter(m=loralens.LowRank(spoilt, A))
    with np.errstate(invalid="ignore"):
        dense = adapter(m=Structured(Dense(LazyArray.of(spoilt @ A))))
    whole = adapter(m=Structured(Dense(LazyArray.of(B @ A))))
    for one, two in ((fine, pair), (fine, dense), (dense, whole), (whole, pair)):
        with pytest.raises(FormatError, match="m: a factor holds NaN"):
            differences(one, two)


def test_a_difference_is_in_units_of_the_larger_of_two_matrices_in_full() -> None:
    """One of the two is no pair and twice as long; whichever comes first."""
    large = adapter(m=Structured(Dense(LazyArray.of(2 * B @ A)), 1.0))
    small = adapter(m=loralens.LowRank(B, A))
    assert largest(large, small) == pytest.approx(0.5)
    assert largest(small, large) == pytest.approx(0.5)
