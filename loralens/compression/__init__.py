"""Smaller adapters, and what the smaller size cost."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.compression.bits import allocate_bits
    from loralens.compression.calibration import measure_moments
    from loralens.compression.loss import UpdateLoss, losses
    from loralens.compression.plan import TruncationPlan

__all__ = [
    "TruncationPlan",
    "UpdateLoss",
    "allocate_bits",
    "losses",
    "measure_moments",
]

__getattr__, __dir__ = lazy_exports(
    __name__,
    {
        "UpdateLoss": "loss",
        "TruncationPlan": "plan",
        "allocate_bits": "bits",
        "losses": "loss",
        "measure_moments": "calibration",
    },
)
