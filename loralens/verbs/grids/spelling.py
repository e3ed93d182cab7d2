"""How values and options are written in ``--grid``, in ``runs.csv`` and in the names of runs."""

from collections.abc import Mapping
from typing import Any

from loralens.training.course import optimiser_name


def value_text(value: Any) -> str:
    """A value as it is written in ``--grid``, in ``runs.csv`` and in the name of a run."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.12g}"
    if isinstance(value, Mapping):
        return "+".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return "+".join(value) or "none"
    # A function that makes an optimiser.
    return optimiser_name(value) if callable(value) else str(value)


def spell(option: str) -> str:
    """The option as it is written on the command line."""
    return option.replace("_", "-")
