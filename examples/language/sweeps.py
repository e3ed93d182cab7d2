"""Sweeps of the learning rate: the best rate of every cell, and what follows for the claims of a paper."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log10
from statistics import fmean
from typing import Any, NamedTuple

TENFOLD = 10.0  # the paper's ratio of the best rates of LoRA and of full fine-tuning


class Best(NamedTuple):
    """The best rate of a cell at one seed.

    ``lr`` is the rate of the grid, ``fitted`` the lowest point of a parabola through it and its neighbours over the
    logarithm of the rate, and ``edge`` says that it is at an end of the grid, or next to a run that diverged.
    """

    lr: float
    fitted: float
    loss: float
    edge: bool


@dataclass(frozen=True)
class Sweep:
    """A cell with its losses on the held-out texts.

    Attributes
    ----------
    losses : mapping of int to mapping of float to (float or None)
        By seed and rate; None for a run that has diverged.
    trained : int
        The number of trained parameters; 0 where no run is done.
    """

    targets: str | None
    rank: int | None
    batch: int
    steps: int
    rates: Sequence[float]
    losses: Mapping[int, Mapping[float, float | None]]
    trained: int

    @property
    def seeds(self) -> list[int]:
        """The seeds with a best rate."""
        return [seed for seed in self.losses if self.best(seed) is not None]

    def best(self, seed: int) -> Best | None:
        """The best rate at a seed; None if it is not known.

        It is known if all rates are done, or those on both sides of the best one.
        """
        losses = self.losses.get(seed, {})
        finite = {lr: loss for lr, loss in losses.items() if loss is not None}
        if not finite:
            return None
        lr = min(finite, key=lambda rate: finite[rate])
        rates = sorted(self.rates)
        place = rates.index(lr)
        around = rates[max(0, place - 1) : place + 2]
        if len(losses) < len(rates) and (len(around) < 3 or not all(rate in losses for rate in around)):
            return None
        points = [(log10(rate), finite[rate]) for rate in around if rate in finite]
        edge = len(points) < 3
        return Best(lr, lr if edge else 10 ** _lowest(points), finite[lr], edge)

    def mean(self) -> dict[float, float]:
        """Rate → the mean loss over the seeds at which it is finite."""
        by_rate: dict[float, list[float]] = {}
        for losses in self.losses.values():
            for lr, loss in losses.items():
                if loss is not None:
                    by_rate.setdefault(lr, []).append(loss)
        return {lr: fmean(values) for lr, values in sorted(by_rate.items())}

    @property
    def bests(self) -> list[Best]:
        """The best rates at all seeds."""
        return [best for seed in self.seeds if (best := self.best(seed)) is not None]

    @property
    def factor(self) -> float:
        """The largest ratio of two neighbouring rates: a best rate is not known better than this."""
        return max((second / first for first, second in pairwise(self.rates)), default=1.0)


def _lowest(points: Sequence[tuple[float, float]]) -> float:
    """Where a parabola through three points, of which the middle one is the lowest, has its lowest point."""
    (x0, y0), (x1, y1), (x2, y2) = points
    left, right = (y1 - y0) / (x1 - x0), (y2 - y1) / (x2 - x1)
    curvature = (right - left) / (x2 - x0)
    return x1 if curvature <= 0 else min(max((x0 + x1) / 2 - left / (2 * curvature), x0), x2)


def sweeps(numbers: Mapping[str, Any]) -> list[Sweep]:
    """The cells of a study in their order, with their losses."""
    listed = []
    for cell in numbers["plan"]["cells"]:
        runs = [run for run in numbers["runs"] if _is_of(run, cell)]
        losses: dict[int, dict[float, float | None]] = {}
        for run in runs:
            if any(_same(run["lr"], lr) for lr in cell["rates"]):
                losses.setdefault(run["seed"], {})[run["lr"]] = run["held_out"]
        trained = next((run["trained"] for run in runs if run["trained"]), 0)
        settings = {name: cell[name] for name in ("targets", "rank", "batch", "steps", "rates")}
        listed.append(Sweep(**settings, losses=losses, trained=trained))
    return listed


def _is_of(run: Mapping[str, Any], cell: Mapping[str, Any]) -> bool:
    return all(run.get(name) == cell[name] for name in ("targets", "rank", "batch", "steps"))


def _same(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-9 * other


def gaps(first: Sweep, second: Sweep) -> list[float]:
    """The best loss of the first minus that of the second, at every seed that both have."""
    both = [(first.best(seed), second.best(seed)) for seed in first.seeds if seed in second.seeds]
    return [one.loss - other.loss for one, other in both if one and other]


def rank_spread(ranked: Sequence[Sweep]) -> list[float]:
    """The ratio of the largest and the smallest best rate over ranks, at every seed that all have."""
    common = [seed for seed in ranked[0].seeds if all(seed in one.seeds for one in ranked)] if ranked else []
    ratios = []
    for seed in common:
        rates = [best.fitted for one in ranked if (best := one.best(seed)) is not None]
        if len(rates) == len(ranked):
            ratios.append(max(rates) / min(rates))
    return ratios


def rate_ratios(ranked: Sequence[Sweep], full: Sweep) -> list[float]:
    """The geometric mean of the best rates over ranks divided by that of full fine-tuning, at every seed."""
    ratios = []
    for seed in full.seeds:
        rates = [best.fitted for one in ranked if (best := one.best(seed)) is not None]
        own = full.best(seed)
        if own is not None and ranked and len(rates) == len(ranked):
            ratios.append(10 ** fmean(log10(rate) for rate in rates) / own.fitted)
    return ratios
