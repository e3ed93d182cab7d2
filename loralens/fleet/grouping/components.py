"""Which members are alike by their sketches, in blocks of bounded memory: connected components and groups."""

from collections.abc import Callable, Iterator
from itertools import combinations_with_replacement

import numpy as np
from numpy.typing import NDArray

from loralens.fleet.sketching.sketches import Sketches
from loralens.linalg.factor import Integers
from loralens.linalg.pairwise import average_linkage_groups, join_pairs

Directions = NDArray[np.float32]

# A block of 1,024 sketches of 4,096 numbers in float32 takes 16 MiB, and a product of two blocks 4 MiB.
BLOCK = 1024
COARSE = 1024  # numbers of the shorter sketches, which find the candidates in a quarter of the time
# The difference between the cosines by sketches of 1,024 and of 4,096 numbers has a standard deviation of at most
# √(1/1024 − 1/4096) = 0.027. The margin is four times that.
MARGIN = 0.11  # how far below a level a pair of the shorter sketches counts as a candidate
# A float32 matrix of 10,000 × 10,000 takes 400 MB.
LARGEST = 10_000  # members whose similarities are in one matrix
NEARLY_EQUAL = (0.98, 0.95, 0.9, 0.8, 0.7)  # levels at which members of a larger component are joined beforehand


def connected_rows(directions: Callable[[slice], Directions], count: int, at: float) -> list[Integers]:
    """The connected components of pairs with at least this cosine; members without such a partner are left out.

    Parameters
    ----------
    directions : callable
        A slice of rows → these rows as unit vectors, float32.
    count : int
        The number of rows.
    at : float
        The smallest cosine of a pair.

    Notes
    -----
    The product of every pair of blocks is formed once and not kept, so the memory is a few blocks whatever ``count``
    is.
    """
    labels = np.arange(count)
    for rows, columns in _block_pairs(count):
        first = directions(rows)
        second = first if rows == columns else directions(columns)
        near, far = np.nonzero(first @ second.T >= at)
        join_pairs(labels, near + rows.start, far + columns.start)
    return [group for group in rows_by_label(labels) if len(group) > 1]


def alike_groups(sketches: Sketches, at: float) -> list[Integers]:
    """Groups of average linkage at a level of the cosine: sorted rows, the largest group first.

    Shorter sketches find the components of pairs that may reach the level. Within a component the whole sketches
    decide. Average linkage never joins two groups without a pair at the level, so no group extends beyond a component.
    """
    groups: list[Integers] = []
    coarse = connected_rows(lambda rows: sketches.directions(COARSE, rows), len(sketches), at - MARGIN)
    for rows in coarse:
        groups += [rows[group] for group in _linkage_groups(sketches, rows, at) if len(group) > 1]
    return sorted(groups, key=lambda group: (-len(group), int(group[0])))


def cosines_among(sketches: Sketches, rows: Integers) -> Directions:
    """The cosines of all pairs of these rows by whole sketches, float32, shape (n, n)."""
    cosines = np.empty((len(rows), len(rows)), dtype=np.float32)
    for first, second in _block_pairs(len(rows)):
        tile = sketches.directions(rows=rows[first]) @ sketches.directions(rows=rows[second]).T
        cosines[first, second] = tile
        cosines[second, first] = tile.T
    return cosines


def _linkage_groups(sketches: Sketches, rows: Integers, at: float) -> list[Integers]:
    """Groups of average linkage within one component, as indices of ``rows``."""
    if len(rows) <= LARGEST:
        return rows_by_label(average_linkage_groups(cosines_among(sketches, rows), at))
    bundles = _bundles(sketches, rows, at)
    sizes = np.array([len(bundle) for bundle in bundles])
    # The mean cosine between two bundles is the inner product of the means of their directions.
    means = np.stack([sketches.directions(COARSE, rows[bundle]).mean(axis=0) for bundle in bundles])
    labels = average_linkage_groups(means @ means.T, at, sizes=sizes)
    return [np.sort(np.concatenate([bundles[i] for i in group])) for group in rows_by_label(labels)]


def _bundles(sketches: Sketches, rows: Integers, at: float) -> list[Integers]:
    """Members of a component that is too large for one matrix, joined where they are nearly equal."""
    for level in (*(level for level in NEARLY_EQUAL if level > at), at):
        labels = np.arange(len(rows))
        for group in connected_rows(lambda part: sketches.directions(COARSE, rows[part]), len(rows), level):
            labels[group] = group[0]
        bundles = rows_by_label(labels)
        if len(bundles) <= LARGEST:
            break
    return bundles


def rows_by_label(labels: Integers) -> list[Integers]:
    """The rows of each label, in order of labels."""
    order = np.argsort(labels, kind="stable")
    bounds = np.flatnonzero(np.diff(labels[order])) + 1
    return np.split(order, bounds) if len(labels) else []


def _block_pairs(count: int) -> Iterator[tuple[slice, slice]]:
    """Every pair of blocks of rows once, and every block with itself."""
    blocks = [slice(start, min(start + BLOCK, count)) for start in range(0, count, BLOCK)]
    return combinations_with_replacement(blocks, 2)
