"""The trajectory of a training run through its checkpoints: lengths, directions, and when the direction settled."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import final

import numpy as np

from loralens.analysis.equality import differences
from loralens.analysis.every_pair import connected_groups, known_mean, pairwise
from loralens.analysis.spectrum import Spectrum, mean_effective_rank, measure_spectrum, total_norm
from loralens.choices import Side
from loralens.core.adapter import Adapter
from loralens.core.matching import same_modules
from loralens.core.selection import select
from loralens.core.threads import Step

# Smallest cosine with the last checkpoint at which the direction counts as the final one. The angle is then at most
# 26°, and at most a fifth of the energy of the update, 1 − 0.9², lies outside the final direction.
SETTLED = 0.9


@final
@dataclass(frozen=True, slots=True)
class TrajectoryPoint:
    """The measures of one checkpoint.

    Attributes
    ----------
    frobenius : float
        ‖ΔW‖_F of the whole update, √Σ over modules.
    spectral : float
        The largest σ₁ of any module.
    effective_rank : float
        Mean over modules with ΔW ≠ 0.
    length : float or None
        ‖ΔW_t − ΔW_{t−1}‖_F, exact; None for the first.
    cosine, cosine_z : float
        Cosine of the whole updates with the last checkpoint, and its z-score against chance.
    previous_cosine : float or None
        Cosine with the checkpoint before; None for the first.
    phi : dict of side to float
        φ of all directions against the last checkpoint, mean over modules.
    previous_phi : dict of side to float, or None
        The same against the checkpoint before; None for the first.
    initial : float
        Cosine of vec(A) with the last checkpoint, mean over modules.
    """

    frobenius: float
    spectral: float
    effective_rank: float
    length: float | None
    cosine: float
    cosine_z: float
    previous_cosine: float | None
    phi: dict[Side, float]
    previous_phi: dict[Side, float] | None
    initial: float


@final
@dataclass(frozen=True, slots=True)
class Trajectory:
    """The trajectory of a run.

    Attributes
    ----------
    points : tuple of TrajectoryPoint
    chance : dict of side to float
        Chance level of φ against the last checkpoint, mean over the others that are not 0; NaN if all of them are.
    runs : tuple of tuple of int
        Groups of checkpoints that began from the same A, or that point the same way whatever A is, because the last
        checkpoint of a run may be re-factored. More than one group means that these belong to several runs.
    settled : int or None
        The first checkpoint from which on every cosine with the last one is at least `SETTLED`. None if the direction
        still turned before the last checkpoint, or if there are several runs.
    """

    points: tuple[TrajectoryPoint, ...]
    chance: dict[Side, float]
    runs: tuple[tuple[int, ...], ...]
    settled: int | None


def measure_trajectory(
    adapters: Sequence[Adapter],
    *,
    modules: Sequence[str] = (),
    labels: Sequence[str] = (),
    threads: int = 1,
    step: Step | None = None,
) -> Trajectory:
    """Measure how an update grew and turned from checkpoint to checkpoint.

    Parameters
    ----------
    adapters : sequence of Adapter
        Two or more checkpoints, in the order of training.
    modules : sequence of str
        Globs over module names or kinds; all where empty.
    labels : sequence of str
        The names of the adapters in error messages, as in `pairwise`.
    threads : int
        Modules worked on at a time.
    step : callable, optional
        Called with 1 as often as `trajectory_steps` says: for every module of the collection, of each checkpoint, and
        of each pair of neighbours.

    Raises
    ------
    OptionError, MismatchError, FormatError
        As `pairwise`.

    Notes
    -----
    ``length`` comes from the norm of one product a module (`differences`), so near-equal checkpoints do not cancel.
    """
    pairs = pairwise(adapters, modules=modules, labels=labels, threads=threads, step=step)
    spectra = [measure_spectrum(adapter, modules=modules, threads=threads, step=step) for adapter in adapters]
    lengths = [_length(adapters[t - 1 : t + 1], spectra[t - 1 : t + 1], step) for t in range(1, len(adapters))]
    sides: tuple[Side, ...] = ("in", "out")
    phis = {side: pairs.phi(side) for side in sides}
    cosine, z, initial = pairs.cosine, pairs.cosine_z, pairs.shared_initialisation
    points = tuple(
        TrajectoryPoint(
            frobenius=total_norm(measured.values()),
            spectral=max((one.spectral for one in measured.values()), default=0.0),
            effective_rank=mean_effective_rank(measured.values()),
            length=lengths[t - 1] if t else None,
            cosine=float(cosine[t, -1]),
            cosine_z=float(z[t, -1]),
            previous_cosine=float(cosine[t, t - 1]) if t else None,
            phi={side: float(phis[side][t, -1]) for side in sides},
            previous_phi={side: float(phis[side][t, t - 1]) for side in sides} if t else None,
            initial=float(initial[t, -1]),
        )
        for t, measured in enumerate(spectra)
    )
    alike = np.fmax(initial, cosine >= SETTLED)  # true (1) if two point the same way, else the cosine of A
    runs = tuple(tuple(group) for group in connected_groups(alike))
    chance = {side: float(known_mean(pairs.chance(side)[-1, :-1])) for side in sides}
    last = len(points) - 1  # its cosine with itself is 1 in any case
    settled = next((t for t in range(last) if all(point.cosine >= SETTLED for point in points[t:last])), None)
    # If there are several runs, the directions of the others do not approach the last checkpoint.
    return Trajectory(points, chance, runs, settled if len(runs) == 1 else None)


def trajectory_steps(adapters: Sequence[Adapter], modules: Sequence[str] = ()) -> int:
    """How often `measure_trajectory` calls its ``step``; a little too low if checkpoints differ in their modules."""
    counts = [len(select(adapter, modules)) for adapter in adapters]
    # Once for each module of the collection, of every spectrum, and of every checkpoint compared with the one before.
    return max(counts) + sum(counts) + sum(counts[1:])


def _length(adapters: Sequence[Adapter], spectra: Sequence[Mapping[str, Spectrum]], step: Step | None) -> float:
    """‖ΔW₂ − ΔW₁‖_F over the modules whose spectra are given; infinite if a shape changed."""
    (first, second), (spectra_first, spectra_second) = adapters, spectra
    names = same_modules(first, second)
    first, second = (
        adapter.without(set(adapter) - measured.keys()) for adapter, measured in zip(adapters, spectra, strict=True)
    )
    squares = 0.0
    for difference in differences(first, second, step=step):
        name = difference.name  # of the first, or of the second if only that has the module
        both = spectra_first.get(name), spectra_second.get(names.get(name, name))
        # The difference is relative to the larger norm, so this is its own norm.
        squares += (difference.relative * max(s.frobenius for s in both if s)) ** 2
    return sqrt(squares)
