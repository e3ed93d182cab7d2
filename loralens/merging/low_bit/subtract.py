"""Unmerging codes without a patch: the moves are drawn again, and every code goes back to where it came from.

A draw moves a code by the same steps whenever seed, name and update are the same, so the code before it is known unless
several codes end at the same one: at the ends of the grid, where moves are clipped, and between the unequal steps of a
table. Such entries are counted.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import ceil

import numpy as np

from loralens.core.few_bits.coded_weight import Codes, GridRows
from loralens.errors import MismatchError
from loralens.linalg.draws import Draws
from loralens.linalg.exact import Singles
from loralens.merging.low_bit.apply import CodesMerge
from loralens.merging.low_bit.stochastic import asked_moves, draw_codes
from loralens.merging.matrix import cuts
from loralens.merging.undo.subtract import Doubt


def subtract_codes(merge: CodesMerge, doubt: Doubt) -> Iterator[tuple[int, Codes]]:
    """Yield the first row and the codes of every block of the base; ``doubt`` counts uncertain entries.

    Parameters
    ----------
    merge : CodesMerge
        Prepared with the merged weight in place of that of the base, and with the seed of the merge.
    doubt : Doubt

    Raises
    ------
    MismatchError
        The merge scaled the weight (DoRA), or its codes were swept.
    """
    if merge.slab_factors or merge.mode != "stochastic":
        raise MismatchError(
            "the codes before this merge cannot be computed again", fix="unmerge with --undo, or take the base"
        )
    assert merge.weight.grid is not None
    draws = Draws.named(merge.rounding.seed, merge.rounding.key)
    for start, stop, slab in cuts(merge.plan):
        grid = merge.weight.grid(start, stop)
        if slab is None:
            yield start, grid.codes
            continue
        D = merge.update(slab, grid, start, stop)
        yield start, _before(grid, D, draws, start * D.shape[1], doubt)


def _before(grid: GridRows, D: Singles, draws: Draws, offset: int, doubt: Doubt) -> Codes:
    """The codes from which a draw leads to those of the grid; where there are several, the nearest one."""
    farthest = float(np.abs(asked_moves(grid, D)).max(initial=0.0))
    reach = min(grid.highest - grid.lowest, ceil(farthest) + 1)
    before, hits = grid.codes.copy(), np.zeros(grid.codes.shape, np.int16)
    # The nearest codes first, and of these the code itself: most codes do not move.
    for distance in sorted(range(-reach, reach + 1), key=abs):
        candidates = grid.codes + np.int16(distance)
        inside = (candidates >= grid.lowest) & (candidates <= grid.highest)
        candidates = np.clip(candidates, grid.lowest, grid.highest)
        moves = asked_moves(replace(grid, codes=candidates), D)
        leads = inside & (draw_codes(replace(grid, codes=candidates), moves, draws, offset).codes == grid.codes)
        before = np.where(leads & (hits == 0), candidates, before)
        hits += leads
    doubt.entries += before.size
    doubt.several += int(np.count_nonzero(hits > 1))
    doubt.none += int(np.count_nonzero(hits == 0))
    return before
