"""Whether a merged model holds an adapter: the merge replayed, and every module compared with what stands there."""

from dataclasses import dataclass
from math import sqrt
from typing import Literal, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.linalg.rounding import ulp
from loralens.merging.apply import Block, TensorMerge
from loralens.merging.matrix import MatrixRows
from loralens.merging.plan import as_matrix
from loralens.merging.undo.patch import bits

Outcome = Literal["exact", "rounded", "partial", "absent"]

LOW, HIGH = 0.9, 1.1  # gains between which an update counts as there at its strength
TRACE = 0.1  # and below which it counts as absent
ERRORS = 3  # standard errors by which a gain may differ from what the rounding predicts
FACTOR = 2.0**-9  # and relatively: other tools round the scale, or every product, to bfloat16
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
        place, or the update is there at full strength but for other rounding; ``partial``: at another strength than
        asked for, whoever took the rest: another merge, another hand, or the rounding itself; ``absent``: the base, or
        something that has nothing to do with the update.
    gain : float
        ⟨M − W, D⟩/‖D‖²; of a tensor that is replaced D = R − W, R standing for W.
    predicted : float
        The same of what this merge would write; 1 under stochastic rounding, whose mean it is.
    error : float
        ‖M − W − D‖_F/‖D‖_F.
    different : int
        Entries that are not what this merge would write.
    """

    module: str
    outcome: Outcome
    gain: float
    predicted: float
    error: float
    different: int

    @property
    def by_rounding(self) -> bool:
        """Whether it is what this merge would write, and the rounding took so much that it does not hold."""
        return not self.different and self.outcome in ("partial", "absent")


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
        return [Verdict(name, "absent", 0.0, 1.0, 1.0, merged.size) for name in names]
    rows = MatrixRows(merged, plan.matrix)
    before = MatrixRows(plan.base, plan.matrix) if plan.base is not None and plan.base.shape == plan.shape else None
    found: dict[str, _Comparison] = {}
    for block in merge.blocks():
        name = block.slab.module if block.slab else plan.key
        if block.slab or plan.replacement is not None or plan.tokens:
            sums = found.setdefault(name, _Comparison(merge))
            sums.take(block, rows.rows(block.start, block.stop), before)
    return [comparison.verdict(name) for name, comparison in found.items()]


class _Comparison:
    """Sums over the blocks of one module; entries that are infinite or missing count only as equal or different.

    The standard error of the gain is √(Σ e²D²)/‖D‖², e what is lost of every entry, here or under the stated rounding,
    whichever gives more: as if the losses were independent with mean 0.
    """

    def __init__(self, merge: TensorMerge) -> None:
        self.drawn, self.added = merge.rounding.mode == "stochastic", False
        self.tokens = np.asarray(merge.plan.tokens.indices if merge.plan.tokens else (), dtype=np.int64)
        self.D_D = self.moved = self.lost = self.rounded = self.spread = self.scatter = 0.0
        self.different = self.beyond = self.size = 0

    def take(self, block: Block, M: Array, before: MatrixRows | None) -> None:
        """The next rows of the merge and of the model, and the base where it has such a tensor."""
        self.different += int(np.count_nonzero(bits(M) != bits(block.numbers(block.merged))))
        self.size += M.size
        self.added |= block.D is not None
        if block.D is None and before is None:
            return
        ours, here = (x.astype(np.float64) for x in (block.numbers(block.merged), M))
        with np.errstate(invalid="ignore", over="ignore"):
            W = (block.W if block.D is not None or before is None else before.rows(block.start, block.stop)).astype(
                float
            )
            D = ours - W if block.D is None else block.D.astype(np.float64)
            if block.gain is not None:
                D = (W + D) * block.gain - W
            trained = self.tokens[(block.start <= self.tokens) & (self.tokens < block.stop)] - block.start
            D[trained] = ours[trained] - W[trained]
            moved, apart, e = here - W, here - W - D, ours - W - D
            finite = np.isfinite(apart) & np.isfinite(D) & np.isfinite(e)
            moved, apart, D, e = (np.where(finite, x, 0) for x in (moved, apart, D, e))
            scale = np.float64(1) if block.scale is None else block.scale
            unit = ulp(np.where(finite, W + D, 1) / scale, block.merged.dtype) * scale
            self.beyond += int(np.count_nonzero(np.abs(apart) > NEAR * unit))
        self.D_D += float(np.vdot(D, D))
        self.moved += float(np.vdot(moved, D))
        self.lost += float(np.vdot(apart, apart))
        self.rounded += float(np.vdot(e, D))
        self.spread += float(np.vdot(e * D, e * D))
        self.scatter += float(np.vdot(apart * D, apart * D))

    def verdict(self, name: str) -> Verdict:
        """What they say together; of a tensor that nothing is known of before, by how many entries differ."""
        if not self.D_D > 0:
            share = 1 - self.different / max(self.size, 1)
            outcome: Outcome = "exact" if share == 1 else "partial" if share > TRACE else "absent"
            return Verdict(name, outcome, share, 1.0, 1 - share, self.different)
        gain, error = self.moved / self.D_D, sqrt(self.lost / self.D_D)
        predicted = 1.0 if self.drawn else 1 + self.rounded / self.D_D
        return Verdict(name, self._outcome(gain, predicted, error), gain, predicted, error, self.different)

    def _outcome(self, gain: float, predicted: float, error: float) -> Outcome:
        if gain < TRACE:
            return "absent"
        if not LOW <= gain <= HIGH:
            return "partial"
        if not self.different:
            return "exact"
        error_of_gain = sqrt(max(self.spread, self.scatter)) / self.D_D
        expected = abs(gain - predicted) <= ERRORS * error_of_gain + FACTOR
        near = not self.beyond or (self.added and error < 1)
        return "rounded" if expected and near else "partial"


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
