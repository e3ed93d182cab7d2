"""Whether a merged model holds an adapter: the merge replayed, and every module compared with what stands there."""

from dataclasses import dataclass
from math import sqrt
from typing import Literal, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.linalg.rounding import ulp
from loralens.merge.apply import Block, TensorMerge
from loralens.merge.matrix import MatrixRows
from loralens.merge.patch import bits
from loralens.merge.plan import as_matrix

Outcome = Literal["exact", "rounded", "partial", "absent"]

HELD = 0.95  # gain from which an update counts as held
TRACE = 0.05  # and below which it counts as absent
NEAR = 1.001  # units in the last place by which an entry may differ from W + D, and be another rounding of it


@final
@dataclass(frozen=True, slots=True)
class Verdict:
    """How a module of the adapter stands in the merged model.

    Attributes
    ----------
    module : str
        For a tensor that the adapter replaces, its key.
    outcome : str
        ``exact``: every bit is what this merge would write; ``rounded``: every entry is W + D to a unit in the last
        place, or the update is there at full strength but for other rounding; ``partial``: some of it; ``absent``: the
        base, or something that has nothing to do with the update.
    gain : float
        ⟨M − W, D⟩/‖D‖².
    error : float
        ‖M − W − D‖_F/‖D‖_F.
    different : int
        Entries that are not what this merge would write.
    """

    module: str
    outcome: Outcome
    gain: float
    error: float
    different: int


def verdicts(merge: TensorMerge, merged: LazyArray) -> list[Verdict]:
    """The verdict on every module of one stored tensor.

    Parameters
    ----------
    merge : TensorMerge
        Prepared with the dtype of the merged tensor.
    merged : LazyArray
        As it stands in the model in question; float8 weights that have scales multiplied by them.
    """
    plan = merge.plan
    if merged.shape != plan.shape:
        names = [slab.module for slab in plan.slabs] or [plan.key]
        return [Verdict(name, "absent", 0.0, 1.0, merged.size) for name in names]
    rows = MatrixRows(merged, plan.matrix)
    found: dict[str, _Comparison] = {}
    for block in merge.blocks():
        name = block.slab.module if block.slab else plan.key
        if block.slab or plan.replacement is not None or plan.tokens:
            found.setdefault(name, _Comparison()).take(block, rows.rows(block.start, block.stop))
    return [comparison.verdict(name) for name, comparison in found.items()]


class _Comparison:
    """Sums over the blocks of one module; entries that are infinite or missing count only as equal or different."""

    def __init__(self) -> None:
        self.D_D = self.moved = self.lost = 0.0
        self.different = self.beyond = self.size = 0

    def take(self, block: Block, M: Array) -> None:
        """The next rows of the merge and of the model."""
        self.different += int(np.count_nonzero(bits(M) != bits(block.numbers(block.merged))))
        self.size += M.size
        if block.D is None:
            return
        W, here, D = (x.astype(np.float64) for x in (block.W, M, block.D))
        with np.errstate(invalid="ignore", over="ignore"):
            if block.gain is not None:
                D = (W + D) * block.gain - W
            moved, apart = here - W, here - W - D
            finite = np.isfinite(apart) & np.isfinite(D)
            moved, apart, D = (np.where(finite, x, 0) for x in (moved, apart, D))
            scale = np.float64(1) if block.scale is None else block.scale
            unit = ulp(np.where(finite, W + D, 1) / scale, block.merged.dtype) * scale
            self.beyond += int(np.count_nonzero(np.abs(apart) > NEAR * unit))
        self.D_D += float(np.vdot(D, D))
        self.moved += float(np.vdot(moved, D))
        self.lost += float(np.vdot(apart, apart))

    def verdict(self, name: str) -> Verdict:
        """What they say together; of a tensor that is replaced, by how many entries differ."""
        if not self.D_D > 0:
            share = 1 - self.different / max(self.size, 1)
            outcome: Outcome = "exact" if share == 1 else "partial" if share > TRACE else "absent"
            return Verdict(name, outcome, share, 1 - share, self.different)
        gain, error = self.moved / self.D_D, sqrt(self.lost / self.D_D)
        return Verdict(name, self._outcome(gain, error), gain, error, self.different)

    def _outcome(self, gain: float, error: float) -> Outcome:
        if not self.different:
            return "exact"
        if gain <= TRACE:
            return "absent"
        held = not self.beyond or (abs(gain - 1) < 1 - HELD and error < 1)
        return "rounded" if held else "partial"


def same(first: LazyArray, second: LazyArray) -> bool:
    """Whether two stored tensors hold the same values; where their dtypes differ, as the narrower one holds them."""
    if first.shape != second.shape:
        return False
    narrow = min(first.dtype, second.dtype, key=lambda dtype: dtype.itemsize)
    matrix = as_matrix(first.shape)
    with np.errstate(over="ignore", invalid="ignore"):
        return all(
            np.array_equal(bits(one.astype(narrow, copy=False)), bits(two.astype(narrow, copy=False)))
            for one, two in zip(MatrixRows(first, matrix).blocks(), MatrixRows(second, matrix).blocks(), strict=True)
        )
