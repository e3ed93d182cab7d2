"""The trade-off between rank, file size and error of an adapter, computed without writing a file."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from loralens.compression.directions import Protection
from loralens.compression.loss import UpdateLoss, total_error
from loralens.compression.plan import Size, TruncationPlan
from loralens.core.ranks import Rule
from loralens.core.threads import Step

# The share of the energy that a recommended rank may lose. It is the square of the error, so the error is 10 %. This is
# a convention and not a promise about a task: `loralens behave` measures what a smaller adapter does to outputs.
LOSS = 0.01
EVERY = 16  # every rank up to this is on the curve; above it, four for each doubling: 16, 20, 24, 28, 32, 40 …


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """The size and the error of one choice of ranks.

    Attributes
    ----------
    ranks : tuple of int
        The lowest and the highest rank.
    parameters, bytes : int
        Of the whole adapter; the bytes include the header of the file.
    error : float
        ‖ΔW−ΔW'‖/‖ΔW‖ over the modules of the plan, before rounding.
    """

    ranks: tuple[int, int]
    parameters: int
    bytes: int
    error: float


@final
@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One point of the curve: a uniform rank, and the best ranks of the same size."""

    rank: int
    uniform: Choice
    budget: Choice


def curve_ranks(most: int) -> list[int]:
    """The ranks of the curve from 1 to ``most``: all up to 16, then four for each doubling."""
    shown_ranks, rank = [], 1
    while rank < most:
        shown_ranks.append(rank)
        rank += 1 if rank < EVERY else 2 ** (rank.bit_length() - 3)  # a quarter of the power of 2 below
    return [*shown_ranks, most] if most else []


def rank_curve(
    plan: TruncationPlan,
    *,
    size: Size,
    one_rank: bool = False,
    protect: Protection = "absolute",
    step: Step | None = None,
) -> list[CurvePoint]:
    """The size and the error at every rank, with one rank for all modules and with the best ranks of the same size.

    Parameters
    ----------
    plan : TruncationPlan
    size : callable
        Adapter → bytes of its file.
    one_rank : bool
        Whether the file format has one rank for all modules. The best ranks are then no better than a uniform rank.
    protect : "absolute", "relative" or mapping of str to float
        What the budget protects, as in `TruncationPlan.ranks`.
    step : callable, optional
        Called with 1 after every point.

    Returns
    -------
    list of CurvePoint
        From the highest rank down to 1.

    Notes
    -----
    The budget of a point is the size of the factors at uniform rank. Its file is therefore no larger, except for a few
    digits in its header. If ``protect`` is "absolute", its error is at most that of the uniform rank.
    """
    most = max((plan.adapter[name].rank for name in plan.directions), default=0)
    uniform_ranks = plan.chooser("rank", one_rank=one_rank)
    best_ranks = plan.chooser("bytes", one_rank=one_rank, protect=protect)
    measure, nbytes = _choices(plan, lambda chosen: size(plan.at(chosen))), plan.measure("nbytes")
    points = []
    for rank in reversed(curve_ranks(most)):
        chosen = uniform_ranks(Rule("rank", rank))
        best = best_ranks(Rule("bytes", nbytes(chosen)))
        points.append(CurvePoint(rank, measure(chosen), measure(best)))
        if step:
            step(1)
    return points


def _choices(plan: TruncationPlan, size: Callable[[Mapping[str, int]], int]) -> Callable[[Mapping[str, int]], Choice]:
    """A function from ranks to their size and error. The error of a module at a rank is computed once."""
    parameters = plan.measure("parameters")
    errors: dict[tuple[str, int], UpdateLoss] = {}

    def measure_choice(chosen: Mapping[str, int]) -> Choice:
        new = {name: rank for name, rank in chosen.items() if (name, rank) not in errors}
        errors.update({(name, new[name]): loss for name, loss in plan.losses(new).items()})
        error = total_error({name: errors[name, rank] for name, rank in chosen.items()})
        ranks = [rank for rank in chosen.values() if rank]  # modules of rank 0 are left out
        return Choice((min(ranks, default=0), max(ranks, default=0)), parameters(chosen), size(chosen), error)

    return measure_choice


def recommended_point(points: Sequence[CurvePoint], *, budget: bool = False) -> CurvePoint | None:
    """The point of the lowest rank that loses at most `LOSS` of the energy; None if there is no point.

    With ``budget`` the loss is that of the best ranks in the same size, chosen module by module.
    """
    choices = ((point, point.budget if budget else point.uniform) for point in reversed(points))
    return next((point for point, choice in choices if choice.error**2 <= LOSS), None)
