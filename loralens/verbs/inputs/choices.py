"""The possible values of options that several verbs have, and checks of values."""

from collections.abc import Iterable, Sequence
from math import isfinite
from numbers import Real
from typing import Any, Literal, get_args

import ml_dtypes
import numpy as np

from loralens.errors import OptionError

FloatType = Literal["f32", "bf16", "f16"]
FLOAT_TYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}  # option → the name in NumPy and torch
IntegerType = Literal["int8", "int4"]
INTEGER_TYPES = {"int8": 8, "int4": 4}  # option → bits of a number
TargetFormat = Literal["peft", "kohya", "diffusers", "comfyui", "mlx", "loralib", "gguf", "loralens-q"]
# The dialects that have a writer. They are written out, as the table of dialects takes long to import; a test compares.
TARGET_FORMATS: tuple[str, ...] = get_args(TargetFormat)


def check_choice(name: str, value: object, allowed: Iterable[str]) -> None:
    """Refuse a value of the option ``name`` that is none of ``allowed``; None means that it was not given.

    The command line refuses such values itself. In Python a literal type is only a promise.
    """
    words = list(allowed)
    if value is not None and value not in words:
        raise OptionError(f"{name} {value!r} is not possible", fix=f"choose one of {', '.join(words)}")


def check_finite(name: str, value: object) -> None:
    """Refuse a value of the option ``name`` that is not a finite number."""
    if not isinstance(value, Real) or not isfinite(value):
        raise OptionError(f"{name} {value!r} is not possible", fix="give a finite number")


def as_globs(modules: str | Sequence[str]) -> tuple[str, ...]:
    """The globs of an option ``modules``; Python may give a single one as a string."""
    return (modules,) if isinstance(modules, str) else tuple(modules)


def numpy_dtype(name: str | None) -> np.dtype[Any] | None:
    """The dtype that an option ``dtype`` names; None if it was not given, or is none of `FLOAT_TYPES`."""
    if name not in FLOAT_TYPES:
        return None
    # NumPy itself has no bfloat16.
    return np.dtype(ml_dtypes.bfloat16 if name == "bf16" else FLOAT_TYPES[name])


def check_at_least(name: str, value: float | None, least: int) -> None:
    """Refuse a value of the option ``name`` below ``least``; None means that it was not given."""
    # "not ≥" and no "<", so that NaN is refused too.
    if value is not None and not value >= least:
        raise OptionError(f"{name} {value!r} is not possible", fix=f"give {least} or more")


def check_counts(**counts: int | None) -> None:
    """Refuse options, by their names, that are counts below 1; None means that one was not given."""
    for name, count in counts.items():
        check_at_least(name, count, 1)
