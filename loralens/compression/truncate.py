"""Truncation: the leading directions of every update, chosen by a rule, and the resulting error."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from loralens.compression.loss import UpdateLoss, losses
from loralens.compression.plan import Size, TruncationPlan
from loralens.compression.protection import Protection
from loralens.core.adapter import Adapter
from loralens.core.moments import Moments
from loralens.core.ranks import Rule


class Truncation(NamedTuple):
    """A truncated adapter, and the error of each module, which includes the rounding of its factors."""

    adapter: Adapter
    losses: dict[str, UpdateLoss]


def truncate(
    adapter: Adapter,
    rule: Rule,
    *,
    modules: Sequence[str] = (),
    one_rank: bool = False,
    protect: Protection = "absolute",
    dtype: Any = None,
    drop_dead: bool = False,
    size: Size | None = None,
    moments: Moments | None = None,
    threads: int = 1,
) -> Truncation:
    """Truncate an adapter to the leading directions of every update; ``rule`` chooses their number.

    Parameters
    ----------
    adapter : Adapter
        Its modules are read one after the other and not kept; the factors of the result are made when they are read.
    rule : Rule
        A criterion for each module alone, or one budget for all modules. A budget of ``parameters`` up to 1 is a share.
    modules : sequence of str
        Globs over module names or kinds: other modules stay as they are, but count in a budget.
    one_rank : bool
        Whether all modules get the same rank, as far as their factors are wide enough.
    protect : "absolute", "relative" or mapping of str to float
        What a budget minimises: Σ‖ΔW−ΔW'‖², the same relative to ‖ΔW‖² of each module, or the former with a weight for
        each glob (1 for modules that no glob matches).
    dtype : dtype, optional
        The dtype of all factors; by default each keeps its own.
    drop_dead : bool
        Leave out modules whose rank becomes 0: modules that do nothing, and modules for which the budget has no room.
        Otherwise every module keeps one direction. A module with a DoRA magnitude or a bias of its own always does.
    size : callable, optional
        Adapter → size of the file to be written, for the rule ``bytes``; by default the bytes of the factors count.
    moments : Moments, optional
        The moments of real inputs (`loralens.calibrate`): the error on these inputs is minimised instead of that of ΔW.
    threads : int
        Modules worked on at a time. More than one pays only where BLAS itself uses one thread.

    Returns
    -------
    Truncation
        A module that keeps its rank and dtype is the same object, with its stored bits. An update that is no pair
        (LoKr, LoHa, full) becomes one.

    Raises
    ------
    OptionError
        The budget is too small for rank 1 everywhere, a glob matches nothing, or no module is left.
    MismatchError
        The moments belong to another adapter.
    FormatError
        A module holds NaN or Inf.

    Notes
    -----
    No update of the same rank is nearer in the Frobenius or the spectral norm (Eckart & Young 1936). ΔW is never
    formed: the work is O((out + in)·r²) a module, and two r × r matrices a module are kept in memory.
    """
    plan = TruncationPlan.of(adapter, modules=modules, dtype=dtype, moments=moments, threads=threads)
    chosen = plan.ranks(rule, one_rank=one_rank, protect=protect, drop_dead=drop_dead, size=size)
    after = plan.at(chosen)
    return Truncation(after, losses(adapter, after, threads=threads))
