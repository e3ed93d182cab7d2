"""Groups and an order of the adapters of a collection, by their similarities."""

import numpy as np

from loralens.analysis.compare.pairwise import SAME_START
from loralens.linalg.factor import Floats


def connected_groups(similar: Floats, threshold: float = SAME_START) -> list[list[int]]:
    """The connected components of the graph of pairs with at least this similarity, as sorted indices."""
    near = np.nan_to_num(similar) >= threshold  # NaN, which stands for nothing to compare, joins nothing
    components: list[list[int]] = []
    for i in range(len(near)):
        # Adapter i may be the link between groups that were separate so far.
        joined = [group for group in components if near[i, group].any()]
        components = [group for group in components if group not in joined] + [
            sorted([i, *(j for g in joined for j in g)])
        ]
    return sorted(components)


def cluster_order(cosine: Floats) -> tuple[Floats, list[int]]:
    """Average-linkage clustering of the adapters at distances 1 − |cosine|, and an order with similar ones together.

    The cosine is used instead of φ because it needs no choice of a rank, weights directions by their strength, has a
    chance level near 0, and is not raised by a shared initialisation. The absolute value is used because an update and
    its negative move the weights along the same direction.

    Returns
    -------
    float64 array, shape (T − 1, 4)
        The tree in the format of `scipy.cluster.hierarchy.linkage`.
    list of int
        The order of its leaves.
    """
    distance = 1 - np.abs(np.nan_to_num(cosine))
    np.fill_diagonal(distance, 0.0)  # the cosine of an adapter that is 0 with itself is NaN
    distance = (distance + distance.T) / 2  # symmetric to the last bit
    # The tree of a pair is known, and SciPy takes 0.3 s and 40 MiB to import.
    if len(distance) == 2:
        return np.array([[0.0, 1.0, distance[0, 1], 2.0]]), [0, 1]
    from scipy.cluster.hierarchy import leaves_list, linkage
    from scipy.spatial.distance import squareform

    # Unchecked, because rounding of equal adapters may leave distances of −1e-16.
    tree = linkage(squareform(distance, checks=False), "average", optimal_ordering=True)
    return tree, [int(i) for i in leaves_list(tree)]
