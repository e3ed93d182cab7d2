"""Data types as options name them: of factors that are written, and of models that are run."""

from typing import Any

import ml_dtypes
import numpy as np

DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def dtype_of(name: str | None) -> Any:
    """The dtype of an option ``dtype``; None where it was not given, or is none of NumPy's."""
    if name not in DTYPES:
        return None
    return np.dtype(ml_dtypes.bfloat16 if name == "bf16" else DTYPES[name])
