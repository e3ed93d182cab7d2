"""Smaller adapters, and what the smaller size cost."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.compression.bits import allocate
    from loralens.compression.calibration import measure_moments
    from loralens.compression.loss import Loss, losses
    from loralens.compression.plan import Plan
    from loralens.compression.truncate import Truncation

__all__ = [
    "Loss",
    "Plan",
    "Truncation",
    "allocate",
    "losses",
    "measure_moments",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "Loss": "loss",
        "Plan": "plan",
        "Truncation": "truncate",
        "allocate": "bits",
        "losses": "loss",
        "measure_moments": "calibration",
    },
)
