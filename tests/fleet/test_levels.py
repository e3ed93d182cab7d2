"""Levels of likeness, and the chance levels that are stated, against draws."""

import numpy as np
import pytest

import loralens
from loralens.fleet.likeness import ChanceLevels, ExactUpdate, exact_cosine, level_of
from tests.fleet.synthetic import adapter_of, dense_cosine, random_factors


def updates_of(adapters: list[loralens.Adapter]) -> list[ExactUpdate]:
    return [ExactUpdate.of(one) for one in adapters]


@pytest.mark.slow
def test_the_spread_of_exact_cosines_is_that_of_random_directions() -> None:
    rng = np.random.default_rng(0)
    adapters = [adapter_of(random_factors(rng)) for _ in range(60)]
    updates = updates_of(adapters)
    pairs = [(i, j) for i in range(60) for j in range(i)]
    cosines = [dense_cosine(adapters[i], adapters[j])[0] for i, j in pairs]
    stated = np.mean([exact_cosine(updates[i], updates[j]).spread for i, j in pairs])
    # 1,770 pairs of 60 adapters: the standard deviation is known to about 3 %.
    assert np.std(cosines) == pytest.approx(stated, rel=0.1)
    assert abs(np.mean(cosines)) < stated / 5
    # The largest of 59 is about √(2 ln 59) standard deviations.
    largest = np.mean([max(c for c, (i, j) in zip(cosines, pairs, strict=True) if k in (i, j)) for k in range(60)])
    assert largest == pytest.approx(ChanceLevels(float(stated), 59).largest, rel=0.25)


@pytest.mark.parametrize(
    ("cosine", "start", "copy", "level"),
    [
        (0.999, 0.9, True, "copy"), (0.999, 0.9, False, "run"), (0.999, 0.1, False, "family"),
        (0.5, 0.0, False, "family"), (0.49, 0.0, False, "similar"), (0.2, 0.0, False, "similar"),
        (0.19, 0.0, False, ""), (-0.9, 0.0, False, ""), (0.1, 0.5, False, "run"),
    ],
)  # fmt: skip
def test_levels(cosine: float, start: float, copy: bool, level: str) -> None:
    assert level_of(cosine, start=start, copy=copy) == level
