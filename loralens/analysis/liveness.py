"""Is an adapter live where it is served? Statistics of served changes of log-probabilities against predicted ones.

A *change* is log p(token | adapter) − log p(token | base), in nats. The server's changes are compared with those that
the local model predicts for the adapter as it is, at other strengths, and with faults. All arrays are grouped by
prompts, because tokens of one prompt depend on each other: every interval is a bootstrap over prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import final

import numpy as np
from numpy.typing import NDArray

from loralens.tables.table import Recorded

Changes = Sequence[NDArray[np.float64]]  # for each prompt the changes of its tokens, shape (tokens,)

LIVE = "live"  # the name of the prediction for the adapter as it is
RESAMPLES = 2000
# Two predictions that differ by less than this share of the predicted change are one: servers compute in 16 bits, and
# round the factors of the adapter too.
SAME = 0.02
# A wrong prediction can beat the right one by chance by the square of its projection on the noise, which is below this
# many variances in all but one case of 2,000 (χ² with one degree of freedom).
CHANCE = 12.0
FINE = np.linspace(0.0, 2.0, 401)  # the strengths that are tried, up to 2; above that in steps of 2 %


@final
@dataclass(frozen=True, slots=True)
class Interval(Recorded):
    """An estimate with its 95 % interval."""

    value: float
    low: float
    high: float

    def contains(self, number: float) -> bool:
        """Whether the number lies in the interval."""
        return self.low <= number <= self.high


@final
@dataclass(frozen=True, slots=True)
class Curve:
    """The predicted changes at several strengths of the adapter.

    Attributes
    ----------
    strengths : ndarray of float64, shape (strengths,)
        Ascending, from 0 on. 1 is the adapter as it is.
    changes : sequence of ndarray of float64, shape (strengths, tokens)
        One for each prompt.
    """

    strengths: NDArray[np.float64]
    changes: Changes

    def at(self, strength: float) -> list[NDArray[np.float64]]:
        """The predicted changes at one strength, by cubic splines between those that were computed."""
        from scipy.interpolate import CubicSpline

        return [CubicSpline(self.strengths, change, axis=0)(strength) for change in self.changes]

    def squared_distances(self, served: Changes) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Σ (served − predicted)² of every prompt at a fine grid of strengths: strengths (M,), squares (M, prompts)."""
        from scipy.interpolate import CubicSpline

        last = float(self.strengths[-1])
        fine = FINE[last >= FINE]
        if last > fine[-1]:
            steps = int(np.ceil(np.log(last / fine[-1]) / np.log(1.02)))
            fine = np.concatenate([fine, np.geomspace(fine[-1], last, steps + 1)[1:]])
        columns = []
        for change, observed in zip(self.changes, served, strict=True):
            predicted = CubicSpline(self.strengths, change, axis=0)(fine)
            columns.append(np.nansum((observed - predicted) ** 2, axis=1))
        return fine, np.stack(columns, axis=1)


@final
@dataclass(frozen=True, slots=True)
class FaultFit(Recorded):
    """How far the served changes are from the prediction of one fault.

    Attributes
    ----------
    name : str
        The fault, in words; ``live`` is the adapter as it is.
    distance : float
        Root mean square of served − predicted change, in nats.
    possible : bool
        Whether the fault explains the answers as well as the best prediction does, within the uncertainty.
    """

    name: str
    distance: float
    possible: bool


@final
@dataclass(frozen=True, slots=True)
class GroupFit(Recorded):
    """The strength of one group of modules, or of several that the prompts cannot tell apart."""

    groups: tuple[str, ...]
    strength: Interval


def weights_of_resamples(prompts: int, *, seed: int = 0) -> NDArray[np.float64]:
    """How often each prompt is in each resample, shape (`RESAMPLES`, prompts)."""
    drawn = np.random.default_rng(seed).integers(0, prompts, (RESAMPLES, prompts))
    return np.stack([(drawn == prompt).sum(axis=1) for prompt in range(prompts)], axis=1).astype(np.float64)


def interval(value: float, resampled: NDArray[np.float64], prompts: int, *, at_least: float = 0.0) -> Interval:
    """The 95 % interval of an estimate from its values in resamples of few prompts.

    The standard deviation of resamples of n prompts is too small by √((n − 1)/n), and the quantile of a normal
    distribution too small for n − 1 degrees of freedom (Student's t); both are corrected. ``at_least`` is the smallest
    half-width.
    """
    from scipy.stats import t

    if prompts < 2:
        return Interval(value, -np.inf, np.inf)
    low, high = np.quantile(resampled, [0.025, 0.975])
    widening = float(t.ppf(0.975, prompts - 1)) / 1.96 * sqrt(prompts / (prompts - 1))
    return Interval(
        value,
        float(value - max(at_least, widening * (value - low))),
        float(value + max(at_least, widening * (high - value))),
    )


def fit_strength(served: Changes, curve: Curve, *, noise: float) -> Interval:
    """The strength at which the predicted changes are nearest to the served ones, by least squares.

    The slope of served on predicted changes is not the strength, because the changes are not linear in it; therefore
    the curve of the local model over strengths is fitted. The interval is at least as wide as `SAME` and as what
    ``noise``, the standard deviation of a served change in nats, moves it by.
    """
    fine, squares = curve.squared_distances(served)
    value = float(fine[squares.sum(axis=1).argmin()])
    resampled = fine[(squares @ weights_of_resamples(squares.shape[1]).T).argmin(axis=0)]
    length = sqrt(sum(float(np.sum(one**2)) for one in curve.at(1.0)))
    least = SAME * max(value, 1.0) + (sqrt(CHANCE) * noise / length if length else np.inf)
    return interval(value, resampled, squares.shape[1], at_least=least)


def compare_faults(served: Changes, predicted: Mapping[str, Changes], *, noise: float) -> list[FaultFit]:
    """Which of the predictions explain the served changes, nearest first.

    Parameters
    ----------
    served : sequence of ndarray
    predicted : mapping of str to sequence of ndarray
        The predicted changes of every fault. ``live`` must be among them.
    noise : float
        Standard deviation of a served change that no prediction explains, in nats.

    Notes
    -----
    A fault is not possible if in 97.5 % of the resamples its squared distance exceeds that of the nearest prediction by
    more than the square of a change of `SAME` of the predicted one and `CHANCE` times the variance of the noise.
    """
    names = list(predicted)
    squares = np.array([_squares(served, changes) for changes in predicted.values()])  # (faults, prompts)
    counts = sum(int(np.isfinite(one).sum()) for one in served)
    floor = np.array([float(np.sum(one**2)) for one in predicted[LIVE]]) * SAME**2 + CHANCE * noise**2 / len(served)
    best = int(squares.sum(axis=1).argmin())
    excess = (squares - squares[best] - floor) @ weights_of_resamples(len(served)).T  # (faults, resamples)
    possible = (excess > 0).mean(axis=1) < 0.975
    distances = np.sqrt(squares.sum(axis=1) / max(counts, 1))
    order = np.argsort(squares.sum(axis=1), kind="stable")
    return [FaultFit(names[i], float(distances[i]), bool(possible[i])) for i in order]


def _squares(served: Changes, predicted: Changes) -> list[float]:
    return [float(np.nansum((one - other) ** 2)) for one, other in zip(served, predicted, strict=True)]


def visible_faults(predicted: Mapping[str, Changes], *, noise: float) -> set[str]:
    """The faults whose prediction is far enough from that of the adapter as it is to be told from it."""
    # Four times the tolerance of `compare_faults`, so that nearly all resamples tell them apart.
    floor = 4 * (SAME**2 * sum(float(np.sum(one**2)) for one in predicted[LIVE]) + CHANCE * noise**2)
    return {
        name for name, changes in predicted.items() if name != LIVE and sum(_squares(predicted[LIVE], changes)) > floor
    }


COLLINEAR = 0.95  # groups whose contributions have a larger cosine are one group


def group_strengths(served: Changes, live: Changes, contributions: Mapping[str, Changes]) -> list[GroupFit]:
    """The strength of each group of modules: 1 if the server applies it, 0 if it drops it.

    The contribution of a group is the predicted change minus that without the group, so
    served ≈ live − Σ (1 − strength) · contribution, which is exact for one group at 0. It is solved by least squares.
    Groups whose contributions are nearly parallel, or too small to be seen, are reported together.
    """
    groups: list[tuple[str, ...]] = [(name,) for name in contributions]
    vectors: dict[tuple[str, ...], list[NDArray[np.float64]]] = {
        (name,): list(changes) for name, changes in contributions.items()
    }
    while len(groups) > 1:
        stacked = {group: np.concatenate(vectors[group]) for group in groups}
        pairs = [
            (_cosine(stacked[one], stacked[other]), one, other)
            for i, one in enumerate(groups)
            for other in groups[i + 1 :]
        ]
        cosine, one, other = max(pairs, key=lambda pair: pair[0])
        if cosine < COLLINEAR:
            break
        joined = one + other
        vectors[joined] = [a + b for a, b in zip(vectors.pop(one), vectors.pop(other), strict=True)]
        groups = [group for group in groups if group not in (one, other)] + [joined]
    products, targets = [], []  # for each prompt CᵀC (groups, groups) and Cᵀ(live − served) (groups,)
    for prompt, observed in enumerate(served):
        seen = np.isfinite(observed)
        C = np.stack([vectors[group][prompt][seen] for group in groups], axis=1)
        products.append(C.T @ C)
        targets.append(C.T @ (live[prompt][seen] - observed[seen]))
    weights = weights_of_resamples(len(served))
    whole = _solve(np.sum(products, axis=0), np.sum(targets, axis=0))
    resampled = np.array(
        [_solve(np.tensordot(row, products, 1), np.tensordot(row, targets, 1)) for row in weights[: RESAMPLES // 4]]
    )
    return [
        GroupFit(group, interval(1 - whole[i], 1 - resampled[:, i], len(served), at_least=SAME))
        for i, group in enumerate(groups)
    ]


def _cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / lengths if lengths else 1.0


def _solve(products: NDArray[np.float64], targets: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.linalg.lstsq(products, targets, rcond=1e-10)[0], np.float64)


def rms(changes: Changes) -> float:
    """Root mean square over all tokens of all prompts, in nats; 0 without any."""
    flat = np.concatenate([np.asarray(one)[np.isfinite(one)] for one in changes]) if changes else np.zeros(0)
    return float(sqrt((flat**2).mean())) if flat.size else 0.0
