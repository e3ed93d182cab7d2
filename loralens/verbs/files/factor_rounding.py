"""Rounds the factors of an adapter that is to be written, measures the error of that, and refuses a large error."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import final

import numpy as np

from loralens.compression.directions import DType, cast_factors, locate_errors
from loralens.compression.loss import UpdateLoss, total_error, update_loss
from loralens.core.adapter import Adapter
from loralens.core.lowrank import LowRank
from loralens.core.messages import warn
from loralens.core.names import some
from loralens.core.structured import Update
from loralens.core.threads import in_threads, processor_count
from loralens.errors import OptionError, place
from loralens.tables.numbers import percent
from loralens.tables.table import Column, Keys, Recorded

# The largest relative error of one module that is written without --allow-loss. Rounding both factors to bfloat16 costs
# about 0.002 and to float16 about 0.0003, so only numbers below the range of float16 (6e-8) or a scale that is folded
# into a narrow factor exceed it: an update with entries of 3e-8 loses half of itself in float16.
LIMIT = 0.01


@final
@dataclass(frozen=True, slots=True)
class RoundingCost(Recorded):
    """The error that rounding the factors adds to an adapter.

    Attributes
    ----------
    total : float
        ‖ΔW−ΔW'‖_F/‖ΔW‖_F over all modules.
    worst : float
        The largest relative error of a single module.
    module : str
        The module with that error; empty if nothing is lost.
    """

    total: float = 0.0
    worst: float = 0.0
    module: str = ""

    @classmethod
    def between(
        cls, before: Adapter, after: Mapping[str, Update], *, allow_loss: bool, dtype: str | None = None
    ) -> "RoundingCost":
        """Measure the error of every module of ``before`` in ``after``, which has the same names.

        Parameters
        ----------
        before : Adapter
        after : mapping of str to Update
            The modules as they are read back, so that a scale which the dialect folds into the factors counts too.
        allow_loss : bool
            Return an error above `LIMIT` instead of refusing it.
        dtype : str, optional
            The dtype that was asked for, for the message.

        Raises
        ------
        OptionError
            The relative error of a module is above `LIMIT`.
        """

        def loss(name: str) -> UpdateLoss:
            with place(name):
                return update_loss(before[name], after[name])

        # Dtypes and scales often show that no bit changed, and then no factor has to be read.
        if all(_is_surely_equal(module, after[name]) for name, module in before.items()):
            return cls()
        # Factors with NaN or Inf have no norm, and are carried over as they are.
        numbers = [
            name
            for name, module in before.items()
            if not isinstance(module, LowRank) or all(np.isfinite(factor).all() for factor in (module.B, module.A))
        ]
        if broken := [name for name in before if name not in set(numbers)]:
            many = (
                f"{some(broken)} hold NaN or Inf, and are"
                if len(broken) > 1
                else f"{broken[0]} holds NaN or Inf, and is"
            )
            consequence = "the error is that of the other modules" if numbers else "nothing could be measured"
            warn(f"{many} written so; {consequence}", fix="the adapter is damaged or diverged: use an earlier one")
        # All of them, since modules without a loss count in the norm of the whole.
        losses = in_threads(loss, numbers, processor_count())
        module = max(losses, key=lambda name: losses[name].relative_error, default="")
        if not module or not losses[module].relative_error:
            return cls()
        cost = cls(total_error(losses), losses[module].relative_error, module)
        if cost.worst > LIMIT and not allow_loss:
            raise OptionError(
                f"{module}: rounding{f' to {dtype}' if dtype else ''} costs {percent(cost.worst)} of ΔW "
                f"({percent(cost.total)} of all modules)",
                # bfloat16 has the range of float32, so it helps where the numbers are too small for float16.
                fix=f"give --dtype {'bf16 or ' if dtype == 'f16' else ''}f32, or --allow-loss to write it all the same",
            )
        return cost

    @classmethod
    def json_keys(cls) -> Keys:
        """The keys of the JSON object."""
        return (
            Column("error", "total"),
            Column(
                "worst",
                lambda cost: {"module": cost.module, "error": cost.worst} if cost.module else None,
                type=[{"module": str, "error": float}, None],
            ),
        )

    def __str__(self) -> str:
        return (
            f"rounding    ‖ΔW−ΔW'‖/‖ΔW‖ = {percent(self.total)} over all modules, "
            f"at most {percent(self.worst)} ({self.module})"
        )


def round_factors(adapter: Adapter, dtype: DType | None) -> Adapter:
    """The adapter with all factors rounded once to a dtype; None keeps them as they are.

    Raises
    ------
    FormatError
        A number is too large for ``dtype``; this is raised when the factor is read.
    """
    if dtype is None:
        return adapter
    modules = {name: cast_factors(module, dtype) for name, module in adapter.items()}
    # Rounding is lazy: a number that does not fit is found only while the file is written, and has to name its module.
    changed = {name: locate_errors(name, new) for name, new in modules.items() if new is not adapter[name]}
    return replace(adapter, modules={**modules, **changed})


def _is_surely_equal(before: Update, after: Update) -> bool:
    """Whether scales and dtypes alone show that two updates have the same factors. False if they leave it open."""
    if not isinstance(before, LowRank) or not isinstance(after, LowRank) or before.scale != after.scale:
        return False
    pairs = zip(before.factors, after.factors, strict=True)
    # Every float8, float16 and bfloat16 number is a float32 number too.
    return all(old.dtype == new.dtype or (old.dtype.itemsize < 4 and new.dtype.itemsize >= 4) for old, new in pairs)
