"""Keep the leading directions of every update, and say what was lost."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from loralens.compression.loss import Loss, losses
from loralens.compression.plan import Plan, Size
from loralens.compression.protection import Protection
from loralens.core.adapter import Adapter
from loralens.core.moments import Moments
from loralens.core.ranks import Rule


class Truncation(NamedTuple):
    """A smaller adapter, and what each module lost by it, the rounding of its factors included."""

    adapter: Adapter
    losses: dict[str, Loss]


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
    """The adapter with the leading directions of every update, their number chosen by ``rule``.

    Parameters
    ----------
    adapter : Adapter
        Its modules are read one after the other and not kept; the factors of the result are made when they are read.
    rule : Rule
        For each module alone, or one budget for all. A fraction of ``parameters`` up to 1 is a share of all there are.
    modules : sequence of str
        Globs over module names or kinds: the others stay as they are, and count in a budget.
    one_rank : bool
        The same rank everywhere, as far as the factors are wide enough.
    protect : "absolute", "relative" or mapping of str to float
        What a budget protects: Σ‖ΔW−ΔW'‖², the same over ‖ΔW‖² of each module, or the first with a weight for each
        glob (1 for what none of them matches).
    dtype : dtype, optional
        Of all factors; by default each keeps its own.
    drop_dead : bool
        Leave out modules whose rank comes out as 0: those that do nothing, and those that a budget does not pay for.
        Without it every module keeps a direction; one with a DoRA magnitude or a bias of its own always does.
    size : callable, optional
        Adapter → bytes of the file it will be written to, for the rule ``bytes``; else the bytes of the factors count.
    moments : Moments, optional
        What real inputs excite (`loralens.compression.calibrate`): then the error on them is least, not that of ΔW.
    threads : int
        Modules worked on at a time. More than one pays only where BLAS itself uses one thread.

    Returns
    -------
    Truncation
        ``adapter`` and ``losses``. What keeps its rank and dtype is the module itself, with its stored bits. An
        update that is no pair (LoKr, LoHa, full) becomes one.

    Raises
    ------
    OptionError
        A budget too small for rank 1 everywhere, a glob that matches nothing, nothing left.
    MismatchError
        Moments of another adapter.
    FormatError
        A module holds NaN or Inf.

    Notes
    -----
    Eckart & Young 1936: no update of the same rank is nearer in the Frobenius or the spectral norm. ΔW is never
    formed: O((out + in)·r²) a module, and two r × r matrices a module are kept in between.
    """
    plan = Plan.of(adapter, modules=modules, dtype=dtype, moments=moments, threads=threads)
    chosen = plan.ranks(rule, one_rank=one_rank, protect=protect, drop_dead=drop_dead, size=size)
    after = plan.at(chosen)
    return Truncation(after, losses(adapter, after, threads=threads))
