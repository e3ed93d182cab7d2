"""LoRA training: layers, and their way into a model and back out as an `Adapter`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loralens.training.course import Course
    from loralens.training.fitting import Fitted, fit
    from loralens.training.injection import Injection, inject
    from loralens.training.method import METHODS
    from loralens.training.readout import read, record_of
    from loralens.training.watch import Step, Watch

__all__ = ["METHODS", "Course", "Fitted", "Injection", "Step", "Watch", "fit", "inject", "read", "record_of"]

_HOMES = {
    "METHODS": "method",
    "Course": "course",
    "Fitted": "fitting",
    "Injection": "injection",
    "Step": "watch",
    "Watch": "watch",
    "fit": "fitting",
    "inject": "injection",
    "read": "readout",
    "record_of": "readout",
}


def __getattr__(name: str) -> Any:
    """The public names, imported when they are first used: torch takes a second."""
    if name not in _HOMES:
        raise AttributeError(f"module 'loralens.training' has no attribute {name!r}")
    return getattr(import_module(f"loralens.training.{_HOMES[name]}"), name)
