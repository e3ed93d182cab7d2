"""Truncation in one call: a plan, the ranks that a rule gives it, the adapter at these ranks, and its errors."""

from collections.abc import Mapping
from math import hypot
from typing import NamedTuple

from loralens import Adapter
from loralens.compression import TruncationPlan, UpdateLoss, losses


def total_error(found: Mapping[str, UpdateLoss]) -> float:
    """‖ΔW − ΔW'‖ / ‖ΔW‖ of all modules together."""
    return hypot(*(one.frobenius * one.relative_error for one in found.values())) / hypot(
        *(one.frobenius for one in found.values())
    )


class Truncation(NamedTuple):
    adapter: Adapter
    losses: dict[str, UpdateLoss]


def truncate(adapter, rule, *, modules=(), dtype=None, moments=None, threads=1, **options) -> Truncation:
    """The options are those of `TruncationPlan.of` and of `TruncationPlan.ranks`."""
    plan = TruncationPlan.of(adapter, modules=modules, dtype=dtype, moments=moments, threads=threads)
    after = plan.at(plan.ranks(rule, **options))
    return Truncation(after, losses(adapter, after, threads=threads))
