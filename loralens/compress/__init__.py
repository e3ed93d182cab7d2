"""Smaller adapters, and what the smaller size cost."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loralens.compress.calibration import calibrate

__all__ = ["calibrate"]


def __getattr__(name: str) -> Any:
    """`calibrate`, imported when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'loralens.compress' has no attribute {name!r}")
    return getattr(import_module("loralens.compress.calibration"), name)
