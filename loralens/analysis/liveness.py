"""Is an adapter live where it is served? Statistics of served changes of log-probabilities against predicted ones.

A *change* is log p(token | adapter) − log p(token | base), in nats. The server's changes are compared with those that
the local model predicts for the adapter as it is, at other strengths, and with faults. All arrays are finite, and
grouped by prompts, because tokens of one prompt depend on each other: every interval is a bootstrap over prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
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
# A base that computes differently answers with a smaller slope: 16 bits round small updates away, and a base of fewer
# bits has other changes, of which only a part is common to both. The lost share grows with noise / change; it was 0.08
# at 0.28 (bfloat16, a weak adapter), and 0.08 to 0.22 at 0.6 to 0.9 (4 bits), so this multiple covers it.
LOST = 0.5
MOST_LOST = 0.75
# A wrong prediction can beat the right one by chance by the square of its projection on the noise, which is below this
# many variances in all but one case of 2,000 (χ² with one degree of freedom).
CHANCE = 12.0
EXCLUDED = 0.975  # of the resamples must exclude an explanation
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

    def times(self, factor: float) -> "Interval":
        """The interval of a positive multiple."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)


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

    def extended(self, strength: float, changes: Changes) -> "Curve":
        """The curve with one more strength, above all others."""
        longer = [np.vstack([one, more]) for one, more in zip(self.changes, changes, strict=True)]
        return Curve(np.append(self.strengths, strength), longer)

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
            columns.append(np.sum((observed - predicted) ** 2, axis=1))
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
        Root mean square of served − predicted change, in nats, after what a server may lose; see `compare_faults`.
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


def lost_share(predicted: Changes, *, noise: float) -> float:
    """The largest share of a predicted change that a server may lose without a fault.

    ``noise`` is the standard deviation of a served change in nats.
    """
    change = rms(predicted)
    return min(LOST * noise / change, MOST_LOST) if change else MOST_LOST


def fit_strength(served: Changes, curve: Curve, *, noise: float) -> Interval:
    """The strength at which the predicted changes are nearest to the served ones, by least squares.

    The slope of served on predicted changes is not the strength, because the changes are not linear in it; therefore
    the curve of the local model over strengths is fitted. The bootstrap sees what differs between prompts, and not what
    all of them lose, so the interval is at least as wide as `SAME` and the `lost_share`.
    """
    fine, squares = curve.squared_distances(served)
    value = float(fine[squares.sum(axis=1).argmin()])
    resampled = fine[(squares @ weights_of_resamples(squares.shape[1]).T).argmin(axis=0)]
    least = SAME * max(value, 1.0) + value * lost_share(curve.at(1.0), noise=noise)
    return interval(value, resampled, squares.shape[1], at_least=least)


def compare_faults(
    served: Changes, predicted: Mapping[str, Changes], *, noise: float
) -> tuple[list[FaultFit], set[str]]:
    """Which of the predictions explain the served changes, nearest first, and which can be told from ``live``.

    Parameters
    ----------
    served : sequence of ndarray
    predicted : mapping of str to sequence of ndarray
        The predicted changes of every fault. ``live`` must be among them.
    noise : float
        Standard deviation of a served change that no prediction explains, in nats.

    Notes
    -----
    Every prediction may be multiplied by a factor between 1 − `lost_share` and 1 + `SAME`. A fault is not possible if
    in nearly all resamples its squared distance exceeds that of the nearest prediction by more than chance and `SAME`
    allow. It can be told from ``live`` if in as many resamples the square of their difference is at least four times
    that, so that a second draw of the noise would tell them apart too.
    """
    names, live = list(predicted), predicted[LIVE]
    kept = 1 - lost_share(live, noise=noise)
    squares = np.array([_squares(served, one, kept) for one in predicted.values()])  # (faults, prompts)
    tokens = max(sum(map(len, served)), 1)
    best = int(squares.sum(axis=1).argmin())
    variance = max(noise**2, float(squares[best].sum()) / tokens)
    lengths = np.array([float(np.sum(one**2)) for one in live])
    floor = lengths * SAME**2 + CHANCE * variance / len(served)
    resamples = weights_of_resamples(len(served)).T

    def mostly(excess: NDArray[np.float64]) -> NDArray[np.bool_]:
        return np.asarray((excess @ resamples > 0).mean(axis=1) >= EXCLUDED)

    possible = ~mostly(squares - squares[best] - floor)
    possible[best] = True
    visible = mostly(np.array([_squares(one, live, kept) for one in predicted.values()]) - 4 * floor)
    distances = np.sqrt(squares.sum(axis=1) / tokens)
    order = np.argsort(squares.sum(axis=1), kind="stable")
    fits = [FaultFit(names[i], float(distances[i]), bool(possible[i])) for i in order]
    return fits, {name for name, seen in zip(names, visible, strict=True) if seen}


def _squares(served: Changes, predicted: Changes, kept: float) -> list[float]:
    """For each prompt Σ (served − factor · predicted)², with the best factor between ``kept`` and 1 + `SAME`."""
    product = sum(float(one @ other) for one, other in zip(served, predicted, strict=True))
    length = sum(float(one @ one) for one in predicted)
    factor = float(np.clip(product / length, kept, 1 + SAME)) if length else 1.0
    return [float(np.sum((one - factor * other) ** 2)) for one, other in zip(served, predicted, strict=True)]


ITERATIONS = 8  # of the strengths of groups, which converge in about four
COLLINEAR = 0.95  # groups whose contributions have a larger cosine are one group


def group_strengths(
    served: Changes,
    live: Changes,
    without: Mapping[str, Changes],
    alone: Mapping[str, Changes] | None = None,
    *,
    noise: float,
) -> list[GroupFit]:
    """The strength of each group of modules: 1 if the server applies it, 0 if it drops it.

    Parameters
    ----------
    served, live : sequence of ndarray
        The served changes, and those predicted for the adapter as it is.
    without, alone : mapping of str to sequence of ndarray
        For each group the predicted changes of the adapter without it, and of the group alone. Without ``alone`` the
        strengths are right only near 1.
    noise : float
        Standard deviation of a served change, in nats.

    Notes
    -----
    Let A be the change by a group alone and T = live − without. In the linear model near 1 the change is
    live − Σ (1 − s) T. With ``alone`` it is Σ s (A + m (T − A) / 2) with the mean m of the strengths of the other
    groups, which is exact for two groups that are on or off; what is missing in it if all are on is added with the
    product of all strengths. Solved by least squares, with m from the iteration before. Groups whose T are nearly
    parallel are reported together.
    """
    groups: list[tuple[str, ...]] = [(name,) for name in without]
    ends = np.cumsum([len(one) for one in served])[:-1]
    y, L = np.concatenate(served), np.concatenate(live)
    T: dict[tuple[str, ...], NDArray[np.float64]]
    A: dict[tuple[str, ...], NDArray[np.float64]]
    T = {(name,): L - np.concatenate(changes) for name, changes in without.items()}
    A = {(name,): np.concatenate(changes) for name, changes in (alone or {}).items()}
    while len(groups) > 1:
        pairs = [(_cosine(T[one], T[other]), one, other) for one, other in combinations(groups, 2)]
        cosine, one, other = max(pairs, key=lambda pair: pair[0])
        if cosine < COLLINEAR:
            break
        for changes in (T, A) if A else (T,):
            changes[one + other] = changes.pop(one) + changes.pop(other)
        groups = [group for group in groups if group not in (one, other)] + [one + other]
    tops = np.stack([T[group] for group in groups], axis=1)
    C, offset = tops, L - tops.sum(axis=1)
    solution = _solve(C, y - offset)
    if A:
        singles = np.stack([A[group] for group in groups], axis=1)
        missing = L - (singles + (tops - singles) / 2 * (len(groups) > 1)).sum(axis=1)
        strengths = np.ones(len(groups))
        for _ in range(ITERATIONS):
            others = (strengths.sum() - strengths) / max(len(groups) - 1, 1)
            C = singles + np.clip(others, 0, 2) * (tops - singles) / 2
            offset = float(np.clip(strengths.prod(), 0, 1)) * missing
            solution = strengths = _solve(C, y - offset)
    products = np.stack([part.T @ part for part in np.split(C, ends)])  # (prompts, groups, groups)
    targets = np.stack([part.T @ one for part, one in zip(np.split(C, ends), np.split(y - offset, ends), strict=True)])
    weights = weights_of_resamples(len(served))[: RESAMPLES // 4]
    resampled = np.array([_solve(np.tensordot(row, products, 1), np.tensordot(row, targets, 1)) for row in weights])
    found = []
    for i, group in enumerate(groups):
        least = SAME + abs(float(solution[i])) * lost_share([tops[:, i]], noise=noise)
        found.append(GroupFit(group, interval(float(solution[i]), resampled[:, i], len(served), at_least=least)))
    return found


def _cosine(one: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return float(one @ other) / lengths if lengths else 1.0


def _solve(matrix: NDArray[np.float64], target: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.linalg.lstsq(matrix, target, rcond=1e-10)[0], np.float64)


def rms(changes: Changes) -> float:
    """Root mean square over all tokens of all prompts, in nats; 0 without any."""
    flat = np.concatenate(changes) if len(changes) else np.zeros(0)
    return float(sqrt((flat**2).mean())) if flat.size else 0.0
