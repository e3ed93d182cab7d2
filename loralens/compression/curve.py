"""The trade-off of rank, size and error of an adapter, before anything is written."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

from loralens.compression.bits import tradeoff
from loralens.compression.loss import total_error
from loralens.compression.plan import Plan, Size
from loralens.compression.protection import Protection, protection
from loralens.core.ranks import Rule, shared_ranks
from loralens.core.threads import Step

EVERY = 16  # ranks up to here are all on the curve; above, four for each doubling: 16, 20, 24, 28, 32, 40 …


@final
@dataclass(frozen=True, slots=True)
class Choice:
    """What one choice of ranks takes and loses.

    Attributes
    ----------
    ranks : tuple of int
        The lowest and the highest.
    parameters, bytes : int
        Of the whole adapter; bytes of the file with its header.
    error : float
        ‖ΔW−ΔW'‖/‖ΔW‖ over the modules of the plan, before rounding.
    """

    ranks: tuple[int, int]
    parameters: int
    bytes: int
    error: float


@final
@dataclass(frozen=True, slots=True)
class Point:
    """One rank for all modules, and the best ranks of the same size.

    Attributes
    ----------
    rank : int
    uniform, budget : Choice
    few_bits : float or None
        The error to expect of the best ranks and bits in the bytes of ``uniform``; None where that was not asked for.
    """

    rank: int
    uniform: Choice
    budget: Choice
    few_bits: float | None = None


def ranks_shown(most: int) -> list[int]:
    """Ranks from 1 to ``most``: all up to 16, then four for each doubling."""
    shown_ranks, rank = [], 1
    while rank < most:
        shown_ranks.append(rank)
        rank += 1 if rank < EVERY else 2 ** (rank.bit_length() - 3)
    return [*shown_ranks, most] if most else []


def rank_curve(
    plan: Plan,
    *,
    size: Size,
    one_rank: bool = False,
    protect: Protection = "absolute",
    header: int | None = None,
    step: Step | None = None,
) -> list[Point]:
    """What every rank takes and loses, given to all modules or, at the same size, where it saves most.

    Parameters
    ----------
    plan : Plan
    size : callable
        Adapter → bytes of its file.
    one_rank : bool
        The file has one rank for all modules: so has the budget, which then buys no more than uniform rank.
    protect : "absolute", "relative" or mapping of str to float
        What the budget protects, as in `truncate`.
    header : int, optional
        Bytes that a file in few bits (loralens-q) has beside its directions: with it, ``few_bits`` is there.
    step : callable, optional
        Called with 1 after every point.

    Returns
    -------
    list of Point
        By falling rank, from the highest there is.

    Notes
    -----
    The budget of a point is the bytes that the factors of uniform rank take, so its file is no larger, but for the
    digits of its header. Its error is at most that of uniform rank when ``protect`` is "absolute".
    """
    most = max((plan.adapter[name].rank for name in plan.found), default=0)
    few = None if header is None else _few_bits(plan, protect, header)
    points = []
    for rank in reversed(ranks_shown(most)):
        chosen = plan.ranks(Rule("rank", rank), one_rank=one_rank)
        best = plan.ranks(Rule("bytes", plan.at(chosen).nbytes), one_rank=one_rank, protect=protect)
        uniform = choice(plan, chosen, size)
        points.append(Point(rank, uniform, choice(plan, best, size), few(uniform.bytes) if few else None))
        if step:
            step(1)
    return points


def _few_bits(plan: Plan, protect: Protection, header: int) -> Callable[[int], float | None]:
    """Bytes of a file → the error to expect of the best bits in them; None where they are too few."""
    spectra = {name: one.s for name, one in plan.found.items()}
    steps = tradeoff(
        spectra,
        {name: plan.adapter[name].shape for name in spectra},
        weights=protection(spectra, protect),
        shared=shared_ranks(plan.adapter.modules),
    )

    def error(room: int) -> float | None:
        last = bisect_right(steps.nbytes, room - header) - 1
        return float(steps.error[last]) if last >= 0 else None

    return error


def choice(plan: Plan, chosen: dict[str, int], size: Size) -> Choice:
    """What these ranks take and lose."""
    after = plan.at(chosen)
    ranks: Sequence[int] = [after[name].rank for name in chosen if name in after]
    span = min(ranks, default=0), max(ranks, default=0)
    return Choice(span, after.parameters, size(after), total_error(plan.losses(chosen)))
