"""Singular values, SVD and norm of B A: laws, dense and 100-digit references, and every route."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralens import FormatError, ShapeError
from loralens.linalg import factor as thin
from loralens.linalg import product, product_bases, product_norm, product_singular_values, product_svd
from loralens.linalg.factor import cross_gram, gram
from loralens.linalg.product import column_basis
from tests import reference
from tests.draws import draw_basis, draw_factors
from tests.strategies import DTYPES, ORDERS, factor_pairs, grading, orthogonal, plain, rotated
from tests.tolerances import ANY_FACTORS, BACKWARD, IMPLICIT, ORTHONORMAL, RECONSTRUCTION, RELATIVE

ROWS = thin.BLOCK // 4  # more rows than a block of four columns or more has


def random_pair(seed=0, m=40, n=30, r=7):
    rng = np.random.default_rng(seed)
    return rng, *draw_factors(rng, m, n, r)


def routes(B, A):
    """The route taken to the triangle of B and of Aᵀ."""
    left, right = thin.measure(B), thin.measure(A.T)
    order, D, _ = product._sort_by_strength(left, right)
    return tuple(thin.triangle(factor, order[D > 0])[0] for factor in (left, right))


def hidden(decades, seed=0, m=40, n=30, r=7):
    """Factors whose grading a rotation hides: B G Q and Qᵀ G A."""
    rng, B, A = random_pair(seed, m, n, r)
    Q, g = orthogonal(rng, r), grading(rng, r, decades, "falling")
    return B * g @ Q, Q.T @ (g[:, None] * A)


# singular values


@given(factor_pairs())
def test_values_are_those_of_the_dense_product(pair):
    B, A = pair
    before = B.tobytes(), A.tobytes()
    s = product_singular_values(B, A)
    assert (B.tobytes(), A.tobytes()) == before
    assert s.dtype == np.float64
    assert s.shape == (min(*B.shape, A.shape[1]),)
    assert (s[:-1] >= s[1:]).all()
    expected = reference.dense_singular_values(B, A)
    np.testing.assert_allclose(s, expected[: s.size], rtol=0, atol=ANY_FACTORS * reference.size(B, A))
    assert s.tobytes() == product_singular_values(B, A).tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
def test_well_conditioned_values_are_accurate_relative_to_themselves(dtype):
    _, B, A = random_pair()
    B, A = B.astype(dtype), A.astype(dtype)
    assert routes(B, A) == ("cholesky", "cholesky")
    np.testing.assert_allclose(product_singular_values(B, A), reference.exact_values_of_full_rank(B, A), rtol=RELATIVE)


@pytest.mark.some(12)
@pytest.mark.parametrize("order_A", ORDERS)
@pytest.mark.parametrize("order_B", ORDERS)
@pytest.mark.parametrize(("decades_B", "decades_A"), [(8, 0), (0, 8), (8, 8)])
def test_graded_values_are_accurate_relative_to_themselves(decades_B, decades_A, order_B, order_A):
    rng, B, A = random_pair(3)
    B, A = B * grading(rng, 7, decades_B, order_B), grading(rng, 7, decades_A, order_A)[:, None] * A
    exact = reference.exact_values_of_full_rank(B, A)
    np.testing.assert_allclose(product_singular_values(B, A), exact, rtol=RELATIVE)
    np.testing.assert_allclose(product_svd(B, A)[1], exact, rtol=RELATIVE)
    np.testing.assert_allclose(product_norm(B, A), reference.frobenius(exact), rtol=RELATIVE)
    assert routes(B, A) == ("cholesky", "cholesky")


@pytest.mark.parametrize("decades", [3, 4, 6, 8, 10, 13])
def test_a_hidden_grading_costs_no_more_than_a_backward_error(decades):
    B, A = hidden(decades)
    exact, unit = reference.exact_values_of_full_rank(B, A), reference.size(B, A)
    assert "cholesky" not in routes(B, A)
    np.testing.assert_allclose(product_singular_values(B, A), exact, rtol=0, atol=BACKWARD * unit)
    np.testing.assert_allclose(product_svd(B, A)[1], exact, rtol=0, atol=BACKWARD * unit)


def test_the_gram_matrix_alone_would_lose_a_hidden_grading(monkeypatch):
    rng, B, A = random_pair(5)
    B = B * grading(rng, 7, 7, "falling") @ orthogonal(rng, 7)
    exact, unit = reference.exact_values_of_full_rank(B, A), reference.size(B, A)
    monkeypatch.setattr(thin, "CONDITION_LIMIT", 1e30)
    assert routes(B, A) == ("cholesky", "cholesky")
    assert np.abs(product_singular_values(B, A) - exact).max() > 1e3 * BACKWARD * unit


# the routes


@pytest.mark.parametrize(
    ("decades", "route"), [(0, "cholesky"), (1, "cholesky"), (3, "rotated"), (8, "rotated"), (14, "householder")]
)
def test_each_route_is_taken_and_gives_a_triangle_of_the_factor(decades, route):
    B, _ = hidden(decades, m=60, r=9)
    factor, order = thin.measure(B), np.random.default_rng(1).permutation(9)
    taken, R = thin.triangle(factor, order)
    assert taken == route
    X = (B / np.linalg.norm(B, axis=0))[:, order]
    np.testing.assert_allclose(R.T @ R, X.T @ X, rtol=0, atol=ANY_FACTORS)
    np.testing.assert_array_equal(R, np.triu(R))


def test_more_columns_than_rows_go_to_householder():
    _, B, A = random_pair(m=5, n=30, r=7)
    assert routes(B, A) == ("householder", "cholesky")


def test_the_free_bound_on_the_condition_is_never_wrong():
    """`_cholesky` accepts what κ(R) ≤ limit, and nothing else."""
    rng = np.random.default_rng(2)
    for r in (1, 2, 5, 20):
        for decades in (0, 0.5, 1, 2, 3):
            X = draw_basis(rng, 40, r) * grading(rng, r, decades, "falling") @ orthogonal(rng, r)
            X /= np.linalg.norm(X, axis=0)
            kappa = np.linalg.cond(X)
            assert thin._cholesky(X.T @ X, 1.001 * kappa) is not None
            assert r == 1 or thin._cholesky(X.T @ X, 0.999 * kappa) is None


def test_equal_columns_and_rows_are_no_obstacle():
    B, A = np.ones((30, 5)), np.ones((5, 20))
    s = product_singular_values(B, A)
    U = product_svd(B, A)[0]
    np.testing.assert_allclose(U.T @ U, np.eye(5), rtol=0, atol=ORTHONORMAL)
    np.testing.assert_allclose(s, [5 * np.sqrt(600), 0, 0, 0, 0], rtol=RELATIVE, atol=BACKWARD * reference.size(B, A))


# laws


@given(factor_pairs(dtypes=(np.float64,)), st.integers(-600, 600), st.integers(-400, 400))
def test_powers_of_two_move_between_the_factors_exactly(pair, in_B, in_both):
    """Also where the squares of the entries, or those of their product, over- or underflow."""
    B, A = pair
    s = product_singular_values(B, A)
    moved = product_singular_values(np.ldexp(B, in_B), np.ldexp(A, in_both - in_B))
    np.testing.assert_allclose(
        moved, np.ldexp(s, in_both), rtol=0, atol=np.ldexp(ANY_FACTORS * reference.size(B, A), in_both)
    )


def test_columns_of_wildly_different_size_are_each_kept():
    """Orthogonal columns and rows, so the σ are ‖b_k‖‖a_k‖; their squares leave the range of float64."""
    rng = np.random.default_rng(7)
    B = draw_basis(rng, 40, 4) * [1e200, 1e-250, 1e-3, 0.0]
    A = draw_basis(rng, 30, 4).T * [[1e-200], [1e190], [1e-150], [1e300]]
    np.testing.assert_allclose(product_singular_values(B, A), [1, 1e-60, 1e-153, 0], rtol=RELATIVE)
    U, s, _ = product_svd(B, A)
    np.testing.assert_allclose(s, [1, 1e-60, 1e-153, 0], rtol=RELATIVE)
    np.testing.assert_allclose(U.T @ U, np.eye(4), rtol=0, atol=ORTHONORMAL)


@pytest.mark.parametrize("shift", [-530, 530])
def test_squares_that_just_leave_the_range_of_float64_cost_no_digits(shift):
    """2**-1060 is subnormal: the Gram matrix would keep four digits of it."""
    _, B, A = random_pair()
    s = product_singular_values(B, A)
    np.testing.assert_allclose(product_singular_values(np.ldexp(B, shift), A), np.ldexp(s, shift), rtol=RELATIVE)
    np.testing.assert_allclose(product_svd(B, np.ldexp(A, shift))[1], np.ldexp(s, shift), rtol=RELATIVE)


# SVD


@given(factor_pairs())
def test_svd_is_an_svd_of_the_product(pair):
    B, A = pair
    before = B.tobytes(), A.tobytes()
    U, s, Vh = product_svd(B, A)
    assert (B.tobytes(), A.tobytes()) == before
    m, n, k = B.shape[0], A.shape[1], min(*B.shape, A.shape[1])
    assert [x.shape for x in (U, s, Vh)] == [(m, k), (k,), (k, n)]
    assert {x.dtype for x in (U, s, Vh)} == {np.dtype(np.float64)}
    unit = reference.size(B, A)
    np.testing.assert_allclose(U * s @ Vh, reference.dense_product(B, A), rtol=0, atol=RECONSTRUCTION * unit)
    np.testing.assert_allclose(U.T @ U, np.eye(k), rtol=0, atol=ORTHONORMAL)
    np.testing.assert_allclose(Vh @ Vh.T, np.eye(k), rtol=0, atol=ORTHONORMAL)
    np.testing.assert_allclose(s, product_singular_values(B, A), rtol=0, atol=ANY_FACTORS * unit)


@given(factor_pairs(cases=(plain, rotated)))
def test_signs_are_canonical(pair):
    U = product_svd(*pair)[0]
    largest = np.abs(U).argmax(axis=0)
    assert (U[largest, np.arange(U.shape[1])] > 0).all()


def test_a_tie_of_signs_goes_to_the_first_entry():
    U, s, Vh = product_svd(np.array([[-1.0], [1.0]]), np.array([[3.0, 4.0]]))
    np.testing.assert_allclose(U, np.sqrt([[0.5], [0.5]]) * [[1], [-1]], rtol=RELATIVE)
    np.testing.assert_allclose(U * s @ Vh, [[-3, -4], [3, 4]], rtol=RELATIVE)


# norm


def test_norm_survives_columns_that_cancel_in_the_product():
    _, B, A = random_pair(m=40, n=30, r=1)
    tiny = 1e-10 * np.random.default_rng(9).standard_normal((1, 30))
    B, A = np.hstack([B, B]), np.vstack([A, tiny - A])
    exact = np.linalg.norm(B[:, 0]) * np.linalg.norm(A.sum(axis=0))
    assert product_norm(B, A) == pytest.approx(exact, abs=BACKWARD * reference.size(B, A))
    assert product_norm(B, A) == pytest.approx(exact, rel=1e-4)


# blocks, memory, edges


@pytest.mark.parametrize("dtype", [*DTYPES, ml_dtypes.float8_e4m3fn])
def test_gram_of_many_blocks_in_any_layout(dtype):
    X = np.random.default_rng(1).standard_normal((2 * ROWS + 17, 3)).astype(dtype)
    dense = X.astype(np.float64).T @ X.astype(np.float64)
    np.testing.assert_allclose(gram(X), dense, rtol=RELATIVE, atol=RELATIVE * len(X))
    np.testing.assert_allclose(gram(np.ascontiguousarray(X.T).T), dense, rtol=RELATIVE, atol=RELATIVE * len(X))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16])
def test_cross_gram_of_many_blocks_and_of_two_widths_and_dtypes(dtype):
    rng = np.random.default_rng(2)
    X, Y = rng.standard_normal((2 * ROWS + 17, 7)).astype(dtype), rng.standard_normal((2 * ROWS + 17, 3))
    dense = X.astype(np.float64).T @ Y
    for one in (X, np.ascontiguousarray(X.T).T):
        np.testing.assert_allclose(cross_gram(one, Y), dense, rtol=0, atol=RELATIVE * len(X))
        np.testing.assert_allclose(cross_gram(Y, one), dense.T, rtol=0, atol=RELATIVE * len(X))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("function", [product_singular_values, product_svd, product_norm])
def test_nan_and_inf_are_refused_in_either_factor(function, dtype, bad):
    _, B, A = random_pair()
    for X in (B, A):
        kept, X[2, 3] = X[2, 3], bad
        with pytest.raises(FormatError, match="NaN or Inf"):
            function(B.astype(dtype), A.astype(dtype))
        X[2, 3] = kept


@pytest.mark.parametrize(
    ("B", "A"), [((4, 3), (2, 5)), ((4,), (4, 5)), ((4, 3), (3,)), ((2, 4, 3), (3, 5)), ((4, 1), (3, 5))]
)
@pytest.mark.parametrize("function", [product_singular_values, product_svd, product_norm])
def test_shapes_that_do_not_multiply_are_refused(function, B, A):
    with pytest.raises(ShapeError, match="do not multiply"):
        function(np.ones(B), np.ones(A))


@pytest.mark.parametrize(("m", "r", "n"), [(4, 0, 5), (0, 3, 5), (4, 3, 0), (0, 0, 0)])
def test_empty_factors_have_no_singular_values(m, r, n):
    B, A = np.ones((m, r)), np.ones((r, n))
    assert product_singular_values(B, A).shape == (0,)
    assert [x.shape for x in product_svd(B, A)] == [(m, 0), (0,), (0, n)]
    assert product_norm(B, A) == 0


@given(factor_pairs())
def test_bases_are_those_of_the_svd_without_the_directions_that_have_no_length(pair):
    B, A = pair
    left, s, right = product_bases(B, A)
    assert left.k == s.size == right.k <= min(*B.shape, A.shape[1])
    unit = reference.size(B, A)
    U, Vh = left.columns(), right.columns().T
    np.testing.assert_allclose((U * s) @ Vh, reference.dense_product(B, A), rtol=0, atol=1e3 * RECONSTRUCTION * unit)
    for basis, Q in ((left, U), (right, Vh.T)):
        np.testing.assert_allclose(Q.T @ Q, np.eye(s.size), rtol=0, atol=IMPLICIT)
        np.testing.assert_allclose(basis.cross(basis), np.eye(s.size), rtol=0, atol=IMPLICIT)


@given(factor_pairs())
def test_a_column_basis_is_that_of_the_factor_alone(pair):
    X = pair[0]
    basis, s = column_basis(X)
    exact = np.linalg.svd(X.astype(np.float64), compute_uv=False)[: s.size]
    np.testing.assert_allclose(s, exact, rtol=0, atol=ANY_FACTORS * exact.max(initial=0))
    Q = basis.columns()
    np.testing.assert_allclose(Q.T @ Q, np.eye(s.size), rtol=0, atol=IMPLICIT)
    if s.size and (s[0] < 1e6 * s[-1]):
        np.testing.assert_allclose(Q @ (Q.T @ X.astype(np.float64)), X.astype(np.float64), rtol=0, atol=1e-9 * s[0])
