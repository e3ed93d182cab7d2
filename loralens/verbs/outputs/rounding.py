"""Rounds the factors of an adapter that is written, measures the error of that, and refuses a large one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import cpu_count
from typing import Any, final

import numpy as np

from loralens.compression.directions import DType, cast_factors, locate_errors
from loralens.compression.loss import UpdateLoss, total_error, update_loss
from loralens.compression.quantise import quantise
from loralens.core.adapter import Adapter
from loralens.core.lowrank import LowRank
from loralens.core.structured import Update
from loralens.core.threads import in_threads
from loralens.errors import OptionError, place
from loralens.formats.dialects.table import QUANTISED
from loralens.tables.numbers import percent

LIMIT = 0.01  # of one module: rounding to bfloat16 costs about 0.002, to float16 0.0003 unless numbers are too small


@final
@dataclass(frozen=True, slots=True)
class RoundingCost:
    """What rounding costs an adapter.

    Attributes
    ----------
    total : float
        ‖ΔW−ΔW'‖/‖ΔW‖ over all modules.
    worst : float
        The same of the module that loses most.
    module : str
        That module; empty where nothing is lost.
    """

    total: float = 0.0
    worst: float = 0.0
    module: str = ""

    @classmethod
    def between(
        cls, before: Adapter, after: Mapping[str, Update], *, allow_loss: bool, dtype: str | None = None
    ) -> "RoundingCost":
        """What modules lost that are not surely the same; ``after`` is by the names of ``before``.

        Raises
        ------
        OptionError
            A module lost more than `LIMIT`, and nobody allowed that.
        """

        def loss(name: str) -> UpdateLoss:
            with place(name):
                return update_loss(before[name], after[name])

        changed = {name for name, module in before.items() if not _is_surely_equal(module, after[name])}
        if not changed:
            return cls()
        numbers = [name for name, module in before.items() if _is_finite(module)]  # of NaN nothing can be told
        losses = in_threads(loss, numbers, cpu_count() or 1)  # those that lost nothing are part of the whole
        module = max(losses, key=lambda name: losses[name].relative_error, default="")
        if not module:
            return cls()
        cost = cls(total_error(losses), losses[module].relative_error, module)
        if cost.worst > LIMIT and not allow_loss:
            cost.refuse(dtype)
        return cost if cost.worst else cls()

    def refuse(self, dtype: str | None) -> None:
        """Raise what says that this is too much."""
        narrow = f" to {dtype}" if dtype else ""
        raise OptionError(
            f"{self.module}: rounding{narrow} costs {percent(self.worst)} of ΔW ({percent(self.total)} of all modules)",
            fix=f"give --dtype {'bf16 or ' if dtype == 'f16' else ''}f32, or --allow-loss to write it all the same",
        )

    def record(self) -> dict[str, Any]:
        """As JSON."""
        worst = {"module": self.module, "error": self.worst} if self.module else None
        return {"error": self.total, "worst": worst}

    def __str__(self) -> str:
        return (
            f"rounding    ‖ΔW−ΔW'‖/‖ΔW‖ = {percent(self.total)} over all modules, "
            f"at most {percent(self.worst)} ({self.module})"
        )


def round_factors(adapter: Adapter, dtype: DType | None) -> Adapter:
    """The adapter, its factors rounded once to ``dtype`` where one was given; a module that is no pair is refused."""
    if dtype is None:
        return adapter
    modules = {name: cast_factors(module, dtype) for name, module in adapter.items()}
    changed = {name: locate_errors(name, new) for name, new in modules.items() if new is not adapter[name]}
    return replace(adapter, modules={**modules, **changed})


def quantise_factors(adapter: Adapter, bits: int | Mapping[str, Sequence[int]]) -> Adapter:
    """The adapter in whole numbers of a few bits; modules that are in few bits already, as they are."""
    plain_modules = {name: m for name, m in adapter.items() if m.origin is None or m.origin.format != QUANTISED}
    few = quantise(replace(adapter, modules=plain_modules), bits=bits, threads=cpu_count() or 1)
    return replace(adapter, modules={**adapter.modules, **few.modules})


def _is_finite(module: Update) -> bool:
    """Whether the factors of a pair are numbers."""
    return not isinstance(module, LowRank) or all(np.isfinite(factor).all() for factor in (module.B, module.A))


def _is_surely_equal(before: Update, after: Update) -> bool:
    """Whether the factors are surely the same numbers, by their scale and dtypes alone."""
    if not isinstance(before, LowRank) or not isinstance(after, LowRank) or before.scale != after.scale:
        return False
    if after.origin is not None and after.origin.format == QUANTISED:
        return before.origin == after.origin
    pairs = zip(before.factors, after.factors, strict=True)
    return all(old.dtype == new.dtype or (old.dtype.itemsize < 4 and new.dtype.itemsize >= 4) for old, new in pairs)
