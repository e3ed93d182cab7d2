"""Average linkage of a matrix of similarities, cut at a level, and connected components of a graph of pairs."""

import numpy as np
from numpy.typing import NDArray

from loralens.linalg.factor import Integers

Singles = NDArray[np.float32]


def average_linkage_groups(similarity: Singles, at: float, *, sizes: Integers | None = None) -> Integers:
    """The groups of average linkage that remain if the tree is cut at a similarity.

    Parameters
    ----------
    similarity : float32 array, shape (n, n)
        Symmetric. It is overwritten.
    at : float
        Two groups are joined while the mean similarity between their members is at least ``at``.
    sizes : int64 array, shape (n,), optional
        The number of members that each row stands for; its similarities are then means over these members.

    Returns
    -------
    int64 array, shape (n,)
        For each row the smallest index of a row in its group.

    Notes
    -----
    The method is the nearest-neighbour chain (Murtagh 1983), which takes O(n²) steps and no memory besides the matrix.
    A mean of similarities never exceeds the largest of them, so a group without a neighbour at the level ``at`` has
    none later either, and is left out from then on. Rows of less than ``at`` to all others cost one look each.
    """
    count = len(similarity)
    weights = np.ones(count) if sizes is None else sizes.astype(np.float64)
    owner = np.arange(count)
    np.fill_diagonal(similarity, -np.inf)
    alive = np.ones(count, dtype=bool)
    chain: list[int] = []
    first = 0
    while True:
        if not chain:
            while first < count and not alive[first]:
                first += 1
            if first == count:
                break
            chain.append(first)
        row = chain[-1]
        nearest = int(np.argmax(similarity[row]))
        best = similarity[row, nearest]
        if best < at:
            # Nothing will ever join this group: it is finished.
            alive[chain.pop()] = False
            similarity[row] = similarity[:, row] = -np.inf
            continue
        # With equal similarities the chain would go round in a circle, unless the group before it comes first.
        if len(chain) > 1 and similarity[row, chain[-2]] >= best:
            _join(similarity, weights, owner, chain[-2], row)
            alive[row] = False
            del chain[-2:]
        else:
            chain.append(nearest)
    return _smallest_of_group(owner)


def _join(similarity: Singles, weights: NDArray[np.float64], owner: Integers, kept_row: int, joined_row: int) -> None:
    """Let one row stand for the members of two groups, and take the other row out of the matrix."""
    total = weights[kept_row] + weights[joined_row]
    means = similarity[kept_row] * np.float32(weights[kept_row] / total) + similarity[joined_row] * np.float32(
        weights[joined_row] / total
    )
    weights[kept_row], owner[joined_row] = total, kept_row
    means[[kept_row, joined_row]] = -np.inf
    similarity[kept_row] = similarity[:, kept_row] = means
    similarity[joined_row] = similarity[:, joined_row] = -np.inf


def _smallest_of_group(owner: Integers) -> Integers:
    """The smallest index in each group, from the row that every row was joined to."""
    roots = owner.copy()
    # Each pass doubles the length of the paths that are followed.
    while not np.array_equal(roots, roots[roots]):
        roots = roots[roots]
    smallest = np.full(len(roots), len(roots))
    np.minimum.at(smallest, roots, np.arange(len(roots)))
    return np.asarray(smallest[roots], dtype=np.int64)


def join_pairs(labels: Integers, rows: Integers, columns: Integers) -> None:
    """Update the labels of connected components with further pairs, in place.

    Parameters
    ----------
    labels : int64 array, shape (n,)
        For each node the smallest node of its component so far; ``arange(n)`` before the first pairs.
    rows, columns : int64 arrays
        The two nodes of each pair.
    """
    while True:
        first, second = labels[rows], labels[columns]
        differing = first != second
        if not differing.any():
            return
        first, second = first[differing], second[differing]
        # The larger of two labels is the smallest node of its component, and gets the smaller label.
        np.minimum.at(labels, np.maximum(first, second), np.minimum(first, second))
        while not np.array_equal(labels, labels[labels]):
            labels[:] = labels[labels]
