"""All pairs at once are all pairs one by one, however they are blocked."""

import numpy as np
import pytest

from loralens.linalg.pairwise import (
    SAME,
    Segments,
    outside_parts,
    pairwise_cosines,
    pairwise_overlaps,
    pairwise_products,
    segment_sums,
)
from tests.draws import draw_basis
from tests.tolerances import COLLECTION

WIDTHS = (3, 0, 1, 5, 2, 0)


def triplets(rng: np.random.Generator) -> list[tuple[np.ndarray, ...]]:
    return [(draw_basis(rng, 9, k), rng.random(k) + 0.1, draw_basis(rng, 7, k)) for k in WIDTHS]


def test_segment_sums_know_empty_segments() -> None:
    M = np.arange(12.0).reshape(3, 4)
    found = segment_sums(M, np.array([0, 0, 2, 3, 3]), np.array([0, 1, 1, 4]))
    assert found.tolist() == [[0, 0, 0], [4, 0, 24], [8, 0, 30], [0, 0, 0]]
    assert segment_sums(np.zeros((0, 4)), np.array([0, 0]), np.array([0, 4])).tolist() == [[0]]


@pytest.mark.parametrize("limit", [1, 100, 10**9])
@pytest.mark.parametrize("head", [None, 1, 2])
def test_products_are_those_of_the_dense_matrices(limit: int, head: int | None) -> None:
    parts = triplets(np.random.default_rng(0))
    size = 16 * max(WIDTHS)
    inner, left, right = pairwise_products([lambda part=part: part for part in parts], size, head=head, limit=limit)
    for i, (U, s, V) in enumerate(parts):
        for j, (other_U, other_s, other_V) in enumerate(parts):
            dense = np.vdot((U * s) @ V.T, (other_U * other_s) @ other_V.T)
            assert inner[i, j] == pytest.approx(dense, abs=COLLECTION)
            for squares, X, Y in ((left, U, other_U), (right, V, other_V)):
                assert squares[i, j] == pytest.approx(np.linalg.norm(X[:, :head].T @ Y[:, :head]) ** 2, abs=COLLECTION)
    lefts = pairwise_overlaps([lambda part=part: part[0] for part in parts], size, head=head, limit=limit)
    np.testing.assert_allclose(lefts, left, atol=COLLECTION)


@pytest.mark.parametrize("limit", [1, 10**9])
def test_cosines_of_vectors_of_any_size_and_of_zero(limit: int) -> None:
    rng = np.random.default_rng(1)
    vectors = [rng.standard_normal((2, 3)) * size for size in (1.0, 1e-100, 1e100)] + [np.zeros((2, 3))]
    found = pairwise_cosines([lambda x=x: x for x in vectors], 6, limit=limit)
    a, b = vectors[0].ravel(), 1e-100 * vectors[2].ravel()
    assert found[0, 2] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=COLLECTION)
    assert np.isnan(found[3]).all()
    np.testing.assert_array_equal(found, found.T)


def projection(parts: list[np.ndarray]) -> np.ndarray:
    U, s, _ = np.linalg.svd(np.hstack(parts), full_matrices=False)
    return U[:, s > SAME] @ U[:, s > SAME].T


def cases() -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(3)
    free = [draw_basis(rng, 20, k) for k in (3, 0, 1, 4)]
    turned = free[0] @ draw_basis(rng, 3, 3)
    near = np.linalg.qr(free[0] + 1e-4 * rng.standard_normal(free[0].shape))[0]
    twin = np.linalg.qr(free[0] + 1e-9 * rng.standard_normal(free[0].shape))[0]
    wide = [draw_basis(rng, 6, k) for k in (3, 2, 4, 2)]
    half = np.linalg.qr(np.hstack([free[3][:, :2], rng.standard_normal((20, 2))]))[0]
    return {
        "independent": free,
        "the same span": [*free, turned],
        "nearly the same span": [*free, near],
        "the same but for rounding": [*free, twin],
        "half shared": [*free, half],
        "more than there is room for": wide,
        "just enough to fill it": [draw_basis(rng, 6, k) for k in (3, 2, 1, 2)],
        "one alone": [draw_basis(rng, 5, 2)],
    }


@pytest.mark.parametrize("name", cases())
def test_outside_is_what_the_projection_on_the_others_leaves(name: str) -> None:
    parts = cases()[name]
    for t, (N, rank) in enumerate(outside_parts(Segments.of(parts))):
        others = [part for i, part in enumerate(parts) if i != t]
        P = projection(others) if others else np.zeros((len(parts[0]),) * 2)
        np.testing.assert_allclose(N, parts[t].T @ (np.eye(len(P)) - P) @ parts[t], atol=COLLECTION)
        assert rank == round(np.trace(P))
