"""Average linkage and connected components, against SciPy."""

import numpy as np
import pytest
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial.distance import squareform

from loralens.linalg.pairwise import average_linkage_groups, join_pairs


def as_sets(labels: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(labels == label).tolist()) for label in set(labels.tolist())}


def cosines(count: int, seed: int, width: int = 6) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, width))
    rows /= np.linalg.norm(rows, axis=1)[:, None]
    return np.asarray(rows @ rows.T)


@pytest.mark.parametrize("at", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("count", [2, 3, 17, 120])
def test_groups_are_those_of_scipy(count: int, at: float) -> None:
    for seed in range(10):
        similarity = cosines(count, seed)
        distance = np.clip(1 - similarity, 0, None)
        np.fill_diagonal(distance, 0)
        expected = fcluster(linkage(squareform(distance, checks=False), "average"), 1 - at, "distance")
        found = average_linkage_groups(similarity.astype(np.float32), at)
        assert as_sets(found) == as_sets(expected)
        assert all(label == min(group) for group in as_sets(found) for label in found[list(group)])


def test_a_row_that_stands_for_several_weighs_as_much_as_they_do() -> None:
    # Three rows a, a, a and b, c: joined beforehand, the three count three times in every mean.
    rows = np.array([[1, 0], [1, 0], [1, 0], [0.8, 0.6], [0.1, np.sqrt(0.99)]])
    whole = rows @ rows.T
    # a with b: 0.8; with c: 0.1. b with c: 0.677. The mean of c with a, a, a, b is 0.244, and unweighted 0.389.
    joined = np.array([[1, 0.8, 0.1], [0.8, 1, whole[3, 4]], [0.1, whole[3, 4], 1]], np.float32)
    assert as_sets(average_linkage_groups(whole.astype(np.float32), 0.3)) == {frozenset({0, 1, 2, 3}), frozenset({4})}
    sizes = np.array([3, 1, 1])
    assert as_sets(average_linkage_groups(joined.copy(), 0.3, sizes=sizes)) == {frozenset({0, 1}), frozenset({2})}
    assert as_sets(average_linkage_groups(joined.copy(), 0.3)) == {frozenset({0, 1, 2})}


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_to_join(count: int) -> None:
    assert average_linkage_groups(np.ones((count, count), np.float32), 0.5).tolist() == list(range(count))


def test_components_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows, columns = rng.integers(60, size=(2, 40))
        labels = np.arange(60)
        # In several portions, as blocks of a matrix bring them.
        for part in np.array_split(np.arange(40), 4):
            join_pairs(labels, rows[part], columns[part])
        graph = coo_array((np.ones(40), (rows, columns)), shape=(60, 60))
        expected = connected_components(graph, directed=False)[1]
        assert as_sets(labels) == as_sets(expected)
        assert all(labels[i] <= i for i in range(60))
