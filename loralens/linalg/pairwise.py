"""Overlaps and inner products of many low-rank matrices with each other, by blocked matrix products.

The singular vectors of T matrices stand side by side in one tall matrix a side. Two Gram products then hold every
cos of every pair; an entrywise product and sums over segments turn them into T × T numbers. No loop over pairs, and
no cancellation: the vectors are orthonormal, so the error is a few ε whatever the factors were like.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self, TypeVar, final

import numpy as np

from loralens.linalg.factor import Floats, Integers

Part = TypeVar("Part")

LIMIT = 1 << 23  # float64 numbers of one block of matrices: 64 MiB; two blocks are held at a time
SAME = 1e-6  # directions less than this apart, in radians, are one: a span has no more of them than that


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
        """Matrices of n rows each, side by side; at least one."""
        return cls(np.hstack(parts), np.cumsum([0, *(part.shape[1] for part in parts)]))

    @property
    def widths(self) -> Integers:
        """Columns of each matrix, int64, shape (T,)."""
        return np.diff(self.starts)

    def heads(self, count: int) -> Floats:
        """1 for the first ``count`` columns of each matrix, 0 for the others; float64, shape (K,)."""
        place = np.arange(self.columns.shape[1]) - np.repeat(self.starts[:-1], self.widths)
        return (place < count).astype(np.float64)

    def gram(self, other: "Segments") -> Floats:
        """Inner products of all columns, float64, shape (K, other K); half the work where ``other`` is this one."""
        return np.asarray(np.dot(self.columns.T, other.columns), dtype=np.float64)


class Triplets(NamedTuple):
    """Singular triplets of one matrix (m, n): U (m, k) and V (n, k) with orthonormal columns, s (k,)."""

    U: Floats
    s: Floats
    V: Floats


class Products(NamedTuple):
    """Of every pair of T matrices, float64, each of shape (T, T).

    ``inner`` is ⟨M_s, M_t⟩_F; ``left`` and ``right`` are Σcos² = ‖U_sᵀU_t‖_F² and ‖V_sᵀV_t‖_F².
    """

    inner: Floats
    left: Floats
    right: Floats


def segment_sums(M: Floats, rows: Integers, columns: Integers) -> Floats:
    """Sums over the blocks of M that ``rows`` and ``columns`` bound; float64, shape (len(rows) − 1, len(columns) − 1).

    An empty block sums to 0, where `numpy.add.reduceat` would take the entry behind it.
    """
    sums = np.zeros((len(rows) - 1, len(columns) - 1))
    some_rows, some_columns = (np.flatnonzero(np.diff(starts)) for starts in (rows, columns))
    if some_rows.size and some_columns.size:
        partial = np.add.reduceat(M, rows[some_rows], axis=0)
        sums[np.ix_(some_rows, some_columns)] = np.add.reduceat(partial, columns[some_columns], axis=1)
    return sums


def blocks(sizes: Sequence[int], limit: int) -> list[range]:
    """Consecutive indices whose ``sizes`` add up to at most ``limit``, at least one a block."""
    found, start, filled = [], 0, 0
    for i, size in enumerate(sizes):
        if i > start and filled + size > limit:
            found.append(range(start, i))
            start, filled = i, 0
        filled += size
    return [*found, range(start, len(sizes))] if sizes else []


def pairwise_products(
    parts: Sequence[Callable[[], Triplets]], sizes: Sequence[int], *, head: int | None = None, limit: int = LIMIT
) -> Products:
    """Inner products and overlaps of every pair of matrices.

    Parameters
    ----------
    parts : sequence of T callables
        Each returns the `Triplets` of one matrix; called once for its own block of matrices and for each before that.
    sizes : sequence of int
        Numbers that each of them holds, for the size of the blocks.
    head : int, optional
        Overlaps of the leading ``head`` directions only; ``inner`` is always of all.
    limit : int
        Numbers of a block.

    Notes
    -----
    O((m + n) K²) work in matrix products for K columns in all, half of it where one block holds all of them.
    """
    found = Products(*(np.zeros((len(parts), len(parts))) for _ in Products._fields))
    for rows, columns, first, second in _tiles(parts, sizes, limit):
        one = _Stack.of(first)
        tiles = one.products(one if first is second else _Stack.of(second), head)
        for whole, tile in zip(found, tiles, strict=True):
            _fill(whole, rows, columns, tile)
    return found


def pairwise_overlaps(
    parts: Sequence[Callable[[], Floats]],
    sizes: Sequence[int],
    *,
    head: int | None = None,
    limit: int = LIMIT,
    step: Callable[[int], None] | None = None,
) -> Floats:
    """Σcos² of every pair of subspaces, float64, shape (T, T); the parts return orthonormal columns, shape (n, k).

    ``step`` is told how many subspaces have met all others, T in the end.
    """
    found = np.zeros((len(parts), len(parts)))
    for rows, columns, first, second in _tiles(parts, sizes, limit):
        one = Segments.of(first)
        two = one if first is second else Segments.of(second)
        _fill(found, rows, columns, _overlaps(one.gram(two), one, two, head))
        if step and columns.stop == len(parts):
            step(len(rows))
    return found


def pairwise_cosines(parts: Sequence[Callable[[], Floats]], sizes: Sequence[int], *, limit: int = LIMIT) -> Floats:
    """Cosines of every pair of vectors, float64, shape (T, T), in [−1, 1]; NaN beside a vector that is 0."""
    found = np.zeros((len(parts), len(parts)))
    for rows, columns, first, second in _tiles(parts, sizes, limit):
        one = _unit_rows(first)
        _fill(found, rows, columns, one @ (one if first is second else _unit_rows(second)).T)
    return np.clip(found, -1.0, 1.0)


def outside(stack: Segments) -> list[tuple[Floats, int]]:
    """For every matrix, what of its own directions the span of all others leaves, and the dimension of that span.

    Parameters
    ----------
    stack : Segments
        Orthonormal columns within each matrix.

    Returns
    -------
    list of (float64 array, int)
        N_t = U_tᵀ (1 − P_t) U_t, shape (k_t, k_t), P_t the projection on the span of all columns but those of t, and
        the rank of P_t. Directions less than `SAME` apart count as one.

    Notes
    -----
    One thin SVD X = P Σ Qᵀ of the stack serves all t. With Q_t the rows of Q that belong to t, v leaves the span
    where Q_t Q_tᵀ v = v (its leverage is 1); for a basis V of these v, N_t = V (Vᵀ Q_t Σ⁻² Q_tᵀ V)⁻¹ Vᵀ. Where all
    columns are independent that is the Schur complement of the Gram matrix.
    """
    _, s, Qh = np.linalg.svd(stack.columns, full_matrices=False)
    keep = s > SAME
    Q, s = Qh[keep].T, s[keep]
    return [_leaves(Q[start:stop], s) for start, stop in zip(stack.starts, stack.starts[1:], strict=False)]


def _leaves(Q: Floats, s: Floats) -> tuple[Floats, int]:
    """N of one matrix and the rank of the others' span, from its rows of Q (k, rank)."""
    V, cosines, _ = np.linalg.svd(Q)
    V = V[:, : cosines.size][:, 1 - cosines**2 < SAME**2 / 2]  # a leverage cos² is 1, or below it by SAME² at least
    if not V.shape[1]:
        return np.zeros((len(Q), len(Q))), s.size
    R = np.asarray(np.linalg.qr((Q.T @ V) / s[:, None], mode="r"), dtype=np.float64)
    half = np.linalg.solve(R.T, V.T)
    return half.T @ half, s.size - V.shape[1]


def _tiles(
    parts: Sequence[Callable[[], Part]], sizes: Sequence[int], limit: int
) -> Iterator[tuple[range, range, list[Part], list[Part]]]:
    """Every pair of blocks on and above the diagonal, with what their parts return."""
    groups = blocks(sizes, limit)
    for i, rows in enumerate(groups):
        first = [parts[t]() for t in rows]
        yield rows, rows, first, first
        for columns in groups[i + 1 :]:
            yield rows, columns, first, [parts[t]() for t in columns]


def _fill(whole: Floats, rows: range, columns: range, tile: Floats) -> None:
    """Put a tile and its mirror image where they belong."""
    whole[rows.start : rows.stop, columns.start : columns.stop] = tile
    whole[columns.start : columns.stop, rows.start : rows.stop] = tile.T


class _Stack(NamedTuple):
    """The triplets of several matrices side by side."""

    left: Segments
    s: Floats
    right: Segments

    @classmethod
    def of(cls, parts: Sequence[Triplets]) -> Self:
        U, s, V = zip(*parts, strict=True)
        return cls(Segments.of(U), np.concatenate(s), Segments.of(V))

    def products(self, other: "_Stack", head: int | None) -> Products:
        """What `pairwise_products` returns, of every matrix here with every one of ``other``."""
        left, right = self.left.gram(other.left), self.right.gram(other.right)
        overlaps = [
            _overlaps(G, one, two, head)
            for G, one, two in ((left, self.left, other.left), (right, self.right, other.right))
        ]
        left *= right
        left *= self.s[:, None]
        left *= other.s
        return Products(segment_sums(left, self.left.starts, other.left.starts), *overlaps)


def _overlaps(G: Floats, first: Segments, second: Segments, head: int | None) -> Floats:
    """Sums of G² over the segments, of the leading ``head`` columns of each."""
    squares = G * G
    if head is not None:
        squares *= first.heads(head)[:, None]
        squares *= second.heads(head)
    return segment_sums(squares, first.starts, second.starts)


def _unit_rows(vectors: Sequence[Floats]) -> Floats:
    """The vectors as rows of length 1; NaN where one is 0."""
    rows = np.vstack([vector.ravel() for vector in vectors])
    peaks = np.abs(rows).max(axis=1, initial=0.0, keepdims=True)
    peaks[peaks == 0] = np.nan
    rows /= peaks
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True), dtype=np.float64)
