"""Making up for what is lost at the ends of the grid by larger moves in the rest of the row: an experiment.

A code at an end of its grid cannot move outwards. About 8 % of the codes of a block format lie at an end, and half of
their moves point outwards, so 4 % of the gain is lost. Here the moves of all other entries of the row grow by one
factor, 1 + s, with

    s = Σ_clipped l·δ / Σ_others δ²,

where l is the part of δ that is clipped. The expected gain of every row is then 1 again, and the other entries keep
their proportions. It is not an option for users: whether it lowers the divergence of a model must be measured first.

Both sums add integers and stay below 2⁵³, so they are exact in any order, and the codes are the same on every machine.
"""

from math import ceil, log2

import numpy as np

from loralens.core.coded_weight import GridRows
from loralens.linalg.exact import Singles
from loralens.linalg.factor import Floats

# If few entries are left, s has no bound of its own, and the correction could become larger than the update itself.
MOST = 0.5  # largest s


def clipped_share(grid: GridRows, moves: Floats) -> Floats:
    """The share of every move that lies beyond the grid, float64, between 0 and 1; 0 where nothing is clipped."""
    target = grid.codes + moves
    beyond = target - np.clip(target, grid.lowest, grid.highest)
    return np.divide(beyond, moves, out=np.zeros_like(moves), where=beyond != 0)


def return_clipped(grid: GridRows, moves: Floats, D: Singles) -> Floats:
    """The moves, where those that are not clipped make up for the clipped ones of the same row."""
    clipped = clipped_share(grid, moves)
    squares = _exact_squares(D)
    lost = np.rint(squares * clipped).sum(axis=1)
    room = np.where(clipped == 0, squares, 0.0).sum(axis=1)
    s = np.minimum(np.divide(lost, room, out=np.zeros_like(lost), where=room > 0), MOST)
    return np.where(clipped == 0, moves * (1 + s)[:, None], moves)


def _exact_squares(D: Singles) -> Floats:
    """D² of every row in units of its own, as integers whose sum over the row is below 2⁵³."""
    bits = (53 - ceil(log2(max(D.shape[1], 2)))) // 2
    exponent = np.frexp(np.abs(D).max(axis=1, initial=0.0))[1].astype(np.int64)[:, None]
    integers = np.rint(np.ldexp(D.astype(np.float64), bits - exponent))
    return np.asarray(integers * integers)
