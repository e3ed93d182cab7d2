"""Smaller adapters, and what the smaller size cost."""

from typing import TYPE_CHECKING

from loralens.exports import lazy_exports

if TYPE_CHECKING:
    from loralens.compression.calibration import measure_moments as measure_moments
    from loralens.compression.loss import UpdateLoss as UpdateLoss
    from loralens.compression.loss import losses as losses
    from loralens.compression.truncation_plan import TruncationPlan as TruncationPlan
else:
    __all__, __getattr__, __dir__ = lazy_exports(__name__)
