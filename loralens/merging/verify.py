"""Whether a merged model contains an adapter: the merge is repeated, and every module is compared with the model."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Literal, NamedTuple, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.core.weights import CodedWeight, GridRows
from loralens.linalg.factor import Floats
from loralens.linalg.rounding import ulp
from loralens.merging.codec import Codec, GridBlock, GridCodec, MergedBlock, TensorMerge
from loralens.merging.fidelity import dot
from loralens.merging.grid_moves import added_numbers
from loralens.merging.merge_plan import MatrixRows
from loralens.merging.patch import bits

Outcome = Literal["exact", "rounded", "partial", "absent"]

LOW, HIGH = 0.9, 1.1  # gains between which an update counts as present at full strength
TRACE = 0.1  # gain below which an update counts as absent
ERRORS = 3  # standard errors by which a gain may differ from the prediction
FACTOR = 2.0**-9  # tolerance added to this, because other tools round the scale or each product to bfloat16
NEAR = 1.001  # units in the last place by which an entry may differ from W + D and still be a rounding of it
# The gains of merges into codes with two seeds may differ by this much beyond the standard error: the clipped part is
# an estimate.
NEAR_GAIN = 0.02


@final
@dataclass(frozen=True, slots=True)
class Verdict:
    """The result of the comparison for one module of the adapter.

    Attributes
    ----------
    module : str
        For a tensor that the adapter replaces, its key.
    outcome : str
        ``exact``: every bit is what this merge would write. ``rounded``: some bits differ, but the gain is near 1 and
        as predicted; besides, every entry is W + D within one unit in the last place, or D was added and the error is
        below 1. ``partial``: the update is present, but neither of these is true, because of another merge, a later
        change, or the rounding itself. ``absent``: the gain is below 0.1, because the weight is that of the base, has
        nothing to do with the update, or was rounded back.
    gain : float
        ⟨M − W, D⟩/‖D‖², where M is the weight in the model. For a tensor that is replaced by R, D = R − W.
    predicted : float
        The gain of the weight that this merge would write. Under stochastic rounding it is 1, the mean.
    error : float
        ‖M − W − D‖_F/‖D‖_F.
    different : int
        Number of entries that differ from what this merge would write.
    norm : float
        ‖D‖_F; 0 if nothing can be compared.
    noise : float
        The error ‖M − W − D‖_F/‖D‖_F of the weight that this merge would write.
    """

    module: str
    outcome: Outcome
    gain: float
    predicted: float
    error: float
    different: int
    norm: float = 0.0
    noise: float = 0.0

    @property
    def by_rounding(self) -> bool:
        """Whether the model has exactly what this merge would write, but the rounding removed much of the update."""
        return not self.different and self.outcome in ("partial", "absent")


class HeldUpdate(NamedTuple):
    """How the change of a model from its base, E = M − W, relates to the update D, over several modules together.

    Attributes
    ----------
    gain : float
        ⟨E, D⟩/‖D‖², the strength at which the model holds the update.
    cosine : float
        ⟨E, D⟩/(‖E‖·‖D‖), where the rounding noise is subtracted from ‖E‖. It is 1 if E is a multiple of D.
    """

    gain: float
    cosine: float


def relation(verdicts_of_modules: Iterable[Verdict]) -> HeldUpdate | None:
    """The relation over some modules; None if no update of theirs can be compared."""
    compared = [verdict for verdict in verdicts_of_modules if verdict.norm and isfinite(verdict.error)]
    energy = sum(verdict.norm**2 for verdict in compared)
    if not energy:
        return None
    gain = sum(verdict.gain * verdict.norm**2 for verdict in compared) / energy
    # ‖E‖² = ‖E − D‖² + 2⟨E, D⟩ − ‖D‖². The noise of this merge is subtracted from it: if the model holds another update
    # instead, the noise of that merge was about the same.
    size = sum((v.error**2 + 2 * v.gain - 1 - v.noise**2) * v.norm**2 for v in compared) / energy
    # If the noise is overestimated, ‖E‖² becomes too small. Its lower bound keeps the cosine at 1 or below.
    return HeldUpdate(gain, gain / sqrt(max(size, gain**2)) if gain else 0.0)


def verdicts(merge: TensorMerge, merged: LazyArray | CodedWeight | None) -> list[Verdict]:
    """The verdict on every module of one stored tensor.

    Parameters
    ----------
    merge : TensorMerge
        Prepared with the dtype of the merged tensor, or as the certificate of the merged model says.
    merged : LazyArray, CodedWeight or None
        The weight of the model in question; for float8 weights with scales, the product of both. None if it has no
        codes under this key.
    """
    plan, in_codes = merge.plan, isinstance(merge.codec, GridCodec)
    # A tensor that is only replaced has no modules, so its key takes their place.
    names = [segment.module for segment in plan.segments] or [plan.key]
    # Nothing can be compared: the update is absent by definition.
    if merged is None or merged.shape != plan.shape or (isinstance(merged, CodedWeight) and merged.grid is None):
        size = merged.size if isinstance(merged, LazyArray) else plan.source.size
        return [Verdict(name, "absent", 0.0, 1.0, 1.0, size) for name in names]
    # The model in question is read in the same blocks as the merge.
    rows = MatrixRows(merged, plan.matrix) if isinstance(merged, LazyArray) else None
    before = MatrixRows(plan.base, plan.matrix) if plan.base is not None and plan.base.shape == plan.shape else None
    comparisons: dict[str, _Comparison] = {}
    for block in merge.blocks():
        name = block.segment.module if block.segment else plan.key
        if block.segment or (not in_codes and (plan.replacement is not None or plan.tokens)):
            sums = comparisons.setdefault(name, _Comparison(merge.codec))
            if rows is not None:
                sums.take(block, rows.rows(block.start, block.stop), before)
            elif isinstance(merged, CodedWeight) and merged.grid is not None:
                sums.take_codes(block, merged.grid(block.start, block.stop))
    return [comparison.verdict(name) for name, comparison in comparisons.items()]


class _Comparison:
    """Sums over the blocks of one module. Infinite and NaN entries enter no sum; only their equality is counted.

    The standard error of the gain is √(Σ e²D²)/‖D‖², where e is the rounding error of each entry. It is computed twice,
    with e = M − W − D in the model and with the same difference in this merge, and the larger result is used. The
    formula assumes that the rounding errors are independent with mean 0.
    """

    def __init__(self, codec: Codec) -> None:
        self.drawn, self.in_codes, self.added = codec.rounding.mode == "stochastic", isinstance(codec, GridCodec), False
        tokens = codec.plan.tokens
        self.tokens = np.asarray(tokens.indices if tokens else (), dtype=np.int64)
        self.D_D = self.moved = self.lost = self.noise = self.rounded = self.spread = self.scatter = 0.0
        self.different = self.beyond = self.size = 0

    def take(self, block: MergedBlock, M: Array, before: MatrixRows | None) -> None:
        """Add the next rows of the merge and of the model; ``before`` is the base, if it has such a tensor."""
        self.different += int(np.count_nonzero(bits(M) != bits(block.numbers(block.merged))))
        self.size += M.size
        self.added |= block.D is not None
        if block.D is None and before is None:
            return
        ours, theirs = (x.astype(np.float64) for x in (block.numbers(block.merged), M))
        with np.errstate(invalid="ignore", over="ignore"):
            # If the tensor is only replaced, ``block.W`` is the replacement, so W is read from the base itself.
            own = block.W if block.D is not None or before is None else before.rows(block.start, block.stop)
            W = own.astype(np.float64)
            D = ours - W if block.D is None else block.D.astype(np.float64)
            if block.dora_factors is not None:
                D = (W + D) * block.dora_factors - W
            # Rows of tokens are replaced, so there D is the new row minus the row of the base.
            trained = self.tokens[(block.start <= self.tokens) & (self.tokens < block.stop)] - block.start
            D[trained] = ours[trained] - W[trained]
            moved, residual, loss = theirs - W, theirs - W - D, ours - W - D
            # One infinite entry would make every sum infinite; it still counts as equal or different above.
            finite = np.isfinite(residual) & np.isfinite(D) & np.isfinite(loss)
            moved, residual, D, loss = (np.where(finite, x, 0) for x in (moved, residual, D, loss))
            # For float8 with scales, a unit is the ulp of the stored number times its scale.
            scale = np.float64(1) if block.scale is None else block.scale
            unit = ulp(np.where(finite, W + D, 1) / scale, block.merged.dtype) * scale
            self.beyond += int(np.count_nonzero(np.abs(residual) > NEAR * unit))
        self._add(D, moved, residual, loss)

    def take_codes(self, block: GridBlock, grid: GridRows) -> None:
        """Add the next rows of a merge into codes, and of the model."""
        assert block.D is not None
        same_grid = (grid.lowest, grid.highest) == (block.grid.lowest, block.grid.highest)
        if same_grid and np.array_equal(grid.step, block.grid.step, equal_nan=True):
            self.different += int(np.count_nonzero(grid.codes != block.codes))
            moved: Floats = added_numbers(block.grid, grid.codes).astype(np.float64)
        else:
            # Codes with other scales stand for other numbers, so the decoded numbers are compared.
            self.different += grid.codes.size
            moved = grid.values(grid.codes).astype(np.float64) - block.W.astype(np.float64)
        D = block.D.astype(np.float64)
        self._add(D, moved, moved - D, added_numbers(block.grid, block.codes).astype(np.float64) - D)

    def _add(self, D: Floats, moved: Floats, residual: Floats, loss: Floats) -> None:
        """Add M − W, M − W − D, and the same difference in this merge."""
        self.D_D += dot(D, D)
        self.moved += dot(moved, D)
        self.lost += dot(residual, residual)
        self.noise += dot(loss, loss)
        self.rounded += dot(loss, D)
        self.spread += dot(loss * D, loss * D)
        self.scatter += dot(residual * D, residual * D)

    def verdict(self, name: str) -> Verdict:
        """The verdict from the sums. If there is no base tensor, the share of different entries decides."""
        # `not >` also catches NaN.
        if not self.D_D > 0:
            if self.in_codes:
                return Verdict(name, "partial" if self.different else "exact", 1.0, 1.0, 0.0, self.different)
            share = 1 - self.different / max(self.size, 1)
            outcome: Outcome = "exact" if share == 1 else "partial" if share > TRACE else "absent"
            return Verdict(name, outcome, share, 1.0, 1 - share, self.different)
        gain, error = self.moved / self.D_D, sqrt(self.lost / self.D_D)
        predicted = 1.0 if self.drawn and not self.in_codes else 1 + self.rounded / self.D_D
        outcome, norm = self._outcome(gain, predicted, error), sqrt(self.D_D)
        return Verdict(name, outcome, gain, predicted, error, self.different, norm, sqrt(self.noise) / norm)

    def _outcome(self, gain: float, predicted: float, error: float) -> Outcome:
        # The order matters: if the rounding removed the update, it is absent although every bit agrees.
        if gain < TRACE:
            return "absent"
        # Every code is the one that this merge draws. What the grid clipped is known then, and nothing is in doubt.
        if self.in_codes and self.drawn and not self.different:
            return "exact"
        if not LOW <= gain <= HIGH:
            return "partial"
        if self.in_codes:
            deviation = ERRORS * sqrt(2 * self.scatter) / self.D_D + NEAR_GAIN
            return "rounded" if abs(gain - predicted) <= deviation else "partial"
        if not self.different:
            return "exact"
        error_of_gain = sqrt(max(self.spread, self.scatter)) / self.D_D
        expected = abs(gain - predicted) <= ERRORS * error_of_gain + FACTOR
        # Entries that are off by more than a unit are tolerated only if the update was added, and if the error is
        # smaller than the update itself.
        near = not self.beyond or (self.added and error < 1)
        return "rounded" if expected and near else "partial"
