"""The possible values of options that several verbs have, and checks of values."""

from collections.abc import Iterable, Sequence
from math import isfinite
from numbers import Real
from typing import Any

import ml_dtypes
import numpy as np

from loralens.choices import FLOAT_TYPES
from loralens.core.adapter import Adapter
from loralens.errors import OptionError
from loralens.formats.dialects.image import model_of

Blocks = int | str | Sequence[int | str]  # 3, "4-8", "IN04", or several of them


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


def weights_by_module(adapter: Adapter, preset: str | None, blocks: Any) -> dict[str, float] | None:
    """The weight of each module; None if neither option is given.

    Raises
    ------
    OptionError
        The adapter is of no known image model, or the model has no such preset or block.
    """
    if preset is None and blocks is None:
        return None
    model = model_of(adapter)
    if model is None:
        raise OptionError(
            "weights of blocks are for adapters of SD 1.5, SD 2, SDXL and FLUX.1, and this one has other modules",
            fix="choose modules by their names: --modules GLOB",
        )
    # Imported here, since most adapters are scaled and cut without it.
    from loralens.core.selection import weights_of_modules

    layers = {name: model.find(name, module.shape)[0] for name, module in adapter.items()}
    return weights_of_modules(model, layers, preset=preset, blocks=blocks)
