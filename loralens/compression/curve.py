"""The trade-off between rank, file size and error of an adapter, computed without writing a file."""

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import final

from loralens.compression.bits import tradeoff
from loralens.compression.loss import UpdateLoss, total_error
from loralens.compression.plan import Size, TruncationPlan
from loralens.compression.protection import Protection, protection
from loralens.core.ranks import Rule, shared_ranks
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
    """One point of the curve: a uniform rank, and the best ranks of the same size.

    Attributes
    ----------
    few_bits : float or None
        The expected error of the best ranks and bits in the bytes of ``uniform``; None if it was not requested.
    """

    rank: int
    uniform: Choice
    budget: Choice
    few_bits: float | None = None


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
    header: int | None = None,
    size_at: Callable[[Mapping[str, int]], int] | None = None,
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
    header : int, optional
        Bytes that a file in few bits (loralens-q) needs besides its directions; ``few_bits`` is computed only with it.
    size_at : callable, optional
        Ranks → bytes of the file, where this is known without making the adapter; ``size`` is then not used.
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
    few = None if header is None else _few_bits(plan, protect, header)
    uniform_ranks = plan.chooser("rank", one_rank=one_rank)
    best_ranks = plan.chooser("bytes", one_rank=one_rank, protect=protect)
    measure, nbytes = _choices(plan, size_at or (lambda chosen: size(plan.at(chosen)))), plan.measure("nbytes")
    points = []
    for rank in reversed(curve_ranks(most)):
        chosen = uniform_ranks(Rule("rank", rank))
        best = best_ranks(Rule("bytes", nbytes(chosen)))
        uniform = measure(chosen)
        points.append(CurvePoint(rank, uniform, measure(best), few(uniform.bytes) if few else None))
        if step:
            step(1)
    return points


def _few_bits(plan: TruncationPlan, protect: Protection, header: int) -> Callable[[int], float | None]:
    """A function from the bytes of a file to the expected error of the best bits in it; None if they are too few."""
    spectra = {name: one.s for name, one in plan.directions.items()}
    steps = tradeoff(
        spectra,
        {name: plan.adapter[name].shape for name in spectra},
        weights=protection(spectra, protect),
        shared=shared_ranks(plan.adapter.modules),
    )

    def error(room: int) -> float | None:
        # The last point whose bytes fit into the room that the header leaves.
        last = bisect_right(steps.nbytes, room - header) - 1
        return float(steps.error[last]) if last >= 0 else None

    return error


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
