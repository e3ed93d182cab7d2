"""How much of an update lies beyond the ends of a grid, where codes cannot move.

About 8 % of the codes of a block format lie at an end, and half of their moves point outwards, so stochastic rounding
loses 4 % of the gain. Larger moves of the other entries of the row would give it back. This was measured
(`examples/low_bit_study.py`): the gain is 1 again, and the divergence of the model is not smaller. So it is not done.
"""

import numpy as np

from loralens.core.few_bits.coded_weight import GridRows
from loralens.linalg.factor import Floats


def clipped_share(grid: GridRows, moves: Floats) -> Floats:
    """The share of every move that lies beyond the grid, float64, between 0 and 1; 0 where nothing is clipped."""
    target = grid.codes + moves
    beyond = target - np.clip(target, grid.lowest, grid.highest)
    return np.divide(beyond, moves, out=np.zeros_like(moves), where=beyond != 0)
