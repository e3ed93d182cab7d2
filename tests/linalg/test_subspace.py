"""φ, principal angles, distances and CKA against dense matrices and 100 digits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralens.linalg import Basis, linear_cka, phi_map, principal_angles, product_bases
from loralens.linalg.subspace import Overlap, unit_energies, update_cosine, vector_cosine
from tests import reference
from tests.draws import draw_basis
from tests.marks import examples
from tests.tolerances import ANGLE, SIMILARITY


def overlap_of(first, second):
    return Overlap.of(first, second, first.cross(second))


@st.composite
def bases(draw):
    n = draw(st.integers(1, 24))
    k1, k2 = draw(st.integers(1, n)), draw(st.integers(1, n))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    U = draw_basis(rng, n, k1)
    near = np.hstack([U, rng.standard_normal((n, n))])[:, :k2] + 1e-7 * rng.standard_normal((n, k2))
    return U, draw(st.sampled_from([draw_basis(rng, n, k2), np.linalg.qr(near)[0]]))


@given(bases())
@examples(60)
def test_phi_and_distances_are_those_of_the_formulas(pair):
    U, V = pair
    found = overlap_of(Basis.of(U), Basis.of(V))
    np.testing.assert_allclose(found.phi, reference.phi_of(U, V), atol=SIMILARITY)
    p = min(U.shape[1], V.shape[1])
    assert found.full == pytest.approx(1 - found.projection_distance**2 / p, abs=SIMILARITY)
    assert found.full == pytest.approx(np.mean(np.cos(found.angles) ** 2), abs=SIMILARITY)
    assert found.gap == pytest.approx(np.sin(found.angles.max()), abs=SIMILARITY)
    assert found.geodesic_distance == pytest.approx(np.sqrt(np.sum(found.angles**2)), abs=SIMILARITY)
    assert found.angles.shape == (p,)
    assert np.all(np.diff(found.angles) >= -SIMILARITY)
    np.testing.assert_allclose(overlap_of(Basis.of(V), Basis.of(U)).phi, found.phi.T, atol=SIMILARITY)


@pytest.mark.parametrize("angle", [1e-12, 1e-9, 1e-5, 0.02, 0.141, 0.142, 0.8, np.pi / 2])
@pytest.mark.parametrize("swapped", [False, True])
def test_a_small_angle_is_not_lost(angle, swapped):
    Q = draw_basis(3, 30, 6)
    U, V = Q[:, :3], np.column_stack([np.cos(angle) * Q[:, 0] + np.sin(angle) * Q[:, 3], Q[:, 4]])
    first, second = (V, U) if swapped else (U, V)
    found = principal_angles(Basis.of(first), Basis.of(second))
    np.testing.assert_allclose(found, [angle, np.pi / 2], **ANGLE)


def test_angles_agree_with_100_digits_at_every_size():
    rng = np.random.default_rng(5)
    wanted = np.array([1e-11, 1e-7, 1e-3, 0.1, 0.3, 1.0])
    Q = draw_basis(rng, 20, 12)
    U, V = Q[:, :6], Q[:, :6] * np.cos(wanted) + Q[:, 6:] * np.sin(wanted)
    V = V @ draw_basis(rng, 6, 6)
    exact = reference.exact_angles(U, V)
    np.testing.assert_allclose(principal_angles(Basis.of(U), Basis.of(V)), exact, rtol=1e-9, atol=1e-15 * 20)
    np.testing.assert_allclose(exact, wanted, rtol=1e-4)


def test_chance_is_max_over_n_and_z_counts_standard_deviations():
    rng = np.random.default_rng(11)
    n, k1, k2 = 40, 3, 5
    maps = [phi_map(reference.haar_corner(rng, n, (k1, k2))) for _ in range(2000)]
    found = overlap_of(Basis.of(draw_basis(rng, n, k1)), Basis.of(draw_basis(rng, n, k2)))
    np.testing.assert_allclose(np.mean(maps, axis=0), found.chance, rtol=0.1)
    assert (found.full_chance, found.chance[0, 0]) == (k2 / n, 1 / n)
    full = np.array([one[-1, -1] for one in maps])
    assert found.z == pytest.approx((found.full - k2 / n) / full.std(), rel=0.06)


def test_what_is_empty_or_everything_has_no_z():
    U = draw_basis(np.random.default_rng(1), 6, 6)
    nothing = overlap_of(Basis.of(U[:, :0]), Basis.of(U))
    assert nothing.phi.shape == (0, 6)
    assert nothing.angles.shape == (0,)
    assert all(np.isnan(x) for x in (nothing.first, nothing.full, nothing.full_chance, nothing.z))
    assert (nothing.projection_distance, nothing.geodesic_distance, nothing.gap) == (0.0, 0.0, 0.0)
    assert np.isnan(overlap_of(Basis.of(U), Basis.of(U[:, :2])).z)


def test_cosine_and_cka_are_those_of_the_dense_matrices():
    rng = np.random.default_rng(2)
    for size in (1.0, 1e-140, 1e140):
        factors = [(rng.standard_normal((9, r)) * size, rng.standard_normal((r, 7))) for r in (3, 5)]
        one, two = (product_bases(B, A) for B, A in factors)
        L, R = one[0].cross(two[0]), one[2].cross(two[2])
        energies = unit_energies(one[1]), unit_energies(two[1])
        D1, D2 = (B / size @ A for B, A in factors)
        assert update_cosine(one[1], two[1], L, R) == pytest.approx(reference.dense_cosine(D1, D2), abs=SIMILARITY)
        assert linear_cka(*energies, R) == pytest.approx(reference.dense_cka(D1, D2, "in"), abs=SIMILARITY)
        assert linear_cka(*energies, L) == pytest.approx(reference.dense_cka(D1, D2, "out"), abs=SIMILARITY)


def test_chance_of_cka_is_the_mean_over_random_directions():
    rng = np.random.default_rng(4)
    s1, s2, n = np.array([3.0, 1.0]), np.array([2.0, 1.5, 0.5]), 30
    energies = unit_energies(s1), unit_energies(s2)
    drawn = [linear_cka(*energies, reference.haar_corner(rng, n, (2, 3))) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(energies[0].sum() * energies[1].sum() / n, rel=0.05)


def test_what_is_zero_has_cosine_0_and_no_cka():
    s, none = np.ones(2), np.zeros(0)
    assert update_cosine(s, none, np.zeros((2, 0)), np.zeros((2, 0))) == 0.0
    assert np.isnan(linear_cka(none, s, np.zeros((0, 2))))


@pytest.mark.parametrize("size", [1.0, 1e-100, 1e100])
def test_cosine_of_vectors_of_any_size(size):
    X, Y = np.array([[3.0, 4.0], [0.0, 0.0]]), np.array([[4.0, 3.0], [0.0, 0.0]])
    assert vector_cosine(size * X, Y) == pytest.approx(24 / 25)
    assert vector_cosine(X.T, -Y.T) == pytest.approx(-24 / 25)
    assert np.isnan(vector_cosine(0 * X, Y))
