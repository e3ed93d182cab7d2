"""The error of a compressed adapter, measured on its stored factors, so that rounding is included."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import final

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array, LazyArray
from loralens.core.lowrank import Bases, LowRank, same_numbers
from loralens.core.naming.matching import same_modules
from loralens.core.structured import Dense, Update
from loralens.core.threads import Step, in_threads
from loralens.errors import ShapeError, place
from loralens.linalg.difference import difference_singular_values
from loralens.linalg.measures import frobenius, spectral


@final
@dataclass(frozen=True, slots=True)
class UpdateLoss:
    """The error of one module.

    Attributes
    ----------
    rank_before, rank_after : int
        Nominal ranks; ``rank_after`` is 0 if the module was left out.
    frobenius : float
        ‖ΔW‖_F before compression.
    relative_error : float
        ‖ΔW−ΔW'‖_F / ‖ΔW‖_F; 0 where both are 0.
    spectral_error : float
        ‖ΔW−ΔW'‖₂ / ‖ΔW‖₂.
    """

    rank_before: int
    rank_after: int
    frobenius: float
    relative_error: float
    spectral_error: float

    @property
    def energy_kept(self) -> float:
        """1 − relative_error², at least 0: for a truncation the share of Σσ² that it keeps."""
        # The error is above 1 if the other update is farther from ΔW than 0 is.
        return max(0.0, 1 - self.relative_error**2)


def total_error(losses: Mapping[str, UpdateLoss]) -> float:
    """‖ΔW−ΔW'‖ / ‖ΔW‖ of a whole adapter, with ‖·‖² = Σ‖·‖_F² over its modules; 0 if the adapter is 0."""
    largest = max((loss.frobenius for loss in losses.values()), default=0.0)
    if largest == 0:
        return 0.0
    # Relative to the largest norm, no square underflows or overflows.
    energies = {name: (loss.frobenius / largest) ** 2 for name, loss in losses.items()}
    update_loss = sum(energies[name] * loss.relative_error**2 for name, loss in losses.items())
    return sqrt(update_loss / sum(energies.values()))


def predict_loss(s: Array, rank_after: int, rank_before: int) -> UpdateLoss:
    """The error of keeping the first ``rank_after`` of the singular values ``s``, before any rounding."""
    return _loss(rank_before, rank_after, s, s[rank_after:])


def predict_losses(
    spectra: Sequence[Array], ranks_after: Sequence[int], ranks_before: Sequence[int]
) -> list[UpdateLoss]:
    """The `predict_loss` of many modules, with the same bits; those with as many values and one new rank together."""
    alike: dict[tuple[int, int], list[int]] = {}
    for i, (s, after) in enumerate(zip(spectra, ranks_after, strict=True)):
        alike.setdefault((s.size, min(after, s.size)), []).append(i)
    losses_by_place: dict[int, UpdateLoss] = {}
    for (size, after), ids in alike.items():
        rows = np.stack([spectra[i] for i in ids])
        # Values of 0 are left out of norms, module by module.
        if not size or rows[:, -1].min() <= 0:
            losses_by_place |= {i: predict_loss(spectra[i], ranks_after[i], ranks_before[i]) for i in ids}
            continue
        norms, lost = _lengths(rows), _lengths(rows[:, after:])
        tops = lost / norms, (rows[:, after] / rows[:, 0] if after < size else np.zeros(len(ids)))
        columns = zip(ids, norms.tolist(), *(values.tolist() for values in tops), strict=True)
        losses_by_place |= {i: UpdateLoss(ranks_before[i], ranks_after[i], *values) for i, *values in columns}
    return [losses_by_place[i] for i in range(len(spectra))]


def _lengths(rows: Array) -> Array:
    """The `frobenius` of every row, of falling positive values."""
    if not rows.shape[1]:
        return np.zeros(len(rows))
    x = rows / rows[:, :1]
    return rows[:, 0] * np.sqrt((x[:, None] @ x[:, :, None])[:, 0, 0])


def losses(
    before: Adapter,
    after: Adapter,
    *,
    bases: Callable[[str], Bases | None] | None = None,
    threads: int = 1,
    step: Step | None = None,
) -> dict[str, UpdateLoss]:
    """The error of every module of ``before`` in ``after``, in natural order.

    Parameters
    ----------
    before, after : Adapter
        Modules are matched by name, else by normal form, because another dialect may name them differently.
    bases : callable, optional
        Name → `LowRank.bases` of the module of ``before``, if they are known already.
    threads : int
        Modules worked on at a time.
    step : callable, optional
        Called with 1 after every module.

    Returns
    -------
    dict of str to UpdateLoss
        Under the names of ``before``. A module that ``after`` lacks has the error 1 and the rank 0.

    Raises
    ------
    ShapeError
        A module has changed its shape.
    FormatError
        A module holds NaN or Inf.

    Notes
    -----
    The error is computed from both pairs of factors, not from the singular values that were dropped; it is itself
    accurate to ε‖ΔW‖. Where both have the same factors, nothing is computed.
    """
    names = same_modules(before, after)  # called once for all modules, as matching by normal form looks at all names

    def measure_loss(name: str) -> UpdateLoss:
        with place(name):
            return update_loss(before[name], after[names[name]] if name in names else None, bases=bases and bases(name))

    return in_threads(measure_loss, list(before), threads, step)


def update_loss(before: Update, after: Update | None, *, bases: Bases | None = None) -> UpdateLoss:
    """The error of one update that was replaced or left out; ``bases`` are those of ``before``, if known."""
    if after is not None and before.shape != after.shape:
        raise ShapeError(
            f"the update had the shape {before.shape} and now has {after.shape}",
            fix="give two forms of the same adapter",
        )
    if not isinstance(before, LowRank):
        s = lost = before.singular_values()
        if after is not None:
            lost = Dense(LazyArray.of(before.dense() - after.dense())).singular_values()
        return _loss(before.rank, after.rank if after else 0, s, lost)
    Q_B, s, Q_A = bases or before.bases()
    if after is None:
        return _loss(before.rank, 0, s, s)
    if isinstance(after, LowRank) and same_numbers(before, after):
        return _loss(before.rank, after.rank, s, s[:0])
    unit = spectral(s) or 1.0  # a unit in which no square overflows or underflows
    # The difference is taken in the orthonormal directions of the old update, so that nearly equal updates lose no
    # digits by cancellation.
    B = (after.scale / unit) * after.B.astype(np.float64)
    lost = unit * difference_singular_values(Q_B, s / unit, Q_A, B, after.A.astype(np.float64))
    return _loss(before.rank, after.rank, s, lost)


def _loss(rank_before: int, rank_after: int, s: Array, lost: Array) -> UpdateLoss:
    """The error from the singular values of the update and of what it lost."""
    norm, top, error = frobenius(s), spectral(s), frobenius(lost)
    zero = float(error > 0)  # the relative error of an update that was 0: 1 if it is no longer 0
    relative, spectral_error = error / norm if norm else zero, spectral(lost) / top if top else zero
    return UpdateLoss(rank_before, rank_after, norm, relative, spectral_error)
