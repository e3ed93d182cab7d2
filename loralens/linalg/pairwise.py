"""Overlaps and inner products of every pair of many low-rank matrices, by blocked matrix products.

The left singular vectors of all T matrices are put side by side in one tall matrix, and so are the right ones. Two Gram
products then hold the cosines of every pair. An entrywise product and sums over segments turn them into T × T numbers.
There is no loop over pairs. There is no cancellation either: the vectors are orthonormal, so the error is a few ε
however badly conditioned the factors were.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self, TypeVar, final

import numpy as np
from numpy.typing import NDArray

from loralens.linalg.factor import Floats, Integers

Part = TypeVar("Part")
Joined = TypeVar("Joined")

# Large enough that one matrix product fills the cores, small enough for a laptop: two blocks of 64 MiB.
LIMIT = 1 << 23  # float64 numbers of one block of matrices: 64 MiB; two blocks are held at a time
# Far above the rounding of the SVD below (1e-15), so only directions that two matrices really share fall under it.
SAME = 1e-6  # radians: directions that are closer than this count as one direction


@final
@dataclass(frozen=True, slots=True)
class Segments:
    """Columns of several matrices side by side.

    Attributes
    ----------
    columns : float64 array, shape (n, K)
    starts : int64 array, shape (T + 1,)
        Matrix t has the columns ``starts[t]`` to ``starts[t + 1]``; it may have none.
    """

    columns: Floats
    starts: Integers

    @classmethod
    def of(cls, parts: Sequence[Floats]) -> Self:
        """The segments of one or more matrices that have n rows each."""
        return cls(np.hstack(parts), np.cumsum([0, *(part.shape[1] for part in parts)]))

    def leading(self, count: int) -> Floats:
        """1 for the first ``count`` columns of each matrix, 0 for the others; float64, shape (K,)."""
        place = np.arange(self.columns.shape[1]) - np.repeat(self.starts[:-1], np.diff(self.starts))
        return (place < count).astype(np.float64)

    def gram(self, other: "Segments") -> Floats:
        """Inner products of all columns, float64, shape (K, other K). With itself it costs half the work."""
        return np.asarray(np.dot(self.columns.T, other.columns), dtype=np.float64)


def segment_sums(M: Floats, rows: Integers, columns: Integers) -> Floats:
    """Sums over the blocks of M; ``rows`` and ``columns`` are the bounds of the blocks on the two axes.

    The result is float64, shape (len(rows) − 1, len(columns) − 1). An empty block sums to 0, whereas
    `numpy.add.reduceat` would return the entry behind it.
    """
    sums = np.zeros((len(rows) - 1, len(columns) - 1))
    # `reduceat` does not know empty segments, so they are left out of the sums and stay 0.
    some_rows, some_columns = (np.flatnonzero(np.diff(starts)) for starts in (rows, columns))
    if some_rows.size and some_columns.size:
        partial = np.add.reduceat(M, rows[some_rows], axis=0)
        sums[np.ix_(some_rows, some_columns)] = np.add.reduceat(partial, columns[some_columns], axis=1)
    return sums


Triplets = tuple[Floats, Floats, Floats]  # U (m, k), s (k,) and V (n, k) of one matrix


def pairwise_products(
    parts: Sequence[Callable[[], Triplets]], size: int, *, head: int | None = None, limit: int = LIMIT
) -> tuple[Floats, Floats, Floats]:
    """Inner products ⟨M_s, M_t⟩ of every pair of T matrices, ‖U_sᵀU_t‖² and ‖V_sᵀV_t‖²; float64, each (T, T).

    Parameters
    ----------
    parts : sequence of T callables
        Each returns the singular triplets of one matrix. It is called once for its own block of matrices, and once for
        each block before that.
    size : int
        How many numbers the largest of them has; it decides the size of the blocks.
    head : int, optional
        Restricts the overlaps to the leading ``head`` directions of each matrix; the inner products always use all.
    limit : int
        Largest number of numbers in a block.

    Notes
    -----
    For K columns in total the cost is O((m + n) K²) in matrix products, and half of that where one block holds all.
    """
    inner, left, right = np.zeros((3, len(parts), len(parts)))
    for rows, columns, (U, s, V), (other_U, other_s, other_V) in _block_pairs(parts, size, limit, _stack):
        gram_U, gram_V = U.gram(other_U), V.gram(other_V)
        _write_tile(left, rows, columns, _overlaps(gram_U, U, other_U, head))
        _write_tile(right, rows, columns, _overlaps(gram_V, V, other_V, head))
        # In place, since each of these arrays has K × K numbers.
        gram_U *= gram_V
        gram_U *= s[:, None]
        gram_U *= other_s
        _write_tile(inner, rows, columns, segment_sums(gram_U, U.starts, other_U.starts))
    return inner, left, right


def _stack(parts: Sequence[Triplets]) -> tuple[Segments, Floats, Segments]:
    U, s, V = zip(*parts, strict=True)
    return Segments.of(U), np.concatenate(s), Segments.of(V)


def pairwise_overlaps(
    parts: Sequence[Callable[[], Floats]],
    size: int,
    *,
    head: int | None = None,
    limit: int = LIMIT,
    step: Callable[[int], None] | None = None,
) -> Floats:
    """Σcos² of every pair of subspaces, float64, shape (T, T); the parts return orthonormal columns, shape (n, k).

    ``step`` is called with the number of subspaces that have been compared with all others since its last call.
    """
    overlaps = np.zeros((len(parts), len(parts)))
    for rows, columns, first, second in _block_pairs(parts, size, limit, Segments.of):
        _write_tile(overlaps, rows, columns, _overlaps(first.gram(second), first, second, head))
        # The tiles of a row of blocks end with the last column: from then on its matrices have met all others.
        if step and columns.stop == len(parts):
            step(len(rows))
    return overlaps


def _overlaps(G: Floats, first: Segments, second: Segments, head: int | None) -> Floats:
    """Sums of G² over the segments, restricted to the leading ``head`` columns of each."""
    squares = G * G
    if head is not None:
        squares *= first.leading(head)[:, None]
        squares *= second.leading(head)
    return segment_sums(squares, first.starts, second.starts)


def pairwise_cosines(parts: Sequence[Callable[[], Floats]], size: int, *, limit: int = LIMIT) -> Floats:
    """Cosines of every pair of vectors, float64, shape (T, T), in [−1, 1]; NaN for pairs with a zero vector."""
    cosines = np.zeros((len(parts), len(parts)))
    for rows, columns, first, second in _block_pairs(parts, size, limit, _unit_rows):
        _write_tile(cosines, rows, columns, first @ second.T)
    return np.clip(cosines, -1.0, 1.0)


def _block_pairs(
    parts: Sequence[Callable[[], Part]], size: int, limit: int, join: Callable[[list[Part]], Joined]
) -> Iterator[tuple[range, range, Joined, Joined]]:
    """Every pair of blocks on and above the diagonal, with the joined values that their callables return."""
    indices, count = range(len(parts)), max(1, limit // max(1, size))
    blocks = [indices[start : start + count] for start in indices[::count]]
    for i, rows in enumerate(blocks):
        first = join([parts[t]() for t in rows])
        # The same object twice: a product of an array with its own transpose costs BLAS half the work.
        yield rows, rows, first, first
        # Only tiles above the diagonal: `_write_tile` mirrors them, as all these quantities are symmetric.
        for columns in blocks[i + 1 :]:
            yield rows, columns, first, join([parts[t]() for t in columns])


def outside_parts(stack: Segments) -> list[tuple[Floats, int]]:
    """For every matrix, the part of its own directions outside the span of all others, and the rank of that span.

    Parameters
    ----------
    stack : Segments
        Orthonormal columns within each matrix.

    Returns
    -------
    list of (float64 array, int)
        N_t = U_tᵀ (1 − P_t) U_t, shape (k_t, k_t), and the rank of P_t. P_t is the projection on the span of all
        columns except those of matrix t. Directions closer than `SAME` count as one.

    Notes
    -----
    One thin SVD X = P Σ Qᵀ of the stack is enough for all t. Let Q_t be the rows of Q that belong to t. A direction v
    has a part outside the span of the others if Q_t Q_tᵀ v = v (its leverage is 1). For a basis V of these directions,
    N_t = V (Vᵀ Q_t Σ⁻² Q_tᵀ V)⁻¹ Vᵀ. If all columns are independent, this is the Schur complement of the Gram matrix.
    """
    _, s, Qh = np.linalg.svd(stack.columns, full_matrices=False)
    # Σ⁻² below would magnify directions that are only rounding.
    keep = s > SAME
    Q, s = Qh[keep].T, s[keep]
    return [_outside_one(Q[start:stop], s) for start, stop in zip(stack.starts, stack.starts[1:], strict=False)]


def _outside_one(Q: Floats, s: Floats) -> tuple[Floats, int]:
    """N_t of `outside_parts` for one matrix, and the rank of the span of the others, from its rows of Q (k, rank)."""
    V, cosines, _ = np.linalg.svd(Q)
    V = V[:, : cosines.size][:, 1 - cosines**2 < SAME**2 / 2]  # a leverage cos² is 1, or at least SAME² below it
    # Every direction of this matrix also lies in the span of the others: nothing is left outside.
    if not V.shape[1]:
        return np.zeros((len(Q), len(Q))), s.size
    # A triangular factor instead of an explicit inverse: the condition number of the Gram matrix is the square of this
    # one's.
    R = np.asarray(np.linalg.qr((Q.T @ V) / s[:, None], mode="r"), dtype=np.float64)
    half = np.linalg.solve(R.T, V.T)
    return half.T @ half, s.size - V.shape[1]


def _write_tile(target: Floats, rows: range, columns: range, tile: Floats) -> None:
    """Write a tile and its mirror image into the T × T array."""
    target[rows.start : rows.stop, columns.start : columns.stop] = tile
    target[columns.start : columns.stop, rows.start : rows.stop] = tile.T


def _unit_rows(vectors: Sequence[Floats]) -> Floats:
    """The vectors as rows of length 1; a zero vector becomes NaN."""
    rows = np.vstack([vector.ravel() for vector in vectors])
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    # NaN rather than 0: the angle to a zero vector is undefined, not a right angle.
    lengths[lengths == 0] = np.nan
    return np.asarray(rows / lengths, dtype=np.float64)


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
    labels = np.arange(count)
    join_pairs(labels, labels.copy(), owner)
    return labels


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
