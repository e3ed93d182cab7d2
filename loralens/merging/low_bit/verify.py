"""Whether the codes of a low-bit model contain an adapter: the merge is repeated, and the codes are compared."""

from dataclasses import dataclass
from math import sqrt
from typing import final

import numpy as np

from loralens.core.weights import CodedWeight
from loralens.linalg.factor import Floats
from loralens.merging.fidelity import dot
from loralens.merging.low_bit.apply import CodesBlock, CodesMerge, added_numbers
from loralens.merging.verify import ERRORS, HIGH, LOW, TRACE, Outcome, Verdict

# The gains of merges with two seeds may differ by this much beyond the standard error: the clipped part is an estimate.
NEAR = 0.02


def code_verdicts(merge: CodesMerge, merged: CodedWeight | None) -> list[Verdict]:
    """The verdict on every module of one coded weight.

    Parameters
    ----------
    merge : CodesMerge
        Prepared as the certificate of the merged model says.
    merged : CodedWeight or None
        The weight of the model in question; None if it has none under this key.
    """
    plan = merge.plan
    if merged is None or merged.grid is None or merged.shape != merge.weight.shape:
        return [Verdict(slab.module, "absent", 0.0, 1.0, 1.0, plan.source.size) for slab in plan.slabs]
    comparisons: dict[str, _CodesComparison] = {}
    for block in merge.blocks():
        if block.slab:
            comparisons.setdefault(block.slab.module, _CodesComparison()).take(block, merged)
    drawn = merge.mode != "nearest"
    return [comparison.verdict(name, drawn) for name, comparison in comparisons.items()]


@final
@dataclass(slots=True)
class _CodesComparison:
    """Sums over the blocks of one module."""

    different: int = 0
    D_D: float = 0.0
    moved: float = 0.0
    lost: float = 0.0
    noise: float = 0.0
    rounded: float = 0.0
    spread: float = 0.0

    def take(self, block: CodesBlock, merged: CodedWeight) -> None:
        """Add some rows of the merge and of the model."""
        assert block.D is not None
        assert merged.grid is not None
        grid = merged.grid(block.start, block.stop)
        same_grid = (grid.lowest, grid.highest) == (block.grid.lowest, block.grid.highest)
        same_scales = same_grid and np.array_equal(grid.step, block.grid.step, equal_nan=True)
        if same_scales:
            self.different += int(np.count_nonzero(grid.codes != block.drawn.codes))
            moved: Floats = added_numbers(block.grid, grid.codes).astype(np.float64)
        else:
            # Codes with other scales stand for other numbers, so the decoded numbers are compared.
            self.different += grid.codes.size
            before = block.grid.values(block.grid.codes).astype(np.float64)
            moved = grid.values(grid.codes).astype(np.float64) - before
        D, ours = block.D.astype(np.float64), block.moved.astype(np.float64)
        self.D_D += dot(D, D)
        self.moved += dot(moved, D)
        self.lost += dot(moved - D, moved - D)
        self.noise += dot(ours - D, ours - D)
        self.rounded += dot(ours - D, D)
        self.spread += dot((moved - D) * D, (moved - D) * D)

    def verdict(self, name: str, drawn: bool) -> Verdict:
        """The verdict from the sums."""
        if not self.D_D > 0:
            return Verdict(name, "exact" if not self.different else "partial", 1.0, 1.0, 0.0, self.different)
        gain, predicted = self.moved / self.D_D, 1 + self.rounded / self.D_D
        error, norm = sqrt(self.lost / self.D_D), sqrt(self.D_D)
        outcome = self._outcome(gain, predicted, drawn)
        return Verdict(name, outcome, gain, predicted, error, self.different, norm, sqrt(self.noise) / norm)

    def _outcome(self, gain: float, predicted: float, drawn: bool) -> Outcome:
        # Every code is the one that this merge writes. What the grid clipped is known then, and nothing is in doubt.
        if not self.different and drawn:
            return "exact" if gain >= TRACE else "absent"
        if gain < TRACE:
            return "absent"
        if not LOW <= gain <= HIGH:
            return "partial"
        deviation = ERRORS * sqrt(2 * self.spread) / self.D_D + NEAR
        return "rounded" if abs(gain - predicted) <= deviation else "partial"
