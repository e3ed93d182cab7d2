"""Norms and ranks of a spectrum: numbers known by hand, a slow reference, and the laws they obey."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralens import OptionError
from loralens.linalg import measures
from tests import reference
from tests.strategies import spectra
from tests.tolerances import MEASURE

RANKS = {
    "numerical_rank": lambda s: measures.numerical_rank(s, (100, 50)),
    "stable_rank": measures.stable_rank,
    "effective_rank": measures.effective_rank,
    "effective_rank_energy": measures.effective_rank_energy,
    "participation_ratio": measures.participation_ratio,
    "energy_rank": lambda s: measures.energy_rank(s, 0.9),
}
NORMS = {"frobenius": measures.frobenius, "spectral": measures.spectral, "nuclear": measures.nuclear}


def test_numbers_known_by_hand():
    s = np.array([4.0, 3.0])
    assert [measures.spectral(s), measures.frobenius(s), measures.nuclear(s)] == pytest.approx([4, 5, 7])
    assert measures.stable_rank(s) == pytest.approx(25 / 16)
    assert measures.participation_ratio(s) == pytest.approx(625 / 337)
    assert measures.effective_rank(s) == pytest.approx((7 / 4) ** (4 / 7) * (7 / 3) ** (3 / 7))
    assert measures.effective_rank_energy(s) == pytest.approx((25 / 16) ** (16 / 25) * (25 / 9) ** (9 / 25))
    assert [measures.energy_rank(s, f) for f in (0.63, 0.64, 0.65, 1.0)] == [1, 1, 2, 2]


@given(spectra())
def test_measures_are_those_of_the_reference(s):
    assert measures.frobenius(s) == pytest.approx(reference.frobenius(s), rel=MEASURE)
    assert measures.nuclear(s) == pytest.approx(reference.nuclear(s), rel=MEASURE)
    assert measures.spectral(s) == s[0]
    assert measures.numerical_rank(s, (7, 900)) == reference.numerical_rank(s, (7, 900))
    assert measures.stable_rank(s) == pytest.approx(reference.stable_rank(s), rel=MEASURE)
    assert measures.effective_rank(s) == pytest.approx(reference.effective_rank(s), rel=MEASURE)
    assert measures.effective_rank_energy(s) == pytest.approx(reference.effective_rank(s, 2), rel=MEASURE)
    assert measures.participation_ratio(s) == pytest.approx(reference.participation_ratio(s), rel=MEASURE)


@given(spectra(), st.floats(0.01, 0.999999))
def test_energy_rank_is_the_smallest_that_keeps_the_fraction(s, fraction):
    """Up to two roundings: a fraction missed by less counts as kept."""
    k = measures.energy_rank(s, fraction)
    assert reference.energy_rank(s, fraction * (1 - MEASURE)) <= k <= reference.energy_rank(s, fraction)


@pytest.mark.parametrize("name", RANKS)
@pytest.mark.parametrize("scale", [0.1, 2.0**-1000, 2.0**1000])
def test_ranks_do_not_change_with_scale(name, scale):
    s = np.array([5.0, 4.0, 1.0, 1e-3])
    assert RANKS[name](scale * s) == pytest.approx(RANKS[name](s), rel=MEASURE)


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("scale", [0.1, 2.0**-1000, 2.0**1000])
def test_norms_scale(name, scale):
    s = np.array([5.0, 4.0, 1.0, 1e-3])
    assert NORMS[name](scale * s) == pytest.approx(scale * NORMS[name](s), rel=MEASURE)


@pytest.mark.parametrize("name", [*RANKS, *NORMS])
@pytest.mark.parametrize("size", [0, 1, 4])
def test_everything_is_zero_for_a_zero_spectrum(name, size):
    assert {**RANKS, **NORMS}[name](np.zeros(size)) == 0


def test_numerical_rank_has_its_threshold_at_max_shape_eps():
    s = np.array([1.0, 201 * 2.0**-52, 199 * 2.0**-52])
    assert measures.numerical_rank(s, (200, 3)) == 2
    assert measures.numerical_rank(s, (3, 200)) == 2
    assert measures.numerical_rank(s, (3, 3)) == 3
    assert measures.numerical_rank(np.array([1.0, 200 * 2.0**-52]), (200, 3)) == 1


@pytest.mark.parametrize(
    ("s", "fraction", "k"), [([3, 1], 0.9, 1), ([0.3, 0.1], 0.9, 1), ([0.7, 0.1, 0.1], 50 / 51, 2)]
)
def test_a_fraction_met_exactly_is_met_whatever_the_rounding(s, fraction, k):
    assert measures.energy_rank(np.array(s, dtype=float), fraction) == k


def test_a_whole_fraction_keeps_every_nonzero_value():
    assert measures.energy_rank(np.array([1.0, 1e-9, 1e-200, 0.0]), 1.0) == 3
    assert measures.energy_rank(np.array([1.0, 1e-9, 1e-200, 0.0]), 1 - 1e-15) == 1


def test_energies_that_underflow_are_no_obstacle():
    s = np.array([1.0, 1e-200])
    assert measures.effective_rank_energy(s) == measures.participation_ratio(s) == 1


def test_a_tail_of_many_small_values_counts():
    """Summed from the large end, each of them would vanish in the sum."""
    s = np.array([1.0] + [1e-8] * 10000)
    assert measures.energy_rank(s, 1 - 5e-13) == pytest.approx(1 + 5000, abs=10)  # two roundings are four of them


@pytest.mark.parametrize("fraction", [0, -0.1, 1.0001, float("nan"), float("inf")])
def test_a_fraction_outside_its_range_is_refused(fraction):
    with pytest.raises(OptionError, match="fraction"):
        measures.energy_rank(np.array([1.0]), fraction)
